// What results say together: differences to one of them with intervals, and what each measure says over the ranks of an adapter.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <qdylora/io/json.hpp>
#include <qdylora/model/bleu_difference.hpp>
#include <qdylora/model/rank_report.hpp>

#include "evaluation.hpp"

namespace qdylora::examples {

/// Of the adapter's ranks, the one of the lowest loss, as the same examples have it that it is compared on: intervals do not know that it
/// was chosen.
inline const RankResult& best_rank(const std::vector<RankResult>& ranks) {
  return *std::min_element(ranks.begin() + 1, ranks.end(), [](const RankResult& a, const RankResult& b) { return a.loss < b.loss; });
}

/// What one result has above another, of the same examples in pairs: of losses, a scored token; of a task's 1 and 0, a share of the
/// examples. Where no example differs, the interval is 0 alone.
inline Interval paired_above(const RankResult& result, const RankResult& other, std::vector<double> RankResult::*scores) {
  const bool losses = scores == &RankResult::example_losses;
  return paired_difference(result.*scores, other.*scores, losses ? result.example_tokens : std::vector<double>{});
}

/// Of each result, above one of them; empty where these were not measured.
inline std::vector<Interval> paired_above(const std::vector<RankResult>& results, const RankResult& one,
                                          std::vector<double> RankResult::*scores) {
  std::vector<Interval> differences;
  if (!(one.*scores).empty())
    for (const auto& r : results) differences.push_back(paired_above(r, one, scores));
  return differences;
}

/// What a measure says over the ranks of an adapter together. Of a loss the lowest value is the best, of a task's score the highest.
struct RankCurve {
  std::string measure;                        // loss, exact_match, bleu or accuracy, as report.json names them
  std::size_t ranks = 0;                      // without the base
  Index best = 0;                             // the rank of the best value, of equals the smallest
  double area_linear = 0.0, area_log2 = 0.0;  // the mean of the measure over the ranks, and over their logarithms
  /// The smallest rank that keeps a share of what the best one gains over the base; 0 where none gains, nothing where it was not measured.
  std::optional<Index> enough;

  std::string text(double value) const {
    char line[32];
    if (measure == "loss") std::snprintf(line, sizeof line, "%.4f", value);
    else if (measure == "bleu") std::snprintf(line, sizeof line, "%.2f", value);
    else std::snprintf(line, sizeof line, "%.1f %%", 100.0 * value);
    return line;
  }
};

/// Of all that was measured, in any order of ranks; none where that was the base alone. keep: the share of RankCurve::enough.
/// Errors: those of smallest_rank_keeping.
inline std::vector<RankCurve> rank_curves(const std::vector<RankResult>& results, double keep) {
  std::vector<const RankResult*> sorted;
  for (const auto& r : results) sorted.push_back(&r);
  std::sort(sorted.begin(), sorted.end(), [](const RankResult* a, const RankResult* b) { return a->rank < b->rank; });
  const bool base = sorted.front()->rank == 0;
  if (base && sorted.size() == 1) return {};
  std::vector<RankCurve> curves;
  const auto add = [&](const char* measure, bool lower_is_better, auto&& value_of) {
    std::vector<Index> ranks;
    std::vector<double> values, losses;  // losses: lower is better
    for (const RankResult* r : sorted) {
      ranks.push_back(r->rank);
      values.push_back(value_of(*r));
      losses.push_back(lower_is_better ? values.back() : -values.back());
    }
    const auto own = [&](const auto& all) { return std::span(all).subspan(base ? 1 : 0); };
    const auto lowest = std::ranges::min_element(own(losses)) - own(losses).begin();
    curves.push_back({.measure = measure,
                      .ranks = own(ranks).size(),
                      .best = own(ranks)[static_cast<std::size_t>(lowest)],
                      .area_linear = area_under_ranks(own(ranks), own(values), RankScale::linear),
                      .area_log2 = area_under_ranks(own(ranks), own(values), RankScale::log2),
                      .enough = {}});
    if (base) curves.back().enough = smallest_rank_keeping(keep, losses.front(), own(ranks), own(losses));
  };
  const auto& first = results.front();
  if (!first.example_losses.empty()) add("loss", true, [](const RankResult& r) { return r.loss; });
  if (!first.matches.empty()) add("exact_match", false, [](const RankResult& r) { return accuracy(r.matches); });
  if (first.bleu) add("bleu", false, [](const RankResult& r) { return r.bleu->score; });
  if (!first.chosen_right.empty()) add("accuracy", false, [](const RankResult& r) { return accuracy(r.chosen_right); });
  return curves;
}

/// A line of each measure, where there is more than one rank.
inline void print_curves(const std::vector<RankCurve>& curves, double keep) {
  for (const auto& c : curves) {
    if (c.ranks < 2) continue;
    const char* name = c.measure == "exact_match" ? "exact match" : c.measure == "bleu" ? "BLEU" : c.measure.c_str();
    std::printf("  %s: mean over ranks %s, over log2 of ranks %s", name, c.text(c.area_linear).c_str(), c.text(c.area_log2).c_str());
    if (c.enough && *c.enough > 0)
      std::printf("; rank %lld keeps %g %% of what the best rank, %lld, gains", static_cast<long long>(*c.enough), 100.0 * keep,
                  static_cast<long long>(c.best));
    else if (c.enough) std::printf("; no rank gains over the base");
    std::printf("\n");
  }
}

/// What the results of a run say together, the base first and the ranks ascending.
struct RankSummary {
  double keep;                        // the share of RankCurve::enough
  Index best = 0;                     // the rank of the lowest loss
  std::vector<Interval> above_best;   // of each result's loss
  std::vector<Interval> match_gains;  // of each result's exact match, above the base; none where nothing was answered
  std::vector<RankCurve> curves;

  explicit RankSummary(const std::vector<RankResult>& results, double share = 0.99)
      : keep(share), match_gains(paired_above(results, results.front(), &RankResult::matches)), curves(rank_curves(results, share)) {
    const auto& lowest = best_rank(results);
    best = lowest.rank;
    above_best = paired_above(results, lowest, &RankResult::example_losses);
  }
};

/// What a run has above its rival at every rank, rank 0 first, on the same examples.
struct AboveRival {
  std::vector<Interval> loss, match;  // no match where nothing was answered

  AboveRival(const std::vector<RankResult>& ours, const std::vector<RankResult>& rival) {
    for (std::size_t i = 0; i < ours.size(); ++i) {
      loss.push_back(paired_above(ours[i], rival[i], &RankResult::example_losses));
      if (!ours[i].matches.empty()) match.push_back(paired_above(ours[i], rival[i], &RankResult::matches));
    }
  }
};

/// What each result of evaluate is above the first, the base unless that was not asked for; empty where it is the only one.
struct AboveFirst {
  std::vector<Interval> loss, match, bleu, choice;

  explicit AboveFirst(const std::vector<RankResult>& results) {
    if (results.size() < 2) return;
    loss = paired_above(results, results.front(), &RankResult::example_losses);
    match = paired_above(results, results.front(), &RankResult::matches);
    const auto& first = results.front().bleu_counts;
    for (const auto& r : results)
      if (!first.empty()) bleu.push_back(paired_bleu_difference({&r.bleu_counts, 1}, {&first, 1}));
    choice = paired_above(results, results.front(), &RankResult::chosen_right);
  }
};

inline Json to_json(const Interval& interval) { return {{"value", interval.value}, {"low", interval.low}, {"high", interval.high}}; }

/// By measure; and keep.
inline Json to_json(const std::vector<RankCurve>& curves, double keep) {
  Json over_ranks = Json::object();
  for (const auto& c : curves) {
    auto& json = over_ranks[c.measure] = {{"mean_over_rank", c.area_linear}, {"mean_over_log2_rank", c.area_log2}, {"best_rank", c.best}};
    if (c.enough) json["smallest_rank_keeping"] = *c.enough;
  }
  return {{"keep", keep}, {"over_ranks", over_ranks}};
}

/// What a rank costs.
inline Json cost_json(const RankResult& r) {
  return {{"parameters", r.parameters}, {"bytes", r.bytes()}, {"ms_per_token", 1e3 * r.token_seconds}};
}

}  // namespace qdylora::examples
