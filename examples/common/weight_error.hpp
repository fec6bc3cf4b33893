// What quantization changed of weights.
#pragma once

#include <cmath>

#include <qdylora/core/view.hpp>

namespace qdylora::examples {

/// Of decoded weights w' beside the weights w that they were.
struct WeightError {
  double error = 0.0, size = 0.0, squared_error = 0.0, power = 0.0;  // sums of |w' - w|, |w|, (w' - w)^2, w^2

  void add(MatrixView<const float> decoded, MatrixView<const float> weight) {
    for (Index i = 0; i < weight.rows; ++i)
      for (Index j = 0; j < weight.cols; ++j) {
        const double w = weight(i, j), e = static_cast<double>(decoded(i, j)) - w;
        error += std::fabs(e);
        size += std::fabs(w);
        squared_error += e * e;
        power += w * w;
      }
  }
  /// Means of |w' - w| and, squared, of (w' - w)^2, relative to those of w; 0 where all weights are zero.
  double absolute() const noexcept { return size > 0.0 ? error / size : 0.0; }
  double root_mean_square() const noexcept { return power > 0.0 ? std::sqrt(squared_error / power) : 0.0; }
  /// The signal-to-quantization-noise ratio in decibels; infinite where nothing changed.
  double signal_to_noise() const noexcept { return 10.0 * std::log10(power / squared_error); }
};

}  // namespace qdylora::examples
