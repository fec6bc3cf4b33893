#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <qdylora/io/checked.hpp>
#include <qdylora/io/dtype.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"

namespace checked_test {

namespace qd = qdylora;
using qd::Errc;
using test::code_of;

namespace {

__extension__ using Wide = unsigned __int128;

constexpr std::uint64_t top = std::numeric_limits<std::uint64_t>::max();

std::vector<std::uint64_t> boundaries() {
  std::vector<std::uint64_t> values{0, 1, 2, 3, 7, 31, 32, 33, top, top - 1, top / 3};
  for (const int bit : {16, 31, 32, 33, 62, 63}) {
    const std::uint64_t power = std::uint64_t{1} << bit;
    for (const std::uint64_t value : {power - 1, power, power + 1}) values.push_back(value);
  }
  return values;
}

}  // namespace

TEST_CASE("checked sums and products are those of 128-bit arithmetic, or an overflow") {
  const qd::ErrorPlace place{.file = "f", .offset = 42};
  for (const std::uint64_t a : boundaries()) {
    for (const std::uint64_t b : boundaries()) {
      CAPTURE(a, b);
      if (const Wide sum = Wide{a} + b; sum <= top) CHECK(qd::checked_add(a, b, place) == static_cast<std::uint64_t>(sum));
      else CHECK(code_of([&] { qd::checked_add(a, b, place); }) == Errc::overflow);
      if (const Wide product = Wide{a} * b; product <= top)
        CHECK(qd::checked_mul(a, b, place) == static_cast<std::uint64_t>(product));
      else CHECK(code_of([&] { qd::checked_mul(a, b, place); }) == Errc::overflow);
    }
  }
  const auto error = test::error_of([&] { qd::checked_mul(top, 2, place); });
  REQUIRE(error);
  CHECK(error->file() == "f");
  CHECK(error->offset() == 42u);
}

TEST_CASE("padding up gives the next multiple, or an overflow") {
  for (const std::uint64_t value : boundaries()) {
    for (int bit = 0; bit < 64; ++bit) {
      const std::uint64_t alignment = std::uint64_t{1} << bit;
      CAPTURE(value, alignment);
      const Wide padded = (Wide{value} + alignment - 1) / alignment * alignment;
      if (Wide{value} + alignment - 1 <= top) CHECK(qd::checked_pad_up(value, alignment, {}) == static_cast<std::uint64_t>(padded));
      else CHECK(code_of([&] { qd::checked_pad_up(value, alignment, {}); }) == Errc::overflow);
    }
  }
  for (const std::uint64_t alignment : {std::uint64_t{0}, std::uint64_t{3}, std::uint64_t{48}, top}) {
    CHECK(code_of([&] { qd::checked_pad_up(1, alignment, {}); }) == Errc::alignment);
  }
}

TEST_CASE("narrowing keeps the value or is an overflow") {
  CHECK(qd::checked_narrow<std::int64_t>(top / 2, {}) == std::numeric_limits<std::int64_t>::max());
  CHECK(code_of([] { qd::checked_narrow<std::int64_t>(top / 2 + 1, {}); }) == Errc::overflow);
  CHECK(code_of([] { qd::checked_narrow<std::uint64_t>(-1, {}); }) == Errc::overflow);
  CHECK(code_of([] { qd::checked_narrow<std::uint8_t>(256, {}); }) == Errc::overflow);
  CHECK(qd::checked_narrow<std::uint8_t>(255, {}) == 255);
  CHECK(qd::checked_narrow<std::int8_t>(-128, {}) == -128);
}

TEST_CASE("UTF-8 is recognized as RFC 3629 defines it") {
  for (const std::string good :
       {"", "abc", "\x7F", "\xC2\x80", "\xDF\xBF", "\xE0\xA0\x80", "\xED\x9F\xBF", "\xEE\x80\x80", "\xEF\xBF\xBF",
        "\xF0\x90\x80\x80", "\xF4\x8F\xBF\xBF", "caf\xC3\xA9 \xE2\x82\xAC \xF0\x9F\x98\x80"}) {
    CAPTURE(good);
    CHECK_FALSE(qd::utf8_error(good));
  }
  struct Bad {
    std::string text;
    std::size_t at;
  };
  for (const Bad& bad : std::vector<Bad>{{"\x80", 0},
                                         {"a\xBF", 1},
                                         {"\xC0\x80", 0},
                                         {"\xC1\xBF", 0},
                                         {"ab\xC3", 2},
                                         {"\xC3(", 0},
                                         {"\xE0\x9F\xBF", 0},
                                         {"\xE2\x82", 0},
                                         {"\xE2(\x82", 0},
                                         {"\xE2\x82(", 0},
                                         {"\xED\xA0\x80", 0},
                                         {"x\xED\xBF\xBF", 1},
                                         {"\xF0\x8F\xBF\xBF", 0},
                                         {"\xF0\x90\x80", 0},
                                         {"\xF4\x90\x80\x80", 0},
                                         {"\xF5\x80\x80\x80", 0},
                                         {"\xFF", 0},
                                         {"\xC3\xA9\xFE", 2}}) {
    CAPTURE(qd::printable(bad.text));
    REQUIRE(qd::utf8_error(bad.text));
    CHECK(*qd::utf8_error(bad.text) == bad.at);
  }
  const std::string_view euro = "\xE2\x82\xAC";
  CHECK(qd::utf8_error(euro.substr(0, 2)) == 0u);  // what lies behind the end is not looked at
  CHECK(qd::utf8_error(euro.substr(0, 1)) == 0u);
}

TEST_CASE("every dtype is found again by its name") {
  for (int i = 0; i <= static_cast<int>(qd::DType::U64); ++i) {
    const auto dtype = static_cast<qd::DType>(i);
    CHECK(qd::dtype_from_name(qd::name(dtype)) == dtype);
  }
  CHECK(qd::name(qd::DType::F8_E4M3FNUZ) == "F8_E4M3FNUZ");
  CHECK(qd::name(qd::DType::BF16) == "BF16");
  CHECK(qd::bits(qd::DType::F4) == 4);
  CHECK(qd::bits(qd::DType::F6_E3M2) == 6);
  CHECK(qd::bits(qd::DType::F8_E8M0) == 8);
  CHECK(qd::bits(qd::DType::C64) == 64);
  CHECK_FALSE(qd::dtype_from_name("f32"));
  CHECK_FALSE(qd::dtype_from_name(""));
  CHECK(qd::dtype_of<float>() == qd::DType::F32);
  CHECK(qd::dtype_of<double>() == qd::DType::F64);
  CHECK(qd::dtype_of<qd::bfloat16>() == qd::DType::BF16);
  CHECK(qd::dtype_of<qd::half>() == qd::DType::F16);
}

}  // namespace checked_test
