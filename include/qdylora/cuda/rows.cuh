// Rows of tables and activations on the device: embedding and its gradient, rows that are gathered, scattered and copied.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <span>
#include <vector>

#include <qdylora/backend_checks.hpp>
#include <qdylora/cuda/dequantize.cuh>
#include <qdylora/cuda/elementwise.cuh>
#include <qdylora/cuda/lists.cuh>

namespace qdylora {
namespace device {

/// y[i] = x[rows[i]]
template <class X, class Y, class Row>
struct GatherRows {
  MatrixView<const X> x;
  List<Row> rows;
  MatrixView<Y> y;
  template <int width>
  __device__ void neighbours(Index i, Index j) const {
    assign<width>(x, rows[i], y, i, j);
  }
};

/// y[i] = decoded w[rows[i]]
template <CodeFormat Format, class Scales, class Y, class Row>
struct GatherCodedRows {
  QuantizedView<Format, Scales> w;
  List<Row> rows;
  MatrixView<Y> y;
  int block_shift;
  __device__ void operator()(Index i, Index j) const {
    write(y, i, j, decoded(w, static_cast<Index>(rows[i]) * w.cols + j, block_shift));
  }
};

/// y[rows[i]] = x[i]
template <class T>
struct ScatterRows {
  MatrixView<const T> x;
  List<Index> rows;
  MatrixView<T> y;
  template <int width>
  __device__ void neighbours(Index i, Index j) const {
    assign<width>(x, i, y, rows[i], j);
  }
};

/// The places in an order of tokens, from begin to before end, that hold those of one row of a table.
struct Run {
  std::int32_t row, begin, end;
};

/// gradient[row] += dy[order[begin]] + ... + dy[order[end - 1]] for each run, one after the other; a row has one run at most.
template <class T>
struct AddRuns {
  MatrixView<const T> dy;
  List<Run> runs;
  List<std::int32_t> order;
  MatrixView<Accumulator<T>> gradient;
  template <int width>
  __device__ void neighbours(Index i, Index j) const {
    const Run run = runs[i];
    auto sums = read_neighbours<width>(gradient, run.row, j);
    for (std::int32_t k = run.begin; k < run.end; ++k) {
      const auto terms = read_neighbours<width>(dy, order[k], j);
#pragma unroll
      for (int n = 0; n < width; ++n) sums.at[n] += terms.at[n];
    }
    sums.store_to(gradient.row(run.row) + j);
  }
};

/// rows[i][j] = x[i, j]
template <class T>
struct CopyRows {
  MatrixView<const T> x;
  List<T*> rows;
  template <int width>
  __device__ void neighbours(Index i, Index j) const {
    assign<width>(x, i, MatrixView<T>(rows[i], 1, x.cols), 0, j);
  }
};

}  // namespace device

#if !defined(QDYLORA_DEVICE_ONLY)
namespace detail {

/// Rows of a dense table, or of a quantized one.
template <class T, class Table>
void embed(const CudaContext& context, std::span<const std::int32_t> ids, const Table& table, MatrixView<T> y) {
  expect_embed(ids, table, y);
  Scratch scratch(context);
  const auto rows = listed(context, scratch, ids);
  const auto gather = [&]<class S>(const MatrixView<S>& dense) {
    for_each_neighbours(context, y.rows, y.cols, device::GatherRows<std::remove_const_t<S>, T, std::int32_t>{dense, rows, y}, dense, y);
  };
  const auto gather_coded = [&]<CodeFormat Format, class Scales>(const QuantizedView<Format, Scales>& coded) {
    const int block_shift = std::countr_zero(static_cast<std::size_t>(coded.block_size));
    for_each(context, y.rows, y.cols, device::GatherCodedRows<Format, Scales, T, std::int32_t>{coded, rows, y, block_shift});
  };
  if constexpr (requires { table.codes; }) gather_coded(table);
  else gather(table);
}

/// The tokens of an id are one thread's, in their order, so that sums are the same each time.
template <class T, class S>
void embed_backward(const CudaContext& context, std::span<const std::int32_t> ids, MatrixView<const T> dy, MatrixView<S> gradient) {
  expect_embed(ids, gradient, dy);
  if (ids.empty()) return;
  std::vector<std::int32_t> order;
  while (order.size() < ids.size()) order.push_back(static_cast<std::int32_t>(order.size()));
  const auto id = [&](std::int32_t token) { return ids[static_cast<std::size_t>(token)]; };
  std::stable_sort(order.begin(), order.end(), [&](std::int32_t a, std::int32_t b) { return id(a) < id(b); });
  std::vector<device::Run> runs;
  for (std::int32_t k = 0; const std::int32_t token : order) {
    if (runs.empty() || runs.back().row != id(token)) runs.push_back({id(token), k, k});
    runs.back().end = ++k;
  }
  Scratch scratch(context);
  const auto run_list = listed(context, scratch, std::span<const device::Run>(runs));
  const auto order_list = listed(context, scratch, std::span<const std::int32_t>(order));
  for_each_neighbours(context, static_cast<Index>(runs.size()), dy.cols, device::AddRuns<T>{dy, run_list, order_list, gradient}, dy, gradient);
}

template <class T>
void gather_rows(const CudaContext& context, MatrixView<const T> x, std::span<const Index> rows, MatrixView<T> y) {
  expect_rows("gather_rows", "gather_rows: y", y, rows, x);
  Scratch scratch(context);
  const auto list = listed(context, scratch, rows);
  for_each_neighbours(context, y.rows, y.cols, device::GatherRows<T, T, Index>{x, list, y}, x, y);
}

template <class T>
void scatter_rows(const CudaContext& context, MatrixView<const T> x, std::span<const Index> rows, MatrixView<T> y) {
  expect_rows("scatter_rows", "scatter_rows: x", x, rows, y);
  Scratch scratch(context);
  const auto list = listed(context, scratch, rows);
  fill(context, y, T{});
  for_each_neighbours(context, x.rows, x.cols, device::ScatterRows<T>{x, list, y}, x, y);
}

template <class T>
void copy_rows(const CudaContext& context, MatrixView<const T> x, std::span<const MatrixView<T>> targets) {
  expect_copy_rows(x, targets);
  constexpr int width = 16 / static_cast<int>(sizeof(T));
  bool whole = are_whole<width>(x.cols, x);
  std::vector<T*> rows;
  for (const auto& target : targets) {
    rows.push_back(target.data);
    whole = whole && has_aligned_rows<width>(target);
  }
  Scratch scratch(context);
  const auto list = listed(context, scratch, std::span<T* const>(rows));
  for_each_width_on<width>(context.stream(), context, x.rows, x.cols, whole, device::CopyRows<T>{x, list});
}

}  // namespace detail
#endif
}  // namespace qdylora
