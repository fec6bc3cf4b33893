// Loss scaling: the scale by itself, optimizers that divide by it, and training in half.
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/model/trainer.hpp>
#include <qdylora/optim/lion.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/team.hpp"
#include "support/tiny_model.hpp"
#include "support/transfer.hpp"

namespace loss_scale_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using test::code_of;

namespace {

const qd::RankSet ranks{1, 3, 8};
constexpr std::int64_t steps = 10;

/// A run of the recipe that re-orders by gathered moments, on a tiny model of T.
template <class T, class Optimizer = qd::AdamW<T>>
struct Run {
  using Report = typename qd::Trainer<T, qd::Cpu, Optimizer>::Report;

  qd::Decoder<T> model;
  qd::Trainer<T, qd::Cpu, Optimizer> trainer;

  explicit Run(qd::LossScaleOptions loss_scale = {}, std::int64_t collect_steps = 4, float dropout = 0.0f)
      : model(test::tiny_weights<float>(test::tiny_config(), false, {}),
              {.lora = adapters(options_of(loss_scale, collect_steps).recipe, dropout)}, qd::Cpu(1)),
        trainer(model, options_of(loss_scale, collect_steps)) {}
  Run(const Run&) = delete;  // the trainer refers to the model

  static qd::LoRAOptions adapters(const qd::Recipe& recipe, float dropout) {
    auto options = qd::adapter_options(recipe, ranks, 8.0f, 2);
    options.dropout = dropout;
    return options;
  }
  static qd::TrainerOptions options_of(qd::LossScaleOptions loss_scale, std::int64_t collect_steps) {
    auto recipe = qd::recipe("order-then-nest");
    recipe.collect_steps = collect_steps;
    recipe.rewarm_steps = 2;
    recipe.gates = true;
    return {.recipe = recipe, .ranks = ranks, .steps = steps, .lr = 5e-3, .warmup_steps = 3, .seed = 11, .loss_scale = loss_scale};
  }
  auto step() {
    return trainer.step(test::counting_batch(model.config().vocab, 5, 16, 50 + static_cast<std::uint64_t>(trainer.step_count())));
  }
  /// Moments that have been gathered, a's and b's in turns.
  std::vector<std::vector<float>> moments() {
    std::vector<std::vector<float>> all;
    for (const auto& m : qd::collected_moments(model)) {
      auto& numbers = all.emplace_back();
      for (Index i = 0; i < m.rows; ++i) numbers.insert(numbers.end(), m.row(i), m.row(i) + m.cols);
    }
    return all;
  }
};

double distance(const std::vector<float>& found, const std::vector<float>& expected) {
  double difference = 0.0, size = 0.0;
  REQUIRE(found.size() == expected.size());
  for (std::size_t i = 0; i < found.size(); ++i) {
    difference += std::pow(static_cast<double>(found[i]) - static_cast<double>(expected[i]), 2);
    size += std::pow(static_cast<double>(expected[i]), 2);
  }
  return std::sqrt(difference / size);
}

}  // namespace

TEST_CASE("a loss scale is halved at an overflow and doubled after steps without") {
  qd::LossScale scale({.initial = 8.0, .growth_interval = 3});
  const auto good = [&] {
    scale.end_step(false);
    return scale.value();
  };
  CHECK(good() == 8.0);
  CHECK(good() == 8.0);
  CHECK(good() == 16.0);
  CHECK(good() == 16.0);
  CHECK(scale.lower());
  CHECK(scale.lower());
  CHECK(scale.value() == 4.0);
  CHECK(good() == 4.0);  // the step that overflowed does not count
  CHECK(good() == 4.0);
  CHECK(good() == 4.0);
  CHECK(good() == 8.0);
  // A step that no scale helps is not the scale's fault.
  CHECK(good() == 8.0);
  for (int i = 0; i < 3; ++i) CHECK(scale.lower());
  CHECK_FALSE(scale.lower());
  CHECK(scale.value() == 1.0);
  scale.end_step(true);
  CHECK(scale.value() == 8.0);
  CHECK(good() == 8.0);
  CHECK(good() == 16.0);

  qd::LossScale most({.initial = qd::LossScale::largest, .growth_interval = 1});
  most.end_step(false);
  CHECK(most.value() == qd::LossScale::largest);

  qd::LossScale none;
  CHECK_FALSE(none.lower());
  for (int i = 0; i < 1000; ++i) none.end_step(false);
  CHECK(none.value() == 1.0);

  for (const double bad : {0.0, -2.0, 0.5, 3.0, 0x1p33, std::numeric_limits<double>::infinity(), std::nan("")})
    CHECK(code_of([&] { qd::LossScale({.initial = bad}); }) == Errc::bad_argument);
  CHECK(code_of([] { qd::LossScale({.growth_interval = 0}); }) == Errc::bad_argument);
  CHECK(code_of([&] { scale.restore({4.0, -1}); }) == Errc::bad_argument);
  CHECK(code_of([&] { none.restore({4.0, 0}); }) == Errc::bad_argument);
}

TEMPLATE_TEST_CASE("an optimizer's step on scaled gradients is that on gradients, to the bit", "", qd::AdamW<float>, qd::AdamW8bit<float>,
                   qd::Lion<float>) {
  const auto clip = GENERATE(0.0, 0.5);
  const auto parameter = [] {
    auto p = std::make_shared<qd::Parameter<float>>("p", 70, 64);
    qd::copy(test::normal_matrix<float>(70, 64, 1).view(), p->value.view());
    return p;
  };
  const auto plain = parameter(), scaled = parameter();
  typename TestType::Options options;
  options.weight_decay = 0.1;
  options.max_gradient_norm = clip;
  TestType one({plain}, options), other({scaled}, options);
  for (std::uint64_t step = 0; step < 3; ++step) {
    const double scale = std::ldexp(1.0, 4 + 9 * static_cast<int>(step));
    const auto gradient = test::normal_matrix<float>(70, 64, 10 + step);
    for (Index i = 0; i < gradient.size(); ++i) {
      plain->gradient.data()[i] = gradient.data()[i];
      scaled->gradient.data()[i] = static_cast<float>(scale) * gradient.data()[i];
    }
    plain->touch(0, 70);
    scaled->touch(0, 70);
    const auto expected = one.step(), found = other.step(scale);
    CHECK(found.gradient_norm == expected.gradient_norm);
    CHECK(test::same_bits(std::as_const(scaled->value).view(), std::as_const(plain->value).view()));
  }
  // What is too large is so without the scale.
  scaled->gradient(0, 0) = 1e21f;
  CHECK_FALSE(other.step(0x1p20).skipped);
  for (const double bad : {0.0, -1.0, std::numeric_limits<double>::infinity(), std::nan("")})
    CHECK(code_of([&] { other.step(bad); }) == Errc::bad_argument);
}

TEST_CASE("gradients that half has no numbers for come through a loss scale") {
  // The mean of a million tokens gives each a gradient of a millionth.
  constexpr double mean = 1e-6;
  const auto gradients = [&]<class T>(std::type_identity<T>, double scale) {
    Run<T> run;
    test::randomize_adapters(run.model);
    run.model.loss_and_gradient(test::counting_batch(run.model.config().vocab, 5, 16, 50), mean * scale);
    auto all = test::gradients(run.model);
    for (float& g : all) g /= static_cast<float>(scale);
    return all;
  };
  const auto expected = gradients(std::type_identity<float>(), 1.0);
  CHECK(distance(gradients(std::type_identity<qd::half>(), 65536.0), expected) < 1e-2);
  CHECK(distance(gradients(std::type_identity<qd::half>(), 1.0), expected) > 5e-2);
}

TEMPLATE_TEST_CASE("a step whose gradient leaves half's range is taken again, and nothing of it is lost", "", qd::AdamW<qd::half>,
                   qd::AdamW8bit<qd::half>, qd::Lion<qd::half>) {
  constexpr std::int64_t never = 1000;
  using HalfRun = Run<qd::half, TestType>;
  const float dropout = GENERATE(0.0f, 0.2f);
  CAPTURE(dropout);
  HalfRun high({.initial = qd::LossScale::largest, .growth_interval = never}, 6, dropout);  // moments from the first step on
  const auto first = high.step();
  CHECK_FALSE(first.skipped);
  REQUIRE(first.repeats > 0);
  CHECK(high.trainer.loss_scale() == std::ldexp(qd::LossScale::largest, -first.repeats));
  CHECK(high.trainer.skipped_steps() == 0);
  CHECK(high.trainer.optimizer().step_count() == 1);
  // The same as if the scale had been right from the start: masks, values, moments of the optimizer, and those that re-ordering looks at.
  HalfRun right({.initial = high.trainer.loss_scale(), .growth_interval = never}, 6, dropout);
  const auto same = right.step();
  CHECK(same.repeats == 0);
  CHECK(same.loss == first.loss);
  CHECK(same.gradient_norm == first.gradient_norm);
  CHECK(high.moments() == right.moments());
  REQUIRE_FALSE(high.moments().empty());
  while (!high.trainer.done()) CHECK(high.step().loss == right.step().loss);
  CHECK(test::values(high.model) == test::values(right.model));
}

TEST_CASE("a run in half that is stopped while moments are gathered at a changing scale goes on as if it were not") {
  for (const std::int64_t stop : {1, 2, 3, 4, 7}) {  // moments are gathered in steps 1 to 4
    CAPTURE(stop);
    const qd::LossScaleOptions often{.initial = 256.0, .growth_interval = 1};
    Run<qd::half> whole(often), before(often), after(often);
    while (!whole.trainer.done()) whole.step();
    while (before.trainer.step_count() < stop) before.step();
    test::transfer(before, after);
    CHECK(after.trainer.loss_scale() == std::ldexp(256.0, static_cast<int>(stop)));
    while (!after.trainer.done()) after.step();
    CHECK(test::values(after.model) == test::values(whole.model));
  }
}

TEST_CASE("workers in half take a step again together, and take the steps of one") {
  constexpr Index count = 2;
  const qd::LossScaleOptions high{.initial = qd::LossScale::largest, .growth_interval = 1};
  const auto part_of = [](std::int64_t step, Index worker) {
    // The first one's batch is what overflows first, being the larger.
    return test::counting_batch(17, worker == 0 ? 6 : 1, 16, static_cast<std::uint64_t>(10 * step + worker));
  };
  using HalfRun = Run<qd::half>;
  test::Team<float> team(count);
  std::vector<std::unique_ptr<HalfRun>> runs;
  std::vector<std::vector<HalfRun::Report>> reports(count);
  for (Index worker = 0; worker < count; ++worker) {
    runs.push_back(std::make_unique<HalfRun>(high));
    runs.back()->trainer.join(team.worker(worker));
  }
  {
    std::vector<std::jthread> threads;
    for (Index worker = 0; worker < count; ++worker)
      threads.emplace_back([&, worker] {
        auto& trainer = runs[static_cast<std::size_t>(worker)]->trainer;
        while (!trainer.done()) reports[static_cast<std::size_t>(worker)].push_back(trainer.step(part_of(trainer.step_count(), worker)));
      });
  }
  HalfRun alone(high);
  int repeats = 0;
  for (std::size_t step = 0; !alone.trainer.done(); ++step) {
    const auto at = alone.trainer.step_count();
    const std::vector<qd::Batch> both{part_of(at, 0), part_of(at, 1)};
    const auto expected = alone.trainer.step(both);
    for (const auto& worker : reports) {
      CHECK(worker[step].loss == Approx(expected.loss).epsilon(2e-3));
      CHECK(worker[step].gradient_norm == Approx(expected.gradient_norm).epsilon(5e-2));
      CHECK(worker[step].repeats == reports.front()[step].repeats);
      CHECK_FALSE(worker[step].skipped);
    }
    repeats += reports.front()[step].repeats;
  }
  CHECK(repeats > 10);
  CHECK(test::values(runs[0]->model) == test::values(runs[1]->model));  // to the bit
  CHECK(runs[0]->trainer.loss_scale() == runs[1]->trainer.loss_scale());
}

TEST_CASE("half trains as float does, whatever its scale does while moments are gathered") {
  Run<qd::half> search({.initial = qd::LossScale::largest});
  search.step();
  const double fits = search.trainer.loss_scale();
  for (const double initial : {256.0, fits}) {  // doubled in every step; tried twice as large in every step
    CAPTURE(initial);
    Run<float> expected;
    Run<qd::half> found({.initial = initial, .growth_interval = 1});
    int repeats = 0;
    for (int i = 0; i < 5; ++i) {
      if (initial == 256.0) CHECK(found.trainer.loss_scale() == std::ldexp(256.0, i));
      const auto a = expected.step();
      const auto b = found.step();
      CHECK(b.loss == Approx(a.loss).epsilon(2e-3));
      CHECK(b.gradient_norm == Approx(a.gradient_norm).epsilon(2e-2));
      repeats += b.repeats;
    }
    CHECK((repeats > 1) == (initial == fits));
    // Steps weigh alike, whatever the scale was: moments are of one scale, the last one.
    const auto a = expected.moments();
    auto b = found.moments();
    REQUIRE(a.size() == b.size());
    REQUIRE_FALSE(a.empty());
    const auto square = static_cast<float>(std::pow(found.trainer.loss_scale(), 2));
    for (std::size_t i = 0; i < a.size(); ++i) {
      if (i % 2 == 1)
        for (float& x : b[i]) x /= square;
      CHECK(distance(b[i], a[i]) < 5e-2);
    }
    while (!expected.trainer.done()) CHECK(found.step().loss == Approx(expected.step().loss).epsilon(1e-2));
    const auto size = [](auto& run) {
      double sum = 0.0;
      for (const auto& s : run.trainer.gate_optimizer().states())
        for (const float m : s.m.span()) sum += std::fabs(static_cast<double>(m));
      return sum;
    };
    REQUIRE(size(expected) > 0.0);
    CHECK(size(found) == Approx(size(expected)).epsilon(0.2));
  }
}

TEST_CASE("a loss that is not finite is no matter of scale") {
  Run<qd::half> run;
  run.step();
  auto& weight = run.model.parameters()[3]->value(0, 0);
  const float kept = weight;
  weight = std::numeric_limits<float>::quiet_NaN();
  const auto report = run.step();
  CHECK(report.skipped);
  CHECK(report.repeats == 0);
  CHECK(run.trainer.skipped_steps() == 1);
  CHECK(run.trainer.loss_scale() == 65536.0);
  weight = kept;
  CHECK_FALSE(run.step().skipped);
}

TEST_CASE("a run's state has its loss scale") {
  Run<qd::half> run({.initial = 1024.0, .growth_interval = 2});
  for (int i = 0; i < 3; ++i) run.step();
  const auto state = run.trainer.state();
  CHECK(state.loss_scale.value == 2048.0);
  CHECK(state.loss_scale.steps == 1);
  Run<qd::half> other({.initial = 1024.0, .growth_interval = 2});
  other.trainer.restore(state);
  CHECK(other.trainer.loss_scale() == 2048.0);
  auto bad = state;
  bad.loss_scale.value = 3.0;
  CHECK(code_of([&] { other.trainer.restore(bad); }) == Errc::bad_argument);
  CHECK(Run<float>().trainer.loss_scale() == 1.0);
}

}  // namespace loss_scale_test
