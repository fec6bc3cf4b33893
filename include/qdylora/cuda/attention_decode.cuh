// Attention of one new token a sequence to its cache of keys and values.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include <qdylora/cuda/attention.cuh>

namespace qdylora {
namespace device {

/// The cache of a sequence.
template <class T>
struct KeyValueCache {
  MatrixView<const T> k, v;
};

/// One query row a sequence: the heads that share a key-value head are the rows of a tile, and the keys are shared out among blocks
/// ("FlashDecoding", Dao et al. 2023). Block (part of the keys of a sequence, tile of heads), since a grid is long in x alone.
template <class Tiles>
struct AttentionDecode {
  using T = typename Tiles::Element;
  using S = typename Tiles::S;
  static constexpr int threads = Tiles::threads, least_blocks = 1;
  static constexpr int shared_bytes = Tiles::shared_bytes(1, 2);

  MatrixView<const T> q;
  List<KeyValueCache<T>> caches;
  int head_dim, group, group_tiles, parts;
  Index keys_per_block;
  S scale;
  bool aligned;
  MatrixView<T> y;
  // Where there are several parts: their normalized sums [parts * sequences, heads * head_dim] and log-sum-exps [parts * sequences, heads].
  MatrixView<S> partial, lse;

  __device__ void operator()(SharedMemory memory) const {
    if constexpr (Tiles::available) {
      const Tiles tiles(memory, head_dim, aligned);
      const Index sequence = block().x / static_cast<unsigned>(parts), part = block().x % static_cast<unsigned>(parts);
      const int at = static_cast<int>(block().y), kv_head = at / group_tiles, first = at % group_tiles * Tiles::own;
      const KeyValueCache<T> cache = caches[sequence];
      const Index begin = part * keys_per_block, left = cache.k.rows - begin;
      const int keys = static_cast<int>(left < keys_per_block ? left : keys_per_block);
      OnlineSoftmax<Tiles> softmax;
      const MatrixView<const T> heads(q.row(sequence) + kv_head * group * head_dim, group, head_dim);
      if (keys > 0)
        attend(memory, tiles, heads, first, head_of(cache.k, begin, keys, kv_head, head_dim),
               head_of(cache.v, begin, keys, kv_head, head_dim), scale, [&](int) { return keys; }, softmax);
      const Index row = part * q.rows + sequence;
#pragma unroll
      for (int r = 0; r < Tiles::rows; ++r) {
        const S total = softmax.total_of(r);
        if (first + Tiles::row(r) >= group) continue;
        const int head = kv_head * group + first + Tiles::row(r);
        if (parts == 1) {
          tiles.write(y.row(sequence) + head * head_dim, r, softmax.sums, S{1} / total);
        } else {
          if (keys > 0) tiles.write(partial.row(row) + head * head_dim, r, softmax.sums, S{1} / total);
          if (Tiles::output(0) == 0) write(lse, row, head, softmax.largest[r] * scale + std::log(total));  // of no keys: -infinity
        }
      }
    }
  }
};

/// y[s, j] = sum_p e^(lse_p - lse) partial_p[s, j],  e^lse = sum_p e^lse_p
template <class T>
struct JoinParts {
  using S = Accumulator<T>;
  MatrixView<const S> partial, lse;
  Index parts, head_dim;
  MatrixView<T> y;
  __device__ void operator()(Index s, Index j) const {
    const Index head = static_cast<unsigned>(j) / static_cast<unsigned>(head_dim);
    S largest = -std::numeric_limits<S>::infinity();
    for (Index p = 0; p < parts; ++p) {
      const S term = read(lse, p * y.rows + s, head);
      largest = term > largest ? term : largest;
    }
    S total{}, sum{};
    for (Index p = 0; p < parts; ++p) {
      const S term = read(lse, p * y.rows + s, head);
      if (term == -std::numeric_limits<S>::infinity()) continue;  // it has no keys, and has written no sum
      const S weight = std::exp(term - largest);
      total += weight;
      sum += weight * read(partial, p * y.rows + s, j);
    }
    write(y, s, j, sum / total);
  }
};

}  // namespace device

#if !defined(QDYLORA_DEVICE_ONLY)
namespace detail {

/// y[s] = softmax(q[s] k^T / sqrt(head_dim)) v over all rows of k = keys[s], v = values[s], head by head
template <class T>
void attention_decode(const CudaContext& context, MatrixView<const T> q, std::span<const MatrixView<const T>> keys,
                      std::span<const MatrixView<const T>> values, HeadShape shape, MatrixView<T> y) {
  using S = Accumulator<T>;
  expect_attention_decode(q, keys, values, shape, y);
  if (keys.empty()) return;
  const auto head_dim = static_cast<int>(shape.head_dim), group = static_cast<int>(shape.heads / shape.kv_heads);
  std::vector<device::KeyValueCache<T>> caches;
  Index longest = 0;
  bool aligned = heads_aligned(shape.head_dim, q, y);
  for (std::size_t s = 0; s < keys.size(); ++s) {
    caches.push_back({keys[s], values[s]});
    longest = std::max(longest, keys[s].rows);
    aligned = aligned && heads_aligned(shape.head_dim, keys[s], values[s]);
  }
  const auto kernel_of = [](auto width) { return device::AttentionDecode<device::AttentionTiles<T, width(), 1, 32>>{}; };
  with_tile_width<T>(
      context, shape.head_dim, [&](auto width) { return decltype(kernel_of(width))::shared_bytes; },
      [&](auto width) {
        using Kernel = decltype(kernel_of(width));
        constexpr Index least = 256, blocks_per_processor = 8;  // keys that are worth a block of their own
        constexpr int own = device::AttentionTiles<T, width(), 1, 32>::own;
        const int group_tiles = (group + own - 1) / own;
        const Index blocks = shape.kv_heads * group_tiles * q.rows;
        const Index wanted = std::max<Index>(1, blocks_per_processor * context.properties().multiProcessorCount / blocks);
        const Index keys_per_block = std::max(least, rounded_up(div_up(longest, wanted), 64));
        const Index parts = div_up(longest, keys_per_block);
        Scratch scratch(context);
        const auto list = listed(context, scratch, std::span<const device::KeyValueCache<T>>(caches));
        MatrixView<S> partial, lse;
        if (parts > 1) {
          partial = {scratch.take<S>(parts * q.rows * q.cols), parts * q.rows, q.cols};
          lse = {scratch.take<S>(parts * q.rows * shape.heads), parts * q.rows, shape.heads};
        }
        const dim3 grid(static_cast<unsigned>(parts * q.rows), static_cast<unsigned>(shape.kv_heads * group_tiles));
        device::launch({context.stream(), grid, Kernel::shared_bytes},
                       Kernel{q, list, head_dim, group, group_tiles, static_cast<int>(parts), keys_per_block, attention_scale<S>(head_dim),
                              aligned, y, partial, lse});
        if (parts > 1) for_each(context, y.rows, y.cols, device::JoinParts<T>{partial, lse, parts, shape.head_dim, y});
      });
}

}  // namespace detail
#endif
}  // namespace qdylora
