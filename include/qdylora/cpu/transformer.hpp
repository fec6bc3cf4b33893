// Normalization, rotary embedding, attention and cross-entropy on the CPU.
#pragma once

#include <cmath>
#include <vector>

#include <qdylora/backend_checks.hpp>
#include <qdylora/cpu/run.hpp>

namespace qdylora::detail {

template <class T, class S>
void rms_norm(const CpuRun& run, MatrixView<const T> x, MatrixView<const S> weight, float epsilon, MatrixView<T> y, MatrixView<S> inverse) {
  expect_shape("rms_norm: weight", weight, 1, x.cols);
  expect_shape("rms_norm: y", y, x.rows, x.cols);
  expect_shape("rms_norm: inverse rms", inverse, x.rows, 1);
  run.parallel_ranges(x.rows, row_grain(x.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      const S* row = row_as<S, 2>(run, x, i);
      const double mean = run.kernels<S>().squares(x.cols, row) / static_cast<double>(x.cols);
      const S r = static_cast<S>(1.0 / std::sqrt(mean + static_cast<double>(epsilon)));
      inverse(i, 0) = r;
      write_row<S, 3>(run, y, i, Update::overwrite, [&](S* out) { run.kernels<S>().normalize(x.cols, row, r, weight.data, out); });
    }
  });
}

template <class T, class S>
void rms_norm_backward(const CpuRun& run, MatrixView<const T> dy, MatrixView<const T> x, MatrixView<const S> weight,
                       MatrixView<const S> inverse, MatrixView<T> dx, Update update) {
  expect_shape("rms_norm_backward: x", x, dy.rows, dy.cols);
  expect_shape("rms_norm_backward: weight", weight, 1, x.cols);
  expect_shape("rms_norm_backward: inverse rms", inverse, x.rows, 1);
  expect_shape("rms_norm_backward: dx", dx, x.rows, x.cols);
  run.parallel_ranges(x.rows, row_grain(x.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      const S r = inverse(i, 0);
      const S *d = row_as<S, 2>(run, dy, i), *row = row_as<S, 3>(run, x, i);
      const double products = run.kernels<S>().triple_products(x.cols, d, weight.data, row);
      const S mean = static_cast<S>(products / static_cast<double>(x.cols)) * r * r;
      write_row<S, 4>(run, dx, i, update, [&](S* out) {
        run.kernels<S>().normalize_backward(x.cols, d, row, weight.data, r, mean, out, update == Update::accumulate);
      });
    }
  });
}

template <class T, class S>
void layer_norm(const CpuRun& run, MatrixView<const T> x, MatrixView<const S> weight, MatrixView<const S> bias, float epsilon,
                MatrixView<T> y, MatrixView<S> moments) {
  expect_layer_norm(x, weight, bias, y, moments);
  run.parallel_ranges(x.rows, row_grain(x.cols), [&](Index begin, Index end) {
    const auto count = static_cast<double>(x.cols);
    for (Index i = begin; i < end; ++i) {
      const S* row = row_as<S, 2>(run, x, i);
      double sum = 0.0, squares = 0.0;
      for (Index j = 0; j < x.cols; ++j) sum += static_cast<double>(row[j]);
      const double mean = sum / count;
      for (Index j = 0; j < x.cols; ++j) squares += (static_cast<double>(row[j]) - mean) * (static_cast<double>(row[j]) - mean);
      const S m = moments(i, 0) = static_cast<S>(mean);
      const S r = moments(i, 1) = static_cast<S>(1.0 / std::sqrt(squares / count + static_cast<double>(epsilon)));
      write_row<S, 3>(run, y, i, Update::overwrite, [&](S* out) {
        for (Index j = 0; j < x.cols; ++j) out[j] = (row[j] - m) * r * weight(0, j) + bias(0, j);
      });
    }
  });
}

template <class T, class S>
void layer_norm_backward(const CpuRun& run, MatrixView<const T> dy, MatrixView<const T> x, MatrixView<const S> weight,
                         MatrixView<const S> moments, MatrixView<T> dx, Update update) {
  expect_layer_norm_backward(dy, x, weight, moments, dx);
  run.parallel_ranges(x.rows, row_grain(x.cols), [&](Index begin, Index end) {
    const auto count = static_cast<double>(x.cols);
    for (Index i = begin; i < end; ++i) {
      const S m = moments(i, 0), r = moments(i, 1);
      const S *d = row_as<S, 2>(run, dy, i), *row = row_as<S, 3>(run, x, i);
      double sum = 0.0, dot = 0.0;
      for (Index j = 0; j < x.cols; ++j) {
        const auto dw = static_cast<double>(d[j] * weight(0, j));
        sum += dw;
        dot += dw * static_cast<double>(row[j] - m);
      }
      const S mean = static_cast<S>(sum / count), slope = static_cast<S>(dot / count) * r * r;
      write_row<S, 4>(run, dx, i, update, [&](S* out) {
        for (Index j = 0; j < x.cols; ++j) {
          const S value = r * (d[j] * weight(0, j) - mean - (row[j] - m) * slope);
          out[j] = update == Update::accumulate ? out[j] + value : value;
        }
      });
    }
  });
}

template <class T, class S>
void rope(const CpuRun& run, MatrixView<T> x, std::span<const std::int32_t> positions, MatrixView<const S> table, RopeLayout layout,
          int direction) {
  expect_rope(x, positions, table);
  const Index head_dim = table.cols;
  const Index half = head_dim / 2;
  const Index step = layout == RopeLayout::interleaved ? 2 : 1;
  const Index partner = layout == RopeLayout::interleaved ? 1 : half;
  run.parallel_ranges(x.rows, row_grain(x.cols), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t) {
      const S* angles = table.row(positions[static_cast<std::size_t>(t)]);
      for (Index head = 0; head < x.cols; head += head_dim) {
        T* values = x.row(t) + head;
        for (Index i = 0; i < half; ++i) {
          const S c = angles[2 * i];
          const S s = direction >= 0 ? angles[2 * i + 1] : -angles[2 * i + 1];
          const S a = static_cast<S>(values[i * step]);
          const S b = static_cast<S>(values[i * step + partner]);
          values[i * step] = static_cast<T>(a * c - b * s);
          values[i * step + partner] = static_cast<T>(a * s + b * c);
        }
      }
    }
  });
}

// Attention: scores are made block by block of queries and never stored; the backward pass makes them again from the log-sum-exp.

inline constexpr Index query_block = 64;

// The columns of one head, rows [row, row + rows), as S.
template <class S, int Slot, class T>
MatrixView<const S> head_part(MatrixView<const T> x, Index row, Index rows, Index head, Index head_dim) {
  const MatrixView<const T> part{x.data + row * x.stride + head * head_dim, rows, head_dim, x.stride};
  if constexpr (std::is_same_v<S, T>) {
    return part;
  } else {
    const MatrixView<S> out{scratch<S, Slot>(rows * head_dim), rows, head_dim};
    for (Index i = 0; i < rows; ++i)
      for (Index j = 0; j < head_dim; ++j) out(i, j) = static_cast<S>(part(i, j));
    return out;
  }
}

struct QueryBlock {
  Index sequence, head, begin, end;  // query rows [begin, end) of the sequence
};

inline std::vector<QueryBlock> query_blocks(std::span<const Index> offsets, Index heads) {
  std::vector<QueryBlock> blocks;
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s)
    for (Index head = 0; head < heads; ++head)
      for (Index begin = 0; begin < offsets[s + 1] - offsets[s]; begin += query_block)
        blocks.push_back({static_cast<Index>(s), head, begin, std::min(offsets[s + 1] - offsets[s], begin + query_block)});
  return blocks;
}

template <class T, class S>
void attention(const CpuRun& run, MatrixView<const T> q, MatrixView<const T> k, MatrixView<const T> v, std::span<const Index> offsets,
               HeadShape shape, MatrixView<T> y, MatrixView<S> lse) {
  expect_attention(q, k, v, offsets, shape, y, lse);
  const auto blocks = query_blocks(offsets, shape.heads);
  const auto& kernels = run.kernels<S>();
  const Index d = shape.head_dim;
  const S scale = S{1} / std::sqrt(static_cast<S>(d));
  run.parallel_for(static_cast<Index>(blocks.size()), [&](Index task) {
    const auto& block = blocks[static_cast<std::size_t>(task)];
    const Index start = offsets[static_cast<std::size_t>(block.sequence)];
    const Index kv_head = block.head / (shape.heads / shape.kv_heads);
    const Index rows = block.end - block.begin;
    const Index keys = block.end;
    const auto qs = head_part<S, 2>(q, start + block.begin, rows, block.head, d);
    const auto ks = head_part<S, 3>(k, start, keys, kv_head, d);
    const auto vs = head_part<S, 4>(v, start, keys, kv_head, d);
    const Index kt_row = rounded_up(keys, 16);
    S* kt = scratch<S, 5>(kt_row * d);
    kernels.transpose(keys, d, ks.data, ks.stride, kt, kt_row);
    S* p = scratch<S, 6>(rows * keys);
    kernels.gemm(rows, keys, d, qs.data, qs.stride, 1, kt, kt_row, p, keys, false);
    for (Index i = 0; i < rows; ++i) {
      S* row = p + i * keys;
      const Index visible = block.begin + i + 1;
      const S shift = kernels.largest(visible, row) * scale;
      const S sum = kernels.exp_sum(visible, row, scale, shift);
      std::fill(row + visible, row + keys, S{});
      kernels.scale(visible, S{1} / sum, row);
      lse(start + block.begin + i, block.head) = shift + std::log(sum);
    }
    MatrixView<T> out{y.row(start + block.begin) + block.head * d, rows, d, y.stride};
    if constexpr (std::is_same_v<S, T>) {
      kernels.gemm(rows, d, keys, p, keys, 1, vs.data, vs.stride, out.data, out.stride, false);
    } else {
      S* result = scratch<S, 7>(rows * d);
      kernels.gemm(rows, d, keys, p, keys, 1, vs.data, vs.stride, result, d, false);
      for (Index i = 0; i < rows; ++i)
        for (Index j = 0; j < d; ++j) out(i, j) = static_cast<T>(result[i * d + j]);
    }
  });
}

template <class T, class S>
void attention_backward(const CpuRun& run, MatrixView<const T> dy, MatrixView<const T> q, MatrixView<const T> k, MatrixView<const T> v,
                        MatrixView<const T> y, MatrixView<const S> lse, std::span<const Index> offsets, HeadShape shape, MatrixView<T> dq,
                        MatrixView<T> dk, MatrixView<T> dv) {
  expect_attention_backward(dy, q, k, v, y, lse, offsets, shape, dq, dk, dv);
  const auto& kernels = run.kernels<S>();
  const Index d = shape.head_dim;
  const Index group = shape.heads / shape.kv_heads;
  const S scale = S{1} / std::sqrt(static_cast<S>(d));
  // Query heads that share a key-value head work apart and are summed at the end, in order.
  Matrix<S> dk_heads(k.rows, shape.heads * d), dv_heads(k.rows, shape.heads * d);
  const Index sequences = static_cast<Index>(offsets.size()) - 1;
  run.parallel_for(sequences * shape.heads, [&](Index task) {
    const Index head = task % shape.heads;
    const Index start = offsets[static_cast<std::size_t>(task / shape.heads)];
    const Index length = offsets[static_cast<std::size_t>(task / shape.heads) + 1] - start;
    const auto ks = head_part<S, 3>(k, start, length, head / group, d);
    const auto vs = head_part<S, 4>(v, start, length, head / group, d);
    const Index turned_row = rounded_up(length, 16);
    S* kt = scratch<S, 5>(2 * turned_row * d);
    S* vt = kt + turned_row * d;
    kernels.transpose(length, d, ks.data, ks.stride, kt, turned_row);
    kernels.transpose(length, d, vs.data, vs.stride, vt, turned_row);
    const MatrixView<S> dks = dk_heads.view().middle_rows(start, length).middle_cols(head * d, d);
    const MatrixView<S> dvs = dv_heads.view().middle_rows(start, length).middle_cols(head * d, d);
    for (Index begin = 0; begin < length; begin += query_block) {
      const Index rows = std::min(query_block, length - begin);
      const Index keys = begin + rows;
      const auto qs = head_part<S, 2>(q, start + begin, rows, head, d);
      const auto dys = head_part<S, 7>(dy, start + begin, rows, head, d);
      S* p = scratch<S, 6>(2 * rows * keys);
      S* dp = p + rows * keys;
      kernels.gemm(rows, keys, d, qs.data, qs.stride, 1, kt, turned_row, p, keys, false);
      kernels.gemm(rows, keys, d, dys.data, dys.stride, 1, vt, turned_row, dp, keys, false);
      for (Index i = 0; i < rows; ++i) {
        const Index t = start + begin + i;
        const Index visible = begin + i + 1;
        S* pi = p + i * keys;
        S* dpi = dp + i * keys;
        kernels.exp_sum(visible, pi, scale, lse(t, head));
        std::fill(pi + visible, pi + keys, S{});
        const S delta = kernels.dot(d, dys.row(i), row_as<S, 9>(run, y.middle_cols(head * d, d), t));
        kernels.softmax_backward(visible, pi, delta, scale, dpi);
        std::fill(dpi + visible, dpi + keys, S{});
      }
      kernels.gemm(keys, d, rows, p, 1, keys, dys.data, dys.stride, dvs.data, dvs.stride, true);
      kernels.gemm(keys, d, rows, dp, 1, keys, qs.data, qs.stride, dks.data, dks.stride, true);
      S* result = scratch<S, 8>(rows * d);
      kernels.gemm(rows, d, keys, dp, keys, 1, ks.data, ks.stride, result, d, false);
      for (Index i = 0; i < rows; ++i)
        for (Index j = 0; j < d; ++j) dq(start + begin + i, head * d + j) = static_cast<T>(result[i * d + j]);
    }
  });
  run.parallel_ranges(k.rows, row_grain(2 * q.cols), [&](Index begin, Index end) {
    for (Index t = begin; t < end; ++t)
      for (Index j = 0; j < k.cols; ++j) {
        S sum_k{}, sum_v{};
        for (Index g = 0; g < group; ++g) {
          const Index col = (j / d * group + g) * d + j % d;
          sum_k += dk_heads(t, col);
          sum_v += dv_heads(t, col);
        }
        dk(t, j) = static_cast<T>(sum_k);
        dv(t, j) = static_cast<T>(sum_v);
      }
  });
}

template <class T>
void attention_decode(const CpuRun& run, MatrixView<const T> q, std::span<const MatrixView<const T>> keys,
                      std::span<const MatrixView<const T>> values, HeadShape shape, MatrixView<T> y) {
  using S = Accumulator<T>;
  const auto sequences = static_cast<Index>(keys.size());
  expect_attention_decode(q, keys, values, shape, y);
  const auto& kernels = run.kernels<S>();
  const Index d = shape.head_dim;
  const Index group = shape.heads / shape.kv_heads;
  const S scale = S{1} / std::sqrt(static_cast<S>(d));
  run.parallel_for(sequences * shape.heads, [&](Index task) {
    const Index s = task / shape.heads;
    const Index head = task % shape.heads;
    const auto& cache_k = keys[static_cast<std::size_t>(s)];
    const auto& cache_v = values[static_cast<std::size_t>(s)];
    const Index length = cache_k.rows;
    const auto qs = head_part<S, 2>(q, s, 1, head, d);
    const auto ks = head_part<S, 3>(cache_k, 0, length, head / group, d);
    const auto vs = head_part<S, 4>(cache_v, 0, length, head / group, d);
    S* p = scratch<S, 6>(length);
    for (Index j = 0; j < length; ++j) p[j] = kernels.dot(d, qs.data, ks.row(j));
    const S shift = kernels.largest(length, p) * scale;
    const S sum = kernels.exp_sum(length, p, scale, shift);
    kernels.scale(length, S{1} / sum, p);
    S* result = scratch<S, 7>(d);
    kernels.gemm(1, d, length, p, length, 1, vs.data, vs.stride, result, d, false);
    for (Index j = 0; j < d; ++j) y(s, head * d + j) = static_cast<T>(result[j]);
  });
}

template <class S>
void cross_entropy(const CpuRun& run, MatrixView<S> logits, std::span<const std::int32_t> targets, double scale, MatrixView<S> losses) {
  expect_cross_entropy(logits, targets, losses);
  run.parallel_for(logits.rows, [&](Index i) {
    S* row = logits.row(i);
    const auto target = targets[static_cast<std::size_t>(i)];
    if (target < 0) {
      losses(i, 0) = S{};
      std::fill_n(row, logits.cols, S{});
      return;
    }
    const S chosen = row[target];
    const auto& kernels = run.kernels<S>();
    const S shift = kernels.largest(logits.cols, row);
    const S sum = kernels.exp_sum(logits.cols, row, S{1}, shift);
    losses(i, 0) = shift - chosen + std::log(sum);
    kernels.scale(logits.cols, static_cast<S>(scale) / sum, row);
    row[target] -= static_cast<S>(scale);
  });
}

}  // namespace qdylora::detail
