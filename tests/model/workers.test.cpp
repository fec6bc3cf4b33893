// Several trainers, each with a part of every batch, take the steps of one.
#include <algorithm>
#include <cmath>
#include <functional>
#include <memory>
#include <set>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/model/trainer.hpp>
#include <qdylora/optim/workers.hpp>

#include "support/catch.hpp"
#include "support/counted_memory.hpp"
#include "support/files.hpp"
#include "support/team.hpp"
#include "support/tiny_model.hpp"

namespace workers_test {

namespace qd = qdylora;
using qd::Index;

namespace {

const qd::RankSet ranks{1, 3, 8};
constexpr std::int64_t steps = 12;

struct Run {
  qd::Decoder<double> model;
  qd::Trainer<double> trainer;
  std::vector<qd::Trainer<double>::Report> reports;

  /// Holds back what workers `first` to `last` do.
  Run(const qd::Recipe& recipe, float dropout, Index first = 0, Index last = 0)
      : model(test::tiny_weights<double>(test::tiny_config(), false, {}),
              [&] {
                auto lora = qd::adapter_options(recipe, ranks, 8.0f, 2);
                lora.dropout = dropout;
                return qd::DecoderOptions{.lora = lora};
              }(),
              qd::Cpu(1)),
        trainer(model, {.recipe = recipe, .ranks = ranks, .steps = steps, .lr = 5e-3, .warmup_steps = 3, .seed = 11}) {
    std::vector<qd::Batch> held_back;
    for (Index worker = first; worker <= last; ++worker)
      held_back.push_back(test::counting_batch(17, 4, 16, 900 + static_cast<std::uint64_t>(worker)));
    trainer.hold_back(std::move(held_back));
  }
  Run(const Run&) = delete;  // the trainer refers to the model
};

/// Of other lengths and numbers of sequences each, now and then of none.
std::vector<qd::Batch> part_of(std::int64_t step, Index worker) {
  std::vector<qd::Batch> batches;
  const auto seed = static_cast<std::uint64_t>(100 * step + 10 * worker);
  if (worker != 1 || step % 4 != 3) batches.push_back(test::counting_batch(17, 2 + worker, 7 + (step + worker) % 3, seed));
  if (worker == 2) batches.push_back(test::counting_batch(17, 1, 12, seed + 1));
  return batches;
}

void take_part(Run& run, Index worker) {
  while (!run.trainer.done()) run.reports.push_back(run.trainer.step(part_of(run.trainer.step_count(), worker)));
}

double largest_difference(const std::vector<double>& a, const std::vector<double>& b) {
  double largest = 0.0;
  for (std::size_t i = 0; i < a.size(); ++i) largest = std::max(largest, std::fabs(a[i] - b[i]));
  return largest;
}

std::vector<qd::Recipe> all_recipes() {
  std::vector<qd::Recipe> recipes;
  for (const auto name : qd::recipe_names) recipes.push_back(qd::recipe(name));
  recipes.push_back(qd::recipe("order-then-nest"));
  recipes.back().gates = true;
  for (auto& recipe : recipes) {
    recipe.collect_steps = 4;
    recipe.rewarm_steps = 2;
  }
  return recipes;
}

}  // namespace

TEST_CASE("three workers take the steps of one trainer, by every recipe") {
  constexpr Index count = 3;
  for (const auto& recipe : all_recipes())
    for (const float dropout : {0.0f, 0.2f}) {
      CAPTURE(recipe.name, recipe.gates, dropout);
      test::Team<double> team(count);
      std::vector<std::unique_ptr<Run>> runs;
      for (Index worker = 0; worker < count; ++worker) {
        runs.push_back(std::make_unique<Run>(recipe, dropout, worker, worker));
        runs.back()->trainer.join(team.worker(worker));
      }
      std::vector<std::jthread> threads;
      for (Index worker = 0; worker < count; ++worker)
        threads.emplace_back(take_part, std::ref(*runs[static_cast<std::size_t>(worker)]), worker);
      threads.clear();

      Run alone(recipe, dropout, 0, count - 1);
      while (!alone.trainer.done()) {
        std::vector<qd::Batch> batches;
        for (Index worker = 0; worker < count; ++worker)
          for (auto& batch : part_of(alone.trainer.step_count(), worker)) batches.push_back(std::move(batch));
        alone.reports.push_back(alone.trainer.step(batches));
      }

      const auto expected = test::values(alone.model);
      for (const auto& run : runs) {
        const auto values = test::values(run->model);
        CHECK(largest_difference(values, expected) < 1e-9);
        CHECK(values == test::values(runs.front()->model));  // to the bit
        CHECK(run->trainer.nested().share == Approx(alone.trainer.nested().share).epsilon(1e-9));
        for (std::size_t step = 0; step < steps; ++step) {
          const auto &found = run->reports[step], &wanted = alone.reports[step];
          CHECK(found.loss == Approx(wanted.loss).epsilon(1e-10));
          CHECK(found.gradient_norm == Approx(wanted.gradient_norm).epsilon(1e-8));
          CHECK(found.rank == wanted.rank);
          CHECK(found.tokens == wanted.tokens);
        }
      }
    }
}

TEST_CASE("workers exchange the gradients of the step's rank alone") {
  Run run(qd::recipe("qdylora"), 0.0f);
  std::size_t row = 0, parameters = 0;
  for (const auto& p : run.model.parameters()) {
    row += static_cast<std::size_t>(p->value.cols());
    ++parameters;
  }
  std::vector<std::size_t> sizes;
  run.trainer.join({0, 2, [&](std::span<double> numbers) { sizes.push_back(numbers.size()); }});
  std::vector<std::size_t> expected;
  while (!run.trainer.done()) {
    const auto rank = static_cast<std::size_t>(run.trainer.step(part_of(0, 0)).rank);
    expected.push_back(2 * 3);                          // each worker's sequences, tokens and scored ones
    expected.push_back(rank * (row + parameters) + 1);  // gradients, whether each row was touched, and the loss
  }
  CHECK(sizes == expected);
  CHECK(std::set(sizes.begin(), sizes.end()).size() > 2);  // ranks differed
}

TEST_CASE("rows that another worker has touched are touched, and the sums are everyone's") {
  constexpr Index count = 2;
  test::Team<double> team(count);
  std::vector<qd::Parameters<double>> all(count);
  std::vector<std::vector<double>> numbers(count);
  std::vector<std::jthread> threads;
  for (Index worker = 0; worker < count; ++worker) {
    threads.emplace_back([&, worker] {
      const auto at = static_cast<std::size_t>(worker);
      for (const Index rows : {5, 2}) {
        auto p = std::make_shared<qd::Parameter<double>>("p", rows, 3);
        std::fill(p->gradient.span().begin(), p->gradient.span().end(), worker == 0 ? 1.0 : 10.0);
        p->touch(worker, worker + 1);
        all[at].push_back(std::move(p));
      }
      numbers[at] = {0.5, static_cast<double>(worker)};
      team.worker(worker).sum_gradients(all[at], 3, numbers[at], qd::Cpu(1));
    });
  }
  threads.clear();
  for (Index worker = 0; worker < count; ++worker) {
    const auto at = static_cast<std::size_t>(worker);
    CHECK(numbers[at] == std::vector<double>{1.0, 1.0});
    const auto &five = *all[at][0], &two = *all[at][1];
    for (Index row = 0; row < 5; ++row) CHECK(five.gradient(row, 2) == (row < 3 ? 11.0 : worker == 0 ? 1.0 : 10.0));
    for (Index row = 0; row < 2; ++row) CHECK(two.gradient(row, 0) == 11.0);
    CHECK(five.touched == std::vector<bool>{true, true, false, false, false});
    CHECK(two.touched == std::vector<bool>{true, true});
  }
}

TEST_CASE("gradients in a device's memory are summed there") {
  const test::CountedDevice device;
  const auto p = std::make_shared<qd::Parameter<float, test::CountedMemory>>("p", 3, 2);
  device.fill(p->gradient.view(), 1.0f);
  std::vector<double> numbers{0.5};
  qd::Workers<float, test::CountedMemory> workers(0, 2, [](std::span<float> all) {
    for (float& x : all) x *= 3.0f;
  });
  workers.sum_gradients({p}, 2, numbers, device);
  CHECK(numbers == std::vector<double>{1.5});
  qd::Matrix<float> gradient(3, 2);
  device.download(std::as_const(p->gradient).view(), gradient.view());
  for (Index i = 0; i < 3; ++i) CHECK(gradient(i, 1) == (i < 2 ? 3.0f : 1.0f));
}

TEST_CASE("a sum that fails ends the step with its error and leaves the parameters") {
  Run run(qd::recipe("per-row"), 0.0f);
  int calls = 0;
  run.trainer.join({0, 2, [&calls](std::span<double>) {
                      if (++calls == 4) throw qd::Error(qd::Errc::peer, "worker 1 is gone");
                    }});
  run.trainer.step(part_of(0, 0));
  const auto before = test::values(run.model);
  const auto error = test::error_of([&] { run.trainer.step(part_of(1, 0)); });
  REQUIRE(error);
  CHECK(error->code() == qd::Errc::peer);
  CHECK(test::values(run.model) == before);
  CHECK(run.trainer.step_count() == 1);
  CHECK(test::code_of([] { qd::Workers<double>(2, 2, {}); }) == qd::Errc::bad_argument);
  CHECK(test::code_of([] { qd::Workers<double>(-1, 2, {}); }) == qd::Errc::bad_argument);
}

}  // namespace workers_test
