// Code formats: how a weight divided by its block's absmax, v in [-1, 1], becomes a code of 4 or 8 bits and back.
//
//   NF4            4-bit NormalFloat, the quantiles of N(0, 1) (Dettmers et al. 2023, "QLoRA"), bitsandbytes' table to the bit
//   FP4            bitsandbytes' 4-bit float: sign bit 3; magnitudes 0 .0052 .1667 .25 .3333 .5 .6667 1 (not OCP's E2M1)
//   INT4           15 levels -7/7 ... 7/7, code = level + 8; code 0 is never written
//   INT8           255 levels -127/127 ... 127/127, code = level in two's complement: what GGUF's Q8_0 holds
//   FP8E4M3/E5M2   OCP 8-bit floats, the largest finite value at v = 1
//   DynamicMap8    bitsandbytes' signed dynamic 8-bit map: the second level of double quantization, and optimizer states
//   DynamicMapU8   its unsigned form
//
// Ties: the 4-bit formats take the lower neighbour (v must be above a midpoint to pass it), as bitsandbytes on the CPU; the 8-bit maps
// and INT8 take the even code, as bitsandbytes on CUDA; the OCP floats round to nearest even.
#pragma once

#include <array>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <string_view>

#include <qdylora/core/scalar.hpp>

namespace qdylora {

template <class F>
concept CodeFormat = requires(float v) {
  requires F::bits == 4 || F::bits == 8;
  { F::name } -> std::convertible_to<std::string_view>;
  { F::values[0] } -> std::convertible_to<float>;  // decoded value of each code, 2^bits of them; of 4 bits in [-8/7, 8/7]
  { F::encode(v) } -> std::same_as<std::uint8_t>;  // v in [-1, 1] or NaN; NaN has a defined code too
  requires F::values.size() == (std::size_t{1} << F::bits);
  requires F::bits == 8 || requires {  // what kernels encode 4 bits by: v that is above k of the sorted thresholds has the code ascending[k]
    { F::thresholds[0] } -> std::convertible_to<float>;
    { F::ascending[0] } -> std::convertible_to<std::uint8_t>;
    requires F::ascending.size() == F::thresholds.size() + 1;
  };
};

namespace detail {

// float32 midpoints of a sorted table.
template <std::size_t N>
constexpr std::array<float, N - 1> midpoints(const std::array<float, N>& sorted) {
  std::array<float, N - 1> result{};
  for (std::size_t i = 0; i + 1 < N; ++i) result[i] = (sorted[i] + sorted[i + 1]) / 2.0f;
  return result;
}

// How many thresholds lie below v. NaN is above all of them.
template <std::size_t N>
QDYLORA_HD constexpr std::uint8_t thresholds_below(float v, const std::array<float, N>& thresholds) noexcept {
  unsigned count = 0;
  for (std::size_t i = 0; i < N; ++i) count += !(v <= thresholds[i]);
  return static_cast<std::uint8_t>(count);
}

}  // namespace detail

struct NF4 {
  static constexpr int bits = 4;
  static constexpr std::string_view name = "nf4";
  static constexpr std::array<float, 16> values = {
      -1.0f,          -0.696192801f, -0.525073051f, -0.394917488f, -0.284441382f, -0.18477343f, -0.0910500363f, 0.0f,
      0.0795802996f,  0.160930201f,  0.246112302f,  0.337915242f,  0.440709829f,  0.562617004f, 0.722956836f,   1.0f};
  static constexpr std::array<std::uint8_t, 16> ascending = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};  // codes by value
  static constexpr auto thresholds = detail::midpoints(values);

  static constexpr std::uint8_t encode(float v) noexcept { return detail::thresholds_below(v, thresholds); }
};

struct FP4 {
  static constexpr int bits = 4;
  static constexpr std::string_view name = "fp4";
  static constexpr std::array<float, 16> values = {
      0.0f, 0.00520833349f,  0.666666687f,  1.0f,  0.333333343f,  0.5f,  0.166666672f,  0.25f,
      0.0f, -0.00520833349f, -0.666666687f, -1.0f, -0.333333343f, -0.5f, -0.166666672f, -0.25f};
  // Codes in ascending order of value. Code 8 decodes to +0 and sorts above code 0: 0 itself is code 0, a tiny positive v code 8.
  static constexpr std::array<std::uint8_t, 16> ascending = {11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3};
  static constexpr auto thresholds = [] {
    std::array<float, 16> sorted{};
    for (std::size_t i = 0; i < 16; ++i) sorted[i] = values[ascending[i]];
    return detail::midpoints(sorted);
  }();

  static constexpr std::uint8_t encode(float v) noexcept { return ascending[detail::thresholds_below(v, thresholds)]; }
};

struct INT4 {
  static constexpr int bits = 4;
  static constexpr std::string_view name = "int4";
  static constexpr std::array<float, 16> values = [] {
    std::array<float, 16> table{};
    for (int code = 0; code < 16; ++code) table[static_cast<std::size_t>(code)] = static_cast<float>(code - 8) / 7.0f;
    return table;
  }();
  static constexpr std::array<std::uint8_t, 15> ascending = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  static constexpr auto thresholds = [] {
    std::array<float, 14> result{};
    for (std::size_t i = 0; i < 14; ++i) result[i] = (values[i + 1] + values[i + 2]) / 2.0f;
    return result;
  }();

  static constexpr std::uint8_t encode(float v) noexcept {
    return static_cast<std::uint8_t>(1 + detail::thresholds_below(v, thresholds));
  }
};

struct INT8 {
  static constexpr int bits = 8;
  static constexpr std::string_view name = "int8";
  static constexpr float step = 1.0f / 127.0f;
  static constexpr std::array<float, 256> values = [] {
    std::array<float, 256> table{};
    for (std::size_t code = 0; code < 256; ++code)
      table[code] = static_cast<float>(static_cast<std::int8_t>(static_cast<std::uint8_t>(code))) * step;
    return table;
  }();
  static_assert(values[127] == 1.0f && values[129] == -1.0f);

  // The nearest level; a tie goes to the even one, NaN to 0: its block's absmax is NaN already. Levels are read from `table`, which has the
  // values wherever the caller can read it: computed here, a product could be fused into their sum, and its rounding lost.
  QDYLORA_HD static constexpr std::uint8_t encode(float v, const float* table) noexcept {
    if (!(v == v)) return 0;
    const auto value = [table](int level) { return table[static_cast<std::uint8_t>(level)]; };
    int low = static_cast<int>((v + 1.0f) * 127.0f) - 127;  // the level below v, or a neighbour of it
    if (value(low) > v) --low;
    else if (low < 127 && value(low + 1) <= v) ++low;
    if (low == 127) return 127;
    const float middle = (value(low) + value(low + 1)) * 0.5f;
    const bool up = v > middle || (v == middle && (low & 1));
    return static_cast<std::uint8_t>(low + (up ? 1 : 0));
  }
  static constexpr std::uint8_t encode(float v) noexcept { return encode(v, values.data()); }
};

/// What a finite number beyond an 8-bit float's range becomes. saturate: the largest finite value, as CUDA's __NV_SATFINITE (infinity
/// saturates too). ieee: infinity in E5M2, NaN in E4M3, which has no infinity.
enum class Overflow { saturate, ieee };

/// OCP 8-bit float with E exponent and M mantissa bits (OCP 8-bit Floating Point Specification, 2023).
///   E4M3: bias 7, largest 448 (0x7E), no infinity, NaN 0x7F.     E5M2: bias 15, largest 57344 (0x7B), infinity 0x7C, NaN 0x7D-0x7F.
template <int E, int M>
struct OcpFloat8 {
  static_assert(E + M == 7);
  static constexpr int bias = (1 << (E - 1)) - 1;
  static constexpr bool has_infinity = E == 5;
  static constexpr std::uint8_t max_code = has_infinity ? 0x7B : 0x7E;
  static constexpr std::uint8_t nan_code = 0x7F;

  QDYLORA_HD static constexpr float decode(std::uint8_t code) noexcept {
    const int exponent = (code >> M) & ((1 << E) - 1);
    const int mantissa = code & ((1 << M) - 1);
    const float sign = (code & 0x80) ? -1.0f : 1.0f;
    if (has_infinity && exponent == (1 << E) - 1)
      return mantissa ? std::numeric_limits<float>::quiet_NaN() : sign * std::numeric_limits<float>::infinity();
    if (!has_infinity && (code & 0x7F) == 0x7F) return std::numeric_limits<float>::quiet_NaN();
    const int power = (exponent ? exponent : 1) - bias - M;  // of the last mantissa bit
    const float scale = std::bit_cast<float>(static_cast<std::uint32_t>(power + 127) << 23);
    return sign * static_cast<float>(exponent ? mantissa + (1 << M) : mantissa) * scale;
  }

  /// Round to nearest even; NaN stays NaN.
  QDYLORA_HD static constexpr std::uint8_t encode(float value, Overflow overflow = Overflow::saturate) noexcept {
    const auto word = std::bit_cast<std::uint32_t>(value);
    const auto sign = static_cast<std::uint8_t>((word >> 24) & 0x80u);
    const std::uint32_t magnitude = word & 0x7FFFFFFFu;
    const auto with_sign = [sign](std::uint32_t code) { return static_cast<std::uint8_t>(sign | code); };
    if (magnitude > 0x7F800000u) return with_sign(nan_code);
    const int exponent = static_cast<int>(magnitude >> 23) - 127;
    // The last kept bit weighs 2^(exponent - M) for normal results and 2^(1 - bias - M) for subnormal ones.
    const int lost = 23 - M + (exponent < 1 - bias ? (1 - bias) - exponent : 0);
    if (lost > 25) return sign;
    const std::uint32_t significand = (magnitude & 0x7FFFFFu) | (magnitude >> 23 ? 0x800000u : 0u);
    const std::uint32_t kept = significand >> lost;
    const std::uint32_t rest = significand & ((1u << lost) - 1u);
    const std::uint32_t tie = 1u << (lost - 1);
    const std::uint32_t rounded = kept + ((rest > tie || (rest == tie && (kept & 1u))) ? 1u : 0u);
    // A carry out of the mantissa raises the exponent by itself, from subnormal to normal too.
    const std::uint32_t code =
        exponent < 1 - bias ? rounded : rounded + (static_cast<std::uint32_t>(exponent + bias - 1) << M);
    if (exponent > 127 || code > max_code) {
      if (overflow == Overflow::saturate) return with_sign(max_code);
      return with_sign(has_infinity ? 0x7Cu : nan_code);
    }
    return with_sign(code);
  }
};

namespace detail {

template <int E, int M>
struct ScaledFloat8 {
  using Ocp = OcpFloat8<E, M>;
  static constexpr int bits = 8;
  static constexpr float largest = Ocp::decode(Ocp::max_code);
  static constexpr std::array<float, 256> values = [] {
    std::array<float, 256> table{};
    for (std::size_t code = 0; code < 256; ++code) {
      const float value = Ocp::decode(static_cast<std::uint8_t>(code));
      const bool finite = (code & 0x7F) <= Ocp::max_code;  // arithmetic on NaN is no constant expression
      table[code] = finite ? value / largest : value;
    }
    return table;
  }();

  /// NaN has one code: processors do not agree on the sign of one that they make.
  QDYLORA_HD static constexpr std::uint8_t encode(float v) noexcept { return v == v ? Ocp::encode(v * largest) : Ocp::nan_code; }
};

// bitsandbytes create_dynamic_map: 7 decades; decade i holds 2^i (unsigned: 2^(i+1)) values, the midpoints of an even division of
// [0.1, 1], times 10^(i-6); then 0 and 1. Boundaries and means are rounded as torch.linspace and a float32 mean round them.
template <bool Signed>
constexpr std::array<float, 256> dynamic_map() {
  constexpr float decade_scale[7] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  std::array<float, 256> positive{};
  std::size_t count = 0;
  for (int decade = 0; decade < 7; ++decade) {
    const int pieces = Signed ? 1 << decade : 1 << (decade + 1);
    const float step = (1.0f - 0.1f) / static_cast<float>(pieces);
    const auto boundary = [&](int k) {
      return k < (pieces + 1) / 2 ? static_cast<float>(static_cast<double>(0.1f) + static_cast<double>(step) * k)
                                  : static_cast<float>(1.0 - static_cast<double>(step) * (pieces - k));
    };
    for (int k = 0; k < pieces; ++k) {
      const float mean = (boundary(k) + boundary(k + 1)) / 2.0f;
      positive[count++] = decade_scale[decade] * mean;
    }
  }
  std::array<float, 256> map{};
  std::size_t next = 0;
  if (Signed)
    for (std::size_t i = count; i > 0; --i) map[next++] = -positive[i - 1];
  map[next++] = 0.0f;
  for (std::size_t i = 0; i < count; ++i) map[next++] = positive[i];
  map[next++] = 1.0f;
  return map;
}

template <bool Signed>
struct DynamicMap {
  static constexpr int bits = 8;
  static constexpr std::array<float, 256> values = dynamic_map<Signed>();

  // The nearest code; a tie goes to the even one, NaN to 0. `table` has the values, wherever the caller can read it.
  QDYLORA_HD static constexpr std::uint8_t encode(float v, const float* table) noexcept {
    unsigned low = 0;  // invariant: table[low] <= v, or low == 0
    for (unsigned width = 128; width > 0; width /= 2)
      if (low + width < 256 && table[low + width] <= v) low += width;
    if (low == 255 || !(v > table[low])) return static_cast<std::uint8_t>(low);
    const float middle = (table[low] + table[low + 1]) * 0.5f;
    const bool up = v > middle || (v == middle && (low & 1u));
    return static_cast<std::uint8_t>(low + (up ? 1u : 0u));
  }
  static constexpr std::uint8_t encode(float v) noexcept { return encode(v, values.data()); }
};

}  // namespace detail

struct FP8E4M3 : detail::ScaledFloat8<4, 3> {
  static constexpr std::string_view name = "fp8_e4m3";
};
struct FP8E5M2 : detail::ScaledFloat8<5, 2> {
  static constexpr std::string_view name = "fp8_e5m2";
};
struct DynamicMap8 : detail::DynamicMap<true> {
  static constexpr std::string_view name = "dynamic";
};
struct DynamicMapU8 : detail::DynamicMap<false> {
  static constexpr std::string_view name = "dynamic_unsigned";
};

static_assert(CodeFormat<NF4> && CodeFormat<FP4> && CodeFormat<INT4> && CodeFormat<INT8> && CodeFormat<FP8E4M3> && CodeFormat<FP8E5M2> &&
              CodeFormat<DynamicMap8> && CodeFormat<DynamicMapU8>);

}  // namespace qdylora
