// Random data, made on the device: splitmix64's finalizer over a counter.
#pragma once

#include <cstdint>

#include <qdylora/cuda.hpp>

namespace bench {

namespace qd = qdylora;

QDYLORA_HD inline std::uint32_t hash(std::uint64_t x) {
  x += 0x9e3779b97f4a7c15ull;
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9ull;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebull;
  return static_cast<std::uint32_t>((x ^ (x >> 31)) >> 32);
}

struct RandomBytes {
  qd::MatrixView<std::uint8_t> out;
  std::uint64_t seed;
  __device__ void operator()(qd::Index i, qd::Index j) const {
    qd::device::store(out.row(i) + j, static_cast<std::uint8_t>(hash(seed + static_cast<std::uint64_t>(i * out.cols + j))));
  }
};
/// Uniform in +-sqrt(3) * deviation.
struct RandomNumbers {
  qd::MatrixView<float> out;
  std::uint64_t seed;
  float deviation;
  __device__ void operator()(qd::Index i, qd::Index j) const {
    const float uniform = static_cast<float>(hash(seed + static_cast<std::uint64_t>(i * out.cols + j)) >> 8) * 0x1p-24f;
    qd::device::store(out.row(i) + j, deviation * 3.4641016f * (uniform - 0.5f));
  }
};

/// Random bytes, queued on the context's stream.
inline void fill_random(const qd::CudaContext& context, qd::Buffer<std::uint8_t, qd::DeviceMemory>& x, std::uint64_t seed) {
  qd::detail::for_each(context, 1, x.size(), RandomBytes{{x.data(), 1, x.size()}, seed});
}
/// Numbers of this deviation, queued on the context's stream.
inline void fill_random(const qd::CudaContext& context, qd::MatrixView<float> x, std::uint64_t seed, float deviation) {
  qd::detail::for_each(context, x.rows, x.cols, RandomNumbers{x, seed, deviation});
}

}  // namespace bench
