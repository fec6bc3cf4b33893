// AdamW (Loshchilov & Hutter 2019), in torch.optim.AdamW's order of operations, over parameters with rows of their own learning rate.
#pragma once

#include <cmath>
#include <limits>

#include <qdylora/optim/row_optimizer.hpp>

namespace qdylora {

struct AdamWOptions {
  static constexpr const char* name = "AdamW";
  using UntouchedRows = qdylora::UntouchedRows;

  double lr = 2e-4;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
  double weight_decay = 0.0;
  /// The gradient of all parameters together is scaled down to this norm; 0: no clipping. g *= min(1, max / (norm + 1e-6)), as torch.
  double max_gradient_norm = 0.0;
  UntouchedRows untouched_rows = UntouchedRows::dense;

  void check() const {
    // In float too: a parameter whose gradients were all zero divides by it alone.
    QDYLORA_EXPECTS(epsilon >= std::numeric_limits<float>::min() && std::isfinite(epsilon), bad_argument,
                    "AdamW: epsilon must be finite and at least 1.2e-38");
  }
  AdamWUpdate update() const noexcept { return {lr, beta1, beta2, epsilon, weight_decay}; }
};

/// Moments is what a parameter's moments are kept in (optim/moments.hpp).
template <Scalar T, class Backend = Cpu, MemoryResource StateMemory = typename Backend::Memory,
          class Moments = FloatMoments<Accumulator<T>, StateMemory>>
using AdamW = RowOptimizer<AdamWOptions, T, Backend, StateMemory, Moments>;

/// AdamW with moments in 8 bits: 2 bytes an element instead of 8.
template <Scalar T, class Backend = Cpu, MemoryResource StateMemory = typename Backend::Memory>
using AdamW8bit = AdamW<T, Backend, StateMemory, BlockwiseMoments<StateMemory>>;

}  // namespace qdylora
