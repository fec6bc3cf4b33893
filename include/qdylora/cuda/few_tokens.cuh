// Dense products of few tokens whose operands are of different types, as adapters have beside 16-bit activations while a text is generated:
// plain multiply-adds, each operand read where it is. To convert it first would cost more than the product.
#pragma once

#include <concepts>
#include <type_traits>

#include <qdylora/cuda/for_each.cuh>
#include <qdylora/cuda/reduce.cuh>

namespace qdylora {
namespace device {

template <class T>
concept Doubles = std::same_as<T, double>;
/// What products of elements of these types are summed in.
template <class... T>
using SumOf = std::conditional_t<(Doubles<T> || ...), double, float>;

/// y[t, n] (+)= sum_k x[t, k] w[n, k]. A group of warps makes four tokens' products with one row of w, which it reads once: a warp where
/// rows are short, the whole block where they are long.
template <class X, class W, class Y, int warps_a_row>
struct RowDots {
  static constexpr int threads = 256;
  static constexpr int rows = threads / warp_size / warps_a_row;  // of w, a block
  static constexpr int tokens = 4;
  static constexpr int unrolled = 4;  // loads of w on their way at once
  using S = SumOf<X, W, Y>;
  static constexpr int shared_bytes = threads / warp_size * static_cast<int>(sizeof(S));

  MatrixView<const X> x;
  MatrixView<const W> w;
  MatrixView<Y> y;
  Update update;

  __device__ void operator()(SharedMemory memory) const {
    static_assert(rows == 1 || warps_a_row == 1);
    constexpr int step = warps_a_row * warp_size;
    const Index n = static_cast<Index>(block().x) * rows + (rows == 1 ? 0 : warp()), first = static_cast<Index>(block().y) * tokens;
    if (n >= w.rows) return;  // whole warps
    const int count = y.rows - first < tokens ? static_cast<int>(y.rows - first) : tokens;
    S sum[tokens] = {};
    for (Index begin = thread() % step; begin < w.cols; begin += unrolled * step) {
      S weight[unrolled];
#pragma unroll
      for (int u = 0; u < unrolled; ++u) {
        const Index k = begin + u * step;
        weight[u] = k < w.cols ? static_cast<S>(read(w, n, k)) : S{};
      }
#pragma unroll
      for (int t = 0; t < tokens; ++t)
        if (t < count) {
#pragma unroll
          for (int u = 0; u < unrolled; ++u)
            if (const Index k = begin + u * step; k < w.cols) sum[t] += static_cast<S>(read(x, first + t, k)) * weight[u];
        }
    }
    const auto sums = memory.take<S>(threads / warp_size);
#pragma unroll
    for (int t = 0; t < tokens; ++t) {
      if (t >= count) break;
      if constexpr (rows == 1) sum[t] = sum_block<threads>(sums, sum[t]);
      else sum[t] = sum_warp(sum[t]);
      if (thread() % step == 0)
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
  const auto go = [&]<int warps_a_row>(std::integral_constant<int, warps_a_row>) {
    using Kernel = device::RowDots<X, W, Y, warps_a_row>;
    const auto blocks = [](Index extent, Index each) { return static_cast<unsigned>((extent + each - 1) / each); };
    device::launch({context.stream(), {blocks(y.cols, Kernel::rows), blocks(y.rows, Kernel::tokens)}, Kernel::shared_bytes},
                   Kernel{x, w, y, update});
  };
  if (w.cols < long_row) go(std::integral_constant<int, 1>{});
  else go(std::integral_constant<int, 8>{});
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
