// The trainer: steps, micro-batches, threads, and that a run which stopped goes on as if it had not.
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/model/trainer.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/tiny_model.hpp"
#include "support/transfer.hpp"

namespace trainer_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using test::code_of;
using Model = qd::Decoder<float>;
using Trainer = qd::Trainer<float>;

namespace {

const qd::RankSet ranks{1, 3, 8};
constexpr std::int64_t steps = 12;

qd::Recipe short_recipe(std::string_view name) {
  auto recipe = qd::recipe(name);
  recipe.collect_steps = 4;  // the steps 2 ... 5; the re-ordering is before step 6
  recipe.rewarm_steps = 2;
  return recipe;
}

qd::TrainerOptions options_of(const qd::Recipe& recipe) {
  qd::TrainerOptions options;
  options.recipe = recipe;
  options.ranks = ranks;
  options.steps = steps;
  options.lr = 5e-3;
  options.warmup_steps = 3;
  options.weight_decay = 0.01;
  options.seed = 11;
  return options;
}

// Everything that a run is made of.
struct Run {
  Model model;
  Trainer trainer;

  explicit Run(const qd::Recipe& recipe, const qd::DecoderConfig& config = test::tiny_config(), float dropout = 0.0f,
               int threads = 1, bool dora = false)
      : model(
            test::tiny_weights<float>(config, false, {}),
            [&] {
              auto lora = qd::adapter_options(recipe, ranks, 8.0f, 2);
              lora.dropout = dropout;
              lora.dora = dora;
              return qd::DecoderOptions{.lora = lora};
            }(),
            qd::Cpu(threads)),
        trainer(model, options_of(recipe)) {
    trainer.hold_back(test::counting_batch(config.vocab, 4, 16, 900));
  }
  Run(const Run&) = delete;  // the trainer refers to the model

  Trainer::Report step() {
    const auto seed = static_cast<std::uint64_t>(trainer.step_count());
    return trainer.step(test::counting_batch(model.config().vocab, 5, 16, 50 + seed));
  }
  void run_to(std::int64_t end, std::vector<double>& losses) {
    while (trainer.step_count() < end) losses.push_back(step().loss);
  }

  // Values, moments, counts and gradients: what must be equal to the last bit.
  std::vector<float> numbers() {
    auto all = test::values(model);
    const auto gradients = test::gradients(model);
    all.insert(all.end(), gradients.begin(), gradients.end());
    for (auto* optimizer : {&trainer.optimizer(), &trainer.gate_optimizer()})
      for (const auto& s : optimizer->states()) {
        all.insert(all.end(), s.m.span().begin(), s.m.span().end());
        all.insert(all.end(), s.v.span().begin(), s.v.span().end());
        for (const auto count : s.steps) all.push_back(static_cast<float>(count));
      }
    return all;
  }
};

bool same_bytes(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

std::vector<qd::Recipe> all_recipes() {
  std::vector<qd::Recipe> recipes;
  for (const auto name : qd::recipe_names) recipes.push_back(short_recipe(name));
  recipes.push_back(short_recipe("order-then-nest"));
  recipes.back().gates = true;
  recipes.back().name += " with gates";
  return recipes;
}

void check_resumed(std::int64_t stop) {
  for (const auto& recipe : all_recipes())
    for (const float dropout : {0.0f, 0.2f}) {
      CAPTURE(recipe.name, stop, dropout);
      Run whole(recipe, test::tiny_config(), dropout);
      std::vector<double> losses, resumed_losses;
      whole.run_to(steps, losses);

      Run first(recipe, test::tiny_config(), dropout), second(recipe, test::tiny_config(), dropout);
      first.run_to(stop, resumed_losses);
      test::transfer(first, second);
      CHECK(second.trainer.step_count() == stop);
      second.run_to(steps, resumed_losses);
      CHECK(resumed_losses == losses);
      CHECK(same_bytes(second.numbers(), whole.numbers()));
      CHECK(second.trainer.nested().share == whole.trainer.nested().share);
      CHECK(second.trainer.reordered_at_end() == whole.trainer.reordered_at_end());
    }
}

}  // namespace

TEST_CASE("a run that stopped before moments are collected goes on to the same bytes") { check_resumed(1); }
TEST_CASE("so does one that stopped at the step that begins to collect") { check_resumed(2); }
TEST_CASE("so does one that stopped while moments are collected") { check_resumed(4); }
TEST_CASE("so does one that stopped right before the re-ordering") { check_resumed(6); }
TEST_CASE("so does one that stopped right after it") { check_resumed(7); }
TEST_CASE("so does one that stopped while ranks are nested") { check_resumed(10); }

TEST_CASE("a run with magnitudes trains them, and resumes to the same bytes on any number of threads") {
  for (const char* name : {"auto", "order-then-nest", "per-row", "qlora"}) {
    CAPTURE(name);
    const auto recipe = short_recipe(name);
    Run whole(recipe, test::tiny_config(), 0.0f, 1, true), untrained(recipe, test::tiny_config(), 0.0f, 1, true);
    std::vector<double> losses, resumed_losses;
    whole.run_to(steps, losses);
    CHECK(losses.back() < losses.front());
    std::vector<const qd::LoRAAdapter<float>*> before;
    untrained.model.for_each_linear([&](auto& linear) { before.push_back(&linear.adapter()); });
    std::size_t at = 0;
    whole.model.for_each_linear([&](auto& linear) {
      const auto now = linear.adapter().magnitude().value.span(), then = before[at++]->magnitude().value.span();
      CHECK_FALSE(std::equal(now.begin(), now.end(), then.begin()));
    });
    for (const std::int64_t stop : {4, 7}) {
      Run first(recipe, test::tiny_config(), 0.0f, 1, true), second(recipe, test::tiny_config(), 0.0f, 2, true);
      resumed_losses.clear();
      first.run_to(stop, resumed_losses);
      test::transfer(first, second);
      second.run_to(steps, resumed_losses);
      CHECK(resumed_losses == losses);
      CHECK(same_bytes(second.numbers(), whole.numbers()));
    }
  }
}

TEST_CASE("by LoRA+ B takes the step of an optimizer at a multiple of A's rate") {
  const auto make = [] { return Model(test::tiny_weights<float>(test::tiny_config(), false, {}), {.lora = {.max_rank = 8, .dora = true}}); };
  auto options = options_of(short_recipe("qlora"));
  options.b_lr_ratio = 16.0;
  options.max_gradient_norm = 0.0;
  Model model = make(), expected = make();
  for (auto* m : {&model, &expected}) test::randomize_adapters(*m);
  Trainer trainer(model, options);
  const auto batch = test::counting_batch(17, 5, 16, 1);
  const auto report = trainer.step(batch);

  qd::Parameters<float> of_b, others;
  for (const auto& p : expected.parameters()) (p->name.ends_with("lora_B") ? of_b : others).push_back(p);
  CHECK(of_b.size() == 14);
  qd::AdamW<float> slow(others, {.lr = report.lr, .weight_decay = options.weight_decay});
  qd::AdamW<float> fast(of_b, {.lr = 16.0 * report.lr, .weight_decay = options.weight_decay});
  expected.set_ranks(qd::RankPlan::uniform(8));
  expected.loss_and_gradient(batch, 1.0 / static_cast<double>(batch.scored()));
  slow.step();
  fast.step();
  CHECK(same_bytes(test::values(model), test::values(expected)));

  // Where a recipe has multipliers of its own, both count.
  auto recipe = short_recipe("order-then-nest");
  recipe.order_at = 0.0;
  options = options_of(recipe);
  options.b_lr_ratio = 4.0;
  Trainer nested(model, options);
  nested.step(batch);
  model.for_each_linear([&](auto& linear) {
    const auto &a = linear.adapter().a().row_lr, &b = linear.adapter().b().row_lr;
    REQUIRE(a.size() == 8);
    CHECK(a.front() != a.back());
    for (std::size_t i = 0; i < 8; ++i) CHECK(b[i] == 4.0f * a[i]);
    CHECK(linear.adapter().magnitude().row_lr.empty());
  });
  for (const double ratio : {0.0, -1.0, std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
    options.b_lr_ratio = ratio;
    CHECK(code_of([&] { Trainer(model, options); }) == Errc::bad_argument);
  }
}

TEST_CASE("a checkpoint is asked to keep moments exactly while there are some that are still needed") {
  Run run(short_recipe("order-then-nest"));
  while (!run.trainer.done()) {
    bool some = false;
    run.model.for_each_linear([&](auto& linear) { some = some || linear.adapter().moment_a.rows() > 0; });
    CAPTURE(run.trainer.step_count());
    CHECK(run.trainer.collecting() == some);
    run.step();
  }
}

TEST_CASE("one, two and four threads train to the same bytes, by every recipe") {
  for (const auto& recipe : all_recipes()) {
    CAPTURE(recipe.name);
    auto config = test::small_config();
    config.layers = 1;
    std::vector<float> expected;
    std::vector<double> expected_losses;
    for (const int threads : {1, 2, 4}) {
      Run run(recipe, config, 0.1f, threads);
      std::vector<double> losses;
      run.run_to(steps, losses);
      if (threads == 1) {
        expected = run.numbers();
        expected_losses = losses;
      }
      CAPTURE(threads);
      CHECK(losses == expected_losses);
      CHECK(same_bytes(run.numbers(), expected));
    }
  }
}

TEST_CASE("a step on micro-batches is a step on one batch") {
  for (const char* name : {"qlora", "per-row", "qdylora"}) {
    CAPTURE(name);
    Run one(short_recipe(name)), several(short_recipe(name));
    const Index vocab = one.model.config().vocab;
    for (std::uint64_t step = 0; step < 3; ++step) {
      // Micro-batches of two, one and three sequences, of other lengths and with other prompts.
      const std::vector<qd::Batch> parts{test::random_batch(vocab, {9, 5}, 10 * step, 2),
                                         test::random_batch(vocab, {12}, 10 * step + 3, 8),
                                         test::random_batch(vocab, {3, 4, 15}, 10 * step + 5)};
      qd::Batch all;
      for (const auto& part : parts) {
        const Index first = all.tokens();
        all.ids.insert(all.ids.end(), part.ids.begin(), part.ids.end());
        all.targets.insert(all.targets.end(), part.targets.begin(), part.targets.end());
        for (std::size_t s = 1; s < part.offsets.size(); ++s) all.offsets.push_back(first + part.offsets[s]);
      }
      const auto whole = one.trainer.step(all);
      const auto split = several.trainer.step(std::span<const qd::Batch>(parts));
      CHECK(split.loss == Approx(whole.loss).epsilon(1e-6));
      CHECK(split.gradient_norm == Approx(whole.gradient_norm).epsilon(1e-5));
      CHECK(split.rank == whole.rank);
      CHECK(split.tokens == whole.tokens);
      if (step > 0) continue;  // later steps start from weights that differ in the last bits
      const auto a = test::gradients(one.model), b = test::gradients(several.model);
      double largest = 0.0, scale = 0.0;
      for (std::size_t i = 0; i < a.size(); ++i) {
        largest = std::max(largest, static_cast<double>(std::fabs(a[i] - b[i])));
        scale = std::max(scale, static_cast<double>(std::fabs(a[i])));
      }
      CHECK(largest <= 1e-6 * scale);
    }
  }
}

TEST_CASE("checkpointing trains to the same bytes") {
  const auto recipe = short_recipe("order-then-nest");
  std::vector<std::vector<float>> values;
  for (const bool checkpoint : {false, true}) {
    auto lora = qd::adapter_options(recipe, ranks, 8.0f, 2);
    lora.dropout = 0.1f;
    Model model(test::tiny_weights<float>(test::tiny_config(), false, {}), {.lora = lora, .checkpoint = checkpoint}, qd::Cpu(1));
    Trainer trainer(model, options_of(recipe));
    while (!trainer.done()) trainer.step(test::counting_batch(17, 5, 16, static_cast<std::uint64_t>(trainer.step_count())));
    values.push_back(test::values(model));
  }
  CHECK(same_bytes(values[0], values[1]));
}

TEST_CASE("a report tells the loss, the rate and the tokens of its step") {
  Run run(short_recipe("qlora"));
  const auto batch = test::counting_batch(17, 5, 16, 1);
  run.model.set_ranks(qd::RankPlan::uniform(8));
  const auto losses = run.model.losses(batch);
  double mean = 0.0;
  for (const double loss : losses) mean += loss / static_cast<double>(losses.size());
  const auto report = run.trainer.step(batch);
  CHECK(report.loss == Approx(mean).epsilon(1e-9));
  CHECK(report.tokens == 75);
  CHECK(report.rank == 8);
  CHECK(report.lr == Approx(5e-3 / 3.0));  // warm-up
  CHECK(run.step().lr == Approx(5e-3 * 2.0 / 3.0 * (0.1 + 0.45 * (1.0 + std::cos(3.14159265358979 / 12.0)))));
  CHECK(run.trainer.step_count() == 2);
  CHECK(run.trainer.steps() == 12);
}

TEST_CASE("rows learn faster at first after the re-ordering, the first ones most, and evenly at the end") {
  Run run(short_recipe("order-then-nest"));
  std::vector<double> losses;
  run.run_to(6, losses);
  for (const auto& p : run.model.parameters()) CHECK(p->row_lr.empty());
  run.run_to(7, losses);
  for (const auto& p : run.model.parameters()) {
    REQUIRE(p->row_lr.size() == 8);
    CHECK(p->row_lr[0] == Approx(24.0));       // 2 * 12
    CHECK(p->row_lr[1] == Approx(6.0));        // 2 * 12 / 4
    CHECK(p->row_lr[7] == Approx(2.0));
  }
  run.run_to(10, losses);  // step 9 is half of the way
  CHECK(run.model.parameters()[0]->row_lr[0] == Approx(1.0 + 23.0 / 2.0));
  CHECK(run.model.parameters()[0]->row_lr[7] == Approx(1.5));
}

TEST_CASE("the re-ordering starts the optimizer and the warm-up anew") {
  Run run(short_recipe("order-then-nest"));
  std::vector<double> losses;
  run.run_to(6, losses);
  for (const auto& state : run.trainer.optimizer().states()) CHECK(state.steps == std::vector<std::int64_t>(8, 6));
  const qd::Schedule schedule{qd::Schedule::Shape::cosine, steps, 3, 0.1};
  CHECK(run.step().lr == Approx(5e-3 * schedule(6) / 2.0));
  for (const auto& state : run.trainer.optimizer().states()) CHECK(state.steps == std::vector<std::int64_t>(8, 1));
  CHECK(run.step().lr == Approx(5e-3 * schedule(7)));
  CHECK(run.step().lr == Approx(5e-3 * schedule(8)));
}

TEST_CASE("a gradient that is not finite changes nothing and is counted") {
  Run run(short_recipe("qlora"));
  run.step();
  auto& weight = run.model.parameters()[3]->value(0, 0);
  const float kept = weight;
  weight = std::numeric_limits<float>::quiet_NaN();
  const auto others = test::values(run.model);
  const auto report = run.step();
  CHECK(report.skipped);
  CHECK(run.trainer.skipped_steps() == 1);
  CHECK(run.trainer.step_count() == 2);
  CHECK(run.trainer.optimizer().step_count() == 1);
  CHECK(same_bytes(test::values(run.model), others));
  weight = kept;
  CHECK_FALSE(run.step().skipped);
}

TEST_CASE("losses by rank are the means at every rank of the set, and without the adapter at the end") {
  Run run(short_recipe("qdylora"));
  test::randomize_adapters(run.model);
  const auto batch = test::counting_batch(17, 5, 16, 1);
  const auto found = run.trainer.losses_by_rank(batch);
  REQUIRE(found.size() == 4);
  const Index expected[] = {1, 3, 8, 0};
  for (std::size_t i = 0; i < 4; ++i) {
    run.model.set_ranks(qd::RankPlan::uniform(expected[i]));
    const auto losses = run.model.losses(batch);
    double sum = 0.0;
    for (const double loss : losses) sum += loss;
    CHECK(found[i] == Approx(sum / static_cast<double>(losses.size())).epsilon(1e-12));
  }
}

TEST_CASE("losses by rank are without dropout, also before the first step") {
  Run plain(short_recipe("qdylora")), dropped(short_recipe("qdylora"), test::tiny_config(), 0.5f);
  for (auto* run : {&plain, &dropped}) test::randomize_adapters(run->model);
  const auto batch = test::counting_batch(17, 5, 16, 1);
  CHECK(dropped.trainer.losses_by_rank(batch) == plain.trainer.losses_by_rank(batch));
}

TEST_CASE("a trained model is left at full rank with dropout off") {
  Run run(short_recipe("per-row"), test::tiny_config(), 0.5f);
  std::vector<double> losses;
  run.run_to(steps, losses);
  const auto batch = test::counting_batch(17, 5, 16, 1);
  const auto first = run.model.losses(batch);
  CHECK(run.model.losses(batch) == first);
  run.model.set_training(false);
  run.model.set_ranks(qd::RankPlan::uniform(8));
  CHECK(run.model.losses(batch) == first);
}

TEST_CASE("runs that cannot be are refused") {
  Run run(short_recipe("qlora"));
  const auto made = [&](auto change) {
    auto options = options_of(short_recipe("qlora"));
    change(options);
    return code_of([&] { Trainer trainer(run.model, options); });
  };
  CHECK_FALSE(made([](auto&) {}));
  CHECK(made([](auto& o) { o.steps = 0; }) == Errc::bad_argument);
  CHECK(made([](auto& o) { o.steps = -5; }) == Errc::bad_argument);
  CHECK(made([](auto& o) { o.ranks = qd::RankSet{1, 4}; }) == Errc::rank_range);
  CHECK(made([](auto& o) { o.ranks = qd::RankSet{16}; }) == Errc::rank_range);
  CHECK(made([](auto& o) { o.lr = -1.0; }) == Errc::bad_argument);
  CHECK(made([](auto& o) { o.lr = std::nan(""); }) == Errc::bad_argument);

  auto unscored = test::counting_batch(17, 2, 8, 1);
  unscored.targets.assign(unscored.targets.size(), -1);
  CHECK(code_of([&] { run.trainer.step(unscored); }) == Errc::bad_argument);
  CHECK(code_of([&] { run.trainer.step(std::span<const qd::Batch>{}); }) == Errc::bad_argument);
  CHECK(run.trainer.step_count() == 0);
  std::vector<double> losses;
  run.run_to(steps, losses);
  CHECK(run.trainer.done());
  CHECK(code_of([&] { run.step(); }) == Errc::state_order);
}

TEST_CASE("a state of another run is refused") {
  Run run(short_recipe("order-then-nest"));
  const auto code = [&](auto change) {
    auto state = run.trainer.state();
    change(state);
    return code_of([&] { run.trainer.restore(state); });
  };
  CHECK_FALSE(code([](auto&) {}));
  CHECK(code([](auto& s) { s.sampler.carry.push_back(0.0); }) == Errc::shape_mismatch);
  CHECK(code([](auto& s) { s.step = -1; }) == Errc::bad_argument);
  CHECK(code([](auto& s) { s.step = 13; }) == Errc::bad_argument);
  CHECK(code([](auto& s) { s.nesting = true; }) == Errc::bad_argument);  // before the re-ordering
  CHECK(code([](auto& s) { s.step = 8; }) == Errc::bad_argument);       // after it, without nesting
}

}  // namespace trainer_test
