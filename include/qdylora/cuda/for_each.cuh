// Loops over the elements and over the rows of a matrix.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
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
/// `width` neighbours in memory, loaded or stored at once, aligned to their size, as what they are computed in.
template <int width, class T>
struct Neighbours {
  struct Elements {
    T at[width];
  };
  using Whole = Words<(sizeof(Elements) + 3) / 4>;

  Accumulator<T> at[width];

  __device__ static Neighbours load_from(const T* p) {
    if constexpr (width == 1) {
      return {{widen(load(p))}};
    } else {
      const auto found = std::bit_cast<Elements>(load(reinterpret_cast<const Whole*>(p)));
      Neighbours wide;
#pragma unroll
      for (int i = 0; i < width; ++i) wide.at[i] = widen(found.at[i]);
      return wide;
    }
  }
  __device__ void store_to(T* p) const {
    if constexpr (width == 1) {
      store(p, narrow<T>(at[0]));
    } else {
      Elements narrowed;
#pragma unroll
      for (int i = 0; i < width; ++i) narrowed.at[i] = narrow<T>(at[i]);
      store(reinterpret_cast<Whole*>(p), std::bit_cast<Whole>(narrowed));
    }
  }
};
template <int width, class T>
__device__ inline auto read_neighbours(const MatrixView<T>& x, Index i, Index j) {
  return Neighbours<width, std::remove_const_t<T>>::load_from(x.row(i) + j);
}

/// y[k, j] and the neighbours behind it = those of x[i, j]: bit for bit, or rounded where the types differ.
template <int width = 1, class X, class Y>
__device__ inline void assign(const MatrixView<const X>& x, Index i, const MatrixView<Y>& y, Index k, Index j) {
  if constexpr (std::is_same_v<X, Y>) {
    using Whole = std::conditional_t<width == 1, X, typename Neighbours<width, X>::Whole>;
    store(reinterpret_cast<Whole*>(y.row(k) + j), load(reinterpret_cast<const Whole*>(x.row(i) + j)));
  } else {
    const auto found = read_neighbours<width>(x, i, j);
    Neighbours<width, Y> result;
#pragma unroll
    for (int n = 0; n < width; ++n) result.at[n] = static_cast<Accumulator<Y>>(found.at[n]);
    result.store_to(y.row(k) + j);
  }
}

/// f.template neighbours<width>(i, j) for every multiple j of width.
template <class F, int width>
struct ByNeighbours {
  F f;
  __device__ void operator()(Index i, Index j) const { f.template neighbours<width>(i, width * j); }
};

/// What a thread has of a row that a block goes through: neighbours that are 16 bytes in S, fewer at the row's end. They are read and
/// written at once if `whole`, which is for rows that are aligned to them, else one by one: sums have one order, which the shape decides.
template <class S, bool whole>
struct RowPiece {
  static constexpr int width = 16 / static_cast<int>(sizeof(S));
  template <class T>
  using Of = Neighbours<width, std::remove_const_t<T>>;

  Index begin;
  int count;

  template <class T>
  __device__ Of<T> read(const MatrixView<T>& x, Index i) const {
    if constexpr (whole) {
      return read_neighbours<width>(x, i, begin);
    } else {
      Of<T> found = {};
#pragma unroll
      for (int k = 0; k < width; ++k)
        if (k < count) found.at[k] = device::read(x, i, begin + k);
      return found;
    }
  }
  template <class T>
  __device__ void write(const Of<T>& values, const MatrixView<T>& y, Index i) const {
    if constexpr (whole) {
      values.store_to(y.row(i) + begin);
    } else {
#pragma unroll
      for (int k = 0; k < width; ++k)
        if (k < count) device::write(y, i, begin + k, values.at[k]);
    }
  }
  template <class F>
  __device__ void for_each(const F& f) const {
#pragma unroll
    for (int k = 0; k < width; ++k)
      if (whole || k < count) f(k);
  }
};

/// f(piece) for every piece of a row of `cols` elements that is the thread's.
template <int threads, class Piece, class F>
__device__ inline void for_each_piece(Index cols, const F& f) {
  constexpr int width = Piece::width;
  for (Index begin = width * thread(); begin < cols; begin += width * threads)
    f(Piece{begin, cols - begin < width ? static_cast<int>(cols - begin) : width});
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

/// Whether every row of x begins at a multiple of `width` elements.
template <int width, class T>
bool has_aligned_rows(const MatrixView<T>& x) noexcept {
  return reinterpret_cast<std::uintptr_t>(x.data) % (width * sizeof(T)) == 0 && (x.rows <= 1 || x.stride % width == 0);
}

/// Whether rows of `cols` elements of all these views may be read and written `width` at once.
template <int width, class... T>
bool are_whole(Index cols, const MatrixView<T>&... views) noexcept {
  return cols % width == 0 && (has_aligned_rows<width>(views) && ...);
}

/// f.neighbours for every element of [rows, cols], `width` at once where `whole` says that all rows allow it, else one by one. On a stream of
/// choice.
template <int width, class F>
void for_each_width_on(cudaStream_t stream, const CudaContext& context, Index rows, Index cols, bool whole, const F& f) {
  if (whole) for_each_on(stream, context, rows, cols / width, device::ByNeighbours<F, width>{f});
  else for_each_on(stream, context, rows, cols, device::ByNeighbours<F, 1>{f});
}
/// The same of elements that the views have one each: 16 bytes at once of the widest type where all rows are aligned to them.
template <class F, class... T>
void for_each_neighbours_on(cudaStream_t stream, const CudaContext& context, Index rows, Index cols, const F& f, const MatrixView<T>&... views) {
  constexpr int width = 16 / static_cast<int>(std::max({sizeof(T)...}));
  for_each_width_on<width>(stream, context, rows, cols, are_whole<width>(cols, views...), f);
}
/// And on the context's stream.
template <class F, class... T>
void for_each_neighbours(const CudaContext& context, Index rows, Index cols, const F& f, const MatrixView<T>&... views) {
  for_each_neighbours_on(context.stream(), context, rows, cols, f, views...);
}

/// f(std::bool_constant<whole>()) for kernels that go through rows of `cols` elements of these views by RowPiece<S, whole>.
template <class S, class F, class... T>
void by_whole_pieces(Index cols, const F& f, const MatrixView<T>&... views) {
  if (are_whole<device::RowPiece<S, true>::width>(cols, views...)) f(std::true_type());
  else f(std::false_type());
}

}  // namespace detail
#endif
}  // namespace qdylora
