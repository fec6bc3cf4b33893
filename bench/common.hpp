// Shared axes of the benchmarks: shapes, random data, and the error every speed is reported with.
#pragma once

#include <benchmark/benchmark.h>

#include <cmath>
#include <cstdint>
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

/// Weights of one shape, several copies, so that a loop over them streams more bytes than the last-level cache holds.
class WeightCycle {
 public:
  WeightCycle(Index rows, Index cols, const Cpu& cpu, std::size_t beyond_bytes = std::size_t{128} << 20)
      : dense_(normal_matrix(rows, cols, 0.02f, 1)) {
    do copies_.push_back(cpu.quantize<NF4>(dense_.view()));
    while (copies_.size() * copies_.front().bytes() < beyond_bytes && copies_.size() < 512);
  }
  const NF4Tensor& next() { return copies_[at_++ % copies_.size()]; }
  const NF4Tensor& front() const { return copies_.front(); }
  const Matrix<float>& dense() const { return dense_; }

 private:
  Matrix<float> dense_;
  std::vector<NF4Tensor> copies_;
  std::size_t at_ = 0;
};

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
