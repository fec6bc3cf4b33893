// Products of 4-bit weights with tens to hundreds of tokens on Hopper, decoded on the way into its warpgroup products.
//
// A block makes 128 outputs of a tile of tokens: each of two warpgroups has 64 rows of the weight, which it decodes into registers, the left
// operand; the tile of x is shared, and comes two chunks of 64 at a time through a ring in shared memory, swizzled as the products read it.
// There a chunk's elements are in their order, so that lane t of four needs byte t of every word of codes; it loads 16 neighbours of a row,
// and lanes exchange bytes. As in CodedTiles, codes are multiplied as they are and a chunk's sums are scaled in float32.
//   The tile's tokens are two halves. While the products of one are on their way, the sums of the other are scaled, and the next chunk is
// decoded: tensor cores wait for neither, but for the last sums of four chunks.
//   At best, of 128 tokens, tensor cores take 512 cycles for a chunk. Shared memory, which limits it, takes 604: 256 for what they read, 128 for
// look-ups, 128 for x as it comes, 48 for what lanes exchange, and 44 for codes and scales, which pass by its way. Each scheduler issues 380
// instructions.
#pragma once

#include <algorithm>
#include <cstdint>

#include <qdylora/cuda/tiles.cuh>
#include <qdylora/cuda/warpgroup.cuh>

namespace qdylora {
namespace device {

/// Lane t of four brings words 4t ... 4t + 3 of sixteen and gets byte t of each: word j of the result has those of words 2j, 2j + 1, 2j + 8
/// and 2j + 9.
__device__ inline Words<4> exchange_bytes(const Words<4>& own) {
  const bool high = (lane() & 2) != 0, odd = (lane() & 1) != 0;
  // Lanes 0 and 1 want the low bytes of a word, 2 and 3 the high ones. Then what came from lanes 0 and 1 goes before what did from 2 and 3.
  const unsigned kept_half = high ? 0x7632u : 0x5410u, kept_byte = (high ? 0x2064u : 0x6420u) + (odd ? 0x1111u : 0u);
  Words<4> bytes;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const std::uint32_t first = own.word[2 * i], second = own.word[2 * i + 1];
    const std::uint32_t halves = select_bytes(first, second, kept_half);
    const std::uint32_t others = shuffle_xor(select_bytes(first, second, kept_half ^ 0x2222u), 2);
    const std::uint32_t even_or_odd = select_bytes(halves, others, kept_byte);
    const std::uint32_t neighbours = shuffle_xor(select_bytes(halves, others, kept_byte ^ 0x1111u), 1);
    bytes.word[i] = odd ? neighbours : even_or_odd;
    bytes.word[2 + i] = odd ? even_or_odd : neighbours;
  }
  return bytes;
}

/// A TiledProduct. Rows of w are whole rounds of 256 elements, blocks whole chunks, codes and rows of x are aligned to 16 bytes. sm_90a
template <CodeFormat Format, class Scales, class T, class Y, int token_tiles>
struct WarpgroupTiles {
  static constexpr bool needs_sm90a = true;
  static constexpr int threads = 256;
  static constexpr int rows = threads / warp_size * 16;
  static constexpr int tokens = 8 * token_tiles;
  static constexpr int round_elements = 4 * chunk_elements;
  static constexpr int pair_elements = 2 * chunk_elements, pair_code_words = pair_elements / 2 / 16;  // of 16 bytes
  static constexpr int chunk_words = tokens * chunk_x_words, stage_words = 2 * chunk_words, copies = stage_words / threads;
  static constexpr int stages = 4;
  static constexpr int ahead = token_tiles <= 8 ? 3 : 1;  // pairs whose codes are on their way
  static constexpr int table_words = 256 * ByteTable::pitch;
  static constexpr int shared_bytes = stages * stage_words * 16 + 4 * (table_words + 256);
  static constexpr int most_blocks = 1;  // that a processor has registers for
  static constexpr int sums_of_half = 4 * token_tiles / 2;
  static_assert(copies * threads == stage_words && chunk_words % 64 == 0);

  TiledProduct<Format, Scales, T, Y> in;

  __device__ void operator()(SharedMemory memory) const {
    if constexpr (is_sm90a) multiply(memory);
  }

 private:
  __device__ void multiply(SharedMemory memory) const {
    const auto tiles = memory.take<SwizzledRows>(stages * stage_words / 64);
    const auto ring = tiles.template from<Words<4>>(0);
    const auto table = memory.take<std::uint32_t>(table_words);
    const auto second_level = memory.take<float>(256);
    const ByteTable look_up(table);
    const int g = lane() / 4, t = lane() % 4;
    const Index first_token = static_cast<Index>(block().x) * tokens;
    const Index first_row = static_cast<Index>(block().y) * rows + warp() * 16 + 2 * g;  // of the lane's two
    const int pairs = static_cast<int>(in.w.cols / pair_elements);
    const Index rounds = in.w.cols / round_elements;
    const int begin = 2 * in.begin_of_part(rounds), end = 2 * in.begin_of_part(rounds, 1);

    // Beyond the last row lanes repeat it.
    const auto row_of = [&](int r) { return first_row + r < in.w.rows ? first_row + r : in.w.rows - 1; };
    const Words<4>* const codes = reinterpret_cast<const Words<4>*>(in.w.codes + row_of(0) * (in.w.cols / 2)) + t;
    const int next_row = row_of(1) > row_of(0) ? pair_code_words * pairs : 0;
    const auto fetch_codes = [&](int r, int q) { return load_once(codes + r * next_row + pair_code_words * (q < end ? q : begin)); };
    // A lane has the scale of one of its quad's two rows and one of a pair's chunks.
    const std::uint32_t own_chunk = static_cast<std::uint32_t>(row_of(t / 2) * (2 * pairs) + t % 2);
    const auto fetch_scale = [&](int q) {
      return PendingScale<Scales>::fetch(in.w.scales, (own_chunk + 2 * static_cast<std::uint32_t>(q < end ? q : begin)) >> in.block_shift);
    };

    // A pair of chunks of x into a slot, zeros for tokens that do not exist; a thread has a piece of 16 bytes of every 16th token.
    constexpr int tokens_at_once = threads / (2 * chunk_x_words);
    static_assert(tokens_at_once % 8 == 0);
    const int own_token = thread() / (2 * chunk_x_words), piece = thread() % (2 * chunk_x_words);
    const Words<4>* const source = reinterpret_cast<const Words<4>*>(in.x.row(first_token + own_token)) + piece;
    const auto target = ring.from(piece / chunk_x_words * chunk_words + swizzled_piece(own_token, piece % chunk_x_words));
    const int own_tokens = static_cast<int>(in.x.rows - first_token) - own_token;
    const auto copy_x = [&](int q, int slot) {
      if (q < end) {
#pragma unroll
        for (int i = 0; i < copies; ++i) {
          const int bytes = i * tokens_at_once < own_tokens ? 16 : 0;  // of none, the address is not read
          copy_async<16>(target.from(slot * stage_words + i * tokens_at_once * chunk_x_words),
                         source + 2 * chunk_x_words * q + i * tokens_at_once * (in.x.stride / 8), bytes);
        }
      }
      commit_copies();
    };
#pragma unroll
    for (int u = 0; u < stages - 1; ++u) copy_x(begin + u, u);

    Words<4> next[ahead][2], bytes[2];
    PendingScale<Scales> pending = fetch_scale(begin);
#pragma unroll
    for (int r = 0; r < 2; ++r) bytes[r] = fetch_codes(r, begin);
#pragma unroll
    for (int u = 0; u < ahead; ++u)
#pragma unroll
      for (int r = 0; r < 2; ++r) next[u][r] = fetch_codes(r, begin + 1 + u);
    fill_code_tables<Format, Scales, T, threads, ByteTable::pitch>(table, second_level);
    wait_copies<stages - 2>();
    publish_to_products();
    sync_block();

    // The left operand of a pair's first or second chunk.
    using Chunk = Words<4>[4];
    Chunk a[2];
    const auto decode = [&](int chunk) {
#pragma unroll
      for (int step = 0; step < 4; ++step) {
        const auto pair = [&](int row, int i) { return look_up.load(bytes[row].word[step], 2 * chunk + i); };
        a[chunk][step] = {{pair(0, 0), pair(1, 0), pair(0, 1), pair(1, 1)}};
      }
    };
    float sums[2][sums_of_half] = {}, partial[2][sums_of_half] = {};
    const ProductRows x_tiles(tiles);
    const auto begin_half = [&](int half, int chunk, const ProductRows& x_tile) {
      begin_products(a[chunk]);
      const auto rows_of_half = x_tile.from(half * (tokens / 2) / 8);
      multiply_async<T, false>(partial[half], a[chunk][0], rows_of_half, 0);
#pragma unroll
      for (int step = 1; step < 4; ++step) multiply_async<T, true>(partial[half], a[chunk][step], rows_of_half, step);
      commit_products();
    };
    const auto add_half = [&](int half, const float (&scale)[2]) {
#pragma unroll
      for (int i = 0; i < sums_of_half; ++i) sums[half][i] += scale[i % 4 / 2] * partial[half][i];
    };
#pragma unroll
    for (int r = 0; r < 2; ++r) bytes[r] = exchange_bytes(bytes[r]);
    decode(0);

    float scale[2][2] = {};  // of a chunk and row
    // Of the two pairs of a round, the first leaves its last products on their way, the second does not: ptxas lets products run beside each
    // other only where sums are read in the round that begins them.
    const auto multiply_pair = [&](int q, bool first) {
      const int slot = (q - begin) % stages;
      const auto x_tile = x_tiles.from(slot * stage_words / 64), second_x_tile = x_tile.from(chunk_words / 64);
      begin_half(0, 0, x_tile);
      if (!first) {
        wait_products<1>(partial[1]);
        add_half(1, scale[1]);
      }
      begin_half(1, 0, x_tile);
      const float own_scale = pending.value(in.w.scales, second_level);
      pending = fetch_scale(q + 1);
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int chunk = 0; chunk < 2; ++chunk) scale[chunk][r] = shuffle(own_scale, 2 * r + chunk, 4);
      decode(1);
      wait_products<1>(partial[0]);
      add_half(0, scale[0]);

      begin_half(0, 1, second_x_tile);
      wait_products<1>(partial[1]);
      add_half(1, scale[0]);
      begin_half(1, 1, second_x_tile);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        bytes[r] = exchange_bytes(next[0][r]);
#pragma unroll
        for (int u = 0; u + 1 < ahead; ++u) next[u][r] = next[u + 1][r];
        next[ahead - 1][r] = fetch_codes(r, q + 1 + ahead);
      }
      decode(0);
      wait_products<1>(partial[0]);
      add_half(0, scale[1]);

      wait_copies<stages - 3>();
      publish_to_products();
      sync_block();  // x of the next pair is there for all, and that of the pair before is done with
      copy_x(q + stages - 1, (slot + stages - 1) % stages);
      if (!first) {
        wait_products<0>(partial[1]);
        add_half(1, scale[1]);
      }
    };
#pragma unroll 1
    for (int q = begin; q < end; q += 2) {
      multiply_pair(q, true);
      multiply_pair(q + 1, false);
    }

#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < token_tiles / 2; ++i)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const Index token = first_token + half * (tokens / 2) + 8 * i + 2 * t + c;
          const float own[2] = {sums[half][4 * i + c], sums[half][4 * i + 2 + c]};
          in.put(token, first_row, own);
        }
  }
};

}  // namespace device

#if !defined(QDYLORA_DEVICE_ONLY)
namespace detail {

/// y (+)= x . w^T of a w that has_whole_chunks and rows that are multiples of 256, on a device that context.sm90a() says.
template <CodeFormat Format, class Scales, class T, class Y>
  requires FusedTypes<QuantizedView<Format, Scales>, T, Y>
void multiply_warpgroup_tiles(const CudaContext& context, MatrixView<const T> x, const QuantizedView<Format, Scales>& w, MatrixView<Y> y,
                              Update update) {
  if (x.rows <= 64) multiply_in_tiles<device::WarpgroupTiles<Format, Scales, T, Y, 8>>(context, x, w, y, update);
  else multiply_in_tiles<device::WarpgroupTiles<Format, Scales, T, Y, 16>>(context, x, w, y, update);
}

}  // namespace detail
#endif
}  // namespace qdylora
