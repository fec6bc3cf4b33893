// Attention on the device. 16-bit types multiply on tensor cores, heads of up to 64, 128 and 256 columns each in kernels of their own;
// float, double, and what a device's tensor cores or shared memory cannot do, by multiply-adds.
#pragma once

#include <qdylora/config.hpp>
#include <qdylora/cuda/attention_kernels.cuh>
#if !defined(QDYLORA_DEVICE_ONLY)

#include <algorithm>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include <qdylora/backend_checks.hpp>
#include <qdylora/cuda/lists.cuh>

namespace qdylora::detail {

/// Whether 16 bytes at a time may be read from, or written to, the heads of all these matrices.
template <class... Views>
bool heads_aligned(Index head_dim, const Views&... views) {
  return head_dim % 8 == 0 && (has_aligned_rows<16 / static_cast<int>(sizeof(*views.data))>(views) && ...);
}

/// The tiles of all sequences, `own` rows each; `work` is what one of them costs, and those that cost most come first.
template <class Work>
std::vector<device::SequenceTile> sequence_tiles(std::span<const Index> offsets, int own, Work work) {
  std::vector<device::SequenceTile> tiles;
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
    const Index length = offsets[s + 1] - offsets[s];
    QDYLORA_EXPECTS(length <= (Index{1} << 30), unsupported, "attention: a sequence of " + std::to_string(length) + " tokens");
    for (int first = 0; first < length; first += own) tiles.push_back({offsets[s], static_cast<int>(length), first});
  }
  std::stable_sort(tiles.begin(), tiles.end(), [&](const auto& a, const auto& b) { return work(a) > work(b); });
  return tiles;
}

/// Calls f(width), a constant: the narrowest tiles for tensor cores that hold a head, or 0 where T or the device has none, or not the
/// shared memory, of which `shared_bytes(width)` are needed.
template <class T, class SharedBytes, class F>
void with_tile_width(const CudaContext& context, Index head_dim, SharedBytes shared_bytes, F f) {
  QDYLORA_EXPECTS(head_dim <= 256, unsupported, "attention: heads of " + std::to_string(head_dim) + " columns; the device has up to 256");
  if constexpr (sizeof(T) == 2) {
    const auto fits = [&](auto width) {
      return head_dim <= width() && static_cast<std::size_t>(shared_bytes(width)) <= context.properties().sharedMemPerBlockOptin;
    };
    using std::integral_constant;
    if (std::same_as<T, half> || context.compute_capability() >= 80) {
      if (constexpr integral_constant<int, 64> w; fits(w)) return f(w);
      if (constexpr integral_constant<int, 128> w; fits(w)) return f(w);
      if (constexpr integral_constant<int, 256> w; fits(w)) return f(w);
    }
  }
  f(std::integral_constant<int, 0>());
}

template <class S>
S attention_scale(Index head_dim) {
  return S{1} / std::sqrt(static_cast<S>(head_dim));
}

template <class T, class S>
void attention(const CudaContext& context, MatrixView<const T> q, MatrixView<const T> k, MatrixView<const T> v,
               std::span<const Index> offsets, HeadShape shape, MatrixView<T> y, MatrixView<S> lse) {
  expect_attention(q, k, v, offsets, shape, y, lse);
  const auto head_dim = static_cast<int>(shape.head_dim), group = static_cast<int>(shape.heads / shape.kv_heads);
  const auto kernel_of = [](auto width) { return device::Attention<device::AttentionTiles<T, width(), 4, width() <= 128 ? 64 : 32>>{}; };
  with_tile_width<T>(
      context, shape.head_dim, [&](auto width) { return decltype(kernel_of(width))::shared_bytes; },
      [&](auto width) {
        using Kernel = decltype(kernel_of(width));
        const auto tiles = sequence_tiles(offsets, device::AttentionTiles<T, width(), 4, 64>::own, [](const auto& t) { return t.first; });
        Scratch scratch(context);
        const auto list = listed(context, scratch, std::span<const device::SequenceTile>(tiles));
        device::launch({context.stream(), {static_cast<unsigned>(tiles.size()), static_cast<unsigned>(shape.heads)}, Kernel::shared_bytes},
                       Kernel{q, k, v, list, head_dim, group, attention_scale<S>(head_dim), heads_aligned(head_dim, q, k, v, y), y, lse});
      });
}

template <class T, class S>
void attention_backward(const CudaContext& context, MatrixView<const T> dy, MatrixView<const T> q, MatrixView<const T> k,
                        MatrixView<const T> v, MatrixView<const T> y, MatrixView<const S> lse, std::span<const Index> offsets,
                        HeadShape shape, MatrixView<T> dq, MatrixView<T> dk, MatrixView<T> dv) {
  expect_attention_backward(dy, q, k, v, y, lse, offsets, shape, dq, dk, dv);
  const auto head_dim = static_cast<int>(shape.head_dim), group = static_cast<int>(shape.heads / shape.kv_heads);
  const Index tokens = q.rows;
  if (tokens == 0) return;
  Scratch scratch(context);
  const MatrixView<S> delta(scratch.take<S>(shape.heads * tokens), shape.heads, tokens);
  const MatrixView<S> shift(scratch.take<S>(shape.heads * tokens), shape.heads, tokens);
  constexpr Index warps = device::AttentionRowTerms<T>::threads / device::warp_size;
  device::launch({context.stream(), {static_cast<unsigned>(div_up(tokens, warps)), static_cast<unsigned>(shape.heads)}},
                 device::AttentionRowTerms<T>{dy, y, lse, shape.head_dim, delta, shift});
  const auto tiles_of = [](auto width) { return std::type_identity<device::AttentionTiles<T, width(), 4, width() <= 128 ? 32 : 16>>{}; };
  with_tile_width<T>(
      context, shape.head_dim,
      [&](auto width) { return device::AttentionBackwardQ<typename decltype(tiles_of(width))::type>::shared_bytes; },
      [&](auto width) {
        using Tiles = typename decltype(tiles_of(width))::type;
        using ForQ = device::AttentionBackwardQ<Tiles>;
        using ForKV = device::AttentionBackwardKV<Tiles>;
        device::AttentionBackward<Tiles> in{dy, q, k, v, delta, shift, {}, head_dim, group, attention_scale<S>(head_dim),
                                            heads_aligned(head_dim, dy, q, k, v, dq, dk, dv)};
        const auto blocks = [&](const auto& tiles, Index heads) {
          in.sequence_tiles = listed(context, scratch, std::span<const device::SequenceTile>(tiles));
          return dim3(static_cast<unsigned>(tiles.size()), static_cast<unsigned>(heads));
        };
        const auto q_tiles = sequence_tiles(offsets, Tiles::own, [](const auto& t) { return t.first; });
        const auto kv_tiles = sequence_tiles(offsets, Tiles::own, [](const auto& t) { return t.length - t.first; });
        const dim3 q_blocks = blocks(q_tiles, shape.heads);
        device::launch({context.stream(), q_blocks, ForQ::shared_bytes}, ForQ{in, dq});
        dim3 kv_blocks = blocks(kv_tiles, shape.kv_heads);
        // Where few key-value heads make few blocks, each shares its query heads with others.
        const Index part_size = tokens * k.cols, room = scratch.room_for(2) / static_cast<Index>(2 * sizeof(S)) / part_size;
        const Index wanted = 2 * context.properties().multiProcessorCount / (static_cast<Index>(kv_tiles.size()) * shape.kv_heads);
        const Index heads_at_once = div_up(group, std::clamp<Index>(std::min(wanted, room), 1, group)), parts = div_up(group, heads_at_once);
        MatrixView<S> key_parts, value_parts;
        if (parts > 1) {
          key_parts = {scratch.take<S>(parts * part_size), parts * tokens, k.cols};
          value_parts = {scratch.take<S>(parts * part_size), parts * tokens, k.cols};
        }
        kv_blocks.z = static_cast<unsigned>(parts);
        device::launch({context.stream(), kv_blocks, ForKV::shared_bytes},
                       ForKV{in, dk, dv, static_cast<int>(heads_at_once), key_parts, value_parts});
        if (parts == 1) return;
        for (const auto& [made, sums] : {std::pair{key_parts, dk}, std::pair{value_parts, dv}})
          for_each(context, tokens, k.cols, device::SumParts<S, T>{made.data, static_cast<int>(parts), sums, Update::overwrite});
      });
}

}  // namespace qdylora::detail
#endif
