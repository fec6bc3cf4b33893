// Shared axes of the benchmarks: shapes, random data, and the error every speed is reported with.
#pragma once

#include <benchmark/benchmark.h>

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <vector>

#include <qdylora/qdylora.hpp>

namespace qdylora::bench {

/// [out, in] of linear layers: those of Llama-7B and of SmolLM2-135M.
inline constexpr Index shapes[][2] = {{4096, 4096}, {11008, 4096}, {4096, 11008}, {576, 576}, {1536, 576}, {576, 1536}, {192, 576}};

inline Matrix<float> normal_matrix(Index rows, Index cols, float deviation, std::uint64_t seed) {
  Matrix<float> m(rows, cols);
  Rng rng(seed);
  for (float& x : m.span()) x = deviation * rng.normal();
  return m;
}

/// Copies of a weight, so many that a loop over them streams more bytes than the last-level cache holds. make() makes one.
template <class Weight>
class WeightCycle {
 public:
  template <class Make>
  explicit WeightCycle(Make make, std::size_t beyond_bytes = std::size_t{128} << 20) {
    do copies_.push_back(make());
    while (copies_.size() * copies_.front().bytes() < beyond_bytes && copies_.size() < 512);
  }
  const Weight& next() { return copies_[at_++ % copies_.size()]; }
  const Weight& front() const { return copies_.front(); }

 private:
  std::vector<Weight> copies_;
  std::size_t at_ = 0;
};
template <class Make>
WeightCycle(Make) -> WeightCycle<std::invoke_result_t<Make>>;

/// Squared error of `found` relative to the squared size of `expected`.
inline double normalized_error(std::span<const float> found, std::span<const double> expected) {
  double error = 0.0, size = 0.0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    error += std::pow(static_cast<double>(found[i]) - expected[i], 2);
    size += expected[i] * expected[i];
  }
  return size > 0.0 ? error / size : 0.0;
}

}  // namespace qdylora::bench
