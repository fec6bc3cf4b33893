// Elementwise operations, embedding lookup and the optimizer's arithmetic on the CPU. Statistics and intermediate values are kept in
// Accumulator<T>; results are rounded once.
#pragma once

#include <cmath>
#include <type_traits>

#include <qdylora/backend_checks.hpp>
#include <qdylora/cpu/run.hpp>

namespace qdylora::detail {

template <class X, class Y>
void convert(const CpuRun& run, MatrixView<const X> x, MatrixView<Y> y) {
  expect_shape("copy: target", y, x.rows, x.cols);
  run.parallel_ranges(x.rows, row_grain(x.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) convert_row(run, x.cols, x.row(i), y.row(i));
  });
}

template <class T>
void add(const CpuRun& run, MatrixView<const T> x, MatrixView<T> y) {
  using S = Accumulator<T>;
  expect_shape("add: x", x, y.rows, y.cols);
  run.parallel_ranges(y.rows, row_grain(y.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i)
      write_row<S, 2>(run, y, i, Update::accumulate, [&](S* sum) { run.kernels<S>().add(y.cols, row_as<S, 3>(run, x, i), sum); });
  });
}

template <class S, class T>
void add_row(const CpuRun& run, MatrixView<const S> row, MatrixView<T> y) {
  expect_shape("add_row: row", row, 1, y.cols);
  run.parallel_ranges(y.rows, row_grain(y.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i)
      write_row<S, 2>(run, y, i, Update::accumulate, [&](S* sum) { run.kernels<S>().add(y.cols, row.data, sum); });
  });
}

template <class S, class T>
void scale_columns(const CpuRun& run, MatrixView<const T> x, std::span<const S> factors, MatrixView<T> y) {
  expect_factors(factors, x.cols);
  expect_shape("scale_columns: y", y, x.rows, x.cols);
  run.parallel_ranges(y.rows, row_grain(y.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i)
      write_row<S, 2>(run, y, i, Update::overwrite,
                      [&](S* out) { run.kernels<S>().multiply(x.cols, row_as<S, 3>(run, x, i), factors.data(), out); });
  });
}

template <class S, class T>
void column_products(const CpuRun& run, MatrixView<const T> a, MatrixView<const T> b, MatrixView<S> sums) {
  expect_shape("column_products: second", b, a.rows, a.cols);
  expect_shape("column_products: sums", sums, 1, a.cols);
  run.parallel_ranges(a.cols, row_grain(a.rows), [&](Index begin, Index end) {
    for (Index i = 0; i < a.rows; ++i)
      for (Index j = begin; j < end; ++j) sums(0, j) += static_cast<S>(a(i, j)) * static_cast<S>(b(i, j));
  });
}

template <class T>
void dropout(const CpuRun& run, MatrixView<const T> x, float probability, DropoutKey key, MatrixView<T> y, Update update) {
  using S = Accumulator<T>;
  expect_shape("dropout: y", y, x.rows, x.cols);
  expect_dropout(probability);
  const S keep_scale = S{1} / (S{1} - static_cast<S>(probability));
  const auto threshold = dropout_threshold(probability);
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
      write_row<S, 2>(run, y, i, Update::overwrite, [&](S* out) {
        run.kernels<S>().swiglu(y.cols, row_as<S, 3>(run, gate, i), row_as<S, 4>(run, up, i), out);
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
      const S *d = row_as<S, 2>(run, dy, i), *g = row_as<S, 3>(run, gate, i), *u = row_as<S, 4>(run, up, i);
      write_row<S, 5>(run, dgate, i, Update::overwrite, [&](S* dg) {
        write_row<S, 6>(run, dup, i, Update::overwrite, [&](S* du) { run.kernels<S>().swiglu_backward(dy.cols, d, g, u, dg, du); });
      });
    }
  });
}

template <class T>
void gelu(const CpuRun& run, MatrixView<const T> x, MatrixView<T> y) {
  using S = Accumulator<T>;
  expect_shape("gelu: y", y, x.rows, x.cols);
  run.parallel_ranges(x.rows, row_grain(x.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i)
      write_row<S, 2>(run, y, i, Update::overwrite, [&](S* out) { run.kernels<S>().gelu(x.cols, row_as<S, 3>(run, x, i), out); });
  });
}

template <class T>
void gelu_backward(const CpuRun& run, MatrixView<const T> dy, MatrixView<const T> x, MatrixView<T> dx) {
  using S = Accumulator<T>;
  expect_shape("gelu_backward: x", x, dy.rows, dy.cols);
  expect_shape("gelu_backward: dx", dx, dy.rows, dy.cols);
  run.parallel_ranges(x.rows, row_grain(x.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i)
      write_row<S, 2>(run, dx, i, Update::overwrite, [&](S* out) {
        run.kernels<S>().gelu_backward(x.cols, row_as<S, 3>(run, dy, i), row_as<S, 4>(run, x, i), out);
      });
  });
}

/// Rows of a dense table, or of a quantized one.
template <class T, class Table>
void embed(const CpuRun& run, std::span<const std::int32_t> ids, const Table& table, MatrixView<T> y) {
  expect_embed(ids, table, y);
  run.parallel_ranges(y.rows, row_grain(y.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      const Index id = ids[static_cast<std::size_t>(i)];
      if constexpr (requires { table.codes; })
        write_row<float, 2>(run, y, i, Update::overwrite,
                            [&](float* row) { run.codes().decode(coded(table), id * table.cols, table.cols, row); });
      else
        for (Index j = 0; j < y.cols; ++j) y(i, j) = static_cast<T>(table(id, j));
    }
  });
}

/// Each thread has columns of its own, since tokens share rows.
template <class T, class S>
void embed_backward(const CpuRun& run, std::span<const std::int32_t> ids, MatrixView<const T> dy, MatrixView<S> gradient) {
  expect_embed(ids, gradient, dy);
  run.parallel_ranges(dy.cols, row_grain(dy.rows), [&](Index begin, Index end) {
    for (Index i = 0; i < dy.rows; ++i) {
      S* row = gradient.row(ids[static_cast<std::size_t>(i)]);
      for (Index j = begin; j < end; ++j) row[j] += static_cast<S>(dy(i, j));
    }
  });
}

template <class T>
void gather_rows(const CpuRun& run, MatrixView<const T> x, std::span<const Index> rows, MatrixView<T> y) {
  expect_rows("gather_rows", "gather_rows: y", y, rows, x);
  run.parallel_ranges(y.rows, row_grain(y.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) std::copy_n(x.row(rows[static_cast<std::size_t>(i)]), x.cols, y.row(i));
  });
}

template <class T>
void scatter_rows(const CpuRun&, MatrixView<const T> x, std::span<const Index> rows, MatrixView<T> y) {
  expect_rows("scatter_rows", "scatter_rows: x", x, rows, y);
  for (Index i = 0; i < y.rows; ++i) std::fill_n(y.row(i), y.cols, T{});
  for (Index i = 0; i < x.rows; ++i) std::copy_n(x.row(i), x.cols, y.row(rows[static_cast<std::size_t>(i)]));
}

template <class T>
void copy_rows(const CpuRun&, MatrixView<const T> x, std::span<const MatrixView<T>> targets) {
  expect_copy_rows(x, targets);
  for (Index i = 0; i < x.rows; ++i) std::copy_n(x.row(i), x.cols, targets[static_cast<std::size_t>(i)].data);
}

template <class S>
void adamw(const CpuRun& run, MatrixView<S> p, MatrixView<const S> g, MatrixView<S> m, MatrixView<S> v, const AdamWUpdate& update) {
  expect_adamw(p, g, m, v, update);
  run.parallel_ranges(p.rows, row_grain(p.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i)
      run.kernels<S>().adamw(p.cols, update_row<S>(update, i), p.row(i), g.row(i), m.row(i), v.row(i));
  });
}

/// Products and sums are rounded as written, so that codes are the same on every backend.
inline void adamw(const CpuRun& run, MatrixView<float> p, MatrixView<const float> g, const Moments8View& moments,
                  const AdamWUpdate& update) {
  expect_adamw(p, g, moments, update);
  constexpr Index size = Moments8View::block_size;
  run.parallel_ranges(p.rows, row_grain(p.cols), [&](Index begin, Index end) {
    float first[size], second[size];
    for (Index i = begin; i < end; ++i) {
      const UpdateRow<float> row = update_row<float>(update, i);
      const float take1 = 1.0f - row.keep1, take2 = 1.0f - row.keep2;
      for (Index b = 0; b < moments.m_absmax.cols; ++b) {
        const Index at = b * size, count = std::min(size, p.cols - at);
        float *values = p.row(i) + at, &m_absmax = moments.m_absmax(i, b), &v_absmax = moments.v_absmax(i, b);
        const float* gradient = g.row(i) + at;
        std::uint8_t *m = moments.m.row(i) + at, *v = moments.v.row(i) + at;
        float first_max = 0.0f, second_max = 0.0f;
        for (Index j = 0; j < count; ++j) {
          const float d = gradient[j] * row.gradient_scale;
          first[j] = rounded(row.keep1 * rounded(DynamicMap8::values[m[j]] * m_absmax)) + rounded(take1 * d);
          second[j] = rounded(row.keep2 * rounded(DynamicMapU8::values[v[j]] * v_absmax)) + rounded(rounded(take2 * d) * d);
          first_max = std::max(first_max, std::fabs(first[j]));
          second_max = std::max(second_max, second[j]);
          values[j] = values[j] * row.decay - row.step_size * (first[j] / (std::sqrt(second[j]) / row.correction2 + row.epsilon));
        }
        m_absmax = first_max;
        v_absmax = second_max;
        for (Index j = 0; j < count; ++j) {
          m[j] = first_moment_code(first[j], first_max, DynamicMap8::values.data());
          v[j] = second_moment_code(second[j], second_max, DynamicMapU8::values.data());
        }
      }
    }
  });
}

template <class S>
void lion(const CpuRun& run, MatrixView<S> p, MatrixView<const S> g, MatrixView<S> m, const LionUpdate& update) {
  expect_lion(p, g, m, update);
  run.parallel_ranges(p.rows, row_grain(p.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) run.kernels<S>().lion(p.cols, update_row<S>(update, i), p.row(i), g.row(i), m.row(i));
  });
}

template <class S>
double sum_squares(const CpuRun& run, MatrixView<const S> x) {
  const Index grain = row_grain(x.cols);
  std::vector<double> partial(static_cast<std::size_t>(div_up(x.rows, grain)));
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
