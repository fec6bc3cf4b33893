// Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms"): steps of one size, in the direction of the sign of a moment.
//
// A step moves an element by lr whatever its gradient, more than AdamW does: the paper finds a learning rate of a third to a tenth of AdamW's
// good, and a weight decay as many times larger.
#pragma once

#include <qdylora/optim/row_optimizer.hpp>

namespace qdylora {

struct LionOptions {
  static constexpr const char* name = "Lion";
  using UntouchedRows = qdylora::UntouchedRows;

  double lr = 1e-4;
  double beta1 = 0.9;
  double beta2 = 0.99;
  double weight_decay = 0.0;
  /// As AdamWOptions has it. The sign alone would not see it; what it changes is how much a step weighs in the moment.
  double max_gradient_norm = 0.0;
  /// Not AdamW's default: where steps have one size, a dense optimizer would move a row that a low rank left alone as far as one that was
  /// trained, for as long as its moment is not zero.
  UntouchedRows untouched_rows = UntouchedRows::strict;

  void check() const noexcept {}
  LionUpdate update() const noexcept { return {lr, beta1, beta2, weight_decay}; }
};

/// With one moment, in half of AdamW's memory.
template <Scalar T, class Backend = Cpu, MemoryResource StateMemory = typename Backend::Memory,
          class Moments = FloatMoment<Accumulator<T>, StateMemory>>
using Lion = RowOptimizer<LionOptions, T, Backend, StateMemory, Moments>;

}  // namespace qdylora
