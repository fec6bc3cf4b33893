// Arithmetic word problems with worked answers in GSM8K's style, from a seed: the examples' default data. Questions have one to
// three steps, sums up to 200 and products up to 144; every step is written out, and the last line is "#### " and the answer.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <iterator>
#include <string>
#include <string_view>
#include <type_traits>
#include <unordered_set>
#include <utility>
#include <vector>

#include <qdylora/core/error.hpp>
#include <qdylora/core/random.hpp>
#include <qdylora/core/scalar.hpp>

#include "example.hpp"

namespace qdylora::examples {

enum class Split { train, validation };

/// Where a question belongs, by its text alone: about one in five is for validation, and no question can be in both parts.
inline Split split_of(std::string_view question) noexcept {
  std::uint64_t hash = 0xCBF29CE484222325ull;  // FNV-1a
  for (const char c : question) hash = (hash ^ static_cast<unsigned char>(c)) * 0x100000001B3ull;
  return (hash >> 32) % 5 == 0 ? Split::validation : Split::train;
}

namespace detail {

/// Draws the parts of a problem and writes its steps. Every step computes its result itself, so that the text cannot be wrong.
class ProblemWriter {
 public:
  explicit ProblemWriter(Rng& rng) : rng_(rng) {
    first = pick(names);
    do second = pick(names); while (second == first);
    things = pick(objects);
  }

  std::string first, second;  // two persons
  std::string things;         // what is counted, in the plural

  /// Uniform in [low, high].
  int number(int low, int high) { return low + static_cast<int>(rng_.below(static_cast<std::uint64_t>(high - low + 1))); }

  int add(int a, int b) { return step(a, '+', b, a + b); }
  int subtract(int a, int b) { return step(a, '-', b, a - b); }
  int multiply(int a, int b) { return step(a, '*', b, a * b); }
  int divide(int a, int b) { return step(a, '/', b, a / b); }

  /// The example: the question, and the steps so far, the last of which gave the answer.
  Example ask(std::string question) const { return {std::move(question), steps_ + "#### " + std::to_string(result_)}; }

 private:
  static constexpr std::array<std::string_view, 24> names{"Anna", "Ben",  "Carl", "Dana", "Emma", "Frank", "Grace", "Henry",
                                                          "Ivy",  "Jack", "Kate", "Leo",  "Mary", "Nick",  "Olga",  "Paul",
                                                          "Rosa", "Sam",  "Tina", "Tom",  "Vera", "Will",  "Zoe",   "Alex"};
  static constexpr std::array<std::string_view, 20> objects{
      "apples", "books",  "cards", "coins",  "cookies", "eggs",  "flowers", "marbles", "nuts",   "oranges",
      "pears",  "pencils", "pens",  "plums", "shells",  "stamps", "stickers", "stones",  "tickets", "toys"};

  template <class List>
  std::string pick(const List& list) {
    return std::string(list[rng_.below(list.size())]);
  }

  int step(int a, char sign, int b, int result) {
    steps_ += std::to_string(a) + " " + sign + " " + std::to_string(b) + " = " + std::to_string(result) + ".\n";
    return result_ = result;
  }

  Rng& rng_;
  std::string steps_;
  int result_ = 0;
};

/// Strings and numbers, joined.
template <class... Parts>
std::string text(const Parts&... parts) {
  const auto piece = [](const auto& part) {
    if constexpr (std::is_same_v<std::decay_t<decltype(part)>, int>) {
      return std::to_string(part);
    } else {
      return std::string(part);
    }
  };
  return (piece(parts) + ...);
}

using ProblemTemplate = Example (*)(ProblemWriter&);

inline constexpr ProblemTemplate problem_templates[] = {
    // one step
    [](ProblemWriter& w) {
      const int a = w.number(5, 60), b = w.number(3, 40);
      w.add(a, b);
      return w.ask(text(w.first, " has ", a, " ", w.things, " and finds ", b, " more. How many ", w.things, " does ", w.first,
                        " have now?"));
    },
    [](ProblemWriter& w) {
      const int a = w.number(20, 90), b = w.number(3, a - 2);
      w.subtract(a, b);
      return w.ask(text(w.first, " has ", a, " ", w.things, " and gives ", b, " of them to ", w.second, ". How many ", w.things,
                        " are left?"));
    },
    [](ProblemWriter& w) {
      const int a = w.number(2, 12), b = w.number(2, 12);
      w.multiply(a, b);
      return w.ask(text("There are ", a, " boxes with ", b, " ", w.things, " in each. How many ", w.things, " are there in all?"));
    },
    [](ProblemWriter& w) {
      const int friends = w.number(2, 12), each = w.number(2, 12);
      w.divide(friends * each, friends);
      return w.ask(text(w.first, " shares ", friends * each, " ", w.things, " equally among ", friends, " friends. How many ",
                        w.things, " does each friend get?"));
    },
    // two steps
    [](ProblemWriter& w) {
      const int a = w.number(2, 12), b = w.number(2, 12), c = w.number(2, 30);
      w.add(w.multiply(a, b), c);
      return w.ask(text(w.first, " buys ", a, " bags of ", b, " ", w.things, " and ", c, " single ", w.things, ". How many ",
                        w.things, " does ", w.first, " buy?"));
    },
    [](ProblemWriter& w) {
      const int a = w.number(2, 12), b = w.number(3, 12), c = w.number(2, a * b - 2);
      w.subtract(w.multiply(a, b), c);
      return w.ask(text(w.first, " has ", a, " boxes of ", b, " ", w.things, " and gives ", c, " ", w.things, " to ", w.second,
                        ". How many are left?"));
    },
    [](ProblemWriter& w) {
      const int a = w.number(3, 20), b = w.number(2, 5);
      w.add(a, w.multiply(a, b));
      return w.ask(text(w.first, " has ", a, " ", w.things, ". ", w.second, " has ", b,
                        " times as many. How many do they have together?"));
    },
    [](ProblemWriter& w) {
      const int a = w.number(3, 70), b = w.number(2, 40);
      w.add(a, w.add(a, b));
      return w.ask(text(w.first, " has ", a, " ", w.things, ". ", w.second, " has ", b, " more than ", w.first,
                        ". How many do they have together?"));
    },
    [](ProblemWriter& w) {
      const int price = w.number(2, 9), count = w.number(2, 10), bill = 100;
      w.subtract(bill, w.multiply(price, count));
      return w.ask(text(w.first, " buys ", count, " toys for ", price, " dollars each and pays with ", bill,
                        " dollars. How many dollars does ", w.first, " get back?"));
    },
    [](ProblemWriter& w) {
      const int half = w.number(2, 50), b = w.number(2, 40);
      w.add(w.divide(2 * half, 2), b);
      return w.ask(text(w.first, " has ", 2 * half, " ", w.things, ", gives half of them to ", w.second, ", and then finds ", b,
                        " more. How many does ", w.first, " have now?"));
    },
    [](ProblemWriter& w) {
      const int a = w.number(3, 12), b = w.number(2, 5), c = w.number(2, 20);
      w.add(w.multiply(a, b), c);
      return w.ask(text(w.first, " is ", a, " years old. ", w.second, " is ", b, " times as old. How old will ", w.second,
                        " be in ", c, " years?"));
    },
    [](ProblemWriter& w) {
      const int a = w.number(2, 12), b = w.number(2, 6), c = w.number(2, 6);
      w.multiply(a, w.add(b, c));
      return w.ask(text(w.first, " earns ", a, " dollars an hour and works ", b, " hours on Monday and ", c,
                        " hours on Tuesday. How many dollars does ", w.first, " earn?"));
    },
    // three steps
    [](ProblemWriter& w) {
      const int a = w.number(2, 9), b = w.number(2, 9), c = w.number(2, 9), d = w.number(2, 9);
      const int left = w.multiply(a, b), right = w.multiply(c, d);
      w.add(left, right);
      return w.ask(text(w.first, " has ", a, " bags of ", b, " ", w.things, ". ", w.second, " has ", c, " bags of ", d,
                        ". How many do they have together?"));
    },
    [](ProblemWriter& w) {
      const int boxes = w.number(2, 8), size = w.number(2, 6), trays = w.number(2, 9);
      const int each = (boxes * size + trays - 1) / trays + w.number(1, 3);  // more than what is packed, so that some are sold
      const int baked = w.multiply(trays, each);
      w.divide(w.subtract(baked, baked - boxes * size), size);
      return w.ask(text(w.first, " bakes ", trays, " trays of ", each, " cookies, sells ", baked - boxes * size,
                        ", and packs the rest in boxes of ", size, ". How many boxes are there?"));
    },
    [](ProblemWriter& w) {
      const int a = w.number(10, 30), b = w.number(2, 15), c = w.number(2, 9), times = w.number(2, 3);
      w.multiply(w.subtract(w.add(a, b), c), times);
      return w.ask(text(w.first, " has ", a, " ", w.things, ", finds ", b, " and loses ", c, ". ", w.second, " has ", times,
                        " times as many. How many does ", w.second, " have?"));
    },
    [](ProblemWriter& w) {
      const int a = w.number(2, 4), b = w.number(2, 6), c = w.number(2, 6), eaten = w.number(2, 7);
      w.subtract(w.multiply(w.multiply(a, b), c), eaten);
      return w.ask(text(a, " tables have ", b, " plates each, with ", c, " cookies on every plate. ", w.first, " eats ", eaten,
                        " cookies. How many cookies are left?"));
    },
};

}  // namespace detail

/// One problem of a random kind, of either part.
inline Example word_problem(Rng& rng) {
  detail::ProblemWriter writer(rng);
  return detail::problem_templates[rng.below(std::size(detail::problem_templates))](writer);
}

/// `count` problems of one part, no question twice. Equal arguments give equal problems on every machine.
/// Errors: bad_argument (negative count), limit (more problems than there are).
inline std::vector<Example> word_problems(Split split, Index count, std::uint64_t seed) {
  QDYLORA_EXPECTS(count >= 0, bad_argument, "word_problems: expected a count, found " + std::to_string(count));
  std::vector<Example> problems;
  std::unordered_set<std::string> seen;
  Rng rng(seed, Purpose::data);
  for (Index failures = 0; static_cast<Index>(problems.size()) < count;) {
    Example problem = word_problem(rng);
    if (split_of(problem.prompt) == split && seen.insert(problem.prompt).second) {
      problems.push_back(std::move(problem));
      failures = 0;
    } else if (++failures == 10000) {
      throw Error(Errc::limit, "word_problems: expected " + std::to_string(count) + " different problems, found " +
                                   std::to_string(problems.size()));
    }
  }
  return problems;
}

}  // namespace qdylora::examples
