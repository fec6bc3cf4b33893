// Regular expressions of module names: what Python's re.fullmatch says (tests/golden/make_peft_patterns.py), and what is refused.
#include <qdylora/io/pattern.hpp>

#include <string>

#include <qdylora/io/json.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"

namespace pattern_test {

namespace qd = qdylora;

TEST_CASE("expressions match the names that Python's do") {
  const auto cases = qd::read_json(test::golden("peft_patterns") / "expressions.json");
  REQUIRE(cases.size() > 200);
  int matches = 0;
  for (const auto& item : cases) {
    const auto expression = item.at("expression").get<std::string>(), name = item.at("name").get<std::string>();
    CAPTURE(expression, name);
    CHECK(qd::Pattern(expression).matches(name) == item.at("matches").get<bool>());
    matches += item.at("matches").get<bool>() ? 1 : 0;
  }
  CHECK(matches > 50);
}

TEST_CASE("an expression is followed in linear time, however it was meant") {
  std::string nested = "a";
  for (int i = 0; i < 100; ++i) nested = "(" + nested + ")*";
  const qd::Pattern pattern(nested + "b");
  CHECK_FALSE(pattern.matches(std::string(2000, 'a')));
  CHECK(pattern.matches(std::string(2000, 'a') + "b"));
}

TEST_CASE("what is no expression, or none known here, is refused") {
  for (const std::string text : {"(", ")", "a)", "(a", "[", "[a", "[]a", "[b-a]", "*", "a**", "a{2}", "a{2", "\\", "\\1", "\\b", "\\Z",
                                 "(?=a)", "(?P<n>a)", "(?i)a", "a|*", "]", "}"}) {
    CAPTURE(text);
    CHECK(test::code_of([&] { qd::Pattern{text}; }) == qd::Errc::unsupported);
  }
  CHECK(test::code_of([&] { qd::Pattern{std::string(qd::Pattern::longest + 1, 'a')}; }) == qd::Errc::unsupported);
}

}  // namespace pattern_test
