// 4-bit weights as the left operand of mma.m16n8k16, from the bytes they are stored in.
//
// Rows are cut into chunks of 64 elements, 32 bytes of codes. In a chunk, lane t of a group of four holds bytes 8t ... 8t + 7, elements
// 16t ... 16t + 15, of two rows. Step j of four multiplies bytes 2j and 2j + 1 of each. That orders the chunk's elements otherwise than the
// instruction's fragments do, for both operands alike, and a sum does not mind: so a lane reads 8 bytes of codes and 32 bytes of x, side by
// side, and nothing is exchanged between lanes.
//   A byte, two codes, is looked up at once in a table of 256 pairs, of which each lane has its own: entry e of lane l is word 32 e + l, so
//   that lane l reads bank l whatever the codes are.
//   Partial sums of a chunk are scaled by its absmax in float32. What is rounded to 16 bits is the code book, not the weights.
#pragma once

#include <cstdint>

#include <qdylora/cuda/tables.cuh>

namespace qdylora::device {

inline constexpr int chunk_elements = 64;
inline constexpr int chunk_code_words = chunk_elements / 2 / 8;  // of 8 bytes, as they are loaded
inline constexpr int chunk_x_words = chunk_elements * 2 / 16;    // of 16 bytes
inline constexpr int pair_table_words = 256 * warp_size;

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

/// Makes the table of pairs, and the values of the scales' codes. The first code of a byte is its high half, and goes to the low half of a
/// fragment's word.
template <CodeFormat Format, class Scales, class T, int threads>
__device__ inline void fill_code_tables(const Shared<std::uint32_t>& pairs, const Shared<float>& second_level) {
  for (int i = thread(); i < pair_table_words / 4; i += threads) {
    const int byte = 4 * i / warp_size;
    const std::uint32_t pair = pack<T>(values<Format>.at[byte >> 4], values<Format>.at[byte & 15]);
    pairs.template from<Words<4>>(4 * i).store(0, {{pair, pair, pair, pair}});
  }
  if constexpr (Scales::nested)
    for (int i = thread(); i < 256; i += threads) second_level.store(i, values<typename Scales::SecondLevel>.at[i]);
}

/// sums[i] += scale of the row * a chunk of two rows of weights . the same chunk of tokens 8i ... 8i + 7, as fragments of
/// multiply_add have them. x(i, half): 16 bytes of token 8i + g, elements 16t + 8 half and on. `pairs` is the lane's own table.
template <class T, int token_tiles, class X>
__device__ inline void multiply_chunk(const LookUpTable& pairs, const Words<2>& codes0, const Words<2>& codes1, float scale0, float scale1,
                                      const X& x, float (&sums)[token_tiles][4]) {
  float partial[token_tiles][4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const auto pair = [&](const Words<2>& codes, int byte) { return pairs.load(byte_of(codes.word[half], byte) * warp_size); };
    const Words<4> first{{pair(codes0, 0), pair(codes1, 0), pair(codes0, 1), pair(codes1, 1)}};
    const Words<4> second{{pair(codes0, 2), pair(codes1, 2), pair(codes0, 3), pair(codes1, 3)}};
#pragma unroll
    for (int i = 0; i < token_tiles; ++i) {
      const Words<4> tokens = x(i, half);
      multiply_add<T>(partial[i], first, Words<2>{{tokens.word[0], tokens.word[1]}});
      multiply_add<T>(partial[i], second, Words<2>{{tokens.word[2], tokens.word[3]}});
    }
  }
#pragma unroll
  for (int i = 0; i < token_tiles; ++i)
#pragma unroll
    for (int j = 0; j < 4; ++j) sums[i][j] += (j < 2 ? scale0 : scale1) * partial[i][j];
}

}  // namespace qdylora::device
