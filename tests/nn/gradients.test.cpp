// Every gradient of the layer against central differences in double: each rank, one for all rows or one per row, with every option.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/nn/activation.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/gradcheck.hpp"
#include "support/random_data.hpp"
#include "support/rank_plans.hpp"

namespace gradients_test {

namespace qd = qdylora;
using qd::GradientMode;
using qd::GradientRows;
using qd::Index;
using qd::ScalePolicy;
using Double = qd::Matrix<double>;

namespace {

constexpr Index in = 7, out = 6, max_rank = 5;

struct Options {
  ScalePolicy scale = ScalePolicy::constant;
  GradientRows rows = GradientRows::prefix;
  bool gates = false;
  float dropout = 0.0f;
};

std::vector<Options> all_options() {
  std::vector<Options> all;
  for (const auto scale : {ScalePolicy::constant, ScalePolicy::over_rank, ScalePolicy::over_sqrt_rank})
    for (const auto rows : {GradientRows::prefix, GradientRows::last_row})
      for (const bool gates : {false, true})
        for (const float dropout : {0.0f, 0.3f}) all.push_back({scale, rows, gates, dropout});
  return all;
}

// layer(x) . c, the loss whose gradient with respect to y is c; over rows of one rank only where `rank` is not negative.
template <class Layer>
double loss(const Layer& layer, const Double& x, const Double& c, Index rank = -1) {
  Double y(x.rows(), out);
  typename Layer::Context context;
  layer.forward(x.view(), y.view(), context);
  return test::product_sum(y.view(), c.view(), context.plan, rank);
}

bool all_zero(std::span<const double> values) {
  return std::all_of(values.begin(), values.end(), [](double v) { return v == 0.0; });
}

std::string text(const test::GradientReport& report) {
  return "element " + std::to_string(report.element) + ": analytic " + std::to_string(report.analytic) + ", numeric " +
         std::to_string(report.numeric);
}
#define CHECK_GRADIENT(report_)           \
  do {                                    \
    const test::GradientReport r = report_; \
    INFO(text(r));                        \
    CHECK(r.ok());                        \
  } while (false)

template <class Layer>
void check_layer(Layer& layer, const Options& options, Index tokens) {
  auto& adapter = layer.adapter();
  qd::Rng rng(11);
  test::fill_normal(adapter.b().value.view(), rng, 0.5);
  if (options.gates) test::fill_normal(adapter.gates().value.view(), rng);
  layer.set_bias(test::normal_matrix<double>(1, out, 12).view());
  layer.set_training(true, 3);
  Double x = test::normal_matrix<double>(tokens, in, 13);
  const Double c = test::normal_matrix<double>(tokens, out, 14);
  Double y(tokens, out), dx(tokens, in);

  for (const auto& plan : test::rank_plans(max_rank, tokens)) {
    CAPTURE(plan.is_uniform(), plan.max_rank(), tokens, name(options.scale), options.gates, options.dropout);
    const bool last_row = options.rows == GradientRows::last_row;
    CAPTURE(last_row);
    layer.set_ranks(plan);
    for (const auto& p : layer.parameters()) std::fill_n(p->gradient.data(), p->gradient.size(), 0.0);
    if (options.gates) std::fill_n(adapter.gates().gradient.data(), adapter.gates().gradient.size(), 0.0);
    typename Layer::Context context;
    layer.forward(x.view(), y.view(), context);
    layer.backward(c.view(), dx.view(), context);

    CHECK_GRADIENT(test::check_gradient([&] { return loss(layer, x, c); }, x.span(), dx.span()));
    for (auto* p : {&adapter.a(), &adapter.b()}) {
      CAPTURE(p->name);
      for (Index i = 0; i < max_rank; ++i) {
        CAPTURE(i);
        const auto cols = static_cast<std::size_t>(p->value.cols());
        const auto value = p->value.span().subspan(static_cast<std::size_t>(i) * cols, cols);
        const auto gradient = p->gradient.span().subspan(static_cast<std::size_t>(i) * cols, cols);
        // Frozen: row i learns from the tokens of rank i + 1 alone.
        CHECK_GRADIENT(test::check_gradient([&] { return loss(layer, x, c, last_row ? i + 1 : -1); }, value, gradient));
        if (i >= plan.max_rank() || (last_row && plan.is_uniform() && i + 1 != plan.max_rank())) CHECK(all_zero(gradient));
      }
    }
    if (options.gates) {
      auto& gates = adapter.gates();
      CHECK_GRADIENT(test::check_gradient([&] { return loss(layer, x, c); }, gates.value.span(), gates.gradient.span()));
      for (Index g = 0; g < gates.value.rows(); ++g)  // a gate vector's elements beyond its rank
        for (Index i = adapter.options().gated_ranks[static_cast<std::size_t>(g)]; i < max_rank; ++i)
          CHECK(gates.gradient(g, i) == 0.0);
    }
  }
}

template <class Format>
void check_format() {
  for (const auto& options : all_options())
    for (const Index tokens : {3, 9}) {  // few tokens take another path through the products
      qd::LoRAOptions lora{.max_rank = max_rank, .alpha = 3.0f, .scale = options.scale, .gradient_rows = options.rows,
                           .dropout = options.dropout, .seed = 5, .layer = 2};
      if (options.gates) lora.gated_ranks = {2, 4, 5};
      qd::DynamicLoRALinear<double, qd::Cpu, Format> layer(test::normal_matrix<double>(out, in, 10, 0.4), lora, {}, qd::Cpu(1));
      check_layer(layer, options, tokens);
    }
}

}  // namespace

TEST_CASE("gradients of a layer on a dense weight agree with central differences at every rank") {
  check_format<qd::Dense<double>>();
}

TEST_CASE("gradients of a layer on an NF4 weight agree with central differences at every rank") {
  check_format<qd::NF4>();
}

TEST_CASE("gradients of a layer larger than a tile agree with central differences") {
  // more than one panel of weight rows, slice of columns and panel of tokens, none of them full
  constexpr Index wide_in = 101, wide_out = 53, tokens = 35;
  qd::DynamicLoRALinear<double> layer(test::normal_matrix<double>(wide_out, wide_in, 1, 0.1), {.max_rank = 9, .alpha = 9.0f});
  qd::Rng rng(2);
  test::fill_normal(layer.adapter().b().value.view(), rng, 0.1);
  std::vector<Index> ranks;
  for (Index i = 0; i < tokens; ++i) ranks.push_back(i % 10);
  layer.set_ranks(qd::RankPlan::per_row(ranks));
  Double x = test::normal_matrix<double>(tokens, wide_in, 3);
  const Double c = test::normal_matrix<double>(tokens, wide_out, 4);
  const auto objective = [&] {
    Double y(tokens, wide_out);
    decltype(layer)::Context context;
    layer.forward(x.view(), y.view(), context);
    double sum = 0.0;
    for (Index i = 0; i < y.size(); ++i) sum += c.data()[i] * y.data()[i];
    return sum;
  };
  layer.forward(x);
  const auto dx = layer.backward(c.view());
  // every 23rd element of each
  const auto check_some = [&](qd::MatrixView<double> value, qd::MatrixView<const double> gradient) {
    for (Index i = 0; i < value.size(); i += 23) {
      const auto at = [&](auto view) { return view.data + i; };
      CHECK_GRADIENT(test::check_gradient(objective, std::span(at(value), 1), std::span<const double>(at(gradient), 1)));
    }
  };
  check_some(x.view(), dx);
  check_some(layer.adapter().a().value.view(), layer.adapter().a().gradient.view());
  check_some(layer.adapter().b().value.view(), layer.adapter().b().gradient.view());
}

TEST_CASE("float gradients are the double ones to float precision") {
  constexpr Index tokens = 40, width = 96;
  const auto w = test::normal_matrix<float>(width, width, 1, 0.1);
  const qd::LoRAOptions options{.max_rank = 8, .alpha = 8.0f};
  qd::DynamicLoRALinear<float> single(w, options);
  qd::DynamicLoRALinear<double> twice(w, options);
  const auto b = test::normal_matrix<float>(8, width, 2, 0.1);
  qd::copy<float>(b, single.adapter().b().value.view());
  qd::copy<double>(test::converted<double>(b.view()), twice.adapter().b().value.view());
  qd::copy<double>(test::converted<double>(single.adapter().a().value.view()), twice.adapter().a().value.view());
  const auto x = test::normal_matrix<float>(tokens, width, 3), dy = test::normal_matrix<float>(tokens, width, 4);
  const auto x2 = test::converted<double>(x.view()), dy2 = test::converted<double>(dy.view());
  for (const Index rank : {1, 3, 8}) {
    single.set_rank(rank);
    twice.set_rank(rank);
    CHECK(test::normalised_squared_error(single.forward(x), twice.forward(x2)) < 1e-12);
    CHECK(test::normalised_squared_error(single.backward(dy.view()), twice.backward(dy2.view())) < 1e-12);
  }
  CHECK(test::normalised_squared_error(single.adapter().a().gradient.view(), twice.adapter().a().gradient.view()) < 1e-12);
  CHECK(test::normalised_squared_error(single.adapter().b().gradient.view(), twice.adapter().b().gradient.view()) < 1e-12);
}

TEST_CASE("a backward pass computes dx alone, gradients alone, or both, with the same bits") {
  const float dropout = GENERATE(0.0f, 0.25f);
  constexpr Index tokens = 20;
  const auto make = [&] {
    const qd::LoRAOptions options{.max_rank = 6, .dropout = dropout, .gated_ranks = {6}};
    qd::DynamicLoRALinear<float> layer(test::normal_matrix<float>(48, 40, 1), options);
    qd::Rng rng(2);
    test::fill_normal(layer.adapter().b().value.view(), rng);
    return layer;
  };
  const auto x = test::normal_matrix<float>(tokens, 40, 3), dy = test::normal_matrix<float>(tokens, 48, 4);
  auto both = make(), gradients = make(), only_dx = make();
  qd::Matrix<float> y(tokens, 48), dx(tokens, 40), dx2(tokens, 40);
  qd::DynamicLoRALinear<float>::Context context;
  both.forward(x.view(), y.view(), context);
  both.backward(dy.view(), dx.view(), context);
  gradients.forward(x.view(), y.view(), context);
  gradients.backward(dy.view(), {}, context);
  only_dx.forward(x.view(), y.view(), context);
  only_dx.backward(dy.view(), dx2.view(), context, GradientMode::ignore);
  CHECK(test::same_bits(dx.view(), dx2.view()));
  const auto gradient_bits = [](auto& layer) {
    std::vector<float> values;
    for (const auto* p : {&layer.adapter().a(), &layer.adapter().b(), &layer.adapter().gates()})
      values.insert(values.end(), p->gradient.span().begin(), p->gradient.span().end());
    return values;
  };
  CHECK(gradient_bits(both) == gradient_bits(gradients));
  const auto untouched = gradient_bits(only_dx);
  CHECK(std::all_of(untouched.begin(), untouched.end(), [](float g) { return g == 0.0f; }));
  for (const auto& p : only_dx.parameters()) CHECK(p->touched == std::vector<bool>(6, false));
}

TEST_CASE("the rows that got gradient are marked as touched") {
  const auto x = test::normal_matrix<float>(6, 8, 1), dy = test::normal_matrix<float>(6, 8, 2);
  const auto touched = [&](GradientRows rows, const qd::RankPlan& plan) {
    qd::DynamicLoRALinear<float> layer(test::normal_matrix<float>(8, 8, 3), {.max_rank = 5, .gradient_rows = rows});
    layer.set_ranks(plan);
    layer.forward(x);
    layer.backward(dy.view());
    CHECK(layer.adapter().a().touched == layer.adapter().b().touched);
    return layer.adapter().a().touched;
  };
  const auto mixed = qd::RankPlan::of_runs({{2, 0}, {3, 2}, {1, 4}});
  CHECK(touched(GradientRows::prefix, qd::RankPlan::uniform(3)) == std::vector<bool>{true, true, true, false, false});
  CHECK(touched(GradientRows::last_row, qd::RankPlan::uniform(3)) == std::vector<bool>{false, false, true, false, false});
  CHECK(touched(GradientRows::prefix, mixed) == std::vector<bool>{true, true, true, true, false});
  CHECK(touched(GradientRows::last_row, mixed) == std::vector<bool>{false, true, false, true, false});
  CHECK(touched(GradientRows::prefix, qd::RankPlan{}) == std::vector<bool>(5, false));
}

TEST_CASE("gelu is x times the normal distribution function, and its gradient agrees with central differences") {
  Double x(1, 61);
  for (Index i = 0; i < 61; ++i) x(0, i) = (static_cast<double>(i) - 30.0) / 6.0;
  const auto y = qd::gelu<double, qd::Cpu>(x.view());
  for (Index i = 0; i < 61; ++i) CHECK(y(0, i) == Approx(x(0, i) * 0.5 * std::erfc(-x(0, i) / std::sqrt(2.0))).margin(1e-15));
  const Double dy = test::normal_matrix<double>(1, 61, 1);
  const auto dx = qd::gelu_backward<double, const double, qd::Cpu>(x.view(), dy.view());
  CHECK_GRADIENT(test::check_gradient(
      [&] {
        const auto z = qd::gelu<double, qd::Cpu>(x.view());
        double sum = 0.0;
        for (Index i = 0; i < 61; ++i) sum += dy(0, i) * z(0, i);
        return sum;
      },
      x.span(), dx.span()));
}

}  // namespace gradients_test
