// Elementwise operations and the optimizer's arithmetic on the device. Values are computed in Accumulator<T> and rounded once.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>

#include <qdylora/backend.hpp>
#include <qdylora/cuda/for_each.cuh>

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
  __device__ void operator()(Index i, Index j) const { assign(x, i, y, i, j); }
};

template <class T>
struct Add {
  MatrixView<const T> x;
  MatrixView<T> y;
  __device__ void operator()(Index i, Index j) const { write(y, i, j, read(y, i, j) + read(x, i, j)); }
};

template <class T>
struct AddRow {
  MatrixView<const Accumulator<T>> row;
  MatrixView<T> y;
  __device__ void operator()(Index i, Index j) const { write(y, i, j, read(y, i, j) + read(row, 0, j)); }
};

template <class S>
struct ScaleColumns {
  MatrixView<const S> x, factors;
  MatrixView<S> y;
  __device__ void operator()(Index i, Index j) const { write(y, i, j, read(x, i, j) * read(factors, 0, j)); }
};

template <class T>
struct Dropout {
  MatrixView<const T> x;
  MatrixView<T> y;
  DropoutKey key;
  std::uint64_t threshold;
  Accumulator<T> keep_scale;
  Update update;
  __device__ void operator()(Index i, Index j) const {
    const auto element = static_cast<std::uint64_t>((key.first_row + i) * x.cols + j);
    const bool keep = random_word(key.seed, Purpose::dropout, key.layer, key.step, element) >= threshold;
    const Accumulator<T> value = keep ? read(x, i, j) * keep_scale : Accumulator<T>{};
    write(y, i, j, update == Update::accumulate ? read(y, i, j) + value : value);
  }
};

/// Rows [first_row, first_row + rows) of one AdamW update; what differs between rows comes with the launch.
template <class S>
struct AdamWRows {
  static constexpr Index most = 64;
  struct Row {
    S decay, step_size, correction2;
  };

  MatrixView<S> p;
  MatrixView<const S> g;
  MatrixView<S> m, v;
  S keep1, take1, keep2, take2, epsilon, scale;
  bool alike;  // all rows have the numbers of the first
  Row row[most];
  __device__ void operator()(Index i, Index j) const {
    const Row& r = row[alike ? 0 : i];
    const S gradient = read(g, i, j) * scale;
    const S first = keep1 * read(m, i, j) + take1 * gradient;
    const S second = keep2 * read(v, i, j) + take2 * gradient * gradient;
    write(m, i, j, first);
    write(v, i, j, second);
    write(p, i, j, read(p, i, j) * r.decay - r.step_size * (first / (std::sqrt(second) / r.correction2 + epsilon)));
  }
};

}  // namespace device

namespace detail {

template <class T>
void fill(const CudaContext& context, MatrixView<T> y, T value) {
  for_each(context, y.rows, y.cols, device::Fill<T>{y, value});
}

template <class X, class Y>
void convert(const CudaContext& context, MatrixView<const X> x, MatrixView<Y> y) {
  expect_shape("copy: target", y, x.rows, x.cols);
  for_each(context, y.rows, y.cols, device::Convert<X, Y>{x, y});
}

template <class T>
void add(const CudaContext& context, MatrixView<const T> x, MatrixView<T> y) {
  expect_shape("add: x", x, y.rows, y.cols);
  for_each(context, y.rows, y.cols, device::Add<T>{x, y});
}

template <class T>
void add_row(const CudaContext& context, MatrixView<const Accumulator<T>> row, MatrixView<T> y) {
  expect_shape("add_row: row", row, 1, y.cols);
  for_each(context, y.rows, y.cols, device::AddRow<T>{row, y});
}

template <class S>
void scale_columns(const CudaContext& context, MatrixView<const S> x, MatrixView<const S> factors, MatrixView<S> y) {
  expect_shape("scale_columns: factors", factors, 1, x.cols);
  expect_shape("scale_columns: y", y, x.rows, x.cols);
  for_each(context, y.rows, y.cols, device::ScaleColumns<S>{x, factors, y});
}

template <class T>
void dropout(const CudaContext& context, MatrixView<const T> x, float probability, DropoutKey key, MatrixView<T> y, Update update) {
  using S = Accumulator<T>;
  expect_shape("dropout: y", y, x.rows, x.cols);
  QDYLORA_EXPECTS(probability >= 0.0f && probability < 1.0f, bad_argument,
                  "dropout: probability " + std::to_string(probability) + " is not in [0, 1)");
  const auto threshold = static_cast<std::uint64_t>(static_cast<double>(probability) * 0x1p32);
  const S keep_scale = S{1} / (S{1} - static_cast<S>(probability));
  for_each(context, y.rows, y.cols, device::Dropout<T>{x, y, key, threshold, keep_scale, update});
}

template <class S>
void adamw(const CudaContext& context, MatrixView<S> p, MatrixView<const S> g, MatrixView<S> m, MatrixView<S> v,
           const AdamWUpdate& update) {
  expect_shape("adamw: gradient", g, p.rows, p.cols);
  expect_shape("adamw: first moment", m, p.rows, p.cols);
  expect_shape("adamw: second moment", v, p.rows, p.cols);
  const auto rows = static_cast<std::size_t>(p.rows);
  QDYLORA_EXPECTS(update.row_lr.empty() || update.row_lr.size() == rows, shape_mismatch, "adamw: row_lr must have one entry a row");
  QDYLORA_EXPECTS(update.row_steps.empty() || update.row_steps.size() == rows, shape_mismatch,
                  "adamw: row_steps must have one entry a row");
  using Kernel = device::AdamWRows<S>;
  const auto numbers = [&](Index i) -> typename Kernel::Row {
    const auto row = static_cast<std::size_t>(i);
    const double lr = update.lr * (update.row_lr.empty() ? 1.0 : static_cast<double>(update.row_lr[row]));
    const auto step = static_cast<double>(update.row_steps.empty() ? update.step : update.row_steps[row]);
    return {static_cast<S>(1.0 - lr * update.weight_decay), static_cast<S>(lr / (1.0 - std::pow(update.beta1, step))),
            static_cast<S>(std::sqrt(1.0 - std::pow(update.beta2, step)))};
  };
  const bool alike = update.row_lr.empty() && update.row_steps.empty();
  for (Index begin = 0; begin < p.rows;) {
    const Index count = alike ? p.rows : std::min(Kernel::most, p.rows - begin);
    Kernel kernel{p.middle_rows(begin, count),
                  g.middle_rows(begin, count),
                  m.middle_rows(begin, count),
                  v.middle_rows(begin, count),
                  static_cast<S>(update.beta1),
                  static_cast<S>(1.0 - update.beta1),
                  static_cast<S>(update.beta2),
                  static_cast<S>(1.0 - update.beta2),
                  static_cast<S>(update.epsilon),
                  static_cast<S>(update.gradient_scale),
                  alike,
                  {}};
    for (Index i = 0; i < (alike ? 1 : count); ++i) kernel.row[i] = numbers(begin + i);
    for_each(context, count, p.cols, kernel);
    begin += count;
  }
}

}  // namespace detail
}  // namespace qdylora
