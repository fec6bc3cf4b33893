// What a magnitude (DoRA) takes on the device: norms of a weight's rows, and factors of them. All rows of numbers are [1, out].
#pragma once

#include <bit>
#include <cmath>
#include <type_traits>

#include <qdylora/cuda/dequantize.cuh>
#include <qdylora/cuda/reduce.cuh>

namespace qdylora {
namespace device {

template <class T>
struct ScaleColumnsBy {
  MatrixView<const T> x;
  MatrixView<const Accumulator<T>> row;
  MatrixView<T> y;
  __device__ void operator()(Index i, Index j) const { write(y, i, j, read(x, i, j) * read(row, 0, j)); }
};

template <class S>
struct NormsOfRows {
  MatrixView<const S> squares, sums;
  S scale;
  MatrixView<S> norms;
  __device__ void operator()(Index, Index j) const {
    const S square = read(squares, 0, j) + scale * read(sums, 0, j);
    write(norms, 0, j, square < 0 ? S{} : std::sqrt(square));  // NaN stays
  }
};

template <class S>
struct MagnitudeFactors {
  MatrixView<const S> m, norms;
  S less;
  MatrixView<S> factors;
  __device__ void operator()(Index, Index j) const {
    const S norm = read(norms, 0, j);
    write(factors, 0, j, (norm != 0 ? read(m, 0, j) / norm : S{1}) - less);
  }
};

template <class S>
struct AddOverNorms {
  MatrixView<const S> sums, norms;
  MatrixView<S> gradient;
  __device__ void operator()(Index, Index j) const {
    const S norm = read(norms, 0, j);
    if (norm != 0) write(gradient, 0, j, read(gradient, 0, j) + read(sums, 0, j) / norm);
  }
};

/// squares[0, o] = sum_k w[o, k]^2 in double, w a QuantizedView or a MatrixView. A block has a row.
template <class W, class S>
struct RowSquares {
  static constexpr int threads = 256;
  static constexpr int shared_bytes = threads / warp_size * 8;

  W w;
  MatrixView<S> squares;
  int block_shift;  // log2(block size) of codes

  __device__ void operator()(SharedMemory memory) const {
    const Index row = block().x;
    double sum = 0.0;
    for (Index k = thread(); k < w.cols; k += threads) {
      double value;
      if constexpr (requires { w.codes; }) value = static_cast<double>(decoded(w, row * w.cols + k, block_shift));
      else value = static_cast<double>(read(w, row, k));
      sum += value * value;
    }
    sum = sum_block<threads>(memory.take<double>(threads / warp_size), sum);
    if (thread() == 0) write(squares, 0, row, static_cast<S>(sum));
  }
};

}  // namespace device

#if !defined(QDYLORA_DEVICE_ONLY)
namespace detail {

template <class T>
void scale_columns_by(const CudaContext& context, MatrixView<const T> x, MatrixView<const Accumulator<T>> row, MatrixView<T> y) {
  expect_shape("scale_columns: factors", row, 1, x.cols);
  expect_shape("scale_columns: y", y, x.rows, x.cols);
  for_each(context, y.rows, y.cols, device::ScaleColumnsBy<T>{x, row, y});
}

template <class S>
void row_norms(const CudaContext& context, MatrixView<const S> squares, MatrixView<const S> sums, S scale, MatrixView<S> norms) {
  expect_shape("row_norms: squares", squares, 1, norms.cols);
  expect_shape("row_norms: sums", sums, 1, norms.cols);
  expect_shape("row_norms: norms", norms, 1, norms.cols);
  for_each(context, 1, norms.cols, device::NormsOfRows<S>{squares, sums, scale, norms});
}

template <class S>
void magnitude_factors(const CudaContext& context, MatrixView<const S> m, MatrixView<const S> norms, S less, MatrixView<S> factors) {
  expect_shape("magnitude_factors: m", m, 1, factors.cols);
  expect_shape("magnitude_factors: norms", norms, 1, factors.cols);
  expect_shape("magnitude_factors: factors", factors, 1, factors.cols);
  for_each(context, 1, factors.cols, device::MagnitudeFactors<S>{m, norms, less, factors});
}

template <class S>
void add_over_norms(const CudaContext& context, MatrixView<const S> sums, MatrixView<const S> norms, MatrixView<S> gradient) {
  expect_shape("add_over_norms: sums", sums, 1, gradient.cols);
  expect_shape("add_over_norms: norms", norms, 1, gradient.cols);
  expect_shape("add_over_norms: gradient", gradient, 1, gradient.cols);
  for_each(context, 1, gradient.cols, device::AddOverNorms<S>{sums, norms, gradient});
}

template <class W, class S>
void row_squares(const CudaContext& context, const W& w, MatrixView<S> squares) {
  expect_shape("row_squares: squares", squares, 1, w.rows);
  using Kernel = device::RowSquares<W, S>;
  int block_shift = 0;
  if constexpr (requires { w.codes; }) block_shift = std::countr_zero(static_cast<std::size_t>(w.block_size));
  device::launch({context.stream(), static_cast<unsigned>(w.rows), Kernel::shared_bytes}, Kernel{w, squares, block_shift});
}

}  // namespace detail
#endif
}  // namespace qdylora
