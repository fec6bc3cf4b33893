// Several adapters on one model, mixed in a batch: losses, gradients, training and texts are those of each one's sequences alone, bit for
// bit.
#include <string>
#include <utility>
#include <vector>

#include <qdylora/model/mixed_decoder.hpp>
#include <qdylora/optim/adamw.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/tiny_model.hpp"

namespace mixed_decoder_test {

namespace qd = qdylora;
using qd::AdapterPlan;
using qd::Errc;
using qd::Index;
using test::code_of;
using Ids = std::vector<std::int32_t>;

namespace {

template <class T>
auto weights() {
  return test::tiny_weights<qd::Accumulator<T>>(test::small_config(), false,
                                                {.format = qd::BaseFormat::nf4, .double_quant = true, .block_size = 64});
}

qd::LayerPatterns two_rows(const std::string& of) {
  qd::LayerPatterns patterns;
  patterns.rank.add(of, 2.0);
  return patterns;
}

// Adapters of different ranks and kinds, one with layers of fewer rows.
const std::vector<qd::DecoderOptions> options = {
    {.lora = {.max_rank = 8, .dropout = 0.1f, .seed = 1}},
    {.lora = {.max_rank = 4, .alpha = 4, .seed = 2}, .checkpoint = true, .patterns = two_rows("q_proj")},
    {.lora = {.max_rank = 6, .seed = 3}, .method = qd::AdapterMethod::houlsby}};

template <class T>
std::vector<qd::Decoder<T>> separate() {
  std::vector<qd::Decoder<T>> models;
  for (const auto& o : options) {
    models.emplace_back(weights<T>(), o);
    test::randomize_adapters(models.back(), 0.1);
  }
  return models;
}

template <class T>
qd::MixedDecoder<T> mixed() {
  qd::MixedDecoder<T> model(weights<T>(), options);
  for (Index k = 0; k < model.adapters(); ++k) test::randomize_adapters(model.at(k), 0.1);
  return model;
}

const std::vector<AdapterPlan> plans = {AdapterPlan::of_runs({{1, 2, 6}, {2, 0, 8}, {1, 1, 4}, {1, 0, 2}, {1, 2, 1}}),
                                        AdapterPlan::of_runs({{3, 1, 2}, {3, 0, 0}}), AdapterPlan::uniform(1, 3)};

}  // namespace

TEMPLATE_TEST_CASE("sequences of several adapters have the losses and gradients that they have apart, bit for bit", "", float,
                   qd::bfloat16) {
  auto model = mixed<TestType>();
  auto alone = separate<TestType>();
  const auto batch = test::random_batch(257, {9, 5, 30, 2, 12, 20}, 1, 4);
  for (const auto& plan : plans) {
    model.set_plan(plan);
    model.set_training(true, 3);
    const auto losses = model.losses(batch);
    REQUIRE(losses.size() == static_cast<std::size_t>(batch.scored()));
    const std::vector<double> scales = {0.5, 0.25, 2.0};
    const auto sums = model.loss_and_gradient(batch, scales);
    const auto counts = model.counts(batch);
    std::vector<bool> found(alone.size());
    for (const auto& share : plan.shares(batch.sequences())) {
      const auto k = static_cast<std::size_t>(share.adapter);
      CAPTURE(k);
      found[k] = true;
      const auto part = batch.select(share.rows);
      CHECK(counts[k].tokens == part.tokens());
      CHECK(counts[k].scored == part.scored());
      alone[k].set_ranks(share.ranks);
      alone[k].set_training(true, 3);
      const auto own = alone[k].losses(part);
      CHECK(sums[k] == alone[k].loss_and_gradient(part, scales[k]));
      std::size_t next = 0;  // each loss in its sequence's place
      for (const Index s : share.rows) {
        std::size_t at = 0;
        for (Index t = 0; t < batch.offsets[static_cast<std::size_t>(s) + 1]; ++t) {
          const bool scored = batch.targets[static_cast<std::size_t>(t)] >= 0;
          if (scored && t >= batch.offsets[static_cast<std::size_t>(s)]) CHECK(losses[at] == own[next++]);
          at += scored;
        }
      }
      CHECK(next == own.size());
    }
    for (std::size_t k = 0; k < alone.size(); ++k) {
      CAPTURE(k);
      CHECK(test::gradients(model.at(static_cast<Index>(k))) == test::gradients(alone[k]));
      if (!found[k]) CHECK(sums[k] == 0.0);
    }
  }
}

TEST_CASE("adapters trained in mixed batches are those trained apart, to the byte, over micro-batches with dropout too") {
  auto model = mixed<float>();
  auto alone = separate<float>();
  const auto before = test::values(model.at(0));
  qd::AdamW<float> together(model.parameters(), {.lr = 1e-2});
  std::vector<qd::AdamW<float>> apart;
  for (auto& one : alone) apart.emplace_back(one.parameters(), qd::AdamWOptions{.lr = 1e-2});
  for (std::uint32_t step = 0; step < 3; ++step) {
    const std::vector<qd::Batch> batches = {test::random_batch(257, {9, 5, 30, 2, 12, 20}, 1 + step, 1),
                                            test::random_batch(257, {7, 3, 11, 8, 4, 16}, 9 + step, 1)};
    together.zero_grad();
    model.set_plan(plans[0]);
    model.set_training(true, step);
    for (const auto& batch : batches) model.loss_and_gradient(batch, std::vector<double>{0.01, 0.02, 0.03});
    together.step();
    for (const auto& share : plans[0].shares(6)) {
      const auto k = static_cast<std::size_t>(share.adapter);
      apart[k].zero_grad();
      alone[k].set_ranks(share.ranks);
      Index tokens = 0;
      for (const auto& batch : batches) {
        const auto part = batch.select(share.rows);
        alone[k].set_training(true, step, tokens);
        alone[k].loss_and_gradient(part, 0.01 * static_cast<double>(k + 1));
        tokens += part.tokens();
      }
      apart[k].step();
    }
  }
  for (std::size_t k = 0; k < alone.size(); ++k) CHECK(test::values(model.at(static_cast<Index>(k))) == test::values(alone[k]));
  CHECK(test::values(model.at(0)) != before);
}

TEST_CASE("prompts continue with their adapters as they do apart") {
  auto model = mixed<float>();
  auto alone = separate<float>();
  std::vector<Ids> prompts;
  for (Index i = 0; i < 6; ++i) prompts.push_back(test::random_ids(257, 1 + 3 * i, static_cast<std::uint64_t>(i)));
  for (const float temperature : {0.0f, 1.0f})
    for (const auto& plan : plans) {
      const qd::GenerateOptions generation{.max_tokens = 7, .temperature = temperature, .seed = 5};
      const auto found = qd::generate(model, std::span<const Ids>(prompts), plan, generation);
      REQUIRE(found.size() == prompts.size());
      for (const auto& share : plan.shares(6)) {
        std::vector<Ids> own;
        for (const Index i : share.rows) own.push_back(prompts[static_cast<std::size_t>(i)]);
        const auto expected =
            qd::generate(alone[static_cast<std::size_t>(share.adapter)], std::span<const Ids>(own), share.ranks, generation);
        for (std::size_t i = 0; i < own.size(); ++i) CHECK(found[static_cast<std::size_t>(share.rows[i])] == expected[i]);
      }
    }
  CHECK(qd::generate(model, {}, AdapterPlan::uniform(0, 1)).empty());
}

TEST_CASE("the base of mixed adapters is in memory once") {
  const auto base = weights<float>();
  const qd::MixedDecoder<float> model(base, options);
  for (Index k = 0; k < model.adapters(); ++k) CHECK(model.at(k).weights() == base);
}

TEST_CASE("mixed adapters of a model refuse what does not fit") {
  auto model = mixed<float>();
  const auto batch = test::random_batch(257, {9, 5, 30}, 1);
  const std::vector<double> scales(3, 1.0);
  CHECK(code_of([] { qd::MixedDecoder<float>(weights<float>(), {}); }) == Errc::bad_argument);
  CHECK(code_of([&] { model.at(3); }) == Errc::bad_argument);
  CHECK(code_of([&] { model.set_plan(AdapterPlan::uniform(3, 1)); }) == Errc::bad_argument);
  CHECK(code_of([&] { model.set_plan(AdapterPlan::of_runs({{1, 0, 8}, {2, 1, 5}})); }) == Errc::rank_range);
  model.set_plan(AdapterPlan::of_runs({{1, 0, 8}, {1, 1, 4}}));
  CHECK(code_of([&] { model.losses(batch); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { model.counts(batch); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { model.loss_and_gradient(batch, scales); }) == Errc::shape_mismatch);
  model.set_plan(AdapterPlan::of_runs({{1, 0, 8}, {2, 1, 4}}));
  CHECK(code_of([&] { model.loss_and_gradient(batch, std::span(scales).first(2)); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { model.loss_and_gradient({}, scales); }) == Errc::bad_argument);
  const std::vector<Ids> prompts = {{1}, {2}};
  CHECK(code_of([&] { qd::generate(model, std::span(prompts), AdapterPlan::of_runs({{1, 0, 1}})); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { qd::generate(model, std::span(prompts), AdapterPlan::uniform(7, 1)); }) == Errc::bad_argument);
}

}  // namespace mixed_decoder_test
