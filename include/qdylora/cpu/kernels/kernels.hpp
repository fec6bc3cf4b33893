// The CPU kernels behind tables, one per instruction set: of dense arithmetic in float and double, and of products with quantized weights.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <utility>

#include <qdylora/backend.hpp>
#include <qdylora/cpu/kernels/coded_weight.hpp>
#include <qdylora/cpu/kernels/isa.hpp>
#include <qdylora/quant/binary_code.hpp>

namespace qdylora::detail {

/// Outputs that stand side by side in a panel, the form in which products take a weight: [depth][panel_width].
inline constexpr Index panel_width = 32;

inline constexpr Index panel_cells = 128;  // of a sum, decoded at a time: with 32 outputs 16 KiB
inline constexpr Index token_block = 112;  // tokens that pass over the panels of a task together: a multiple of the tiles' rows
inline constexpr Index token_group = 512;  // tokens of a task: a quantized weight is decoded once for so many
inline constexpr Index panel_batch = 4;    // panels that may be filled together: those of a line of 4-bit codes

/// A row of planes of signs (quant/binary_code.hpp).
template <class S>
struct SignRow {
  Index planes = 0, columns_of_group = 0;
  const std::uint8_t* bits[most_planes] = {};
  const S* scales[most_planes] = {};  // of its groups
};

template <class S>
struct KernelTable {
  /// c[m, n] (+)= sum_k a[m * a_row + k * a_depth] * b[k * b_depth + n]
  void (*gemm)(Index m, Index n, Index depth, const S* a, Index a_row, Index a_depth, const S* b, Index b_depth, S* c, Index c_row,
               bool accumulate);
  /// out[j * out_row + i] = x[i * x_row + j], i < rows, j < cols; zero for the i that fill up the last 16 of a row of out.
  void (*transpose)(Index rows, Index cols, const S* x, Index x_row, S* out, Index out_row);
  // with planes of signs: kernels/signs.inc
  /// out[j - begin] = the number in column j, begin <= j < end, plane after plane; begin is a multiple of 8.
  void (*decode_signs)(const SignRow<S>& row, Index begin, Index end, S* out);
  /// out[m] = the sum over the same columns j of number times x[m][j], of 1 and 4 tokens.
  void (*sign_dots[2])(const SignRow<S>& row, Index begin, Index end, const S* x, Index x_row, S* out);
  // along rows: kernels/rows.inc
  S (*dot)(Index count, const S* a, const S* b);
  double (*squares)(Index count, const S* x);
  double (*triple_products)(Index count, const S* a, const S* b, const S* c);
  S (*largest)(Index count, const S* x);
  S (*exp_sum)(Index count, S* x, S scale, S shift);
  void (*softmax_backward)(Index count, const S* p, S delta, S scale, S* dx);
  void (*scale)(Index count, S factor, S* x);
  void (*add)(Index count, const S* x, S* y);
  void (*widen)(Index count, const bfloat16* x, S* y);
  void (*narrow)(Index count, const S* x, bfloat16* y);
  void (*multiply)(Index count, const S* a, const S* b, S* y);
  void (*normalize)(Index count, const S* x, S r, const S* w, S* y);
  void (*normalize_backward)(Index count, const S* dy, const S* x, const S* w, S r, S mean, S* dx, bool accumulate);
  void (*swiglu)(Index count, const S* gate, const S* up, S* y);
  void (*swiglu_backward)(Index count, const S* dy, const S* gate, const S* up, S* dgate, S* dup);
  void (*gelu)(Index count, const S* x, S* y);
  void (*gelu_backward)(Index count, const S* dy, const S* x, S* dx);
  void (*adamw)(Index count, const UpdateRow<S>& row, S* p, const S* gradient, S* m, S* v);
  void (*lion)(Index count, const UpdateRow<S>& row, S* p, const S* gradient, S* m);
};

inline constexpr Index few_tile[3] = {1, 4, 16};

/// Forward products of few tokens in one class of arithmetic, by 1, 4 or 16 tokens (kernels/few.inc). Empty where the set has none.
struct FewKernels {
  Index most = 0;              // tokens that go without panels, at most
  std::size_t cell_bytes = 0;  // of x, for each token and step
  Index steps = 0;             // in eight elements
  Index unit = 0;              // elements that share a scale of x, at most the block size
  /// One token's x as cells, and their scales and starts.
  void (*row)(const float* x, Index dwords, Index block_size, void* cells, float* scales, std::int32_t* starts) = nullptr;
  /// The same of a token alone; it may have a scale and a start for every eight elements, and fill up the last 128.
  void (*single)(const float* x, Index dwords, Index block_size, void* cells, float* scales, std::int32_t* starts) = nullptr;
  /// Rows of cells to cells[i * tokens + m].
  void (*interleave[3])(const void* rows, Index stride, Index tokens, Index count, void* cells) = {};
  void (*forward[3])(const CodedWeight&, const float* row_scales, Index row, Index rows, Index from, Index to, const std::uint8_t* ahead,
                     const void* cells, const float* scales, const std::int32_t* starts, float* workspace,
                     float* total) = {};  // the last where a set has registers for it
  explicit operator bool() const noexcept { return steps > 0; }
};

/// Bytes that codes read in their order are fetched before their turn.
inline constexpr Index codes_ahead = 8192;

/// Columns that the backward products of few tokens take at a time where a set's registers and caches hold the sums of no more.
inline constexpr Index few_strip = 512;

/// Products of panels in 16 bits. `numbers` consecutive ones of a sum take `cells` cells, in a row of x and, [cells][panel_width] of them, in a
/// panel; the last are filled up with zeros.
struct CellKernels {
  Index numbers = 0, cells = 0;
  /// Of 4-bit weights in whole blocks of at least `numbers`, backward up to panel_batch panels. Without a kernel, panels of floats are rounded.
  void (*forward)(const CodedWeight&, const float* row_scales, Index row, Index rows, Index col, Index depth, std::uint32_t* out) = nullptr;
  void (*backward)(const CodedWeight&, const float* all_scales, Index row, Index depth, Index col, Index panels, std::uint32_t* out,
                   Index apart) = nullptr;
  /// The same of codes that are numbers, of whole blocks.
  void (*forward_numbers)(const CodedWeight&, Index row, Index rows, Index col, Index depth, std::uint32_t* out) = nullptr;
  void (*backward_numbers)(const CodedWeight&, Index row, Index depth, Index col, std::uint32_t* out) = nullptr;
  /// Of floats [depth][panel_width], rows x_row apart.
  void (*round_panel)(const float* x, Index x_row, Index depth, std::uint32_t* out) = nullptr;
  void (*round)(const float* x, Index count, std::uint32_t* out) = nullptr;
  void (*gemm)(Index m, Index n, Index depth, const std::uint32_t* a, Index a_row, Index a_depth, const std::uint32_t* b, Index b_depth,
               float* c, Index c_row, bool accumulate) = nullptr;
  Index x_rows = 1;  // that stand side by side: cell k of row i at i / x_rows * x_rows * a_row + k * x_rows + i % x_rows
  Index gradient_rows = 64;  // of a weight's gradient at least: x is rounded for few as for many
  Index panel = panel_cells;  // cells of a sum that are decoded at a time
  Index block = token_block;
  Index batch = 1;  // panels that are filled before products of them start
  Index rows_for_wide_tasks = std::numeric_limits<Index>::max();  // of x: where reading them takes longer than products do
  void (*begin_tiles)() = nullptr, (*end_tiles)() = nullptr;  // around gemm, and that of TileKernels, on each thread; null where there are none
  explicit operator bool() const noexcept { return gemm != nullptr; }
  Index cells_of(Index depth) const noexcept { return (depth + numbers - 1) / numbers * cells; }
};

/// Cells of 16-bit integers: 64 numbers of a sum are a unit of 33 cells, 32 with two integers each, the first in the low half, and one with the
/// float that their sum is multiplied with. Integers reach 5792, those of codes' values as much, so that 64 products fit a sum.
inline constexpr Index word_unit = 64, word_cells = 33;
inline constexpr float largest_word = 5792.0f, largest_weight_word = 5068.0f;  // 5792 at largest_code_value

/// Products of panels of bytes: weights unsigned, x signed, as few_int8 makes it.
struct ByteKernels {
  void (*forward)(const CodedWeight&, const float* row_scales, Index row, Index rows, Index col, Index depth, std::uint32_t* out,
                  float* scales) = nullptr;
  void (*gemm)(Index m, Index units, Index cells, const std::uint32_t* a, Index a_row, const float* a_scale, const std::int32_t* a_start,
               Index unit_row, const std::uint32_t* b, const float* b_scale, float* c, Index c_row, bool accumulate) = nullptr;
  Index x_rows = 1;  // of cells, scales and starts, as in CellKernels
  explicit operator bool() const noexcept { return gemm != nullptr; }
};

/// Products of 4-bit weights of whole blocks with x^T, in the cells of CellKernels: 32 rows of the weight on the left, 16 rows of x side by side on
/// the right. What a weight is decoded to stands in the order of its codes, which need not be turned.
struct TileKernels {
  void (*decode)(const CodedWeight&, const float* row_scales, Index row, Index rows, Index col, Index depth, std::uint32_t* out) = nullptr;
  /// Up to 16 rows of x.
  void (*round)(const float* x, Index x_row, Index rows, Index depth, std::uint32_t* out) = nullptr;
  /// Meanwhile fetches from `ahead` on an eighth of what such a product takes of x.
  void (*gemm)(Index tokens, Index depth, const std::uint32_t* decoded, const std::uint32_t* x, Index x_group, float* c, Index c_row,
               bool accumulate, const std::uint32_t* ahead) = nullptr;
  explicit operator bool() const noexcept { return gemm != nullptr; }
};

struct CodeKernels {
  void (*scales)(const CodedWeight&, Index first, Index count, float* out);
  void (*decode)(const CodedWeight&, Index begin, Index count, float* out);
  float (*encode)(const float* x, Index count, bool partial, const float* thresholds, Index number, const std::uint8_t* ascending,
                  std::uint8_t* out);
  void (*forward_panel)(const CodedWeight&, const float* row_scales, Index row, Index rows, Index col, Index depth, float* out);
  void (*backward_panel)(const CodedWeight&, const float* all_scales, Index row, Index depth, Index col, Index cols, float* out);
  void (*dense_panel)(const float* w, Index stride, Index rows, Index depth, float* out);
  void (*number_dots[2])(const CodedWeight&, Index row, Index rows, const float* x, Index x_row, float* out);  // of 1 and 4 tokens
  void (*few_backward[3])(const CodedWeight&, const float* all_scales, Index begin, Index end, Index col, Index width, const float* dy,
                          float* total);
  Index few_columns[3];  // that few_backward takes at once, at most: memory likes long runs
  FewKernels few_float32, few_bits16, few_int8;
  CellKernels bits16;
  TileKernels tiles;
  ByteKernels bytes;
};

namespace generic {
#define QDYLORA_VECTOR_BYTES 16
#define QDYLORA_TILE_ROWS 4
#define QDYLORA_TILE_VECTORS 2
#include <qdylora/cpu/kernels/body.inc>
#include <qdylora/cpu/kernels/generic.inc>
#include <qdylora/cpu/kernels/signs.inc>
#include <qdylora/cpu/kernels/rows.inc>
#include <qdylora/cpu/kernels/codes.inc>
#undef QDYLORA_VECTOR_BYTES
#undef QDYLORA_TILE_ROWS
#undef QDYLORA_TILE_VECTORS
inline constexpr CodeKernels code_table = own_code_table;
}  // namespace generic

#if defined(QDYLORA_X86_TARGETS)
QDYLORA_TARGET_BEGIN(QDYLORA_AVX2)
namespace avx2 {
#define QDYLORA_VECTOR_BYTES 32
#define QDYLORA_TILE_ROWS 6
#define QDYLORA_TILE_VECTORS 2
#include <qdylora/cpu/kernels/body.inc>
#include <qdylora/cpu/kernels/avx2.inc>
#include <qdylora/cpu/kernels/signs.inc>
#include <qdylora/cpu/kernels/rows.inc>
#include <qdylora/cpu/kernels/codes.inc>
#include <qdylora/cpu/kernels/few.inc>
#include <qdylora/cpu/kernels/avx2_words.inc>
#include <qdylora/cpu/kernels/avx2_bytes.inc>
#undef QDYLORA_VECTOR_BYTES
#undef QDYLORA_TILE_ROWS
#undef QDYLORA_TILE_VECTORS
inline constexpr CodeKernels code_table = [] {
  CodeKernels table = own_code_table;
  table.few_float32 = few_kernels<FewFloat32>(8);
  table.few_bits16 = few_kernels<FewInt16>(8);
  table.few_int8 = few_kernels<FewInt8>(8);
  table.bits16 = {word_unit, word_cells, word_columns, nullptr, nullptr, nullptr, word_panel, words, word_gemm, x_rows};
  table.bytes = {byte_columns, byte_gemm, x_rows};
  return table;
}();
}  // namespace avx2
QDYLORA_TARGET_END

QDYLORA_TARGET_BEGIN(QDYLORA_AVX512)
namespace avx512 {
#define QDYLORA_VECTOR_BYTES 64
#define QDYLORA_TILE_ROWS 14
#define QDYLORA_TILE_VECTORS 2
#include <qdylora/cpu/kernels/body.inc>
#include <qdylora/cpu/kernels/avx512.inc>
#include <qdylora/cpu/kernels/signs.inc>
#include <qdylora/cpu/kernels/rows.inc>
#include <qdylora/cpu/kernels/avx512_gather.inc>
#include <qdylora/cpu/kernels/avx512_backward.inc>
#include <qdylora/cpu/kernels/codes.inc>
#include <qdylora/cpu/kernels/few.inc>
inline constexpr CodeKernels code_table = [] {
  CodeKernels table = own_code_table;
  table.few_float32 = few_kernels<FewFloat32>();
  return table;
}();
}  // namespace avx512
QDYLORA_TARGET_END

QDYLORA_TARGET_BEGIN(QDYLORA_AVX512_VNNI)
namespace avx512_vnni {
using avx512::bytes_in_order, avx512::chunk_dwords, avx512::code_columns, avx512::code_octets, avx512::Codes, avx512::first_lanes;
using avx512::few_backward, avx512::few_columns, avx512::Fma, avx512::gemm, avx512::has_columns, avx512::lane_sum, avx512::lanes;
using avx512::numbers_in_order, avx512::rounded_product, avx512::transpose_rows, avx512::Vec;
#include <qdylora/cpu/kernels/avx512_vnni.inc>
#include <qdylora/cpu/kernels/codes.inc>
#include <qdylora/cpu/kernels/few.inc>
inline constexpr CodeKernels code_table = [] {
  CodeKernels table = own_code_table;
  table.few_float32 = avx512::code_table.few_float32;
  table.few_bits16 = few_kernels<FewInt16>();
  table.few_int8 = few_kernels<FewInt8>();
  table.bits16 = {word_unit, word_cells, word_columns, nullptr, nullptr, nullptr, word_panel, words, word_gemm};
  table.bytes = {byte_columns, byte_gemm};
  return table;
}();
}  // namespace avx512_vnni
QDYLORA_TARGET_END

QDYLORA_TARGET_BEGIN(QDYLORA_AVX512_BF16)
namespace avx512_bf16 {
#include <qdylora/cpu/kernels/body.inc>
using avx512::chunk_dwords, avx512::code_columns, avx512::code_octets, avx512::Codes, avx512::first_lanes, avx512::lanes, avx512::transpose_rows;
using avx512_vnni::load, avx512_vnni::store, avx512_vnni::V;
#include <qdylora/cpu/kernels/columns.inc>
#include <qdylora/cpu/kernels/avx512_bf16.inc>
#include <qdylora/cpu/kernels/few.inc>
#undef QDYLORA_VECTOR_BYTES
#undef QDYLORA_TILE_ROWS
#undef QDYLORA_TILE_VECTORS
inline constexpr CodeKernels code_table = [] {
  CodeKernels table = avx512_vnni::code_table;
  table.few_bits16 = few_kernels<FewBfloat16>();
  table.bits16 = {.numbers = 2,
                  .cells = 1,
                  .forward = columns,
                  .backward = backward_pairs,
                  .forward_numbers = number_columns,
                  .backward_numbers = number_pairs,
                  .round_panel = pair_rows,
                  .round = to_bfloat16,
                  .gemm = gemm<PairDot>,
                  .gradient_rows = 32,
                  .rows_for_wide_tasks = 256};
  return table;
}();
}  // namespace avx512_bf16
QDYLORA_TARGET_END

QDYLORA_TARGET_BEGIN(QDYLORA_AMX)
namespace amx {
#include <qdylora/cpu/kernels/amx.inc>
inline constexpr CodeKernels code_table = [] {
  CodeKernels table = avx512_vnni::code_table;
  table.bits16 = {.numbers = 2 * tile_cells,
                  .cells = tile_cells,
                  .forward = avx512_bf16::columns,
                  .backward = backward_pairs,
                  .forward_numbers = avx512_bf16::number_columns,
                  .backward_numbers = number_pairs,
                  .round_panel = pair_rows,
                  .round = to_bfloat16,
                  .gemm = tile_gemm,
                  .gradient_rows = 32,
                  .panel = 2 * panel_cells,
                  .block = token_group,
                  .batch = panel_batch,
                  .rows_for_wide_tasks = 128,
                  .begin_tiles = begin_tiles,
                  .end_tiles = end_tiles};
  table.tiles = {rows_as_tiles, x_as_tiles, rows_gemm};
  table.few_bits16.most = 4;
  return table;
}();
}  // namespace amx
QDYLORA_TARGET_END
#endif

template <class S>
const KernelTable<S>& kernels(Isa isa) noexcept {
#if defined(QDYLORA_X86_TARGETS)
  if (isa >= Isa::avx512) return avx512::table<S>;
  if (isa == Isa::avx2) return avx2::table<S>;
#endif
  static_cast<void>(isa);
  return generic::table<S>;
}

inline const CodeKernels& code_kernels(Isa isa) noexcept {
#if defined(QDYLORA_X86_TARGETS)
  switch (isa) {
    case Isa::amx: return amx::code_table;
    case Isa::avx512_bf16: return avx512_bf16::code_table;
    case Isa::avx512_vnni: return avx512_vnni::code_table;
    case Isa::avx512: return avx512::code_table;
    case Isa::avx2: return avx2::code_table;
    case Isa::generic: break;
  }
#endif
  static_cast<void>(isa);
  return generic::code_table;
}

}  // namespace qdylora::detail
