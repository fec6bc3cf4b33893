// Four-bit floats that the library has no use of, but the papers compare NF4 with: a code format of one's own is a struct of tables
// (CodeFormat in quant/format.hpp), which quantizers, decoders and products then take.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include <qdylora/quant/format.hpp>

namespace qdylora::examples {

/// A sign, E exponent and M mantissa bits, no infinity and no NaN; the largest magnitude is at v = 1. With M = 0 the exponent 0 is zero.
template <int E, int M>
struct Float4 {
  static_assert(E >= 1 && E + M == 3);
  static constexpr int bits = 4;
  static constexpr std::array<float, 16> values = [] {
    std::array<float, 16> table{};
    const auto magnitude = [](int code) {  // in units that the division below removes
      const int exponent = code >> M, mantissa = code & ((1 << M) - 1);
      return exponent > 0 ? static_cast<float>(((1 << M) + mantissa) << (exponent - 1)) : static_cast<float>(mantissa);
    };
    for (int code = 0; code < 8; ++code) {
      table[static_cast<std::size_t>(code)] = magnitude(code) / magnitude(7);
      table[static_cast<std::size_t>(8 + code)] = code > 0 ? -table[static_cast<std::size_t>(code)] : 0.0f;
    }
    return table;
  }();
  static constexpr std::array<std::uint8_t, 15> ascending = {15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7};  // -0 is never written
  static constexpr auto thresholds = [] {
    std::array<float, 15> sorted{};
    for (std::size_t i = 0; i < 15; ++i) sorted[i] = values[ascending[i]];
    return qdylora::detail::midpoints(sorted);
  }();

  /// The nearest value; a tie takes the lower one, as all 4-bit formats here. NaN becomes the largest; its block's absmax is NaN already.
  static constexpr std::uint8_t encode(float v) noexcept { return ascending[qdylora::detail::thresholds_below(v, thresholds)]; }
};

/// 0 .5 1 1.5 2 3 4 6, in sixths: the OCP microscaling formats' FP4, and the first of two "Float4" in QLoRA's Table 2.
struct E2M1 : Float4<2, 1> {
  static constexpr std::string_view name = "e2m1";
};
/// 0 and powers of two from 2^-6 to 1: the other.
struct E3M0 : Float4<3, 0> {
  static constexpr std::string_view name = "e3m0";
};

static_assert(CodeFormat<E2M1> && CodeFormat<E3M0>);

}  // namespace qdylora::examples
