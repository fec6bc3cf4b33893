// Rank sets, plans and samplers: what they refuse, what they deal, and that their state continues a run.
#include <qdylora/nn/ranks.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <map>
#include <set>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/files.hpp"

namespace ranks_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using qd::RankPlan;
using qd::RankSampler;
using qd::RankSet;
using Granularity = qd::SamplerOptions::Granularity;
using Run = RankPlan::Run;
using test::code_of;

namespace {

std::vector<Index> ranks_of(const RankPlan& plan, Index rows) {
  std::vector<Index> ranks;
  plan.for_each_run(rows, [&](Index first, Index count, Index rank) {
    CHECK(first == static_cast<Index>(ranks.size()));
    ranks.insert(ranks.end(), static_cast<std::size_t>(count), rank);
  });
  return ranks;
}

std::vector<Run> runs_of(const RankPlan& plan) { return {plan.runs().begin(), plan.runs().end()}; }

}  // namespace

TEST_CASE("a rank set is ascending, whatever the order it is given in") {
  const RankSet set{8, 1, 64, 2};
  CHECK(std::vector<Index>(set.begin(), set.end()) == std::vector<Index>{1, 2, 8, 64});
  CHECK(set.max() == 64);
  CHECK(set.size() == 4);
  CHECK(set[2] == 8);
  CHECK(set.contains(8));
  CHECK_FALSE(set.contains(7));
  CHECK(set.index_of(64) == 3);
  CHECK(set == RankSet{1, 2, 8, 64});
  CHECK_FALSE(set == RankSet{1, 2, 8});
}

TEST_CASE("powers of two end with the rank asked for") {
  CHECK(RankSet::powers_of_two(64) == RankSet{1, 2, 4, 8, 16, 32, 64});
  CHECK(RankSet::powers_of_two(48) == RankSet{1, 2, 4, 8, 16, 32, 48});
  CHECK(RankSet::powers_of_two(1) == RankSet{1});
  CHECK(RankSet::powers_of_two(2) == RankSet{1, 2});
  CHECK(RankSet::powers_of_two(65535).max() == 65535);
}

TEST_CASE("rank sets refuse what is no set of ranks") {
  CHECK(code_of([] { RankSet({}); }) == Errc::rank_range);
  CHECK(code_of([] { RankSet(std::vector<Index>{}); }) == Errc::rank_range);
  CHECK(code_of([] { RankSet{0, 1}; }) == Errc::rank_range);
  CHECK(code_of([] { RankSet{4, -1}; }) == Errc::rank_range);
  CHECK(code_of([] { RankSet{2, 4, 2}; }) == Errc::rank_range);
  CHECK(code_of([] { RankSet{65536}; }) == Errc::rank_range);
  CHECK(code_of([] { RankSet::powers_of_two(0); }) == Errc::rank_range);
  CHECK(code_of([] { RankSet::powers_of_two(-3); }) == Errc::rank_range);
  CHECK(code_of([] { RankSet::powers_of_two(65536); }) == Errc::rank_range);
  CHECK(code_of([] { RankSet{1, 2}.index_of(3); }) == Errc::rank_range);
  const auto error = test::error_of([] { RankSet{2, 4, 2}; });
  REQUIRE(error);
  CHECK(std::string(error->what()).find("rank 2 is given twice") != std::string::npos);
}

TEST_CASE("a uniform plan is for any number of rows") {
  const auto plan = RankPlan::uniform(4);
  CHECK(plan.is_uniform());
  CHECK(plan.max_rank() == 4);
  CHECK(plan.rows() == -1);
  CHECK(ranks_of(plan, 3) == std::vector<Index>{4, 4, 4});
  CHECK(ranks_of(RankPlan{}, 2) == std::vector<Index>{0, 0});
}

TEST_CASE("a plan per row joins equal neighbours") {
  const std::vector<Index> ranks = {2, 2, 8, 0, 0, 0, 2};
  const auto plan = RankPlan::per_row(ranks);
  CHECK(runs_of(plan) == std::vector<Run>{{2, 2}, {1, 8}, {3, 0}, {1, 2}});
  CHECK(plan.max_rank() == 8);
  CHECK(plan.rows() == 7);
  CHECK_FALSE(plan.is_uniform());
  CHECK(ranks_of(plan, 7) == ranks);
}

TEST_CASE("plans refuse negative ranks and rows, and batches they are not made for") {
  CHECK(code_of([] { RankPlan::uniform(-1); }) == Errc::rank_range);
  CHECK(code_of([] { RankPlan::per_row(std::vector<Index>{1, -2}); }) == Errc::rank_range);
  CHECK(code_of([] { RankPlan::of_runs({{2, -1}}); }) == Errc::rank_range);
  CHECK(code_of([] { RankPlan::of_runs({{-1, 2}}); }) == Errc::bad_argument);
  const auto plan = RankPlan::of_runs({{2, 1}, {3, 4}});
  for (const Index rows : {0, 4, 6}) CHECK(code_of([&] { ranks_of(plan, rows); }) == Errc::shape_mismatch);
  const auto error = test::error_of([&] { ranks_of(plan, 6); });
  REQUIRE(error);
  CHECK(std::string(error->what()).find("5 rows") != std::string::npos);
  CHECK(std::string(error->what()).find("6") != std::string::npos);
}

TEST_CASE("a plan for no rows is a plan for no rows, not one that switches the adapter off") {
  for (const auto& plan : {RankPlan::per_row({}), RankPlan::of_runs({}), RankPlan::of_runs({{0, 4}})}) {
    CHECK(plan.rows() == 0);
    CHECK(ranks_of(plan, 0).empty());
    CHECK(code_of([&] { ranks_of(plan, 3); }) == Errc::shape_mismatch);
  }
}

TEST_CASE("ranks of sequences become ranks of their tokens") {
  const auto plan = RankPlan::per_row(std::vector<Index>{4, 4, 1, 8});
  CHECK(runs_of(plan.expand(std::vector<Index>{0, 3, 5, 9, 10})) == std::vector<Run>{{5, 4}, {4, 1}, {1, 8}});
  CHECK(runs_of(plan.expand(std::vector<Index>{0, 3, 5, 5, 10})) == std::vector<Run>{{5, 4}, {5, 8}});  // an empty sequence
  CHECK(plan.expand(std::vector<Index>{7, 7, 7, 7, 7}).rows() == 0);
  CHECK(runs_of(plan.expand(std::vector<Index>{2, 3, 4, 5, 6})) == runs_of(plan));
  CHECK(RankPlan::uniform(3).expand(std::vector<Index>{0, 5}).is_uniform());
  CHECK(code_of([&] { plan.expand(std::vector<Index>{0, 1, 2, 3}); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { plan.expand({}); }) == Errc::shape_mismatch);
}

TEST_CASE("by default one rank a step is drawn, all equally often") {
  RankSampler sampler{RankSet{1, 2, 4, 8}, qd::Rng(7)};
  std::map<Index, int> count;
  for (int i = 0; i < 8000; ++i) {
    const auto plan = sampler.next(16);
    CHECK(plan.is_uniform());
    ++count[plan.max_rank()];
  }
  CHECK(count.size() == 4);
  for (const auto& [rank, times] : count) {
    CAPTURE(rank);
    CHECK(std::abs(times - 2000) < 5 * std::sqrt(8000 * 0.25 * 0.75));  // five standard deviations
  }
}

TEST_CASE("weights of any scale are the frequencies of steps") {
  RankSampler sampler{RankSet{1, 2, 4}, qd::Rng(7), {.weights = {30.0, 0.0, 10.0}}};
  std::map<Index, int> count;
  for (int i = 0; i < 8000; ++i) ++count[sampler.next(1).max_rank()];
  CHECK(count.count(2) == 0);
  CHECK(std::abs(count[1] - 6000) < 5 * std::sqrt(8000 * 0.75 * 0.25));
  CHECK(count[1] + count[4] == 8000);
}

TEST_CASE("rows are dealt in the exact shares, and what is left over is carried") {
  struct Case {
    RankSet set;
    Index rows;
    std::vector<double> weights;
    double full_share;
  };
  const Case example = GENERATE(
      Case{RankSet::powers_of_two(64), 16, {}, 0.25}, Case{RankSet::powers_of_two(64), 2, {}, 0.25},
      Case{RankSet::powers_of_two(64), 1, {}, 0.0}, Case{{1, 2, 4}, 4, {1, 1, 2}, 0.0}, Case{{1, 3, 9}, 5, {0.2, 0.0, 0.7}, 0.5},
      Case{{1, 2}, 3, {}, 1.0}, Case{{5}, 3, {}, 0.0},
      Case{{1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, 7, {10, 9, 8, 7, 6, 5, 4, 3, 2, 1}, 0.1});
  const auto& set = example.set;
  const auto& weights = example.weights;
  const Index rows = example.rows;
  const double full_share = example.full_share;
  CAPTURE(set.size(), rows, full_share);
  RankSampler sampler{set, qd::Rng(3), {.granularity = Granularity::row, .weights = weights, .full_share = full_share}};
  double sum = 0.0;
  for (Index i = 0; i < set.size(); ++i) sum += weights.empty() ? 1.0 : weights[static_cast<std::size_t>(i)];
  std::map<Index, Index> count;
  double worst = 0.0;
  for (Index batch = 1; batch <= 2000; ++batch) {
    const auto plan = sampler.next(rows);
    CHECK(plan.rows() == rows);
    plan.for_each_run(rows, [&](Index, Index n, Index rank) {
      CHECK(set.contains(rank));
      count[rank] += n;
    });
    for (Index i = 0; i < set.size(); ++i) {
      const double weight = weights.empty() ? 1.0 : weights[static_cast<std::size_t>(i)];
      double share = (1.0 - full_share) * weight / sum;
      if (i + 1 == set.size()) share += full_share;
      const double expected = share * static_cast<double>(rows * batch);
      worst = std::max(worst, std::fabs(static_cast<double>(count[set[i]]) - expected));
      if (share == 0.0) CHECK(count[set[i]] == 0);
    }
  }
  CHECK(worst < 1.5);  // never off by two rows, after any number of batches
}

TEST_CASE("an exact share is dealt in every batch") {
  RankSampler sampler{RankSet{1, 2, 4}, qd::Rng(3), {.granularity = Granularity::row, .weights = {1, 1, 2}, .full_share = 0.5}};
  for (int batch = 0; batch < 50; ++batch) CHECK(runs_of(sampler.next(8)) == std::vector<Run>{{1, 1}, {1, 2}, {6, 4}});
}

TEST_CASE("when a batch has fewer rows than ranks, no rank is always first") {
  std::set<Index> first;
  for (std::uint64_t seed = 0; seed < 60; ++seed) {
    RankSampler sampler{RankSet{1, 2, 4}, qd::Rng(seed), {.granularity = Granularity::row}};
    first.insert(sampler.next(1).max_rank());
  }
  CHECK(first == std::set<Index>{1, 2, 4});
}

TEST_CASE("an empty batch is dealt no rows") {
  RankSampler sampler{RankSet{1, 2}, qd::Rng(1), {.granularity = Granularity::row}};
  CHECK(sampler.next(0).rows() == 0);
}

TEST_CASE("equal seeds deal equal ranks, others do not") {
  for (const auto granularity : {Granularity::step, Granularity::row}) {
    const auto sequence = [&](std::uint64_t seed) {
      RankSampler sampler{RankSet::powers_of_two(64), qd::Rng(seed), {.granularity = granularity, .full_share = 0.25}};
      std::vector<Index> all;
      for (int i = 0; i < 40; ++i) {
        const auto ranks = ranks_of(sampler.next(3), 3);
        all.insert(all.end(), ranks.begin(), ranks.end());
      }
      return all;
    };
    CHECK(sequence(1) == sequence(1));
    CHECK(sequence(1) != sequence(2));
  }
}

TEST_CASE("a sampler restored from its state goes on as if it had not stopped") {
  for (const auto granularity : {Granularity::step, Granularity::row}) {
    const qd::SamplerOptions options{.granularity = granularity, .weights = {3, 2, 1, 1}, .full_share = 0.3};
    RankSampler original{RankSet{1, 2, 4, 8}, qd::Rng(5), options};
    for (int i = 0; i < 17; ++i) original.next(3);
    const auto state = original.state();
    RankSampler restored{RankSet{1, 2, 4, 8}, qd::Rng(99), options};
    restored.restore(state);
    CHECK(restored.state() == state);
    for (int i = 0; i < 50; ++i) CHECK(ranks_of(restored.next(3), 3) == ranks_of(original.next(3), 3));
    CHECK(restored.state() == original.state());
    RankSampler other{RankSet{1, 2}, qd::Rng(5)};
    CHECK(code_of([&] { other.restore(state); }) == Errc::shape_mismatch);
  }
}

TEST_CASE("geometric weights are DyLoRA's: those of ranks 1 to 8 by p = 0.15, cut and scaled to sum 1") {
  const auto weights = qd::geometric_weights(RankSet{1, 2, 3, 4, 5, 6, 7, 8}, 0.15);
  double sum = 0.0;
  for (const double w : weights) sum += w;
  const double expected[] = {0.2062, 0.1753, 0.1490, 0.1266, 0.1076, 0.0915, 0.0778, 0.0661};
  REQUIRE(weights.size() == 8);
  for (std::size_t i = 0; i < 8; ++i) CHECK(weights[i] / sum == Approx(expected[i]).margin(6e-5));
  const auto some = qd::geometric_weights(RankSet{2, 5}, 0.5);  // by rank, not by place in the set
  CHECK(some[0] / some[1] == Approx(8.0));
  for (const double p : {0.0, 1.0, -0.1, std::numeric_limits<double>::quiet_NaN()})
    CHECK(code_of([&] { qd::geometric_weights(RankSet{1, 2}, p); }) == Errc::bad_argument);
}

TEST_CASE("samplers refuse weights and shares that are none") {
  constexpr double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  const auto code = [](qd::SamplerOptions options) {
    return code_of([&] { RankSampler{RankSet{1, 2}, qd::Rng(1), options}; });
  };
  CHECK_FALSE(code({}));
  CHECK(code({.weights = {1}}) == Errc::bad_argument);
  CHECK(code({.weights = {1, 1, 1}}) == Errc::bad_argument);
  CHECK(code({.weights = {1, -1}}) == Errc::bad_argument);
  CHECK(code({.weights = {1, nan}}) == Errc::bad_argument);
  CHECK(code({.weights = {1, infinity}}) == Errc::bad_argument);
  CHECK(code({.weights = {0, 0}}) == Errc::bad_argument);
  CHECK(code({.full_share = -0.1}) == Errc::bad_argument);
  CHECK(code({.full_share = 1.1}) == Errc::bad_argument);
  CHECK(code({.full_share = nan}) == Errc::bad_argument);
}

TEST_CASE("samplers refuse a batch of negative size") {
  RankSampler sampler{RankSet{1, 2}, qd::Rng(1), {.granularity = Granularity::row}};
  const auto before = sampler.state();
  CHECK(code_of([&] { sampler.next(-1); }) == Errc::bad_argument);
  CHECK(sampler.state() == before);
}

}  // namespace ranks_test
