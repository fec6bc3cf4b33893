// LossScale: what a loss is multiplied with so that gradients fit half, whose least number is 6e-8 (Micikevicius et al. 2018, "Mixed
// Precision Training"). Found as torch.amp.GradScaler finds it: halved where a gradient overflows, doubled after some steps without.
#pragma once

#include <cmath>
#include <cstdint>
#include <string>

#include <qdylora/core/error.hpp>

namespace qdylora {

struct LossScaleOptions {
  double initial = 65536.0;  // a power of two, 1 ... 2^32
  /// Steps without overflow after which twice the scale is tried. Torch waits for 2000, as it loses a step that overflows; Trainer repeats it.
  std::int64_t growth_interval = 200;
};

/// A power of two: no digit of a gradient is lost when RowOptimizer::step divides by it.
class LossScale {
 public:
  static constexpr double largest = 4294967296.0;

  struct State {
    double value = 1.0;
    std::int64_t steps = 0;  // without overflow since the scale changed
  };

  /// 1 for good, for types that need none.
  LossScale() = default;
  /// Throws Errc::bad_argument for options that are out of range.
  explicit LossScale(LossScaleOptions options) : interval_(options.growth_interval) {
    QDYLORA_EXPECTS(options.growth_interval >= 1, bad_argument, "LossScale: growth_interval must be positive");
    restore({options.initial, 0});
  }

  double value() const noexcept { return state_.value; }

  /// After a gradient that is not finite: halves the scale, for the same step to be tried again. At 1 it is not the scale's fault: false.
  bool lower() noexcept {
    if (interval_ == 0 || state_.value <= 1.0) return false;
    state_.value /= 2.0;
    return true;
  }
  /// After a step, however often it was tried. One that was skipped has shown nothing: the scale is what it was before.
  void end_step(bool skipped) noexcept {
    if (interval_ == 0) return;
    const bool lowered = state_.value != before_;
    if (skipped) state_.value = before_;
    else if (lowered) state_.steps = 0;
    else if (++state_.steps >= interval_ && state_.value < largest) state_ = {2.0 * state_.value, 0};
    before_ = state_.value;
  }

  State state() const noexcept { return state_; }
  /// Throws Errc::bad_argument unless value is a power of two, 1 ... 2^32, and steps are not negative; of a scale that is 1 for good, another.
  void restore(const State& state) {
    int exponent = 0;
    QDYLORA_EXPECTS(state.value >= 1.0 && state.value <= largest && std::frexp(state.value, &exponent) == 0.5 && state.steps >= 0,
                    bad_argument, "LossScale: " + std::to_string(state.value) + " is no power of two from 1 to 2^32, or its steps are negative");
    QDYLORA_EXPECTS(interval_ > 0 || state.value == 1.0, bad_argument, "LossScale: is 1 for a type with the range of float");
    state_ = state;
    before_ = state.value;
  }

 private:
  std::int64_t interval_ = 0;  // 0: never changes
  State state_;
  double before_ = 1.0;  // as the step began
};

}  // namespace qdylora
