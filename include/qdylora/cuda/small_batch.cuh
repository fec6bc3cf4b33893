// Products of 4-bit weights with up to 32 tokens, decoded on the way into the tensor cores (coded_fragments.cuh). A weight is read once, as
// it is stored.
//
// A block makes 16 outputs of every token; its warps share the row, a group of four chunks at a time, and add their sums in order. Blocks
// do not share a row: where a weight has so few rows that processors stay idle, a second launch would cost more than they could save.
#pragma once

#include <bit>
#include <cstdint>
#include <string>
#include <type_traits>

#include <qdylora/backend.hpp>
#include <qdylora/cuda/coded_fragments.cuh>
#include <qdylora/cuda/for_each.cuh>
#include <qdylora/cuda/slabs.cuh>

namespace qdylora {
namespace device {

/// y [tokens, out] (+)= x [tokens, in] . w [out, in]^T + the adapter's term, tokens <= 8 token_tiles. Rows of w are whole chunks, aligned
/// to 8 bytes, blocks are whole chunks, and rows of x are aligned to 16 bytes. sm_80
template <CodeFormat Format, class Scales, class T, class Y, int token_tiles>
struct SmallBatch {
  static constexpr int threads = 256;
  static constexpr int warps = threads / warp_size;
  static constexpr int rows = 16;
  static constexpr int group = 4;  // chunks that a warp loads at once, a line of 128 bytes of each row
  static constexpr int padded_rows = rows + 4;  // sums of one token: 2t * 20 + g mod 32 are different banks for all lanes
  static constexpr int shared_bytes = 4 * (pair_table_words + 256);
  static_assert(warps * 8 * token_tiles * padded_rows <= pair_table_words);

  QuantizedView<Format, Scales> w;
  MatrixView<const T> x;
  MatrixView<Y> y;
  AdapterTerm<float> adapter;
  Update update;
  int block_shift;  // log2(chunks in a block)

  using Sums = float[token_tiles][4];

  __device__ void operator()(SharedMemory memory) const {
    if constexpr (is_sm80) multiply(memory);
  }

 private:
  __device__ void multiply(SharedMemory memory) const {
    const auto table = memory.take<std::uint32_t>(pair_table_words);
    const auto second_level = memory.take<float>(256);
    const LookUpTable pairs(table.from(lane()));
    const int g = lane() / 4, t = lane() % 4;
    const Index first_row = static_cast<Index>(block().x) * rows;
    const int chunks = static_cast<int>(w.cols / chunk_elements), groups = chunks / group;
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
    const auto x_of = [&](int c) {
      return [&tokens, c](int i, int half) { return load(tokens[i] + chunk_x_words * c + half); };
    };
    const auto fetch_scale = [&](int r, int c) { return PendingScale<Scales>::fetch(w.scales, (row_chunk[r] + c) >> block_shift); };
    const auto scale_of = [&](const PendingScale<Scales>& pending) { return pending.value(w.scales, second_level); };

    // The first loads are on their way while the table is made. Lane t of four asks for the scale of chunk t of the group.
    Words<2> next[2][group];
    PendingScale<Scales> pending[2];
    const Words<2>* ahead[2] = {codes[0] + chunk_code_words * group * at, codes[1] + chunk_code_words * group * at};
    if (at < groups) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int u = 0; u < group; ++u) next[r][u] = load_once(ahead[r] + chunk_code_words * u);
        pending[r] = fetch_scale(r, group * at + t);
      }
    }
    fill_code_tables<Format, Scales, T, threads>(table, second_level);
    Sums sums = {};
    add_adapter(first_row, sums);
    sync_block();

    const auto multiply_group = [&](auto more) {
      const float scale[2] = {scale_of(pending[0]), scale_of(pending[1])};
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        ahead[r] += chunk_code_words * group * warps;
        if (more) pending[r] = fetch_scale(r, group * (at + warps) + t);
      }
#pragma unroll
      for (int u = 0; u < group; ++u) {
        multiply_chunk<T>(pairs, next[0][u], next[1][u], shuffle(scale[0], u, 4), shuffle(scale[1], u, 4), x_of(group * at + u), sums);
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if (more) next[r][u] = load_once(ahead[r] + chunk_code_words * u);
      }
    };
    for (; at + warps < groups; at += warps) multiply_group(std::true_type{});
    if (at < groups) multiply_group(std::false_type{});
    // Chunks beyond the last whole group, each by a warp of its own.
    if (const int c = group * groups + (warp() + warps - groups % warps) % warps; c < chunks)
      multiply_chunk<T>(pairs, load_once(codes[0] + chunk_code_words * c), load_once(codes[1] + chunk_code_words * c),
                        scale_of(fetch_scale(0, c)), scale_of(fetch_scale(1, c)), x_of(c), sums);
    sync_block();  // the table is done with: its memory takes the sums
    write_sums(table.template from<float>(0), first_row, sums);
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
          const float u = token < x.rows ? adapter.scale * load(adapter.u.row(token) + rank) : 0.0f;
          sums[i][c] += b[0] * u;
          sums[i][2 + c] += b[1] * u;
        }
    }
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

#if !defined(QDYLORA_DEVICE_ONLY)
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

/// x, or a copy of it whose rows are aligned to 16 bytes; rows of x are multiples of 16 bytes.
template <SixteenBits T>
MatrixView<const T> aligned_rows(const CudaContext& context, Scratch& scratch, MatrixView<const T> x) {
  if (reinterpret_cast<std::uintptr_t>(x.data) % 16 == 0 && (x.rows <= 1 || x.stride % 8 == 0)) return x;
  const MatrixView<T> copy(scratch.take<T>(x.rows * x.cols), x.rows, x.cols);
  convert(context, x, copy);
  return copy;
}

/// y (+)= x . w^T + the adapter's term, at most 32 tokens, of a w that has_whole_chunks.
template <CodeFormat Format, class Scales, class T, class Y>
  requires FusedTypes<QuantizedView<Format, Scales>, T, Y>
void multiply_small_batch(const CudaContext& context, MatrixView<const T> x, const QuantizedView<Format, Scales>& w, MatrixView<Y> y,
                          Update update, const AdapterTerm<float>& adapter = {}) {
  QDYLORA_EXPECTS(x.rows <= 32, bad_argument, "small batch: " + std::to_string(x.rows) + " tokens are more than 32");
  Scratch scratch(context);
  x = aligned_rows(context, scratch, x);
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
#endif
}  // namespace qdylora
