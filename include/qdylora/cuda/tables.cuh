// The tables of code formats where kernels can index them: a static constexpr array of a class has no address on the device.
#pragma once

#include <array>
#include <cstddef>

#include <qdylora/cuda/device.cuh>
#include <qdylora/quant/quantized_tensor.hpp>

namespace qdylora::device {

template <class T, std::size_t N>
struct Table {
  T at[N];
};
template <class T, std::size_t N>
constexpr Table<T, N> table(const std::array<T, N>& values) {
  Table<T, N> result{};
  for (std::size_t i = 0; i < N; ++i) result.at[i] = values[i];
  return result;
}

/// Format::values, in memory that is cached.
template <CodeFormat Format>
__device__ constexpr auto values = table(Format::values);

/// The code of v, as Format::encode has it. Thresholds are operands of the comparisons.
template <CodeFormat Format>
  requires(Format::bits == 4)
__constant__ constexpr auto thresholds = table(Format::thresholds);
template <CodeFormat Format>
  requires(Format::bits == 4)
__device__ constexpr auto ascending = table(Format::ascending);

template <CodeFormat Format>
__device__ inline std::uint8_t encode(float v) {
  if constexpr (Format::bits == 4) {
    int passed = 0;
#pragma unroll
    for (std::size_t i = 0; i < Format::thresholds.size(); ++i) passed += !(v <= thresholds<Format>.at[i]);
    return ascending<Format>.at[passed];
  } else if constexpr (requires { Format::encode(v, values<Format>.at); }) {
    return Format::encode(v, values<Format>.at);
  } else {
    return Format::encode(v);
  }
}

/// absmax of a block, rounded as on the host.
template <class Scales>
__device__ inline float absmax(const typename Scales::View& scales, Index block) {
  if constexpr (Scales::nested) {
    const float code = values<typename Scales::SecondLevel>.at[load(scales.codes + block)];
    return add(multiply(code, load(scales.nested_absmax + (block >> std::countr_zero(std::size_t{Scales::nested_block_size})))),
               scales.offset);
  } else {
    return load(scales.absmax + block);
  }
}

}  // namespace qdylora::device
