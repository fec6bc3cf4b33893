// The matrix products of the CPU backend, with quantized and dense weights, and what else is made of them.
#pragma once

#include <qdylora/cpu/coded_products.hpp>

namespace qdylora::detail {

inline constexpr Index gradient_tokens = 64;  // below this, the sums of a weight's gradient are too short for 16 bits to pay
inline constexpr Index gradient_group = 256;  // rows of one at a time, which bounds the memory that u^T takes
inline constexpr Index few_dots = 8;  // below this, weights that have no kernels for few tokens are multiplied row by row

// ---- dense weights -----------------------------------------------------------------------------------------------------------------

template <class W>
using ConstView = MatrixView<const typename std::remove_const<std::remove_pointer_t<decltype(W::data)>>::type>;

/// Row n of a weight as S.
template <class S, class W>
const S* weight_row(const CpuRun& run, const W& w, Index n) {
  if constexpr (is_dense<W>) {
    return row_as<S, 0>(run, ConstView<W>(w), n);
  } else {
    S* row = scratch<S, 0>(w.cols);
    if constexpr (std::is_same_v<S, float>) run.codes().decode(coded(w), n * w.cols, w.cols, row);
    else
      for (Index k = 0; k < w.cols; ++k) row[k] = static_cast<S>(w(n, k));
    return row;
  }
}

/// y [m, rows] (+)= x [m, cols] . w^T by dot products: a weight is read once, and few tokens with it.
template <class S, class T, class W, class Y>
void multiply_dots(const CpuRun& run, MatrixView<const T> x, const W& w, MatrixView<Y> y, Update update) {
  Matrix<S> storage;
  const MatrixView<const S> input = as_scalar<S>(run, x, storage);
  const auto& kernels = run.kernels<S>();
  if constexpr (!is_dense<W> && std::is_same_v<S, float>) {
    const CodedWeight c = coded(w);
    if (c.byte_step != 0.0f && c.whole_blocks() && c.cols > 0) {
      run.parallel_ranges(w.rows, 8 * row_grain(w.cols), [&](Index begin, Index end) {
        const Index rows = end - begin;
        float* sums = scratch<float, 0>(4 * rows);
        for (Index t = 0; t < x.rows;) {
          const Index tokens = x.rows - t >= 4 ? 4 : 1;
          run.codes().number_dots[tokens / 4](c, begin, rows, input.row(t), input.stride, sums);
          for (Index i = 0; i < rows; ++i)
            for (Index m = 0; m < tokens; ++m) store(y(t + m, begin + i), sums[i * tokens + m], update);
          t += tokens;
        }
      });
      return;
    }
  }
  run.parallel_ranges(w.rows, row_grain(w.cols), [&](Index begin, Index end) {
    for (Index n = begin; n < end; ++n) {
      const S* row = weight_row<S>(run, w, n);
      for (Index t = 0; t < x.rows; ++t) store(y(t, n), kernels.dot(w.cols, row, input.row(t)), update);
    }
  });
}

/// Few tokens with a dense weight, or one in codes of 8 bits. Those of INT8 are numbers, which 16-bit arithmetic would only make slower.
template <class W>
constexpr bool goes_by_rows(Index tokens, Compute compute) noexcept {
  if (tokens >= few_dots) return false;
  if constexpr (is_dense<W>) return true;
  else if constexpr (std::is_same_v<typename W::format, INT8>) return compute != Compute::int8;
  else return W::format::bits == 8 && compute == Compute::exact;
}

template <Direction direction, class S, class T, class W, class Y>
void multiply_dense(const CpuRun& run, MatrixView<const T> x, const W& w, MatrixView<Y> y, Update update) {
  const CodeKernels& kernels = run.codes();
  const auto go = [&](const auto& panels) {
    const Index group = is_dense<W> ? dense_group : token_group;
    if constexpr (std::is_same_v<S, float>)
      if (run.compute_of<T>() == Compute::bits16 && kernels.bits16 && x.rows >= few_dots)
        return multiply_panels<S>(run, Bits16Cells{kernels.bits16}, panels, dense_outputs, group, x, y, update);
    multiply_panels<S>(run, PlainCells<S>{run.kernels<S>()}, panels, dense_outputs, group, x, y, update);
  };
  if constexpr (is_dense<W>) go(ElementPanels<direction, ConstView<W>>{kernels, w});
  else go(ElementPanels<direction, W>{kernels, w});
}

template <CodeFormat Format, class Scales, class T>
void dequantize(const CpuRun& run, const QuantizedView<Format, Scales>& weight, MatrixView<T> y) {
  const CodedWeight w = coded(weight);
  run.parallel_ranges(y.rows, row_grain(y.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i)
      write_row<float, 2>(run, y, i, Update::overwrite, [&](float* row) { run.codes().decode(w, i * w.cols, w.cols, row); });
  });
}

// y [m, n] (+)= x [m, k] . w [n, k]^T
template <class T, class W, class Y>
void matmul(const CpuRun& run, MatrixView<const T> x, const W& w, MatrixView<Y> y, Update update) {
  using S = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<Y, double>, double, float>;
  QDYLORA_EXPECTS(x.cols == w.cols, shape_mismatch,
                  "matmul: x " + shape_text(x) + " does not fit weight " + shape_text(w.rows, w.cols));
  expect_shape("matmul: y", y, x.rows, w.rows);
  if (y.empty()) return;
  if (goes_by_rows<W>(x.rows, run.compute_of<T>())) return multiply_dots<S>(run, x, w, y, update);
  if constexpr (!is_dense<W> && std::is_same_v<S, float>) {
    multiply_coded<Direction::forward>(run, x, w, y, update);
  } else {
    multiply_dense<Direction::forward, S>(run, x, w, y, update);
  }
}

// y [m, k] (+)= x [m, n] . w [n, k]
template <class T, class W, class Y>
void matmul_transposed(const CpuRun& run, MatrixView<const T> x, const W& w, MatrixView<Y> y, Update update) {
  using S = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<Y, double>, double, float>;
  QDYLORA_EXPECTS(x.cols == w.rows, shape_mismatch,
                  "matmul_transposed: x " + shape_text(x) + " does not fit weight " + shape_text(w.rows, w.cols));
  expect_shape("matmul_transposed: y", y, x.rows, w.cols);
  if (y.empty()) return;
  if constexpr (!is_dense<W> && std::is_same_v<S, float>) multiply_coded<Direction::backward>(run, x, w, y, update);
  else multiply_dense<Direction::backward, S>(run, x, w, y, update);
}

// g [r, k] (+)= u [m, r]^T . x [m, k]
template <class S, class T>
void weight_gradient(const CpuRun& run, MatrixView<const S> u, MatrixView<const T> x, MatrixView<S> g, Update update) {
  constexpr Index slice_cols = 96;
  QDYLORA_EXPECTS(u.rows == x.rows, shape_mismatch,
                  "weight_gradient: u " + shape_text(u) + " and x " + shape_text(x) + " have different tokens");
  expect_shape("weight_gradient: g", g, u.cols, x.cols);
  if constexpr (std::is_same_v<S, float>) {
    const CodeKernels& kernels = run.codes();
    if (run.compute_of<T>() == Compute::bits16 && kernels.bits16 && u.rows >= gradient_tokens && u.cols >= kernels.bits16.gradient_rows) {
      const ElementPanels<Direction::backward, MatrixView<const T>> panels{kernels, x};
      for (Index j = 0; j < u.cols; j += gradient_group) {
        const Index rows = std::min(gradient_group, u.cols - j);
        multiply_panels<float>(run, Bits16Cells{kernels.bits16}, panels, task_outputs(x.cols), token_group,
                               Turned{u.middle_cols(j, rows)}, g.middle_rows(j, rows), update);
      }
      return;
    }
  }
  Matrix<S> storage;
  const MatrixView<const S> input = as_scalar<S>(run, x, storage);
  const auto& kernels = run.kernels<S>();
  run.parallel_ranges(g.cols, slice_cols, [&](Index begin, Index end) {
    kernels.gemm(g.rows, end - begin, u.rows, u.data, 1, u.stride, input.data + begin, input.stride, g.data + begin, g.stride,
                 update == Update::accumulate);
  });
}

}  // namespace qdylora::detail
