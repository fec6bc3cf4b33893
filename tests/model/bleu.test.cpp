// BLEU against sacrebleu's, and what it refuses.
#include <string>
#include <vector>

#include <qdylora/io/json.hpp>
#include <qdylora/model/bleu.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"

namespace bleu_test {

namespace qd = qdylora;
using Strings = std::vector<std::string>;

TEST_CASE("texts fall into the words that sacrebleu's 13a makes of them") {
  const auto golden = qd::read_json(test::golden("bleu.json"));
  REQUIRE(golden.at("texts").size() > 30);
  for (const auto& text : golden.at("texts")) {
    CAPTURE(text.dump());
    CHECK(qd::tokenize_13a(text.at("text").get<std::string>()) == text.at("words").get<Strings>());
  }
  // What is no UTF-8, as a text that was cut inside of a character ends, is part of a word.
  CHECK(qd::tokenize_13a("caf\xC3 \xFF.\x80x") == Strings{"caf\xC3", "\xFF", ".", "\x80x"});
}

TEST_CASE("BLEU of a corpus is sacrebleu's, and so is all that it is made of") {
  const auto golden = qd::read_json(test::golden("bleu.json"));
  REQUIRE(golden.at("corpora").size() > 20);
  for (const auto& corpus : golden.at("corpora")) {
    const auto hypotheses = corpus.at("hypotheses").get<Strings>();
    const auto bleu = qd::corpus_bleu(hypotheses, corpus.at("references").get<std::vector<Strings>>());
    CAPTURE(hypotheses, corpus.at("references").dump());
    CHECK(bleu.score == Approx(corpus.at("score").get<double>()).epsilon(1e-12));
    CHECK(bleu.brevity_penalty == Approx(corpus.at("brevity_penalty").get<double>()).epsilon(1e-14));
    CHECK(bleu.hypothesis_words == corpus.at("hypothesis_words").get<qd::Index>());
    CHECK(bleu.reference_words == corpus.at("reference_words").get<qd::Index>());
    for (std::size_t n = 0; n < qd::Bleu::orders; ++n) {
      CHECK(bleu.precisions[n] == Approx(corpus.at("precisions")[n].get<double>()).epsilon(1e-14));
      CHECK(bleu.matched[n] == corpus.at("matched")[n].get<qd::Index>());
      CHECK(bleu.total[n] == corpus.at("total")[n].get<qd::Index>());
    }
  }
}

TEST_CASE("BLEU refuses a corpus that is empty or lacks references") {
  const auto code = [](const Strings& hypotheses, const std::vector<Strings>& references) {
    return test::code_of([&] { qd::corpus_bleu(hypotheses, references); });
  };
  CHECK(code({}, {}) == qd::Errc::bad_argument);
  CHECK(code({"a", "b"}, {{"a"}}) == qd::Errc::bad_argument);
  CHECK(code({"a", "b"}, {{"a"}, {}}) == qd::Errc::bad_argument);
  CHECK_FALSE(code({"a"}, {{"a"}}));
}

}  // namespace bleu_test
