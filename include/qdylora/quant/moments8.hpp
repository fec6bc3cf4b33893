// AdamW's moments in 8 bits (Dettmers et al., "8-bit Optimizers via Block-wise Quantization", 2022), as bitsandbytes keeps them.
#pragma once

#include <bit>
#include <cstdint>

#include <qdylora/core/matrix.hpp>
#include <qdylora/quant/format.hpp>

namespace qdylora {

/// Moments of a parameter [rows, cols], block by block of 256 columns of a row, the last one of a row as short as it must be. An element is
/// its code's value times the absmax of its block: of the first moment in DynamicMap8, of the second, which is never negative, in
/// DynamicMapU8. Where 256 divides cols these are the blocks bitsandbytes makes of a whole parameter; elsewhere a row still has its own, as
/// ranks need it.
struct Moments8View {
  static constexpr Index block_size = 256;
  static constexpr Index blocks(Index cols) noexcept { return detail::div_up(cols, block_size); }

  MatrixView<std::uint8_t> m, v;           // [rows, cols]
  MatrixView<float> m_absmax, v_absmax;  // [rows, blocks(cols)]

  Moments8View middle_rows(Index begin, Index count) const noexcept {
    return {m.middle_rows(begin, count), v.middle_rows(begin, count), m_absmax.middle_rows(begin, count),
            v_absmax.middle_rows(begin, count)};
  }
};

namespace detail {

/// Codes of moments, `values` being their map's. The sign of a first moment outlives its rounding: what would become zero or the least
/// number of the other sign becomes the least of its own.
QDYLORA_HD inline std::uint8_t first_moment_code(float m, float absmax, const float* values) noexcept {
  constexpr int zero = 127;
  if (absmax == 0.0f) return zero;
  const int code = DynamicMap8::encode(m / absmax, values);
  const bool negative = std::bit_cast<std::uint32_t>(m) >> 31 != 0;
  if ((code < zero) == negative) return static_cast<std::uint8_t>(code);
  return static_cast<std::uint8_t>(m > 0.0f ? code + 1 : code - 1);
}
QDYLORA_HD inline std::uint8_t second_moment_code(float v, float absmax, const float* values) noexcept {
  return absmax == 0.0f ? std::uint8_t{0} : DynamicMapU8::encode(v / absmax, values);
}

}  // namespace detail
}  // namespace qdylora
