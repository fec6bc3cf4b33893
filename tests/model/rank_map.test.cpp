// Rank maps: the energy that cuts take, the best map of a sum of layers, the search against a loss, and models that run with a map.
#include <qdylora/model/rank_map.hpp>

#include <cmath>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/random_data.hpp"
#include "support/tiny_model.hpp"

namespace rank_map_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using test::code_of;

namespace {

const std::vector<Index> ranks = {0, 1, 2, 4, 8};

Index parameters(std::span<const Index> map, std::span<const Index> costs) {
  return std::inner_product(map.begin(), map.end(), costs.begin(), Index{0});
}

// f of every map within a budget, of `n` layers.
template <class F>
void for_each_map(std::span<const Index> costs, Index budget, F&& f) {
  std::vector<std::size_t> at(costs.size());
  std::vector<Index> map(costs.size());
  for (;;) {
    for (std::size_t l = 0; l < at.size(); ++l) map[l] = ranks[at[l]];
    if (parameters(map, costs) <= budget) f(std::span<const Index>(map));
    std::size_t l = 0;
    while (l < at.size() && ++at[l] == ranks.size()) at[l++] = 0;
    if (l == at.size()) return;
  }
}

// Layers whose adapters are singular triplets: sigma_li^2 is the energy of row i, and w_l times what is cut the loss.
struct Separable {
  std::vector<Index> costs = {30, 20, 50, 20, 40};
  std::vector<double> weights = {1.0, 0.2, 3.0, 0.0, 0.7};
  double decay = 0.6;

  double tail(std::size_t l, Index b) const {  // of 8 values that fall by decay, faster from layer to layer
    const double q = std::pow(decay, 1.0 + 0.5 * static_cast<double>(l));
    return (std::pow(q, static_cast<double>(b)) - std::pow(q, 8.0)) / (1.0 - std::pow(q, 8.0));
  }
  double loss(std::span<const Index> map) const {
    double sum = 2.0;
    for (std::size_t l = 0; l < map.size(); ++l) sum += weights[l] * tail(l, map[l]);
    return sum;
  }
  std::vector<std::vector<double>> cut() const {
    std::vector<std::vector<double>> all;
    for (std::size_t l = 0; l < costs.size(); ++l) {
      all.emplace_back();
      for (const Index b : ranks) all.back().push_back(tail(l, b));
    }
    return all;
  }
};

}  // namespace

TEST_CASE("the energy that a cut takes is that of the difference of the products, whatever the scale and gates") {
  for (const auto policy : {qd::ScalePolicy::constant, qd::ScalePolicy::over_rank, qd::ScalePolicy::over_sqrt_rank}) {
    qd::DynamicLoRALinear<float, qd::Cpu, qd::Dense<float>> layer(
        qd::Matrix<float>(7, 9), {.max_rank = 8, .alpha = 3.0f, .scale = policy, .gated_ranks = {2, 8}});
    auto& adapter = layer.adapter();
    const std::vector<double> none = {0, 0, 0, 0, 0};
    CHECK(qd::cut_energy(adapter, ranks) == none);  // B is zero
    qd::Rng rng(3);
    test::fill_normal(adapter.b().value.view(), rng);
    test::fill_normal(adapter.gates().value.view(), rng);
    const auto energy = qd::cut_energy(adapter, ranks);
    const auto whole = layer.merged_weight(8);
    double size = 0.0;
    for (const float x : whole.span()) size += static_cast<double>(x) * static_cast<double>(x);
    for (std::size_t k = 0; k < ranks.size(); ++k) {
      const auto part = layer.merged_weight(ranks[k]);
      double difference = 0.0;
      for (Index i = 0; i < whole.size(); ++i)
        difference += std::pow(static_cast<double>(whole.data()[i]) - static_cast<double>(part.data()[i]), 2);
      CAPTURE(ranks[k]);
      CHECK(energy[k] == Approx(difference / size).margin(1e-6));
    }
    CHECK(code_of([&] { qd::cut_energy(adapter, std::vector<Index>{9}); }) == Errc::rank_range);
  }
}

TEST_CASE("the best map of a sum is that of all maps within the budget") {
  const std::vector<Index> costs = {30, 20, 50, 20, 70};
  qd::Rng rng(1);
  for (int trial = 0; trial < 40; ++trial) {
    std::vector<qd::RankMapLayer> layers;
    for (const Index cost : costs) {
      layers.push_back({cost, {}});
      for (std::size_t k = 0; k < ranks.size(); ++k) layers.back().increase.push_back(static_cast<double>(rng.normal()));  // no order
    }
    const auto budget = static_cast<Index>(rng.below(1600));
    const auto sum = [&](std::span<const Index> map) {
      double total = 0.0;
      for (std::size_t l = 0; l < map.size(); ++l)
        total += layers[l].increase[static_cast<std::size_t>(std::ranges::find(ranks, map[l]) - ranks.begin())];
      return total;
    };
    double least = std::numeric_limits<double>::infinity();
    for_each_map(costs, budget, [&](std::span<const Index> map) { least = std::min(least, sum(map)); });
    std::vector<Index> found;
    for (const auto k : qd::best_rank_map(layers, ranks, budget)) found.push_back(ranks[k]);
    CAPTURE(trial, budget);
    CHECK(parameters(found, costs) <= budget);
    CHECK(sum(found) == Approx(least).margin(1e-12));
  }
}

TEST_CASE("a budget of more parts than are looked at is kept to all the same") {
  const std::vector<qd::RankMapLayer> layers = {{1'000'003, {3, 2, 1, 0.5, 0}}, {999'983, {5, 1, 0.9, 0.8, 0.7}}};
  const std::vector<Index> costs = {1'000'003, 999'983};
  for (const Index budget : {Index{0}, Index{1'000'000}, Index{3'100'000}, Index{20'000'000}}) {
    std::vector<Index> found;
    for (const auto k : qd::best_rank_map(layers, ranks, budget)) found.push_back(ranks[k]);
    CHECK(parameters(found, costs) <= budget);
    if (budget == 3'100'000) CHECK(found == std::vector<Index>{2, 1});
    if (budget == 20'000'000) CHECK(found == std::vector<Index>{8, 8});
  }
}

TEST_CASE("where a loss is a sum over layers by the energy they keep, the search finds the best map of all") {
  const Separable s;
  const auto cut = s.cut();
  for (const Index budget : {Index{0}, Index{50}, Index{160}, Index{330}, Index{640}, Index{1000}, Index{1280}}) {
    CAPTURE(budget);
    int calls = 0;
    const auto map = qd::rank_map(s.costs, cut, ranks, budget, [&](std::span<const Index> m) {
      ++calls;
      return s.loss(m);
    });
    double least = std::numeric_limits<double>::infinity();
    for_each_map(s.costs, budget, [&](std::span<const Index> m) { least = std::min(least, s.loss(m)); });
    CHECK(map.loss == Approx(least).epsilon(1e-12));
    CHECK(map.loss == s.loss(map.ranks));
    CHECK(map.parameters == parameters(map.ranks, s.costs));
    CHECK(map.parameters <= budget);
    CHECK(map.loss <= map.uniform_loss);
    CHECK(calls <= 12);
    if (budget == 330) {
      CHECK(map.uniform_rank == 2);
      CHECK(map.ranks[3] == 0);  // is worth nothing
      CHECK(map.worth[2] == Approx(3.0));
      CHECK(map.worth[3] == 0.0);
    }
  }
}

TEST_CASE("where a loss is no such sum, one rank everywhere is kept unless the map is better") {
  const Separable s;
  // Layers that differ in rank disturb each other.
  const auto map = qd::rank_map(s.costs, s.cut(), ranks, 330, [&](std::span<const Index> m) {
    std::size_t changed = 0;
    for (const Index rank : m) changed += rank != 2;
    return s.loss(m) + (changed > 1 ? 10.0 : 0.0);
  });
  CHECK(map.ranks == std::vector<Index>(5, 2));
  CHECK(map.loss == map.uniform_loss);
}

TEST_CASE("what no map can be made of is refused") {
  const Separable s;
  const auto cut = s.cut();
  const auto loss = [&](std::span<const Index> m) { return s.loss(m); };
  CHECK(code_of([&] { qd::rank_map(s.costs, cut, std::vector<Index>{1, 2}, 330, loss); }) == Errc::bad_argument);
  CHECK(code_of([&] { qd::rank_map(s.costs, std::span(cut).first(4), ranks, 330, loss); }) == Errc::bad_argument);
  CHECK(code_of([&] { qd::rank_map(s.costs, cut, ranks, 330, [](auto) { return std::nan(""); }); }) == Errc::non_finite);
  CHECK(code_of([&] { qd::rank_map(s.costs, cut, ranks, -1, loss); }) == Errc::bad_argument);
  const std::vector<qd::RankMapLayer> layers = {{10, {1, 0}}};
  CHECK(code_of([&] { qd::best_rank_map(layers, std::vector<Index>{2, 1}, 100); }) == Errc::bad_argument);
  CHECK(code_of([&] { qd::best_rank_map(layers, std::vector<Index>{1, 2}, 9); }) == Errc::bad_argument);
  CHECK(code_of([&] { qd::best_rank_map(layers, ranks, 100); }) == Errc::bad_argument);
}

TEST_CASE("a model runs each layer at its limit: as an adapter whose rows beyond are zero") {
  const auto weights = test::tiny_weights<float>(test::tiny_config());
  qd::Decoder<float> limited(weights, {.lora = {.max_rank = 8}}), zeroed(weights, {.lora = {.max_rank = 8}});
  for (auto* model : {&limited, &zeroed}) test::randomize_adapters(*model);
  Index at = 0;
  limited.for_each_linear([&](auto& layer) { layer.limit_rank(ranks[static_cast<std::size_t>(at++ % 5)]); });
  at = 0;
  zeroed.for_each_linear([&](auto& layer) {
    auto& b = layer.adapter().b().value;
    for (Index i = ranks[static_cast<std::size_t>(at++ % 5)]; i < 8; ++i)
      for (Index o = 0; o < b.cols(); ++o) b(i, o) = 0.0f;
  });
  const auto batch = test::random_batch(weights->config.vocab, {9, 5, 7}, 1);
  for (const auto& plan : {qd::RankPlan::uniform(8), qd::RankPlan::uniform(2), qd::RankPlan::per_row(std::vector<Index>{4, 0, 8})}) {
    limited.set_ranks(plan);
    zeroed.set_ranks(plan);
    const auto a = limited.losses(batch), b = zeroed.losses(batch);
    REQUIRE(a.size() == b.size());
    for (std::size_t i = 0; i < a.size(); ++i) CHECK(a[i] == Approx(b[i]).epsilon(1e-5));
  }
  CHECK(code_of([&] { limited.for_each_linear([](auto& layer) { layer.limit_rank(9); }); }) == Errc::rank_range);
  // Gradients reach no row beyond a limit.
  limited.set_ranks(qd::RankPlan::uniform(8));
  test::zero_gradients(limited);
  limited.loss_and_gradient(batch, 1.0);
  at = 0;
  limited.for_each_linear([&](auto& layer) {
    const Index limit = ranks[static_cast<std::size_t>(at++ % 5)];
    CHECK(layer.rank_limit() == limit);
    for (Index i = 0; i < 8; ++i) CHECK(layer.adapter().b().touched[static_cast<std::size_t>(i)] == (i < limit));
  });
}

}  // namespace rank_map_test
