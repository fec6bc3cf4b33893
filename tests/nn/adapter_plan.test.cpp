// Which adapter and rank each row has, and each adapter's share of a batch.
#include <qdylora/nn/adapter_plan.hpp>

#include <vector>

#include "support/catch.hpp"
#include "support/files.hpp"

namespace adapter_plan_test {

namespace qd = qdylora;
using qd::AdapterPlan;
using qd::Errc;
using qd::Index;
using qd::RankPlan;
using Run = AdapterPlan::Run;
using Rows = std::vector<Index>;
using test::code_of;

TEST_CASE("an adapter's share of a batch is its rows, in order, and the plan that they alone would have") {
  const auto plan = AdapterPlan::of_runs({{2, 3, 4}, {0, 1, 9}, {1, 0, 2}, {2, 3, 4}, {1, 3, 1}, {3, 0, 2}});
  CHECK(plan.rows() == 9);
  const auto shares = plan.shares(9);
  REQUIRE(shares.size() == 2);  // adapter 1 has no rows
  CHECK(shares[0].adapter == 0);
  CHECK(shares[0].rows == Rows{2, 6, 7, 8});
  CHECK(shares[0].ranks.is_uniform());
  CHECK(shares[0].ranks.max_rank() == 2);
  CHECK(shares[1].adapter == 3);
  CHECK(shares[1].rows == Rows{0, 1, 3, 4, 5});
  REQUIRE(shares[1].ranks.runs().size() == 2);
  CHECK(shares[1].ranks.runs()[0] == RankPlan::Run{4, 4});
  CHECK(shares[1].ranks.runs()[1] == RankPlan::Run{1, 1});
  CHECK(code_of([&] { plan.shares(8); }) == Errc::shape_mismatch);
}

TEST_CASE("one adapter for all rows is a plan for any number of them, and the first one, off, is where plans begin") {
  const auto plan = AdapterPlan::uniform(2, 5);
  CHECK(plan.rows() == -1);
  CHECK(plan.shares(0).empty());
  const auto shares = plan.shares(3);
  REQUIRE(shares.size() == 1);
  CHECK(shares[0].adapter == 2);
  CHECK(shares[0].rows == Rows{0, 1, 2});
  CHECK(shares[0].ranks.is_uniform());
  CHECK(shares[0].ranks.max_rank() == 5);
  CHECK(plan.expand(Rows{0, 4, 9}).rows() == -1);
  CHECK(AdapterPlan().runs()[0] == Run{-1, 0, 0});
  CHECK(AdapterPlan::of_runs({}).rows() == 0);
  CHECK(code_of([] { AdapterPlan::of_runs({}).shares(1); }) == Errc::shape_mismatch);
}

TEST_CASE("rows take adapters from a list and ranks from a plan, and tokens take their sequence's") {
  const Rows adapters{1, 1, 0, 1};
  const auto plan = AdapterPlan::per_row(adapters, RankPlan::of_runs({{3, 2}, {1, 4}}));
  const std::vector<Run> runs{{2, 1, 2}, {1, 0, 2}, {1, 1, 4}};
  CHECK(std::vector<Run>(plan.runs().begin(), plan.runs().end()) == runs);
  CHECK(AdapterPlan::per_row(adapters, RankPlan::uniform(3)).runs().size() == 3);
  CHECK(code_of([&] { AdapterPlan::per_row(adapters, RankPlan::of_runs({{3, 2}})); }) == Errc::shape_mismatch);
  const auto tokens = plan.expand(Rows{0, 3, 3, 8, 10});
  const std::vector<Run> expanded{{3, 1, 2}, {5, 0, 2}, {2, 1, 4}};
  CHECK(std::vector<Run>(tokens.runs().begin(), tokens.runs().end()) == expanded);
  CHECK(code_of([&] { plan.expand(Rows{0, 3, 3, 8}); }) == Errc::shape_mismatch);
}

TEST_CASE("a plan refuses numbers below zero") {
  CHECK(code_of([] { AdapterPlan::uniform(-1, 2); }) == Errc::bad_argument);
  CHECK(code_of([] { AdapterPlan::uniform(0, -2); }) == Errc::rank_range);
  CHECK(code_of([] { AdapterPlan::of_runs({{-1, 0, 2}}); }) == Errc::bad_argument);
  CHECK(code_of([] { AdapterPlan::of_runs({{1, -3, 2}}); }) == Errc::bad_argument);
}

}  // namespace adapter_plan_test
