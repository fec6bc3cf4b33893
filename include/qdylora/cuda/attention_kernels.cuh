// The kernels of attention: FlashAttention-2 (Dao 2023). Scores are made tile by tile, in registers, and never stored; the backward pass
// makes them again from their log-sum-exp. Nothing is added atomically: every sum has an order, decided by the shapes, and that
// over the heads of a group by the number of processors and by the workspace as well. Tiles are those of attention_tiles.cuh.
#pragma once

#include <cmath>
#include <limits>

#include <qdylora/cuda/attention_tiles.cuh>
#include <qdylora/cuda/lists.cuh>
#include <qdylora/cuda/reduce.cuh>

namespace qdylora {
namespace device {

/// What a block works on: rows of one sequence from its row `first` on. The sequence has `length` rows, its own row 0 is row `begin`.
struct SequenceTile {
  Index begin;
  int length, first;
};

/// The columns of a head, of `count` rows of x from `begin` on.
template <class T>
__device__ inline MatrixView<T> head_of(const MatrixView<T>& x, Index begin, int count, int head, int head_dim) {
  return {x.row(begin) + head * head_dim, count, head_dim, x.stride};
}
__device__ inline int smaller(int a, int b) { return a < b ? a : b; }

template <class S>
__device__ constexpr S log2_e = static_cast<S>(1.44269504088896340736);

/// What a thread knows of its own rows while it passes over their keys: the largest score, sum_j e^(scale (s_j - largest)) over its own
/// columns, and the sum of values so weighted.
template <class Tiles>
struct OnlineSoftmax {
  using S = typename Tiles::S;

  S largest[Tiles::rows], total[Tiles::rows];
  typename Tiles::Sums sums;

  __device__ OnlineSoftmax() : sums{} {
#pragma unroll
    for (int r = 0; r < Tiles::rows; ++r) {
      largest[r] = -std::numeric_limits<S>::infinity();
      total[r] = S{};
    }
  }

  /// Scores become weights; what was summed before is brought to their scale. A row that sees no key here has seen one before.
  __device__ void weigh(typename Tiles::Scores& s, S scale) {
    const S in_powers_of_two = scale * log2_e<S>;
#pragma unroll
    for (int r = 0; r < Tiles::rows; ++r) {
      S most = largest[r];
#pragma unroll
      for (int c = 0; c < Tiles::columns; ++c) most = s.at(r, c) > most ? s.at(r, c) : most;
#pragma unroll
      for (int bits = Tiles::row_lanes / 2; bits > 0; bits /= 2) {
        const S other = shuffle_xor(most, bits);
        most = other > most ? other : most;
      }
      // Products rounded by themselves: fused into the difference, that of an unchanged largest score would not be 1, tile after tile.
      const S shift = multiply(most, in_powers_of_two);
      const S fading = exp2(multiply(largest[r], in_powers_of_two) - shift);
      largest[r] = most;
      total[r] *= fading;
#pragma unroll
      for (int c = 0; c < Tiles::columns; ++c) {
        const S weight = exp2(s.at(r, c) * in_powers_of_two - shift);
        s.at(r, c) = weight;
        total[r] += weight;
      }
#pragma unroll
      for (int c = 0; c < Tiles::outputs; ++c) sums.at(r, c) *= fading;
    }
  }

  /// The sum over all lanes of row r.
  __device__ S total_of(int r) const {
    S sum = total[r];
#pragma unroll
    for (int bits = Tiles::row_lanes / 2; bits > 0; bits /= 2) sum += shuffle_xor(sum, bits);
    return sum;
  }
};

/// Attention of a tile of queries, q's rows from `first` on, to k's and v's rows; row r of it to those before visible(r), of which there is
/// one among the first `step`. Keys and values take turns: while one is used, the other is on its way.
template <class Tiles, class Visible>
__device__ inline void attend(SharedMemory& memory, const Tiles& tiles, const MatrixView<const typename Tiles::Element>& q, int first,
                              const MatrixView<const typename Tiles::Element>& k, const MatrixView<const typename Tiles::Element>& v,
                              typename Tiles::S scale, const Visible& visible, OnlineSoftmax<Tiles>& softmax) {
  using S = typename Tiles::S;
  auto own = tiles.take_own(memory);
  auto keys = tiles.take_other(memory), values = tiles.take_other(memory);
  tiles.begin_own(own, q, first);
  tiles.begin(keys, k, 0);
  tiles.template arrived<1>();
  const auto queries = tiles.keep(own);
  for (int key = 0; key < static_cast<int>(k.rows); key += Tiles::step) {
    tiles.begin(values, v, key);
    tiles.template arrived<1>();
    auto s = tiles.scores(queries, keys);
    tiles.done();
    tiles.begin(keys, k, key + Tiles::step);
#pragma unroll
    for (int r = 0; r < Tiles::rows; ++r)
      if (const int seen = visible(r) - key; seen < Tiles::step) {
#pragma unroll
        for (int c = 0; c < Tiles::columns; ++c)
          if (Tiles::column(c) >= seen) s.at(r, c) = -std::numeric_limits<S>::infinity();
      }
    softmax.weigh(s, scale);
    tiles.template arrived<1>();
    tiles.accumulate(softmax.sums, s, values);
    tiles.done();
  }
}

/// Block (tile of queries, head).
template <class Tiles>
struct Attention {
  using T = typename Tiles::Element;
  using S = typename Tiles::S;
  static constexpr int threads = Tiles::threads, least_blocks = 1;
  static constexpr int shared_bytes = Tiles::shared_bytes(1, 2);

  MatrixView<const T> q, k, v;
  List<SequenceTile> sequence_tiles;
  int head_dim, group;
  S scale;
  bool aligned;
  MatrixView<T> y;
  MatrixView<S> lse;

  __device__ void operator()(SharedMemory memory) const {
    if constexpr (Tiles::available) {
      const Tiles tiles(memory, head_dim, aligned);
      const SequenceTile at = sequence_tiles[block().x];
      const int head = static_cast<int>(block().y), keys = smaller(at.first + Tiles::own, at.length);
      OnlineSoftmax<Tiles> softmax;
      attend(memory, tiles, head_of(q, at.begin, at.length, head, head_dim), at.first, head_of(k, at.begin, keys, head / group, head_dim),
             head_of(v, at.begin, keys, head / group, head_dim), scale, [&](int r) { return at.first + Tiles::row(r) + 1; }, softmax);
#pragma unroll
      for (int r = 0; r < Tiles::rows; ++r) {
        const S total = softmax.total_of(r);
        const int i = at.first + Tiles::row(r);
        if (i >= at.length) continue;
        tiles.write(y.row(at.begin + i) + head * head_dim, r, softmax.sums, S{1} / total);
        if (Tiles::output(0) == 0) store(lse.row(at.begin + i) + head, softmax.largest[r] * scale + std::log(total));
      }
    }
  }
};

/// delta[head, t] = sum_j dy[t, j] y[t, j] over the columns of a head, and the log-sum-exp in powers of two, both head by head. A warp
/// has one token of one head.
template <class T>
struct AttentionRowTerms {
  using S = Accumulator<T>;
  static constexpr int threads = 128;

  MatrixView<const T> dy, y;
  MatrixView<const S> lse;
  Index head_dim;
  MatrixView<S> delta, shift;  // [heads, tokens]

  __device__ void operator()(SharedMemory) const {
    const Index head = block().y;
    const Index t = static_cast<Index>(block().x) * (threads / warp_size) + warp();
    if (t >= dy.rows) return;
    S sum{};
    for (Index j = lane(); j < head_dim; j += warp_size) sum += read(dy, t, head * head_dim + j) * read(y, t, head * head_dim + j);
    sum = sum_warp(sum);
    if (lane() == 0) {
      write(delta, head, t, sum);
      write(shift, head, t, read(lse, t, head) * log2_e<S>);
    }
  }
};

/// What both halves of the backward pass read.
template <class Tiles>
struct AttentionBackward {
  using T = typename Tiles::Element;
  using S = typename Tiles::S;

  MatrixView<const T> dy, q, k, v;
  MatrixView<const S> delta, shift;  // [heads, tokens]
  List<SequenceTile> sequence_tiles;
  int head_dim, group;
  S scale;
  bool aligned;

  /// The probability of a score, which is not scaled yet.
  __device__ S probability(S score, S row_shift) const { return exp2(score * (scale * log2_e<S>) - row_shift); }
};

/// dq = ds k scale,  ds = p (dp - delta),  p = e^(scale q k^T - lse),  dp = dy v^T. Block (tile of queries, head).
template <class Tiles>
struct AttentionBackwardQ {
  using T = typename Tiles::Element;
  using S = typename Tiles::S;
  static constexpr int threads = Tiles::threads, least_blocks = 1;
  static constexpr int shared_bytes = Tiles::shared_bytes(2, 4);

  AttentionBackward<Tiles> in;
  MatrixView<T> dq;

  __device__ void operator()(SharedMemory memory) const {
    if constexpr (Tiles::available) {
      const Tiles tiles(memory, in.head_dim, in.aligned);
      const SequenceTile at = in.sequence_tiles[block().x];
      const int head = static_cast<int>(block().y), d = in.head_dim;
      const int last = smaller(at.first + Tiles::own, at.length);
      const auto q = head_of(in.q, at.begin, at.length, head, d), dy = head_of(in.dy, at.begin, at.length, head, d);
      const auto k = head_of(in.k, at.begin, last, head / in.group, d), v = head_of(in.v, at.begin, last, head / in.group, d);
      auto queries = tiles.take_own(memory), gradients = tiles.take_own(memory);
      auto keys = tiles.take_other(memory), values = tiles.take_other(memory);
      auto next_keys = tiles.take_other(memory), next_values = tiles.take_other(memory);

      S delta[Tiles::rows], shift[Tiles::rows];
#pragma unroll
      for (int r = 0; r < Tiles::rows; ++r) {
        const int i = at.first + Tiles::row(r);
        delta[r] = i < at.length ? read(in.delta, head, at.begin + i) : S{};
        shift[r] = i < at.length ? read(in.shift, head, at.begin + i) : S{};
      }
      tiles.begin_own(queries, q, at.first);
      tiles.begin_own(gradients, dy, at.first);
      tiles.begin(keys, k, 0);
      tiles.begin(values, v, 0);
      typename Tiles::Sums sums{};
      for (int key = 0; key < last; key += Tiles::step) {
        tiles.begin(next_keys, k, key + Tiles::step);
        tiles.begin(next_values, v, key + Tiles::step);
        tiles.template arrived<2>();
        auto s = tiles.scores(queries, keys);
        auto dp = tiles.scores(gradients, values);
#pragma unroll
        for (int r = 0; r < Tiles::rows; ++r) {
          const int seen = at.first + Tiles::row(r) + 1 - key;
#pragma unroll
          for (int c = 0; c < Tiles::columns; ++c)
            s.at(r, c) = Tiles::column(c) < seen ? in.probability(s.at(r, c), shift[r]) * (dp.at(r, c) - delta[r]) : S{};
        }
        tiles.accumulate(sums, s, keys);
        tiles.done();
        exchange(keys, next_keys);
        exchange(values, next_values);
      }
#pragma unroll
      for (int r = 0; r < Tiles::rows; ++r)
        if (const int i = at.first + Tiles::row(r); i < at.length)
          tiles.write(dq.row(at.begin + i) + head * d, r, sums, in.scale);
    }
  }
};

/// dv = p^T dy,  dk = ds^T q scale, over the query heads that share a key-value head, in order. Block (tile of keys, key-value head, part of
/// its query heads): here the own rows are keys, and scores are transposed.
template <class Tiles>
struct AttentionBackwardKV {
  using T = typename Tiles::Element;
  using S = typename Tiles::S;
  static constexpr int threads = Tiles::threads, least_blocks = 1;
  static constexpr int shared_bytes = Tiles::shared_bytes(2, 4);

  AttentionBackward<Tiles> in;
  MatrixView<T> dk, dv;
  int heads_at_once;  // of a group, in a block
  MatrixView<S> key_parts, value_parts;  // [parts * tokens, kv_heads * head_dim] where there are several, to be added; else dk, dv are written

  __device__ void operator()(SharedMemory memory) const {
    if constexpr (Tiles::available) {
      const Tiles tiles(memory, in.head_dim, in.aligned);
      const SequenceTile at = in.sequence_tiles[block().x];
      const int kv_head = static_cast<int>(block().y), d = in.head_dim;
      const int part = static_cast<int>(block().z), own_heads = part * heads_at_once;
      const int heads = in.group - own_heads < heads_at_once ? in.group - own_heads : heads_at_once;
      auto keys = tiles.take_own(memory), values = tiles.take_own(memory);
      auto queries = tiles.take_other(memory), gradients = tiles.take_other(memory);
      auto next_queries = tiles.take_other(memory), next_gradients = tiles.take_other(memory);

      tiles.begin_own(keys, head_of(in.k, at.begin, at.length, kv_head, d), at.first);
      tiles.begin_own(values, head_of(in.v, at.begin, at.length, kv_head, d), at.first);
      typename Tiles::Sums key_sums{}, value_sums{};
      // Queries from the first key on see keys of this tile. One loop over the queries of all heads, so that copies do not pause between.
      const int first_head = kv_head * in.group + own_heads;
      const auto begin = [&](auto& q_tile, auto& dy_tile, int h, int query) {
        const int length = h < heads ? at.length : 0;  // nothing to copy behind the last head
        tiles.begin(q_tile, head_of(in.q, at.begin, length, first_head + h, d), query);
        tiles.begin(dy_tile, head_of(in.dy, at.begin, length, first_head + h, d), query);
      };
      const auto row_term = [&](const MatrixView<const S>& terms, int h, int query) {
        return query < at.length ? read(terms, first_head + h, at.begin + query) : S{};
      };
      begin(queries, gradients, 0, at.first);
      for (int h = 0, query = at.first; h < heads;) {
        const bool last = query + Tiles::step >= at.length;
        const int next_h = last ? h + 1 : h, next_query = last ? at.first : query + Tiles::step;
        begin(next_queries, next_gradients, next_h, next_query);
        tiles.template arrived<2>();
        auto s = tiles.scores(keys, queries);
#pragma unroll
        for (int c = 0; c < Tiles::columns; ++c) {
          const int i = query + Tiles::column(c);
          const S shift = row_term(in.shift, h, i);
#pragma unroll
          for (int r = 0; r < Tiles::rows; ++r) s.at(r, c) = at.first + Tiles::row(r) <= i ? in.probability(s.at(r, c), shift) : S{};
        }
        tiles.accumulate(value_sums, s, gradients);
        auto dp = tiles.scores(values, gradients);
#pragma unroll
        for (int c = 0; c < Tiles::columns; ++c) {
          const S delta = row_term(in.delta, h, query + Tiles::column(c));
#pragma unroll
          for (int r = 0; r < Tiles::rows; ++r) s.at(r, c) *= dp.at(r, c) - delta;
        }
        tiles.accumulate(key_sums, s, queries);
        tiles.done();
        exchange(queries, next_queries);
        exchange(gradients, next_gradients);
        h = next_h;
        query = next_query;
      }
#pragma unroll
      for (int r = 0; r < Tiles::rows; ++r)
        if (const int i = at.first + Tiles::row(r); i < at.length) {
          const Index row = at.begin + i, part_row = part * in.k.rows + row;
          if (key_parts.data == nullptr) {
            tiles.write(dk.row(row) + kv_head * d, r, key_sums, in.scale);
            tiles.write(dv.row(row) + kv_head * d, r, value_sums, S{1});
          } else {
            tiles.write(key_parts.row(part_row) + kv_head * d, r, key_sums, in.scale);
            tiles.write(value_parts.row(part_row) + kv_head * d, r, value_sums, S{1});
          }
        }
    }
  }
};

}  // namespace device
}  // namespace qdylora
