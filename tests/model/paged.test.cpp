// Training with moments or checkpoints in files: the trainer's bytes and its states, or the gradients, are those of memory.
#include <algorithm>
#include <string>
#include <vector>

#include <qdylora/core/paged_memory.hpp>
#include <qdylora/cpu/cpu.hpp>
#include <qdylora/io/collect.hpp>
#include <qdylora/model/trainer.hpp>
#include <qdylora/optim/lion.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
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

TEST_CASE("with checkpoints in files, losses and gradients are the same to the bit, and no block's input stays in memory") {
  const test::TemporaryFolder folder;
  auto config = test::small_config();
  config.layers = 5;
  const auto weights = test::tiny_weights<float>(config, false, {});
  using Model = qd::Decoder<float>;
  Model plain(weights, {.lora = {.max_rank = 8}, .checkpoint = true}, qd::Cpu(2));
  Model paged(weights, {.lora = {.max_rank = 8}, .checkpoint = true, .checkpoint_memory = PagedMemory(folder.path())}, qd::Cpu(2));
  for (const Index longest : {30, 20, 60}) {  // grows once, and keeps what it has in between
    CAPTURE(longest);
    const auto batch = test::random_batch(config.vocab, {longest, 40, 3}, 5, 7);
    std::vector<double> sums;
    for (Model* model : {&plain, &paged}) {
      for (const auto& p : model->parameters()) std::fill_n(p->gradient.data(), p->gradient.size(), 0.0f);
      sums.push_back(model->loss_and_gradient(batch, 0.5));
    }
    CHECK(sums[0] == sums[1]);
    const auto expected = plain.parameters(), found = paged.parameters();
    for (std::size_t i = 0; i < found.size(); ++i) CHECK(test::same_bits(found[i]->gradient.view(), expected[i]->gradient.view()));
    const auto stream = static_cast<std::size_t>(batch.tokens() * config.width) * sizeof(float);
    const auto pages = test::paged_pages();
    CHECK(pages.mapped >= static_cast<std::size_t>(config.layers + 1) * stream);
    CHECK(pages.resident == 0);
    CHECK(plain.activation_bytes() >= paged.activation_bytes() + static_cast<std::size_t>(config.layers + 1) * stream);
    for (Index layer = 0; layer <= config.layers; ++layer) CHECK(test::same_bits(paged.stream(layer), plain.stream(layer)));
    CHECK(plain.losses(batch) == paged.losses(batch));
  }
  CHECK(test::code_of([&] { Model(weights, {.checkpoint_memory = PagedMemory(folder.path())}); }) == qd::Errc::bad_argument);
  Model nowhere(weights, {.checkpoint = true, .checkpoint_memory = PagedMemory((folder / "none").native())});
  CHECK(test::code_of([&] { nowhere.loss_and_gradient(test::random_batch(config.vocab, {7}, 5), 1.0); }) == qd::Errc::open);
}

}  // namespace paged_test
