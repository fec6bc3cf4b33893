#include <cstdint>
#include <string>
#include <vector>

#include "common/text.hpp"
#include "support/catch.hpp"
#include "support/files.hpp"

namespace text_test {

namespace ex = qdylora::examples;
using Numbers = std::vector<std::int64_t>;

TEST_CASE("text in any language stays readable, and nothing steers a terminal", "[text]") {
  CHECK(ex::printable_utf8("") == "");
  const std::string readable = "Z\u00fcrich, \u041c\u043e\u0441\u043a\u0432\u0430, \u6771\u4eac, \U0001F600 \uFFFD ~";
  CHECK(ex::printable_utf8(readable) == readable);
  CHECK(ex::printable_utf8("a\nb\t\r") == "a\\x0ab\\x09\\x0d");
  CHECK(ex::printable_utf8("\x1b[2J\x7f") == "\\x1b[2J\\x7f");
  CHECK(ex::printable_utf8(std::string_view("\0", 1)) == "\\x00");
  CHECK(ex::printable_utf8("\u009b31m") == "\\xc2\\x9b31m");     // the same as ESC [ to some terminals
  CHECK(ex::printable_utf8("x\u202ey") == "x\\xe2\\x80\\xaey");  // right to left from here
  CHECK(ex::printable_utf8("\u2028\u2066") == "\\xe2\\x80\\xa8\\xe2\\x81\\xa6");
  CHECK(ex::printable_utf8("\xff\xc3") == "\\xff\\xc3");  // no UTF-8
  CHECK(ex::printable_utf8("\xe6\x9d"
                           "a") == "\\xe6\\x9da");  // a character cut short
}

TEST_CASE("a list is taken whole or refused", "[text]") {
  CHECK(ex::parse_list("--l", "a") == std::vector<std::string>{"a"});
  CHECK(ex::parse_list("--l", "a,b c") == std::vector<std::string>{"a", "b c"});
  CHECK(ex::parse_numbers<std::int64_t>("--l", "3,0,3") == Numbers{3, 0, 3});
  CHECK(ex::parse_numbers<std::int32_t>("--l", "2147483647") == std::vector<std::int32_t>{2147483647});
  for (const char* text : {"", ",", "1,,3", ",1", "1,", "one", "1 2", "1, 2", "-1", "+1", "1.0", "1e3", "0x1", "9223372036854775808"}) {
    CAPTURE(text);
    const auto error = test::error_of([&] { ex::parse_numbers<std::int64_t>("--l", text); });
    REQUIRE(error);
    CHECK(error->code() == qdylora::Errc::bad_argument);
    CHECK(std::string(error->what()).starts_with("--l: expected "));
    CHECK(std::string(error->what()).find("'" + std::string(text) + "'") != std::string::npos);
  }
  CHECK(test::code_of([] { ex::parse_numbers<std::int32_t>("--l", "2147483648"); }));
  CHECK(ex::parse_numbers<float>("--l", "-0.5,2", true) == std::vector<float>{-0.5f, 2.0f});
  CHECK(test::code_of([] { ex::parse_numbers<float>("--l", "-0.5,2"); }) == qdylora::Errc::bad_argument);
  CHECK(test::code_of([] { ex::parse_numbers<float>("--l", "--5,2", true); }) == qdylora::Errc::bad_argument);
}

}  // namespace text_test
