// Training with moments in a file: the trainer's bytes and its states are those of moments in memory.
#include <string>

#include <qdylora/core/paged_memory.hpp>
#include <qdylora/cpu/cpu.hpp>
#include <qdylora/io/collect.hpp>
#include <qdylora/model/trainer.hpp>
#include <qdylora/optim/lion.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/paged_pages.hpp"
#include "support/saved_run.hpp"
#include "support/tiny_model.hpp"

namespace paged_test {

namespace qd = qdylora;
using qd::Index;
using qd::PagedMemory;

namespace {

/// A run of a model whose moments are partly above 4096 elements.
template <class Optimizer>
struct Run {
  qd::Decoder<float> model;
  qd::Trainer<float, qd::Cpu, Optimizer> trainer;

  explicit Run(typename Optimizer::Memory memory)
      : model(test::tiny_weights<float>(test::small_config(), false, {}),
              {.lora = qd::adapter_options(recipe(), {1, 4, 48}, 8.0f, 2)}, qd::Cpu(2)),
        trainer(model, {.recipe = recipe(), .ranks = {1, 4, 48}, .steps = 8, .lr = 5e-3, .warmup_steps = 2, .seed = 3}, memory) {}
  Run(const Run&) = delete;  // the trainer refers to the model

  static qd::Recipe recipe() {
    auto recipe = qd::recipe("order-then-nest");  // at step 4 it resets the moments
    recipe.collect_steps = 2;
    return recipe;
  }
  void run_to(std::int64_t end) {
    while (trainer.step_count() < end)
      trainer.step(test::counting_batch(model.config().vocab, 3, 12, static_cast<std::uint64_t>(trainer.step_count())));
  }
  std::string saved() { return test::saved_run(model, trainer); }
  /// Goes on from where another run of the same seed was saved; `place` is the trainer's of that run.
  template <class State>
  void resume(const std::string& saved, const State& place) {
    const test::TemporaryFolder folder;
    test::write_file(folder / "state", saved);
    auto state = qd::load_train_state(folder / "state");
    restore(state, "values", model.parameters());
    restore(state, "adamw", trainer.optimizer());
    trainer.restore({place.step, place.nesting, place.sampler, place.nested, place.reordered_at_end});
  }
};

template <class InMemory, class InFile>
void expect_same_runs() {
  const test::TemporaryFolder folder;
  Run<InMemory> plain({}), resumed_in_memory({});
  Run<InFile> paged(PagedMemory(folder.path())), resumed_in_file(PagedMemory(folder.path()));
  plain.run_to(6);
  paged.run_to(6);
  const auto saved = paged.saved();
  CHECK(test::paged_pages().mapped >= 2 * paged.trainer.optimizer().bytes());
  CHECK(test::paged_pages().resident == 0);  // saving has read all moments
  CHECK(saved == plain.saved());
  resumed_in_memory.resume(saved, paged.trainer.state());
  resumed_in_file.resume(saved, plain.trainer.state());
  CHECK(test::paged_pages().resident == 0);  // resuming has written them
  plain.run_to(8);
  resumed_in_memory.run_to(8);
  resumed_in_file.run_to(8);
  CHECK(resumed_in_memory.saved() == plain.saved());
  CHECK(resumed_in_file.saved() == plain.saved());
}

}  // namespace

TEST_CASE("a run with its moments in a file is the run with them in memory, and either goes on as the other") {
  expect_same_runs<qd::AdamW<float>, qd::AdamW<float, qd::Cpu, PagedMemory>>();
  expect_same_runs<qd::AdamW8bit<float>, qd::AdamW8bit<float, qd::Cpu, PagedMemory>>();
  expect_same_runs<qd::Lion<float>, qd::Lion<float, qd::Cpu, PagedMemory>>();
}

}  // namespace paged_test
