// Products of 4-bit weights with tens to hundreds of tokens, decoded on the way into the tensor cores (coded_fragments.cuh).
//
// A block makes 128 outputs of a tile of tokens. Each of its warps has 32 rows of the weight to itself, whose codes it loads straight into
// registers; the tile of x is shared, and comes chunk by chunk through a ring in shared memory, filled by copies that run ahead.
// Shared memory is what limits it, and the loads that pass by its way: of 64 tokens, a warp reads 64 lines of 128 bytes of x a chunk and 32 of
// the table, writes 16 of x, and has 15 of codes and scales, for 131072 multiply-adds: 1030 a cycle. With 16 rows a warp it would be some
// 680; tensor cores do 1024 on an A100, some 1300 by mma on an H100.
// Where there are fewer blocks than the device holds at once, they share the sums: each makes a range of chunks, and their parts are added in
// order.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <string>
#include <type_traits>

#include <qdylora/cuda/coded_fragments.cuh>
#include <qdylora/cuda/small_batch.cuh>

namespace qdylora {
namespace device {

/// What a kernel makes tile by tile: y [tokens, out] (+)= x [tokens, in] . w [out, in]^T, or, in grid().z parts [tokens, out] of float, its
/// sums over ranges of `in`.
template <CodeFormat Format, class Scales, class T, class Y>
struct TiledProduct {
  QuantizedView<Format, Scales> w;
  MatrixView<const T> x;
  MatrixView<Y> y;
  float* parts;  // null: y
  Update update;
  int block_shift;  // log2(chunks in a block)

  /// The first of `count` units of `in` that belongs to the block's part, or to the one `next` behind it.
  __device__ int begin_of_part(Index count, int next = 0) const {
    return static_cast<int>(count * (static_cast<Index>(block().z) + next) / static_cast<Index>(grid().z));
  }
  /// Neighbouring outputs of a token.
  template <int width>
  __device__ void put(Index token, Index row, const float (&sums)[width]) const {
    if (token >= y.rows || row >= y.cols) return;
    if (parts != nullptr) put(parts + (block().z * y.rows + token) * y.cols + row, y.cols - row, Update::overwrite, sums);
    else put(y.row(token) + row, y.cols - row, update, sums);
  }

 private:
  /// Of neighbours in memory `count` exist.
  template <class Z, int width>
  __device__ static void put(Z* at, Index count, Update update, const float (&sums)[width]) {
    const bool adds = update == Update::accumulate;
    if (count >= width && reinterpret_cast<std::uintptr_t>(at) % (width * sizeof(Z)) == 0) {
      auto now = adds ? Neighbours<width, Z>::load_from(at) : Neighbours<width, Z>{};
#pragma unroll
      for (int r = 0; r < width; ++r) now.at[r] = adds ? now.at[r] + sums[r] : sums[r];
      now.store_to(at);
    } else {
#pragma unroll
      for (int r = 0; r < width; ++r)
        if (r < count) store(at + r, narrow<Z>(adds ? widen(load(at + r)) + sums[r] : sums[r]));
    }
  }
};

/// A TiledProduct. Rows of w and blocks are whole chunks, codes are aligned to 8 bytes, rows of x to 16. sm_80
template <CodeFormat Format, class Scales, class T, class Y, int token_tiles>
struct CodedTiles {
  static constexpr int threads = 128;
  static constexpr int row_tiles = 2, warp_rows = 16 * row_tiles, rows = threads / warp_size * warp_rows;
  static constexpr int tokens = 8 * token_tiles;
  static constexpr int stages = 4;  // chunks of x in the ring, and scales of a row that are loaded at once
  static constexpr int stage_words = tokens * chunk_x_words, copies = stage_words / threads;
  static constexpr int shared_bytes = 4 * (pair_table_words + 256) + stages * stage_words * 16;
  static constexpr int most_blocks = token_tiles <= 4 ? 3 : 2;  // that a processor has registers for
  static constexpr int least_blocks = token_tiles <= 4 && !is_sm90 ? most_blocks : 0;  // from sm_90 on ptxas keeps to it unasked
  static_assert(copies * threads == stage_words && stages == 4);

  TiledProduct<Format, Scales, T, Y> in;

  __device__ void operator()(SharedMemory memory) const {
    if constexpr (is_sm80) multiply(memory);
  }

 private:
  __device__ void multiply(SharedMemory memory) const {
    const auto table = memory.take<std::uint32_t>(pair_table_words);
    const auto second_level = memory.take<float>(256);
    const auto ring = memory.take<Words<4>>(stages * stage_words);
    const LookUpTable pairs(table.from(lane()));
    const int g = lane() / 4, t = lane() % 4;
    const Index first_row = static_cast<Index>(block().y) * rows + warp() * warp_rows;
    const Index first_token = static_cast<Index>(block().x) * tokens;
    const int chunks = static_cast<int>(in.w.cols / chunk_elements);
    const int begin = in.begin_of_part(chunks), end = in.begin_of_part(chunks, 1);

    // A lane's rows are neighbours, which it writes at once. Beyond the last row lanes repeat it.
    constexpr int own_rows = 2 * row_tiles;
    const auto row_of = [&](int r) { return first_row + own_rows * g + r < in.w.rows ? first_row + own_rows * g + r : in.w.rows - 1; };
    const Words<2>* const codes = reinterpret_cast<const Words<2>*>(in.w.codes + row_of(0) * (in.w.cols / 2)) + t;
    int row_words[own_rows];  // from the first row on
    std::uint32_t row_chunk[own_rows];
#pragma unroll
    for (int r = 0; r < own_rows; ++r) {
      row_words[r] = static_cast<int>(row_of(r) - row_of(0)) * chunk_code_words * chunks;
      row_chunk[r] = static_cast<std::uint32_t>(row_of(r) * chunks);
    }
    const auto fetch_scale = [&](int r, int c) {
      return PendingScale<Scales>::fetch(in.w.scales, (row_chunk[r] + static_cast<std::uint32_t>(c)) >> in.block_shift);
    };

    // Chunk c of x into a slot, zeros for tokens that do not exist; a thread has a piece of 16 bytes of every 16th token. Piece p of token i
    // lies at p ^ (i & 1): eight lanes that read at once, pieces 0 2 4 6 (or 1 3 5 7) of two tokens, then read different banks.
    constexpr int tokens_at_once = threads / chunk_x_words;
    static_assert(tokens_at_once % 2 == 0);
    const int own_token = thread() / chunk_x_words, piece = thread() % chunk_x_words;
    const Words<4>* const source = reinterpret_cast<const Words<4>*>(in.x.row(first_token + own_token)) + piece;
    const auto target = ring.from(own_token * chunk_x_words + (piece ^ (own_token & 1)));
    const int own_tokens = static_cast<int>(in.x.rows - first_token) - own_token;
    const auto copy_x = [&](int c, int slot) {
      if (c < end) {
#pragma unroll
        for (int i = 0; i < copies; ++i) {
          const int bytes = i * tokens_at_once < own_tokens ? 16 : 0;  // of none, the address is not read
          copy_async<16>(target.from(slot * stage_words + i * threads), source + chunk_x_words * c + i * tokens_at_once * (in.x.stride / 8), bytes);
        }
      }
      commit_copies();
    };
#pragma unroll
    for (int u = 0; u < stages - 1; ++u) copy_x(begin + u, u);
    // Codes are asked for two chunks ahead, scales of four chunks at once: lane t of four has those of chunk t.
    const auto fetch_codes = [&](int r, int c) { return load_once(codes + row_words[r] + chunk_code_words * c); };
    CodedRows coded[row_tiles];
    Words<2> next[own_rows];
    PendingScale<Scales> pending[own_rows];
    float scale[own_rows] = {};
#pragma unroll
    for (int r = 0; r < own_rows; ++r) {
      coded[r / 2].codes[r % 2] = fetch_codes(r, begin);
      pending[r] = fetch_scale(r, begin + t < end ? begin + t : begin);
      next[r] = fetch_codes(r, begin + 1 < end ? begin + 1 : begin);
    }
    fill_code_tables<Format, Scales, T, threads>(table, second_level);
    float sums[row_tiles][token_tiles][4] = {};
    sync_block();

#pragma unroll 1
    for (int c = begin; c < end; ++c) {
      const int turn = (c - begin) % stages;
      if (turn == 0) {
        const int after = c + stages + t;
#pragma unroll
        for (int r = 0; r < own_rows; ++r) {
          scale[r] = pending[r].value(in.w.scales, second_level);
          pending[r] = fetch_scale(r, after < end ? after : begin);
        }
      }
#pragma unroll
      for (int r = 0; r < own_rows; ++r) coded[r / 2].scale[r % 2] = shuffle(scale[r], turn, stages);
      wait_copies<stages - 2>();
      sync_block();  // the slot is there for all, and that of the chunk before is done with
      copy_x(c + stages - 1, (turn + stages - 1) % stages);
      const auto slot = ring.from(turn * stage_words);
      multiply_chunk<T>(pairs, coded, [&](int i, int half) {
        return slot.load((8 * i + g) * chunk_x_words + ((2 * t + half) ^ (g & 1)));
      }, sums);
#pragma unroll
      for (int r = 0; r < own_rows; ++r) {
        coded[r / 2].codes[r % 2] = next[r];
        if (c + 2 < end) next[r] = fetch_codes(r, c + 2);
      }
    }

    const Index row = first_row + own_rows * g;
#pragma unroll
    for (int i = 0; i < token_tiles; ++i)
#pragma unroll
      for (int c = 0; c < 2; ++c) {
        const Index token = first_token + 8 * i + 2 * t + c;
        float own[own_rows];
#pragma unroll
        for (int r = 0; r < own_rows; ++r) own[r] = sums[r / 2][i][r % 2 * 2 + c];
        in.put(token, row, own);
      }
  }
};

}  // namespace device

#if !defined(QDYLORA_DEVICE_ONLY)
namespace detail {

/// y (+)= x . w^T by a kernel whose blocks make tiles of outputs: [rows, tokens], or parts of their sums where there are fewer tiles than the
/// device holds blocks.
template <class Kernel, CodeFormat Format, class Scales, class T, class Y>
void multiply_in_tiles(const CudaContext& context, MatrixView<const T> x, const QuantizedView<Format, Scales>& w, MatrixView<Y> y,
                       Update update) {
  constexpr Index most_parts = 8, least_columns = 1024;  // that are worth a block
  constexpr std::size_t reserved = 1024;                 // of a block's shared memory
  Scratch scratch(context);
  x = aligned_rows(context, scratch, x);
  const int block_shift = std::countr_zero(static_cast<std::size_t>(w.block_size)) - 6;
  const Index across = div_up(w.rows, Kernel::rows), down = div_up(x.rows, Kernel::tokens);
  const Index part_bytes = y.rows * y.cols * static_cast<Index>(sizeof(float));
  const auto& device = context.properties();
  const Index resident = std::clamp<Index>(static_cast<Index>(device.sharedMemPerMultiprocessor / (Kernel::shared_bytes + reserved)), 1,
                                           Kernel::most_blocks);
  // Blocks of one processor share what limits it: they are worth filling with parts only where there are fewer tiles than processors.
  const Index tiles = across * down, processors = device.multiProcessorCount;
  const Index parts = parts_of_tiles(tiles, tiles < processors ? resident * processors : processors, w.cols,
                                     std::min({most_parts, w.cols / least_columns, scratch.room_for(1) / part_bytes}));
  float* const memory = parts > 1 ? scratch.take<float>(parts * y.rows * y.cols) : nullptr;
  // Tiles of the same rows run side by side: their codes leave memory once.
  const dim3 blocks(static_cast<unsigned>(down), static_cast<unsigned>(across), static_cast<unsigned>(parts));
  device::launch({context.stream(), blocks, Kernel::shared_bytes}, Kernel{{w, x, y, memory, update, block_shift}});
  if (parts > 1) for_each(context, y.rows, y.cols, device::SumParts<float, Y>{memory, static_cast<int>(parts), y, update});
}

/// y (+)= x . w^T of a w that has_whole_chunks.
template <CodeFormat Format, class Scales, class T, class Y>
  requires FusedTypes<QuantizedView<Format, Scales>, T, Y>
void multiply_tiles(const CudaContext& context, MatrixView<const T> x, const QuantizedView<Format, Scales>& w, MatrixView<Y> y,
                    Update update) {
  if (x.rows <= 32) multiply_in_tiles<device::CodedTiles<Format, Scales, T, Y, 4>>(context, x, w, y, update);
  else multiply_in_tiles<device::CodedTiles<Format, Scales, T, Y, 8>>(context, x, w, y, update);
}

}  // namespace detail
#endif
}  // namespace qdylora
