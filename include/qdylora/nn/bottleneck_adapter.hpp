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

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <utility>

#include <qdylora/backend.hpp>
#include <qdylora/nn/lora_adapter.hpp>
#include <qdylora/nn/rank_products.hpp>

namespace qdylora {

/// Where a bottleneck stands: after what it adapts, or beside it.
enum class BottleneckPlacement { sequential, parallel };

template <Scalar T, class Backend = Cpu>
  requires BackendFor<Backend, T> && HasActivation<Backend, Accumulator<T>>
class BottleneckAdapter {
 public:
  using Acc = Accumulator<T>;
  using Memory = typename Backend::Memory;
  using Adapter = LoRAAdapter<Acc, Memory>;

  /// What the backward pass of one forward pass needs. Borrows x, which must stay as it is until then.
  struct Context {
    MatrixView<const T> x;
    Matrix<T, Memory> dropped;  // dropout(x); empty without dropout
    Matrix<Acc, Memory> z;      // [tokens, b]
    RankPlan plan;
    DropoutKey dropout;
    bool ready = false;
  };

  /// max_rank is the bottleneck's width. Throws what LoRAAdapter does, and Errc::unsupported for gates or a magnitude.
  BottleneckAdapter(Index width, LoRAOptions options, BottleneckPlacement placement = BottleneckPlacement::sequential, Backend backend = {})
      : backend_(backend), placement_(placement), adapter_(width, width, checked(std::move(options))) {
    set_rank(adapter_.max_rank());
    if constexpr (!Memory::host) adapter_.initialize(backend_);
  }

  Index in() const noexcept { return adapter_.in(); }
  Index out() const noexcept { return adapter_.out(); }
  BottleneckPlacement placement() const noexcept { return placement_; }
  Adapter& adapter() noexcept { return adapter_; }
  const Adapter& adapter() const noexcept { return adapter_; }
  const Backend& backend() const noexcept { return backend_; }
  Parameters<Acc, Memory> parameters() const { return adapter_.parameters(); }

  /// The widths of the next forward passes. Throws Errc::rank_range above max_rank.
  void set_ranks(const RankPlan& plan) {
    adapter_.check_rank(plan.max_rank());
    plan_ = plan.limited(rank_limit_);
  }
  void set_rank(Index rank) {
    adapter_.check_rank(rank);
    set_ranks(RankPlan::uniform(rank));
  }
  /// No pass uses a greater width, whatever the plan. max_rank lifts it.
  void limit_rank(Index rank) {
    adapter_.check_rank(rank);
    rank_limit_ = rank;
    plan_ = plan_.limited(rank);
  }
  Index rank_limit() const noexcept { return std::min(rank_limit_, adapter_.max_rank()); }
  /// Dropout acts only while training; its masks are those of DynamicLoRALinear::set_training.
  void set_training(bool training, std::uint32_t step = 0, Index first_row = 0) noexcept {
    training_ = training;
    step_ = step;
    first_row_ = first_row;
  }

  /// y = x + f(x), or y += f(x) by placement. y may not be x.
  void forward(In<T> x, MatrixView<T> y, Context& context) const {
    context.ready = false;
    expect_shape((adapter_.options().name + ": x").c_str(), x, x.rows, in());
    expect_shape((adapter_.options().name + ": y").c_str(), y, x.rows, out());
    QDYLORA_EXPECTS(x.rows == 0 || x.data != y.data, bad_argument, adapter_.options().name + ": y is x, which the backward pass needs");
    QDYLORA_EXPECTS(plan_.is_uniform() || plan_.rows() == x.rows, shape_mismatch,
                    adapter_.options().name + ": ranks for " + std::to_string(plan_.rows()) + " rows, x has " + std::to_string(x.rows));
    context.x = x;
    context.plan = plan_;
    if (placement_ == BottleneckPlacement::sequential) backend_.copy(x, y);
    if (const Index rank = plan_.max_rank(); rank > 0) {
      Matrix<Acc, Memory> active, h;
      context.z.resize(x.rows, rank);
      active.resize(x.rows, rank);
      h.resize(x.rows, rank);
      detail::through_ranks(backend_, dropout(context), rows_of(adapter_.a(), rank), context.plan, context.z.view());
      backend_.gelu(as_const(context.z), active.view());
      detail::scale_by_rank(backend_, adapter_, as_const(active), context.plan, h.view(), false);
      detail::add_from_ranks(backend_, as_const(h), rows_of(adapter_.b(), rank), context.plan, y);
    }
    context.ready = true;
  }

  /// dx = dy + J^T dy, or dx += J^T dy by placement, J = df / dx; an empty dx is not computed. dx may not be dy. Throws Errc::state_order
  /// unless `context` comes from a forward pass.
  void backward(In<T> dy, MatrixView<T> dx, Context& context, GradientMode mode = GradientMode::accumulate) {
    QDYLORA_EXPECTS(context.ready, state_order, adapter_.options().name + ": backward before forward");
    const auto x = context.x;
    const bool want_dx = dx.data != nullptr;
    expect_shape((adapter_.options().name + ": dy").c_str(), dy, x.rows, out());
    if (want_dx) expect_shape((adapter_.options().name + ": dx").c_str(), dx, x.rows, in());
    QDYLORA_EXPECTS(x.rows == 0 || dx.data != dy.data, bad_argument, adapter_.options().name + ": dx is dy");
    if (want_dx && placement_ == BottleneckPlacement::sequential) backend_.copy(dy, dx);
    const Index rank = context.plan.max_rank();
    if (rank == 0 || (!want_dx && mode == GradientMode::ignore)) return;
    const bool dropped = context.dropped.size() > 0;
    Matrix<Acc, Memory> t, work;
    t.resize(x.rows, rank);
    work.resize(x.rows, rank);
    if (mode == GradientMode::accumulate) {
      backend_.gelu(as_const(context.z), work.view());
      detail::scale_by_rank(backend_, adapter_, as_const(work), context.plan, t.view(), true);
      detail::add_rank_gradient(backend_, as_const(t), dy, context.plan, adapter_.b().gradient.view());
    }
    detail::through_ranks(backend_, dy, rows_of(adapter_.b(), rank), context.plan, t.view());
    backend_.gelu_backward(as_const(t), as_const(context.z), work.view());
    if (mode == GradientMode::accumulate) {
      const MatrixView<const T> input = dropped ? as_const(context.dropped) : x;
      detail::scale_by_rank(backend_, adapter_, as_const(work), context.plan, t.view(), true);
      detail::add_rank_gradient(backend_, as_const(t), input, context.plan, adapter_.a().gradient.view());
      detail::touch_ranks(adapter_, context.plan);
    }
    if (!want_dx) return;
    detail::scale_by_rank(backend_, adapter_, as_const(work), context.plan, t.view(), false);
    if (!dropped) {
      detail::add_from_ranks(backend_, as_const(t), rows_of(adapter_.a(), rank), context.plan, dx);
      return;
    }
    Matrix<T, Memory> through_adapter;
    through_adapter.resize(x.rows, in());
    backend_.matmul_transposed(as_const(t), rows_of(adapter_.a(), rank), through_adapter.view(), Update::overwrite);
    backend_.dropout(as_const(through_adapter), adapter_.options().dropout, context.dropout, dx, Update::accumulate);
  }

 private:
  static LoRAOptions checked(LoRAOptions options) {
    QDYLORA_EXPECTS(options.gated_ranks.empty(), unsupported, options.name + ": gates are for low-rank updates, not for a bottleneck");
    QDYLORA_EXPECTS(!options.dora, unsupported, options.name + ": a magnitude is a weight's, and a bottleneck changes none");
    return options;
  }

  template <class S>
  static MatrixView<const S> as_const(const Matrix<S, Memory>& matrix) {
    return matrix.view();
  }
  static MatrixView<const Acc> rows_of(const typename Adapter::Param& parameter, Index rank) {
    return parameter.value.view().top_rows(rank);
  }

  // What A sees of context.x.
  MatrixView<const T> dropout(Context& context) const {
    const float probability = adapter_.options().dropout;
    context.dropped.resize(0, 0);
    if (!training_ || probability == 0.0f) return context.x;
    context.dropout = {adapter_.options().seed, adapter_.options().layer, step_, first_row_};
    context.dropped.resize(context.x.rows, in());
    backend_.dropout(context.x, probability, context.dropout, context.dropped.view(), Update::overwrite);
    return as_const(context.dropped);
  }

  Backend backend_;
  BottleneckPlacement placement_;
  Adapter adapter_;
  RankPlan plan_;
  Index rank_limit_ = std::numeric_limits<Index>::max();
  bool training_ = true;
  std::uint32_t step_ = 0;
  Index first_row_ = 0;
};

}  // namespace qdylora
