// Generation: the cache changes nothing, sequences of a batch are on their own, and sampling follows the distribution.
#include <cmath>
#include <limits>
#include <vector>

#include <qdylora/model/generate.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/tiny_model.hpp"

namespace generate_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using test::code_of;
using Ids = std::vector<std::int32_t>;
using Model = qd::Decoder<double>;
using Cache = Model::Cache;

namespace {

Model make_model(qd::RopeLayout layout = qd::RopeLayout::half_split) {
  auto config = test::tiny_config();
  config.rope_layout = layout;
  Model model(test::tiny_weights<double>(config), {.lora = {.max_rank = 4}});
  test::randomize_adapters(model, 0.6);
  return model;
}

std::vector<Ids> some_prompts() {
  return {test::random_ids(17, 5, 1), test::random_ids(17, 1, 2), test::random_ids(17, 11, 3), test::random_ids(17, 5, 4)};
}

// Greedy continuation by running the whole text again for every token.
Ids recomputed(Model& model, Ids text, Index rank, Index count) {
  Ids result;
  model.set_ranks(qd::RankPlan::uniform(rank));
  for (Index i = 0; i < count; ++i) {
    qd::Batch batch;
    batch.ids = text;
    batch.targets.assign(text.size(), -1);
    batch.offsets = {0, batch.tokens()};
    const auto logits = model.logits(batch);
    const double* row = logits.view().row(logits.rows() - 1);
    result.push_back(static_cast<std::int32_t>(std::max_element(row, row + logits.cols()) - row));
    text.push_back(result.back());
  }
  return result;
}

qd::Batch of_ids(const std::vector<Ids>& sequences) {
  qd::Batch batch;
  for (const auto& ids : sequences) {
    batch.ids.insert(batch.ids.end(), ids.begin(), ids.end());
    batch.offsets.push_back(batch.tokens());
  }
  batch.targets.assign(batch.ids.size(), -1);
  return batch;
}

std::vector<double> frequencies(const std::vector<float>& logits, float temperature, Index draws) {
  qd::Rng rng(3, qd::Purpose::sample);
  std::vector<double> share(logits.size());
  for (Index i = 0; i < draws; ++i)
    share[static_cast<std::size_t>(qd::sample(std::span<const float>(logits), temperature, rng))] +=
        1.0 / static_cast<double>(draws);
  return share;
}

}  // namespace

TEST_CASE("greedy generation with the cache is what running the whole text again gives, at every rank and in both layouts") {
  for (const auto layout : {qd::RopeLayout::half_split, qd::RopeLayout::interleaved}) {
    auto model = make_model(layout);
    const auto prompts = some_prompts();
    for (const Index rank : {0, 1, 4}) {
      const auto found = qd::generate(model, std::span(prompts), qd::RankPlan::uniform(rank), {.max_tokens = 12});
      REQUIRE(found.size() == prompts.size());
      for (std::size_t i = 0; i < prompts.size(); ++i) CHECK(found[i] == recomputed(model, prompts[i], rank, 12));
    }
  }
}

TEST_CASE("prompts with ranks of their own continue as they do alone") {
  auto model = make_model();
  const auto prompts = some_prompts();
  const std::vector<Index> ranks{4, 1, 0, 2};
  const auto together = qd::generate(model, std::span(prompts), qd::RankPlan::per_row(ranks), {.max_tokens = 15});
  bool ranks_differ = false;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const auto alone = [&](Index rank) {
      return qd::generate(model, std::span(prompts).subspan(i, 1), qd::RankPlan::uniform(rank), {.max_tokens = 15}).at(0);
    };
    CHECK(together[i] == alone(ranks[i]));
    ranks_differ = ranks_differ || alone(4) != alone(0);
  }
  CHECK(ranks_differ);  // or the test would show nothing
}

TEST_CASE("a sequence ends at the stop token, which is not part of it, while others go on") {
  auto model = make_model();
  const auto prompts = some_prompts();
  const auto ranks = qd::RankPlan::per_row(std::vector<Index>{4, 1, 0, 2});
  const auto free = qd::generate(model, std::span(prompts), ranks, {.max_tokens = 15});
  const std::int32_t stop = free[0][4];
  const auto stopped = qd::generate(model, std::span(prompts), ranks, {.max_tokens = 15, .stop_token = stop});
  bool shorter = false, whole = false;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    const Ids until(free[i].begin(), std::find(free[i].begin(), free[i].end(), stop));
    CHECK(stopped[i] == until);
    shorter = shorter || until.size() < free[i].size();
    whole = whole || until.size() == free[i].size();
  }
  CHECK(shorter);
  CHECK(whole);
}

TEST_CASE("generation ends after so many tokens, or where the context does") {
  auto model = make_model();  // its context is 32
  const auto ranks = qd::RankPlan::uniform(4);
  const auto count = [&](Index prompt, Index most) {
    const std::vector<Ids> prompts{test::random_ids(17, prompt, 5)};
    return static_cast<Index>(qd::generate(model, std::span(prompts), ranks, {.max_tokens = most}).at(0).size());
  };
  CHECK(count(3, 1) == 1);
  CHECK(count(3, 7) == 7);
  CHECK(count(3, 0) == 0);
  CHECK(count(3, -1) == 0);
  CHECK(count(30, 100) == 3);  // two more fit, and the last of them predicts a third
  CHECK(count(31, 100) == 2);
  CHECK(count(32, 100) == 1);
  CHECK(count(32, 1) == 1);
}

TEST_CASE("prompts that cannot be continued are refused") {
  auto model = make_model();
  const auto ranks = qd::RankPlan::uniform(4);
  const auto code = [&](const std::vector<Ids>& prompts, const qd::RankPlan& plan) {
    return code_of([&] { qd::generate(model, std::span(prompts), plan, {.max_tokens = 3}); });
  };
  CHECK(qd::generate(model, std::span<const Ids>{}, ranks).empty());
  CHECK(code({{}}, ranks) == Errc::bad_argument);
  CHECK(code({{1, 2}, {}}, ranks) == Errc::bad_argument);
  CHECK(code({test::random_ids(17, 33, 1)}, ranks) == Errc::bad_argument);
  CHECK(code({{17}}, ranks) == Errc::bad_argument);
  CHECK(code({{-1}}, ranks) == Errc::bad_argument);
  CHECK(code({{1}}, qd::RankPlan::uniform(5)) == Errc::rank_range);
  CHECK(code({{1}}, qd::RankPlan::per_row(std::vector<Index>{1, 2})) == Errc::shape_mismatch);
  CHECK_FALSE(code({{1}}, ranks));
}

TEST_CASE("sampled generation is a function of the seed, and equal prompts of a batch draw numbers of their own") {
  auto model = make_model();
  const std::vector<Ids> prompts{{3, 4}, {3, 4}, {3, 4}};
  const auto draw = [&](std::uint64_t seed) {
    return qd::generate(model, std::span(prompts), qd::RankPlan::uniform(2), {.max_tokens = 20, .temperature = 1.5f, .seed = seed});
  };
  const auto first = draw(1);
  CHECK(draw(1) == first);
  CHECK(draw(2) != first);
  CHECK(first[0] != first[1]);
  CHECK(first[1] != first[2]);
  // A sequence's numbers are its own: they do not depend on when others end.
  const auto stop = first[0][3];
  const auto stopped = qd::generate(model, std::span(prompts), qd::RankPlan::uniform(2),
                                    {.max_tokens = 20, .temperature = 1.5f, .seed = 1, .stop_token = stop});
  for (std::size_t i = 0; i < 3; ++i) CHECK(stopped[i] == Ids(first[i].begin(), std::find(first[i].begin(), first[i].end(), stop)));
}

TEST_CASE("sampled tokens are as frequent as softmax of logits over temperature says") {
  const std::vector<float> logits{0.0f, 1.0f, -2.0f, 3.0f, 2.5f, -std::numeric_limits<float>::infinity()};
  constexpr Index draws = 40000;
  for (const float temperature : {0.5f, 1.0f, 4.0f}) {
    double sum = 0.0;
    for (const float l : logits) sum += std::exp(static_cast<double>(l / temperature));
    const auto share = frequencies(logits, temperature, draws);
    for (std::size_t i = 0; i < logits.size(); ++i) {
      const double p = std::exp(static_cast<double>(logits[i] / temperature)) / sum;
      CAPTURE(temperature, i, p, share[i]);
      CHECK(std::fabs(share[i] - p) <= 5.0 * std::sqrt(p * (1.0 - p) / static_cast<double>(draws)));
    }
    CHECK(share[5] == 0.0);
  }
}

TEST_CASE("huge logits do not overflow a sample") {
  CHECK(frequencies({1e30f, -1e30f, 1e30f}, 1.0f, 1000)[0] == Approx(0.5).margin(0.1));
  CHECK(frequencies({-3000.0f, -3001.0f}, 1.0f, 4000)[0] == Approx(0.731).margin(0.04));
}

TEST_CASE("at temperature 0 the largest logit is taken, the first on ties, and no number drawn") {
  qd::Rng rng(1);
  const auto before = rng.state();
  const std::vector<float> logits{1.0f, 7.0f, 3.0f, 7.0f};
  CHECK(qd::sample(std::span<const float>(logits), 0.0f, rng) == 1);
  CHECK(rng.state() == before);
  CHECK(qd::sample(std::span<const float>(logits).first(1), 0.0f, rng) == 0);
  CHECK(qd::sample(std::span<const float>(logits).first(1), 1.0f, rng) == 0);
}

TEST_CASE("tokens fed one by one give the logits of the whole text") {
  auto model = make_model();
  model.set_ranks(qd::RankPlan::per_row(std::vector<Index>{4, 2}));
  const Ids first = test::random_ids(17, 9, 1), second = test::random_ids(17, 7, 2);
  const auto whole = model.logits(of_ids({first, second}));
  std::vector<Cache> caches;
  for (int i = 0; i < 2; ++i) caches.emplace_back(model.config(), 9);
  auto logits = model.infer(of_ids({{first.begin(), first.begin() + 5}, {second.begin(), second.begin() + 3}}), caches);
  REQUIRE(logits.rows() == 2);
  for (std::size_t t = 0;; ++t) {
    CHECK(caches[0].length == static_cast<Index>(5 + t));
    CHECK(caches[1].length == static_cast<Index>(3 + t));
    const auto error = [&](Index sequence, std::size_t position) {
      return test::normalised_squared_error(logits.view().middle_rows(sequence, 1),
                                            whole.view().middle_rows(static_cast<Index>(position), 1));
    };
    CHECK(error(0, 4 + t) < 1e-24);
    CHECK(error(1, 9 + 2 + t) < 1e-24);
    if (t == 4) break;
    logits = model.infer(of_ids({{first[5 + t]}, {second[3 + t]}}), caches);
  }
}

TEST_CASE("caches that do not fit what is fed are refused") {
  auto model = make_model();
  model.set_ranks(qd::RankPlan::uniform(2));
  const auto caches = [&](std::vector<Index> capacities) {
    std::vector<Cache> result;
    for (const Index capacity : capacities) result.emplace_back(model.config(), capacity);
    return result;
  };
  auto two = caches({4, 4});
  CHECK(code_of([&] { model.infer(of_ids({{1, 2}}), two); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { model.infer(of_ids({{1}, {2}, {3}}), two); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { model.infer(of_ids({{1, 2, 3, 4, 5}, {1}}), two); }) == Errc::bad_argument);  // longer than its cache
  CHECK(two[0].length == 0);
  model.infer(of_ids({{1, 2, 3}, {1, 2}}), two);
  CHECK(code_of([&] { model.infer(of_ids({{1, 2}, {1}}), two); }) == Errc::bad_argument);  // more than a token each
  model.infer(of_ids({{4}, {4}}), two);
  CHECK(code_of([&] { model.infer(of_ids({{5}, {5}}), two); }) == Errc::bad_argument);  // the first is full
  CHECK(two[0].length == 4);
  CHECK(two[1].length == 3);

  auto wide = test::tiny_config();
  wide.heads.kv_heads = 4;
  std::vector<Cache> other;
  other.emplace_back(wide, 8);
  CHECK(code_of([&] { model.infer(of_ids({{1, 2}}), other); }) == Errc::shape_mismatch);

  auto past = caches({40});
  model.infer(of_ids({test::random_ids(17, 32, 1)}), past);
  CHECK(code_of([&] { model.infer(of_ids({{1}}), past); }) == Errc::bad_argument);  // the context ends at 32
}

TEST_CASE("a sequence without tokens cannot be fed") {
  auto model = make_model();
  const auto refused = [&](const std::vector<Ids>& ids, bool filled) {
    std::vector<Cache> caches;
    for (std::size_t i = 0; i < ids.size(); ++i) caches.emplace_back(model.config(), 8);
    if (filled) model.infer(of_ids({{1}, {2}}), caches);
    return code_of([&] { model.infer(of_ids(ids), caches); }) == Errc::bad_argument;
  };
  CHECK(refused({{1, 2}, {}}, false));
  CHECK(refused({{}, {1, 2}}, false));
  CHECK(refused({{1, 2}, {}}, true));  // two tokens for two sequences, but not one each
  CHECK(refused({{}, {1, 2}}, true));
}

TEST_CASE("of caches filled differently every one brings a token, also a new one") {
  auto model = make_model();
  model.set_ranks(qd::RankPlan::uniform(3));
  std::vector<Cache> caches;
  caches.emplace_back(model.config(), 8);
  model.infer(of_ids({{1, 2, 3}}), caches);
  caches.emplace_back(model.config(), 8);
  const auto logits = model.infer(of_ids({{4}, {5}}), caches);
  const auto first = model.logits(of_ids({{1, 2, 3, 4}})), second = model.logits(of_ids({{5}}));
  CHECK(test::normalised_squared_error(logits.view().middle_rows(0, 1), first.view().middle_rows(3, 1)) < 1e-24);
  CHECK(test::normalised_squared_error(logits.view().middle_rows(1, 1), second.view().middle_rows(0, 1)) < 1e-24);
}

}  // namespace generate_test
