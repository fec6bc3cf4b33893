// Decoding of codes and scales into a matrix, equal to qdylora::dequantize to the bit (NaN payloads aside: hardware has one NaN).
#pragma once

#include <bit>
#include <cstdint>

#include <qdylora/cuda/for_each.cuh>
#include <qdylora/cuda/tables.cuh>

namespace qdylora::device {

/// Element `flat` of w, decoded.
template <CodeFormat Format, class Scales>
__device__ inline float decoded(const QuantizedView<Format, Scales>& w, Index flat, int block_shift) {
  int code = load(w.codes + (Format::bits == 4 ? flat >> 1 : flat));
  if constexpr (Format::bits == 4) code = flat & 1 ? code & 15 : code >> 4;
  return multiply(values<Format>.at[code], absmax<Scales>(w.scales, flat >> block_shift));
}

/// y[i, j] = element (first_row + i, first_col + j) of decoded w, wherever in memory they are.
template <CodeFormat Format, class Scales, Scalar T>
struct DequantizeElement {
  QuantizedView<Format, Scales> w;
  MatrixView<T> y;
  Index first_row, first_col;
  int block_shift;  // log2(block size)

  __device__ void operator()(Index i, Index j) const {
    write(y, i, j, decoded(w, (first_row + i) * w.cols + first_col + j, block_shift));
  }
};

/// The same of codes that lie in whole, aligned pieces of 8, into rows of aligned 16-byte pieces: a lane reads 8 codes and writes 8 values, side
/// by side with the others'. A byte is looked up at once, of 4-bit codes a pair. A block has a strip of pieces, and takes of several rows at
/// once.
template <CodeFormat Format, class Scales, Scalar T>
struct DequantizeWords {
  static constexpr int threads = 128;
  static constexpr bool halves = Format::bits == 4;
  static constexpr int rows_per_thread = halves ? 4 : 2;  // 16 bytes of codes on their way at once
  static_assert(halves || Format::bits == 8);

  using Codes = Words<Format::bits / 4>;
  static constexpr std::size_t codes_bytes = sizeof(Codes);
  struct alignas(8) Pair {
    float first, second;
  };
  using Entry = std::conditional_t<halves, Pair, float>;
  static constexpr int shared_bytes = 256 * static_cast<int>(sizeof(Entry));

  QuantizedView<Format, Scales> w;
  MatrixView<T> y;
  Index first_row, first_col;
  int block_shift, strip_shift;  // log2(pieces in a strip), at most threads

  __device__ void operator()(SharedMemory memory) const {
    const auto table = memory.take<Entry>(256);
    for (int byte = thread(); byte < 256; byte += threads)
      if constexpr (halves) table.store(byte, {values<Format>.at[byte >> 4], values<Format>.at[byte & 15]});
      else table.store(byte, values<Format>.at[byte]);
    sync_block();

    const auto* const codes = reinterpret_cast<const Codes*>(w.codes);
    const Index pieces = y.cols / 8;
    const Index step = threads >> strip_shift;  // rows from a thread's to its next one
    const Index at = (static_cast<Index>(block().x) << strip_shift) + (thread() & ((1 << strip_shift) - 1));
    if (at >= pieces) return;
    for (Index row = static_cast<Index>(block().y) * rows_per_thread * step + (thread() >> strip_shift); row < y.rows;
         row += static_cast<Index>(grid().y) * rows_per_thread * step) {
      const Index first = (((first_row + row) * w.cols + first_col) >> 3) + at, pitch = step * (w.cols >> 3);
      Codes own[rows_per_thread];
      float scale[rows_per_thread];
      const auto exists = [&](int i) { return i == 0 || row + i * step < y.rows; };  // else the first is read again, for nothing
#pragma unroll
      for (int i = 0; i < rows_per_thread; ++i) own[i] = load_once(codes + first + (exists(i) ? i * pitch : 0));
#pragma unroll
      for (int i = 0; i < rows_per_thread; ++i)
        scale[i] = absmax<Scales>(w.scales, (first + (exists(i) ? i * pitch : 0)) >> (block_shift - 3));
#pragma unroll
      for (int i = 0; i < rows_per_thread; ++i)
        if (exists(i)) decode(table, own[i], scale[i], y.row(row + i * step) + 8 * at);
    }
  }

 private:
  // Of 4 bits, byte b holds elements 2b and 2b + 1, the first in its high half.
  __device__ static void decode(const Shared<Entry>& table, const Codes& codes, float scale, T* out) {
    const auto entry = [&](int byte) { return table.load(static_cast<int>(codes.word[byte / 4] >> (8 * (byte % 4)) & 255u)); };
    constexpr int outputs = sizeof(T) * 8 / 16;
    Words<4> result[outputs];
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      Pair pair;
      if constexpr (halves) pair = entry(b);
      else pair = {entry(2 * b), entry(2 * b + 1)};
      const float first = multiply(pair.first, scale), second = multiply(pair.second, scale);
      if constexpr (sizeof(T) == 2) {
        result[0].word[b] = pack<T>(first, second);
      } else {
        result[b / 2].word[2 * (b % 2)] = std::bit_cast<std::uint32_t>(first);
        result[b / 2].word[2 * (b % 2) + 1] = std::bit_cast<std::uint32_t>(second);
      }
    }
#pragma unroll
    for (int i = 0; i < outputs; ++i) store(reinterpret_cast<Words<4>*>(out) + i, result[i]);
  }
};

}  // namespace qdylora::device

#if !defined(QDYLORA_DEVICE_ONLY)
namespace qdylora::detail {

/// y = the rows and columns of decoded w that begin at (first_row, first_col), on a stream of choice.
template <CodeFormat Format, class Scales, Scalar T>
void dequantize_on(cudaStream_t stream, const CudaContext& context, const QuantizedView<Format, Scales>& w, MatrixView<T> y,
                   Index first_row, Index first_col) {
  expect_inside(w, y, first_row, first_col);
  const int block_shift = std::countr_zero(static_cast<std::size_t>(w.block_size));
  if constexpr (sizeof(T) <= 4) {
    using Kernel = device::DequantizeWords<Format, Scales, T>;
    const bool whole_codes = w.cols % 8 == 0 && first_col % 8 == 0 && reinterpret_cast<std::uintptr_t>(w.codes) % Kernel::codes_bytes == 0;
    if (whole_codes && y.cols % 8 == 0 && has_aligned_rows<16 / static_cast<int>(sizeof(T))>(y)) {
      const int strip_shift = std::countr_zero(std::bit_ceil(static_cast<unsigned>(std::clamp<Index>(y.cols / 8, 1, Kernel::threads))));
      const Index rows_at_once = Kernel::rows_per_thread * (Kernel::threads >> strip_shift);
      const dim3 blocks = row_grid(context, div_up(y.cols / 8, Index{1} << strip_shift), div_up(y.rows, rows_at_once));
      return device::launch({stream, blocks, Kernel::shared_bytes}, Kernel{w, y, first_row, first_col, block_shift, strip_shift});
    }
  }
  for_each_on(stream, context, y.rows, y.cols, device::DequantizeElement<Format, Scales, T>{w, y, first_row, first_col, block_shift});
}
/// The same on the context's stream.
template <CodeFormat Format, class Scales, Scalar T>
void dequantize(const CudaContext& context, const QuantizedView<Format, Scales>& w, MatrixView<T> y, Index first_row = 0,
                Index first_col = 0) {
  dequantize_on(context.stream(), context, w, y, first_row, first_col);
}

}  // namespace qdylora::detail
#endif
