// Bottlenecks in the decoder: gradients through the whole model, checkpointing, mixed widths, decoding, truncation, training and memory.
#include <algorithm>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/model/generate.hpp>
#include <qdylora/model/memory_plan.hpp>
#include <qdylora/model/trainer.hpp>
#include <qdylora/model/upload.hpp>

#include "support/catch.hpp"
#include "support/counted_memory.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/gradcheck.hpp"
#include "support/tiny_model.hpp"

namespace bottleneck_test {

namespace qd = qdylora;
using qd::AdapterMethod;
using qd::Errc;
using qd::Index;
using test::code_of;
using test::same_bits;
using test::sum_of;

namespace {

constexpr AdapterMethod methods[] = {AdapterMethod::houlsby, AdapterMethod::parallel};

template <class T>
qd::Decoder<T> make_model(const qd::DecoderConfig& config, AdapterMethod method, qd::LoRAOptions lora, bool checkpoint = false) {
  lora.alpha = 2.0f;
  qd::Decoder<T> model(test::tiny_weights<T>(config), {.lora = lora, .checkpoint = checkpoint, .method = method}, qd::Cpu(1));
  test::randomize_adapters(model);
  return model;
}

qd::RankPlan plan_of(const std::vector<Index>& ranks) {
  return ranks.size() == 1 ? qd::RankPlan::uniform(ranks[0]) : qd::RankPlan::per_row(ranks);
}

// One for all texts, or one for each of two.
const std::vector<std::vector<Index>> some_ranks = {{0}, {1}, {2}, {3}, {3, 1}, {0, 2}};

}  // namespace

TEST_CASE("gradients of bottlenecks through the whole decoder agree with central differences at every width") {
  for (const auto& config : test::tiny_configs())
    for (const auto method : methods)
      for (const float dropout : {0.0f, 0.3f}) {
        if (dropout > 0.0f && config.architecture == qd::Architecture::falcon) continue;
        const auto batch = test::random_batch(config.vocab, {8, 5}, 3, 2);
        constexpr double scale = 0.25;
        const qd::LoRAOptions lora{.max_rank = 3, .scale = qd::ScalePolicy::over_rank, .dropout = dropout, .seed = 5};
        auto model = make_model<double>(config, method, lora), checkpointed = make_model<double>(config, method, lora, true);
        for (const auto& ranks : some_ranks) {
          const Index largest = *std::max_element(ranks.begin(), ranks.end());
          CAPTURE(static_cast<int>(config.architecture), config.shared_norm, name(method), dropout, ranks);
          for (auto* m : {&model, &checkpointed}) {
            test::zero_gradients(*m);
            m->set_training(true, 9);
            m->set_ranks(plan_of(ranks));
          }
          const double sum = model.loss_and_gradient(batch, scale);
          CHECK(sum == Approx(sum_of(model.losses(batch))).epsilon(1e-12));
          for (const auto& p : model.parameters()) {
            const auto gradient = qd::clone(std::as_const(p->gradient).view());
            const auto report = test::check_gradient([&] { return scale * sum_of(model.losses(batch)); }, p->value.span(), gradient.span(),
                                                     {.epsilon = 1e-5, .absolute = 1e-9, .relative = 1e-6});
            CAPTURE(p->name, report.element, report.analytic, report.numeric, report.excess);
            CHECK(report.ok());
            for (Index i = 0; i < gradient.rows(); ++i) {
              const auto row = gradient.span().subspan(static_cast<std::size_t>(i * gradient.cols()), static_cast<std::size_t>(gradient.cols()));
              CHECK(std::all_of(row.begin(), row.end(), [](double g) { return g == 0.0; }) == (i >= largest));
            }
          }
          CHECK(checkpointed.loss_and_gradient(batch, scale) == sum);
          CHECK(test::gradients(checkpointed) == test::gradients(model));
        }
      }
}

TEST_CASE("bottlenecks stand where their method says, and at width 0 the model is its base") {
  for (const auto& config : test::tiny_configs()) {
    const auto weights = test::tiny_weights<double>(config);
    const auto batch = test::random_batch(config.vocab, {8, 5}, 3);
    qd::Decoder<double> base(weights, {.lora = {.max_rank = 3}});
    base.set_ranks(qd::RankPlan::uniform(0));
    const auto expected = base.logits(batch);
    for (const auto method : methods) {
      qd::Decoder<double> model(weights, {.lora = {.max_rank = 3, .seed = 1}, .method = method});
      std::vector<std::string> names;
      model.for_each_trained([&](const auto& layer) {
        names.push_back(layer.adapter().options().name);
        CHECK(layer.in() == config.width);
        CHECK(layer.out() == config.width);
      });
      const std::string first = config.block_name(0), second = config.block_name(1);
      if (method == AdapterMethod::houlsby)
        CHECK(names == std::vector<std::string>{first + "attention_adapter", first + "mlp_adapter", second + "attention_adapter",
                                                second + "mlp_adapter"});
      else CHECK(names == std::vector<std::string>{first + "mlp_adapter", second + "mlp_adapter"});
      CHECK(model.parameters().size() == 2 * names.size());
      model.for_each_linear([](const auto& linear) { CHECK(linear.adapter().max_rank() == 0); });
      CHECK(test::largest_difference(model.logits(batch).view(), expected.view()) == 0.0);  // B is zero
      test::randomize_adapters(model);
      CHECK(test::largest_difference(model.logits(batch).view(), expected.view()) > 0.01);
      model.set_ranks(qd::RankPlan::uniform(0));
      CHECK(same_bits(model.logits(batch).view(), expected.view()));
      CHECK(code_of([&] { model.set_ranks(qd::RankPlan::uniform(4)); }) == Errc::rank_range);
    }
  }
}

TEST_CASE("texts of mixed widths have the logits they have alone, and so has the model cut to a width") {
  for (const auto& config : test::tiny_configs())
    for (const auto method : methods) {
      CAPTURE(static_cast<int>(config.architecture), name(method));
      auto model = make_model<float>(config, method, {.max_rank = 8, .seed = 4});
      qd::Batch all;
      const std::vector<Index> ranks = {4, 0, 8, 1}, lengths = {9, 5, 20, 18};
      for (std::size_t s = 0; s < 4; ++s) all.add(test::random_ids(config.vocab, lengths[s] + 1, 30 + s), 0);
      model.set_ranks(qd::RankPlan::per_row(ranks));
      const auto mixed = model.logits(all);
      for (std::size_t s = 0; s < 4; ++s) {
        model.set_ranks(qd::RankPlan::uniform(ranks[s]));
        const auto uniform = model.logits(all);
        const Index first = all.offsets[s], count = all.offsets[s + 1] - first;
        CHECK(same_bits(mixed.view().middle_rows(first, count), uniform.view().middle_rows(first, count)));
        if (ranks[s] == 0) continue;
        qd::Decoder<float> cut(model.weights(),
                               {.lora = {.max_rank = ranks[s], .alpha = 2.0f * static_cast<float>(ranks[s]) / 8.0f}, .method = method},
                               qd::Cpu(1));
        const auto from = model.parameters(), to = cut.parameters();
        for (std::size_t i = 0; i < from.size(); ++i) qd::copy(std::as_const(from[i]->value).view().top_rows(ranks[s]), to[i]->value.view());
        CHECK(same_bits(cut.logits(all).view(), uniform.view()));
      }
    }
}

TEST_CASE("decoding over caches gives the logits of whole texts, with a width for each") {
  for (const auto& config : test::tiny_configs())
    for (const auto method : methods) {
      CAPTURE(static_cast<int>(config.architecture), name(method));
      auto model = make_model<double>(config, method, {.max_rank = 3});
      model.set_ranks(qd::RankPlan::per_row(std::vector<Index>{3, 1}));
      const auto a = test::random_ids(config.vocab, 9, 1), b = test::random_ids(config.vocab, 9, 2);
      qd::Batch whole;
      for (const auto* ids : {&a, &b}) {
        whole.ids.insert(whole.ids.end(), ids->begin(), ids->end());
        whole.offsets.push_back(static_cast<Index>(whole.ids.size()));
      }
      whole.targets.assign(whole.ids.size(), -1);
      const auto expected = model.logits(whole);
      std::vector<qd::Decoder<double>::Cache> caches;
      for (int s = 0; s < 2; ++s) caches.emplace_back(config, 9);
      for (std::size_t at = 0, step = 6; at < 9; at += step, step = 1) {
        qd::Batch next;
        for (const auto* ids : {&a, &b}) {
          next.ids.insert(next.ids.end(), ids->begin() + static_cast<std::ptrdiff_t>(at),
                          ids->begin() + static_cast<std::ptrdiff_t>(at + step));
          next.offsets.push_back(static_cast<Index>(next.ids.size()));
        }
        next.targets.assign(next.ids.size(), -1);
        const auto found = model.infer(next, caches);
        for (Index s = 0; s < 2; ++s)
          CHECK(test::largest_difference(found.view().middle_rows(s, 1),
                                         expected.view().middle_rows(9 * s + static_cast<Index>(at + step) - 1, 1)) < 1e-10);
      }
    }
}

TEST_CASE("recipes that re-order are refused for bottlenecks, and auto is per-row") {
  CHECK(qd::recipe("auto", AdapterMethod::lora).name == "auto");
  for (const auto method : methods) {
    CHECK(qd::recipe("auto", method).name == "per-row");
    for (const char* fits : {"qdylora", "qdylora-frozen", "per-row", "qlora"}) CHECK(qd::recipe(fits, method).name == fits);
    for (const char* reorders : {"order-then-nest", "qlora-svd"}) {
      const auto error = test::error_of([&] { qd::recipe(reorders, method); });
      REQUIRE(error);
      CHECK(error->code() == Errc::unsupported);
      for (const std::string& word : {std::string(reorders), std::string(name(method)), std::string("per-row")})
        CHECK(std::string(error->what()).find(word) != std::string::npos);
    }
    CHECK(code_of([&] { qd::recipe("best", method); }) == Errc::bad_argument);
    auto model = make_model<float>(test::tiny_config(), method, {.max_rank = 4});
    for (const auto name : qd::recipe_names) {
      const bool fits = name == "qdylora" || name == "qdylora-frozen" || name == "per-row" || name == "qlora";
      const auto code = code_of([&] { qd::Trainer<float>(model, {.recipe = qd::recipe(name), .ranks = qd::RankSet{1, 4}}); });
      CHECK(code == (fits ? std::nullopt : std::optional(Errc::unsupported)));
    }
  }
}

TEST_CASE("bottlenecks train by the recipes that fit, to the same bytes on any number of threads, with checkpointing, and resumed") {
  static const qd::RankSet widths{1, 3, 8};
  constexpr std::int64_t steps = 10;
  struct Run {
    qd::Decoder<float> model;
    qd::Trainer<float> trainer;
    Run(const qd::Recipe& recipe, AdapterMethod method, int threads, bool checkpoint)
        : model(test::tiny_weights<float>(test::tiny_config(), false, {}),
                [&] {
                  auto lora = qd::adapter_options(recipe, widths, 8.0f, 2);
                  lora.dropout = 0.1f;
                  return qd::DecoderOptions{.lora = lora, .checkpoint = checkpoint, .method = method};
                }(),
                qd::Cpu(threads)),
          trainer(model, {.recipe = recipe, .ranks = widths, .steps = steps, .lr = 1e-2, .warmup_steps = 2, .seed = 11}) {}
    Run(const Run&) = delete;  // the trainer refers to the model
    void run_to(std::int64_t end, std::vector<double>& losses) {
      while (trainer.step_count() < end)
        losses.push_back(trainer.step(test::counting_batch(17, 5, 16, 50 + static_cast<std::uint64_t>(trainer.step_count()))).loss);
    }
  };
  for (const auto method : methods)
    for (const char* recipe_name : {"auto", "qdylora", "qdylora-frozen", "qlora"}) {
      CAPTURE(name(method), recipe_name);
      const auto recipe = qd::recipe(recipe_name, method);
      Run whole(recipe, method, 1, false), other(recipe, method, 2, true), first(recipe, method, 1, false), second(recipe, method, 1, false);
      std::vector<double> losses, same, resumed;
      whole.run_to(steps, losses);
      other.run_to(steps, same);
      CHECK(same == losses);
      CHECK(test::values(other.model) == test::values(whole.model));
      first.run_to(4, resumed);
      const auto from = first.model.parameters(), to = second.model.parameters();
      for (std::size_t i = 0; i < from.size(); ++i) {
        qd::copy(std::as_const(from[i]->value).view(), to[i]->value.view());
        qd::copy(std::as_const(first.trainer.optimizer().states()[i].m).view(), second.trainer.optimizer().states()[i].m.view());
        qd::copy(std::as_const(first.trainer.optimizer().states()[i].v).view(), second.trainer.optimizer().states()[i].v.view());
        second.trainer.optimizer().states()[i].steps = first.trainer.optimizer().states()[i].steps;
      }
      second.trainer.optimizer().restore_counts(first.trainer.optimizer().step_count(), first.trainer.optimizer().skipped_steps());
      second.trainer.restore(first.trainer.state());
      second.run_to(steps, resumed);
      CHECK(resumed == losses);
      CHECK(test::values(second.model) == test::values(whole.model));
      // Every width has learned.
      const auto by_width = whole.trainer.losses_by_rank(test::counting_batch(17, 5, 16, 900));
      REQUIRE(by_width.size() == 4);
      for (std::size_t i = std::string(recipe_name) == "qlora" ? 2 : 0; i < 3; ++i) CHECK(by_width[i] < by_width[3]);
    }
}

TEST_CASE("initial values of low-rank adapters are refused beside bottlenecks") {
  const auto weights = test::tiny_weights<float>(test::tiny_config());
  auto block = std::make_shared<qd::BlockWeights<float>>(weights->config);
  block->linear = weights->blocks[0]->linear;
  block->initial[3] = {qd::clone(test::normal_matrix<float>(2, 16, 1).view()), qd::clone(test::normal_matrix<float>(2, 12, 2).view())};
  weights->blocks[0] = block;
  const auto error = test::error_of([&] { qd::Decoder<float>(weights, {.method = AdapterMethod::houlsby}); });
  REQUIRE(error);
  CHECK(error->code() == Errc::unsupported);
  CHECK(std::string(error->what()).find("self_attn.o_proj") != std::string::npos);
}

TEST_CASE("A memory plan of bottlenecks is what memory is asked for, byte by byte", "[memory_plan]") {
  for (const auto method : methods)
    for (const bool falcon : {false, true})
      for (const float dropout : {0.0f, 0.1f}) {
        auto config = test::small_config();
        config.architecture = falcon ? qd::Architecture::falcon : qd::Architecture::llama;
        config.layers = 3;  // in the middle one, all that blocks share is there, and dx is wanted
        const bool checkpoint = falcon;
        CAPTURE(name(method), falcon, dropout);
        const auto host_weights = test::tiny_weights<float>(config);
        const auto batch = test::random_batch(config.vocab, {21, 40, 3}, 5, 7);
        qd::MemoryOptions options;
        options.base.format = qd::BaseFormat::float32;
        options.max_rank = 48;
        options.dropout = dropout > 0.0f;
        options.checkpoint = checkpoint;
        options.tokens = batch.tokens();
        options.scored = batch.scored();
        options.longest = 39;
        options.device = true;
        const auto plan = qd::memory_plan<float>(config, options, method);
        const test::CountedDevice device;
        const auto weights = qd::upload(*host_weights, device);
        const auto live = [] { return test::counted_bytes().live; };
        std::size_t before = live();
        qd::Decoder<float, test::CountedDevice> model(
            weights, {.lora = {.max_rank = 48, .dropout = dropout}, .checkpoint = checkpoint, .method = method}, device);
        CHECK(live() - before == plan.adapters + plan.gradients);
        before = live();
        const qd::AdamW<float, test::CountedDevice> optimizer(model.parameters(), {}, device);
        CHECK(live() - before == plan.moments);
        model.set_training(true);
        before = live();
        test::counted_bytes().peak = before;
        model.loss_and_gradient(batch, 1.0);
        CHECK(test::counted_bytes().peak - before == plan.checkpoints + plan.activations + plan.workspace + plan.logits);
      }
}

}  // namespace bottleneck_test
