// Elementwise operations and the optimizer's arithmetic on the device. Values are computed in Accumulator<T> and rounded once.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>

#include <qdylora/backend_checks.hpp>
#include <qdylora/cuda/for_each.cuh>
#include <qdylora/cuda/lists.cuh>

namespace qdylora {
namespace device {

template <class T>
struct Fill {
  MatrixView<T> y;
  T value;
  __device__ void operator()(Index i, Index j) const { store(y.row(i) + j, value); }
};

template <class X, class Y>
struct Convert {
  MatrixView<const X> x;
  MatrixView<Y> y;
  template <int width>
  __device__ void neighbours(Index i, Index j) const {
    assign<width>(x, i, y, i, j);
  }
};

template <class X, class Y>
struct Add {
  MatrixView<const X> x;
  MatrixView<Y> y;
  template <int width>
  __device__ void neighbours(Index i, Index j) const {
    const auto more = read_neighbours<width>(x, i, j);
    auto sum = read_neighbours<width>(y, i, j);
#pragma unroll
    for (int k = 0; k < width; ++k) sum.at[k] = sum.at[k] + more.at[k];
    sum.store_to(y.row(i) + j);
  }
};

template <class T>
struct AddRow {
  MatrixView<const Accumulator<T>> row;
  MatrixView<T> y;
  template <int width>
  __device__ void neighbours(Index i, Index j) const {
    auto sum = read_neighbours<width>(y, i, j);
    const auto more = read_neighbours<width>(row, 0, j);
#pragma unroll
    for (int k = 0; k < width; ++k) sum.at[k] = sum.at[k] + more.at[k];
    sum.store_to(y.row(i) + j);
  }
};

template <class S>
struct ScaleColumns {
  MatrixView<const S> x;
  List<S> factors;
  MatrixView<S> y;
  __device__ void operator()(Index i, Index j) const { write(y, i, j, read(x, i, j) * factors[j]); }
};

template <class T>
struct Dropout {
  MatrixView<const T> x;
  MatrixView<T> y;
  DropoutKey key;
  std::uint64_t threshold;
  Accumulator<T> keep_scale;
  Update update;
  /// Four neighbours have their words of one block.
  template <int width>
  __device__ void neighbours(Index i, Index j) const {
    constexpr int together = width < 4 ? width : 4;
    const auto element = static_cast<std::uint64_t>((key.first_row + i) * x.cols + j);
    auto value = read_neighbours<width>(x, i, j);
#pragma unroll
    for (int first = 0; first < width; first += together) {
      const auto words = random_words(key.seed, Purpose::dropout, key.layer, key.step, (element + first) >> 2);
#pragma unroll
      for (int k = 0; k < together; ++k) {
        const std::uint32_t word = words[together == 4 ? static_cast<unsigned>(k) : static_cast<unsigned>(element + k) & 3];
        auto& v = value.at[first + k];
        v = word >= threshold ? v * keep_scale : Accumulator<T>{};
      }
    }
    if (update == Update::accumulate) {
      const auto before = read_neighbours<width>(y, i, j);
#pragma unroll
      for (int k = 0; k < width; ++k) value.at[k] = before.at[k] + value.at[k];
    }
    value.store_to(y.row(i) + j);
  }
};

/// An update's numbers, which come with a launch: those of some rows where rows differ, else of one for all.
template <class S>
struct UpdateRowNumbers {
  static constexpr Index most = 64;
  struct Row {
    S decay, step_size, correction2;
  };

  S keep1, take1, keep2, take2, epsilon, scale;
  bool alike;
  Row row[most];

  __device__ const Row& of(Index i) const { return row[alike ? 0 : i]; }
};

template <class S>
struct AdamWRows {
  MatrixView<S> p;
  MatrixView<const S> g;
  MatrixView<S> m, v;
  UpdateRowNumbers<S> numbers;
  __device__ void operator()(Index i, Index j) const {
    const auto& n = numbers;
    const auto& r = n.of(i);
    const S gradient = read(g, i, j) * n.scale;
    const S first = n.keep1 * read(m, i, j) + n.take1 * gradient;
    const S second = n.keep2 * read(v, i, j) + n.take2 * gradient * gradient;
    write(m, i, j, first);
    write(v, i, j, second);
    write(p, i, j, read(p, i, j) * r.decay - r.step_size * (first / (std::sqrt(second) / r.correction2 + n.epsilon)));
  }
};

template <class S>
struct LionRows {
  MatrixView<S> p;
  MatrixView<const S> g;
  MatrixView<S> m;
  UpdateRowNumbers<S> numbers;
  __device__ void operator()(Index i, Index j) const {
    const auto& n = numbers;
    const auto& r = n.of(i);
    const S gradient = read(g, i, j) * n.scale, moment = read(m, i, j);
    const S c = n.keep1 * moment + n.take1 * gradient;
    write(m, i, j, n.keep2 * moment + n.take2 * gradient);
    const S sign = c > 0 ? S{1} : (c < 0 ? S{-1} : S{});
    write(p, i, j, read(p, i, j) * r.decay - sign * r.step_size);
  }
};

}  // namespace device

#if !defined(QDYLORA_DEVICE_ONLY)
namespace detail {

template <class T>
void fill(const CudaContext& context, MatrixView<T> y, T value) {
  for_each(context, y.rows, y.cols, device::Fill<T>{y, value});
}

template <class X, class Y>
void convert(const CudaContext& context, MatrixView<const X> x, MatrixView<Y> y) {
  expect_shape("copy: target", y, x.rows, x.cols);
  for_each_neighbours(context, y.rows, y.cols, device::Convert<X, Y>{x, y}, x, y);
}

template <class T>
void add(const CudaContext& context, MatrixView<const T> x, MatrixView<T> y) {
  expect_shape("add: x", x, y.rows, y.cols);
  for_each_neighbours(context, y.rows, y.cols, device::Add<T, T>{x, y}, x, y);
}

template <class T>
void add_row(const CudaContext& context, MatrixView<const Accumulator<T>> row, MatrixView<T> y) {
  expect_shape("add_row: row", row, 1, y.cols);
  for_each_neighbours(context, y.rows, y.cols, device::AddRow<T>{row, y}, row, y);
}

template <class S>
void scale_columns(const CudaContext& context, MatrixView<const S> x, std::span<const S> factors, MatrixView<S> y) {
  expect_factors(factors, x.cols);
  expect_shape("scale_columns: y", y, x.rows, x.cols);
  Scratch scratch(context);
  for_each(context, y.rows, y.cols, device::ScaleColumns<S>{x, listed(context, scratch, factors), y});
}

template <class T>
void dropout(const CudaContext& context, MatrixView<const T> x, float probability, DropoutKey key, MatrixView<T> y, Update update) {
  using S = Accumulator<T>;
  expect_shape("dropout: y", y, x.rows, x.cols);
  expect_dropout(probability);
  QDYLORA_EXPECTS(probability == 0.0f || !context.recording(), unsupported,
                  "dropout: a graph would have the masks of the step it was recorded in, whenever it is launched");
  const S keep_scale = S{1} / (S{1} - static_cast<S>(probability));
  for_each_neighbours(context, y.rows, y.cols, device::Dropout<T>{x, y, key, dropout_threshold(probability), keep_scale, update}, x, y);
}

/// f(begin, count, numbers) for all rows of an update, so many at once as a launch can tell apart.
template <class S, class Update, class F>
void for_row_numbers(Index rows, const Update& update, const F& f) {
  using Numbers = device::UpdateRowNumbers<S>;
  const bool alike = rows_alike(update);
  for (Index begin = 0; begin < rows;) {
    const Index count = alike ? rows : std::min(Numbers::most, rows - begin);
    const UpdateRow<S> all = update_row<S>(update, begin);
    Numbers numbers{all.keep1, all.take1, all.keep2, all.take2, all.epsilon, all.gradient_scale, alike, {}};
    for (Index i = 0; i < (alike ? 1 : count); ++i) {
      const UpdateRow<S> row = update_row<S>(update, begin + i);
      numbers.row[i] = {row.decay, row.step_size, row.correction2};
    }
    f(begin, count, numbers);
    begin += count;
  }
}

template <class S>
void adamw(const CudaContext& context, MatrixView<S> p, MatrixView<const S> g, MatrixView<S> m, MatrixView<S> v,
           const AdamWUpdate& update) {
  expect_adamw(p, g, m, v, update);
  for_row_numbers<S>(p.rows, update, [&](Index begin, Index count, const device::UpdateRowNumbers<S>& numbers) {
    for_each(context, count, p.cols,
             device::AdamWRows<S>{p.middle_rows(begin, count), g.middle_rows(begin, count), m.middle_rows(begin, count),
                                  v.middle_rows(begin, count), numbers});
  });
}

template <class S>
void lion(const CudaContext& context, MatrixView<S> p, MatrixView<const S> g, MatrixView<S> m, const LionUpdate& update) {
  expect_lion(p, g, m, update);
  for_row_numbers<S>(p.rows, update, [&](Index begin, Index count, const device::UpdateRowNumbers<S>& numbers) {
    for_each(context, count, p.cols,
             device::LionRows<S>{p.middle_rows(begin, count), g.middle_rows(begin, count), m.middle_rows(begin, count), numbers});
  });
}

}  // namespace detail
#endif
}  // namespace qdylora
