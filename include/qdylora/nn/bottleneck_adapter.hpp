// BottleneckAdapter: a small perceptron whose width can be cut, after a frozen sublayer (Houlsby et al. 2019, arXiv 1902.00751) or beside
// one (the Parallel Adapter: He et al. 2022, arXiv 2110.04366).
//
//   forward    y  = x + h B_b  (sequential),            y  += h B_b  (parallel),           h = s_b gelu(z),         z = dropout(x) A_b^T
//   backward   dx = dy + mask(dz A_b),                  dx += mask(dz A_b),               dz = s_b t * gelu'(z),   t = dy B_b^T
//              dB += h^T dy,   dA += dz^T dropout(x)
//   x, y [tokens, width], A_b, B_b [b, width], z, h, t, dz [tokens, b], b = the row's rank: the bottleneck's width
//
// Hidden unit i is row i of A and row i of B, so the adapter of width b is the first b units, as the update of rank b is the first b rows of
// a LoRAAdapter, which holds the parameters: optimizers, rank plans and states of runs take it for one, and a row costs what its own width
// costs. B begins as zero, so that the adapter begins as if it were absent. Width 0 is that too, bit for bit.
// The nonlinearity is GELU, as in Houlsby's code (He takes ReLU). There are no biases, which would not be a unit's.
// What is not a product of A and B cannot be a change of a weight: it is not merged, and its units are not re-ordered by singular values.
#pragma once

#include <utility>

#include <qdylora/nn/adapter_layer.hpp>

namespace qdylora {

/// Where a bottleneck stands: after what it adapts, or beside it.
enum class BottleneckPlacement { sequential, parallel };

template <Scalar T, class Backend = Cpu>
  requires BackendFor<Backend, T> && HasActivation<Backend, Accumulator<T>>
class BottleneckAdapter : public AdapterLayer<T, Backend> {
  using Base = AdapterLayer<T, Backend>;

 public:
  using typename Base::Acc, typename Base::Adapter, typename Base::Memory;
  using Context = AdapterContext<T, Memory>;

  /// max_rank is the bottleneck's width. Throws what LoRAAdapter does, and Errc::unsupported for gates or a magnitude.
  BottleneckAdapter(Index width, LoRAOptions options, BottleneckPlacement placement = BottleneckPlacement::sequential, Backend backend = {})
      : Base(Adapter(width, width, checked(std::move(options))), backend), placement_(placement) {}

  BottleneckPlacement placement() const noexcept { return placement_; }

  void forward(Matrix<T, Memory>&& x, MatrixView<T> y, Context& context) const = delete;  // x is borrowed until backward
  /// y = x + f(x), or y += f(x) by placement. y may not be x.
  void forward(In<T> x, MatrixView<T> y, Context& context) const {
    begin(x, y, context);
    QDYLORA_EXPECTS(x.rows == 0 || x.data != y.data, bad_argument, this->name() + ": y is x, which the backward pass needs");
    if (placement_ == BottleneckPlacement::sequential) backend_.copy(x, y);
    if (const Index rank = plan_.max_rank(); rank > 0) {
      auto active = temporary<Acc>(backend_, x.rows, rank), h = temporary<Acc>(backend_, x.rows, rank);
      project_down(context);
      backend_.gelu(as_const(context.z), active.view());
      scale_rows(as_const(active), context.plan, h.view(), false);
      detail::add_from_ranks(backend_, as_const(h), rows_of(adapter_.b(), rank), context.plan, y);
    }
    context.ready = true;
  }

  /// dx = dy + J^T dy, or dx += J^T dy by placement, J = df / dx; an empty dx is not computed. dx may not be dy. Throws Errc::state_order
  /// unless `context` comes from a forward pass.
  void backward(In<T> dy, MatrixView<T> dx, Context& context, GradientMode mode = GradientMode::accumulate) {
    expect_backward(dy, dx, context);
    const auto x = context.x;
    const bool want_dx = dx.data != nullptr;
    QDYLORA_EXPECTS(x.rows == 0 || dx.data != dy.data, bad_argument, this->name() + ": dx is dy");
    if (want_dx && placement_ == BottleneckPlacement::sequential) backend_.copy(dy, dx);
    const Index rank = context.plan.max_rank();
    if (rank == 0 || (!want_dx && mode == GradientMode::ignore)) return;
    auto t = temporary<Acc>(backend_, x.rows, rank), work = temporary<Acc>(backend_, x.rows, rank);
    if (mode == GradientMode::accumulate) {
      backend_.gelu(as_const(context.z), work.view());
      scale_rows(as_const(work), context.plan, t.view(), true);
      detail::add_rank_gradient(backend_, as_const(t), dy, context.plan, adapter_.b().gradient.view());
    }
    detail::through_ranks(backend_, dy, rows_of(adapter_.b(), rank), context.plan, t.view());
    backend_.gelu_backward(as_const(t), as_const(context.z), work.view());
    if (mode == GradientMode::accumulate) {
      scale_rows(as_const(work), context.plan, t.view(), true);
      detail::add_rank_gradient(backend_, as_const(t), adapter_input(context), context.plan, adapter_.a().gradient.view());
      detail::touch_ranks(adapter_, context.plan);
    }
    if (!want_dx) return;
    scale_rows(as_const(work), context.plan, t.view(), false);
    add_input_gradient(as_const(t), context, dx);
  }

 private:
  static LoRAOptions checked(LoRAOptions options) {
    QDYLORA_EXPECTS(options.gated_ranks.empty(), unsupported, options.name + ": gates are for low-rank updates, not for a bottleneck");
    QDYLORA_EXPECTS(!options.dora, unsupported, options.name + ": a magnitude is a weight's, and a bottleneck changes none");
    QDYLORA_EXPECTS(!options.train_bias, unsupported, options.name + ": a bottleneck has no bias that could train");
    return options;
  }

  using Base::adapter_input, Base::add_input_gradient, Base::as_const, Base::begin, Base::expect_backward, Base::project_down;
  using Base::adapter_, Base::backend_, Base::plan_, Base::rows_of, Base::scale_rows;

  BottleneckPlacement placement_;
};

}  // namespace qdylora
