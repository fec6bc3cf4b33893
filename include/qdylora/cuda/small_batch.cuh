// Products of 4-bit weights with up to 32 tokens, decoded on the way into the tensor cores. A weight is read once, as it is stored.
//
// The weights are the left operand of mma.m16n8k16, whose 16 rows are 16 rows of w and whose 8 columns are 8 tokens. A block of threads
// makes 16 outputs of every token; its warps share the row. Rows are cut into chunks of 64 elements, 32 bytes of codes:
//   In a chunk, lane t of a group of four holds bytes 8t ... 8t + 7, elements 16t ... 16t + 15, of rows g and g + 8 (g = lane / 4). Step j of
//   four multiplies bytes 2j and 2j + 1. That orders the chunk's elements otherwise than the instruction's fragments do, for both operands
//   alike, and a sum does not mind: so a lane reads 8 bytes of codes and 32 bytes of x, side by side, and nothing is exchanged.
//   A byte, two codes, is looked up at once in a table of 256 pairs, of which each lane has its own: entry e of lane l is word 32 e + l, so
//   that lane l reads bank l whatever the codes are.
//   Partial sums of a chunk are scaled by its absmax in float32. What is rounded to 16 bits is the code book, not the weights.
// Sums are added in an order that the shape alone decides: chunks in a warp, then the warps.
#pragma once

#include <bit>
#include <cstdint>
#include <string>

#include <qdylora/backend.hpp>
#include <qdylora/cuda/for_each.cuh>
#include <qdylora/cuda/slabs.cuh>
#include <qdylora/cuda/tables.cuh>

namespace qdylora {

/// What an adapter adds to a product: u . b, u [tokens, rank], b [rank, out], rank-major as LoRAAdapter has it. Empty: nothing.
struct AdapterTerm {
  MatrixView<const float> u = {}, b = {};
};

namespace device {

/// The absmax of a chunk, in two steps: what memory holds of it is asked for long before it is looked up.
template <class Scales>
struct PendingScale {
  int code = 0;
  float number = 0.0f;

  __device__ static PendingScale fetch(const typename Scales::View& scales, std::uint32_t block) {
    if constexpr (Scales::nested)
      return {load(scales.codes + block), load(scales.nested_absmax + block / std::uint32_t{Scales::nested_block_size})};
    else return {0, load(scales.absmax + block)};
  }
  /// `second_level`: the values of the scales' codes.
  __device__ float value(const typename Scales::View& scales, const Shared<float>& second_level) const {
    if constexpr (Scales::nested) return add(multiply(second_level.load(code), number), scales.offset);
    else return number;
  }
};

/// y [tokens, out] (+)= x [tokens, in] . w [out, in]^T + the adapter's term, tokens <= 8 token_tiles. Rows of w are whole chunks, aligned to 8
/// bytes, blocks are whole chunks, and rows of x are aligned to 16 bytes. sm_80
template <CodeFormat Format, class Scales, class T, class Y, int token_tiles>
struct SmallBatch {
  static constexpr int threads = 256;
  static constexpr int warps = threads / warp_size;
  static constexpr int rows = 16;
  static constexpr int chunk = 64;
  static constexpr int group = 4;  // chunks that a warp loads at once, a line of 128 bytes of each row
  static constexpr int padded_rows = rows + 4;  // sums of one token: 2t * 20 + g mod 32 are different banks for all lanes
  static constexpr int table_words = 256 * warp_size;
  static constexpr int shared_bytes = 4 * (table_words + 256);
  static_assert(warps * 8 * token_tiles * padded_rows <= table_words);

  QuantizedView<Format, Scales> w;
  MatrixView<const T> x;
  MatrixView<Y> y;
  AdapterTerm adapter;
  Update update;
  int block_shift;  // log2(chunks in a block)

  using Sums = float[token_tiles][4];

  __device__ void operator()(SharedMemory memory) const {
    if constexpr (is_sm80) multiply(memory);
  }

 private:
  static constexpr int words_of_codes = chunk / 2 / 8, words_of_x = chunk * 2 / 16;  // of a chunk, as they are loaded

  __device__ void multiply(SharedMemory memory) const {
    const auto table = memory.take<std::uint32_t>(table_words);
    const auto second_level = memory.take<float>(256);
    const LookUpTable own_pairs(table.from(lane()));
    const int g = lane() / 4, t = lane() % 4;
    const Index first_row = static_cast<Index>(block().x) * rows;
    const int chunks = static_cast<int>(w.cols / chunk), groups = chunks / group;
    int at = warp();

    // Beyond the last row, and the last token, lanes repeat it: their sums are dropped.
    const Words<2>* codes[2];
    std::uint32_t row_chunk[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const Index row = first_row + g + 8 * r < w.rows ? first_row + g + 8 * r : w.rows - 1;
      codes[r] = reinterpret_cast<const Words<2>*>(w.codes + row * (w.cols / 2)) + t;
      row_chunk[r] = static_cast<std::uint32_t>(row * chunks);
    }
    const Words<4>* tokens[token_tiles];
#pragma unroll
    for (int i = 0; i < token_tiles; ++i) {
      const Index token = 8 * i + g < x.rows ? 8 * i + g : x.rows - 1;
      tokens[i] = reinterpret_cast<const Words<4>*>(x.row(token) + 16 * t);
    }
    const auto fetch_scale = [&](int r, int c) { return PendingScale<Scales>::fetch(w.scales, (row_chunk[r] + c) >> block_shift); };
    const auto scale_of = [&](const PendingScale<Scales>& pending) { return pending.value(w.scales, second_level); };

    // The first loads are on their way while the table is made. Lane t of four asks for the scale of chunk t of the group.
    Words<2> next[2][group];
    PendingScale<Scales> pending[2];
    const Words<2>* ahead[2] = {codes[0] + words_of_codes * group * at, codes[1] + words_of_codes * group * at};
    if (at < groups) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int u = 0; u < group; ++u) next[r][u] = load_once(ahead[r] + words_of_codes * u);
        pending[r] = fetch_scale(r, group * at + t);
      }
    }
    fill_tables(table, second_level);
    Sums sums = {};
    add_adapter(first_row, sums);
    sync_block();

    for (; at < groups; at += warps) {
      const float scale[2] = {scale_of(pending[0]), scale_of(pending[1])};
      const int coming = at + warps < groups ? at + warps : at;  // at the end, the last group once more
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        ahead[r] = codes[r] + words_of_codes * group * coming;
        pending[r] = fetch_scale(r, group * coming + t);
      }
#pragma unroll
      for (int u = 0; u < group; ++u) {
        multiply_chunk(own_pairs, next[0][u], next[1][u], tokens, group * at + u, shuffle(scale[0], u, 4), shuffle(scale[1], u, 4), sums);
#pragma unroll
        for (int r = 0; r < 2; ++r) next[r][u] = load_once(ahead[r] + words_of_codes * u);
      }
    }
    // Chunks beyond the last whole group, each by a warp of its own.
    if (const int c = group * groups + (warp() + warps - groups % warps) % warps; c < chunks)
      multiply_chunk(own_pairs, load_once(codes[0] + words_of_codes * c), load_once(codes[1] + words_of_codes * c), tokens, c,
                     scale_of(fetch_scale(0, c)), scale_of(fetch_scale(1, c)), sums);
    sync_block();  // the table is done with: its memory takes the sums
    write_sums(table.template from<float>(0), first_row, sums);
  }

  /// The first code of a byte is its high half, and goes to the low half of a fragment's word.
  __device__ static void fill_tables(const Shared<std::uint32_t>& table, const Shared<float>& second_level) {
    for (int i = thread(); i < table_words / 4; i += threads) {
      const int byte = 4 * i / warp_size;
      const std::uint32_t pair = pack<T>(values<Format>.at[byte >> 4], values<Format>.at[byte & 15]);
      table.template from<Words<4>>(4 * i).store(0, {{pair, pair, pair, pair}});
    }
    if constexpr (Scales::nested)
      for (int i = thread(); i < 256; i += threads) second_level.store(i, values<typename Scales::SecondLevel>.at[i]);
  }

  /// The warps share the ranks; what they read is on its way beside the first codes.
  __device__ void add_adapter(Index first_row, Sums& sums) const {
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll 2
    for (Index rank = warp(); rank < adapter.u.cols; rank += warps) {
      float b[2];
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Index row = first_row + g + 8 * r;
        b[r] = row < w.rows ? load(adapter.b.row(rank) + row) : 0.0f;
      }
#pragma unroll
      for (int i = 0; i < token_tiles; ++i)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const Index token = 8 * i + 2 * t + c;
          const float u = token < x.rows ? load(adapter.u.row(token) + rank) : 0.0f;
          sums[i][c] += b[0] * u;
          sums[i][2 + c] += b[1] * u;
        }
    }
  }

  /// sums += scale of the row * x . the chunk's weights, for rows g and g + 8.
  __device__ static void multiply_chunk(const LookUpTable& own_pairs, const Words<2>& codes0, const Words<2>& codes1,
                                        const Words<4>* const (&tokens)[token_tiles], int c, float scale0, float scale1, Sums& sums) {
    Sums partial = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Words<4> x[token_tiles];
#pragma unroll
      for (int i = 0; i < token_tiles; ++i) x[i] = load(tokens[i] + words_of_x * c + half);
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const auto pair = [&](const Words<2>& codes, int which) {
          return own_pairs.load(byte_of(codes.word[half], 2 * step + which) * warp_size);
        };
        const Words<4> a{{pair(codes0, 0), pair(codes1, 0), pair(codes0, 1), pair(codes1, 1)}};
#pragma unroll
        for (int i = 0; i < token_tiles; ++i)
          multiply_add<T>(partial[i], a, Words<2>{{x[i].word[2 * step], x[i].word[2 * step + 1]}});
      }
    }
#pragma unroll
    for (int i = 0; i < token_tiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j) sums[i][j] += (j < 2 ? scale0 : scale1) * partial[i][j];
  }

  /// Adds the warps' sums in order. They are written without a conflict of banks, and read with one of two lanes at most.
  __device__ void write_sums(const Shared<float>& memory, Index first_row, const Sums& sums) const {
    constexpr int warp_sums = 8 * token_tiles * padded_rows;
    const int g = lane() / 4, t = lane() % 4;
#pragma unroll
    for (int i = 0; i < token_tiles; ++i)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        memory.store(warp() * warp_sums + (8 * i + 2 * t + j % 2) * padded_rows + g + j / 2 * 8, sums[i][j]);
    sync_block();
    for (int o = thread(); o < 8 * token_tiles * rows; o += threads) {
      const int token = o / rows;
      const Index row = first_row + o % rows;
      if (token >= y.rows || row >= y.cols) continue;
      float sum = 0.0f;
#pragma unroll
      for (int source = 0; source < warps; ++source) sum += memory.load(source * warp_sums + token * padded_rows + o % rows);
      write(y, token, row, update == Update::accumulate ? read(y, token, row) + sum : sum);
    }
  }
};

}  // namespace device

namespace detail {

template <class W, class X, class Y>
concept FusedTypes = requires { requires W::format::bits == 4; } && SixteenBits<X> && (std::same_as<Y, X> || std::same_as<Y, float>);

/// Whether the layout of w is one that SmallBatch reads.
template <class W>
bool has_whole_chunks(const W& w) noexcept {
  constexpr Index most_chunks = Index{1} << 32;
  return w.cols > 0 && w.cols % 64 == 0 && w.block_size >= 64 && w.rows * (w.cols / 64) <= most_chunks &&
         reinterpret_cast<std::uintptr_t>(w.codes) % 16 == 0;
}

/// y (+)= x . w^T + the adapter's term, at most 32 tokens, of a w that has_whole_chunks. Unaligned x is copied first.
template <CodeFormat Format, class Scales, class T, class Y>
  requires FusedTypes<QuantizedView<Format, Scales>, T, Y>
void multiply_small_batch(const CudaContext& context, MatrixView<const T> x, const QuantizedView<Format, Scales>& w, MatrixView<Y> y,
                          Update update, const AdapterTerm& adapter = {}) {
  QDYLORA_EXPECTS(x.rows <= 32, bad_argument, "small batch: " + std::to_string(x.rows) + " tokens are more than 32");
  Scratch scratch(context);
  if (reinterpret_cast<std::uintptr_t>(x.data) % 16 != 0 || (x.rows > 1 && x.stride % 8 != 0)) {
    const MatrixView<T> aligned(scratch.take<T>(x.rows * x.cols), x.rows, x.cols);
    convert(context, x, aligned);
    x = aligned;
  }
  const int block_shift = std::countr_zero(static_cast<std::size_t>(w.block_size)) - 6;
  const auto go = [&]<int token_tiles>(std::integral_constant<int, token_tiles>) {
    using Kernel = device::SmallBatch<Format, Scales, T, Y, token_tiles>;
    const auto blocks = static_cast<unsigned>((w.rows + Kernel::rows - 1) / Kernel::rows);
    device::launch({context.stream(), blocks, Kernel::shared_bytes}, Kernel{w, x, y, adapter, update, block_shift});
  };
  if (x.rows <= 8) go(std::integral_constant<int, 1>{});
  else if (x.rows <= 16) go(std::integral_constant<int, 2>{});
  else go(std::integral_constant<int, 4>{});
}

}  // namespace detail
}  // namespace qdylora
