// Learning-rate schedules: a factor of the base learning rate for each step.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>

namespace qdylora {

struct Schedule {
  enum class Shape { constant, linear, cosine } shape = Shape::constant;
  std::int64_t steps = 1;         // of the whole run
  std::int64_t warmup_steps = 0;  // the factor rises linearly: (t + 1) / warmup at step t
  double floor = 0.0;             // linear and cosine end here

  /// The factor at step t = 0, 1, ..., steps - 1. Warm-up and decay multiply.
  double operator()(std::int64_t t) const noexcept {
    const double warm = warmup_steps > 0 ? std::min(1.0, static_cast<double>(t + 1) / static_cast<double>(warmup_steps)) : 1.0;
    const double progress = std::clamp(static_cast<double>(t) / static_cast<double>(std::max<std::int64_t>(steps, 1)), 0.0, 1.0);
    switch (shape) {
      case Shape::constant: return warm;
      case Shape::linear: return warm * (floor + (1.0 - floor) * (1.0 - progress));
      case Shape::cosine: return warm * (floor + (1.0 - floor) * 0.5 * (1.0 + std::cos(3.14159265358979323846 * progress)));
    }
    return warm;
  }
};

}  // namespace qdylora
