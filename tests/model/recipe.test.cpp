// Recipes: what they are called, what they do to the ranks, and that each of them learns.
#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/model/trainer.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/tiny_model.hpp"

namespace recipe_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using test::error_of;
using Model = qd::Decoder<float>;
using Trainer = qd::Trainer<float>;

namespace {

const qd::RankSet ranks{1, 2, 4, 8};

qd::TrainerOptions options_of(const qd::Recipe& recipe, std::int64_t steps) {
  qd::TrainerOptions options;
  options.recipe = recipe;
  options.ranks = ranks;
  options.steps = steps;
  options.lr = 1e-2;
  options.warmup_steps = 2;
  options.seed = 3;
  return options;
}

Model make_model(const qd::Recipe& recipe) {
  auto config = test::tiny_config();
  config.width = 32;
  return Model(test::tiny_weights<float>(config, false, {}), {.lora = qd::adapter_options(recipe, ranks, 8.0f, 1)}, qd::Cpu(1));
}

qd::Batch batch_of(std::uint64_t step) { return test::counting_batch(17, 8, 16, 100 + step); }
qd::Batch held_back() { return test::counting_batch(17, 16, 16, 7); }

qd::Recipe with_short_window(std::string_view name) {
  auto recipe = qd::recipe(name);
  recipe.collect_steps = 5;
  recipe.rewarm_steps = 3;
  return recipe;
}

}  // namespace

TEST_CASE("recipes are found by their names, and an unknown name is answered with all of them") {
  CHECK(qd::recipe_names.size() == 7);
  for (const auto name : qd::recipe_names) CHECK(qd::recipe(name).name == name);
  for (const char* name : {"", "Auto", "qlora ", "order_then_nest"}) {
    const auto error = error_of([&] { qd::recipe(name); });
    REQUIRE(error);
    CHECK(error->code() == Errc::bad_argument);
    for (const auto known : qd::recipe_names) CHECK(std::string(error->what()).find(known) != std::string::npos);
  }
}

TEST_CASE("recipes are what their papers say") {
  using Granularity = qd::SamplerOptions::Granularity;
  const auto qlora = qd::recipe("qlora"), svd = qd::recipe("qlora-svd");
  const auto qdylora = qd::recipe("qdylora"), frozen = qd::recipe("qdylora-frozen"), per_row = qd::recipe("per-row");
  const auto nest = qd::recipe("order-then-nest"), automatic = qd::recipe("auto");
  for (const auto* recipe : {&qlora, &svd, &qdylora, &frozen, &per_row}) CHECK(recipe->order_at == 1.0);
  for (const auto* recipe : {&qlora, &svd, &nest, &automatic}) CHECK_FALSE(recipe->draw_ranks);
  for (const auto* recipe : {&qlora, &svd, &per_row, &nest, &automatic}) CHECK(recipe->scale == qd::ScalePolicy::constant);
  CHECK(svd.order_at_end);
  CHECK(svd.ordering == qd::Reordering::svd);
  CHECK_FALSE(qlora.order_at_end);
  for (const auto* recipe : {&qdylora, &frozen}) {
    CHECK(recipe->draw_ranks);
    CHECK(recipe->granularity == Granularity::step);
    CHECK(recipe->scale == qd::ScalePolicy::over_rank);
  }
  CHECK(qdylora.gradient_rows == qd::GradientRows::prefix);
  CHECK(frozen.gradient_rows == qd::GradientRows::last_row);
  CHECK(per_row.draw_ranks);
  CHECK(per_row.granularity == Granularity::row);
  CHECK(per_row.full_share == 0.25);
  for (const auto* recipe : {&nest, &automatic}) {
    CHECK(recipe->order_at == 0.5);
    CHECK(recipe->ordering == qd::Reordering::gram);
    CHECK(recipe->collect_steps == 20);
  }
  CHECK(nest.full_share == 0.25);
  CHECK(nest.boost == 2.0);
  CHECK(nest.head_boost == 12.0);
  CHECK(nest.head_power == 2.0);
  CHECK(automatic.measure);
  CHECK_FALSE(nest.measure);
}

TEST_CASE("a recipe that draws ranks can be changed part by part, by names behind its own") {
  using Granularity = qd::SamplerOptions::Granularity;
  CHECK(qd::recipe("qdylora+frozen").gradient_rows == qd::GradientRows::last_row);
  CHECK(qd::recipe("qdylora+geometric").geometric == 0.15);
  CHECK(qd::recipe("qdylora+row").granularity == Granularity::row);
  CHECK(qd::recipe("qdylora+row").full_share == 0.0);
  CHECK(qd::recipe("per-row+step").granularity == Granularity::step);
  CHECK(qd::recipe("qdylora+alpha/r").scale == qd::ScalePolicy::constant);
  CHECK(qd::recipe("per-row+alpha/b").scale == qd::ScalePolicy::over_rank);
  for (const char* name : {"qdylora+alpha/sqrt(b)", "per-row+alpha/sqrt(b)", "qlora+alpha/sqrt(b)", "qdylora-frozen+row+alpha/sqrt(b)"}) {
    const auto rslora = qd::recipe(name);
    CHECK(rslora.name == name);
    CHECK(rslora.scale == qd::ScalePolicy::over_sqrt_rank);
    CHECK(qd::adapter_options(rslora, {1, 4}, 8.0f, 0).scale == qd::ScalePolicy::over_sqrt_rank);
  }
  CHECK_FALSE(qd::recipe("qlora+alpha/sqrt(b)").draw_ranks);
  const auto all = qd::recipe("qdylora+row+frozen+alpha/r+geometric");
  CHECK(all.name == "qdylora+row+frozen+alpha/r+geometric");
  CHECK(all.draw_ranks);
  CHECK(all.gradient_rows == qd::GradientRows::last_row);
  CHECK(all.geometric == 0.15);
  CHECK(all.granularity == Granularity::row);
  CHECK(all.scale == qd::ScalePolicy::constant);
  CHECK(qd::recipe("qdylora+geometric", qd::AdapterMethod::houlsby).geometric == 0.15);
}

TEST_CASE("changes that are none, or that a recipe cannot have, are refused by name") {
  const std::pair<const char*, const char*> cases[] = {
      {"qdylora+uniform", "there are frozen, geometric, row, step, alpha/r, alpha/b and alpha/sqrt(b)"},
      {"qdylora+", "no change '+'"},
      {"+frozen", "no recipe ''"},
      {"best+frozen", "order-then-nest"},
      {"auto+geometric", "auto draws no ranks at first"},
      {"order-then-nest+frozen", "goes with qdylora, qdylora-frozen and per-row"},
      {"qlora+row", "qlora draws no ranks"},
      {"qlora+alpha/r", "is as '+alpha/r'"},
      {"qlora+alpha/b+alpha/b", "qlora+alpha/b is as"},
      {"qlora+alpha/sqrt(r)", "no change '+alpha/sqrt(r)'"},
      {"auto+alpha/sqrt(b)", "auto re-orders, which takes one scale; '+alpha/sqrt(b)' goes with qdylora, qdylora-frozen, per-row and qlora"},
      {"qlora-svd+alpha/b", "qlora-svd re-orders"},
      {"order-then-nest+alpha/sqrt(b)", "order-then-nest re-orders"},
      {"qdylora+step", "qdylora is as '+step' would have it"},
      {"qdylora-frozen+frozen", "is as '+frozen'"},
      {"qdylora+geometric+geometric", "qdylora+geometric is as"},
      {"per-row+alpha/r", "is as '+alpha/r'"},
  };
  for (const auto& [name, says] : cases) {
    const auto error = error_of([&] { qd::recipe(name); });
    CAPTURE(name);
    REQUIRE(error);
    CHECK(error->code() == Errc::bad_argument);
    CAPTURE(error->what());
    CHECK(std::string(error->what()).find(says) != std::string::npos);
  }
}

TEST_CASE("ranks are drawn as a changed recipe says") {
  const auto counts = [](const char* name, std::int64_t steps) {
    const auto recipe = qd::recipe(name);
    auto model = make_model(recipe);
    Trainer trainer(model, options_of(recipe, steps));
    const auto one = test::counting_batch(17, 1, 4, 1);  // of one sequence, whose rank is the step's
    std::map<Index, double> count;
    while (!trainer.done()) ++count[trainer.step(one).rank];
    return count;
  };
  // Dealt out: exact shares, the same for all; of which per-row leaves a quarter at full rank; drawn geometrically: 1, 0.85, 0.85^3, 0.85^7.
  for (const auto& [rank, n] : counts("qdylora+row", 40)) CHECK(std::fabs(n - 10.0) < 1.5);
  CHECK(std::fabs(counts("per-row", 40)[8] - 17.5) < 1.5);
  const double sum = 1.0 + 0.85 + std::pow(0.85, 3) + std::pow(0.85, 7);
  auto dealt = counts("qdylora+row+geometric", 200), drawn = counts("qdylora+geometric", 400);
  for (const Index rank : ranks) {
    const double share = std::pow(0.85, static_cast<double>(rank - 1)) / sum;
    CAPTURE(rank, share, dealt[rank], drawn[rank]);
    CHECK(std::fabs(dealt[rank] - 200.0 * share) < 1.5);
    CHECK(std::fabs(drawn[rank] - 400.0 * share) < 4.0 * std::sqrt(400.0 * share * (1.0 - share)));
  }
}

TEST_CASE("qdylora+frozen is qdylora-frozen to the bit") {
  std::vector<std::vector<double>> losses;
  for (const char* name : {"qdylora+frozen", "qdylora-frozen", "qdylora"}) {
    const auto recipe = qd::recipe(name);
    auto model = make_model(recipe);
    Trainer trainer(model, options_of(recipe, 12));
    while (!trainer.done()) trainer.step(batch_of(static_cast<std::uint64_t>(trainer.step_count())));
    losses.push_back(trainer.losses_by_rank(held_back()));
  }
  CHECK(losses[0] == losses[1]);
  CHECK(losses[0] != losses[2]);
}

TEST_CASE("qlora+alpha/sqrt(b) trains as rsLoRA: as by alpha/r with an alpha of sqrt(r) times as much, to the bit") {
  const qd::RankSet few{1, 4};
  std::vector<std::vector<double>> trained, ranked;
  for (const auto& [name, alpha] : {std::pair("qlora+alpha/sqrt(b)", 6.0f), std::pair("qlora", 12.0f), std::pair("qlora", 6.0f)}) {
    const auto recipe = qd::recipe(name);
    qd::Decoder<float> model(test::tiny_weights<float>(test::tiny_config()), {.lora = qd::adapter_options(recipe, few, alpha, 3)});
    auto options = options_of(recipe, 8);
    options.ranks = few;
    Trainer trainer(model, options);
    trained.emplace_back();
    while (!trainer.done()) trained.back().push_back(trainer.step(batch_of(static_cast<std::uint64_t>(trainer.step_count()))).loss);
    ranked.push_back(trainer.losses_by_rank(held_back()));
  }
  CHECK(trained[0] == trained[1]);
  CHECK(trained[0] != trained[2]);
  CHECK(ranked[0][1] == ranked[1][1]);
  CHECK(ranked[0][0] != ranked[1][0]);  // of rank 1, whose scale is alpha itself
}

TEST_CASE("adapters are made as the recipe wants them") {
  const auto qdylora = qd::adapter_options(qd::recipe("qdylora-frozen"), ranks, 4.0f, 9);
  CHECK(qdylora.max_rank == 8);
  CHECK(qdylora.alpha == 4.0f);
  CHECK(qdylora.seed == 9);
  CHECK(qdylora.scale == qd::ScalePolicy::over_rank);
  CHECK(qdylora.gradient_rows == qd::GradientRows::last_row);
  CHECK(qdylora.gated_ranks.empty());
  auto gated = qd::recipe("order-then-nest");
  gated.gates = true;
  CHECK(qd::adapter_options(gated, ranks, 4.0f, 9).gated_ranks == std::vector<Index>{1, 2, 4, 8});
}

TEST_CASE("the nested share grows with the square root of the mean gap, up to half of the rows") {
  // Full rank gains 2 over the base; the gaps of ranks 1, 2 and 4 are 0.48, 0.32 and 0.16 of 2: 16 % on average.
  const auto share = qd::nested_share({1.48, 1.32, 1.16, 1.0}, 3.0);
  CHECK(share.strength == Approx(0.8));
  CHECK(share.share == Approx(0.4));
  REQUIRE(share.weights.size() == 4);
  const double roots = std::sqrt(3.0) + std::sqrt(2.0) + 1.0;
  CHECK(share.weights[0] == Approx(std::sqrt(3.0) / roots));
  CHECK(share.weights[1] == Approx(std::sqrt(2.0) / roots));
  CHECK(share.weights[2] == Approx(1.0 / roots));
  CHECK(share.weights[3] == 0.0);

  const auto quarter = qd::nested_share({1.5, 1.5, 1.0}, 3.0), more = qd::nested_share({2.9, 2.9, 1.0}, 3.0);
  for (const auto& s : {quarter, more}) {
    CHECK(s.strength == Approx(1.0));
    CHECK(s.share == Approx(0.5));
    CHECK(s.weights[0] == Approx(0.5));
  }
}

TEST_CASE("a rank that loses nothing gets no rows, and none does where the mean gap is small") {
  const auto some = qd::nested_share({1.4, 0.9, 1.0}, 3.0);  // rank 2 is better than full rank
  CHECK(some.weights[1] == 0.0);
  CHECK(some.weights[0] == Approx(1.0));
  CHECK(some.strength == Approx(std::sqrt(0.1 / 0.25)));
  for (const auto& none :
       {qd::nested_share({1.0, 1.0, 1.0}, 3.0), qd::nested_share({0.9, 0.8, 1.0}, 3.0), qd::nested_share({1.5, 1.2, 1.0}, 1.0),
        qd::nested_share({1.5, 1.2, 1.0}, 0.5), qd::nested_share({1.0}, 3.0), qd::nested_share({1.5, 1.2, 1.0}, std::nan("")),
        qd::nested_share({1.5, 1.2, std::nan("")}, 3.0), qd::nested_share({1.2, 1.1, 1.0}, 3.0)}) {
    CHECK(none.share == 0.0);
    CHECK(none.strength == 0.0);
    CHECK(none.weights == std::vector<double>(none.weights.size(), 0.0));
  }
}

TEST_CASE("every recipe lowers the loss at full rank, and the nested ones at every rank") {
  for (const auto name : qd::recipe_names) {
    CAPTURE(std::string(name));
    const auto recipe = with_short_window(name);
    auto model = make_model(recipe);
    Trainer trainer(model, options_of(recipe, 30));
    trainer.hold_back(held_back());
    double first = 0.0, last = 0.0;
    while (!trainer.done()) {
      const auto step = static_cast<std::uint64_t>(trainer.step_count());
      const auto report = trainer.step(batch_of(step));
      CHECK_FALSE(report.skipped);
      CHECK(report.tokens == 8 * 15);
      CHECK(report.gradient_norm > 0.0);
      if (step < 3) first += report.loss / 3.0;
      if (step >= 27) last += report.loss / 3.0;
    }
    CHECK(last < 0.9 * first);
    CHECK(trainer.skipped_steps() == 0);
    const auto losses = trainer.losses_by_rank(held_back());
    REQUIRE(losses.size() == 5);
    const double base = losses.back();
    CHECK(losses[3] < 0.9 * base);
    if (name == "qlora") continue;  // useless when cut
    for (std::size_t i = 0; i < 3; ++i) {
      CAPTURE(i, losses[i], base);
      CHECK(losses[i] < base);
    }
  }
}

TEST_CASE("fixed-rank recipes stay at full rank, and the published one draws every rank for whole steps") {
  for (const char* name : {"qlora", "qlora-svd", "qdylora", "per-row", "order-then-nest"}) {
    CAPTURE(name);
    const auto recipe = with_short_window(name);
    auto model = make_model(recipe);
    Trainer trainer(model, options_of(recipe, 40));
    std::map<Index, int> largest;
    const auto one = test::counting_batch(17, 1, 16, 1);  // of one sequence, whose rank is the step's
    while (!trainer.done()) {
      const bool first_half = trainer.step_count() < 20;
      const Index rank = trainer.step(one).rank;
      CHECK(ranks.contains(rank));
      if (std::string(name) == "order-then-nest" && first_half) CHECK(rank == 8);
      else ++largest[rank];
    }
    if (std::string(name).starts_with("qlora")) {
      CHECK(largest == std::map<Index, int>{{8, 40}});
    } else {
      CHECK(largest.size() == 4);
    }
  }
}

TEST_CASE("re-ordering in the middle of a run leaves the loss at full rank as it was and lowers that of the cuts") {
  for (const auto ordering : {qd::Reordering::gram, qd::Reordering::svd}) {
    auto recipe = with_short_window("order-then-nest");
    recipe.ordering = ordering;
    recipe.full_share = 1.0;  // so that the step after it reports the loss at full rank, before its update,
    recipe.rewarm_steps = 1'000'000'000;  // which is too small to matter
    auto model = make_model(recipe);
    Trainer trainer(model, options_of(recipe, 24));
    while (trainer.step_count() < 12) trainer.step(batch_of(static_cast<std::uint64_t>(trainer.step_count())));
    const auto next = batch_of(99);
    const auto before = trainer.losses_by_rank(next);
    model.set_ranks(qd::RankPlan::uniform(8));
    const auto report = trainer.step(next);
    CHECK(report.rank == 8);
    CHECK(report.loss == Approx(before[3]).margin(1e-4));
    CHECK(report.loss < 0.9 * before[4]);
    const auto after = trainer.losses_by_rank(next);
    for (std::size_t i = 0; i < 3; ++i) CHECK(after[i] < before[i]);
    CHECK(after[3] == Approx(before[3]).margin(1e-4));
    model.for_each_linear([](const auto& linear) {
      const auto norm = [](const qd::Matrix<float>& m, Index row) {
        double squares = 0.0;
        for (Index j = 0; j < m.cols(); ++j) squares += static_cast<double>(m(row, j)) * static_cast<double>(m(row, j));
        return std::sqrt(squares);
      };
      for (Index i = 0; i < 8; ++i)
        CHECK(norm(linear.adapter().a().value, i) == Approx(norm(linear.adapter().b().value, i)).epsilon(1e-3));
    });
  }
}

TEST_CASE("re-ordering moves what an adapter knows to its first rows and keeps its logits at full rank") {
  for (const auto ordering : {qd::Reordering::gram, qd::Reordering::svd}) {
    const auto recipe = qd::recipe("qlora");
    auto model = make_model(recipe);
    Trainer trainer(model, options_of(recipe, 30));
    while (!trainer.done()) trainer.step(batch_of(static_cast<std::uint64_t>(trainer.step_count())));
    if (ordering == qd::Reordering::gram) {
      model.for_each_linear([](auto& linear) { linear.adapter().start_collecting(); });
      for (std::uint64_t i = 0; i < 4; ++i) model.loss_and_gradient(batch_of(i), 1.0);
    }
    const auto batch = held_back();
    const auto before = trainer.losses_by_rank(batch);
    model.set_ranks(qd::RankPlan::uniform(8));
    const auto logits = model.logits(batch);
    model.for_each_linear([&](auto& linear) {
      const auto sigma = qd::reorder(linear.adapter(), ordering);
      linear.adapter().stop_collecting();
      CHECK(std::is_sorted(sigma.rbegin(), sigma.rend()));
    });
    const auto after = trainer.losses_by_rank(batch);
    model.set_ranks(qd::RankPlan::uniform(8));
    const auto reordered = model.logits(batch);
    float largest = 0.0f, scale = 0.0f;
    for (std::size_t i = 0; i < logits.span().size(); ++i) {
      largest = std::max(largest, std::fabs(logits.span()[i] - reordered.span()[i]));
      scale = std::max(scale, std::fabs(logits.span()[i]));
    }
    CHECK(largest <= 1e-4f * scale);
    CHECK(after[3] == Approx(before[3]).margin(1e-4));
    CHECK(after[0] < before[0]);
    CHECK(after[4] == before[4]);
  }
}

TEST_CASE("qlora-svd is qlora but for the re-ordering at its end, which makes its cuts better") {
  std::map<std::string, std::vector<double>> losses;
  for (const char* name : {"qlora", "qlora-svd"}) {
    const auto recipe = qd::recipe(name);
    auto model = make_model(recipe);
    Trainer trainer(model, options_of(recipe, 30));
    while (!trainer.done()) {
      const auto report = trainer.step(batch_of(static_cast<std::uint64_t>(trainer.step_count())));
      losses[std::string(name) + " steps"].push_back(report.loss);
    }
    CHECK(trainer.reordered_at_end() == (recipe.name == "qlora-svd"));
    losses[name] = trainer.losses_by_rank(held_back());
  }
  CHECK(losses["qlora steps"] == losses["qlora-svd steps"]);
  CHECK(losses["qlora"][3] == Approx(losses["qlora-svd"][3]).margin(1e-4));
  CHECK(losses["qlora"][4] == losses["qlora-svd"][4]);
  for (std::size_t i = 0; i < 3; ++i) CHECK(losses["qlora-svd"][i] < losses["qlora"][i]);
}

TEST_CASE("auto measures what each rank loses after the re-ordering and deals out rows accordingly") {
  auto recipe = with_short_window("auto");
  recipe.rewarm_steps = 1'000'000'000;  // the second phase barely moves the weights, so that its measurement can be repeated
  auto model = make_model(recipe);
  constexpr std::int64_t steps = 400;
  auto options = options_of(recipe, steps);
  options.lr = 1e-2;
  Trainer trainer(model, options);
  trainer.hold_back(held_back());
  const auto one = test::counting_batch(17, 1, 16, 1);
  while (trainer.step_count() < steps / 2) {
    CHECK(trainer.nested().weights.empty());
    CHECK(trainer.step(trainer.step_count() < 30 ? batch_of(static_cast<std::uint64_t>(trainer.step_count())) : one).rank == 8);
  }
  std::map<Index, double> counts;
  ++counts[trainer.step(one).rank];
  auto losses = trainer.losses_by_rank(held_back());
  const double base = losses.back();
  losses.pop_back();
  const auto expected = qd::nested_share(losses, base);
  const auto found = trainer.nested();
  REQUIRE(expected.share > 0.0);
  CHECK(found.share == Approx(expected.share).epsilon(1e-3));
  CHECK(found.strength == Approx(expected.strength).epsilon(1e-3));
  for (std::size_t i = 0; i < 4; ++i) CHECK(found.weights[i] == Approx(expected.weights[i]).epsilon(1e-3).margin(1e-6));

  while (!trainer.done()) ++counts[trainer.step(one).rank];
  const double rows = steps / 2;
  for (std::size_t i = 0; i < 4; ++i) {
    const double share = i == 3 ? 1.0 - found.share : found.share * found.weights[i];
    CAPTURE(i, share);
    CHECK(std::fabs(counts[ranks[static_cast<Index>(i)]] - share * rows) <= 2.0);
  }
}

TEST_CASE("auto without sequences held back spends on low ranks what order-then-nest does") {
  const auto run = [](const char* name) {
    const auto recipe = with_short_window(name);
    auto model = make_model(recipe);
    Trainer trainer(model, options_of(recipe, 20));
    while (!trainer.done()) trainer.step(batch_of(static_cast<std::uint64_t>(trainer.step_count())));
    CHECK(trainer.nested().weights.empty());
    CHECK_FALSE(trainer.reordered_at_end());
    return trainer.losses_by_rank(held_back());
  };
  CHECK(run("auto") == run("order-then-nest"));
}

TEST_CASE("auto trains as qlora-svd where ordering alone loses next to nothing, and re-orders at its end there alone") {
  const auto recipe = with_short_window("auto");
  std::set<bool> seen;
  for (const double lr : {1e-5, 1e-3, 1e-2, 3e-2}) {
    const auto run = [&](const qd::Recipe& how, std::vector<double>& losses) {
      auto options = options_of(how, 30);
      options.lr = lr;
      auto model = make_model(how);
      Trainer trainer(model, options);
      trainer.hold_back(held_back());
      while (!trainer.done()) losses.push_back(trainer.step(batch_of(static_cast<std::uint64_t>(trainer.step_count()))).loss);
      for (const double loss : trainer.losses_by_rank(held_back())) losses.push_back(loss);
      return std::pair(trainer.nested().share, trainer.reordered_at_end());
    };
    std::vector<double> losses, svd_losses;
    const auto [share, reordered] = run(recipe, losses);
    CHECK(run(qd::recipe("qlora-svd"), svd_losses).second);
    CAPTURE(lr, share);
    CHECK(reordered == (share == 0.0));
    CHECK((losses == svd_losses) == reordered);
    seen.insert(reordered);
  }
  CHECK(seen.size() == 2);
}

TEST_CASE("a step whose gradient is not finite leaves no trace in the moments that re-order") {
  const auto recipe = with_short_window("order-then-nest");
  auto model = make_model(recipe);
  Trainer trainer(model, options_of(recipe, 20));
  while (trainer.step_count() < 8) trainer.step(batch_of(static_cast<std::uint64_t>(trainer.step_count())));
  // One adapter's weight is infinite for a step: losses, gradients and moments are not finite.
  auto& weight = model.parameters().front()->value(0, 0);
  const auto kept = std::exchange(weight, std::numeric_limits<std::remove_reference_t<decltype(weight)>>::infinity());
  CHECK(trainer.step(batch_of(8)).skipped);
  weight = kept;
  while (!trainer.done()) CHECK_FALSE(trainer.step(batch_of(static_cast<std::uint64_t>(trainer.step_count()))).skipped);
}

TEST_CASE("a batch that a model cannot run changes nothing, even where the re-ordering is due") {
  const auto recipe = with_short_window("order-then-nest");
  auto model = make_model(recipe), other = make_model(recipe);
  Trainer trainer(model, options_of(recipe, 20)), untouched(other, options_of(recipe, 20));
  const auto advance = [](Trainer& t, std::int64_t to) {
    while (t.step_count() < to) t.step(batch_of(static_cast<std::uint64_t>(t.step_count())));
  };
  advance(trainer, 10);
  auto bad = batch_of(1);
  bad.ids.front() = 100000;
  CHECK_THROWS_AS(trainer.step(bad), qd::Error);
  advance(trainer, 20);
  advance(untouched, 20);
  CHECK(trainer.losses_by_rank(held_back()) == untouched.losses_by_rank(held_back()));
}

TEST_CASE("the gates of a recipe with gates move, in the second phase only") {
  auto recipe = with_short_window("order-then-nest");
  recipe.gates = true;
  auto model = make_model(recipe);
  Trainer trainer(model, options_of(recipe, 20));
  const auto gates_moved = [&] {
    bool moved = false;
    model.for_each_linear([&](auto& linear) {
      for (const float g : linear.adapter().gates().value.span()) moved = moved || g != 1.0f;
    });
    return moved;
  };
  while (trainer.step_count() < 10) trainer.step(batch_of(static_cast<std::uint64_t>(trainer.step_count())));
  CHECK_FALSE(gates_moved());
  while (!trainer.done()) trainer.step(batch_of(static_cast<std::uint64_t>(trainer.step_count())));
  CHECK(gates_moved());
}

}  // namespace recipe_test
