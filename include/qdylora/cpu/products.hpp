// The matrix products of the CPU backend. Weights are decoded panel by panel into a thread's cache and multiplied from there; a weight is
// decoded once per call and never stored in full. Tiles are cut by shape alone, one task owns each output element, and the
// order of a sum is fixed: the bits do not depend on the number of threads. They do on whether there are fewer than few_tokens rows.
#pragma once

#include <qdylora/backend.hpp>
#include <qdylora/cpu/run.hpp>

namespace qdylora::detail {

inline constexpr Index panel_rows = 48;     // weight rows decoded at a time in x . W^T: a multiple of every tile's rows
inline constexpr Index token_panel = 32;    // tokens packed together: a multiple of every tile's columns
inline constexpr Index slice_cols = 96;     // output columns of a task in dy . W
inline constexpr Index slice_depth = 128;   // weight rows decoded at a time in dy . W
inline constexpr Index few_tokens = 8;      // below this, x . W^T is done by dot products

template <class W>
inline constexpr bool is_dense = false;
template <class S>
inline constexpr bool is_dense<MatrixView<S>> = true;

// Rows [row, row + out.rows), columns [col, col + out.cols) of a weight, as S.
template <class S, CodeFormat F, class Scales>
void decode(const QuantizedView<F, Scales>& w, Index row, Index col, MatrixView<S> out) {
  for (Index i = 0; i < out.rows; ++i) dequantize_range(w, (row + i) * w.cols + col, out.cols, out.row(i));
}
template <class S, class W>
void decode(const MatrixView<W>& w, Index row, Index col, MatrixView<S> out) {
  for (Index i = 0; i < out.rows; ++i)
    for (Index j = 0; j < out.cols; ++j) out(i, j) = static_cast<S>(w(row + i, col + j));
}

// A view of that part of a weight: the weight's own memory where it already is S, else decoded into scratch.
template <class S, class W>
MatrixView<const S> weight_part(const W& w, Index row, Index col, Index rows, Index cols) {
  if constexpr (std::is_same_v<W, MatrixView<const S>> || std::is_same_v<W, MatrixView<S>>) {
    return {w.data + row * w.stride + col, rows, cols, w.stride};
  } else {
    const Index stride = cols + 16;  // keeps rows of 4 KiB from sharing one cache set
    const MatrixView<S> out{scratch<S, 0>(rows * stride), rows, cols, stride};
    decode(w, row, col, out);
    return out;
  }
}

// x [tokens, k] -> panels [k][token_panel] of its transpose, zeros beyond the last token.
template <class S, class T>
void pack_transposed(const CpuRun& run, MatrixView<const T> x, S* packed) {
  constexpr Index depth_chunk = 256;
  const Index panels = (x.rows + token_panel - 1) / token_panel;
  const Index chunks = (x.cols + depth_chunk - 1) / depth_chunk;
  run.parallel_for(panels * chunks, [&](Index task) {
    const Index panel = task / chunks;
    const Index begin = task % chunks * depth_chunk;
    const Index end = std::min(x.cols, begin + depth_chunk);
    const Index tokens = std::min(token_panel, x.rows - panel * token_panel);
    S* out = packed + panel * token_panel * x.cols;
    for (Index k0 = begin; k0 < end; k0 += 16) {
      const Index k1 = std::min(end, k0 + 16);
      for (Index j = 0; j < tokens; ++j) {
        const T* row = x.row(panel * token_panel + j);
        for (Index k = k0; k < k1; ++k) out[k * token_panel + j] = static_cast<S>(row[k]);
      }
      for (Index k = k0; k < k1; ++k) std::fill(out + k * token_panel + tokens, out + (k + 1) * token_panel, S{});
    }
  });
}

template <class Y, class S>
void store(Y& target, S value, Update update) noexcept {
  target = static_cast<Y>(update == Update::accumulate ? static_cast<S>(target) + value : value);
}

// y [m, n] (+)= x [m, k] . w [n, k]^T
template <class T, class W, class Y>
void matmul(const CpuRun& run, MatrixView<const T> x, const W& w, MatrixView<Y> y, Update update) {
  using S = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<Y, double>, double, float>;
  QDYLORA_EXPECTS(x.cols == w.cols, shape_mismatch,
                  "matmul: x " + shape_text(x) + " does not fit weight " + shape_text(w.rows, w.cols));
  expect_shape("matmul: y", y, x.rows, w.rows);
  const Index tokens = x.rows;
  const Index depth = x.cols;
  if (y.empty()) return;
  const auto& kernels = run.kernels<S>();

  if (tokens < few_tokens) {
    Matrix<S> storage;
    const MatrixView<const S> input = as_scalar<S>(x, storage);
    constexpr Index rows_per_task = 16;
    run.parallel_ranges(w.rows, rows_per_task, [&](Index begin, Index end) {
      const MatrixView<const S> rows = weight_part<S>(w, begin, 0, end - begin, depth);
      for (Index t = 0; t < tokens; ++t)
        for (Index n = begin; n < end; ++n) store(y(t, n), kernels.dot(depth, rows.row(n - begin), input.row(t)), update);
    });
    return;
  }

  const Index panels = (tokens + token_panel - 1) / token_panel;
  Matrix<S> packed_storage;
  packed_storage.resize(panels * token_panel, depth);
  S* packed = packed_storage.data();
  pack_transposed(run, x, packed);
  const Index blocks = (w.rows + panel_rows - 1) / panel_rows;
  // A dense weight costs nothing to look at twice, so its tasks are cut by tokens too: with a rank's few rows there are no other tasks.
  const Index groups = is_dense<W> ? (panels + 3) / 4 : 1;
  run.parallel_for(blocks * groups, [&](Index task) {
    const Index first = task / groups * panel_rows;
    const Index count = std::min(panel_rows, w.rows - first);
    const MatrixView<const S> rows = weight_part<S>(w, first, 0, count, depth);
    S result[panel_rows * token_panel];
    const Index panel_begin = groups == 1 ? 0 : task % groups * 4;
    const Index panel_end = groups == 1 ? panels : std::min(panels, panel_begin + 4);
    for (Index panel = panel_begin; panel < panel_end; ++panel) {
      const Index here = std::min(token_panel, tokens - panel * token_panel);
      const Index width = (here + 15) / 16 * 16;
      kernels.gemm(count, width, depth, rows.data, rows.stride, 1, packed + panel * token_panel * depth, token_panel, result, token_panel,
                   false);
      for (Index t = 0; t < here; ++t) {
        Y* out = y.row(panel * token_panel + t) + first;
        for (Index n = 0; n < count; ++n) store(out[n], result[n * token_panel + t], update);
      }
    }
  });
}

// y [m, k] (+)= x [m, n] . w [n, k]
template <class T, class W, class Y>
void matmul_transposed(const CpuRun& run, MatrixView<const T> x, const W& w, MatrixView<Y> y, Update update) {
  using S = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<Y, double>, double, float>;
  QDYLORA_EXPECTS(x.cols == w.rows, shape_mismatch,
                  "matmul_transposed: x " + shape_text(x) + " does not fit weight " + shape_text(w.rows, w.cols));
  expect_shape("matmul_transposed: y", y, x.rows, w.cols);
  if (y.empty()) return;
  const auto& kernels = run.kernels<S>();
  Matrix<S> storage;
  const MatrixView<const S> input = as_scalar<S>(x, storage);
  const Index depth_step = is_dense<W> ? std::max<Index>(w.rows, 1) : slice_depth;
  run.parallel_ranges(w.cols, slice_cols, [&](Index begin, Index end) {
    const Index cols = end - begin;
    MatrixView<S> out;
    if constexpr (std::is_same_v<Y, S>) {
      out = {y.data + begin, y.rows, cols, y.stride};
    } else {
      out = {scratch<S, 1>(y.rows * cols), y.rows, cols};
      for (Index i = 0; i < y.rows; ++i)
        for (Index j = 0; j < cols; ++j) out(i, j) = update == Update::accumulate ? static_cast<S>(y(i, begin + j)) : S{};
    }
    bool add = update == Update::accumulate;
    for (Index n = 0; n < std::max<Index>(w.rows, 1); n += depth_step) {
      const Index depth = std::min(depth_step, w.rows - n);
      const MatrixView<const S> part = weight_part<S>(w, n, begin, depth, cols);
      kernels.gemm(y.rows, cols, depth, input.data + n, input.stride, 1, part.data, part.stride, out.data, out.stride, add);
      add = true;
    }
    if constexpr (!std::is_same_v<Y, S>)
      for (Index i = 0; i < y.rows; ++i)
        for (Index j = 0; j < cols; ++j) y(i, begin + j) = static_cast<Y>(out(i, j));
  });
}

// g [r, k] (+)= u [m, r]^T . x [m, k]
template <class S, class T>
void weight_gradient(const CpuRun& run, MatrixView<const S> u, MatrixView<const T> x, MatrixView<S> g, Update update) {
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
