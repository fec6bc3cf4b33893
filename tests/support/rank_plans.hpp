// Ranks of the rows that gradients of layers are checked with, and the loss that they are gradients of.
#pragma once

#include <vector>

#include <qdylora/core/random.hpp>
#include <qdylora/core/view.hpp>
#include <qdylora/nn/ranks.hpp>

namespace test {

/// One rank for all rows, every one of them, and several plans of a rank for each row.
inline std::vector<qdylora::RankPlan> rank_plans(qdylora::Index max_rank, qdylora::Index tokens) {
  using qdylora::Index, qdylora::RankPlan;
  std::vector<RankPlan> result;
  for (Index rank = 1; rank <= max_rank; ++rank) result.push_back(RankPlan::uniform(rank));
  for (std::uint64_t seed = 0; seed < 3; ++seed) {
    qdylora::Rng rng(seed);
    std::vector<Index> ranks;
    const auto choices = static_cast<std::uint64_t>(seed == 0 ? max_rank + 1 : max_rank - 1);  // 0 occurs, the full rank in the first plan alone
    for (Index i = 0; i < tokens; ++i) ranks.push_back(static_cast<Index>(rng.below(choices)));
    result.push_back(RankPlan::per_row(ranks));
  }
  return result;
}

/// y . c, whose gradient with respect to y is c; over rows of one rank only where `rank` is not negative.
inline double product_sum(qdylora::MatrixView<const double> y, qdylora::MatrixView<const double> c, const qdylora::RankPlan& plan,
                          qdylora::Index rank = -1) {
  double sum = 0.0;
  plan.for_each_run(y.rows, [&](qdylora::Index first, qdylora::Index count, qdylora::Index run_rank) {
    if (rank >= 0 && run_rank != rank) return;
    for (qdylora::Index i = first; i < first + count; ++i)
      for (qdylora::Index j = 0; j < y.cols; ++j) sum += c(i, j) * y(i, j);
  });
  return sum;
}

}  // namespace test
