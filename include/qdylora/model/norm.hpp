// The norms of decoders, RMS or layer, frozen or trained: which one it is, its weights say.
//
//   y = n(x) * w (+ c),   n(x) = x / rms(x), or (x - mean(x)) / deviation(x):  see HasNorm and HasLayerNorm
//   trained, backward adds   dw += sum_t dy[t] n(x[t]),   dc += sum_t dy[t]
//   x, y [tokens, width], w, c [1, width]
#pragma once

#include <memory>
#include <string>
#include <utility>

#include <qdylora/model/config.hpp>
#include <qdylora/nn/dense_linear.hpp>

namespace qdylora {

/// Weights of a norm, [1, width]. A layer norm has a bias, an RMS norm none.
template <class Acc, MemoryResource Memory = HostMemory>
struct NormWeights {
  Matrix<Acc, Memory> weight, bias;

  NormWeights() = default;
  NormWeights(Matrix<Acc, Memory> weight_, Matrix<Acc, Memory> bias_ = {}) : weight(std::move(weight_)), bias(std::move(bias_)) {}
};

/// Throws Errc::shape_mismatch, naming the norm, unless it is one of the architecture's kind and of width features.
template <class Acc, class Memory>
void expect_norm(const std::string& name, const NormWeights<Acc, Memory>& norm, const DecoderConfig& config) {
  expect_shape(name.c_str(), norm.weight.view(), 1, config.width);
  const bool biased = config.architecture == Architecture::falcon;
  expect_shape((name + "'s bias").c_str(), norm.bias.view(), biased ? 1 : 0, biased ? config.width : 0);
}

template <Scalar T, class Backend>
class Norm {
 public:
  using Acc = Accumulator<T>;
  using Memory = typename Backend::Memory;
  using Weights = NormWeights<Acc, Memory>;
  using Statistics = Matrix<Acc, Memory>;
  using Param = Parameter<Acc, Memory>;

  /// Frozen, of weights that outlive it; or trained, as "<name>.weight" and "<name>.bias", which begin as copies of them.
  Norm(const Weights& weights, const std::string& name, bool trained, float epsilon, Backend backend)
      : backend_(backend), epsilon_(epsilon), frozen_(trained ? nullptr : &weights) {
    if (!trained) return;
    weight_ = parameter_of(weights.weight, name + ".weight");
    bias_ = parameter_of(weights.bias, name + ".bias");
  }

  /// Trained, those that it has; frozen, none.
  Parameters<Acc, Memory> parameters() const {
    Parameters<Acc, Memory> all;
    for (const auto& p : {weight_, bias_})
      if (p) all.push_back(p);
    return all;
  }

  /// y = norm(x); `statistics` is made, for the backward pass: [tokens, 1] of an RMS norm, [tokens, 2] of a layer norm.
  void forward(In<T> x, MatrixView<T> y, Statistics& statistics) const { normalize(x, weight(), bias(), y, statistics); }

  /// dx (+)= the gradient of x where y has the gradient dy; what is trained gets its own.
  void backward(In<T> dy, In<T> x, const Statistics& statistics, MatrixView<T> dx, Update update) {
    if (bias().data == nullptr) {
      backend_.rms_norm_backward(dy, x, weight(), statistics.view(), dx, update);
    } else if constexpr (HasLayerNorm<Backend, T>) {
      backend_.layer_norm_backward(dy, x, weight(), statistics.view(), dx, update);
    }
    if constexpr (FullBackend<Backend, T>)
      if (weight_) add_gradient(dy, x);
  }

 private:
  std::shared_ptr<Param> parameter_of(const Matrix<Acc, Memory>& begin, const std::string& name) const {
    if (begin.size() == 0) return nullptr;
    auto parameter = std::make_shared<Param>(name, begin.rows(), begin.cols());
    backend_.fill(parameter->gradient.view(), Acc{});
    backend_.copy(begin.view(), parameter->value.view());
    return parameter;
  }
  static MatrixView<const Acc> value_of(const std::shared_ptr<Param>& parameter) {
    return parameter ? std::as_const(parameter->value).view() : MatrixView<const Acc>{};
  }
  MatrixView<const Acc> weight() const { return frozen_ != nullptr ? frozen_->weight.view() : value_of(weight_); }
  MatrixView<const Acc> bias() const { return frozen_ != nullptr ? frozen_->bias.view() : value_of(bias_); }

  void normalize(MatrixView<const T> x, MatrixView<const Acc> weight, MatrixView<const Acc> bias, MatrixView<T> y,
                 Statistics& statistics) const {
    if (bias.data == nullptr) {
      statistics.resize(x.rows, 1);
      backend_.rms_norm(x, weight, epsilon_, y, statistics.view());
    } else if constexpr (HasLayerNorm<Backend, T>) {
      statistics.resize(x.rows, 2);
      backend_.layer_norm(x, weight, bias, epsilon_, y, statistics.view());
    } else {
      throw Error(Errc::unsupported, "this backend has no layer norm");
    }
  }

  // n(x) is y of a weight of ones: y itself cannot be divided by a weight that may be zero.
  void add_gradient(MatrixView<const T> dy, MatrixView<const T> x) {
    auto ones = temporary<Acc>(backend_, 1, x.cols), zeros = temporary<Acc>(backend_, bias_ ? 1 : 0, x.cols);
    auto statistics = temporary<Acc>(backend_, x.rows, bias_ ? 2 : 1);
    auto normed = temporary<T>(backend_, x.rows, x.cols);
    backend_.fill(ones.view(), Acc{1});
    backend_.fill(zeros.view(), Acc{});
    normalize(x, std::as_const(ones).view(), std::as_const(zeros).view(), normed.view(), statistics);
    backend_.column_products(dy, std::as_const(normed).view(), weight_->gradient.view());
    weight_->touch(0, 1);
    if (!bias_) return;
    detail::add_column_sums(backend_, dy, bias_->gradient.view());
    bias_->touch(0, 1);
  }

  Backend backend_;
  float epsilon_;
  const Weights* frozen_;
  std::shared_ptr<Param> weight_, bias_;
};

}  // namespace qdylora
