// Products of the CPU backend with planes of signs (quant/binary_code.hpp), which are decoded, some rows or columns at a time, and multiplied
// as dense weights are.
#pragma once

#include <algorithm>

#include <qdylora/cpu/products.hpp>
#include <qdylora/quant/binary_code.hpp>

namespace qdylora::detail {

// w from (row, col) on, as much as `part` has; col is a multiple of 8
template <class S>
void decode_part(const CpuRun& run, const BinaryCodedView<S>& w, Index row, Index col, MatrixView<S> part) {
  run.parallel_ranges(part.rows, 1, [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) decode_row(w, row + i, col, col + part.cols, part.row(i));
  });
}

template <class S>
void dequantize(const CpuRun& run, const BinaryCodedView<S>& w, MatrixView<S> y) {
  decode_part(run, w, 0, 0, y);
}

// f(first, count)
template <class F>
void for_each_binary_panel(Index size, F&& f) {
  for (Index first = 0; first < size; first += binary_panel_size) f(first, std::min(binary_panel_size, size - first));
}

// y [m, n] (+)= x [m, k] . w [n, k]^T
template <class T, class S, class Y>
void matmul(const CpuRun& run, MatrixView<const T> x, const BinaryCodedView<S>& w, MatrixView<Y> y, Update update) {
  QDYLORA_EXPECTS(x.cols == w.cols, shape_mismatch, "matmul: x " + shape_text(x) + " does not fit weight " + shape_text(w.rows, w.cols));
  expect_shape("matmul: y", y, x.rows, w.rows);
  Matrix<S> panel;
  for_each_binary_panel(w.rows, [&](Index first, Index count) {
    panel.resize(count, w.cols);
    decode_part(run, w, first, 0, panel.view());
    matmul(run, x, MatrixView<const S>(panel.view()), y.middle_cols(first, count), update);
  });
}

// y [m, k] (+)= x [m, n] . w [n, k]
template <class T, class S, class Y>
void matmul_transposed(const CpuRun& run, MatrixView<const T> x, const BinaryCodedView<S>& w, MatrixView<Y> y, Update update) {
  QDYLORA_EXPECTS(x.cols == w.rows, shape_mismatch,
                  "matmul_transposed: x " + shape_text(x) + " does not fit weight " + shape_text(w.rows, w.cols));
  expect_shape("matmul_transposed: y", y, x.rows, w.cols);
  Matrix<S> panel;
  for_each_binary_panel(w.cols, [&](Index first, Index count) {
    panel.resize(w.rows, count);
    decode_part(run, w, 0, first, panel.view());
    matmul_transposed(run, x, MatrixView<const S>(panel.view()), y.middle_cols(first, count), update);
  });
}

template <class S>
void add_sums_of_signs(const CpuRun& run, MatrixView<const S> d, const BinaryCodedView<S>& w, Index first, MatrixView<S> sums) {
  expect_sums_of_signs(d, w, first, sums);
  run.parallel_ranges(d.rows, 1, [&](Index begin_row, Index end_row) {
    for (Index i = begin_row; i < end_row; ++i)
      for (Index k = 0; k < w.planes; ++k) {
        const Index line = k * w.rows + first + i;
        const std::uint8_t* signs = w.bits + line * w.row_bytes();
        w.for_each_group(0, w.cols, [&](Index group, Index begin, Index size) {
          sums(line, group) += sum_of_signs(signs + begin / 8, size, d.row(i) + begin);
        });
      }
  });
}

}  // namespace qdylora::detail
