// Products of 4-bit weights with up to 32 tokens, decoded on the way into the tensor cores (coded_fragments.cuh). A weight is read once, as
// it is stored.
//
// A block makes 16 outputs of every token; its warps share the row, a group of four chunks at a time, and add their sums in order. Blocks
// do not share a row: where a weight has so few rows that processors stay idle, a second launch would cost more than they could save.
//
// An adapter comes in the same launch. Where there is an a, the first blocks make u = x . a^T, each of two ranks and eight tokens: as much to
// read as 16 rows of codes. The others wait for it when they have their own sums, and add scale * u . b. A launch of its own for u would take
// as long as a small layer's product.
#pragma once

#include <bit>
#include <cstdint>
#include <string>
#include <type_traits>

#include <qdylora/backend.hpp>
#include <qdylora/cuda/coded_fragments.cuh>
#include <qdylora/cuda/few_tokens.cuh>
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
  // Two, where ptxas would spill a few registers to make room for a third; of more tokens, it spills where it is asked for two.
  static constexpr int least_blocks = token_tiles == 1 && !is_sm90 ? 2 : 0;
  static constexpr int projected_ranks = 2, projected_tokens = 8;  // of u, a block

  QuantizedView<Format, Scales> w;
  MatrixView<const T> x;
  MatrixView<Y> y;
  AdapterTerm<T> adapter;
  Update update;
  int block_shift;         // log2(chunks in a block)
  int projections;         // blocks that make u, the first ones
  std::uint32_t* signals;  // where there are such; zero

  using Sums = float[1][token_tiles][4];  // of one pair of rows a lane

  __device__ void operator()(SharedMemory memory) const {
    if constexpr (is_sm80) {
      if (static_cast<int>(block().x) < projections) project(memory);
      else multiply(memory);
    }
  }

 private:
  __device__ void multiply(SharedMemory memory) const {
    const auto table = memory.take<std::uint32_t>(pair_table_words);
    const auto second_level = memory.take<float>(256);
    const LookUpTable pairs(table.from(lane()));
    const int g = lane() / 4, t = lane() % 4;
    const Index first_row = (static_cast<Index>(block().x) - projections) * rows;
    const int chunks = static_cast<int>(w.cols / chunk_elements), groups = chunks / group;
    int at = warp();

    // Beyond the last row, and the last token, lanes repeat it: their sums are dropped.
    const auto row_of = [&](int r) { return first_row + g + 8 * r < w.rows ? first_row + g + 8 * r : w.rows - 1; };
    const Words<2>* const codes = reinterpret_cast<const Words<2>*>(w.codes + row_of(0) * (w.cols / 2)) + t;
    const int row_words[] = {0, static_cast<int>(row_of(1) - row_of(0)) * chunk_code_words * chunks};  // from the first row on
    const std::uint32_t row_chunk[] = {static_cast<std::uint32_t>(row_of(0) * chunks), static_cast<std::uint32_t>(row_of(1) * chunks)};
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
    const Words<2>* ahead = codes + chunk_code_words * group * at;
    if (at < groups) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
#pragma unroll
        for (int u = 0; u < group; ++u) next[r][u] = load_once(ahead + row_words[r] + chunk_code_words * u);
        pending[r] = fetch_scale(r, group * at + t);
      }
    }
    fill_code_tables<Format, Scales, T, threads>(table, second_level);
    Sums sums = {};
    sync_block();

    const auto multiply_group = [&](auto more) {
      const float scale[2] = {scale_of(pending[0]), scale_of(pending[1])};
      ahead += chunk_code_words * group * warps;
#pragma unroll
      for (int r = 0; r < 2; ++r)
        if (more) pending[r] = fetch_scale(r, group * (at + warps) + t);
#pragma unroll
      for (int u = 0; u < group; ++u) {
        const CodedRows row_pair[] = {{{next[0][u], next[1][u]}, {shuffle(scale[0], u, 4), shuffle(scale[1], u, 4)}}};
        multiply_chunk<T>(pairs, row_pair, x_of(group * at + u), sums);
#pragma unroll
        for (int r = 0; r < 2; ++r)
          if (more) next[r][u] = load_once(ahead + row_words[r] + chunk_code_words * u);
      }
    };
    for (; at + warps < groups; at += warps) multiply_group(std::true_type{});
    // Of more tokens, registers are short until the sums are there.
    AdapterRanks ranks = {};
    if (token_tiles == 1 && adapter.u.cols > 0) ranks = fetch_ranks(first_row, warp());
    if (at < groups) multiply_group(std::false_type{});
    // Chunks beyond the last whole group, each by a warp of its own.
    if (const int c = group * groups + (warp() + warps - groups % warps) % warps; c < chunks) {
      const CodedRows row_pair[] = {{{load_once(codes + chunk_code_words * c), load_once(codes + row_words[1] + chunk_code_words * c)},
                                     {scale_of(fetch_scale(0, c)), scale_of(fetch_scale(1, c))}}};
      multiply_chunk<T>(pairs, row_pair, x_of(c), sums);
    }
    if (token_tiles > 1 && adapter.u.cols > 0) ranks = fetch_ranks(first_row, warp());
    add_adapter(first_row, ranks, sums);
    sync_block();  // the table is done with: its memory takes the sums
    write_sums(table.template from<float>(0), first_row, sums);
    // The last block to have seen that u is there leaves the count as it was.
    if (projections > 0 && thread() == 0 && count_up(signals) == grid().x - 1) set_count(signals, 0);
  }

  /// Two ranks of u, by half of the warps each, for some of the tokens.
  __device__ void project(SharedMemory memory) const {
    if (x.rows == 1) project<1>(memory);
    else project<projected_tokens>(memory);
  }
  template <int tokens>
  __device__ void project(SharedMemory memory) const {
    constexpr int sharing = threads / projected_ranks, sharing_warps = sharing / warp_size;
    const auto sums = memory.take<float>(warps * tokens);
    const int token_groups = static_cast<int>((x.rows + tokens - 1) / tokens);
    const Index first_rank = static_cast<Index>(block().x) / token_groups * projected_ranks, own_rank = first_rank + thread() / sharing;
    const Index first = static_cast<Index>(block().x) % token_groups * tokens;
    const int count = x.rows - first < tokens ? static_cast<int>(x.rows - first) : tokens;
    float sum[tokens] = {};
    if (own_rank < adapter.a.rows) add_share_of_row<8, sharing>(x, first, count, adapter.a.row(own_rank), thread() % sharing, sum);
#pragma unroll
    for (int t = 0; t < tokens; ++t) {
      sum[t] = sum_warp(sum[t]);
      if (lane() == 0) sums.store(warp() * tokens + t, sum[t]);
    }
    sync_block();
    const int half = thread() / tokens, t = thread() % tokens;
    if (half < projected_ranks && first_rank + half < adapter.a.rows && t < count) {
      float total = 0.0f;
#pragma unroll
      for (int part = 0; part < sharing_warps; ++part) total += sums.load((half * sharing_warps + part) * tokens + t);
      store(adapter.u.row(first + t) + first_rank + half, total);
    }
    sync_block();
    if (thread() == 0) signal(signals);
  }

  static constexpr int adapter_ranks = token_tiles == 1 ? 8 : 2;  // of a warp's, on their way at once

  /// What two rows' outputs have of b: raw, as they are loaded, since to widen a number is to wait for it.
  struct AdapterRanks {
    std::uint16_t bits[adapter_ranks][2];
  };
  /// Of ranks first, first + warps ... Beyond the last rank, and the last row, others are taken again, which add nothing.
  __device__ AdapterRanks fetch_ranks(Index first_row, int first) const {
    AdapterRanks found;
    const int g = lane() / 4, ranks = static_cast<int>(adapter.b.rows);
    const int own_rows = static_cast<int>(w.rows - first_row) - g;
    const std::uint16_t* const b = reinterpret_cast<const std::uint16_t*>(adapter.b.data + first_row);
#pragma unroll
    for (int i = 0; i < adapter_ranks; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const Index rank = first + i * warps < ranks ? first + i * warps : ranks - 1;
        found.bits[i][r] = load(b + rank * adapter.b.stride + (8 * r < own_rows ? g + 8 * r : 0));
      }
    return found;
  }

  /// The warps share the ranks, of which `next` has the first ones.
  __device__ void add_adapter(Index first_row, AdapterRanks next, Sums& sums) const {
    const int t = lane() % 4, ranks = static_cast<int>(adapter.u.cols);
    if (projections > 0) {
      if (thread() == 0) await(signals, static_cast<std::uint32_t>(projections));
      sync_block();
    }
#pragma unroll 1
    for (int first = warp(); first < ranks; first += adapter_ranks * warps) {
      float b[adapter_ranks][2], u[adapter_ranks][token_tiles][2];
#pragma unroll
      for (int j = 0; j < token_tiles; ++j)
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const int token = 8 * j + 2 * t + c;
          const float* const own_u = adapter.u.row(token) + first;
#pragma unroll
          for (int i = 0; i < adapter_ranks; ++i) u[i][j][c] = first + i * warps < ranks && token < x.rows ? load(own_u + i * warps) : 0.0f;
        }
#pragma unroll
      for (int i = 0; i < adapter_ranks; ++i)
#pragma unroll
        for (int r = 0; r < 2; ++r) {
          const float number = widen(std::bit_cast<T>(not_before(next.bits[i][r])));
          b[i][r] = first + i * warps < ranks ? number : 0.0f;
        }
      if (first + adapter_ranks * warps < ranks) next = fetch_ranks(first_row, first + adapter_ranks * warps);
#pragma unroll
      for (int i = 0; i < adapter_ranks; ++i)
#pragma unroll
        for (int j = 0; j < token_tiles; ++j)
#pragma unroll
          for (int c = 0; c < 2; ++c)
#pragma unroll
            for (int r = 0; r < 2; ++r) sums[0][j][2 * r + c] += b[i][r] * (adapter.scale * u[i][j][c]);
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
        memory.store(warp() * warp_sums + (8 * i + 2 * t + j % 2) * padded_rows + g + j / 2 * 8, sums[0][i][j]);
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
  if (has_aligned_rows<8>(x)) return x;
  const MatrixView<T> copy(scratch.take<T>(x.rows * x.cols), x.rows, x.cols);
  convert(context, x, copy);
  return copy;
}

/// y (+)= x . w^T + the adapter's term, at most 32 tokens, of a w that has_whole_chunks.
template <CodeFormat Format, class Scales, class T, class Y>
  requires FusedTypes<QuantizedView<Format, Scales>, T, Y>
void multiply_small_batch(const CudaContext& context, MatrixView<const T> x, const QuantizedView<Format, Scales>& w, MatrixView<Y> y,
                          Update update, const std::type_identity_t<AdapterTerm<T>>& adapter = {}) {
  QDYLORA_EXPECTS(x.rows <= 32, bad_argument, "small batch: " + std::to_string(x.rows) + " tokens are more than 32");
  Scratch scratch(context);
  x = aligned_rows(context, scratch, x);
  const int block_shift = std::countr_zero(static_cast<std::size_t>(w.block_size)) - 6;
  const bool apart = !has_aligned_rows<8>(adapter.a);  // then u is made before
  if (apart) multiply_few(context, x, adapter.a, adapter.u, Update::overwrite);
  const auto go = [&]<int token_tiles>(std::integral_constant<int, token_tiles>) {
    using Kernel = device::SmallBatch<Format, Scales, T, Y, token_tiles>;
    const Index projections = apart ? 0 : div_up(adapter.a.rows, Kernel::projected_ranks) * div_up(x.rows, Kernel::projected_tokens);
    const auto blocks = static_cast<unsigned>(projections + div_up(w.rows, Kernel::rows));
    device::launch({context.stream(), blocks, Kernel::shared_bytes},
                   Kernel{w, x, y, adapter, update, block_shift, static_cast<int>(projections), context.signals()});
  };
  if (x.rows <= 8) go(std::integral_constant<int, 1>{});
  else if (x.rows <= 16) go(std::integral_constant<int, 2>{});
  else go(std::integral_constant<int, 4>{});
}

}  // namespace detail
#endif
}  // namespace qdylora
