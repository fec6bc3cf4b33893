// A quantized weight as the kernels read it: formats and scales as tables, so that one compiled kernel serves all of them.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstdint>
#include <type_traits>

#include <qdylora/quant/quantized_tensor.hpp>

namespace qdylora::detail {

struct CodedWeight {
  const std::uint8_t* codes = nullptr;
  const float* values = nullptr;  // of each code: 16 or 256
  int bits = 4;
  float one_in_7_bits = 63.0f, one_in_8_bits = 127.0f;  // of 4-bit codes, see integer_scale
  float byte_step = 0.0f;  // where a code is a number in two's complement, what one is worth: values[c] = c * byte_step
  Index rows = 0, cols = 0, block_size = 64;
  // absmax of block i: absmax[i], or where that is null  scale_values[scale_codes[i]] * nested_absmax[i / 256] + offset
  const float* absmax = nullptr;
  const std::uint8_t* scale_codes = nullptr;
  const float* scale_values = nullptr;
  const std::uint8_t* scale_planes = nullptr;  // scale_values byte by byte: byte b of value v at 256 b + v
  const float* nested_absmax = nullptr;
  float offset = 0.0f;

  /// Whether rows are made of whole blocks. Then they start at a byte, and every row has the same blocks.
  bool whole_blocks() const noexcept { return cols % block_size == 0; }
  Index row_blocks() const noexcept { return cols / block_size; }
  Index row_bytes() const noexcept { return cols * bits / 8; }

  float scale(Index block) const noexcept {
    return absmax != nullptr ? absmax[block] : rounded(scale_values[scale_codes[block]] * nested_absmax[block >> 8]) + offset;
  }
  /// Asks memory for the codes of columns [col, col + count) of rows [row, row + number), of a weight whose rows start at a byte; those
  /// beyond its rows or columns are left out.
  // Inlined before g++ takes it for a function without effects, and leaves its calls out.
  [[gnu::always_inline]] void prefetch(Index row, Index number, Index col, Index count) const noexcept {
    const Index begin = col * bits / 8, end = std::min(cols, col + count) * bits / 8, stop = std::min(rows, row + number);
    for (Index n = row; n < stop; ++n)
      for (Index i = begin; i < end; i += 64) __builtin_prefetch(codes + n * row_bytes() + i, 0, 2);
  }
  float value(Index i) const noexcept {
    if (bits == 8) return values[codes[i]];
    return values[(i & 1) ? codes[i >> 1] & 15 : codes[i >> 1] >> 4];
  }
};

/// How far from zero a code's value may be: INT4's code 0, which is never written, is -8/7.
inline constexpr float largest_code_value = 8.0f / 7.0f;

/// What 1 becomes where the values of 4-bit codes become signed integers of so many bits: of the scales that they fit at, in sixteenths, the one
/// that moves them least.
template <CodeFormat Format>
constexpr float integer_scale(int bits) {
  const int half = 1 << (bits - 1);
  float best = 0.0f, least = 1e30f;
  for (int i = 16 * half; i > 4 * half; --i) {
    const float scale = static_cast<float>(i) / 16.0f;
    float moved = 0.0f;
    for (const float value : Format::values) {
      const float x = value * scale;
      const int nearest = static_cast<int>(x < 0.0f ? x - 0.5f : x + 0.5f);
      const float by = (static_cast<float>(nearest) - x) / scale;
      moved += nearest < -half || nearest >= half ? 1e30f : by * by;
    }
    if (moved < least) {
      least = moved;
      best = scale;
    }
  }
  return best;
}

template <CodeFormat Code>
inline constexpr auto byte_planes = [] {
  std::array<std::uint8_t, 1024> planes{};
  for (std::size_t v = 0; v < 256; ++v)
    for (std::size_t byte = 0; byte < 4; ++byte)
      planes[256 * byte + v] = static_cast<std::uint8_t>(std::bit_cast<std::uint32_t>(Code::values[v]) >> (8 * byte));
  return planes;
}();

template <CodeFormat Format, class Scales>
CodedWeight coded(const QuantizedView<Format, Scales>& w) noexcept {
  CodedWeight c;
  c.codes = w.codes;
  c.values = Format::values.data();
  c.bits = Format::bits;
  if constexpr (Format::bits == 4) {
    static_assert(std::all_of(Format::values.begin(), Format::values.end(),
                              [](float v) { return v <= largest_code_value && v >= -largest_code_value; }),
                  "products' sums of integers hold values of codes in [-8/7, 8/7]");
    constexpr float in_7_bits = integer_scale<Format>(7), in_8_bits = integer_scale<Format>(8);
    c.one_in_7_bits = in_7_bits;
    c.one_in_8_bits = in_8_bits;
  }
  if constexpr (std::is_same_v<Format, INT8>) c.byte_step = INT8::step;
  c.rows = w.rows;
  c.cols = w.cols;
  c.block_size = w.block_size;
  if constexpr (Scales::nested) {
    static_assert(Scales::nested_block_size == 256);
    c.scale_codes = w.scales.codes;
    c.scale_values = Scales::SecondLevel::values.data();
    c.scale_planes = byte_planes<typename Scales::SecondLevel>.data();
    c.nested_absmax = w.scales.nested_absmax;
    c.offset = w.scales.offset;
  } else {
    c.absmax = w.scales.absmax;
  }
  return c;
}

}  // namespace qdylora::detail
