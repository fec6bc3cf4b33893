#include <iterator>
#include <set>
#include <sstream>
#include <string>
#include <vector>

#include "../../examples/common/word_problems.hpp"
#include "support/catch.hpp"

namespace word_problems_test {

namespace qd = qdylora;
namespace ex = qdylora::examples;

namespace {

/// Follows the steps of a worked answer and returns its result; fails where a step is wrong or leaves the promised range.
int checked_result(const std::string& response) {
  std::istringstream lines(response);
  std::string line;
  int last = 0, steps = 0;
  while (std::getline(lines, line)) {
    std::istringstream parts(line);
    if (line.starts_with("#### ")) {
      std::string mark;
      int answer = 0;
      REQUIRE(static_cast<bool>(parts >> mark >> answer));
      CHECK(answer == last);
      CHECK(steps >= 1);
      CHECK(steps <= 3);
      CHECK(!std::getline(lines, line));  // nothing follows
      return answer;
    }
    int a = 0, b = 0, result = 0;
    char sign = 0, equals = 0, stop = 0;
    REQUIRE(static_cast<bool>(parts >> a >> sign >> b >> equals >> result >> stop));
    REQUIRE(equals == '=');
    REQUIRE(stop == '.');
    const int expected = sign == '+' ? a + b : sign == '-' ? a - b : sign == '*' ? a * b : sign == '/' && a % b == 0 ? a / b : -1;
    REQUIRE(result == expected);
    REQUIRE(result > 0);
    REQUIRE(result <= (sign == '*' ? 144 : 200));
    last = result;
    ++steps;
  }
  FAIL("no line with #### in " << response);
  return 0;
}

}  // namespace

TEST_CASE("every step of a worked answer is right, positive and small", "[word_problems]") {
  STATIC_REQUIRE(std::size(ex::detail::problem_templates) >= 12);
  qd::Rng rng(1);
  for (const auto problem : ex::detail::problem_templates) {
    for (int i = 0; i < 400; ++i) {
      ex::detail::ProblemWriter writer(rng);
      const ex::Example example = problem(writer);
      INFO(example.prompt << "\n" << example.response);
      checked_result(example.response);
      CHECK(example.prompt.back() == '?');
      CHECK(example.prompt.size() < 130);
    }
  }
}

TEST_CASE("the same seed gives the same problems, another one others", "[word_problems]") {
  const auto prompts = [](std::uint64_t seed) {
    std::vector<std::string> all;
    for (const auto& example : ex::word_problems(ex::Split::train, 50, seed)) all.push_back(example.prompt + example.response);
    return all;
  };
  CHECK(prompts(1) == prompts(1));
  CHECK(prompts(1) != prompts(2));
  // Fixed for all machines: a change here changes every published table.
  const auto first = ex::word_problems(ex::Split::train, 1, 7).front();
  CHECK(first.prompt == "Grace has 15 cookies, finds 12 and loses 2. Alex has 3 times as many. How many does Alex have?");
  CHECK(first.response == "15 + 12 = 27.\n27 - 2 = 25.\n25 * 3 = 75.\n#### 75");
}

TEST_CASE("no question stands in both parts, nor twice in one", "[word_problems]") {
  std::set<std::string> train, validation;
  for (const std::uint64_t seed : {1u, 2u, 3u}) {
    const auto some_train = ex::word_problems(ex::Split::train, 2000, seed);
    const auto some_validation = ex::word_problems(ex::Split::validation, 500, seed);
    std::set<std::string> distinct;
    for (const auto& example : some_train) distinct.insert(example.prompt), train.insert(example.prompt);
    CHECK(distinct.size() == some_train.size());
    for (const auto& example : some_validation) validation.insert(example.prompt);
  }
  CHECK(validation.size() > 1400);  // seeds differ
  for (const std::string& prompt : validation) CHECK(train.count(prompt) == 0);
}

TEST_CASE("a fifth of all questions is for validation", "[word_problems]") {
  qd::Rng rng(9);
  int validation = 0;
  for (int i = 0; i < 10000; ++i) validation += ex::split_of(ex::word_problem(rng).prompt) == ex::Split::validation ? 1 : 0;
  CHECK(validation > 1800);
  CHECK(validation < 2200);
}

TEST_CASE("a negative number of problems is refused", "[word_problems]") {
  CHECK_THROWS_AS(ex::word_problems(ex::Split::train, -1, 0), qd::Error);
  CHECK(ex::word_problems(ex::Split::train, 0, 0).empty());
}

}  // namespace word_problems_test
