// Batches: how texts become inputs and targets, and that a batch is no more than its sequences.
#include <cmath>
#include <vector>

#include <qdylora/model/batch.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/tiny_model.hpp"

namespace batch_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using test::code_of;

namespace {

using Ids = std::vector<std::int32_t>;
using Model = qd::Decoder<float>;

Model make_model(qd::LoRAOptions lora, qd::BaseFormat format = qd::BaseFormat::nf4) {
  Model model(test::tiny_weights<float>(test::small_config(), false, {.format = format, .double_quant = true, .block_size = 64}),
              {.lora = std::move(lora)});
  test::randomize_adapters(model, 0.1);
  return model;
}

qd::Batch sequence(const qd::Batch& batch, Index s) {
  const auto first = batch.offsets[static_cast<std::size_t>(s)], last = batch.offsets[static_cast<std::size_t>(s) + 1];
  qd::Batch one;
  one.ids.assign(batch.ids.begin() + first, batch.ids.begin() + last);
  one.targets.assign(batch.targets.begin() + first, batch.targets.begin() + last);
  one.offsets = {0, last - first};
  return one;
}

// Relative to the largest element.
double largest_difference(const std::vector<float>& found, const std::vector<float>& expected) {
  REQUIRE(found.size() == expected.size());
  double largest = 0.0, scale = 0.0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    largest = std::max(largest, static_cast<double>(std::fabs(found[i] - expected[i])));
    scale = std::max(scale, static_cast<double>(std::fabs(expected[i])));
  }
  return largest / scale;
}

}  // namespace

TEST_CASE("some sequences of a batch are a batch, in any order") {
  const auto batch = test::random_batch(17, {5, 2, 9}, 1, 3);
  const auto some = batch.select(std::vector<Index>{2, 0});
  some.validate();
  REQUIRE(some.sequences() == 2);
  for (const auto& [found, expected] : {std::pair<Index, Index>{0, 2}, {1, 0}}) {
    const auto a = sequence(some, found), b = sequence(batch, expected);
    CHECK(a.ids == b.ids);
    CHECK(a.targets == b.targets);
  }
  CHECK(batch.select({}).sequences() == 0);
  CHECK(code_of([&] { batch.select(std::vector<Index>{3}); }) == Errc::bad_argument);
  CHECK(code_of([&] { batch.select(std::vector<Index>{-1}); }) == Errc::bad_argument);
}

TEST_CASE("a text predicts its own next tokens, and only those after the prompt are scored") {
  qd::Batch batch;
  CHECK(batch.tokens() == 0);
  CHECK(batch.sequences() == 0);
  batch.add(Ids{5, 6, 7, 8});
  batch.add(Ids{1, 2, 3}, 2);
  batch.add(Ids{9, 4}, 9);
  CHECK(batch.ids == Ids{5, 6, 7, 1, 2, 9});
  CHECK(batch.targets == Ids{6, 7, 8, -1, 3, -1});
  CHECK(batch.offsets == std::vector<Index>{0, 3, 5, 6});
  CHECK(batch.tokens() == 6);
  CHECK(batch.sequences() == 3);
  CHECK(batch.scored() == 4);
}

TEST_CASE("a prompt of one token leaves every prediction scored") {
  qd::Batch batch;
  batch.add(Ids{5, 6, 7}, 1);
  CHECK(batch.targets == Ids{6, 7});
}

TEST_CASE("a text of fewer than two tokens is refused and leaves the batch as it was") {
  qd::Batch batch;
  batch.add(Ids{5, 6});
  CHECK(code_of([&] { batch.add(Ids{}); }) == Errc::bad_argument);
  CHECK(code_of([&] { batch.add(Ids{3}); }) == Errc::bad_argument);
  CHECK(batch.ids == Ids{5});
  CHECK(batch.offsets == std::vector<Index>{0, 1});
}

TEST_CASE("packed sequences do not see each other") {
  auto model = make_model({.max_rank = 8});
  const auto batch = test::random_batch(257, {20, 7, 41}, 1);
  const auto together = model.losses(batch);
  test::zero_gradients(model);
  const double sum = model.loss_and_gradient(batch, 0.1);
  const auto gradient = test::gradients(model);

  std::vector<double> apart;
  test::zero_gradients(model);
  double sum_apart = 0.0;
  for (Index s = 0; s < 3; ++s) {
    const auto one = sequence(batch, s);
    for (const double loss : model.losses(one)) apart.push_back(loss);
    sum_apart += model.loss_and_gradient(one, 0.1);
  }
  REQUIRE(together.size() == apart.size());
  for (std::size_t i = 0; i < apart.size(); ++i) CHECK(together[i] == Approx(apart[i]).epsilon(1e-6).margin(1e-6));
  CHECK(sum == Approx(sum_apart).epsilon(1e-6));
  CHECK(largest_difference(test::gradients(model), gradient) < 1e-6);
}

TEST_CASE("a token changes only what comes after it in its own sequence") {
  auto model = make_model({.max_rank = 8});
  auto batch = test::random_batch(257, {12, 12, 12}, 3);
  const auto before = qd::clone(model.logits(batch).view());
  const Index changed = 11 + 5;
  batch.ids[static_cast<std::size_t>(changed)] ^= 1;
  const auto after = model.logits(batch);
  for (Index t = 0; t < batch.tokens(); ++t) {
    const bool same = test::same_bits(before.view().middle_rows(t, 1), after.view().middle_rows(t, 1));
    CHECK(same == !(t >= changed && t < 22));
  }
}

TEST_CASE("sequences of mixed ranks have the losses of single-rank batches, bit for bit") {
  for (const bool gates : {false, true}) {
    qd::LoRAOptions lora{.max_rank = 20, .alpha = 8.0f, .scale = qd::ScalePolicy::over_rank, .dropout = 0.1f};
    if (gates) lora.gated_ranks = {1, 7, 20};
    auto model = make_model(lora);
    model.set_training(true, 3);
    const auto batch = test::random_batch(257, {9, 30, 2, 17, 25, 12}, 5);
    const std::vector<Index> ranks{7, 0, 20, 1, 7, 13};
    model.set_ranks(qd::RankPlan::per_row(ranks));
    const auto mixed = model.losses(batch);
    for (const Index rank : {0, 1, 7, 13, 20}) {
      model.set_ranks(qd::RankPlan::uniform(rank));
      const auto single = model.losses(batch);
      REQUIRE(single.size() == mixed.size());
      for (std::size_t s = 0; s < ranks.size(); ++s) {
        if (ranks[s] != rank) continue;
        for (Index t = batch.offsets[s]; t < batch.offsets[s + 1]; ++t)
          CHECK(single[static_cast<std::size_t>(t)] == mixed[static_cast<std::size_t>(t)]);
      }
    }
  }
}

TEST_CASE("micro-batches with one scale add up to one big batch") {
  auto model = make_model({.max_rank = 8});
  const auto batch = test::random_batch(257, {20, 7, 33, 14}, 6, 3);
  const double scale = 1.0 / static_cast<double>(batch.scored());
  const std::vector<Index> ranks{8, 1, 4, 4};
  test::zero_gradients(model);
  model.set_ranks(qd::RankPlan::per_row(ranks));
  const double whole = model.loss_and_gradient(batch, scale);
  const auto expected = test::gradients(model);
  for (const Index size : {1, 2}) {
    test::zero_gradients(model);
    double sum = 0.0;
    for (Index first = 0; first < 4; first += size) {
      qd::Batch part;
      for (Index s = first; s < first + size; ++s) {
        const auto one = sequence(batch, s);
        part.ids.insert(part.ids.end(), one.ids.begin(), one.ids.end());
        part.targets.insert(part.targets.end(), one.targets.begin(), one.targets.end());
        part.offsets.push_back(part.tokens());
      }
      model.set_ranks(qd::RankPlan::per_row(std::span(ranks).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(size))));
      sum += model.loss_and_gradient(part, scale);
    }
    CHECK(sum == Approx(whole).epsilon(1e-6));
    CHECK(largest_difference(test::gradients(model), expected) < 1e-6);
  }
}

TEST_CASE("a batch that cannot be run is refused") {
  auto model = make_model({.max_rank = 2}, qd::BaseFormat::float32);
  const auto good = test::random_batch(257, {5, 6}, 1);
  const auto refused = [&](qd::Batch batch, Errc code) {
    CHECK(code_of([&] { model.losses(batch); }) == code);
    CHECK(code_of([&] { model.loss_and_gradient(batch, 1.0); }) == code);
  };
  refused({}, Errc::bad_argument);
  refused(test::random_batch(257, {66}, 1), Errc::bad_argument);  // the context is 64
  auto batch = good;
  batch.ids[3] = 257;
  refused(batch, Errc::bad_argument);
  batch = good;
  batch.ids[3] = -1;
  refused(batch, Errc::bad_argument);
  batch = good;
  batch.targets[3] = 257;
  refused(batch, Errc::bad_argument);
  batch = good;
  batch.offsets.back() -= 1;
  refused(batch, Errc::bad_argument);
  batch = good;
  model.set_ranks(qd::RankPlan::per_row(std::vector<Index>{1, 2, 1}));
  refused(good, Errc::shape_mismatch);
  model.set_ranks(qd::RankPlan::uniform(2));
  CHECK(model.losses(good).size() == 9);
  CHECK(model.losses(test::random_batch(257, {65}, 1)).size() == 64);
}

TEST_CASE("a batch whose parts do not fit together is refused") {
  auto model = make_model({.max_rank = 2}, qd::BaseFormat::float32);
  const auto good = test::random_batch(257, {5, 6}, 1);
  const auto refused = [&](const qd::Batch& batch) {
    CHECK(code_of([&] { model.losses(batch); }) == Errc::bad_argument);
    CHECK(code_of([&] { model.loss_and_gradient(batch, 1.0); }) == Errc::bad_argument);
  };
  auto batch = good;
  batch.targets.pop_back();
  refused(batch);
  batch = good;
  batch.offsets = {0, 7, 4, 9};
  refused(batch);
  batch = good;
  batch.offsets = {2, 4, 9};
  refused(batch);
  batch = good;
  batch.offsets = {-3, 4, 9};
  refused(batch);
  batch = good;
  batch.offsets.clear();
  refused(batch);
}

TEST_CASE("a batch without scored tokens has no losses and no gradient") {
  auto model = make_model({.max_rank = 2}, qd::BaseFormat::float32);
  auto batch = test::random_batch(257, {5, 6}, 1);
  batch.targets.assign(batch.targets.size(), -1);
  CHECK(model.losses(batch).empty());
  test::zero_gradients(model);
  CHECK(model.loss_and_gradient(batch, 1.0) == 0.0);
  for (const float g : test::gradients(model)) REQUIRE(g == 0.0f);
}

}  // namespace batch_test
