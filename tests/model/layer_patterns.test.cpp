// Layers with ranks and alphas of their own: against a model whose layers all have the largest rank and are limited to less.
#include <qdylora/model/decoder_options.hpp>

#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/io/peft.hpp>
#include <qdylora/model/decoder.hpp>
#include <qdylora/model/trainer.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/random_data.hpp"
#include "support/tiny_model.hpp"

namespace layer_patterns_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using test::code_of;
using Model = qd::Decoder<float>;

namespace {

constexpr Index most = 8;
constexpr float alpha = 4.0f;

qd::LayerPatterns patterns(const std::vector<std::pair<std::string, double>>& ranks,
                           const std::vector<std::pair<std::string, double>>& alphas = {}) {
  qd::LayerPatterns result;
  for (const auto& [pattern, rank] : ranks) result.rank.add(pattern, rank);
  for (const auto& [pattern, value] : alphas) result.alpha.add(pattern, value);
  return result;
}

// Of q_proj, of one down_proj, of what the expression stands for; alphas of others.
qd::LayerPatterns some() {
  return patterns({{"q_proj", 2}, {"model.layers.1.mlp.down_proj", 4}, {"(k|v)_proj", 1}}, {{"o_proj", 16}, {"q_proj", 2}});
}

qd::DecoderOptions options_of(qd::LayerPatterns layers, qd::ScalePolicy scale = qd::ScalePolicy::constant) {
  qd::DecoderOptions options{.lora = {.max_rank = most, .alpha = alpha, .scale = scale, .seed = 3}};
  options.patterns = std::move(layers);
  return options;
}

// A model of the same function and gradients whose layers all have `most` rows.
Model limited(const Model& model, qd::ScalePolicy scale) {
  Model result(model.weights(), options_of({}, scale));
  std::vector<const qd::LoRAAdapter<float>*> from;
  model.for_each_linear([&](const auto& linear) { from.push_back(&linear.adapter()); });
  std::size_t at = 0;
  result.for_each_linear([&](auto& linear) {
    const auto& own = *from[at++];
    const Index r = own.max_rank();
    auto& adapter = linear.adapter();
    qd::copy(own.a().value.view(), adapter.a().value.view().top_rows(r));
    qd::copy(own.b().value.view(), adapter.b().value.view().top_rows(r));
    const bool by_rows = scale == qd::ScalePolicy::constant;  // alpha / r is a layer's own
    adapter.options().alpha = own.options().alpha * (by_rows ? static_cast<float>(most) / static_cast<float>(r) : 1.0f);
    linear.limit_rank(r);
  });
  return result;
}

std::vector<qd::RankPlan> plans(Index sequences) {
  std::vector<qd::RankPlan> all;
  for (const Index rank : {0, 1, 2, 3, 5, 8}) all.push_back(qd::RankPlan::uniform(rank));
  std::vector<Index> mixed;
  for (Index s = 0; s < sequences; ++s) mixed.push_back(s * 3 % (most + 1));
  all.push_back(qd::RankPlan::per_row(mixed));
  return all;
}

}  // namespace

TEST_CASE("a layer has the rank and alpha of the pattern that its name ends in") {
  const auto config = test::tiny_config();
  Model model(test::tiny_weights<float>(config), options_of(some()));
  model.for_each_linear([&](auto& linear) {
    const auto& adapter = linear.adapter();
    const std::string& name = adapter.options().name;
    CAPTURE(name);
    const bool q = name.ends_with("q_proj"), kv = name.ends_with("k_proj") || name.ends_with("v_proj");
    const Index rank = q ? 2 : kv ? 1 : name == "model.layers.1.mlp.down_proj" ? 4 : most;
    CHECK(adapter.max_rank() == rank);
    const float own = q ? 2.0f : name.ends_with("o_proj") ? 16.0f : alpha;
    CHECK(adapter.options().alpha == own);
    CHECK(adapter.scale(1) == own / static_cast<float>(rank));
  });
  CHECK(qd::layer_ranks(model.options(), config).size() == static_cast<std::size_t>(config.layers) * 7);
  CHECK(code_of([&] { model.set_ranks(qd::RankPlan::uniform(most + 1)); }) == Errc::rank_range);
}

TEST_CASE("at a rank above its own a layer uses all its rows: losses and gradients are those of limited layers") {
  for (const auto scale : {qd::ScalePolicy::constant, qd::ScalePolicy::over_rank, qd::ScalePolicy::over_sqrt_rank}) {
    CAPTURE(std::string(qd::name(scale)));
    Model model(test::tiny_weights<float>(test::tiny_config()), options_of(some(), scale));
    test::randomize_adapters(model);
    auto reference = limited(model, scale);
    const auto batch = test::random_batch(model.config().vocab, {5, 9, 3, 7}, 6);
    for (const auto& plan : plans(batch.sequences())) {
      CAPTURE(plan.is_uniform(), plan.max_rank());
      for (auto* m : {&model, &reference}) {
        test::zero_gradients(*m);
        m->set_ranks(plan);
      }
      CHECK(model.losses(batch) == reference.losses(batch));
      CHECK(model.loss_and_gradient(batch, 0.1) == reference.loss_and_gradient(batch, 0.1));
      std::vector<qd::LoRAAdapter<float>*> found, expected;
      model.for_each_linear([&](auto& linear) { found.push_back(&linear.adapter()); });
      reference.for_each_linear([&](auto& linear) { expected.push_back(&linear.adapter()); });
      for (std::size_t l = 0; l < found.size(); ++l) {
        CAPTURE(found[l]->options().name);
        const auto own = found[l]->parameters(), other = expected[l]->parameters();
        for (std::size_t p = 0; p < own.size(); ++p) {
          const auto rows = std::as_const(other[p]->gradient).view().top_rows(found[l]->max_rank());
          CHECK(test::same_bits(std::as_const(own[p]->gradient).view(), rows));
        }
      }
    }
  }
}

TEST_CASE("layers with ranks of their own train by every recipe, and re-order row by row") {
  const qd::RankSet ranks{1, 3, most};
  for (const auto name : qd::recipe_names) {
    CAPTURE(std::string(name));
    auto recipe = qd::recipe(name);
    recipe.collect_steps = 3;
    auto options = options_of(some(), recipe.scale);
    options.lora = qd::adapter_options(recipe, ranks, alpha, 3);
    Model model(test::tiny_weights<float>(test::tiny_config()), options);
    qd::Trainer<float> trainer(model, {.recipe = recipe, .ranks = ranks, .steps = 24, .lr = 1e-2, .warmup_steps = 2, .b_lr_ratio = 2.0});
    trainer.hold_back(test::counting_batch(17, 4, 12, 900));
    const auto held_out = test::counting_batch(17, 8, 12, 901);
    while (!trainer.done()) {
      const auto report = trainer.step(test::counting_batch(17, 6, 12, 10 + static_cast<std::uint64_t>(trainer.step_count())));
      CHECK_FALSE(report.skipped);
    }
    const auto losses = trainer.losses_by_rank(held_out);
    CHECK(losses[2] < losses[3]);  // the largest rank is better than the base
    model.for_each_linear([&](auto& linear) {
      const auto& adapter = linear.adapter();
      for (const auto* parameter : {&adapter.a(), &adapter.b()})
        CHECK((parameter->row_lr.empty() || static_cast<Index>(parameter->row_lr.size()) == adapter.max_rank()));
    });
  }
}

TEST_CASE("an adapter whose layers have ranks of their own comes back from PEFT's folder at every rank") {
  const test::TemporaryFolder folder;
  for (const auto scale : {qd::ScalePolicy::constant, qd::ScalePolicy::over_rank}) {
    CAPTURE(std::string(qd::name(scale)));
    Model model(test::tiny_weights<float>(test::tiny_config()), options_of(some(), scale));
    test::randomize_adapters(model);
    std::vector<qd::NamedAdapter> named;
    model.for_each_linear([&](auto& linear) { named.push_back({linear.adapter().options().name, &linear.adapter()}); });
    qd::save_peft_adapter(folder / "a", named);
    const auto config = qd::read_json(folder / "a" / "adapter_config.json");
    CHECK(config.at("r") == most);
    CHECK(config.at("rank_pattern").at("^model\\.layers\\.1\\.mlp\\.down_proj") == 4);
    CHECK(config.at("rank_pattern").at("^model\\.layers\\.0\\.self_attn\\.k_proj") == 1);
    CHECK_FALSE(config.at("rank_pattern").contains("^model\\.layers\\.0\\.mlp\\.down_proj"));
    CHECK(config.at("alpha_pattern").at("^model\\.layers\\.0\\.self_attn\\.o_proj") == 16);

    const auto adapter = qd::load_peft_adapter(folder / "a");
    Model loaded(model.weights(), {.lora = qd::lora_options(adapter)});
    loaded.for_each_linear([&](auto& linear) {
      const auto* module = adapter.find(linear.adapter().options().name);
      REQUIRE(module != nullptr);
      qd::assign(*module, linear.adapter());
      linear.limit_rank(module->rank());
    });
    const auto batch = test::random_batch(model.config().vocab, {8, 6}, 2);
    for (const Index rank : {0, 1, 3, 8}) {
      CAPTURE(rank);
      for (auto* m : {&model, &loaded}) m->set_ranks(qd::RankPlan::uniform(rank));
      CHECK(model.losses(batch) == loaded.losses(batch));
    }
  }
}

TEST_CASE("patterns that a model cannot have are refused") {
  const auto weights = test::tiny_weights<float>(test::tiny_config());
  const auto made = [&](qd::DecoderOptions options) {
    return [&weights, options] { Model(weights, options); };
  };
  CHECK_FALSE(code_of(made(options_of({}))));
  CHECK(code_of(made(options_of(patterns({{"q_prog", 2}})))) == Errc::bad_argument);
  CHECK(code_of(made(options_of(patterns({{"proj", 2}})))) == Errc::bad_argument);  // no whole part of a name
  CHECK(code_of(made(options_of(patterns({}, {{"model.layers.2.mlp.down_proj", 2}})))) == Errc::bad_argument);
  for (const double rank : {0.0, 1.5, -1.0, 9.0}) {
    CAPTURE(rank);
    CHECK(code_of(made(options_of(patterns({{"q_proj", rank}})))) == Errc::rank_range);
  }
  CHECK(code_of(made(options_of(patterns({{".*", 4}})))) == Errc::rank_range);  // no layer has the largest
  CHECK(code_of(made(options_of(patterns({}, {{"q_proj", -1.0}})))) == Errc::bad_argument);
  CHECK(code_of(made(options_of(patterns({{"q_proj", 2}, {"self_attn.q_proj", 3}})))) == Errc::unsupported);
  CHECK(code_of([] { patterns({{"q_proj", 2}, {"q_proj", 2}}); }) == Errc::duplicate);
  auto gated = options_of(some());
  gated.lora.gated_ranks = {1, most};
  CHECK(code_of(made(gated)) == Errc::unsupported);
  auto bottlenecks = options_of(some());
  bottlenecks.method = qd::AdapterMethod::houlsby;
  CHECK(code_of(made(bottlenecks)) == Errc::unsupported);
}

}  // namespace layer_patterns_test
