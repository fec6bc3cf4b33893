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

/// Makes the table of pairs, `pitch` words from a byte's to the next, and the values of the scales' codes. The first code of a byte is its
/// high half, and goes to the low half of a fragment's word.
template <CodeFormat Format, class Scales, class T, int threads, int pitch = warp_size>
__device__ inline void fill_code_tables(const Shared<std::uint32_t>& pairs, const Shared<float>& second_level) {
  for (int i = thread(); i < pair_table_words / 4; i += threads) {
    const int byte = 4 * i / warp_size;
    const std::uint32_t pair = pack<T>(values<Format>.at[byte >> 4], values<Format>.at[byte & 15]);
    pairs.template from<Words<4>>(pitch * byte + 4 * i % warp_size).store(0, {{pair, pair, pair, pair}});
  }
  if constexpr (Scales::nested)
    for (int i = thread(); i < 256; i += threads) second_level.store(i, values<typename Scales::SecondLevel>.at[i]);
}

/// Codes of two rows' chunks, a lane's eight bytes of each, and their scales.
struct CodedRows {
  Words<2> codes[2];
  float scale[2];
};

/// sums[r][i] += scale of the row * a chunk of two rows of weights . the same chunk of tokens 8i ... 8i + 7, as fragments of
/// multiply_add have them, for some pairs of rows r. x(i, half): 16 bytes of token 8i + g, elements 16t + 8 half and on; they are read once
/// for all pairs. `table` is the lane's own.
template <class T, int row_tiles, int token_tiles, class X>
__device__ inline void multiply_chunk(const LookUpTable& table, const CodedRows (&rows)[row_tiles], const X& x,
                                      float (&sums)[row_tiles][token_tiles][4]) {
  constexpr int at_once = token_tiles < 4 ? token_tiles : 4;  // tiles whose sums wait for each other in the tensor cores
  Words<4> steps[row_tiles][4];
#pragma unroll
  for (int first = 0; first < token_tiles; first += at_once) {
    float partial[row_tiles][at_once][4] = {};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (first == 0) {
#pragma unroll
        for (int r = 0; r < row_tiles; ++r)
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            const auto pair = [&](int row, int byte) { return table.load(byte_of(rows[r].codes[row].word[half], byte) * warp_size); };
            steps[r][2 * half + step] = {{pair(0, 2 * step), pair(1, 2 * step), pair(0, 2 * step + 1), pair(1, 2 * step + 1)}};
          }
      }
#pragma unroll
      for (int i = 0; i < at_once; ++i) {
        const Words<4> tokens = x(first + i, half);
#pragma unroll
        for (int r = 0; r < row_tiles; ++r) {
          multiply_add<T>(partial[r][i], steps[r][2 * half], Words<2>{{tokens.word[0], tokens.word[1]}});
          multiply_add<T>(partial[r][i], steps[r][2 * half + 1], Words<2>{{tokens.word[2], tokens.word[3]}});
        }
      }
    }
#pragma unroll
    for (int r = 0; r < row_tiles; ++r)
#pragma unroll
      for (int i = 0; i < at_once; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[r][first + i][j] += rows[r].scale[j / 2] * partial[r][i][j];
  }
}

}  // namespace qdylora::device
