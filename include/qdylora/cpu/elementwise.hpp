// Elementwise operations, embedding lookup and the optimizer's arithmetic on the CPU. Statistics and intermediate values are kept in
// Accumulator<T>; results are rounded once.
#pragma once

#include <cmath>

#include <qdylora/backend.hpp>
#include <qdylora/cpu/run.hpp>

namespace qdylora::detail {

template <class X, class Y>
void convert(const CpuRun& run, MatrixView<const X> x, MatrixView<Y> y) {
  expect_shape("copy: target", y, x.rows, x.cols);
  run.parallel_ranges(x.rows, row_grain(x.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i)
      for (Index j = 0; j < x.cols; ++j) y(i, j) = static_cast<Y>(x(i, j));
  });
}

template <class T>
void add(const CpuRun& run, MatrixView<const T> x, MatrixView<T> y) {
  using S = Accumulator<T>;
  expect_shape("add: x", x, y.rows, y.cols);
  run.parallel_ranges(y.rows, row_grain(y.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i)
      write_row<S, 2>(y, i, Update::accumulate, [&](S* sum) { run.kernels<S>().add(y.cols, row_as<S, 3>(x, i), sum); });
  });
}

template <class S, class T>
void add_row(const CpuRun& run, MatrixView<const S> row, MatrixView<T> y) {
  expect_shape("add_row: row", row, 1, y.cols);
  run.parallel_ranges(y.rows, row_grain(y.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i)
      write_row<S, 2>(y, i, Update::accumulate, [&](S* sum) { run.kernels<S>().add(y.cols, row.data, sum); });
  });
}

template <class S>
void scale_columns(const CpuRun& run, MatrixView<const S> x, MatrixView<const S> factors, MatrixView<S> y) {
  expect_shape("scale_columns: factors", factors, 1, x.cols);
  expect_shape("scale_columns: y", y, x.rows, x.cols);
  run.parallel_ranges(y.rows, row_grain(y.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) run.kernels<S>().multiply(x.cols, x.row(i), factors.data, y.row(i));
  });
}

template <class S>
void column_products(const CpuRun&, MatrixView<const S> a, MatrixView<const S> b, MatrixView<S> sums) {
  expect_shape("column_products: second", b, a.rows, a.cols);
  expect_shape("column_products: sums", sums, 1, a.cols);
  for (Index i = 0; i < a.rows; ++i)
    for (Index j = 0; j < a.cols; ++j) sums(0, j) += a(i, j) * b(i, j);
}

template <class T>
void dropout(const CpuRun& run, MatrixView<const T> x, float probability, DropoutKey key, MatrixView<T> y, Update update) {
  using S = Accumulator<T>;
  expect_shape("dropout: y", y, x.rows, x.cols);
  QDYLORA_EXPECTS(probability >= 0.0f && probability < 1.0f, bad_argument,
                  "dropout: probability " + std::to_string(probability) + " is not in [0, 1)");
  const S keep_scale = S{1} / (S{1} - static_cast<S>(probability));
  const auto threshold = static_cast<std::uint64_t>(static_cast<double>(probability) * 0x1p32);
  run.parallel_ranges(x.rows, row_grain(x.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i)
      for (Index j = 0; j < x.cols; ++j) {
        const auto element = static_cast<std::uint64_t>((key.first_row + i) * x.cols + j);
        const bool keep = random_word(key.seed, Purpose::dropout, key.layer, key.step, element) >= threshold;
        const S value = keep ? static_cast<S>(x(i, j)) * keep_scale : S{};
        y(i, j) = static_cast<T>(update == Update::accumulate ? static_cast<S>(y(i, j)) + value : value);
      }
  });
}

template <class T>
void swiglu(const CpuRun& run, MatrixView<const T> gate, MatrixView<const T> up, MatrixView<T> y) {
  using S = Accumulator<T>;
  expect_shape("swiglu: up", up, gate.rows, gate.cols);
  expect_shape("swiglu: y", y, gate.rows, gate.cols);
  run.parallel_ranges(y.rows, row_grain(y.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i)
      write_row<S, 2>(y, i, Update::overwrite, [&](S* out) {
        run.kernels<S>().swiglu(y.cols, row_as<S, 3>(gate, i), row_as<S, 4>(up, i), out);
      });
  });
}

template <class T>
void swiglu_backward(const CpuRun& run, MatrixView<const T> dy, MatrixView<const T> gate, MatrixView<const T> up, MatrixView<T> dgate,
                     MatrixView<T> dup) {
  using S = Accumulator<T>;
  expect_shape("swiglu_backward: gate", gate, dy.rows, dy.cols);
  expect_shape("swiglu_backward: up", up, dy.rows, dy.cols);
  expect_shape("swiglu_backward: dgate", dgate, dy.rows, dy.cols);
  expect_shape("swiglu_backward: dup", dup, dy.rows, dy.cols);
  run.parallel_ranges(dy.rows, row_grain(dy.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      const S *d = row_as<S, 2>(dy, i), *g = row_as<S, 3>(gate, i), *u = row_as<S, 4>(up, i);
      write_row<S, 5>(dgate, i, Update::overwrite, [&](S* dg) {
        write_row<S, 6>(dup, i, Update::overwrite, [&](S* du) { run.kernels<S>().swiglu_backward(dy.cols, d, g, u, dg, du); });
      });
    }
  });
}

template <class S>
S normal_cdf(S x) noexcept {
  return S{0.5} * std::erfc(-x * static_cast<S>(0.70710678118654752440));
}

template <class T>
void gelu(const CpuRun& run, MatrixView<const T> x, MatrixView<T> y) {
  using S = Accumulator<T>;
  expect_shape("gelu: y", y, x.rows, x.cols);
  run.parallel_ranges(x.rows, row_grain(x.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i)
      for (Index j = 0; j < x.cols; ++j) {
        const S v = static_cast<S>(x(i, j));
        y(i, j) = static_cast<T>(v * normal_cdf(v));
      }
  });
}

template <class T>
void gelu_backward(const CpuRun& run, MatrixView<const T> dy, MatrixView<const T> x, MatrixView<T> dx) {
  using S = Accumulator<T>;
  expect_shape("gelu_backward: x", x, dy.rows, dy.cols);
  expect_shape("gelu_backward: dx", dx, dy.rows, dy.cols);
  run.parallel_ranges(x.rows, row_grain(x.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i)
      for (Index j = 0; j < x.cols; ++j) {
        const S v = static_cast<S>(x(i, j));
        const S density = static_cast<S>(0.39894228040143267794) * std::exp(S{-0.5} * v * v);
        dx(i, j) = static_cast<T>(static_cast<S>(dy(i, j)) * (normal_cdf(v) + v * density));
      }
  });
}

/// Rows of a dense table, or of a quantized one.
template <class T, class Table>
void embed(const CpuRun& run, std::span<const std::int32_t> ids, const Table& table, MatrixView<T> y) {
  expect_shape("embed: y", y, static_cast<Index>(ids.size()), table.cols);
  for (std::size_t i = 0; i < ids.size(); ++i)
    QDYLORA_EXPECTS(ids[i] >= 0 && ids[i] < table.rows, bad_argument,
                    "embed: token id " + std::to_string(ids[i]) + " at position " + std::to_string(i) + " is outside the table of " +
                        std::to_string(table.rows));
  run.parallel_ranges(y.rows, row_grain(y.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      const Index id = ids[static_cast<std::size_t>(i)];
      if constexpr (requires { table.codes; })
        write_row<float, 2>(y, i, Update::overwrite,
                            [&](float* row) { run.codes().decode(coded(table), id * table.cols, table.cols, row); });
      else
        for (Index j = 0; j < y.cols; ++j) y(i, j) = static_cast<T>(table(id, j));
    }
  });
}

template <class T>
void gather_rows(const CpuRun& run, MatrixView<const T> x, std::span<const Index> rows, MatrixView<T> y) {
  expect_shape("gather_rows: y", y, static_cast<Index>(rows.size()), x.cols);
  for (const Index row : rows)
    QDYLORA_EXPECTS(row >= 0 && row < x.rows, bad_argument,
                    "gather_rows: row " + std::to_string(row) + " is outside " + shape_text(x));
  run.parallel_ranges(y.rows, row_grain(y.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) std::copy_n(x.row(rows[static_cast<std::size_t>(i)]), x.cols, y.row(i));
  });
}

template <class T>
void scatter_rows(const CpuRun&, MatrixView<const T> x, std::span<const Index> rows, MatrixView<T> y) {
  expect_shape("scatter_rows: x", x, static_cast<Index>(rows.size()), y.cols);
  for (Index i = 0; i < y.rows; ++i) std::fill_n(y.row(i), y.cols, T{});
  for (Index i = 0; i < x.rows; ++i) {
    const Index row = rows[static_cast<std::size_t>(i)];
    QDYLORA_EXPECTS(row >= 0 && row < y.rows, bad_argument,
                    "scatter_rows: row " + std::to_string(row) + " is outside " + shape_text(y));
    std::copy_n(x.row(i), x.cols, y.row(row));
  }
}

template <class S>
void adamw(const CpuRun& run, MatrixView<S> p, MatrixView<const S> g, MatrixView<S> m, MatrixView<S> v, const AdamWUpdate& update) {
  expect_shape("adamw: gradient", g, p.rows, p.cols);
  expect_shape("adamw: first moment", m, p.rows, p.cols);
  expect_shape("adamw: second moment", v, p.rows, p.cols);
  const auto rows = static_cast<std::size_t>(p.rows);
  QDYLORA_EXPECTS(update.row_lr.empty() || update.row_lr.size() == rows, shape_mismatch, "adamw: row_lr must have one entry a row");
  QDYLORA_EXPECTS(update.row_steps.empty() || update.row_steps.size() == rows, shape_mismatch,
                  "adamw: row_steps must have one entry a row");
  const auto grain = row_grain(p.cols);
  run.parallel_ranges(p.rows, grain, [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      const auto row = static_cast<std::size_t>(i);
      const double lr = update.lr * (update.row_lr.empty() ? 1.0 : static_cast<double>(update.row_lr[row]));
      const auto step = static_cast<double>(update.row_steps.empty() ? update.step : update.row_steps[row]);
      const AdamWRow<S> a = {.gradient_scale = static_cast<S>(update.gradient_scale),
                             .decay = static_cast<S>(1.0 - lr * update.weight_decay),
                             .keep1 = static_cast<S>(update.beta1),
                             .take1 = static_cast<S>(1.0 - update.beta1),
                             .keep2 = static_cast<S>(update.beta2),
                             .take2 = static_cast<S>(1.0 - update.beta2),
                             .step_size = static_cast<S>(lr / (1.0 - std::pow(update.beta1, step))),
                             .correction2 = static_cast<S>(std::sqrt(1.0 - std::pow(update.beta2, step))),
                             .epsilon = static_cast<S>(update.epsilon)};
      run.kernels<S>().adamw(p.cols, a, p.row(i), g.row(i), m.row(i), v.row(i));
    }
  });
}

template <class S>
double sum_squares(const CpuRun& run, MatrixView<const S> x) {
  const Index grain = row_grain(x.cols);
  std::vector<double> partial(static_cast<std::size_t>((x.rows + grain - 1) / grain));
  run.parallel_ranges(x.rows, grain, [&](Index begin, Index end) {
    double sum = 0.0;
    for (Index i = begin; i < end; ++i) sum += run.kernels<S>().squares(x.cols, x.row(i));
    partial[static_cast<std::size_t>(begin / grain)] = sum;
  });
  double total = 0.0;
  for (const double p : partial) total += p;
  return total;
}

}  // namespace qdylora::detail
