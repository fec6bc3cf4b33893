// bfloat16 and half: exhaustive in their own 65536 values, golden against torch, ties and edges against the definition.
#include <qdylora/core/scalar.hpp>

#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>

#include "support/catch.hpp"
#include "support/golden.hpp"

namespace scalar_test {

namespace qd = qdylora;

namespace {

// The value of a 16-bit float from its definition, in double.
double defined_value(std::uint32_t bits, int exponent_bits, int mantissa_bits) {
  const std::uint32_t mantissa = bits & ((1u << mantissa_bits) - 1);
  const int exponent = static_cast<int>((bits >> mantissa_bits) & ((1u << exponent_bits) - 1));
  const int bias = (1 << (exponent_bits - 1)) - 1;
  const double sign = bits >> 15 ? -1.0 : 1.0;
  if (exponent == (1 << exponent_bits) - 1)
    return mantissa ? std::numeric_limits<double>::quiet_NaN() : sign * std::numeric_limits<double>::infinity();
  const double significand = exponent ? 1.0 + std::ldexp(mantissa, -mantissa_bits) : std::ldexp(mantissa, -mantissa_bits);
  return sign * std::ldexp(significand, (exponent ? exponent : 1) - bias);
}

template <class T>
constexpr int exponent_bits = std::is_same_v<T, qd::half> ? 5 : 8;

}  // namespace

TEMPLATE_TEST_CASE("every 16-bit pattern decodes to its defined value and encodes back to itself", "", qd::bfloat16, qd::half) {
  constexpr int e = exponent_bits<TestType>;
  int wrong = 0;
  for (std::uint32_t bits = 0; bits < 65536; ++bits) {
    const auto value = TestType::from_bits(static_cast<std::uint16_t>(bits));
    const float decoded = value;
    const double expected = defined_value(bits, e, 15 - e);
    if (std::isnan(expected)) {
      wrong += !std::isnan(decoded);
      wrong += !std::isnan(static_cast<float>(TestType(decoded)));
    } else {
      wrong += static_cast<double>(decoded) != expected || std::signbit(decoded) != std::signbit(expected);
      wrong += TestType(decoded).bits != bits;
    }
  }
  CHECK(wrong == 0);
}

TEMPLATE_TEST_CASE("between neighbours the nearest is taken, a tie to the even one", "", qd::bfloat16, qd::half) {
  constexpr int e = exponent_bits<TestType>;
  const std::uint32_t infinity = ((1u << e) - 1) << (15 - e);
  int wrong = 0;
  for (std::uint32_t sign = 0; sign < 65536; sign += 32768)
    for (std::uint32_t bits = 0; bits + 1 < infinity; ++bits) {
      const double low = defined_value(sign + bits, e, 15 - e), high = defined_value(sign + bits + 1, e, 15 - e);
      const auto middle = static_cast<float>((low + high) / 2);  // exact: floats have 13 bits more
      const float away = std::nextafter(middle, static_cast<float>(high)), back = std::nextafter(middle, static_cast<float>(low));
      wrong += TestType(middle).bits != sign + (bits % 2 ? bits + 1 : bits);
      wrong += TestType(away).bits != sign + bits + 1;
      wrong += TestType(back).bits != sign + bits;
    }
  CHECK(wrong == 0);
}

TEST_CASE("beyond the largest finite value 16-bit floats round to infinity by the same rule") {
  CHECK(qd::half(65504.0f).bits == 0x7BFF);
  CHECK(qd::half(65519.99f).bits == 0x7BFF);
  CHECK(qd::half(65520.0f).bits == 0x7C00);
  CHECK(qd::half(-1e9f).bits == 0xFC00);
  CHECK(qd::half(std::numeric_limits<float>::infinity()).bits == 0x7C00);
  CHECK(qd::half(0x1p-25f).bits == 0);
  CHECK(qd::half(std::nextafter(0x1p-25f, 1.0f)).bits == 1);
  CHECK(qd::half(-0.0f).bits == 0x8000);
  CHECK(qd::bfloat16(std::numeric_limits<float>::max()).bits == 0x7F80);
  CHECK(qd::bfloat16(std::bit_cast<float>(0x7F7F7FFFu)).bits == 0x7F7F);
  CHECK(qd::bfloat16(std::bit_cast<float>(0x7F7F8000u)).bits == 0x7F80);
  CHECK(qd::bfloat16(-std::numeric_limits<float>::infinity()).bits == 0xFF80);
}

TEST_CASE("NaN stays a quiet NaN with its sign") {
  for (const std::uint32_t bits : {0x7F800001u, 0x7FC00000u, 0x7FFFFFFFu, 0xFF800001u, 0xFFC00000u}) {
    const auto value = std::bit_cast<float>(bits);
    const std::uint16_t b = qd::bfloat16(value).bits, h = qd::half(value).bits;
    CHECK((b & 0x7FC0) == 0x7FC0);
    CHECK((h & 0x7E00) == 0x7E00);
    CHECK((b >> 15) == (bits >> 31));
    CHECK((h >> 15) == (bits >> 31));
  }
}

TEST_CASE("conversions of the golden sample are torch's") {
  const qd::SafetensorsFile file(test::golden("codes.safetensors"));
  const auto input = test::load<float>(file, "fp8cvt_in");
  const auto bytes_of = [&](const char* name) {
    std::vector<std::uint16_t> values(input.size());
    file.read(name, std::as_writable_bytes(std::span(values)));
    return values;
  };
  const auto bfloat16s = bytes_of("bf16cvt_u16"), halves = bytes_of("fp16cvt_u16");
  REQUIRE(input.size() > 200);
  for (std::size_t i = 0; i < input.size(); ++i) {
    CAPTURE(input[i]);
    if (std::isnan(input[i])) {
      CHECK(std::isnan(static_cast<float>(qd::bfloat16(input[i]))));
      CHECK(std::isnan(static_cast<float>(qd::half(input[i]))));
    } else {
      CHECK(qd::bfloat16(input[i]).bits == bfloat16s[i]);
      CHECK(qd::half(input[i]).bits == halves[i]);
    }
  }
}

TEST_CASE("conversions are constant expressions and names are those of files") {
  static_assert(qd::bfloat16(1.0f).bits == 0x3F80 && qd::half(1.0f).bits == 0x3C00 && static_cast<float>(qd::half(-2.5f)) == -2.5f);
  CHECK(qd::dtype_name<float>() == "float32");
  CHECK(qd::dtype_name<double>() == "float64");
  CHECK(qd::dtype_name<qd::bfloat16>() == "bfloat16");
  CHECK(qd::dtype_name<qd::half>() == "float16");
  static_assert(std::is_same_v<qd::Accumulator<double>, double> && std::is_same_v<qd::Accumulator<qd::half>, float>);
}

}  // namespace scalar_test
