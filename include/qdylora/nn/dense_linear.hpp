// DenseLinear: a linear layer whose weight trains itself, without an adapter: what adapters are compared with.
//
//   forward    y  = x W^T + bias
//   backward   dx = dy W,   dW += dy^T x,   dbias += 1^T dy
//   x [tokens, in], y [tokens, out], W [out, in], bias [1, out]
//
// What an optimizer steps are master weights in Accumulator<T>, as are gradients and moments. With `bfloat16` both passes compute with W
// rounded to bfloat16 and the gradient goes to the master as if it had not been: mixed precision as it is usually done (Micikevicius et al.
// 2018), in which a step of less than half a unit of bfloat16 is not lost. The bias is added as the master has it.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include <qdylora/backend.hpp>
#include <qdylora/nn/column_sums.hpp>
#include <qdylora/nn/own_pass.hpp>
#include <qdylora/nn/parameter.hpp>
#include <qdylora/nn/weight.hpp>

namespace qdylora {

struct DenseOptions {
  bool bfloat16 = false;  // W is rounded for both passes, a copy of 2 bytes an element beside the master
  std::string name = "linear";
};

/// What the backward pass of one forward pass needs. Borrows x, which must stay as it is until then.
template <Scalar T>
struct DenseContext {
  MatrixView<const T> x;
  bool ready = false;
};

template <Scalar T, class Backend = Cpu>
  requires BackendFor<Backend, T>
class DenseLinear : public OwnPass<DenseLinear<T, Backend>, T, typename Backend::Memory, DenseContext<T>> {
  using Own = OwnPass<DenseLinear, T, typename Backend::Memory, DenseContext<T>>;

 public:
  using Own::forward, Own::backward;
  using Acc = Accumulator<T>;
  using Memory = typename Backend::Memory;
  using Param = Parameter<Acc, Memory>;
  using Context = DenseContext<T>;

  /// Begins with `weight` [out, in] where the backend has its memory, of any type, which is copied.
  template <class S>
  explicit DenseLinear(MatrixView<S> weight, DenseOptions options = {}, Backend backend = {})
      : backend_(backend),
        options_(std::move(options)),
        weight_(std::make_shared<Param>(options_.name + ".weight", weight.rows, weight.cols)) {
    backend_.fill(weight_->gradient.view(), Acc{});
    backend_.copy(weight, weight_->value.view());
    round();
  }
  template <class S>
  explicit DenseLinear(const Matrix<S, Memory>& weight, DenseOptions options = {}, Backend backend = {})
      : DenseLinear(weight.view(), std::move(options), backend) {}

  Index in() const noexcept { return weight_->value.cols(); }
  Index out() const noexcept { return weight_->value.rows(); }
  const DenseOptions& options() const noexcept { return options_; }
  const Backend& backend() const noexcept { return backend_; }

  /// "<name>.weight" [out, in], and "<name>.bias" [1, out] where there is one.
  Parameters<Acc, Memory> parameters() const {
    return bias_ ? Parameters<Acc, Memory>{weight_, bias_} : Parameters<Acc, Memory>{weight_};
  }

  /// A bias [1, out] to begin with, which trains too.
  void set_bias(MatrixView<const Acc> bias) {
    expect_shape((options_.name + ": bias").c_str(), bias, 1, out());
    if (bias_ == nullptr) bias_ = std::make_shared<Param>(options_.name + ".bias", 1, out());  // else it is an optimizer's already
    backend_.fill(bias_->gradient.view(), Acc{});
    backend_.copy(bias, bias_->value.view());
  }

  /// Makes the passes compute with the master as it is now. To be called after each change of it, by an optimizer or by hand; without
  /// DenseOptions::bfloat16 it does nothing.
  void round() {
    if (!options_.bfloat16) return;
    rounded_.resize(out(), in());
    backend_.copy(as_const(weight_->value), rounded_.view());
  }
  /// f(W) as the passes compute with it: a view of bfloat16, or of Accumulator<T>.
  template <class F>
  void visit(F&& f) const {
    if (options_.bfloat16) f(as_const(rounded_));
    else f(as_const(weight_->value));
  }

  void forward(In<T> x, MatrixView<T> y, Context& context) const {
    context.ready = false;
    expect_shape((options_.name + ": x").c_str(), x, x.rows, in());
    expect_shape((options_.name + ": y").c_str(), y, x.rows, out());
    visit([&](const auto& w) { backend_.matmul(x, w, y, Update::overwrite); });
    if (bias_) backend_.add_row(as_const(bias_->value), y);
    context = {x, true};
  }

  /// An empty dx is not computed. Throws Errc::state_order unless `context` comes from a forward pass.
  void backward(In<T> dy, MatrixView<T> dx, Context& context, GradientMode mode = GradientMode::accumulate) {
    QDYLORA_EXPECTS(context.ready, state_order, options_.name + ": backward before forward");
    const auto x = context.x;
    expect_shape((options_.name + ": dy").c_str(), dy, x.rows, out());
    if (dx.data != nullptr) {
      expect_shape((options_.name + ": dx").c_str(), dx, x.rows, in());
      visit([&](const auto& w) { backend_.matmul_transposed(dy, w, dx, Update::overwrite); });
    }
    if (mode == GradientMode::ignore) return;
    if constexpr (std::is_same_v<T, Acc>) {
      backend_.weight_gradient(dy, x, weight_->gradient.view(), Update::accumulate);
    } else {
      auto wide = temporary<Acc>(backend_, dy.rows, dy.cols);
      backend_.copy(dy, wide.view());
      backend_.weight_gradient(as_const(wide), x, weight_->gradient.view(), Update::accumulate);
    }
    weight_->touch(0, out());
    if (!bias_) return;
    detail::add_column_sums(backend_, dy, bias_->gradient.view());
    bias_->touch(0, 1);
  }

 private:
  template <class S>
  static MatrixView<const S> as_const(const Matrix<S, Memory>& matrix) {
    return matrix.view();
  }

  Backend backend_;
  DenseOptions options_;
  std::shared_ptr<Param> weight_, bias_;  // no bias, or one that trains
  Matrix<bfloat16, Memory> rounded_;      // with DenseOptions::bfloat16
};

}  // namespace qdylora
