// The block types of ggml (github.com/ggml-org/ggml, src/ggml-common.h and ggml-quants.c), as GGUF files store them: sizes of all
// weight types, and decoding to float of those that published Llama models of everyday quality use.
//
// A row is cut into blocks of 32 or 256 elements; no block crosses a row. d, m and dmin are half precision. In every type decoded
// here scale * code has at most 24 significant bits, so it is exact in float and fused multiply-add cannot change a result.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>
#include <string_view>

#include <qdylora/core/scalar.hpp>
#include <qdylora/io/dtype.hpp>

namespace qdylora {

/// 32 x 4 bits: x = d * (q - 8). Byte j holds element j in its low and element j + 16 in its high half.
struct BlockQ4_0 {
  static constexpr Index elements = 32;
  half d;
  std::uint8_t codes[16];
};
static_assert(sizeof(BlockQ4_0) == 18);

/// 32 x 4 bits: x = d * q + m, halves as above.
struct BlockQ4_1 {
  static constexpr Index elements = 32;
  half d;
  half m;
  std::uint8_t codes[16];
};
static_assert(sizeof(BlockQ4_1) == 20);

/// 32 x 8 bits: x = d * q.
struct BlockQ8_0 {
  static constexpr Index elements = 32;
  half d;
  std::int8_t codes[32];
};
static_assert(sizeof(BlockQ8_0) == 34);

/// 256 x 4 bits in 8 groups of 32: x = d * scale[g] * q - dmin * minimum[g], scale and minimum 6 bits wide.
/// Bytes 0..3 of `scales` hold scale[0..3] in their low 6 bits, bytes 4..7 minimum[0..3]; bytes 8..11 hold the low 4 bits of
/// scale[4..7] (low half) and minimum[4..7] (high half), whose top 2 bits are the top bits of bytes 0..3 and 4..7.
/// Byte 32 * p + j of `codes` holds element j of group 2p in its low and of group 2p + 1 in its high half.
struct BlockQ4_K {
  static constexpr Index elements = 256;
  half d;
  half dmin;
  std::uint8_t scales[12];
  std::uint8_t codes[128];
};
static_assert(sizeof(BlockQ4_K) == 144);

/// 256 x 6 bits in 16 groups of 16: x = d * scale[g] * (q - 32). Each half of 128 elements is four runs of 32: run r has its low 4
/// bits in bytes 32 * (r % 2) + j of the half's 64 `low`, low or high half as r / 2 says, and its top 2 bits at bit 2r of byte j of
/// the half's 32 `high`.
struct BlockQ6_K {
  static constexpr Index elements = 256;
  std::uint8_t low[128];
  std::uint8_t high[64];
  std::int8_t scales[16];
  half d;
};
static_assert(sizeof(BlockQ6_K) == 210);

namespace detail {

inline void decode_block(const BlockQ4_0& block, float* x) {
  const float d = block.d;
  for (int j = 0; j < 16; ++j) {
    x[j] = d * static_cast<float>((block.codes[j] & 15) - 8);
    x[j + 16] = d * static_cast<float>((block.codes[j] >> 4) - 8);
  }
}

inline void decode_block(const BlockQ4_1& block, float* x) {
  const float d = block.d;
  const float m = block.m;
  for (int j = 0; j < 16; ++j) {
    x[j] = d * static_cast<float>(block.codes[j] & 15) + m;
    x[j + 16] = d * static_cast<float>(block.codes[j] >> 4) + m;
  }
}

inline void decode_block(const BlockQ8_0& block, float* x) {
  const float d = block.d;
  for (int j = 0; j < 32; ++j) x[j] = d * static_cast<float>(block.codes[j]);
}

inline void decode_block(const BlockQ4_K& block, float* x) {
  const float d = block.d;
  const float dmin = block.dmin;
  for (int group = 0; group < 8; ++group) {
    const std::uint8_t* s = block.scales;
    const int k = group & 3;
    const int scale = group < 4 ? s[k] & 63 : (s[k + 8] & 15) | ((s[k] >> 6) << 4);
    const int minimum = group < 4 ? s[k + 4] & 63 : (s[k + 8] >> 4) | ((s[k + 4] >> 6) << 4);
    const float step = d * static_cast<float>(scale);
    const float base = dmin * static_cast<float>(minimum);
    const std::uint8_t* codes = block.codes + 32 * (group / 2);
    const int shift = 4 * (group & 1);
    for (int j = 0; j < 32; ++j) x[32 * group + j] = step * static_cast<float>((codes[j] >> shift) & 15) - base;
  }
}

inline void decode_block(const BlockQ6_K& block, float* x) {
  const float d = block.d;
  for (int run = 0; run < 8; ++run) {  // four in each half
    const int r = run & 3;
    const std::uint8_t* low = block.low + 64 * (run / 4) + 32 * (r & 1);
    const std::uint8_t* high = block.high + 32 * (run / 4);
    for (int j = 0; j < 32; ++j) {
      const int q = ((low[j] >> (4 * (r / 2))) & 15) | (((high[j] >> (2 * r)) & 3) << 4);
      const float step = d * static_cast<float>(block.scales[2 * run + j / 16]);
      x[32 * run + j] = step * static_cast<float>(q - 32);
    }
  }
}

template <class Block>
void decode_blocks(const std::byte* source, Index blocks, float* target) {
  for (Index i = 0; i < blocks; ++i) {
    decode_block(from_bytes<Block>(source + i * static_cast<Index>(sizeof(Block))), target + i * Block::elements);
  }
}

template <class Block>
constexpr ElementFormat block_format() noexcept {
  return {Block::elements, static_cast<Index>(sizeof(Block)), decode_blocks<Block>};
}

}  // namespace detail

/// A tensor type of ggml: its number in files, its name, and how its blocks are stored.
struct GgmlType {
  std::uint32_t id = 0;
  std::string_view name;
  detail::ElementFormat format;

  /// Elements of a block; a row is a whole number of blocks.
  constexpr Index block_elements() const noexcept { return format.block_elements; }
  /// Bytes of a block.
  constexpr Index block_bytes() const noexcept { return format.block_bytes; }
  /// Whether elements can be read as float.
  constexpr bool decodable() const noexcept { return format.decode != nullptr; }
};

namespace detail {

// Types that only exist while a program runs (Q8_1, Q8_K) and those ggml removed (4, 5, 31 to 33, 36 to 38) are left out.
inline constexpr auto ggml_types = std::to_array<GgmlType>({
    {0, "F32", scalar_format<float>()},
    {1, "F16", scalar_format<half>()},
    {2, "Q4_0", block_format<BlockQ4_0>()},
    {3, "Q4_1", block_format<BlockQ4_1>()},
    {6, "Q5_0", {32, 22}},
    {7, "Q5_1", {32, 24}},
    {8, "Q8_0", block_format<BlockQ8_0>()},
    {10, "Q2_K", {256, 84}},
    {11, "Q3_K", {256, 110}},
    {12, "Q4_K", block_format<BlockQ4_K>()},
    {13, "Q5_K", {256, 176}},
    {14, "Q6_K", block_format<BlockQ6_K>()},
    {16, "IQ2_XXS", {256, 66}},
    {17, "IQ2_XS", {256, 74}},
    {18, "IQ3_XXS", {256, 98}},
    {19, "IQ1_S", {256, 50}},
    {20, "IQ4_NL", {32, 18}},
    {21, "IQ3_S", {256, 110}},
    {22, "IQ2_S", {256, 82}},
    {23, "IQ4_XS", {256, 136}},
    {24, "I8", {1, 1}},
    {25, "I16", {1, 2}},
    {26, "I32", {1, 4}},
    {27, "I64", {1, 8}},
    {28, "F64", scalar_format<double>()},
    {29, "IQ1_M", {256, 56}},
    {30, "BF16", scalar_format<bfloat16>()},
    {34, "TQ1_0", {256, 54}},
    {35, "TQ2_0", {256, 66}},
    {39, "MXFP4", {32, 17}},
    {40, "NVFP4", {64, 36}},
    {41, "Q1_0", {128, 18}},
});

}  // namespace detail

/// The type with this number. Errc::unsupported at `place` when there is none.
inline const GgmlType& ggml_type(std::uint32_t id, const ErrorPlace& place = {}) {
  const auto at = std::ranges::lower_bound(detail::ggml_types, id, {}, &GgmlType::id);
  if (at != detail::ggml_types.end() && at->id == id) return *at;
  throw Error(Errc::unsupported, "ggml type " + std::to_string(id) + " is not known", place);
}

/// Decodes whole blocks: `source` holds target.size() elements of `type`. Errc::unsupported for a type that cannot be decoded,
/// Errc::shape_mismatch unless the sizes agree.
inline void dequantize(const GgmlType& type, std::span<const std::byte> source, std::span<float> target) {
  QDYLORA_EXPECTS(type.decodable(), unsupported, "dequantize: ggml type " + std::string(type.name) + " cannot be read as float");
  const std::size_t blocks = source.size() / static_cast<std::size_t>(type.block_bytes());
  QDYLORA_EXPECTS(source.size() % static_cast<std::size_t>(type.block_bytes()) == 0 &&
                      target.size() % static_cast<std::size_t>(type.block_elements()) == 0 &&
                      target.size() / static_cast<std::size_t>(type.block_elements()) == blocks,
                  shape_mismatch,
                  "dequantize: " + std::to_string(source.size()) + " bytes of " + std::string(type.name) + " are not " +
                      std::to_string(target.size()) + " elements");
  type.format.decode(source.data(), static_cast<Index>(blocks), target.data());
}

}  // namespace qdylora
