// Bases of several formats under one set of adapters: a model that changes its base is the model built on it, and draws are a function of
// the seed and the step.
#include <algorithm>
#include <array>
#include <memory>
#include <string>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/io/collect.hpp>
#include <qdylora/model/drawn_base.hpp>
#include <qdylora/model/memory_plan.hpp>
#include <qdylora/model/trainer.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/saved_run.hpp"
#include "support/tiny_model.hpp"

namespace drawn_base_test {

namespace qd = qdylora;
using qd::BaseFormat;
using qd::Errc;
using qd::Index;
using Model = qd::Decoder<float>;
using Weights = std::shared_ptr<const qd::DecoderWeights<float>>;

namespace {

constexpr std::array formats{BaseFormat::nf4, BaseFormat::fp8, BaseFormat::int4};

std::vector<Weights> all_bases(const qd::DecoderConfig& config, bool biases = false) {
  std::vector<Weights> bases;
  for (const auto format : formats) bases.push_back(test::tiny_weights<float>(config, biases, {.format = format}));
  return bases;
}

void copy_parameters(Model& from, Model& to) {
  const auto source = test::all_parameters(from), target = test::all_parameters(to);
  for (std::size_t i = 0; i < source.size(); ++i) qd::copy(std::as_const(source[i]->value).view(), target[i]->value.view());
}

/// Losses and gradients of a batch whose sequences have ranks of their own.
std::vector<float> results(Model& model) {
  model.set_ranks(qd::RankPlan::of_runs({{1, 0}, {1, 2}, {1, 4}}));
  model.set_training(true, 3);
  const auto batch = test::random_batch(model.config().vocab, {7, 5, 9}, 1);
  std::vector<float> all;
  for (const double loss : model.losses(batch)) all.push_back(static_cast<float>(loss));
  test::zero_gradients(model);
  model.loss_and_gradient(batch, 0.1);
  const auto gradients = test::gradients(model);
  all.insert(all.end(), gradients.begin(), gradients.end());
  return all;
}

/// A run whose base is drawn.
struct Run {
  std::vector<Weights> bases = all_bases(test::tiny_config());
  qd::RankSet ranks{1, 3, 8};
  Model model{bases.front(), {.lora = qd::adapter_options(qd::recipe("qdylora"), ranks, 8.0f, 2)}};
  qd::Trainer<float> trainer{model, {.recipe = qd::recipe("qdylora"), .ranks = ranks, .steps = 12, .lr = 5e-3, .seed = 11}};

  void train_to(std::int64_t step) {
    while (trainer.step_count() < step) {
      const auto now = trainer.step_count();
      qd::set_base(model, *bases[qd::drawn_base(11, now, bases.size())]);
      trainer.step(test::counting_batch(model.config().vocab, 3, 12, static_cast<std::uint64_t>(now)));
    }
  }
  std::string saved() { return test::saved_run(model, trainer); }
};

}  // namespace

TEST_CASE("a model put on another base is the model built on it, bit for bit") {
  const bool dora = GENERATE(false, true), checkpoint = GENERATE(false, true);
  for (const auto& config : {test::tiny_config(), test::tiny_falcon_config()}) {
    const auto bases = all_bases(config, true);
    qd::DecoderOptions options{.lora = {.max_rank = 4, .dropout = 0.1f, .dora = dora}, .checkpoint = checkpoint};
    Model model(bases[0], options);
    test::randomize_adapters(model);
    const auto on_first = results(model);
    for (const std::size_t i : {std::size_t{1}, std::size_t{2}, std::size_t{0}}) {
      CAPTURE(i, dora, checkpoint);
      Model built(bases[i], options);
      copy_parameters(model, built);
      qd::set_base(model, *bases[i]);
      const auto found = results(model);
      CHECK(found == results(built));
      CHECK((found == on_first) == (i == 0));
    }
  }
}

TEST_CASE("draws of a base are a function of seed and step, and take each as often as the others") {
  std::array<int, 3> counts{};
  int same = 0;
  for (std::int64_t step = 0; step < 3000; ++step) {
    const auto drawn = qd::drawn_base(5, step, 3);
    REQUIRE(drawn < 3);
    CHECK(qd::drawn_base(5, step, 3) == drawn);
    same += qd::drawn_base(6, step, 3) == drawn;
    ++counts[drawn];
  }
  for (const int count : {counts[0], counts[1], counts[2], same}) CHECK(std::abs(count - 1000) < 5 * 26);  // of a deviation of 26
  CHECK(qd::drawn_base(5, 7, 1) == 0);
  CHECK(test::code_of([] { qd::drawn_base(5, 7, 0); }) == Errc::bad_argument);
}

TEST_CASE("a run on drawn bases that was saved goes on as if it had not stopped") {
  Run whole, first, second, fixed;
  whole.train_to(12);
  first.train_to(5);
  const test::TemporaryFolder folder;
  test::write_file(folder / "state", first.saved());
  auto state = qd::load_train_state(folder / "state");
  restore(state, "values", second.model.parameters());
  restore(state, "adamw", second.trainer.optimizer());
  second.trainer.restore(first.trainer.state());
  second.train_to(12);
  CHECK((second.saved() == whole.saved()));
  fixed.bases.resize(1);
  fixed.train_to(12);
  CHECK_FALSE((fixed.saved() == whole.saved()));
}

TEST_CASE("a base of another model is refused, and nothing has changed") {
  const auto bases = all_bases(test::tiny_config());
  Model model(bases[0], {.lora = {.max_rank = 4}});
  test::randomize_adapters(model);
  const auto before = results(model);
  qd::DecoderWeights<float> fewer, odd, missing;  // of which blocks are all that is looked at
  for (auto* base : {&fewer, &odd, &missing}) base->blocks = bases[1]->blocks;
  fewer.blocks.pop_back();
  const auto changed = [&](std::shared_ptr<const qd::WeightFor<qd::AnyFormat>> weight) {
    auto block = std::make_shared<qd::BlockWeights<float>>(test::tiny_config());
    block->linear = bases[1]->blocks.back()->linear;
    block->linear.back() = std::move(weight);
    return block;
  };
  odd.blocks.back() = changed(bases[1]->blocks.back()->linear.front());
  missing.blocks.back() = changed(nullptr);
  const auto code = [&](const auto& base) { return test::code_of([&] { qd::set_base(model, base); }); };
  CHECK(code(fewer) == Errc::bad_config);
  CHECK(code(odd) == Errc::shape_mismatch);
  CHECK(code(missing) == Errc::shape_mismatch);
  CHECK(results(model) == before);
  model.for_each_linear([&](auto& linear) { CHECK(test::code_of([&] { linear.set_base(nullptr); }) == Errc::bad_argument); });
}

TEST_CASE("A memory plan counts all bases that are drawn from", "[memory_plan]") {
  const auto config = test::small_config();
  const auto bases = all_bases(config);
  const auto offsets = sizeof(float) * static_cast<std::size_t>(config.layers) * config.linears().size();  // in no array of a weight
  std::size_t expected = 0;
  for (const auto& base : bases) expected += base->linear_bytes() - offsets;
  const auto plan = qd::memory_plan<float>(config, {.more_formats = {BaseFormat::fp8, BaseFormat::int4}});
  CHECK(plan.base_codes + plan.block_scales + plan.nested_scales == expected);
  CHECK(plan.total() - qd::memory_plan<float>(config, {}).total() == expected + offsets - bases[0]->linear_bytes());
}

}  // namespace drawn_base_test
