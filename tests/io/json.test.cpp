#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include <qdylora/io/json.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"

namespace json_test {

namespace qd = qdylora;
using qd::Errc;
using test::code_of;
using test::error_of;

namespace {

qd::Json parse(const std::string& text, const qd::Limits& limits = {}) {
  return qd::parse_json(text, {.file = "config.json"}, limits);
}

std::string nested(int depth) {
  return std::string(static_cast<std::size_t>(depth), '[') + std::string(static_cast<std::size_t>(depth), ']');
}

}  // namespace

TEST_CASE("a JSON document is parsed") {
  const qd::Json json = parse(R"( {"a": 1, "b": [true, null, "caf\u00e9"], "c": {"a": -2.5e3}} )");
  CHECK(json["a"] == 1);
  CHECK(json["b"][2] == "caf\xC3\xA9");
  CHECK(json["c"]["a"] == -2500.0);
  CHECK(parse("7") == 7);
}

TEST_CASE("text that is no JSON names the byte") {
  struct Bad {
    std::string text;
    Errc code;
    std::uint64_t offset;
  };
  for (const Bad& bad : std::vector<Bad>{
           {"", Errc::json, 0},
           {"{", Errc::json, 1},
           {"{\"a\": 1} x", Errc::json, 9},
           {"{\"a\": tru}", Errc::json, 9},
           {"{\"a\": 01}", Errc::json, 7},
           {"{'a': 1}", Errc::json, 1},
           {"[1, 2,]", Errc::json, 6},
           {"[NaN]", Errc::json, 1},
           {"[\"\x01\"]", Errc::json, 2},
           {"[\"\\ud800\"]", Errc::json, 8},
           {"[\"\\x\"]", Errc::json, 3},
           {std::string("{}\0", 3), Errc::json, 2},
           {std::string("{}\0garbage", 10), Errc::json, 2},
           {"{\"a\": \"\xFF\"}", Errc::utf8, 7},
           {"{\"\xC3\": 1}", Errc::utf8, 2},
       }) {
    CAPTURE(qd::printable(bad.text));
    const auto error = error_of([&] { parse(bad.text); });
    REQUIRE(error);
    CHECK(error->code() == bad.code);
    CHECK(error->offset() == bad.offset);
    CHECK(error->file() == "config.json");
    for (const char c : std::string(error->what())) CHECK((c >= 0x20 && c < 0x7F));
  }
  const auto shifted = error_of([&] { qd::parse_json("[x]", {.file = "f", .offset = 100}); });
  REQUIRE(shifted);
  CHECK(shifted->offset() == 101u);
  CHECK(std::string(shifted->what()).starts_with("f: syntax error"));  // nothing of the parser's own, nor its lines and columns
  CHECK(code_of([] { parse("[1e999]"); }) == Errc::json);
}

TEST_CASE("a key twice in one object is an error, in two objects it is none") {
  CHECK(code_of([] { parse(R"({"a": 1, "a": 1})"); }) == Errc::duplicate);
  CHECK(code_of([] { parse(R"({"a": 1, "x": {"b": 2}, "a": 3})"); }) == Errc::duplicate);
  CHECK_FALSE(code_of([] { parse(R"({"x": {"b": 1}, "b": 2})"); }));
  CHECK(code_of([] { parse(R"({"x": [{"b": {}}, {"a": 1, "\u0061": 2}]})"); }) == Errc::duplicate);
  CHECK_FALSE(code_of([] { parse(R"({"a": {"a": {"a": 1}}, "b": [{"a": 1}, {"a": 2}]})"); }));
}

TEST_CASE("depth, size and number of values of a document are bounded") {
  CHECK_FALSE(code_of([] { parse(nested(8)); }));
  CHECK(code_of([] { parse(nested(9)); }) == Errc::limit);
  CHECK(code_of([] { parse(R"({"a":{"a":{"a":{"a":{"a":{"a":{"a":{"a":{}}}}}}}}})"); }) == Errc::limit);
  CHECK(code_of([] { parse(nested(1'000'000)); }) == Errc::limit);
  CHECK(code_of([] { parse(std::string(1'000'000, '[')); }) == Errc::limit);
  CHECK_FALSE(code_of([] { parse(nested(64), {.json_depth = 64}); }));
  CHECK(code_of([] { parse(nested(65), {.json_depth = 64}); }) == Errc::limit);
  CHECK(code_of([] { parse("1", {.json_depth = 65}); }) == Errc::bad_argument);
  CHECK_FALSE(code_of([] { parse("[1,2,3]", {.json_bytes = 7}); }));
  CHECK(code_of([] { parse("[1,2,3]", {.json_bytes = 6}); }) == Errc::limit);
  CHECK_FALSE(code_of([] { parse("[1,2,3]", {.json_values = 4}); }));
  CHECK(code_of([] { parse("[1,2,3]", {.json_values = 3}); }) == Errc::limit);
}

TEST_CASE("accessors give values of the type that is asked for") {
  const qd::Json json = parse(R"({"s": "text", "i": -7, "u": 18446744073709551615, "n": 0.5, "one": 1.0, "t": true, "null": null,
                                 "shape": [96, 128], "names": ["q", "k"], "o": {"x": 1}, "huge": 18446744073709551616})");
  CHECK(qd::get_string(json, "s") == "text");
  CHECK(qd::get_integer(json, "i", -7, -7) == -7);
  CHECK(qd::get_number(json, "n") == 0.5);
  CHECK(qd::get_number(json, "i") == -7.0);
  CHECK(qd::get_bool(json, "t"));
  CHECK(qd::get_integers(json, "shape", 1, 1000) == std::vector<std::int64_t>{96, 128});
  CHECK(qd::get_strings(json, "names") == std::vector<std::string>{"q", "k"});
  CHECK(qd::get_integer(qd::get_object(json, "o"), "x", 0, 1) == 1);

  CHECK(qd::get_string_or(json, "absent", "d") == "d");
  CHECK(qd::get_string_or(json, "null", "d") == "d");
  CHECK(qd::get_string_or(json, "s", "d") == "text");
  CHECK(qd::get_integer_or(json, "absent", 3, 0, 1) == 3);
  CHECK(qd::get_integer_or(json, "i", 3, -10, 10) == -7);
  CHECK(qd::get_number_or(json, "null", 2.5) == 2.5);
  CHECK(qd::get_bool_or(json, "absent", true));

  const qd::ErrorPlace place{.file = "config.json"};
  const auto refused = [&](auto access, const std::string& key) {
    CAPTURE(key);
    const auto error = error_of(access);
    REQUIRE(error);
    CHECK(error->code() == Errc::bad_config);
    CHECK(error->file() == "config.json");
    CHECK(std::string(error->what()).find("'" + key + "'") != std::string::npos);
  };
  constexpr auto least = std::numeric_limits<std::int64_t>::min();
  constexpr auto most = std::numeric_limits<std::int64_t>::max();
  refused([&] { qd::get_string(json, "absent", place); }, "absent");
  refused([&] { qd::get_string(json, "null", place); }, "null");
  refused([&] { qd::get_string(json, "i", place); }, "i");
  refused([&] { qd::get_string_or(json, "i", "d", place); }, "i");
  refused([&] { qd::get_integer(json, "one", least, most, place); }, "one");
  refused([&] { qd::get_integer(json, "u", least, most, place); }, "u");
  refused([&] { qd::get_integer(json, "huge", least, most, place); }, "huge");
  refused([&] { qd::get_integer(json, "i", -6, most, place); }, "i");
  refused([&] { qd::get_integer(json, "i", least, -8, place); }, "i");
  refused([&] { qd::get_integer(json, "t", least, most, place); }, "t");
  refused([&] { qd::get_integer_or(json, "s", 0, least, most, place); }, "s");
  refused([&] { qd::get_number(json, "s", place); }, "s");
  refused([&] { qd::get_number_or(json, "t", 0, place); }, "t");
  refused([&] { qd::get_bool(json, "i", place); }, "i");
  refused([&] { qd::get_bool_or(json, "s", true, place); }, "s");
  refused([&] { qd::get_integers(json, "shape", 1, 100, place); }, "shape");
  refused([&] { qd::get_integers(json, "i", 1, 100, place); }, "i");
  refused([&] { qd::get_strings(json, "shape", place); }, "shape");
  refused([&] { qd::get_object(json, "shape", place); }, "shape");
  refused([&] { qd::get_string(json["shape"], "x", place); }, "x");
}

}  // namespace json_test
