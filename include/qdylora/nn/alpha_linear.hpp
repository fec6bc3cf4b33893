// AlphaLinear: a linear layer on binary codes whose scales are trained (AlphaTuning, Kwon et al. 2022). The signs are frozen and may be
// shared by many tasks; of the scales alpha_k, a task has its own of the first planes: of alpha_1 alone, as published, or of more.
//
//   forward    y  = x W^T + bias,      W[i, j] = sum_k alpha_k[i, g(j)] b_k[i, j],   g(j) = j / group_size
//   backward   dx = dy W,              d alpha_k[i, g] += sum_{j in g} b_k[i, j] D[i, j],   D = dy^T x
//   x [tokens, in], y [tokens, out], W and D [out, in]
//
// W and D are made and used a part at a time.
// Planes have an order (quant/binary_code.hpp): set_planes(q) computes with the first q, and a backward pass then trains those alone.
// set_tuned(false) computes with the codes' own scales: the base, of which nothing trains.
#pragma once

#include <algorithm>
#include <concepts>
#include <memory>
#include <string>
#include <utility>

#include <qdylora/backend.hpp>
#include <qdylora/nn/own_pass.hpp>
#include <qdylora/nn/parameter.hpp>
#include <qdylora/quant/binary_quantize.hpp>

namespace qdylora {

inline constexpr Index alpha_panel_size = 512;  // rows of D at a time

struct AlphaOptions {
  Index trained_planes = 1;  // 1: alpha_1, as published; as many as the codes have: all scales
  std::string name = "layer";
};

/// What can compute with AlphaLinear.
template <class B, class T>
concept AlphaBackend = BackendFor<B, T> && HasBinaryCodes<B, T>;

/// What the backward pass of one forward pass of an AlphaLinear needs. Borrows x, which must stay as it is until then.
template <Scalar T>
struct AlphaContext {
  MatrixView<const T> x;
  Index planes = 0, trained = 0;  // in use, and how many of them have the layer's own scales
  bool ready = false;
};

template <Scalar T, class Backend = Cpu>
requires AlphaBackend<Backend, T>
class AlphaLinear : public OwnPass<AlphaLinear<T, Backend>, T, typename Backend::Memory, AlphaContext<T>> {
  using Own = OwnPass<AlphaLinear, T, typename Backend::Memory, AlphaContext<T>>;

 public:
  using Own::forward, Own::backward;
  using Acc = Accumulator<T>;
  using Memory = typename Backend::Memory;
  using Param = Parameter<Acc, Memory>;
  using Codes = BinaryCodedTensor<Memory>;

  using Context = AlphaContext<T>;

  /// Codes `weight` [out, in], which is in the host's memory.
  template <class S>
  AlphaLinear(MatrixView<S> weight, AlphaOptions options = {}, BinaryCodeOptions code = {}, Backend backend = {})
      : AlphaLinear(make_codes(weight, code, backend), std::move(options), backend) {}
  template <class S, class M>
  AlphaLinear(const Matrix<S, M>& weight, AlphaOptions options = {}, BinaryCodeOptions code = {}, Backend backend = {})
      : AlphaLinear(weight.view(), std::move(options), code, backend) {}
  /// On codes that exist, shared with other layers. The trained scales begin as theirs.
  /// Throws Errc::bad_argument unless 1 <= trained_planes <= planes.
  AlphaLinear(std::shared_ptr<const Codes> codes, AlphaOptions options = {}, Backend backend = {})
      : backend_(backend), options_(std::move(options)), codes_(std::move(codes)) {
    QDYLORA_EXPECTS(codes_ != nullptr, bad_argument, options_.name + ": no codes");
    planes_ = codes_->planes();
    expect_planes("trained_planes", options_.trained_planes);
    const Index rows = options_.trained_planes * out();
    alpha_ = std::make_shared<Param>(options_.name + ".alpha", rows, codes_->groups());
    backend_.copy(codes_->scales().top_rows(rows), alpha_->value.view());
    backend_.fill(alpha_->gradient.view(), Acc{});
  }

  Index in() const noexcept { return codes_->cols(); }
  Index out() const noexcept { return codes_->rows(); }
  const std::shared_ptr<const Codes>& codes() const noexcept { return codes_; }
  const AlphaOptions& options() const noexcept { return options_; }
  const Backend& backend() const noexcept { return backend_; }

  /// The trained scales [trained_planes * out, groups]: row k * out + i is of plane k and output i.
  Param& alpha() noexcept { return *alpha_; }
  const Param& alpha() const noexcept { return *alpha_; }
  Parameters<Acc, Memory> parameters() const { return {alpha_}; }

  /// A frozen bias [1, out].
  void set_bias(MatrixView<const Acc> bias) {
    expect_shape((options_.name + ": bias").c_str(), bias, 1, out());
    bias_ = Matrix<Acc, Memory>(1, out());
    backend_.copy(bias, bias_.view());
  }
  MatrixView<const Acc> bias() const noexcept { return bias_.view(); }

  /// How many planes the next forward passes use. Throws Errc::bad_argument outside 1 ... the codes' planes.
  void set_planes(Index planes) {
    expect_planes("planes", planes);
    planes_ = planes;
  }
  Index planes() const noexcept { return planes_; }
  /// Whether the next forward passes use the trained scales (at first they do), or those of the codes.
  void set_tuned(bool tuned) noexcept { tuned_ = tuned; }
  bool tuned() const noexcept { return tuned_; }

  void forward(In<T> x, MatrixView<T> y, Context& context) const {
    context.ready = false;
    expect_shape((options_.name + ": x").c_str(), x, x.rows, in());
    expect_shape((options_.name + ": y").c_str(), y, x.rows, out());
    context = {x, planes_, tuned_ ? std::min(planes_, options_.trained_planes) : 0};
    backend_.matmul(x, codes(context.planes, context.trained), y, Update::overwrite);
    if (bias_.size() > 0) backend_.add_row(bias_.view(), y);
    context.ready = true;
  }

  /// An empty dx is not computed. Throws Errc::state_order unless `context` comes from a forward pass.
  void backward(In<T> dy, MatrixView<T> dx, Context& context, GradientMode mode = GradientMode::accumulate) {
    QDYLORA_EXPECTS(context.ready, state_order, options_.name + ": backward before forward");
    const auto x = context.x;
    expect_shape((options_.name + ": dy").c_str(), dy, x.rows, out());
    if (dx.data != nullptr) {
      expect_shape((options_.name + ": dx").c_str(), dx, x.rows, in());
      backend_.matmul_transposed(dy, codes(context.planes, context.trained), dx, Update::overwrite);
    }
    if (mode == GradientMode::accumulate) add_gradient(dy, context);
  }

  /// W of the first `planes` planes with the trained scales, dense.
  Matrix<Acc, Memory> weight(Index planes) const {
    expect_planes("planes", planes);
    Matrix<Acc, Memory> result(out(), in());
    backend_.dequantize(codes(planes, std::min(planes, options_.trained_planes)), result.view());
    return result;
  }

 private:
  template <class S>
  static std::shared_ptr<const Codes> make_codes(MatrixView<S> weight, BinaryCodeOptions options, const Backend& backend) {
    std::shared_ptr<const BinaryCodedTensor<>> codes;
    if constexpr (HasHostLoop<Backend>) {
      const auto parallel_for = [&backend](Index count, const auto& f) { backend.parallel_for(count, f); };
      codes = std::make_shared<const BinaryCodedTensor<>>(binary_quantize(weight, options, parallel_for));
    } else {
      codes = std::make_shared<const BinaryCodedTensor<>>(binary_quantize(weight, options));
    }
    if constexpr (Memory::host) return codes;
    else return std::make_shared<const Codes>(backend.upload(*codes));
  }

  void expect_planes(const char* what, Index planes) const {
    QDYLORA_EXPECTS(planes >= 1 && planes <= codes_->planes(), bad_argument,
                    options_.name + ": " + what + " " + std::to_string(planes) + " is not in 1 ... " + std::to_string(codes_->planes()));
  }

  static MatrixView<const Acc> as_const(const Matrix<Acc, Memory>& matrix) { return matrix.view(); }

  // The first planes, of them the first `trained` with the layer's own scales.
  BinaryCodedView<Acc> codes(Index planes, Index trained) const {
    return codes_->view(planes, std::as_const(alpha_->value).view().top_rows(trained * out()));
  }

  void add_gradient(MatrixView<const T> dy, const Context& context) {
    const Index planes = context.trained;
    if (planes == 0) return;
    const auto signs = codes(planes, planes);
    const auto gradient = alpha_->gradient.view().top_rows(planes * out());
    const Index most = std::min(alpha_panel_size, out());
    auto part = temporary<Acc>(backend_, dy.rows, most), d = temporary<Acc>(backend_, most, in());
    for (Index first = 0; first < out(); first += most) {
      const Index count = std::min(most, out() - first);
      part.resize(dy.rows, count);
      d.resize(count, in());
      backend_.copy(dy.middle_cols(first, count), part.view());
      backend_.weight_gradient(as_const(part), context.x, d.view(), Update::overwrite);
      backend_.add_sums_of_signs(as_const(d), signs, first, gradient);
    }
    alpha_->touch(0, planes * out());
  }

  Backend backend_;
  AlphaOptions options_;
  std::shared_ptr<const Codes> codes_;
  std::shared_ptr<Param> alpha_;
  Matrix<Acc, Memory> bias_;
  Index planes_ = 0;
  bool tuned_ = true;
};

/// What files have of a layer: its codes and its trained scales in float32, on the host.
template <class L>
concept AlphaLayer = requires(L& layer) {
  { layer.codes() } -> std::convertible_to<std::shared_ptr<const BinaryCodedTensor<>>>;
  { layer.options() } -> std::convertible_to<AlphaOptions>;
  { layer.alpha() } -> std::convertible_to<Parameter<float>&>;
};

/// A device's layer on the host, as files take it.
template <class S>
class AlphaCopy {
 public:
  AlphaCopy(std::shared_ptr<const BinaryCodedTensor<>> codes, AlphaOptions options)
      : codes_(std::move(codes)),
        options_(std::move(options)),
        alpha_(options_.name + ".alpha", options_.trained_planes * codes_->rows(), codes_->groups()) {}

  const std::shared_ptr<const BinaryCodedTensor<>>& codes() const noexcept { return codes_; }
  const AlphaOptions& options() const noexcept { return options_; }
  Parameter<S>& alpha() noexcept { return alpha_; }
  const Parameter<S>& alpha() const noexcept { return alpha_; }

 private:
  std::shared_ptr<const BinaryCodedTensor<>> codes_;
  AlphaOptions options_;
  Parameter<S> alpha_;
};

/// Waits.
template <Scalar T, class Backend>
  requires(!Backend::Memory::host)
AlphaCopy<Accumulator<T>> to_host(const AlphaLinear<T, Backend>& layer) {
  const Backend& backend = layer.backend();
  AlphaCopy<Accumulator<T>> copy(std::make_shared<const BinaryCodedTensor<>>(backend.download(*layer.codes())), layer.options());
  backend.download(layer.alpha().value.view(), copy.alpha().value.view());
  return copy;
}

}  // namespace qdylora
