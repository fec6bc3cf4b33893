// Random data, made on the device: splitmix64's finalizer over a counter.
#pragma once

#include <cstdint>

#include <qdylora/cuda.hpp>

namespace bench {

inline constexpr int blocks = 1024, threads = 256;

__device__ inline std::uint32_t hash(std::uint64_t x) {  // splitmix64's finalizer
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return static_cast<std::uint32_t>((x ^ (x >> 31)) >> 32);
}

static __global__ void random_bytes(std::uint8_t* out, std::int64_t count, std::uint64_t seed) {
  for (std::int64_t i = blockIdx.x * static_cast<std::int64_t>(blockDim.x) + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
    out[i] = static_cast<std::uint8_t>(hash(seed + static_cast<std::uint64_t>(i)));
}
// Uniform in +-sqrt(3) * deviation.
static __global__ void random_numbers(float* out, std::int64_t count, std::uint64_t seed, float deviation) {
  for (std::int64_t i = blockIdx.x * static_cast<std::int64_t>(blockDim.x) + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
    out[i] = deviation * 3.4641016f * (static_cast<float>(hash(seed + static_cast<std::uint64_t>(i)) >> 8) * 0x1p-24f - 0.5f);
}

/// Numbers of this deviation, queued on the context's stream.
inline void fill_random(const qdylora::CudaContext& context, qdylora::MatrixView<float> x, std::uint64_t seed, float deviation) {
  random_numbers<<<blocks, threads, 0, context.stream()>>>(x.data, x.size(), seed, deviation);
  QDYLORA_CUDA_TRY(cudaGetLastError());
}

}  // namespace bench
