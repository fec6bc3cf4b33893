// The matrix products of the CPU backend, with quantized and dense weights, and what else is made of them.
#pragma once

#include <qdylora/cpu/coded_products.hpp>

namespace qdylora::detail {

inline constexpr Index few_dots = 8;        // below this, with weights that have no such kernels, dot products

// ---- dense weights -----------------------------------------------------------------------------------------------------------------

template <class W>
using ConstView = MatrixView<const typename std::remove_const<std::remove_pointer_t<decltype(W::data)>>::type>;

/// y [m, rows] (+)= x [m, cols] . w^T by dot products: a weight is read once, and few tokens with it.
template <class S, class T, class W, class Y>
void multiply_dots(const CpuRun& run, MatrixView<const T> x, const W& w, MatrixView<Y> y, Update update) {
  Matrix<S> storage;
  const MatrixView<const S> input = as_scalar<S>(x, storage);
  const auto& kernels = run.kernels<S>();
  run.parallel_ranges(w.rows, row_grain(w.cols), [&](Index begin, Index end) {
    for (Index n = begin; n < end; ++n) {
      const S* row;
      if constexpr (std::is_same_v<ConstView<W>, MatrixView<const S>>) {
        row = w.row(n);
      } else {
        S* converted = scratch<S, 0>(w.cols);
        for (Index k = 0; k < w.cols; ++k) converted[k] = static_cast<S>(w(n, k));
        row = converted;
      }
      for (Index t = 0; t < x.rows; ++t) store(y(t, n), kernels.dot(w.cols, row, input.row(t)), update);
    }
  });
}

template <Direction direction, class S, class T, class W, class Y>
void multiply_dense(const CpuRun& run, MatrixView<const T> x, const W& w, MatrixView<Y> y, Update update) {
  const CodeKernels& kernels = run.codes();
  const auto go = [&](const auto& panels) {
    const Index group = is_dense<W> ? dense_group : token_group;
    if constexpr (std::is_same_v<S, float>)
      if (run.compute_of<T>() == Compute::bits16 && kernels.pairs && x.rows >= few_dots)
        return multiply_panels<S>(run, PairCells{kernels.pairs}, panels, 2 * panel_width, group, x, y, update);
    multiply_panels<S>(run, PlainCells<S>{run.kernels<S>()}, panels, 2 * panel_width, group, x, y, update);
  };
  if constexpr (is_dense<W>) go(ElementPanels<direction, ConstView<W>>{kernels, w});
  else go(ElementPanels<direction, W>{kernels, w});
}

template <CodeFormat Format, class Scales, class T>
void dequantize(const CpuRun& run, const QuantizedView<Format, Scales>& weight, MatrixView<T> y) {
  const CodedWeight w = coded(weight);
  run.parallel_ranges(y.rows, row_grain(y.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i)
      write_row<float, 2>(y, i, Update::overwrite, [&](float* row) { run.codes().decode(w, i * w.cols, w.cols, row); });
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
  if constexpr (!is_dense<W> && std::is_same_v<S, float>) {
    multiply_coded<Direction::forward>(run, x, w, y, update);
  } else {
    if constexpr (is_dense<W>)
      if (x.rows < few_dots) return multiply_dots<S>(run, x, w, y, update);
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
  Matrix<S> storage;
  const MatrixView<const S> input = as_scalar<S>(x, storage);
  const auto& kernels = run.kernels<S>();
  run.parallel_ranges(g.cols, slice_cols, [&](Index begin, Index end) {
    kernels.gemm(g.rows, end - begin, u.rows, u.data, 1, u.stride, input.data + begin, input.stride, g.data + begin, g.stride,
                 update == Update::accumulate);
  });
}

}  // namespace qdylora::detail
