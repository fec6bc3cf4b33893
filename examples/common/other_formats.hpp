// 4-bit formats that the library has no use of, but the papers compare NF4 with: a code format of one's own is a struct of tables
// (CodeFormat in quant/format.hpp), which quantizers, decoders and products then take.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include <qdylora/quant/format.hpp>

namespace qdylora::examples {

/// Sixteen values, codes in their order: the nearest value, and of a tie the lower one, as all 4-bit formats here. NaN becomes the largest; its
/// block's absmax is NaN already.
template <const std::array<float, 16>& Ascending>
struct NearestOfSixteen {
  static constexpr int bits = 4;
  static constexpr std::array<float, 16> values = Ascending;
  static constexpr std::array<std::uint8_t, 16> ascending = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  static constexpr auto thresholds = qdylora::detail::midpoints(values);

  static constexpr std::uint8_t encode(float v) noexcept { return qdylora::detail::thresholds_below(v, thresholds); }
};

/// A float of a sign, `mantissa_bits` and as many exponent bits as make four, without infinity and NaN; the largest magnitude is at v = 1.
/// Without a mantissa the exponent 0 is zero. Zero is there twice; the second is never written.
constexpr std::array<float, 16> float4_values(int mantissa_bits) {
  const auto magnitude = [mantissa_bits](int code) {  // in units that the division below removes
    const int exponent = code >> mantissa_bits, mantissa = code & ((1 << mantissa_bits) - 1);
    return exponent > 0 ? static_cast<float>(((1 << mantissa_bits) + mantissa) << (exponent - 1)) : static_cast<float>(mantissa);
  };
  std::array<float, 16> table{};
  for (int code = 1; code < 8; ++code) {
    table[static_cast<std::size_t>(8 + code)] = magnitude(code) / magnitude(7);
    table[static_cast<std::size_t>(7 - code)] = -table[static_cast<std::size_t>(8 + code)];
  }
  return table;
}

inline constexpr auto e2m1_values = float4_values(1);
inline constexpr auto e3m0_values = float4_values(0);
inline constexpr auto int4_8_values = [] {
  std::array<float, 16> table{};
  for (int level = -8; level < 8; ++level) table[static_cast<std::size_t>(level + 8)] = static_cast<float>(level) / 8.0f;
  return table;
}();
inline constexpr std::array<float, 16> af4_values = {
    -1.0f,       -0.69441008f, -0.51243739f, -0.3736951f, -0.25607552f, -0.14982478f, -0.04934812f, 0.0f,
    0.04273164f, 0.12934483f,  0.21961274f,  0.31675666f, 0.42563882f,  0.55496234f,  0.72424863f,  1.0f};

/// 0 .5 1 1.5 2 3 4 6, in sixths: the OCP microscaling formats' FP4, and the first of two "Float4" in QLoRA's Table 2.
struct E2M1 : NearestOfSixteen<e2m1_values> {
  static constexpr std::string_view name = "e2m1";
};
/// 0 and powers of two from 2^-6 to 1: the other.
struct E3M0 : NearestOfSixteen<e3m0_values> {
  static constexpr std::string_view name = "e3m0";
};
/// Levels -8/8 ... 7/8: one more than `int4`, at the price that a block's largest weight loses an eighth where it is positive.
struct INT4Of16 : NearestOfSixteen<int4_8_values> {
  static constexpr std::string_view name = "int4_16";
};
/// AbnormalFloat for blocks of 64 (Yoshida 2023, arXiv 2306.06965), bitsandbytes' table: made for normal weights divided by their block's
/// absmax, a distribution that NF4's quantiles leave out. By its error on them it is behind NF4.
struct AF4 : NearestOfSixteen<af4_values> {
  static constexpr std::string_view name = "af4";
};

static_assert(CodeFormat<E2M1> && CodeFormat<E3M0> && CodeFormat<INT4Of16> && CodeFormat<AF4>);

}  // namespace qdylora::examples
