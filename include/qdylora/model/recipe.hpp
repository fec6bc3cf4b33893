// Recipes: how one run spends its steps on ranks.
//
//   qlora            every step at full rank (QLoRA, Dettmers et al. 2023): loses most of what it learned when cut
//   qlora-svd        the same, re-ordered by singular values at the end
//   qdylora          one random rank a step, scale alpha/b, all rows of the rank trained (QDyLoRA, Rajabzadeh et al. 2024)
//   qdylora-frozen   the same, only the rank's last row trained (DyLoRA's released code)
//   per-row          every sequence of a batch at a rank of its own, from the first step
//   order-then-nest  full rank first; then the adapter is re-ordered so that its first rows carry the most, and ranks are dealt out row by
//                    row, first rows learning faster at first
//   auto             measures at mid-run, on sequences held back from training, what low ranks lose when the adapter is re-ordered: where
//                    that is next to nothing it goes on as qlora-svd, else as order-then-nest, spending on each rank what its loss is worth
//
// What is drawn, and what is trained of it, can be changed one by one, by names behind a recipe's, such as qdylora+frozen+geometric:
//
//   frozen      only the last row of a rank is trained (qdylora+frozen is qdylora-frozen)
//   geometric   rank b is drawn with weight 0.85^(b - 1), as in DyLoRA's ablations (Valipour et al. 2022); else all alike
//   row, step   ranks are dealt out row by row of a batch, or drawn for whole steps
//   alpha/r, alpha/b, alpha/sqrt(b)   the scale: the same at every rank, or larger at small ones; the last is rsLoRA's (Kalajdzievski 2023),
//               qlora+alpha/sqrt(b) rsLoRA itself. qlora can have its scale changed too, but not what is drawn
//
// Re-ordering takes apart the product of A and B, which a bottleneck is not: its recipes are qdylora, qdylora-frozen, per-row and, for one
// width, qlora. For a bottleneck `auto` is per-row. Scales of AdapterMethod::alpha and the weights of AdapterMethod::full have no ranks: of
// them `auto` is qlora, and no other fits.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/nn/adapter_method.hpp>
#include <qdylora/nn/lora_adapter.hpp>
#include <qdylora/nn/ranks.hpp>
#include <qdylora/nn/reorder.hpp>

namespace qdylora {

struct Recipe {
  std::string name = "auto";
  ScalePolicy scale = ScalePolicy::constant;
  GradientRows gradient_rows = GradientRows::prefix;

  // The first phase, and the only one where order_at is 1.
  bool draw_ranks = false;  // ranks drawn from the first step on, as `granularity` says; else full rank
  SamplerOptions::Granularity granularity = SamplerOptions::Granularity::row;
  double geometric = 0.0;  // p of geometric_weights, 0: all ranks alike

  // The re-ordering and the second phase.
  double order_at = 1.0;    // share of the steps before it
  Reordering ordering = Reordering::gram;
  std::int64_t collect_steps = 20;  // moments for Reordering::gram come from the last steps before it
  double full_share = 0.25;         // of the rows stay at full rank where ranks are dealt out, in the first phase too
  double boost = 2.0;               // learning rate of all rows, falling to 1 at the end
  double head_boost = 12.0;         // of row i times max(1, head_boost * (i + 1)^-head_power), falling likewise
  double head_power = 2.0;
  std::int64_t rewarm_steps = 10;
  bool gates = false;               // a trained factor for every row at every rank
  bool measure = false;             // auto: whether there is a second phase, and its full_share, weights and boost, follow the measured gaps

  bool order_at_end = false;        // qlora-svd; auto does it where it has no second phase

  /// Whether rows are re-ordered by singular values at any time.
  bool reorders() const noexcept { return order_at_end || (order_at > 0.0 && order_at < 1.0); }
  /// What the first `rows` rows multiply the learning rate with in the second phase; strength falls to 0 as it goes on.
  std::vector<float> row_rates(Index rows, double strength) const {
    std::vector<float> rates;
    for (Index i = 0; i < rows; ++i) {
      const double head = std::max(1.0, head_boost * std::pow(static_cast<double>(i + 1), -head_power));
      rates.push_back(static_cast<float>(1.0 + strength * (boost * head - 1.0)));
    }
    return rates;
  }
};

/// The adapter options a recipe wants for a model.
inline LoRAOptions adapter_options(const Recipe& recipe, const RankSet& ranks, float alpha, std::uint64_t seed) {
  LoRAOptions options{.max_rank = ranks.max(), .alpha = alpha, .scale = recipe.scale, .gradient_rows = recipe.gradient_rows, .seed = seed};
  if (recipe.gates) options.gated_ranks.assign(ranks.begin(), ranks.end());
  return options;
}

/// DyLoRA's p.
inline constexpr double dylora_geometric = 0.15;

inline constexpr std::array<std::string_view, 7> recipe_names = {"auto",    "order-then-nest", "qdylora",  "qdylora-frozen",
                                                                 "per-row", "qlora",           "qlora-svd"};

namespace detail {

/// One part of a recipe that draws ranks from the first step on; the scale of one that never re-orders, since a product that is re-ordered
/// has its prefixes at one scale. Throws Errc::bad_argument if there is no such change, or none that the recipe can have or does not have
/// already.
inline void change(Recipe& r, std::string_view what) {
  using Granularity = SamplerOptions::Granularity;
  const bool of_scale = what.starts_with("alpha/");
  QDYLORA_EXPECTS(
      r.draw_ranks || (of_scale && !r.reorders()), bad_argument,
      "the recipe " + r.name + (of_scale ? " re-orders, which takes one scale" : " draws no ranks at first") + "; '+" + printable(what) +
          "' goes with qdylora, qdylora-frozen" + (of_scale ? ", per-row and qlora" : " and per-row"));
  const auto set = [&](auto& part, const auto& value) {
    QDYLORA_EXPECTS(part != value, bad_argument, "the recipe " + r.name + " is as '+" + printable(what) + "' would have it");
    part = value;
  };
  if (what == "frozen") set(r.gradient_rows, GradientRows::last_row);
  else if (what == "geometric") set(r.geometric, dylora_geometric);
  else if (what == "row") set(r.granularity, Granularity::row);
  else if (what == "step") set(r.granularity, Granularity::step);
  else if (what == "alpha/r") set(r.scale, ScalePolicy::constant);
  else if (what == "alpha/b") set(r.scale, ScalePolicy::over_rank);
  else if (what == "alpha/sqrt(b)") set(r.scale, ScalePolicy::over_sqrt_rank);
  else
    throw Error(Errc::bad_argument, "no change '+" + printable(what) +
                                        "' of a recipe; there are frozen, geometric, row, step, alpha/r, alpha/b and alpha/sqrt(b)");
  r.name += "+" + std::string(what);
}

}  // namespace detail

/// Of a name, and changes behind it. Throws Errc::bad_argument listing what there is if there is no such recipe or change.
inline Recipe recipe(std::string_view name) {
  if (const auto plus = name.rfind('+'); plus != name.npos) {
    Recipe r = recipe(name.substr(0, plus));
    detail::change(r, name.substr(plus + 1));
    return r;
  }
  Recipe r;
  r.name = std::string(name);
  if (name == "auto") {
    r.order_at = 0.5;
    r.measure = true;
  } else if (name == "order-then-nest") {
    r.order_at = 0.5;
  } else if (name == "qdylora" || name == "qdylora-frozen") {
    r.scale = ScalePolicy::over_rank;
    r.draw_ranks = true;
    r.granularity = SamplerOptions::Granularity::step;
    r.full_share = 0.0;
    if (name == "qdylora-frozen") r.gradient_rows = GradientRows::last_row;
  } else if (name == "per-row") {
    r.draw_ranks = true;
  } else if (name == "qlora-svd") {
    r.order_at_end = true;
    r.ordering = Reordering::svd;
  } else if (name != "qlora") {
    std::string known;
    for (const auto n : recipe_names) known += (known.empty() ? "" : ", ") + std::string(n);
    throw Error(Errc::bad_argument, "no recipe '" + printable(name) + "'; there are " + known);
  }
  return r;
}

/// Throws Errc::unsupported, naming method and recipes, for a recipe that re-orders what the method cannot have re-ordered, or deals out
/// ranks where there are none.
inline void expect_fits(const Recipe& recipe, AdapterMethod method) {
  QDYLORA_EXPECTS(has_ranks(method) || !(recipe.reorders() || recipe.draw_ranks || recipe.gates), unsupported,
                  "the recipe " + recipe.name + " is for ranks, of which " + std::string(name(method)) + " has none; auto fits");
  QDYLORA_EXPECTS(method == AdapterMethod::lora || !recipe.reorders(), unsupported,
                  "the recipe " + recipe.name + " re-orders by singular values, and the units of " + std::string(name(method)) +
                      " have none; recipes that fit are qdylora, qdylora-frozen, per-row and qlora");
}

/// The recipe of a name for a method: a bottleneck's `auto` is per-row, that of alpha and full qlora. Errors of recipe and expect_fits.
inline Recipe recipe(std::string_view name, AdapterMethod method) {
  const bool own = name == "auto" && method != AdapterMethod::lora;
  Recipe r = recipe(!own ? name : has_ranks(method) ? std::string_view("per-row") : std::string_view("qlora"));
  expect_fits(r, method);
  return r;
}

/// Rows to hold back from a run of `rows` training rows: measuring them costs about a thirtieth of the run, a forward pass being a third of
/// a training row.
constexpr Index held_back_rows(Index rows, Index ranks) noexcept {
  return std::clamp<Index>(rows / 10 / (ranks + 1), 4, 32);
}

/// The share of rows, and its division among the ranks below the largest, that `auto` spends on low ranks.
struct NestedShare {
  double share = 0.0;           // of all rows; 0: ordering alone is enough
  double strength = 0.0;        // 0 ... 1, scales the learning-rate boost
  std::vector<double> weights;  // one a rank of the set, 0 for the largest; sum 1 unless share is 0
};

inline constexpr double largest_nested_share = 0.5;
inline constexpr double largest_gap_left_to_ordering = 0.09;

/// losses: mean loss at every rank of the set; base: without adapter. The gap of a rank is measured in units of what full rank gains over
/// the base. Mean gaps up to largest_gap_left_to_ordering get no rows; a quarter of the gain or more gets the largest share, what lies between
/// in proportion to the square root of the gap, and so do the ranks among each other.
inline NestedShare nested_share(const std::vector<double>& losses, double base) {
  NestedShare result;
  const std::size_t ranks = losses.size();
  result.weights.assign(ranks, 0.0);
  const double gain = base - losses.back();
  if (ranks < 2 || !(gain > 0.0)) return result;
  std::vector<double> roots(ranks);
  double gaps = 0.0, sum = 0.0;
  for (std::size_t i = 0; i + 1 < ranks; ++i) {
    const double gap = std::max(0.0, losses[i] - losses.back());
    gaps += gap;
    sum += roots[i] = std::sqrt(gap);
  }
  const double gap = gaps / static_cast<double>(ranks - 1) / gain;
  if (gap <= largest_gap_left_to_ordering) return result;
  result.strength = std::min(1.0, std::sqrt(gap / 0.25));
  result.share = largest_nested_share * result.strength;
  for (double& root : roots) root /= sum;
  result.weights = std::move(roots);
  return result;
}

}  // namespace qdylora
