// Rank maps: a rank for each linear layer, so that a budget of parameters goes where it lowers the loss most. An adapter that was trained
// to be cut at any rank needs no further training for it.
//
// Near the map that has one rank u everywhere, a loss is taken to be a sum over layers l of what their ranks b_l change:
//   L(b) ~ L(u) + sum_l g_l(b_l),   g_l(b) = D_l (f_l(b) - f_l(u)) / (1 - f_l(u))   for b <= u
//                                   g_l(b) = U_l (f_l(b) - f_l(u)) / f_l(u)         for b >= u
// f_l(b) = |dW_l,r - dW_l,b|^2 / |dW_l,r|^2 is the energy that cutting to b takes away. What it is worth is measured: D_l, how much the loss
// rises when layer l has no adapter, and U_l, how much it falls when the layer has all of it, the others at u. That is two measurements a
// layer instead of one for each layer and rank. The best map of such a sum under the budget is then found exactly.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <limits>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include <qdylora/nn/lora_adapter.hpp>
#include <qdylora/nn/ranks.hpp>

namespace qdylora {

/// |dW_r - dW_b|^2 / |dW_r|^2 at each of `ranks`, for the product at the adapter's maximal rank r. All zero where dW_r is. Any scale and
/// gates. Errors: rank_range.
inline std::vector<double> cut_energy(const LoRAAdapter<float>& adapter, std::span<const Index> ranks) {
  const Index r = adapter.max_rank();
  const auto dot = [](const Matrix<float>& m, Index i, Index j) {
    return std::inner_product(m.view().row(i), m.view().row(i) + m.cols(), m.view().row(j), 0.0);
  };
  Matrix<double> gram(r, r);  // of the rank-one parts: |sum_i c_i B_i^T A_i|^2 = c^T G c
  for (Index i = 0; i < r; ++i)
    for (Index j = 0; j <= i; ++j)
      gram(i, j) = gram(j, i) = dot(adapter.a().value, i, j) * dot(adapter.b().value, i, j);
  const auto whole = adapter.coefficients(r, r);
  const auto energy = [&](const std::vector<float>& without) {
    double sum = 0.0;
    const auto c = [&](Index i) {
      const auto at = static_cast<std::size_t>(i);
      return static_cast<double>(whole[at]) - static_cast<double>(without[at]);
    };
    for (Index i = 0; i < r; ++i)
      for (Index j = 0; j < r; ++j) sum += c(i) * gram(i, j) * c(j);
    return sum;
  };
  const double all = energy(std::vector<float>(static_cast<std::size_t>(r)));
  std::vector<double> result;
  for (const Index rank : ranks) {
    adapter.check_rank(rank);
    result.push_back(all > 0.0 ? std::max(0.0, energy(adapter.coefficients(rank, r))) / all : 0.0);
  }
  return result;
}

/// A layer as a choice of its rank sees it.
struct RankMapLayer {
  Index cost = 0;                // parameters a rank, in + out
  std::vector<double> increase;  // of the loss at each candidate rank, from any zero
};

/// The map that minimizes the sum of `increase` among those of at most `budget` parameters: an index into `ranks`, which rise, for each
/// layer. Exact, by dynamic programming over the budget (a knapsack with a choice for each layer), where costs share a divisor that cuts
/// the budget into at most 65536 parts; else costs are rounded up to such parts. Errors: bad_argument, also where nothing fits the budget.
inline std::vector<std::size_t> best_rank_map(std::span<const RankMapLayer> layers, std::span<const Index> ranks, Index budget) {
  const bool rise = std::ranges::adjacent_find(ranks, std::greater_equal<>()) == ranks.end();
  QDYLORA_EXPECTS(!ranks.empty() && ranks.size() <= 256 && ranks.front() >= 0 && rise, bad_argument,
                  "best_rank_map: expected 1 ... 256 ranks that rise");
  Index unit = 0;
  for (const auto& layer : layers) {
    QDYLORA_EXPECTS(layer.cost >= 1 && layer.increase.size() == ranks.size(), bad_argument,
                    "best_rank_map: expected a cost and " + std::to_string(ranks.size()) + " increases of every layer, found " +
                        std::to_string(layer.cost) + " and " + std::to_string(layer.increase.size()));
    for (const Index rank : ranks) unit = std::gcd(unit, layer.cost * rank);
  }
  constexpr Index most_parts = 65536;
  unit = std::max({unit, Index{1}, (budget + most_parts - 1) / most_parts});
  const auto parts = static_cast<std::size_t>(std::max<Index>(budget, 0) / unit);
  constexpr double impossible = std::numeric_limits<double>::infinity();
  std::vector<double> best(parts + 1, 0.0), next(parts + 1);  // of the layers so far, in at most so many parts
  std::vector<std::vector<std::uint8_t>> choices;
  for (const auto& layer : layers) {
    auto& choice = choices.emplace_back(parts + 1);
    std::ranges::fill(next, impossible);
    for (std::size_t k = 0; k < ranks.size(); ++k) {
      const auto size = static_cast<std::size_t>((layer.cost * ranks[k] + unit - 1) / unit);
      for (std::size_t p = size; p <= parts; ++p)
        if (const double sum = best[p - size] + layer.increase[k]; sum < next[p]) {
          next[p] = sum;
          choice[p] = static_cast<std::uint8_t>(k);
        }
    }
    best.swap(next);
  }
  QDYLORA_EXPECTS(budget >= 0 && best[parts] < impossible, bad_argument,
                  "best_rank_map: a budget of " + std::to_string(budget) + " parameters is less than the lowest rank takes everywhere");
  std::vector<std::size_t> map(layers.size());
  for (std::size_t l = layers.size(), p = parts; l-- > 0;) {
    map[l] = choices[l][p];
    p -= static_cast<std::size_t>((layers[l].cost * ranks[map[l]] + unit - 1) / unit);
  }
  return map;
}

struct RankMap {
  std::vector<Index> ranks;  // of each layer
  Index parameters = 0;
  double loss = 0.0;
  Index uniform_rank = 0;     // the highest candidate that fits the budget everywhere
  double uniform_loss = 0.0;  // with it: never below `loss`
  std::vector<double> worth;  // of each layer: how much its adapter, from none to whole, lowers the loss with the others at uniform_rank
};

/// A map of at most `budget` parameters. costs: in + out of each layer; cut: cut_energy of each layer at the candidate ranks, which rise
/// from 0; loss(std::span<const Index>): of a map, a rank for each layer. Calls loss at most 2 * layers + 2 times. Where the map that it
/// arrives at is not better than one rank everywhere, that one stays. Errors: bad_argument, non_finite, and those of loss.
template <class Loss>
RankMap rank_map(std::span<const Index> costs, std::span<const std::vector<double>> cut, std::span<const Index> ranks, Index budget,
                 Loss&& loss) {
  const std::size_t n = costs.size();
  QDYLORA_EXPECTS(n > 0 && cut.size() == n && !ranks.empty() && ranks.front() == 0, bad_argument,
                  "rank_map: expected a cost and energies of every layer, and ranks from 0");
  const auto measured = [&](const std::vector<Index>& map) {
    const double value = loss(std::span<const Index>(map));
    QDYLORA_EXPECTS(std::isfinite(value), non_finite, "rank_map: the loss of a map is not finite");
    return value;
  };
  const auto parameters = [&](const std::vector<Index>& map) {
    return std::inner_product(map.begin(), map.end(), costs.begin(), Index{0});
  };
  RankMap result;
  std::size_t uniform = 0;
  while (uniform + 1 < ranks.size() && parameters(std::vector<Index>(n, ranks[uniform + 1])) <= budget) ++uniform;
  result.uniform_rank = ranks[uniform];
  result.ranks.assign(n, result.uniform_rank);
  result.loss = result.uniform_loss = measured(result.ranks);

  std::vector<RankMapLayer> layers;
  for (std::size_t l = 0; l < n; ++l) {
    QDYLORA_EXPECTS(cut[l].size() == ranks.size(), bad_argument,
                    "rank_map: expected the energies of layer " + std::to_string(l) + " at every rank");
    const double at_uniform = cut[l][uniform];
    // What a layer gains never counts below zero: noise alone says that an adapter harms.
    const auto change = [&](Index rank, double sign) {
      if (rank == result.uniform_rank) return 0.0;
      auto map = std::vector<Index>(n, result.uniform_rank);
      map[l] = rank;
      return std::max(0.0, sign * (measured(map) - result.uniform_loss));
    };
    const double down = at_uniform < 1.0 ? change(0, 1.0) : 0.0, up = at_uniform > 0.0 ? change(ranks.back(), -1.0) : 0.0;
    RankMapLayer layer{costs[l], {}};
    for (std::size_t k = 0; k < ranks.size(); ++k) {
      const double more = cut[l][k] - at_uniform;
      layer.increase.push_back(k < uniform ? (at_uniform < 1.0 ? down * more / (1.0 - at_uniform) : 0.0)
                                           : (at_uniform > 0.0 ? up * more / at_uniform : 0.0));
    }
    result.worth.push_back(down + up);
    layers.push_back(std::move(layer));
  }
  std::vector<Index> chosen;
  for (const std::size_t k : best_rank_map(layers, ranks, budget)) chosen.push_back(ranks[k]);
  if (const double value = measured(chosen); value < result.loss) {
    result.ranks = std::move(chosen);
    result.loss = value;
  }
  result.parameters = parameters(result.ranks);
  return result;
}

}  // namespace qdylora
