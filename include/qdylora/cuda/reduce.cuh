// Sums on the device, in an order that the shape alone decides: equal inputs give equal bits on every GPU. (Of SumParts the caller decides how
// many parts there are.)
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <string>

#include <qdylora/backend.hpp>
#include <qdylora/cuda/for_each.cuh>
#include <qdylora/cuda/lists.cuh>

namespace qdylora {
namespace device {

/// The sum over the warp, the same bits in every lane.
template <class S>
__device__ inline S sum_warp(S value) {
#pragma unroll
  for (int bits = warp_size / 2; bits > 0; bits /= 2) value += shuffle_xor(value, bits);
  return value;
}

/// The sum over a block of `threads`, the same bits in every thread. `sums` has room for one number a warp.
template <int threads, class S>
__device__ inline S sum_block(const Shared<S>& sums, S value) {
  value = sum_warp(value);
  if (lane() == 0) sums.store(warp(), value);
  sync_block();
  S total{};
#pragma unroll
  for (int w = 0; w < threads / warp_size; ++w) total += sums.load(w);
  sync_block();  // before the next sum
  return total;
}

/// sums[0, j] += sum_i a[i, j] * b[i, j]. A block has 32 columns, a lane each; its warps share the rows.
template <class T>
struct ColumnProducts {
  using S = Accumulator<T>;
  static constexpr int threads = 1024;
  static constexpr int warps = threads / warp_size;
  static constexpr int shared_bytes = threads * static_cast<int>(sizeof(S));

  MatrixView<const T> a, b;
  MatrixView<S> sums;

  __device__ void operator()(SharedMemory memory) const {
    const auto partial = memory.take<S>(threads);
    const Index j = static_cast<Index>(block().x) * warp_size + lane();
    S sum{};
    if (j < a.cols)
      for (Index i = warp(); i < a.rows; i += warps) sum += read(a, i, j) * read(b, i, j);
    partial.store(thread(), sum);
    sync_block();
    if (warp() > 0 || j >= a.cols) return;
    for (int w = 1; w < warps; ++w) sum += partial.load(w * warp_size + lane());
    write(sums, 0, j, read(sums, 0, j) + sum);
  }
};

/// partial[matrix, block] = sum of squares, in double, over every grid().x-th piece of 4096 columns of a row. Block (piece, matrix).
template <class S>
struct SumSquares {
  static constexpr int threads = 256;
  static constexpr Index columns = 4096;
  static constexpr int shared_bytes = threads / warp_size * 8;

  List<MatrixView<const S>> matrices;
  double* partial;

  __device__ void operator()(SharedMemory memory) const {
    const auto sums = memory.take<double>(threads / warp_size);
    const MatrixView<const S> x = matrices[block().y];
    const Index across = detail::div_up(x.cols, columns), pieces = x.rows * across;
    double sum = 0.0;
    for (Index piece = block().x; piece < pieces; piece += grid().x) {
      const Index i = piece / across, begin = (piece - i * across) * columns;
      const Index end = begin + columns < x.cols ? begin + columns : x.cols;
      for (Index j = begin + thread(); j < end; j += threads) {
        const double value = static_cast<double>(read(x, i, j));
        sum += value * value;
      }
    }
    sum = sum_block<threads>(sums, sum);
    if (thread() == 0) store(partial + static_cast<Index>(block().y) * grid().x + block().x, sum);
  }
};

/// total = sum of `count` numbers.
struct SumPartial {
  static constexpr int threads = 256;
  static constexpr int shared_bytes = threads / warp_size * 8;

  const double* partial;
  Index count;
  double* total;

  __device__ void operator()(SharedMemory memory) const {
    double sum = 0.0;
    for (Index i = thread(); i < count; i += threads) sum += load(partial + i);
    sum = sum_block<threads>(memory.take<double>(threads / warp_size), sum);
    if (thread() == 0) store(total, sum);
  }
};

/// y += x for two pairs, in one block, if all numbers of both x are finite.
template <class S>
struct AddIfFinite {
  static constexpr int threads = 512;
  static constexpr int shared_bytes = threads / warp_size * static_cast<int>(sizeof(S));

  struct Pair {
    MatrixView<const S> x;
    MatrixView<S> y;
  } pairs[2];

  __device__ void operator()(SharedMemory memory) const {
    S spoiled{};
    for_each_element([&](const Pair& pair, Index i, Index j) {
      spoiled += !(std::fabs(read(pair.x, i, j)) <= std::numeric_limits<S>::max()) ? S{1} : S{};
    });
    if (sum_block<threads>(memory.take<S>(threads / warp_size), spoiled) > S{}) return;
    for_each_element([](const Pair& pair, Index i, Index j) { write(pair.y, i, j, read(pair.y, i, j) + read(pair.x, i, j)); });
  }

 private:
  template <class F>
  __device__ void for_each_element(F&& f) const {
    for (const Pair& pair : pairs)
      for (Index i = warp(); i < pair.x.rows; i += threads / warp_size)
        for (Index j = lane(); j < pair.x.cols; j += warp_size) f(pair, i, j);
  }
};

/// y[i, j] (+)= the sum of its parts, [rows, cols] each, in order.
template <class S, class Y>
struct SumParts {
  const S* parts;
  int count;
  MatrixView<Y> y;
  Update update;

  __device__ void operator()(Index i, Index j) const {
    S sum = update == Update::accumulate ? read(y, i, j) : S{};
    for (int part = 0; part < count; ++part) sum += load(parts + (part * y.rows + i) * y.cols + j);
    write(y, i, j, sum);
  }
};

}  // namespace device

#if !defined(QDYLORA_DEVICE_ONLY)
namespace detail {

template <class T>
void column_products(const CudaContext& context, MatrixView<const T> a, MatrixView<const T> b, MatrixView<Accumulator<T>> sums) {
  using Kernel = device::ColumnProducts<T>;
  expect_shape("column_products: second", b, a.rows, a.cols);
  expect_shape("column_products: sums", sums, 1, a.cols);
  const auto blocks = static_cast<unsigned>(div_up(a.cols, device::warp_size));
  device::launch({context.stream(), blocks, Kernel::shared_bytes}, Kernel{a, b, sums});
}

/// y += x and c += a, or neither where a number of x or a is not finite. The host does not wait to know.
template <class S>
void add_if_finite(const CudaContext& context, MatrixView<const S> x, MatrixView<S> y, MatrixView<const S> a, MatrixView<S> c) {
  using Kernel = device::AddIfFinite<S>;
  expect_shape("add_if_finite: x", x, y.rows, y.cols);
  expect_shape("add_if_finite: a", a, c.rows, c.cols);
  device::launch({context.stream(), 1, Kernel::shared_bytes}, Kernel{{{x, y}, {a, c}}});
}

/// Over all elements of all matrices: one launch, one wait.
template <class S>
double sum_squares(const CudaContext& context, std::span<const MatrixView<const S>> matrices) {
  using Kernel = device::SumSquares<S>;
  constexpr Index most_blocks = 128, most_matrices = 65535;
  QDYLORA_EXPECTS(static_cast<Index>(matrices.size()) <= most_matrices, unsupported,
                  "sum_squares: " + std::to_string(matrices.size()) + " matrices");
  Index pieces = 0;
  for (const auto& x : matrices) pieces = std::max(pieces, x.rows * ((x.cols + Kernel::columns - 1) / Kernel::columns));
  if (pieces == 0) return 0.0;
  const Index across = std::min(pieces, most_blocks), count = static_cast<Index>(matrices.size());
  Scratch scratch(context);
  const auto list = listed(context, scratch, matrices);
  auto* const partial = scratch.take<double>(across * count);
  auto* const total = scratch.take<double>(1);
  device::launch({context.stream(), {static_cast<unsigned>(across), static_cast<unsigned>(count)}, Kernel::shared_bytes},
                 Kernel{list, partial});
  device::launch({context.stream(), 1, device::SumPartial::shared_bytes}, device::SumPartial{partial, across * count, total});
  double result = 0.0;
  copy_to_host(context, total, &result, 1);
  return result;
}
template <class S>
double sum_squares(const CudaContext& context, MatrixView<const S> x) {
  return sum_squares(context, std::span<const MatrixView<const S>>(&x, 1));
}

}  // namespace detail
#endif
}  // namespace qdylora
