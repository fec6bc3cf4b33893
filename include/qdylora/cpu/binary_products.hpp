// Products of the CPU backend with planes of signs (quant/binary_code.hpp): of few tokens with the signs as they are, of more with panels of what
// they stand for; and the sums that train their scales.
#pragma once

#include <algorithm>

#include <qdylora/cpu/products.hpp>
#include <qdylora/quant/binary_code.hpp>

namespace qdylora::detail {

inline constexpr Index few_sign_tokens = 5;  // at most; more are faster by panels
inline constexpr Index sign_strip = 4096;    // numbers of x that are multiplied with many rows

/// Row i, valid until the thread asks for another.
template <class S>
SignRow<S> sign_row(const BinaryCodedView<S>& w, Index i) {
  const Index groups = w.groups();
  SignRow<S> row{w.planes, w.columns_of_group()};
  for (Index k = 0; k < w.planes; ++k) {
    const Index line = k * w.rows + i;
    const float* scales = w.scales + line * groups;
    row.bits[k] = w.bits + line * w.row_bytes();
    if (line < w.own.rows) {
      row.scales[k] = w.own.row(line);
    } else if constexpr (std::is_same_v<S, float>) {
      row.scales[k] = scales;
    } else {
      S* wide = scratch<S, 3>(w.planes * groups) + k * groups;
      std::copy_n(scales, groups, wide);
      row.scales[k] = wide;
    }
  }
  return row;
}

/// Asks memory for the signs of columns [begin, end) of row i.
template <class S>
[[gnu::always_inline]] inline void prefetch_signs(const BinaryCodedView<S>& w, Index i, Index begin, Index end) {
  for (Index k = 0; k < w.planes; ++k) {
    const std::uint8_t* bits = w.bits + (k * w.rows + i) * w.row_bytes();
    for (Index at = begin / 8; at < (end + 7) / 8; at += 64) __builtin_prefetch(bits + at);
  }
}

template <class S>
void dequantize(const CpuRun& run, const BinaryCodedView<S>& w, MatrixView<S> y) {
  run.parallel_ranges(y.rows, row_grain(y.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) run.kernels<S>().decode_signs(sign_row(w, i), 0, w.cols, y.row(i));
  });
}

template <Direction direction, class S>
struct SignPanels {
  const CpuRun& run;
  const BinaryCodedView<S>& w;

  Index outputs() const noexcept { return direction == Direction::forward ? w.rows : w.cols; }
  Index depth() const noexcept { return direction == Direction::forward ? w.cols : w.rows; }
  void fill(Index first, Index count, Index begin, Index part, S* out) const {
    const KernelTable<S>& kernels = run.kernels<S>();
    if (count < panel_width) std::fill_n(out, part * panel_width, S{});
    if constexpr (direction == Direction::forward) {
      const Index stride = rounded_up(part, 16);
      S* rows = scratch<S, 4>(panel_width * stride);
      for (Index i = 0; i < count; ++i) kernels.decode_signs(sign_row(w, first + i), begin, begin + part, rows + i * stride);
      kernels.transpose(count, part, rows, stride, out, panel_width);
    } else {
      for (Index k = 0; k < part; ++k) kernels.decode_signs(sign_row(w, begin + k), first, first + count, out + k * panel_width);
    }
  }
  void fill(Index first, Index count, Index begin, Index part, std::uint32_t* out) const {
    fill_rounded(*this, run.codes(), first, count, begin, part, out);
  }
};

template <Direction direction, class T, class S, class Y>
void multiply_sign_panels(const CpuRun& run, MatrixView<const T> x, const BinaryCodedView<S>& w, MatrixView<Y> y, Update update) {
  const SignPanels<direction, S> panels{run, w};
  const CellKernels& cells = run.codes().bits16;
  if constexpr (std::is_same_v<S, float>)
    if (run.compute_of<T>() == Compute::bits16 && cells && x.rows >= few_dots)
      return multiply_panels<S>(run, Bits16Cells{cells}, panels, task_outputs(run, panels.outputs(), x.rows), token_group, x, y, update);
  multiply_panels<S>(run, PlainCells<S>{run.kernels<S>()}, panels, task_outputs(panels.outputs()), token_group, x, y, update);
}

/// y [m, rows] (+)= x [m, cols] . w^T, as much of x at a time as a first-level cache keeps for many rows.
template <class T, class S, class Y>
void multiply_signs(const CpuRun& run, MatrixView<const T> x, const BinaryCodedView<S>& w, MatrixView<Y> y, Update update) {
  Matrix<S> storage;
  const MatrixView<const S> input = as_scalar<S>(run, x, storage);
  run.parallel_ranges(w.rows, 8 * row_grain(w.cols), [&](Index first, Index last) {
    const Index rows = last - first;
    S* sums = scratch<S, 0>(4 * rows);
    for (Index t = 0; t < x.rows;) {
      const Index tokens = x.rows - t >= 4 ? 4 : 1, strip = sign_strip / tokens;
      std::fill_n(sums, rows * tokens, S{});
      for (Index begin = 0; begin < w.cols; begin += strip)
        for (Index i = 0; i < rows; ++i) {
          const Index end = std::min(w.cols, begin + strip);
          prefetch_signs(w, std::min(first + i + 1, w.rows - 1), begin, end);
          S part[4];
          run.kernels<S>().sign_dots[tokens / 4](sign_row(w, first + i), begin, end, input.row(t), input.stride, part);
          for (Index m = 0; m < tokens; ++m) sums[i * tokens + m] += part[m];
        }
      for (Index i = 0; i < rows; ++i)
        for (Index m = 0; m < tokens; ++m) store(y(t + m, first + i), sums[i * tokens + m], update);
      t += tokens;
    }
  });
}

// y [m, n] (+)= x [m, k] . w [n, k]^T
template <class T, class S, class Y>
void matmul(const CpuRun& run, MatrixView<const T> x, const BinaryCodedView<S>& w, MatrixView<Y> y, Update update) {
  QDYLORA_EXPECTS(x.cols == w.cols, shape_mismatch, "matmul: x " + shape_text(x) + " does not fit weight " + shape_text(w.rows, w.cols));
  expect_shape("matmul: y", y, x.rows, w.rows);
  if (y.empty()) return;
  if (x.rows <= few_sign_tokens) multiply_signs(run, x, w, y, update);
  else multiply_sign_panels<Direction::forward>(run, x, w, y, update);
}

// y [m, k] (+)= x [m, n] . w [n, k]
template <class T, class S, class Y>
void matmul_transposed(const CpuRun& run, MatrixView<const T> x, const BinaryCodedView<S>& w, MatrixView<Y> y, Update update) {
  QDYLORA_EXPECTS(x.cols == w.rows, shape_mismatch,
                  "matmul_transposed: x " + shape_text(x) + " does not fit weight " + shape_text(w.rows, w.cols));
  expect_shape("matmul_transposed: y", y, x.rows, w.cols);
  if (y.empty()) return;
  multiply_sign_panels<Direction::backward>(run, x, w, y, update);
}

template <class S>
void add_sums_of_signs(const CpuRun& run, MatrixView<const S> d, const BinaryCodedView<S>& w, Index first, MatrixView<S> sums) {
  expect_sums_of_signs(d, w, first, sums);
  constexpr S one = 1;
  run.parallel_ranges(d.rows, row_grain(d.cols), [&](Index begin_row, Index end_row) {
    for (Index i = begin_row; i < end_row; ++i)
      for (Index k = 0; k < w.planes; ++k) {
        const Index line = k * w.rows + first + i;
        const std::uint8_t* signs = w.bits + line * w.row_bytes();
        w.for_each_group(0, w.cols, [&](Index group, Index begin, Index size) {
          S sum;
          run.kernels<S>().sign_dots[0]({1, size, {signs + begin / 8}, {&one}}, 0, size, d.row(i) + begin, 0, &sum);
          sums(line, group) += sum;
        });
      }
  });
}

}  // namespace qdylora::detail
