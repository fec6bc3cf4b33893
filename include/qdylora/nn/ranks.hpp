// Ranks: which are trained, which one a forward pass uses, and how the next is drawn.
#pragma once

#include <algorithm>
#include <cmath>
#include <initializer_list>
#include <numeric>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/core/error.hpp>
#include <qdylora/core/random.hpp>

namespace qdylora {

/// The ranks an adapter is trained to work at, ascending. Throws Errc::rank_range on an empty set, a rank below 1 or a repeated one.
class RankSet {
 public:
  RankSet(std::initializer_list<Index> ranks) : RankSet(std::vector<Index>(ranks)) {}
  explicit RankSet(std::vector<Index> ranks) : ranks_(std::move(ranks)) {
    QDYLORA_EXPECTS(!ranks_.empty(), rank_range, "RankSet: no ranks");
    std::sort(ranks_.begin(), ranks_.end());
    QDYLORA_EXPECTS(ranks_.front() >= 1, rank_range, "RankSet: rank " + std::to_string(ranks_.front()) + " is below 1");
    QDYLORA_EXPECTS(ranks_.back() <= 65535, rank_range, "RankSet: rank " + std::to_string(ranks_.back()) + " is above 65535");
    const auto twice = std::adjacent_find(ranks_.begin(), ranks_.end());
    QDYLORA_EXPECTS(twice == ranks_.end(), rank_range, "RankSet: rank " + std::to_string(*twice) + " is given twice");
  }
  /// 1, 2, 4, ... up to `max_rank`, which is included.
  static RankSet powers_of_two(Index max_rank) {
    std::vector<Index> ranks;
    QDYLORA_EXPECTS(max_rank <= 65535, rank_range, "RankSet: rank " + std::to_string(max_rank) + " is above 65535");
    for (Index rank = 1; rank < max_rank; rank *= 2) ranks.push_back(rank);
    ranks.push_back(max_rank);
    return RankSet(std::move(ranks));
  }

  Index max() const noexcept { return ranks_.back(); }
  Index size() const noexcept { return static_cast<Index>(ranks_.size()); }
  Index operator[](Index i) const noexcept { return ranks_[static_cast<std::size_t>(i)]; }
  auto begin() const noexcept { return ranks_.begin(); }
  auto end() const noexcept { return ranks_.end(); }
  std::span<const Index> span() const noexcept { return ranks_; }
  bool contains(Index rank) const noexcept { return std::binary_search(ranks_.begin(), ranks_.end(), rank); }
  /// Position of a rank; Errc::rank_range if it is not in the set.
  Index index_of(Index rank) const {
    const auto at = std::lower_bound(ranks_.begin(), ranks_.end(), rank);
    QDYLORA_EXPECTS(at != ranks_.end() && *at == rank, rank_range, "rank " + std::to_string(rank) + " is not in the rank set");
    return at - ranks_.begin();
  }
  bool operator==(const RankSet&) const = default;

 private:
  std::vector<Index> ranks_;
};

/// The ranks of one forward pass: one for all rows, or runs of rows with a rank each. Rank 0 switches the adapter off.
class RankPlan {
 public:
  struct Run {
    Index rows = 0;
    Index rank = 0;
    bool operator==(const Run&) const = default;
  };

  RankPlan() = default;  // adapter off
  static RankPlan uniform(Index rank) {
    RankPlan plan;
    plan.uniform_ = plan.max_ = checked(rank);
    return plan;
  }
  /// ranks[i] is the rank of row i.
  static RankPlan per_row(std::span<const Index> ranks) {
    std::vector<Run> runs;
    for (const Index rank : ranks) {
      if (!runs.empty() && runs.back().rank == rank) ++runs.back().rows;
      else runs.push_back({1, rank});
    }
    return of_runs(std::move(runs));
  }
  static RankPlan of_runs(std::vector<Run> runs) {
    RankPlan plan;
    for (const auto& run : runs) {
      QDYLORA_EXPECTS(run.rows >= 0, bad_argument, "RankPlan: a run of " + std::to_string(run.rows) + " rows");
      plan.max_ = std::max(plan.max_, checked(run.rank));
    }
    if (runs.empty()) runs.push_back({0, 0});  // for no rows, not for any number
    plan.runs_ = std::move(runs);
    return plan;
  }

  /// The same plan with no rank above `most`.
  RankPlan limited(Index most) const {
    RankPlan plan = *this;
    plan.uniform_ = std::min(uniform_, most);
    plan.max_ = std::min(max_, most);
    for (auto& run : plan.runs_) run.rank = std::min(run.rank, most);
    return plan;
  }

  /// The plan of `count` of its rows.
  RankPlan middle_rows(Index first, Index count) const {
    if (is_uniform()) return *this;
    std::vector<Run> part;
    for_each_run(rows(), [&](Index begin, Index rows_of_run, Index rank) {
      const Index from = std::max(begin, first), to = std::min(begin + rows_of_run, first + count);
      if (from < to) part.push_back({to - from, rank});
    });
    return of_runs(std::move(part));
  }

  bool is_uniform() const noexcept { return runs_.empty(); }
  Index max_rank() const noexcept { return max_; }
  std::span<const Run> runs() const noexcept { return runs_; }
  /// Rows the plan is made for; -1 if any number.
  Index rows() const noexcept {
    if (is_uniform()) return -1;
    return std::accumulate(runs_.begin(), runs_.end(), Index{0}, [](Index sum, const Run& run) { return sum + run.rows; });
  }

  /// f(first row, rows, rank) for each run over `rows` rows. Throws Errc::shape_mismatch if the plan is for another number.
  template <class F>
  void for_each_run(Index rows, F&& f) const {
    if (is_uniform()) {
      f(Index{0}, rows, uniform_);
      return;
    }
    QDYLORA_EXPECTS(this->rows() == rows, shape_mismatch,
                    "RankPlan: made for " + std::to_string(this->rows()) + " rows, used on " + std::to_string(rows));
    Index first = 0;
    for (const auto& run : runs_) {
      f(first, run.rows, run.rank);
      first += run.rows;
    }
  }

  /// The rank of each of `rows` rows. Throws as for_each_run.
  std::vector<Index> of_rows(Index rows) const {
    std::vector<Index> ranks(static_cast<std::size_t>(rows));
    for_each_run(rows, [&](Index first, Index count, Index rank) { std::fill_n(ranks.begin() + first, count, rank); });
    return ranks;
  }

  /// From ranks of sequences to ranks of tokens: sequence s has offsets[s + 1] - offsets[s] tokens.
  RankPlan expand(std::span<const Index> offsets) const {
    if (is_uniform()) return *this;
    std::vector<Run> tokens;
    for_each_run(static_cast<Index>(offsets.size()) - 1, [&](Index first, Index count, Index rank) {
      const Index rows = offsets[static_cast<std::size_t>(first + count)] - offsets[static_cast<std::size_t>(first)];
      if (rows > 0) tokens.push_back({rows, rank});
    });
    if (tokens.empty()) tokens.push_back({0, 0});
    return of_runs(std::move(tokens));
  }

 private:
  static Index checked(Index rank) {
    QDYLORA_EXPECTS(rank >= 0, rank_range, "rank " + std::to_string(rank) + " is negative");
    return rank;
  }

  Index uniform_ = 0;
  Index max_ = 0;
  std::vector<Run> runs_;  // empty: uniform_
};

/// How ranks are drawn.
struct SamplerOptions {
  /// step: one rank for all rows, drawn at random (DyLoRA and QDyLoRA as published). row: every row of a batch has its own, dealt out in
  /// the exact shares asked for; what rounding leaves over is carried to the next batch (largest remainder).
  enum class Granularity { step, row } granularity = Granularity::step;
  /// Shares of the set's ranks, any positive scale; empty: equal.
  std::vector<double> weights = {};
  /// This share of the rows goes to the largest rank before the weights divide the rest. Granularity::row only.
  double full_share = 0.0;
};

/// Weights of the ranks of a set, rank b's being (1 - p)^(b - 1): the geometric distribution, cut to the set. Errc::bad_argument unless
/// 0 < p < 1.
inline std::vector<double> geometric_weights(const RankSet& set, double p) {
  QDYLORA_EXPECTS(p > 0.0 && p < 1.0, bad_argument, "geometric_weights: p must be above 0 and below 1");
  std::vector<double> weights;
  for (const Index rank : set) weights.push_back(std::pow(1.0 - p, static_cast<double>(rank - 1)));
  return weights;
}

/// Deals out ranks. Its state is an Rng state and the carry, both small enough for any checkpoint.
class RankSampler {
 public:
  RankSampler(RankSet set, const Rng& rng, SamplerOptions options = {})
      : set_(std::move(set)), rng_(rng.seed(), Purpose::rank), options_(std::move(options)), carry_(static_cast<std::size_t>(set_.size())) {
    auto& weights = options_.weights;
    if (weights.empty()) weights.assign(carry_.size(), 1.0);
    QDYLORA_EXPECTS(weights.size() == carry_.size(), bad_argument,
                    "RankSampler: " + std::to_string(weights.size()) + " weights for " + std::to_string(carry_.size()) + " ranks");
    double sum = 0.0;
    for (const double w : weights) {
      QDYLORA_EXPECTS(w >= 0.0 && w < 1e300, bad_argument, "RankSampler: a weight is negative or not finite");
      sum += w;
    }
    QDYLORA_EXPECTS(sum > 0.0, bad_argument, "RankSampler: the weights are all zero");
    for (double& w : weights) w /= sum;
    QDYLORA_EXPECTS(options_.full_share >= 0.0 && options_.full_share <= 1.0, bad_argument, "RankSampler: full_share is not in [0, 1]");
  }

  const RankSet& set() const noexcept { return set_; }

  /// The plan of the next batch of `rows` rows.
  RankPlan next(Index rows) {
    QDYLORA_EXPECTS(rows >= 0, bad_argument, "RankSampler: a batch of " + std::to_string(rows) + " rows");
    return options_.granularity == SamplerOptions::Granularity::step ? RankPlan::uniform(draw()) : deal(rows);
  }

  struct State {
    Rng::State rng;
    std::vector<double> carry;
    bool operator==(const State&) const = default;
  };
  State state() const { return {rng_.state(), carry_}; }
  void restore(const State& state) {
    QDYLORA_EXPECTS(state.carry.size() == carry_.size(), shape_mismatch, "RankSampler: the state is of another rank set");
    rng_ = Rng(state.rng);
    carry_ = state.carry;
  }

 private:
  Index draw() {
    double at = static_cast<double>(rng_.next()) * 0x1p-32;
    for (Index i = 0; i + 1 < set_.size(); ++i) {
      at -= options_.weights[static_cast<std::size_t>(i)];
      if (at < 0.0) return set_[i];
    }
    return set_.max();
  }

  RankPlan deal(Index rows) {
    const auto count = carry_.size();
    for (std::size_t i = 0; i < count; ++i)
      carry_[i] += options_.weights[i] * (1.0 - options_.full_share) * static_cast<double>(rows);
    carry_.back() += options_.full_share * static_cast<double>(rows);
    std::vector<Index> dealt(count);
    Index left = rows;
    for (std::size_t i = 0; i < count; ++i) {
      dealt[i] = std::clamp(static_cast<Index>(carry_[i] + 1e-9), Index{0}, left);
      carry_[i] -= static_cast<double>(dealt[i]);
      left -= dealt[i];
    }
    // Ties go by lot, so that no rank is always first.
    std::vector<double> lot(count);
    for (double& l : lot) l = 1e-6 * static_cast<double>(rng_.uniform());
    for (; left > 0; --left) {
      std::size_t most = 0;
      for (std::size_t i = 1; i < count; ++i)
        if (carry_[i] + lot[i] > carry_[most] + lot[most]) most = i;
      ++dealt[most];
      carry_[most] -= 1.0;
    }
    std::vector<RankPlan::Run> runs;
    for (std::size_t i = 0; i < count; ++i)
      if (dealt[i] > 0) runs.push_back({dealt[i], set_[static_cast<Index>(i)]});
    if (runs.empty()) runs.push_back({0, set_.max()});
    return RankPlan::of_runs(std::move(runs));
  }

  RankSet set_;
  Rng rng_;
  SamplerOptions options_;
  std::vector<double> carry_;
};

/// Gives every layer the same plan.
template <class... Layers>
void set_ranks(const RankPlan& plan, Layers&... layers) {
  (layers.set_ranks(plan), ...);
}

}  // namespace qdylora
