// Products of 4-bit weights with tens to hundreds of tokens, decoded on the way into the tensor cores (coded_fragments.cuh).
//
// A block makes 128 outputs of a tile of tokens. Each of its warps has 16 rows of the weight to itself, whose codes it loads straight into
// registers; the tile of x is shared, and comes chunk by chunk through a ring in shared memory, filled by copies that run ahead.
// Where there are fewer blocks than the device has processors, they share the sums: each makes a range of chunks, and their parts are added
// in order.
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

/// y [tokens, out] (+)= x [tokens, in] . w [out, in]^T, or, in grid().z parts [tokens, out] of float, its sums over ranges of `in`. Rows of
/// w are whole groups of chunks, blocks whole chunks, codes are aligned to 8 bytes, rows of x to 16. sm_80
template <CodeFormat Format, class Scales, class T, class Y, int token_tiles>
struct CodedTiles {
  static constexpr int threads = 256;
  static constexpr int warp_rows = 16, rows = threads / warp_size * warp_rows;
  static constexpr int tokens = 8 * token_tiles;
  static constexpr int group = 4;   // chunks whose codes are loaded at once, a line of 128 bytes of each row
  static constexpr int stages = 4;  // chunks of x in the ring: slot u is that of chunk u of each group
  static constexpr int stage_words = tokens * chunk_x_words, copies = stage_words / threads;
  static constexpr int shared_bytes = 4 * (pair_table_words + 256) + stages * stage_words * 16;
  static_assert(stages == group && copies * threads == stage_words);

  QuantizedView<Format, Scales> w;
  MatrixView<const T> x;
  MatrixView<Y> y;
  float* parts;  // null: y
  Update update;
  int block_shift;  // log2(chunks in a block)

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
    const Index first_row = static_cast<Index>(block().x) * rows + warp() * warp_rows;
    const Index first_token = static_cast<Index>(block().y) * tokens;
    const int chunks = static_cast<int>(w.cols / chunk_elements), groups = chunks / group;
    const int parts_count = static_cast<int>(grid().z), part = static_cast<int>(block().z);
    const int begin = static_cast<int>(static_cast<Index>(groups) * part / parts_count);
    const int end = static_cast<int>(static_cast<Index>(groups) * (part + 1) / parts_count);

    // A lane's two rows are neighbours, so that groups of eight lanes write whole sectors of y. Beyond the last row lanes repeat it.
    const Words<2>* codes[2];
    std::uint32_t row_chunk[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Index row = first_row + 2 * g + r < w.rows ? first_row + 2 * g + r : w.rows - 1;
      codes[r] = reinterpret_cast<const Words<2>*>(w.codes + row * (w.cols / 2)) + t;
      row_chunk[r] = static_cast<std::uint32_t>(row * chunks);
    }
    const auto fetch_scale = [&](int r, int c) {
      return PendingScale<Scales>::fetch(w.scales, (row_chunk[r] + static_cast<std::uint32_t>(c)) >> block_shift);
    };

    // Chunk c of x into a slot, zeros for tokens that do not exist; a thread has a piece of 16 bytes of some of them. Piece p of token i
    // lies at p ^ (i & 1): eight lanes that read at once, pieces 0 2 4 6 (or 1 3 5 7) of two tokens, then read different banks.
    const Words<4>* source[copies];
    int target[copies], bytes[copies];
#pragma unroll
    for (int i = 0; i < copies; ++i) {
      const int token = (thread() + i * threads) / chunk_x_words, piece = thread() % chunk_x_words;
      const bool exists = first_token + token < x.rows;
      source[i] = reinterpret_cast<const Words<4>*>(x.row(exists ? first_token + token : 0)) + piece;
      target[i] = token * chunk_x_words + (piece ^ (token & 1));
      bytes[i] = exists ? 16 : 0;
    }
    const auto copy_x = [&](int c, int slot) {
      if (c < group * end) {
#pragma unroll
        for (int i = 0; i < copies; ++i)
          copy_async<16>(ring.from(slot * stage_words + target[i]), source[i] + chunk_x_words * c, bytes[i]);
      }
      commit_copies();
    };
#pragma unroll
    for (int u = 0; u < stages - 1; ++u) copy_x(group * begin + u, u);
    Words<2> next[2][group];
    PendingScale<Scales> pending[2];
    const Words<2>* ahead[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      ahead[r] = codes[r] + chunk_code_words * group * begin;
#pragma unroll
      for (int u = 0; u < group; ++u) next[r][u] = load_once(ahead[r] + chunk_code_words * u);
      pending[r] = fetch_scale(r, group * begin + t);
    }
    fill_code_tables<Format, Scales, T, threads>(table, second_level);
    float sums[token_tiles][4] = {};
    sync_block();

    int at = begin;
    const auto multiply_group = [&](auto more) {
      const float scale[2] = {pending[0].value(w.scales, second_level), pending[1].value(w.scales, second_level)};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        ahead[r] += chunk_code_words * group;
        if (more) pending[r] = fetch_scale(r, group * (at + 1) + t);
      }
#pragma unroll
      for (int u = 0; u < group; ++u) {
        wait_copies<stages - 2>();
        sync_block();  // the slot is there for all, and that of the chunk before is done with
        copy_x(group * at + u + stages - 1, (u + stages - 1) % stages);
        const auto x_of = [&](int i, int half) {
          return ring.load(u * stage_words + (8 * i + g) * chunk_x_words + ((2 * t + half) ^ (g & 1)));
        };
        multiply_chunk<T>(pairs, next[0][u], next[1][u], shuffle(scale[0], u, 4), shuffle(scale[1], u, 4), x_of, sums);
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if (more) next[r][u] = load_once(ahead[r] + chunk_code_words * u);
      }
    };
    for (; at + 1 < end; ++at) multiply_group(std::true_type{});
    multiply_group(std::false_type{});

#pragma unroll
    for (int i = 0; i < token_tiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const Index token = first_token + 8 * i + 2 * t + j % 2, row = first_row + 2 * g + j / 2;
        if (token >= y.rows || row >= y.cols) continue;
        if (parts != nullptr) store(parts + (part * y.rows + token) * y.cols + row, sums[i][j]);
        else write(y, token, row, update == Update::accumulate ? read(y, token, row) + sums[i][j] : sums[i][j]);
      }
  }
};

/// y[i, j] (+)= the sum of its parts, in order.
template <class Y>
struct SumParts {
  const float* parts;
  int count;
  MatrixView<Y> y;
  Update update;

  __device__ void operator()(Index i, Index j) const {
    float sum = update == Update::accumulate ? read(y, i, j) : 0.0f;
    for (int part = 0; part < count; ++part) sum += load(parts + (part * y.rows + i) * y.cols + j);
    write(y, i, j, sum);
  }
};

}  // namespace device

#if !defined(QDYLORA_DEVICE_ONLY)
namespace detail {

/// y (+)= x . w^T of a w that has_whole_chunks, and whole groups of four.
template <CodeFormat Format, class Scales, class T, class Y>
  requires FusedTypes<QuantizedView<Format, Scales>, T, Y>
void multiply_tiles(const CudaContext& context, MatrixView<const T> x, const QuantizedView<Format, Scales>& w, MatrixView<Y> y,
                    Update update) {
  constexpr Index most_parts = 8, least_groups = 4;  // groups of chunks that are worth a block
  QDYLORA_EXPECTS(w.cols > 0 && w.cols % 256 == 0, bad_argument,
                  "tiles: rows of " + std::to_string(w.cols) + " are not whole groups of 256");
  Scratch scratch(context);
  x = aligned_rows(context, scratch, x);
  const int block_shift = std::countr_zero(static_cast<std::size_t>(w.block_size)) - 6;
  const auto go = [&]<int token_tiles>(std::integral_constant<int, token_tiles>) {
    using Kernel = device::CodedTiles<Format, Scales, T, Y, token_tiles>;
    const auto count = [](Index extent, Index each) { return (extent + each - 1) / each; };
    const Index across = count(w.rows, Kernel::rows), down = count(x.rows, Kernel::tokens);
    const Index part_bytes = y.rows * y.cols * static_cast<Index>(sizeof(float));
    const Index parts = std::max<Index>(
        std::min({most_parts, context.properties().multiProcessorCount / (across * down), w.cols / (256 * least_groups),
                  static_cast<Index>(scratch.rest(most_parts * part_bytes).size()) / part_bytes}),
        1);
    float* const memory = parts > 1 ? scratch.take<float>(parts * y.rows * y.cols) : nullptr;
    const dim3 blocks(static_cast<unsigned>(across), static_cast<unsigned>(down), static_cast<unsigned>(parts));
    device::launch({context.stream(), blocks, Kernel::shared_bytes}, Kernel{w, x, y, memory, update, block_shift});
    if (parts > 1) for_each(context, y.rows, y.cols, device::SumParts<Y>{memory, static_cast<int>(parts), y, update});
  };
  if (x.rows <= 32) go(std::integral_constant<int, 4>{});
  else go(std::integral_constant<int, 8>{});
}

}  // namespace detail
#endif
}  // namespace qdylora
