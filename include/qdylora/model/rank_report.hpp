// What an adapter is worth at each of its ranks, from held-out examples that all ranks were scored on: differences with intervals, the area
// under the curve of quality over rank, and the smallest rank that is nearly as good as the best.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include <qdylora/core/error.hpp>
#include <qdylora/core/random.hpp>

namespace qdylora {

/// A number and the interval that holds it with the confidence asked for.
struct Interval {
  double value = 0.0, low = 0.0, high = 0.0;
  bool holds(double x) const noexcept { return low <= x && x <= high; }
};

struct BootstrapOptions {
  double confidence = 0.95;
  Index resamples = 4000;
  std::uint64_t seed = 0;
};

/// A statistic of n examples and its interval: percentiles of the same over resamples of the examples (Efron & Tibshirani 1993, section
/// 13.3; Koehn 2004). statistic(example): of the n examples that example(0) ... example(n - 1) are the numbers of; it may ask again for
/// others. What examples share cancels in the difference of two systems, so its interval is far narrower than that of either.
/// Errors: bad_argument (no examples, confidence not within (0, 1), no resamples).
template <class Statistic>
Interval bootstrap(std::size_t n, const BootstrapOptions& options, Statistic&& statistic) {
  QDYLORA_EXPECTS(n > 0, bad_argument, "bootstrap: there are no examples");
  QDYLORA_EXPECTS(options.confidence > 0.0 && options.confidence < 1.0 && options.resamples > 0, bad_argument,
                  "bootstrap: expected a confidence within (0, 1) and resamples, found " + std::to_string(options.confidence) + " and " +
                      std::to_string(options.resamples));
  Rng rng(options.seed, Purpose::sample);
  std::vector<double> found(static_cast<std::size_t>(options.resamples));
  for (double& x : found) x = statistic([&](std::size_t) { return static_cast<std::size_t>(rng.below(static_cast<std::uint32_t>(n))); });
  std::sort(found.begin(), found.end());
  const auto percentile = [&](double p) {
    const auto last = static_cast<double>(found.size() - 1);
    return found[static_cast<std::size_t>(std::lround(p * last))];
  };
  const double tail = (1.0 - options.confidence) / 2.0;
  return {statistic([](std::size_t k) { return k; }), percentile(tail), percentile(1.0 - tail)};
}

/// sum_i w_i (a_i - b_i) / sum_i w_i over examples i that both were scored on, and its interval by the paired bootstrap. a, b: a score of
/// each example, such as its loss a token; weights: how much of the whole each example is, such as its scored tokens; empty: all alike.
/// Errors: bad_argument (sizes that differ, no examples, no weight or a negative one, and those of bootstrap), non_finite.
inline Interval paired_difference(std::span<const double> a, std::span<const double> b, std::span<const double> weights = {},
                                  const BootstrapOptions& options = {}) {
  const auto n = a.size();
  QDYLORA_EXPECTS(n > 0 && b.size() == n && (weights.empty() || weights.size() == n), bad_argument,
                  "paired_difference: expected scores and weights of the same examples, found " + std::to_string(n) + ", " +
                      std::to_string(b.size()) + " and " + std::to_string(weights.size()));
  const auto weight = [&](std::size_t i) { return weights.empty() ? 1.0 : weights[i]; };
  double all = 0.0;
  for (std::size_t i = 0; i < n; ++i) {
    QDYLORA_EXPECTS(std::isfinite(a[i]) && std::isfinite(b[i]) && std::isfinite(weight(i)), non_finite,
                    "paired_difference: scores or weight of example " + std::to_string(i) + " are not finite");
    QDYLORA_EXPECTS(weight(i) >= 0.0, bad_argument, "paired_difference: the weight of example " + std::to_string(i) + " is negative");
    all += weight(i);
  }
  QDYLORA_EXPECTS(all > 0.0, bad_argument, "paired_difference: the examples have no weight");
  return bootstrap(n, options, [&](auto&& example) {
    for (;;) {
      double sum = 0.0, whole = 0.0;
      for (std::size_t k = 0; k < n; ++k) {
        const std::size_t i = example(k);
        sum += weight(i) * (a[i] - b[i]);
        whole += weight(i);
      }
      if (whole > 0.0) return sum / whole;  // else examples without weight alone were drawn: again
    }
  });
}

/// The share of examples that were right, and its interval of 95 % confidence by Wilson's score (1927), which stays within [0, 1] and has a
/// width at shares of 0 and 1 too. Errors: bad_argument (no examples, or more right ones than examples).
inline Interval accuracy_interval(Index right, Index examples) {
  QDYLORA_EXPECTS(examples > 0 && right >= 0 && right <= examples, bad_argument,
                  "accuracy_interval: expected right ones of some examples, found " + std::to_string(right) + " of " +
                      std::to_string(examples));
  constexpr double z = 1.959963984540054;  // the normal distribution has 95 % within -z ... z
  const auto n = static_cast<double>(examples), share = static_cast<double>(right) / n;
  const double center = (share + z * z / (2.0 * n)) / (1.0 + z * z / n);
  const double half = z / (1.0 + z * z / n) * std::sqrt(share * (1.0 - share) / n + z * z / (4.0 * n * n));
  return {share, right == 0 ? 0.0 : center - half, right == examples ? 1.0 : center + half};
}

enum class RankScale { linear, log2 };

/// The mean of a quality over ranks, as the trapezoids under the curve have it, over rank or over its logarithm. ranks: ascending, >= 1; one
/// rank alone has its own value. Errors: bad_argument.
inline double area_under_ranks(std::span<const Index> ranks, std::span<const double> values, RankScale scale) {
  QDYLORA_EXPECTS(!ranks.empty() && ranks.size() == values.size(), bad_argument,
                  "area_under_ranks: expected a value of every rank, found " + std::to_string(ranks.size()) + " ranks and " +
                      std::to_string(values.size()) + " values");
  const auto at = [&](std::size_t i) {
    const auto rank = static_cast<double>(ranks[i]);
    return scale == RankScale::linear ? rank : std::log2(rank);
  };
  double area = 0.0;
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    QDYLORA_EXPECTS(ranks[i] >= 1 && (i == 0 || ranks[i] > ranks[i - 1]), bad_argument,
                    "area_under_ranks: expected ascending ranks from 1, found " + std::to_string(ranks[i]));
    if (i > 0) area += (at(i) - at(i - 1)) * (values[i] + values[i - 1]) / 2.0;
  }
  return ranks.size() == 1 ? values[0] : area / (at(ranks.size() - 1) - at(0));
}

/// The smallest rank that keeps a share of what the best rank gains over the base: loss <= base - share * (base - best). ranks: ascending.
/// 0, the base itself, where no rank gains. Errors: bad_argument.
inline Index smallest_rank_keeping(double share, double base_loss, std::span<const Index> ranks, std::span<const double> losses) {
  QDYLORA_EXPECTS(!ranks.empty() && ranks.size() == losses.size(), bad_argument,
                  "smallest_rank_keeping: expected a loss of every rank, found " + std::to_string(ranks.size()) + " ranks and " +
                      std::to_string(losses.size()) + " losses");
  QDYLORA_EXPECTS(share > 0.0 && share <= 1.0, bad_argument,
                  "smallest_rank_keeping: expected a share within (0, 1], found " + std::to_string(share));
  const double best = *std::min_element(losses.begin(), losses.end());
  if (!(best < base_loss)) return 0;
  for (std::size_t i = 0; i < ranks.size(); ++i)
    if (losses[i] <= base_loss - share * (base_loss - best)) return ranks[i];
  return ranks.back();
}

}  // namespace qdylora
