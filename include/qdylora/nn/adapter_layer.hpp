// AdapterLayer: what the layers that hold a LoRAAdapter have in common: the ranks of their passes, dropout before A, and what a pass checks.
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

/// What the backward pass of one forward pass needs. Borrows x, which must stay as it is until then.
template <Scalar T, MemoryResource Memory>
struct AdapterContext {
  MatrixView<const T> x;
  Matrix<T, Memory> dropped;         // dropout(x); empty without dropout
  Matrix<Accumulator<T>, Memory> z;  // [tokens, b]
  RankPlan plan;
  DropoutKey dropout;
  bool ready = false;
};

/// The base of DynamicLoRALinear and BottleneckAdapter.
template <Scalar T, class Backend>
class AdapterLayer {
 public:
  using Acc = Accumulator<T>;
  using Memory = typename Backend::Memory;
  using Adapter = LoRAAdapter<Acc, Memory>;

  Index in() const noexcept { return adapter_.in(); }
  Index out() const noexcept { return adapter_.out(); }
  Adapter& adapter() noexcept { return adapter_; }
  const Adapter& adapter() const noexcept { return adapter_; }
  const Backend& backend() const noexcept { return backend_; }
  Parameters<Acc, Memory> parameters() const { return adapter_.parameters(); }

  /// The ranks of the next forward passes. Throws Errc::rank_range above max_rank.
  void set_ranks(const RankPlan& plan) {
    adapter_.check_rank(plan.max_rank());
    plan_ = plan.limited(rank_limit_);
  }
  void set_rank(Index rank) {
    adapter_.check_rank(rank);
    set_ranks(RankPlan::uniform(rank));
  }
  /// No pass uses a higher rank, whatever the plan: what makes a rank map of one plan for all layers of a model. max_rank lifts it.
  void limit_rank(Index rank) {
    adapter_.check_rank(rank);
    rank_limit_ = rank;
    plan_ = plan_.limited(rank);
  }
  Index rank_limit() const noexcept { return std::min(rank_limit_, adapter_.max_rank()); }
  /// Dropout acts only while training. Masks are a function of (seed, layer, step) and of a token's place in the step, whose first
  /// `first_row` tokens came in other batches.
  void set_training(bool training, std::uint32_t step = 0, Index first_row = 0) noexcept {
    training_ = training;
    step_ = step;
    first_row_ = first_row;
  }

 protected:
  using Pass = AdapterContext<T, Memory>;

  /// At max_rank. Gives an adapter in a device's memory its first values.
  AdapterLayer(Adapter adapter, Backend backend)
      : backend_(backend), adapter_(std::move(adapter)), plan_(RankPlan::uniform(adapter_.max_rank())) {
    if constexpr (!Memory::host)
      if (adapter_.max_rank() > 0) adapter_.initialize(backend_);
  }

  const std::string& name() const noexcept { return adapter_.options().name; }

  // Checks a forward pass and notes x and the plan.
  void begin(MatrixView<const T> x, MatrixView<T> y, Pass& pass) const {
    pass.ready = false;
    expect_shape((name() + ": x").c_str(), x, x.rows, in());
    expect_shape((name() + ": y").c_str(), y, x.rows, out());
    QDYLORA_EXPECTS(plan_.is_uniform() || plan_.rows() == x.rows, shape_mismatch,
                    name() + ": ranks for " + std::to_string(plan_.rows()) + " rows, x has " + std::to_string(x.rows));
    pass.x = x;
    pass.plan = plan_;
  }
  // Checks a backward pass. An empty dx is none.
  void expect_backward(MatrixView<const T> dy, MatrixView<T> dx, const Pass& pass) const {
    QDYLORA_EXPECTS(pass.ready, state_order, name() + ": backward before forward");
    expect_shape((name() + ": dy").c_str(), dy, pass.x.rows, out());
    if (dx.data != nullptr) expect_shape((name() + ": dx").c_str(), dx, pass.x.rows, in());
  }

  // What z is made of, and room for it.
  void begin_projection(Pass& pass) const {
    const float probability = adapter_.options().dropout;
    pass.dropped.resize(0, 0);
    if (training_ && probability > 0.0f) {
      pass.dropout = {adapter_.options().seed, adapter_.options().layer, step_, first_row_};
      pass.dropped.resize(pass.x.rows, in());
      backend_.dropout(pass.x, probability, pass.dropout, pass.dropped.view(), Update::overwrite);
    }
    pass.z.resize(pass.x.rows, pass.plan.max_rank());
  }
  // z = dropout(x) A_b^T
  void project_down(Pass& pass) const {
    begin_projection(pass);
    project(pass);
  }
  void project(Pass& pass) const {
    detail::through_ranks(backend_, adapter_input(pass), rows_of(adapter_.a(), pass.plan.max_rank()), pass.plan, pass.z.view());
  }
  // What A saw: dropout(x).
  static MatrixView<const T> adapter_input(const Pass& pass) {
    return pass.dropped.size() > 0 ? as_const(pass.dropped) : pass.x;
  }
  // dx += mask(dz A_b)
  void add_input_gradient(MatrixView<const Acc> dz, const Pass& pass, MatrixView<T> dx) const {
    const auto a = rows_of(adapter_.a(), pass.plan.max_rank());
    if (pass.dropped.size() == 0) {
      detail::add_from_ranks(backend_, dz, a, pass.plan, dx);
      return;
    }
    auto through_adapter = temporary<T>(backend_, pass.x.rows, in());
    backend_.matmul_transposed(dz, a, through_adapter.view(), Update::overwrite);
    backend_.dropout(as_const(through_adapter), adapter_.options().dropout, pass.dropout, dx, Update::accumulate);
  }

  void scale_rows(MatrixView<const Acc> source, const RankPlan& plan, MatrixView<Acc> target, bool for_gradient) const {
    detail::scale_by_rank(backend_, adapter_, source, plan, target, for_gradient);
  }

  template <class S, class M>
  static MatrixView<const S> as_const(const Matrix<S, M>& matrix) {
    return matrix.view();
  }
  static MatrixView<const Acc> rows_of(const typename Adapter::Param& parameter, Index rank) {
    return parameter.value.view().top_rows(rank);
  }

  Backend backend_;
  Adapter adapter_;
  RankPlan plan_;
  Index rank_limit_ = std::numeric_limits<Index>::max();
  bool training_ = true;
  std::uint32_t step_ = 0;
  Index first_row_ = 0;
};

}  // namespace qdylora
