// Statistics over ranks against closed forms, and the bootstrap against the normal interval where that is right.
#include <cmath>
#include <vector>

#include <qdylora/core/random.hpp>
#include <qdylora/model/rank_report.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"

namespace rank_report_test {

namespace qd = qdylora;

TEST_CASE("a paired difference has the interval of its examples' differences", "[rank_report]") {
  qd::Rng rng(5);
  std::vector<double> a, b, difference;
  for (int i = 0; i < 400; ++i) {
    const double shared = 10.0 * static_cast<double>(rng.normal());  // of the example: cancels
    a.push_back(shared + 0.3 + 0.5 * static_cast<double>(rng.normal()));
    b.push_back(shared);
    difference.push_back(a.back() - b.back());
  }
  double mean = 0.0, variance = 0.0;
  for (const double d : difference) mean += d / 400.0;
  for (const double d : difference) variance += (d - mean) * (d - mean) / 399.0;
  const double half = 1.96 * std::sqrt(variance / 400.0);
  const auto interval = qd::paired_difference(a, b);
  CHECK(interval.value == Approx(mean));
  CHECK(interval.low == Approx(mean - half).margin(0.15 * half));
  CHECK(interval.high == Approx(mean + half).margin(0.15 * half));
  CHECK(interval.holds(0.3));
  CHECK_FALSE(interval.holds(0.0));
  const auto narrower = qd::paired_difference(a, b, {}, {.confidence = 0.5});
  CHECK(narrower.high - narrower.low == Approx(2.0 * 0.6745 * half / 1.96).margin(0.2 * half));
  const auto again = qd::paired_difference(a, b);
  CHECK(again.low == interval.low);  // the same seed, the same interval
}

TEST_CASE("weights make a paired difference that of the whole", "[rank_report]") {
  const std::vector<double> a{1.0, 3.0}, b{0.0, 0.0}, weights{3.0, 1.0};
  const auto interval = qd::paired_difference(a, b, weights);
  CHECK(interval.value == 1.5);
  CHECK(interval.low == 1.0);
  CHECK(interval.high == 3.0);
  const auto same = qd::paired_difference(a, a, weights);
  CHECK(same.value == 0.0);
  CHECK(same.low == 0.0);
  CHECK(same.high == 0.0);
}

TEST_CASE("examples without weight count for nothing, also where a resample would hold them alone", "[rank_report]") {
  const std::vector<double> a{1.0, 100.0}, b{0.0, 0.0}, weights{1.0, 0.0};
  const auto interval = qd::paired_difference(a, b, weights);
  CHECK(interval.low == 1.0);
  CHECK(interval.high == 1.0);
}

TEST_CASE("the area under ranks is the mean over the axis", "[rank_report]") {
  const std::vector<qd::Index> ranks{1, 2, 4, 8};
  const std::vector<double> flat(4, 0.7), line{1.0, 2.0, 4.0, 8.0}, logs{0.0, 1.0, 2.0, 3.0};
  CHECK(qd::area_under_ranks(ranks, flat, qd::RankScale::linear) == Approx(0.7));
  CHECK(qd::area_under_ranks(ranks, flat, qd::RankScale::log2) == Approx(0.7));
  CHECK(qd::area_under_ranks(ranks, line, qd::RankScale::linear) == Approx(4.5));
  CHECK(qd::area_under_ranks(ranks, logs, qd::RankScale::log2) == Approx(1.5));
  CHECK(qd::area_under_ranks(std::vector<qd::Index>{4}, std::vector{0.2}, qd::RankScale::log2) == 0.2);
}

TEST_CASE("the smallest rank keeps a share of the best rank's gain", "[rank_report]") {
  const std::vector<qd::Index> ranks{1, 2, 4, 8};
  const std::vector<double> losses{1.5, 1.2, 1.04, 1.0};
  CHECK(qd::smallest_rank_keeping(0.95, 2.0, ranks, losses) == 4);
  CHECK(qd::smallest_rank_keeping(0.97, 2.0, ranks, losses) == 8);
  CHECK(qd::smallest_rank_keeping(0.5, 2.0, ranks, losses) == 1);
  CHECK(qd::smallest_rank_keeping(1.0, 2.0, ranks, losses) == 8);
  CHECK(qd::smallest_rank_keeping(0.95, 0.9, ranks, losses) == 0);  // no rank beats that base
  const std::vector<double> uneven{1.5, 1.0, 1.2, 1.1};             // the best may be a small one
  CHECK(qd::smallest_rank_keeping(1.0, 2.0, ranks, uneven) == 2);
}

TEST_CASE("the interval of an accuracy is Wilson's", "[rank_report]") {
  // statsmodels.stats.proportion.proportion_confint(right, of, method="wilson") of statsmodels 0.15.0.
  const struct {
    qd::Index right, of;
    double low, high;
  } cases[] = {{0, 1, 0.000000000000, 0.793450685623}, {1, 1, 0.206549314377, 1.000000000000}, {0, 50, 0.000000000000, 0.071347599133}, {50, 50, 0.928652400867, 1.000000000000}, {23, 50, 0.329696521922, 0.596011286008}, {1, 7, 0.025679624345, 0.513127829274}, {350, 1000, 0.321062710052, 0.380085317493}};
  for (const auto& c : cases) {
    const auto found = qd::accuracy_interval(c.right, c.of);
    CAPTURE(c.right, c.of);
    CHECK(found.value == Approx(static_cast<double>(c.right) / static_cast<double>(c.of)));
    CHECK(found.low == Approx(c.low).epsilon(1e-9).margin(1e-12));
    CHECK(found.high == Approx(c.high).epsilon(1e-9));
  }
  for (const auto& [right, of] : {std::pair<qd::Index, qd::Index>{0, 0}, {-1, 3}, {4, 3}})
    CHECK(test::code_of([&] { (void)qd::accuracy_interval(right, of); }) == qd::Errc::bad_argument);
}

TEST_CASE("statistics of nothing, or of lists that do not fit, are refused", "[rank_report]") {
  const std::vector<double> one{1.0}, two{1.0, 2.0}, none, zero{0.0};
  const std::vector<qd::Index> ranks{1, 2}, descending{2, 1};
  using qd::Errc;
  CHECK(test::code_of([&] { (void)qd::paired_difference(none, none); }) == Errc::bad_argument);
  CHECK(test::code_of([&] { (void)qd::paired_difference(one, two); }) == Errc::bad_argument);
  CHECK(test::code_of([&] { (void)qd::paired_difference(one, one, two); }) == Errc::bad_argument);
  CHECK(test::code_of([&] { (void)qd::paired_difference(one, one, zero); }) == Errc::bad_argument);
  const std::vector<double> unknown{std::nan("")}, negative{-1.0, 2.0};
  CHECK(test::code_of([&] { (void)qd::paired_difference(one, unknown); }) == Errc::non_finite);
  CHECK(test::code_of([&] { (void)qd::paired_difference(two, two, negative); }) == Errc::bad_argument);
  CHECK(test::code_of([&] { (void)qd::paired_difference(one, one, {}, {.confidence = 1.0}); }) == Errc::bad_argument);
  CHECK(test::code_of([&] { (void)qd::area_under_ranks(ranks, one, qd::RankScale::linear); }) == Errc::bad_argument);
  CHECK(test::code_of([&] { (void)qd::area_under_ranks(descending, two, qd::RankScale::linear); }) == Errc::bad_argument);
  CHECK(test::code_of([&] { (void)qd::smallest_rank_keeping(0.0, 1.0, ranks, two); }) == Errc::bad_argument);
  CHECK(test::code_of([&] { (void)qd::smallest_rank_keeping(0.9, 1.0, ranks, one); }) == Errc::bad_argument);
}

}  // namespace rank_report_test
