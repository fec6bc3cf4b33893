// Loops over the elements and over the rows of a matrix.
#pragma once

#include <algorithm>
#include <bit>
#include <type_traits>

#include <qdylora/cuda/context.cuh>
#include <qdylora/cuda/launch.cuh>

namespace qdylora {
namespace device {

/// f(i, j) for every element of [rows, cols]. A block covers 2^width_shift columns, as many as there are where they are few, and takes
/// every so manieth row.
template <class F>
struct ForEach {
  static constexpr int threads = 256;

  F f;
  Index rows, cols;
  int width_shift;

  __device__ void operator()(SharedMemory) const {
    const int rows_at_once = threads >> width_shift;
    const Index j = (static_cast<Index>(block().x) << width_shift) + (thread() & ((1 << width_shift) - 1));
    if (j >= cols) return;
    for (Index i = static_cast<Index>(block().y) * rows_at_once + (thread() >> width_shift); i < rows;
         i += static_cast<Index>(grid().y) * rows_at_once)
      f(i, j);
  }
};

template <class T>
__device__ inline auto read(const MatrixView<T>& x, Index i, Index j) {
  return widen(load<std::remove_const_t<T>>(x.row(i) + j));
}
template <class T>
__device__ inline void write(const MatrixView<T>& y, Index i, Index j, Accumulator<T> value) {
  store(y.row(i) + j, narrow<T>(value));
}
/// y[k, j] = x[i, j]: bit for bit, or rounded where the types differ.
template <class X, class Y>
__device__ inline void assign(const MatrixView<const X>& x, Index i, const MatrixView<Y>& y, Index k, Index j) {
  if constexpr (std::is_same_v<X, Y>) store(y.row(k) + j, load(x.row(i) + j));
  else write(y, k, j, static_cast<Accumulator<Y>>(read(x, i, j)));
}

}  // namespace device

#if !defined(QDYLORA_DEVICE_ONLY)
namespace detail {

/// A grid of `across` blocks along a row, and rows enough at once to fill the device.
inline dim3 row_grid(const CudaContext& context, Index across, Index rows) {
  constexpr Index blocks_per_processor = 16;
  const Index down = blocks_per_processor * context.properties().multiProcessorCount / std::max<Index>(across, 1) + 1;
  return {static_cast<unsigned>(across), static_cast<unsigned>(std::min({rows, down, Index{65535}}))};
}

/// f(i, j) on the device for every element of [rows, cols], on a stream of choice. F is a class of views and numbers.
template <class F>
void for_each_on(cudaStream_t stream, const CudaContext& context, Index rows, Index cols, const F& f) {
  using Kernel = device::ForEach<F>;
  const int width_shift = std::countr_zero(std::bit_ceil(static_cast<unsigned>(std::clamp<Index>(cols, 1, Kernel::threads))));
  const Index width = Index{1} << width_shift, rows_at_once = Kernel::threads >> width_shift;
  const dim3 blocks = row_grid(context, div_up(cols, width), div_up(rows, rows_at_once));
  device::launch({stream, blocks}, Kernel{f, rows, cols, width_shift});
}
/// The same on the context's stream.
template <class F>
void for_each(const CudaContext& context, Index rows, Index cols, const F& f) {
  for_each_on(context.stream(), context, rows, cols, f);
}

}  // namespace detail
#endif
}  // namespace qdylora
