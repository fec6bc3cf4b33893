// AdamW with moments in 8 bits on the device: decoded, updated, used and encoded again in one pass over the parameter.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <utility>

#include <qdylora/backend.hpp>
#include <qdylora/cuda/elementwise.cuh>
#include <qdylora/cuda/tables.cuh>

namespace qdylora {
namespace device {

/// Rows [first_row, first_row + p.rows) of an update. A warp has a block of moments, a lane every 32nd element of it. Products and sums of
/// moments are rounded as written, so that codes are the host's.
struct AdamW8Rows {
  static constexpr int threads = 256;
  static constexpr int warps = threads / warp_size;
  static constexpr int elements = static_cast<int>(Moments8View::block_size) / warp_size;

  MatrixView<float> p;
  MatrixView<const float> g;
  Moments8View moments;
  UpdateRowNumbers<float> numbers;

  __device__ void operator()(SharedMemory) const {
    const Index b = static_cast<Index>(block().x) * warps + warp();
    if (b >= moments.m_absmax.cols) return;
    const float take1 = add(1.0f, -numbers.keep1), take2 = add(1.0f, -numbers.keep2);
    for (Index i = block().y; i < p.rows; i += grid().y) {
      const auto& row = numbers.of(i);
      const float m_absmax = load(moments.m_absmax.row(i) + b), v_absmax = load(moments.v_absmax.row(i) + b);
      float first[elements] = {}, second[elements] = {};
      float first_max = 0.0f, second_max = 0.0f;
#pragma unroll
      for (int e = 0; e < elements; ++e) {
        const Index j = b * Moments8View::block_size + e * warp_size + lane();
        if (j >= p.cols) continue;
        const float d = multiply(load(g.row(i) + j), numbers.scale);
        const float m = multiply(values<DynamicMap8>.at[load(moments.m.row(i) + j)], m_absmax);
        const float v = multiply(values<DynamicMapU8>.at[load(moments.v.row(i) + j)], v_absmax);
        first[e] = add(multiply(numbers.keep1, m), multiply(take1, d));
        second[e] = add(multiply(numbers.keep2, v), multiply(multiply(take2, d), d));
        first_max = std::fmax(first_max, std::fabs(first[e]));
        second_max = std::fmax(second_max, second[e]);
        const float step = row.step_size * (first[e] / (std::sqrt(second[e]) / row.correction2 + numbers.epsilon));
        store(p.row(i) + j, load(p.row(i) + j) * row.decay - step);
      }
#pragma unroll
      for (int bits = warp_size / 2; bits > 0; bits /= 2) {
        first_max = std::fmax(first_max, shuffle_xor(first_max, bits));
        second_max = std::fmax(second_max, shuffle_xor(second_max, bits));
      }
#pragma unroll
      for (int e = 0; e < elements; ++e) {
        const Index j = b * Moments8View::block_size + e * warp_size + lane();
        if (j >= p.cols) continue;
        store(moments.m.row(i) + j, detail::first_moment_code(first[e], first_max, values<DynamicMap8>.at));
        store(moments.v.row(i) + j, detail::second_moment_code(second[e], second_max, values<DynamicMapU8>.at));
      }
      sync_warp();  // all have read them
      if (lane() == 0) {
        store(moments.m_absmax.row(i) + b, first_max);
        store(moments.v_absmax.row(i) + b, second_max);
      }
    }
  }
};

}  // namespace device

#if !defined(QDYLORA_DEVICE_ONLY)
namespace detail {

inline void adamw(const CudaContext& context, MatrixView<float> p, MatrixView<const float> g, const Moments8View& moments,
                  const AdamWUpdate& update) {
  expect_adamw(p, g, moments, update);
  using Kernel = device::AdamW8Rows;
  for_row_numbers<float>(p.rows, update, [&](Index begin, Index count, const device::UpdateRowNumbers<float>& numbers) {
    const dim3 blocks = row_grid(context, (moments.m_absmax.cols + Kernel::warps - 1) / Kernel::warps, count);
    device::launch({context.stream(), blocks},
                   Kernel{p.middle_rows(begin, count), g.middle_rows(begin, count), moments.middle_rows(begin, count), numbers});
  });
}

}  // namespace detail
#endif
}  // namespace qdylora
