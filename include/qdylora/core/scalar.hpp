// Scalar types: Index, bfloat16, half, and the rounding they are defined by.
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>
#include <limits>
#include <string_view>
#include <type_traits>

#include <qdylora/config.hpp>

namespace qdylora {

/// Every element count, row, column and offset. `int` overflows at 2^31 elements, a size real models pass.
using Index = std::int64_t;

namespace detail {

/// x / unit and the next multiple of unit, of x >= 0.
QDYLORA_HD constexpr Index div_up(Index x, Index unit) noexcept { return (x + unit - 1) / unit; }
QDYLORA_HD constexpr Index rounded_up(Index x, Index unit) noexcept { return div_up(x, unit) * unit; }

// float32 -> bfloat16 bits, round to nearest even; NaN stays a quiet NaN.
QDYLORA_HD constexpr std::uint16_t bfloat16_bits(float value) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return static_cast<std::uint16_t>((bits >> 16) | 0x40u);
  return static_cast<std::uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16);
}

// float32 -> IEEE binary16 bits, round to nearest even, subnormals kept, overflow to infinity.
QDYLORA_HD constexpr std::uint16_t half_bits(float value) noexcept {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint16_t>((bits >> 16) & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return static_cast<std::uint16_t>(sign | 0x7E00u | ((magnitude >> 13) & 0x3FFu));
  if (magnitude >= 0x477FF000u) return static_cast<std::uint16_t>(sign | 0x7C00u);  // >= 65520 rounds to infinity
  if (magnitude < 0x38800000u) {                                                    // < 2^-14: subnormal half
    if (magnitude < 0x33000000u) return sign;                                       // < 2^-25 rounds to zero
    const std::uint32_t exponent = magnitude >> 23;
    const std::uint32_t mantissa = (magnitude & 0x7FFFFFu) | 0x800000u;
    const std::uint32_t shift = 126u - exponent;  // 14 .. 24
    const std::uint32_t kept = mantissa >> shift;
    const std::uint32_t rest = mantissa & ((1u << shift) - 1u);
    const std::uint32_t tie = 1u << (shift - 1u);
    return static_cast<std::uint16_t>(sign | (kept + ((rest > tie || (rest == tie && (kept & 1u))) ? 1u : 0u)));
  }
  const std::uint32_t rounded = magnitude + 0xFFFu + ((magnitude >> 13) & 1u);
  return static_cast<std::uint16_t>(sign | ((rounded - 0x38000000u) >> 13));
}

QDYLORA_HD constexpr float half_value(std::uint16_t bits) noexcept {
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x8000u) << 16;
  const std::uint32_t exponent = (bits >> 10) & 31u;
  const std::uint32_t mantissa = bits & 0x3FFu;
  if (exponent == 31u) return std::bit_cast<float>(sign | 0x7F800000u | (mantissa << 13));
  if (exponent != 0u) return std::bit_cast<float>(sign | ((exponent + 112u) << 23) | (mantissa << 13));
  const float subnormal = static_cast<float>(mantissa) * 0x1p-24f;
  return sign ? -subnormal : subnormal;
}

}  // namespace detail

/// bfloat16 [1 sign, 8 exponent, 7 mantissa]. Storage type: arithmetic happens in float, conversions round to nearest even.
struct bfloat16 {
  std::uint16_t bits = 0;

  bfloat16() = default;
  QDYLORA_HD constexpr explicit bfloat16(float value) noexcept : bits(detail::bfloat16_bits(value)) {}
  QDYLORA_HD constexpr operator float() const noexcept {
    return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
  }
  QDYLORA_HD static constexpr bfloat16 from_bits(std::uint16_t bits) noexcept {
    bfloat16 value;
    value.bits = bits;
    return value;
  }
};

/// IEEE binary16 [1 sign, 5 exponent, 10 mantissa], as above.
struct half {
  std::uint16_t bits = 0;

  half() = default;
  QDYLORA_HD constexpr explicit half(float value) noexcept : bits(detail::half_bits(value)) {}
  QDYLORA_HD constexpr operator float() const noexcept { return detail::half_value(bits); }
  QDYLORA_HD static constexpr half from_bits(std::uint16_t bits) noexcept {
    half value;
    value.bits = bits;
    return value;
  }
};

static_assert(sizeof(bfloat16) == 2 && std::is_trivially_copyable_v<bfloat16>);
static_assert(sizeof(half) == 2 && std::is_trivially_copyable_v<half>);

/// The compute types of activations. Adapters, their gradients and optimizer states stay float (double under double).
template <class T>
concept Scalar = std::same_as<T, float> || std::same_as<T, double> || std::same_as<T, bfloat16> || std::same_as<T, half>;

/// The type sums and adapter weights of T are kept in: double for double, float for all others.
template <Scalar T>
using Accumulator = std::conditional_t<std::same_as<T, double>, double, float>;

/// The name files use: "float32", "float64", "bfloat16", "float16".
template <Scalar T>
constexpr std::string_view dtype_name() noexcept {
  if constexpr (std::same_as<T, float>) return "float32";
  else if constexpr (std::same_as<T, double>) return "float64";
  else if constexpr (std::same_as<T, bfloat16>) return "bfloat16";
  else return "float16";
}

namespace detail {

/// Rounds `value` to float here: keeps a compiler from fusing a multiply and the add after it where a format defines two roundings.
QDYLORA_HD inline float rounded(float value) noexcept {
#if defined(__CUDA_ARCH__)
  return value;  // device code uses __fmul_rn / __fadd_rn
#elif defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  asm("" : "+x"(value));
  return value;
#elif defined(__aarch64__) && (defined(__GNUC__) || defined(__clang__))
  asm("" : "+w"(value));
  return value;
#else
  volatile float kept = value;
  return kept;
#endif
}

}  // namespace detail
}  // namespace qdylora
