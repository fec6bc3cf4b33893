// A weighted sum of adapters is one adapter: against dense updates in double, at ranks, with every scale and with gates.
#include <qdylora/nn/weighted_sum.hpp>

#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>
#include <qdylora/nn/reorder.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/random_data.hpp"

namespace weighted_sum_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using Double = qd::Matrix<double>;

namespace {

constexpr Index in = 24, out = 18;

template <class S>
qd::LoRAAdapter<S> make(qd::LoRAOptions options, std::uint64_t seed) {
  options.seed = seed;
  options.name = "adapter " + std::to_string(seed);
  qd::LoRAAdapter<S> adapter(in, out, options);
  qd::Rng rng(seed);
  test::fill_normal(adapter.b().value.view(), rng);
  if (adapter.gated()) test::fill_normal(adapter.gates().value.view(), rng);
  return adapter;
}

// target += weight * s_b sum_{i < b} g_b[i] B_i^T A_i, in double.
template <class S>
void add_update(const qd::LoRAAdapter<S>& adapter, Index rank, double weight, Double& target) {
  const auto& options = adapter.options();
  const double alpha = static_cast<double>(options.alpha);
  const double scale = options.scale == qd::ScalePolicy::constant    ? alpha / static_cast<double>(adapter.max_rank())
                       : options.scale == qd::ScalePolicy::over_rank ? alpha / static_cast<double>(rank)
                                                                     : alpha / std::sqrt(static_cast<double>(rank));
  for (Index i = 0; i < rank; ++i) {
    double gate = 1.0;
    for (std::size_t g = 0; g < options.gated_ranks.size(); ++g)
      if (options.gated_ranks[g] == rank) gate = static_cast<double>(adapter.gates().value(static_cast<Index>(g), i));
    for (Index o = 0; o < out; ++o)
      for (Index k = 0; k < in; ++k)
        target(o, k) += weight * scale * gate * static_cast<double>(adapter.b().value(i, o)) * static_cast<double>(adapter.a().value(i, k));
  }
}

template <class S>
void check(double bound) {
  const auto first = make<S>({.max_rank = 8, .alpha = 12}, 1);
  const auto second = make<S>({.max_rank = 5, .alpha = 3, .scale = qd::ScalePolicy::over_sqrt_rank, .gated_ranks = {2, 5}}, 2);
  const auto third = make<S>({.max_rank = 3, .alpha = 2, .scale = qd::ScalePolicy::over_rank}, 3);
  const std::vector<qd::WeightedAdapter<S>> terms = {
      {&first, S(0.7), 3}, {&second, S(-1.25)}, {&third, S(0.5), 2}, {&first, S(0)}, {&second, S(0.3), 4}};
  const auto sum = qd::weighted_sum<S>(terms, "mix");
  CHECK(sum.max_rank() == 3 + 5 + 2 + 8 + 4);
  CHECK(sum.options().name == "mix");
  CHECK(sum.scale(sum.max_rank()) == S(1));
  Double expected(out, in), found(out, in);
  for (const auto& term : terms)
    add_update(*term.adapter, term.rank == 0 ? term.adapter->max_rank() : term.rank, static_cast<double>(term.weight), expected);
  add_update(sum, sum.max_rank(), 1.0, found);
  CHECK(test::normalised_squared_error(found.view(), expected.view()) < bound);
  if constexpr (std::is_same_v<S, float>) {  // by singular values its first rows are what is best of the sum
    auto ordered = qd::weighted_sum<S>(terms);
    qd::reorder(ordered, qd::Reordering::svd);
    Double cut(out, in), first_rows(out, in);
    add_update(ordered, 10, 1.0, cut);
    add_update(sum, 10, 1.0, first_rows);
    CHECK(test::normalised_squared_error(cut.view(), expected.view()) < 1e-6);  // whose rank is 3 + 5 + 2
    CHECK(test::normalised_squared_error(first_rows.view(), expected.view()) > 1e-3);
  }
}

}  // namespace

TEST_CASE("a weighted sum of adapters has the weighted sum of their dense updates") {
  check<double>(1e-28);
  check<float>(1e-13);
}

TEST_CASE("a layer with a weighted sum has the merged weight of its adapters") {
  using Layer = qd::DynamicLoRALinear<double, qd::Cpu, qd::Dense<double>>;
  const auto weight = test::normal_matrix<double>(out, in, 9);
  const auto first = make<double>({.max_rank = 4}, 1), second = make<double>({.max_rank = 2}, 2);
  const std::vector<qd::WeightedAdapter<double>> terms = {{&first, 0.25}, {&second, 2.0}};
  const auto sum = qd::weighted_sum<double>(terms);
  Layer layer(weight, sum.options());
  qd::assign(layer.adapter(), sum, layer.backend());
  Double merged = qd::clone(weight.view());
  for (const auto& term : terms) add_update(*term.adapter, term.adapter->max_rank(), term.weight, merged);
  CHECK(test::normalised_squared_error(layer.merged_weight(6).view(), merged.view()) < 1e-28);
  const auto x = test::normal_matrix<double>(7, in, 3);
  Double y(7, out);
  for (Index i = 0; i < 7; ++i)
    for (Index o = 0; o < out; ++o)
      for (Index k = 0; k < in; ++k) y(i, o) += x(i, k) * merged(o, k);
  CHECK(test::normalised_squared_error(layer.forward(x), y.view()) < 1e-28);
}

TEST_CASE("a weighted sum refuses what is no term of one") {
  using Terms = std::vector<qd::WeightedAdapter<float>>;
  const auto first = make<float>({.max_rank = 4}, 1), magnitude = make<float>({.max_rank = 4, .dora = true}, 2);
  const qd::LoRAAdapter<float> narrow(in - 1, out, {.max_rank = 2}), short_one(in, out - 1, {.max_rank = 2, .name = "short"});
  const qd::LoRAAdapter<float> large(in, out, {.max_rank = 40000});
  const auto refused = [](const Terms& terms) { return test::code_of([&] { qd::weighted_sum<float>(terms); }); };
  CHECK(refused({}) == Errc::bad_argument);
  CHECK(refused({{nullptr}}) == Errc::bad_argument);
  CHECK(refused({{&first}, {nullptr}}) == Errc::bad_argument);
  CHECK(refused({{&first, std::numeric_limits<float>::quiet_NaN()}}) == Errc::bad_argument);
  CHECK(refused({{&first, std::numeric_limits<float>::infinity()}}) == Errc::bad_argument);
  CHECK(refused({{&first, 1, 5}}) == Errc::rank_range);
  CHECK(refused({{&first, 1, -1}}) == Errc::rank_range);
  CHECK(refused({{&first}, {&narrow}}) == Errc::shape_mismatch);
  CHECK(refused({{&first}, {&magnitude}}) == Errc::unsupported);
  CHECK(refused({{&large}, {&large}}) == Errc::rank_range);
  const auto error = test::error_of([&] { qd::weighted_sum<float>(Terms{{&first}, {&short_one}}); });
  REQUIRE(error);
  CHECK(error->code() == Errc::shape_mismatch);
  CHECK(std::string(error->what()).find("short") != std::string::npos);
}

}  // namespace weighted_sum_test
