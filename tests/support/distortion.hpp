// How far results are from what they should be.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include <qdylora/core/matrix.hpp>

namespace test {

using qdylora::MatrixView;
using qdylora::Index;

/// sum (found - expected)^2 / sum expected^2; infinite when a found element is not finite but the expected one is, or the reverse.
/// Elements that are both not finite must be the same infinity or both NaN.
template <class A, class B>
double normalised_squared_error(MatrixView<A> found, MatrixView<B> expected) {
  constexpr double infinite = std::numeric_limits<double>::infinity();
  if (found.rows != expected.rows || found.cols != expected.cols) return infinite;
  double error = 0.0, power = 0.0;
  for (Index i = 0; i < found.rows; ++i)
    for (Index j = 0; j < found.cols; ++j) {
      const double f = static_cast<double>(found(i, j)), e = static_cast<double>(expected(i, j));
      if (std::isfinite(e) != std::isfinite(f)) return infinite;
      if (!std::isfinite(e)) {
        if (f != e && !(std::isnan(f) && std::isnan(e))) return infinite;
        continue;
      }
      error += (f - e) * (f - e);
      power += e * e;
    }
  return error == 0.0 ? 0.0 : error / power;
}

/// max |found - expected|; NaN, which no comparison passes, where a difference is no number or the shapes differ.
template <class A, class B>
double largest_difference(MatrixView<A> found, MatrixView<B> expected) {
  if (found.rows != expected.rows || found.cols != expected.cols) return std::numeric_limits<double>::quiet_NaN();
  double worst = 0.0;
  for (Index i = 0; i < found.rows; ++i)
    for (Index j = 0; j < found.cols; ++j) {
      const double distance = std::fabs(static_cast<double>(found(i, j)) - static_cast<double>(expected(i, j)));
      if (!(distance <= worst) && !std::isnan(worst)) worst = distance;
    }
  return worst;
}

/// The same, relative to the largest expected element, or to `at_least` where that is more.
template <class A, class B>
double relative_difference(MatrixView<A> found, MatrixView<B> expected, double at_least = 0.0) {
  double largest = at_least;
  for (Index i = 0; i < expected.rows; ++i)
    for (Index j = 0; j < expected.cols; ++j) largest = std::max(largest, std::fabs(static_cast<double>(expected(i, j))));
  return largest_difference(found, expected) / largest;
}

/// What quantizing x to y cost.
struct Distortion {
  double mean_absolute_error = 0.0;
  double mean_squared_error = 0.0;
  double signal_to_noise_db = 0.0;
};

template <class A, class B>
Distortion distortion(MatrixView<A> x, MatrixView<B> y) {
  double absolute = 0.0, squared = 0.0, power = 0.0;
  for (Index i = 0; i < x.rows; ++i)
    for (Index j = 0; j < x.cols; ++j) {
      const double a = static_cast<double>(x(i, j)), e = static_cast<double>(y(i, j)) - a;
      absolute += std::fabs(e);
      squared += e * e;
      power += a * a;
    }
  const auto count = static_cast<double>(x.size());
  return {absolute / count, squared / count, 10.0 * std::log10(power / squared)};
}

/// Bit for bit, -0 and NaN payloads included.
template <class A, class B>
bool same_bits(MatrixView<A> a, MatrixView<B> b) {
  static_assert(std::is_same_v<std::remove_const_t<A>, std::remove_const_t<B>>);
  if (a.rows != b.rows || a.cols != b.cols) return false;
  for (Index i = 0; i < a.rows && a.cols > 0; ++i)
    if (std::memcmp(a.row(i), b.row(i), static_cast<std::size_t>(a.cols) * sizeof(A)) != 0) return false;
  return true;
}

/// Distance of two finite floats in units of the last place.
inline std::int64_t ulps_between(float a, float b) {
  const auto ordered = [](float x) {
    const auto bits = std::bit_cast<std::uint32_t>(x);
    return bits & 0x80000000u ? -static_cast<std::int64_t>(bits & 0x7FFFFFFFu) : static_cast<std::int64_t>(bits);
  };
  return std::abs(ordered(a) - ordered(b));
}

}  // namespace test
