// Log-likelihoods of continuations: those of plain passes over whole texts, at ranks of their own, with one pass over a prompt.
#include <cmath>
#include <limits>
#include <memory>
#include <vector>

#include <qdylora/model/score.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/tiny_model.hpp"

namespace score_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using Ids = std::vector<std::int32_t>;
using Model = qd::Decoder<double>;

namespace {

Model make_model(const qd::DecoderConfig& config = test::tiny_config()) {
  Model model(test::tiny_weights<double>(config), {.lora = {.max_rank = 4}});
  test::randomize_adapters(model, 0.6);
  return model;
}

// Prompts of several lengths with texts of one and of more tokens, of which some begin alike.
std::vector<qd::Continuations> some_texts() {
  return {{test::random_ids(17, 5, 1), {{3}, {4}, {5}, {16}}},
          {test::random_ids(17, 1, 2), {{3, 4, 5}, {3, 4}, {9}, {0, 1, 2, 3, 4}}},
          {test::random_ids(17, 9, 3), {test::random_ids(17, 7, 4)}},
          {test::random_ids(17, 4, 5), {}}};
}

// The tokens of each pass.
struct CountingCpu : qd::Cpu {
  template <class Table, class T>
  void embed(std::span<const std::int32_t> ids, const Table& table, qd::MatrixView<T> x) const {
    rows->push_back(ids.size());
    qd::Cpu::embed(ids, table, x);
  }
  std::shared_ptr<std::vector<std::size_t>> rows = std::make_shared<std::vector<std::size_t>>();
};

// By the losses of the whole text, a pass of its own.
double recomputed(Model& model, const Ids& prompt, const Ids& text, Index rank) {
  Ids whole = prompt;
  whole.insert(whole.end(), text.begin(), text.end());
  qd::Batch batch;
  batch.add(whole, static_cast<Index>(prompt.size()));
  model.set_ranks(qd::RankPlan::uniform(rank));
  double sum = 0.0;
  for (const double loss : model.losses(batch)) sum -= loss;
  return sum;
}

}  // namespace

TEST_CASE("a continuation's log-likelihood is that of a pass over the whole text, for Llamas and Falcons, each prompt at its rank") {
  for (const auto& config : {test::tiny_config(), test::tiny_falcon_config()}) {
    auto model = make_model(config);
    const auto asked = some_texts();
    const std::vector<Index> ranks{4, 1, 0, 2};
    const auto found = qd::log_likelihoods(model, std::span(asked), qd::RankPlan::per_row(ranks));
    REQUIRE(found.size() == asked.size());
    bool ranks_differ = false;
    for (std::size_t i = 0; i < asked.size(); ++i) {
      REQUIRE(found[i].size() == asked[i].texts.size());
      for (std::size_t t = 0; t < found[i].size(); ++t) {
        CHECK(found[i][t] == Approx(recomputed(model, asked[i].prompt, asked[i].texts[t], ranks[i])).epsilon(1e-10));
        ranks_differ = ranks_differ || std::fabs(found[i][t] - recomputed(model, asked[i].prompt, asked[i].texts[t], 3)) > 1e-3;
      }
    }
    CHECK(ranks_differ);  // or the test would show nothing of ranks
  }
}

TEST_CASE("the probabilities of all tokens after a prompt add up to one") {
  auto model = make_model();
  std::vector<qd::Continuations> asked{{test::random_ids(17, 6, 1), {}}};
  for (std::int32_t id = 0; id < 17; ++id) asked[0].texts.push_back({id});
  const auto found = qd::log_likelihoods(model, std::span(std::as_const(asked)), qd::RankPlan::uniform(4));
  double sum = 0.0;
  for (const double x : found.at(0)) sum += std::exp(x);
  CHECK(sum == Approx(1.0).epsilon(1e-12));
}

TEST_CASE("a prompt is run once for all its texts, and texts of one token cost nothing more") {
  const CountingCpu cpu;
  qd::Decoder<double, CountingCpu> model(test::tiny_weights<double>(test::tiny_config()), {.lora = {.max_rank = 2}}, cpu);
  const auto rows = [&](const std::vector<qd::Continuations>& asked) {
    cpu.rows->clear();
    qd::log_likelihoods(model, std::span(asked), qd::RankPlan::uniform(2));
    return *cpu.rows;
  };
  const auto five = test::random_ids(17, 5, 1), three = test::random_ids(17, 3, 2);
  CHECK(rows({{five, {{1}, {2}, {3}, {4}}}, {three, {{1}, {2}, {3}, {4}}}}) == std::vector<std::size_t>{8});
  CHECK(rows({{five, {{1}, {2, 3}, {3, 4, 5}, {4, 5, 6}}}, {three, {{1}, {2, 3}}}}) == std::vector<std::size_t>{8, 4, 2});
}

TEST_CASE("texts that cannot be scored are refused") {
  auto model = make_model();  // its context is 32, its vocabulary 17
  const auto code = [&](Ids prompt, std::vector<Ids> texts, const qd::RankPlan& plan = qd::RankPlan::uniform(4)) {
    const std::vector<qd::Continuations> asked{{std::move(prompt), std::move(texts)}};
    return test::code_of([&] { qd::log_likelihoods(model, std::span(asked), plan); });
  };
  CHECK(qd::log_likelihoods(model, std::span<const qd::Continuations>{}, qd::RankPlan::uniform(4)).empty());
  CHECK(code({}, {{1}}) == Errc::bad_argument);
  CHECK(code({1}, {{1}, {}}) == Errc::bad_argument);
  CHECK(code({1}, {{17}}) == Errc::bad_argument);
  CHECK(code({1}, {{1, -1}}) == Errc::bad_argument);
  CHECK(code({17}, {{1}}) == Errc::bad_argument);
  CHECK(code(test::random_ids(17, 33, 1), {{1}}) == Errc::bad_argument);
  CHECK(code(test::random_ids(17, 32, 1), {{1, 2}}) == Errc::bad_argument);
  CHECK_FALSE(code(test::random_ids(17, 32, 1), {{1}}));
  CHECK_FALSE(code(test::random_ids(17, 31, 1), {{1, 2}}));
  CHECK(code({1}, {{1}}, qd::RankPlan::uniform(5)) == Errc::rank_range);
  CHECK(code({1}, {{1}}, qd::RankPlan::per_row(std::vector<Index>{1, 2})) == Errc::shape_mismatch);
  model.for_each_trained([](auto& linear) { linear.adapter().b().value.span()[0] = std::numeric_limits<double>::quiet_NaN(); });
  CHECK(code({1, 2}, {{1}}) == Errc::non_finite);
}

}  // namespace score_test
