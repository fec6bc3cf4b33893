// Code formats: tables and thresholds bit for bit, encoders against the oracle that walks over midpoints.
#include <qdylora/quant/format.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <vector>

#include <qdylora/core/random.hpp>
#include <qdylora/cpu/reference.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/golden.hpp"

namespace format_test {

namespace qd = qdylora;

namespace {

template <std::size_t N>
int different_bits(const std::array<float, N>& found, const std::vector<float>& expected) {
  if (expected.size() != N) return -1;
  int count = 0;
  for (std::size_t i = 0; i < N; ++i) count += std::bit_cast<std::uint32_t>(found[i]) != std::bit_cast<std::uint32_t>(expected[i]);
  return count;
}

std::vector<float> golden_codes(const char* tensor) { return test::load<float>("codes.safetensors", tensor); }

// Values at, just below and just above every midpoint and table value, both signs; and random ones, in [-1, 1] and tiny.
template <class Format>
std::vector<float> probes(int random_count) {
  std::vector<float> sorted;
  for (const float v : Format::values)
    if (std::isfinite(v)) sorted.push_back(v);
  std::sort(sorted.begin(), sorted.end());
  std::vector<float> probes = {0.0f, -0.0f, 1.0f, -1.0f, 1e-45f, -1e-45f, 1e-30f, -1e-30f};
  const auto add = [&](float v) {
    for (const float p : {v, std::nextafter(v, 2.0f), std::nextafter(v, -2.0f)})
      if (std::fabs(p) <= 1.0f) probes.insert(probes.end(), {p, -p});
  };
  for (std::size_t i = 0; i < sorted.size(); ++i) {
    add(sorted[i]);
    if (i > 0) add((sorted[i - 1] + sorted[i]) / 2.0f);
  }
  qd::Rng rng(17);
  for (int i = 0; i < random_count; ++i)
    probes.push_back(rng.uniform(-1.0f, 1.0f) * (i % 4 ? 1.0f : std::exp2(-20 * rng.uniform())));
  return probes;
}

}  // namespace

TEST_CASE("the 4-bit tables and thresholds are bitsandbytes' to the bit") {
  CHECK(different_bits(qd::NF4::values, golden_codes("nf4")) == 0);
  CHECK(different_bits(qd::NF4::thresholds, golden_codes("nf4_thresholds")) == 0);
  CHECK(different_bits(qd::FP4::values, golden_codes("fp4")) == 0);
  CHECK(different_bits(qd::FP4::thresholds, golden_codes("fp4_thresholds_cpu")) == 0);
  const auto order = test::load<std::int32_t>("codes.safetensors", "fp4_sorted_order");
  CHECK(std::equal(order.begin(), order.end(), qd::FP4::ascending.begin(), qd::FP4::ascending.end()));
}

TEST_CASE("the dynamic maps are bitsandbytes' to the bit") {
  CHECK(different_bits(qd::DynamicMap8::values, golden_codes("dynamic_signed")) == 0);
  CHECK(different_bits(qd::DynamicMapU8::values, golden_codes("dynamic_unsigned")) == 0);
}

TEST_CASE("NF4 is what its derivation gives, within 8 units of the last place") {
  // The inverse of Phi by Newton's method.
  const auto quantile = [](double p) {
    double x = 0;
    for (int i = 0; i < 60; ++i) {
      const double phi = 0.5 * std::erfc(-x / std::numbers::sqrt2);
      x -= (phi - p) / (std::exp(-x * x / 2) / std::sqrt(2 * std::numbers::pi));
    }
    return x;
  };
  const double offset = 929.0 / 960.0;
  std::vector<double> values = {0.0};
  for (int i = 0; i < 8; ++i) values.push_back(quantile(offset + (0.5 - offset) * i / 8));
  for (int i = 0; i < 7; ++i) values.push_back(-quantile(offset + (0.5 - offset) * i / 7));
  std::sort(values.begin(), values.end());
  for (std::size_t i = 0; i < 16; ++i) {
    CAPTURE(i);
    CHECK(test::ulps_between(static_cast<float>(values[i] / values[15]), qd::NF4::values[i]) <= 8);
  }
}

TEST_CASE("INT4 has 15 levels of 1/7 and never writes code 0") {
  for (int level = -7; level <= 7; ++level) {
    const float v = static_cast<float>(level) / 7.0f;
    CHECK(qd::INT4::values[static_cast<std::size_t>(level + 8)] == v);
    CHECK(qd::INT4::encode(v) == level + 8);
  }
  CHECK(qd::INT4::encode(-1.0f) == 1);
}

TEST_CASE("INT8 is a number of 127ths in two's complement, rounded to the nearest") {
  for (int level = -127; level <= 127; ++level) {
    const auto code = static_cast<std::uint8_t>(level);
    const float v = static_cast<float>(level) / 127.0f;
    CHECK(qd::INT8::encode(v) == code);
    CHECK(test::ulps_between(qd::INT8::values[code], v) <= 1);
  }
  CHECK(qd::INT8::values[0x80] < -1.0f);  // Q8_0 may hold it; it is never written
  CHECK(qd::INT8::encode(std::numeric_limits<float>::quiet_NaN()) == 0);
  float worst = 0.0f;
  for (int i = -100000; i <= 100000; ++i) {
    const float v = static_cast<float>(i) / 100000.0f;
    worst = std::max(worst, std::fabs(qd::INT8::values[qd::INT8::encode(v)] - v));
  }
  CHECK(worst <= 0.50001f / 127.0f);
  CHECK(worst >= 0.499f / 127.0f);
}

TEMPLATE_TEST_CASE("4-bit encoders agree with the oracle on midpoints, their neighbours and a million others", "", qd::NF4, qd::FP4,
                   qd::INT4) {
  int wrong = 0;
  for (const float v : probes<TestType>(1000000 / 16)) {
    const auto code = TestType::encode(v);
    wrong += code != qd::reference::nearest_code<TestType>(v);
  }
  CHECK(wrong == 0);
  CHECK(TestType::encode(std::numeric_limits<float>::quiet_NaN()) == qd::reference::nearest_code<TestType>(NAN));
}

TEMPLATE_TEST_CASE("8-bit encoders agree with the oracle on midpoints, their neighbours and others", "", qd::DynamicMap8,
                   qd::DynamicMapU8, qd::INT8, qd::FP8E4M3, qd::FP8E5M2) {
  int wrong = 0;
  for (const float v : probes<TestType>(10000)) {
    const int code = TestType::encode(v), expected = qd::reference::nearest_code<TestType>(v);
    if (code == expected) continue;
    CAPTURE(v);
    if (++wrong < 5) CHECK(code == expected);
  }
  CHECK(wrong == 0);
}

TEMPLATE_TEST_CASE("every finite table value encodes to a code of that value", "", qd::NF4, qd::FP4, qd::INT4, qd::INT8,
                   qd::FP8E4M3, qd::FP8E5M2, qd::DynamicMap8, qd::DynamicMapU8) {
  for (std::size_t code = std::is_same_v<TestType, qd::INT4> ? 1 : 0; code < TestType::values.size(); ++code) {
    const float v = TestType::values[code];
    if (!std::isfinite(v)) continue;
    CAPTURE(code, v);
    CHECK(TestType::values[TestType::encode(v)] == v);
    if (v != 0.0f) CHECK(TestType::encode(v) == code);
  }
}

TEST_CASE("a tie takes the lower neighbour in the 4-bit formats") {
  for (std::size_t i = 0; i < 15; ++i) {
    CHECK(qd::NF4::encode(qd::NF4::thresholds[i]) == i);
    CHECK(qd::NF4::encode(std::nextafter(qd::NF4::thresholds[i], 2.0f)) == i + 1);
    CHECK(qd::FP4::encode(qd::FP4::thresholds[i]) == qd::FP4::ascending[i]);
    CHECK(qd::FP4::encode(std::nextafter(qd::FP4::thresholds[i], 2.0f)) == qd::FP4::ascending[i + 1]);
  }
  CHECK(qd::FP4::encode(0.002f) == 8);  // as bitsandbytes on the CPU
  CHECK(qd::FP4::encode(-0.002f) == 0);
  CHECK(qd::FP4::encode(0.0f) == 0);
}

TEST_CASE("a tie takes the even code in the dynamic maps") {
  int ties = 0;
  for (std::size_t i = 0; i < 255; ++i) {
    const float middle = (qd::DynamicMap8::values[i] + qd::DynamicMap8::values[i + 1]) * 0.5f;
    CHECK(qd::DynamicMap8::encode(middle) == i + (i % 2));
    ++ties;
  }
  CHECK(ties == 255);
  CHECK(qd::DynamicMap8::encode(NAN) == 0);
  CHECK(qd::DynamicMap8::encode(-1.0f) == 0);
  CHECK(qd::DynamicMap8::encode(0.0f) == 127);
  CHECK(qd::DynamicMap8::encode(INFINITY) == 255);
  CHECK(qd::DynamicMapU8::encode(0.0f) == 0);
}

TEST_CASE("OCP 8-bit floats decode to torch's values") {
  const auto e4m3 = golden_codes("ocp_e4m3fn_by_code"), e5m2 = golden_codes("ocp_e5m2_by_code");
  for (unsigned code = 0; code < 256; ++code) {
    CAPTURE(code);
    const float a = qd::OcpFloat8<4, 3>::decode(static_cast<std::uint8_t>(code));
    const float b = qd::OcpFloat8<5, 2>::decode(static_cast<std::uint8_t>(code));
    CHECK((std::isnan(a) ? std::isnan(e4m3[code]) : std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(e4m3[code])));
    CHECK((std::isnan(b) ? std::isnan(e5m2[code]) : std::bit_cast<std::uint32_t>(b) == std::bit_cast<std::uint32_t>(e5m2[code])));
  }
}

TEST_CASE("OCP conversions of the golden sample are torch's") {
  const auto input = golden_codes("fp8cvt_in");
  const auto e4m3 = test::load<std::uint8_t>("codes.safetensors", "fp8cvt_e4m3fn");
  const auto e5m2 = test::load<std::uint8_t>("codes.safetensors", "fp8cvt_e5m2");
  for (std::size_t i = 0; i < input.size(); ++i) {
    CAPTURE(input[i]);
    const auto a = qd::OcpFloat8<4, 3>::encode(input[i]);
    const auto b = qd::OcpFloat8<5, 2>::encode(input[i], qd::Overflow::ieee);
    if (std::isnan(input[i])) {
      CHECK((a & 0x7F) == 0x7F);
      CHECK((b & 0x7F) > 0x7C);
    } else {
      CHECK(static_cast<int>(a) == e4m3[i]);
      CHECK(static_cast<int>(b) == e5m2[i]);
    }
  }
}

TEST_CASE("OCP encoders round every bfloat16, every midpoint and random floats to the nearest, ties to even") {
  const auto check = [](auto ocp) {
    using Ocp = decltype(ocp);
    const auto nearest = [](float x) -> unsigned {  // of the finite codes, by distance
      const double magnitude = std::fabs(static_cast<double>(x));
      unsigned best = 0;
      for (unsigned code = 1; code <= Ocp::max_code; ++code) {
        const double middle = (static_cast<double>(Ocp::decode(static_cast<std::uint8_t>(code - 1))) +
                               static_cast<double>(Ocp::decode(static_cast<std::uint8_t>(code)))) / 2;
        if (magnitude > middle || (magnitude == middle && code % 2 == 0)) best = code;
      }
      return best | (std::signbit(x) ? 0x80u : 0u);
    };
    std::vector<float> inputs;
    for (std::uint32_t bits = 0; bits < 65536; ++bits) inputs.push_back(std::bit_cast<float>(bits << 16));
    for (unsigned code = 0; code < Ocp::max_code; ++code) {
      const float middle =
          (Ocp::decode(static_cast<std::uint8_t>(code)) + Ocp::decode(static_cast<std::uint8_t>(code + 1))) / 2.0f;
      for (const float x : {middle, std::nextafter(middle, 1e9f), std::nextafter(middle, 0.0f)})
        inputs.insert(inputs.end(), {x, -x});
    }
    qd::Rng rng(3);
    for (int i = 0; i < 20000; ++i) inputs.push_back(std::bit_cast<float>(rng.next()));
    int wrong = 0;
    for (const float x : inputs) {
      const unsigned code = Ocp::encode(x);
      wrong += std::isnan(x) ? (code & 0x7F) != 0x7F : code != nearest(x);
    }
    CHECK(wrong == 0);
  };
  check(qd::OcpFloat8<4, 3>{});
  check(qd::OcpFloat8<5, 2>{});
}

TEST_CASE("beyond the range OCP floats saturate or follow IEEE, by choice") {
  using E4M3 = qd::OcpFloat8<4, 3>;
  using E5M2 = qd::OcpFloat8<5, 2>;
  using qd::Overflow;
  CHECK(E4M3::encode(464.0f) == 0x7E);
  CHECK(E4M3::encode(464.0f, Overflow::ieee) == 0x7E);  // the tie between 448 and 480
  CHECK(E4M3::encode(464.1f) == 0x7E);
  CHECK(E4M3::encode(464.1f, Overflow::ieee) == 0x7F);
  CHECK(E4M3::encode(-1e9f, Overflow::ieee) == 0xFF);
  CHECK(E4M3::encode(-INFINITY) == 0xFE);
  CHECK(E4M3::encode(INFINITY, Overflow::ieee) == 0x7F);
  CHECK(E5M2::encode(61439.0f, Overflow::ieee) == 0x7B);
  CHECK(E5M2::encode(61440.0f, Overflow::ieee) == 0x7C);
  CHECK(E5M2::encode(61440.0f) == 0x7B);
  CHECK(E5M2::encode(-INFINITY, Overflow::ieee) == 0xFC);
  CHECK(E5M2::encode(INFINITY) == 0x7B);
  CHECK(E4M3::encode(0x1p-10f) == 0);
  CHECK(E4M3::encode(std::nextafter(0x1p-10f, 1.0f)) == 1);
  CHECK(E4M3::encode(-0.0f) == 0x80);
  CHECK(E4M3::encode(1e-45f) == 0);
}

TEST_CASE("the scaled 8-bit formats put their largest finite value at 1") {
  CHECK(qd::FP8E4M3::encode(1.0f) == 0x7E);
  CHECK(qd::FP8E4M3::encode(-1.0f) == 0xFE);
  CHECK(qd::FP8E5M2::encode(1.0f) == 0x7B);
  const float nan = std::numeric_limits<float>::quiet_NaN();
  for (const float v : {nan, -nan}) CHECK((qd::FP8E4M3::encode(v) == 0x7F && qd::FP8E5M2::encode(v) == 0x7F));
  CHECK(qd::FP8E4M3::values[0x7E] == 1.0f);
  CHECK(std::isnan(qd::FP8E4M3::values[0x7F]));
  CHECK(std::isinf(qd::FP8E5M2::values[0x7C]));
}

}  // namespace format_test
