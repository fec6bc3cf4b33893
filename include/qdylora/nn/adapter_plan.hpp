// AdapterPlan: which of several adapters each row of a batch takes, and at which rank.
#pragma once

#include <map>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/nn/ranks.hpp>

namespace qdylora {

/// The adapters of one forward pass, by number from 0, and their ranks: one for all rows, or runs of rows with one each. (PEFT's
/// adapter_names; runs are Punica's segments.) Rows of rank 0 are the base's alone.
class AdapterPlan {
 public:
  struct Run {
    Index rows = 0;
    Index adapter = 0;
    Index rank = 0;
    bool operator==(const Run&) const = default;
  };
  /// The part of a batch that is one adapter's: its rows, ascending, and their ranks, in the plan that a batch of these alone would have.
  struct Share {
    Index adapter = 0;
    std::vector<Index> rows;
    RankPlan ranks;
  };

  AdapterPlan() = default;  // adapter 0, off
  static AdapterPlan uniform(Index adapter, Index rank) {
    AdapterPlan plan;
    plan.runs_ = {checked({any_rows, adapter, rank})};
    return plan;
  }
  /// adapters[i] is the adapter of row i. Errc::shape_mismatch where the ranks are for another number of rows.
  static AdapterPlan per_row(std::span<const Index> adapters, const RankPlan& ranks) {
    const auto rank_of = ranks.of_rows(static_cast<Index>(adapters.size()));
    std::vector<Run> runs;
    for (std::size_t i = 0; i < adapters.size(); ++i) append(runs, {1, adapters[i], rank_of[i]});
    return of_runs(std::move(runs));
  }
  /// Errc::bad_argument for an adapter or a number of rows below 0, rank_range for such a rank.
  static AdapterPlan of_runs(std::vector<Run> runs) {
    for (const Run& run : runs) {
      QDYLORA_EXPECTS(run.rows >= 0, bad_argument, "AdapterPlan: a run of " + std::to_string(run.rows) + " rows");
      checked(run);
    }
    if (runs.empty()) runs.push_back({});  // for no rows, not for any number
    AdapterPlan plan;
    plan.runs_ = std::move(runs);
    return plan;
  }

  std::span<const Run> runs() const noexcept { return runs_; }
  /// Rows the plan is made for; -1 if any number.
  Index rows() const noexcept {
    if (runs_.front().rows == any_rows) return any_rows;
    return std::accumulate(runs_.begin(), runs_.end(), Index{0}, [](Index sum, const Run& run) { return sum + run.rows; });
  }

  /// The shares of a batch of `rows` rows, by adapter, ascending; who has no rows has none. Throws Errc::shape_mismatch if the plan is for
  /// another number.
  std::vector<Share> shares(Index rows) const {
    QDYLORA_EXPECTS(this->rows() == any_rows || this->rows() == rows, shape_mismatch,
                    "AdapterPlan: made for " + std::to_string(this->rows()) + " rows, used on " + std::to_string(rows));
    std::map<Index, std::pair<std::vector<Index>, std::vector<Run>>> parts;
    Index row = 0;
    for (Run run : runs_) {
      if (run.rows == any_rows) run.rows = rows;
      if (run.rows == 0) continue;
      auto& [own, ranks] = parts[run.adapter];
      for (const Index end = row + run.rows; row < end; ++row) own.push_back(row);
      append(ranks, run);
    }
    std::vector<Share> shares;
    for (auto& [adapter, part] : parts) {
      const auto& runs = part.second;
      if (runs.size() == 1) {
        shares.push_back({adapter, std::move(part.first), RankPlan::uniform(runs.front().rank)});
        continue;
      }
      std::vector<RankPlan::Run> ranks;
      for (const Run& run : runs) ranks.push_back({run.rows, run.rank});
      shares.push_back({adapter, std::move(part.first), RankPlan::of_runs(std::move(ranks))});
    }
    return shares;
  }

  /// From sequences to tokens: sequence s has offsets[s + 1] - offsets[s] tokens. Throws as shares.
  AdapterPlan expand(std::span<const Index> offsets) const {
    if (rows() == any_rows) return *this;
    const Index sequences = static_cast<Index>(offsets.size()) - 1;
    QDYLORA_EXPECTS(rows() == sequences, shape_mismatch,
                    "AdapterPlan: made for " + std::to_string(rows()) + " rows, used on " + std::to_string(sequences) + " sequences");
    std::vector<Run> tokens;
    Index first = 0;
    for (const Run& run : runs_) {
      const auto begin = static_cast<std::size_t>(first), end = static_cast<std::size_t>(first + run.rows);
      append(tokens, {offsets[end] - offsets[begin], run.adapter, run.rank});
      first += run.rows;
    }
    return of_runs(std::move(tokens));
  }

 private:
  static constexpr Index any_rows = -1;

  static Run checked(Run run) {
    QDYLORA_EXPECTS(run.adapter >= 0, bad_argument, "AdapterPlan: adapter " + std::to_string(run.adapter) + " is negative");
    QDYLORA_EXPECTS(run.rank >= 0, rank_range, "AdapterPlan: rank " + std::to_string(run.rank) + " is negative");
    return run;
  }
  static void append(std::vector<Run>& runs, const Run& run) {
    if (!runs.empty() && runs.back().adapter == run.adapter && runs.back().rank == run.rank) runs.back().rows += run.rows;
    else runs.push_back(run);
  }

  std::vector<Run> runs_{{any_rows, 0, 0}};
};

}  // namespace qdylora
