// The 4-bit formats that papers compare NF4 with, as code formats.
#include <algorithm>
#include <cmath>
#include <fstream>
#include <limits>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/io/json.hpp>

#include "common/other_formats.hpp"
#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/golden.hpp"
#include "support/random_data.hpp"

namespace other_formats_test {

namespace qd = qdylora;
using qd::Index;
using qd::examples::AF4;
using qd::examples::E2M1;
using qd::examples::E3M0;
using qd::examples::INT4Of16;

namespace {

template <class Format>
void expect_nearest() {
  for (int i = -1000; i <= 1000; ++i) {
    const float v = static_cast<float>(i) / 1000.0f;
    float least = 9.0f;
    for (const float value : Format::values) least = std::min(least, std::fabs(v - value));
    CAPTURE(v);
    CHECK(std::fabs(v - Format::values[Format::encode(v)]) == Approx(least).margin(1e-6));
  }
  for (const float value : Format::values) CHECK(Format::values[Format::encode(value)] == value);
  CHECK(std::is_sorted(Format::values.begin(), Format::values.end()));
}

}  // namespace

TEST_CASE("E2M1, E3M0, AF4 and INT4 of 16 levels have their values, and encode to the nearest") {
  const float e2m1[] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};
  for (std::size_t code = 0; code < 8; ++code) {
    CHECK(E2M1::values[8 + code] == e2m1[code] / 6.0f);
    CHECK(E3M0::values[8 + code] == (code == 0 ? 0.0f : std::ldexp(1.0f, static_cast<int>(code) - 7)));
    CHECK(E2M1::values[7 - code] == -e2m1[code] / 6.0f);
    CHECK(INT4Of16::values[code] == (static_cast<float>(code) - 8.0f) / 8.0f);
  }
  CHECK(INT4Of16::values[INT4Of16::encode(1.0f)] == 0.875f);  // the price of the level -8
  CHECK(INT4Of16::values[INT4Of16::encode(-1.0f)] == -1.0f);
  expect_nearest<E2M1>();
  expect_nearest<E3M0>();
  expect_nearest<INT4Of16>();
  expect_nearest<AF4>();
}

TEST_CASE("other formats' errors on N(0, 1) are those of the golden table, by the backend's kernels") {
  std::ifstream stream(test::golden("quant_error_normal.json"));
  const qd::Json golden = qd::Json::parse(stream).at("results");
  const auto x = test::normal_matrix<float>(1024, 1024, 19);
  const qd::Cpu cpu(1);
  const auto check = [&]<class Format>(const char* name, Format) {
    const auto tensor = cpu.quantize<Format, qd::Float32Scales>(x.view());
    qd::Matrix<float> decoded(x.rows(), x.cols());
    cpu.dequantize(tensor.view(), decoded.view());
    const auto found = test::distortion(x.view(), decoded.view());
    CAPTURE(name);
    CHECK(found.mean_squared_error == Approx(golden.at(name).at("mse").template get<double>()).epsilon(0.015));
    CHECK(found.mean_absolute_error == Approx(golden.at(name).at("mae").template get<double>()).epsilon(0.01));
  };
  check("FP4 E2M1 OCP", E2M1{});
  check("FP4 E3M0 (0,2^-6..1)", E3M0{});
  check("INT4 -8..7 (/8)", INT4Of16{});
  check("AF4-64", AF4{});
}

}  // namespace other_formats_test
