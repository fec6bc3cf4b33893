// Products by slabs that take an adapter's term along: it is appended to both operands, and makes some columns, or rows, more of one product.
//
//   x . w^T + scale * u . b    = [x | scale * u] . [w | b^T]^T    K-augmentation; a slab is some rows of w, and as many of b^T behind them
//   x . w   + scale * u . b    = [x | scale * u] . [w ; b]        a slab is some columns of w, and those of b below them
//
// x is the caller's, and is copied for it: ahead where y is wider, by product_plan.hpp. y is rounded once. Columns are multiples of 8, as
// tensor cores take them: beyond the term they are zeros, in both operands.
#pragma once

#include <qdylora/cuda/for_each.cuh>
#include <qdylora/cuda/slabs.cuh>

namespace qdylora {
namespace device {

/// y [rows, x.cols + more.cols + rest] = [x | scale * more | 0]
template <class T>
struct AppendColumns {
  MatrixView<const T> x;
  MatrixView<const float> more;
  float scale;
  MatrixView<T> y;
  template <int width>
  __device__ void neighbours(Index i, Index j) const {
    if (j + width <= x.cols) return assign<width>(x, i, y, i, j);
    Neighbours<width, T> result;
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const Index at = j + k - x.cols;
      result.at[k] = at < 0 ? read(x, i, j + k) : at < more.cols ? scale * read(more, i, at) : 0.0f;
    }
    result.store_to(y.row(i) + j);
  }
};

/// y [cols, ranks] = x [rank, cols]^T, and zeros where x has no more rows. A thread writes `width` columns, and its neighbour the row behind.
template <class T, int width>
struct Transpose {
  MatrixView<const T> x;
  MatrixView<T> y;
  __device__ void operator()(Index piece, Index i) const {
    const Index first = width * piece;
    Neighbours<width, T> result;
#pragma unroll
    for (int k = 0; k < width; ++k) result.at[k] = first + k < x.rows ? read(x, first + k, i) : 0.0f;
    result.store_to(y.row(i) + first);
  }
};

/// y [ranks, cols] = x [rank, cols], and zeros below.
template <class T>
struct AppendRows {
  MatrixView<const T> x;
  MatrixView<T> y;
  template <int width>
  __device__ void neighbours(Index i, Index j) const {
    if (i < x.rows) assign<width>(x, i, y, i, j);
    else Neighbours<width, T>{}.store_to(y.row(i) + j);
  }
};

}  // namespace device

#if !defined(QDYLORA_DEVICE_ONLY)
namespace detail {

/// Columns of x or rows of w with a term of so many behind them.
constexpr Index augmented(Index extent, Index rank) noexcept { return rounded_up(extent + rank, 8); }
/// Bytes of x with a term of so many columns behind it, and of a slab of so many lines.
template <class X>
Index augmented_bytes(MatrixView<X> x, Index rank, Index lines) noexcept {
  return (x.rows + lines) * augmented(x.cols, rank) * static_cast<Index>(sizeof(X));
}

/// [x | scale * u | 0] in the workspace, once it is filled.
template <SixteenBits T>
class AugmentedRows {
 public:
  AugmentedRows(Scratch& scratch, MatrixView<const T> x, const AdapterTerm<T>& adapter)
      : fill_{x, adapter.u, adapter.scale, {}}, cols_(augmented(x.cols, adapter.b.rows)) {
    fill_.y = {scratch.take<T>(x.rows * cols_), x.rows, cols_};
  }
  Index cols() const noexcept { return cols_; }
  void fill(const CudaContext& context) const { for_each_neighbours(context, fill_.y.rows, cols_, fill_, fill_.x, fill_.y); }
  MatrixView<const T> view() const noexcept { return fill_.y; }

 private:
  device::AppendColumns<T> fill_;
  Index cols_;
};

/// y [tokens, out] (+)= x [tokens, in] . w [out, in]^T + scale * u . b, of a term that is there.
template <class W, SixteenBits T, class Y>
void multiply_by_augmented_slabs(const CudaContext& context, MatrixView<const T> x, const W& w, MatrixView<Y> y, Update update,
                                 const AdapterTerm<T>& adapter) {
  Scratch scratch(context);
  const AugmentedRows<T> input(scratch, x, adapter);
  for_each_slab<T>(
      context, scratch, x.rows, w.rows, input.cols() * static_cast<Index>(sizeof(T)), [&](Index rows) { return rows * input.cols(); },
      [&](cudaStream_t stream, T* memory, Index first, Index rows) {
        const MatrixView<T> slab(memory, rows, input.cols());
        const MatrixView<T> more = slab.middle_cols(w.cols, input.cols() - w.cols);
        const MatrixView<const T> part = adapter.b.middle_cols(first, rows);
        decode(stream, context, w, slab.left_cols(w.cols), first, 0);
        if (are_whole<8>(more.cols, more)) for_each_on(stream, context, more.cols / 8, rows, device::Transpose<T, 8>{part, more});
        else for_each_on(stream, context, more.cols, rows, device::Transpose<T, 1>{part, more});
      },
      [&](T* memory, Index first, Index rows) {
        if (first == 0) input.fill(context);  // while the first slab is decoded
        gemm<T>(context, scratch, {input.view()}, {MatrixView<const T>(memory, rows, input.cols()), true}, y.middle_cols(first, rows), update);
      });
}

/// y [tokens, in] (+)= x [tokens, out] . w [out, in] + scale * u . b, of a term that is there.
template <class W, SixteenBits T, class Y>
void multiply_transposed_by_augmented_slabs(const CudaContext& context, MatrixView<const T> x, const W& w, MatrixView<Y> y, Update update,
                                            const AdapterTerm<T>& adapter) {
  Scratch scratch(context);
  const AugmentedRows<T> input(scratch, x, adapter);
  const auto slab_of = [&](T* memory, Index cols) { return MatrixView<T>(memory, input.cols(), cols, rounded_up(cols, 8)); };
  for_each_slab<T>(
      context, scratch, x.rows, w.cols, input.cols() * static_cast<Index>(sizeof(T)),
      [&](Index cols) { return input.cols() * rounded_up(cols, 8); },
      [&](cudaStream_t stream, T* memory, Index first, Index cols) {
        const MatrixView<T> slab = slab_of(memory, cols);
        const MatrixView<T> more = slab.middle_rows(w.rows, input.cols() - w.rows);
        const MatrixView<const T> part = adapter.b.middle_cols(first, cols);
        decode(stream, context, w, slab.top_rows(w.rows), 0, first);
        for_each_neighbours_on(stream, context, more.rows, cols, device::AppendRows<T>{part, more}, part, more);
      },
      [&](T* memory, Index first, Index cols) {
        if (first == 0) input.fill(context);
        gemm<T>(context, scratch, {input.view()}, {MatrixView<const T>(slab_of(memory, cols))}, y.middle_cols(first, cols), update);
      });
}

}  // namespace detail
#endif
}  // namespace qdylora
