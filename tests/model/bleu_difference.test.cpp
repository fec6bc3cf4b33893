// Intervals of differences of BLEU against corpora small enough to list all their resamples.
#include <array>
#include <cmath>
#include <span>
#include <string>
#include <vector>

#include <qdylora/core/random.hpp>
#include <qdylora/model/bleu_difference.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"

namespace bleu_difference_test {

namespace qd = qdylora;
using Counts = std::vector<qd::BleuCounts>;

namespace {

Counts counts_of(const std::vector<std::string>& answers, const std::vector<std::string>& references) {
  Counts counts;
  for (std::size_t i = 0; i < answers.size(); ++i) counts.push_back(qd::bleu_counts(answers[i], std::span(&references[i], 1)));
  return counts;
}

qd::Interval difference(const Counts& a, const Counts& b, const qd::BootstrapOptions& options = {}) {
  return qd::paired_bleu_difference(std::span(&a, 1), std::span(&b, 1), options);
}

}  // namespace

TEST_CASE("counts of sentences add up to those of their corpus", "[bleu]") {
  const auto counts = qd::bleu_counts("a b c d a", std::vector<std::string>{"a b x", "c d a b c d"});
  CHECK(counts.matched == std::array<qd::Index, 4>{4, 4, 3, 1});  // one a is more than any reference has
  CHECK(counts.total == std::array<qd::Index, 4>{5, 4, 3, 2});
  CHECK(counts.hypothesis_words == 5);
  CHECK(counts.reference_words == 6);
  auto twice = counts;
  twice += counts;
  CHECK(twice.matched == std::array<qd::Index, 4>{8, 8, 6, 2});
  CHECK(twice.reference_words == 12);
  CHECK(qd::bleu_of(twice).score == qd::bleu_of(counts).score);
  CHECK(test::code_of([] { (void)qd::bleu_counts("a", {}); }) == qd::Errc::bad_argument);
}

TEST_CASE("a system differs from itself by nothing", "[bleu]") {
  const auto a = counts_of({"a b c d", "e f x h", "i"}, {"a b c d", "e f g h", "j k"});
  const auto same = difference(a, a);
  CHECK(same.value == 0.0);
  CHECK(same.low == 0.0);
  CHECK(same.high == 0.0);
}

TEST_CASE("a difference of BLEU is that of corpora, each resample another one", "[bleu]") {
  // The first sentence is right, the second, of 8 words, wrong: 4/12, 3/10, 2/8 and 1/6 of the n-grams match.
  const std::vector<std::string> references{"a b c d", "e f g h i j k l"};
  const auto half = counts_of({"a b c d", "s t u v w x y z"}, references), right = counts_of(references, references);
  const double whole = 100.0 * std::pow(1.0 / 240.0, 0.25) - 100.0;
  const auto found = difference(half, right);
  CHECK(found.value == Approx(whole));
  // Of the four resamples one has the first sentence alone, one the second, two have both.
  CHECK(found.low == Approx(-100.0));
  CHECK(found.high == Approx(0.0).margin(1e-9));
  const auto middle = difference(half, right, {.confidence = 0.4});
  CHECK(middle.low == Approx(whole));
  CHECK(middle.high == Approx(whole));

  // Of several systems, as of seeds, the mean, of resamples too: the two differ by as much to either side.
  const std::vector<Counts> both{half, right}, turned{right, half}, one{right};
  CHECK(qd::paired_bleu_difference(both, one).value == Approx(whole / 2.0));
  CHECK(qd::paired_bleu_difference(both, one).low == Approx(-50.0));
  CHECK(qd::paired_bleu_difference(both, turned).low == Approx(0.0).margin(1e-9));
  CHECK(qd::paired_bleu_difference(both, turned).high == Approx(0.0).margin(1e-9));
}

TEST_CASE("a system that is clearly better has an interval above zero, of the same seed the same", "[bleu]") {
  qd::Rng rng(3);
  std::vector<std::string> references(60), better(60), worse(60);
  for (std::size_t i = 0; i < 60; ++i)
    for (int word = 0; word < 12; ++word) {
      const auto text = " w" + std::to_string(rng.below(50));
      references[i] += text;
      better[i] += rng.below(10) < 9 ? text : " x";
      worse[i] += rng.below(10) < 6 ? text : " x";
    }
  const auto a = counts_of(better, references), b = counts_of(worse, references);
  const auto found = difference(a, b);
  CHECK(found.value == Approx(qd::corpus_bleu(a).score - qd::corpus_bleu(b).score));
  CHECK(found.low > 0.0);
  CHECK(found.low < found.value);
  CHECK(found.high > found.value);
  CHECK(difference(a, b).low == found.low);
  const auto back = difference(b, a);  // the same resamples, seen from the other side
  CHECK(back.low == Approx(-found.high));
}

TEST_CASE("a difference of BLEU needs systems on both sides, of the same sentences", "[bleu]") {
  const auto a = counts_of({"a", "b"}, {"a", "b"}), shorter = counts_of({"a"}, {"a"});
  const auto code = [](const std::vector<Counts>& x, const std::vector<Counts>& y) {
    return test::code_of([&] { (void)qd::paired_bleu_difference(x, y); });
  };
  CHECK(code({a}, {}) == qd::Errc::bad_argument);
  CHECK(code({}, {a}) == qd::Errc::bad_argument);
  CHECK(code({a}, {shorter}) == qd::Errc::bad_argument);
  CHECK(code({a, shorter}, {a}) == qd::Errc::bad_argument);
  CHECK(code({Counts{}}, {Counts{}}) == qd::Errc::bad_argument);
  CHECK_FALSE(code({a}, {a}));
}

}  // namespace bleu_difference_test
