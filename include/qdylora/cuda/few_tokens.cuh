// Dense products of few tokens whose operands are of different types, as adapters have beside 16-bit activations while a text is generated:
// plain multiply-adds, each operand read where it is. To convert it first would cost more than the product.
#pragma once

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstdint>
#include <type_traits>
#include <utility>

#include <qdylora/cuda/for_each.cuh>
#include <qdylora/cuda/reduce.cuh>

namespace qdylora {
namespace device {

template <class T>
concept Doubles = std::same_as<T, double>;
/// What products of elements of these types are summed in.
template <class... T>
using SumOf = std::conditional_t<(Doubles<T> || ...), double, float>;

/// sum[t] += a thread's share of row . x[first + t, :]: of the rows' pieces of `width` elements every `threads`th, beginning with piece
/// `own`. Of `count` tokens, where they are fewer, the last one is taken again: without branches, loads of all are on their way at once.
template <int width, int threads, int tokens, class X, class W, class S>
__device__ inline void add_share_of_row(const MatrixView<const X>& x, Index first, int count, const W* row, int own, S (&sum)[tokens]) {
  constexpr int unrolled = 4;  // loads of the row on their way at once
  constexpr int step = threads * width;
  for (Index begin = Index{own} * width; begin < x.cols; begin += unrolled * step) {
    Neighbours<width, W> weight[unrolled] = {};
#pragma unroll
    for (int u = 0; u < unrolled; ++u)
      if (const Index k = begin + u * step; k < x.cols) weight[u] = Neighbours<width, W>::load_from(row + k);
#pragma unroll
    for (int u = 0; u < unrolled; ++u) {
      const Index k = begin + u * step;
#pragma unroll
      for (int t = 0; t < tokens; ++t) {
        Neighbours<width, X> token = {};
        if (k < x.cols) token = Neighbours<width, X>::load_from(x.row(first + (t < count ? t : count - 1)) + k);
#pragma unroll
        for (int i = 0; i < width; ++i) sum[t] += static_cast<S>(token.at[i]) * static_cast<S>(weight[u].at[i]);
      }
    }
  }
}

/// y[t, n] (+)= sum_k x[t, k] w[n, k]. A group of warps makes some tokens' products with one row of w, which it reads once: a warp where
/// rows are short, the whole block where they are long. Rows are read in pieces of `width` elements, aligned to as many.
template <class X, class W, class Y, int warps_a_row, int width, int tokens>
struct RowDots {
  static constexpr int threads = 256;
  static constexpr int rows = threads / warp_size / warps_a_row;  // of w, a block
  using S = SumOf<X, W, Y>;
  static constexpr int shared_bytes = threads / warp_size * static_cast<int>(sizeof(S));

  MatrixView<const X> x;
  MatrixView<const W> w;
  MatrixView<Y> y;
  Update update;

  __device__ void operator()(SharedMemory memory) const {
    static_assert(rows == 1 || warps_a_row == 1);
    constexpr int sharing = warps_a_row * warp_size;
    const Index n = static_cast<Index>(block().x) * rows + (rows == 1 ? 0 : warp()), first = static_cast<Index>(block().y) * tokens;
    if (n >= w.rows) return;  // whole warps
    const int count = y.rows - first < tokens ? static_cast<int>(y.rows - first) : tokens;
    S sum[tokens] = {};
    add_share_of_row<width, sharing>(x, first, count, w.row(n), thread() % sharing, sum);
    const auto sums = memory.take<S>(threads / warp_size);
#pragma unroll
    for (int t = 0; t < tokens; ++t) {
      if (t >= count) break;
      if constexpr (rows == 1) sum[t] = sum_block<threads>(sums, sum[t]);
      else sum[t] = sum_warp(sum[t]);
      if (thread() % sharing == 0)
        write(y, first + t, n, static_cast<Accumulator<Y>>(update == Update::accumulate ? read(y, first + t, n) + sum[t] : sum[t]));
    }
  }
};

/// y[t, j] (+)= sum_i h[t, i] w[i, j], a sum a thread.
template <class H, class W, class Y>
struct ColumnSums {
  using S = SumOf<H, W, Y>;
  MatrixView<const H> h;
  MatrixView<const W> w;
  MatrixView<Y> y;
  Update update;

  __device__ void operator()(Index t, Index j) const {
    S sum{};
#pragma unroll 8
    for (Index i = 0; i < w.rows; ++i) sum += static_cast<S>(read(h, t, i)) * static_cast<S>(read(w, i, j));
    write(y, t, j, static_cast<Accumulator<Y>>(update == Update::accumulate ? read(y, t, j) + sum : sum));
  }
};

/// g[i, j] (+)= sum_t u[t, i] x[t, j], a sum a thread.
template <class U, class X, class G>
struct TokenSums {
  using S = SumOf<U, X, G>;
  MatrixView<const U> u;
  MatrixView<const X> x;
  MatrixView<G> g;
  Update update;

  __device__ void operator()(Index i, Index j) const {
    S sum{};
    for (Index t = 0; t < u.rows; ++t) sum += static_cast<S>(read(u, t, i)) * static_cast<S>(read(x, t, j));
    write(g, i, j, static_cast<Accumulator<G>>(update == Update::accumulate ? read(g, i, j) + sum : sum));
  }
};

}  // namespace device

#if !defined(QDYLORA_DEVICE_ONLY)
namespace detail {

inline constexpr Index few_mixed_tokens = 8;

template <class X, class W, class Y>
void multiply_few(const CudaContext& context, MatrixView<const X> x, MatrixView<const W> w, MatrixView<Y> y, Update update) {
  constexpr Index long_row = 2048;
  constexpr int wide = device::Doubles<device::SumOf<X, W, Y>> ? 1 : 16 / std::max(sizeof(X), sizeof(W));
  const auto go = [&]<int warps_a_row, int width, int tokens>(std::integer_sequence<int, warps_a_row, width, tokens>) {
    using Kernel = device::RowDots<X, W, Y, warps_a_row, width, tokens>;
    const dim3 blocks(static_cast<unsigned>(div_up(y.cols, Kernel::rows)), static_cast<unsigned>(div_up(y.rows, tokens)));
    device::launch({context.stream(), blocks, Kernel::shared_bytes}, Kernel{x, w, y, update});
  };
  const bool aligned = w.cols % wide == 0 && has_aligned_rows<wide>(x) && has_aligned_rows<wide>(w);
  if (w.cols < long_row) go(std::integer_sequence<int, 1, 1, 4>{});
  else if (!aligned) go(std::integer_sequence<int, 8, 1, 4>{});
  else if (y.rows == 1) go(std::integer_sequence<int, 8, wide, 1>{});
  else go(std::integer_sequence<int, 8, wide, 4>{});
}
template <class H, class W, class Y>
void multiply_transposed_few(const CudaContext& context, MatrixView<const H> h, MatrixView<const W> w, MatrixView<Y> y, Update update) {
  for_each(context, y.rows, y.cols, device::ColumnSums<H, W, Y>{h, w, y, update});
}
template <class U, class X, class G>
void weight_gradient_few(const CudaContext& context, MatrixView<const U> u, MatrixView<const X> x, MatrixView<G> g, Update update) {
  for_each(context, g.rows, g.cols, device::TokenSums<U, X, G>{u, x, g, update});
}

}  // namespace detail
#endif
}  // namespace qdylora
