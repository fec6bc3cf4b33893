// Gradient check: an analytic gradient against central differences, in double.
#pragma once

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <limits>
#include <span>

namespace test {

/// |analytic - numeric| <= absolute + relative * |numeric|, the numeric derivative over a step of 2 epsilon.
struct GradientTolerance {
  double epsilon = 1e-6;
  double absolute = 1e-5;
  double relative = 1e-3;
};

/// The element that fits its tolerance worst.
struct GradientReport {
  double excess = 0.0;  // |analytic - numeric| / tolerance
  std::size_t element = 0;
  double analytic = 0.0;
  double numeric = 0.0;
  bool ok() const noexcept { return excess <= 1.0; }
};

/// `loss()` is a function of `parameters`, which are changed one at a time and put back; `gradient` is d loss / d parameters.
template <std::invocable Loss>
GradientReport check_gradient(Loss&& loss, std::span<double> parameters, std::span<const double> gradient,
                              GradientTolerance tolerance = {}) {
  if (parameters.size() != gradient.size()) return {.excess = std::numeric_limits<double>::infinity()};
  GradientReport worst;
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const double value = parameters[i];
    parameters[i] = value + tolerance.epsilon;
    const double above = loss();
    parameters[i] = value - tolerance.epsilon;
    const double below = loss();
    parameters[i] = value;
    const double numeric = (above - below) / (2.0 * tolerance.epsilon);
    const double error = std::fabs(gradient[i] - numeric) / (tolerance.absolute + tolerance.relative * std::fabs(numeric));
    const double excess = std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
    if (excess > worst.excess) worst = {excess, i, gradient[i], numeric};
  }
  return worst;
}

}  // namespace test
