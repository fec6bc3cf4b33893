// The bottleneck adapter: its function against plain loops, every gradient against central differences in double at every width, and that
// a width is what an adapter cut to it is, row by row.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/nn/adapter_method.hpp>
#include <qdylora/nn/bottleneck_adapter.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/gradcheck.hpp"
#include "support/random_data.hpp"
#include "support/rank_plans.hpp"

namespace bottleneck_test {

namespace qd = qdylora;
using qd::Errc;
using qd::GradientRows;
using qd::Index;
using qd::ScalePolicy;
using Double = qd::Matrix<double>;
using Float = qd::Matrix<float>;
using Placement = qd::BottleneckPlacement;
using test::code_of;
using test::same_bits;

namespace {

constexpr Index max_rank = 5;

template <class T>
qd::BottleneckAdapter<T> make_adapter(Index width, qd::LoRAOptions options, Placement placement) {
  qd::BottleneckAdapter<T> adapter(width, options, placement, qd::Cpu(1));
  qd::Rng rng(11);
  test::fill_normal(adapter.adapter().b().value.view(), rng, 0.5);
  return adapter;
}

std::vector<qd::RankPlan> plans(Index tokens) {
  auto result = test::rank_plans(max_rank, tokens);
  if (tokens >= 40) result.push_back(qd::RankPlan::of_runs({{20, 2}, {4, 0}, {tokens - 24, 4}}));  // products run by run
  return result;
}

template <class T>
struct Passed {
  qd::Matrix<T> y, dx;
};

// From outputs and gradients that hold something, which a sequential adapter replaces and a parallel one adds to.
template <class T>
Passed<T> pass(qd::BottleneckAdapter<T>& adapter, const qd::Matrix<T>& x, const qd::Matrix<T>& dy, const qd::RankPlan& plan) {
  adapter.set_ranks(plan);
  Passed<T> result{qd::clone(test::normal_matrix<T>(x.rows(), x.cols(), 21).view()),
                   qd::clone(test::normal_matrix<T>(x.rows(), x.cols(), 22).view())};
  typename qd::BottleneckAdapter<T>::Context context;
  adapter.forward(x.view(), result.y.view(), context);
  adapter.backward(dy.view(), result.dx.view(), context);
  return result;
}

template <class T>
void zero_gradients(const qd::BottleneckAdapter<T>& adapter) {
  for (const auto& p : adapter.parameters()) {
    std::fill_n(p->gradient.data(), p->gradient.size(), T{});
    p->touched.assign(p->touched.size(), false);
  }
}

// y . c, over rows of one width only where `rank` is not negative.
double loss(const qd::BottleneckAdapter<double>& adapter, const Double& x, const Double& c, Index rank = -1) {
  Double y = qd::clone(test::normal_matrix<double>(x.rows(), x.cols(), 21).view());
  qd::BottleneckAdapter<double>::Context context;
  adapter.forward(x.view(), y.view(), context);
  return test::product_sum(y.view(), c.view(), context.plan, rank);
}

void check_gradients(Index width, Index tokens, const qd::LoRAOptions& options, Placement placement) {
  auto adapter = make_adapter<double>(width, options, placement);
  adapter.set_training(true, 3);
  Double x = qd::clone(test::normal_matrix<double>(tokens, width, 13).view());
  const Double c = test::normal_matrix<double>(tokens, width, 14);
  const bool last_row = options.gradient_rows == GradientRows::last_row;
  for (const auto& plan : plans(tokens)) {
    CAPTURE(static_cast<int>(placement), plan.is_uniform(), plan.max_rank(), tokens, name(options.scale), options.dropout, last_row);
    zero_gradients(adapter);
    Passed<double> passed = pass(adapter, x, c, plan);
    const Double before = test::normal_matrix<double>(tokens, width, 22);
    if (placement == Placement::parallel)
      for (Index i = 0; i < before.size(); ++i) passed.dx.data()[i] -= before.data()[i];
    const auto of_x = test::check_gradient([&] { return loss(adapter, x, c); }, x.span(), passed.dx.span());
    CAPTURE(of_x.element, of_x.analytic, of_x.numeric);
    CHECK(of_x.ok());
    for (auto* p : {&adapter.adapter().a(), &adapter.adapter().b()})
      for (Index i = 0; i < max_rank; ++i) {
        const auto cols = static_cast<std::size_t>(p->value.cols());
        const auto value = p->value.span().subspan(static_cast<std::size_t>(i) * cols, cols);
        const auto gradient = p->gradient.span().subspan(static_cast<std::size_t>(i) * cols, cols);
        // Frozen: unit i learns from the tokens of width i + 1 alone.
        const auto report = test::check_gradient([&] { return loss(adapter, x, c, last_row ? i + 1 : -1); }, value, gradient);
        CAPTURE(p->name, i, report.element, report.analytic, report.numeric);
        CHECK(report.ok());
        bool trains = false;
        plan.for_each_run(plan.is_uniform() ? 1 : tokens,
                          [&](Index, Index, Index rank) { trains = trains || (last_row ? rank == i + 1 : rank > i); });
        CHECK(p->touched[static_cast<std::size_t>(i)] == trains);
        CHECK(std::all_of(gradient.begin(), gradient.end(), [](double g) { return g == 0.0; }) != trains);
      }
  }
}

}  // namespace

TEST_CASE("gradients of a bottleneck agree with central differences at every width") {
  for (const auto placement : {Placement::sequential, Placement::parallel})
    for (const auto scale : {ScalePolicy::constant, ScalePolicy::over_rank, ScalePolicy::over_sqrt_rank})
      for (const auto rows : {GradientRows::prefix, GradientRows::last_row})
        for (const float dropout : {0.0f, 0.3f})
          for (const Index tokens : {3, 9})
            check_gradients(7, tokens, {.max_rank = max_rank, .alpha = 3.0f, .scale = scale, .gradient_rows = rows, .dropout = dropout,
                                        .seed = 5, .layer = 2}, placement);
}

TEST_CASE("so do those of rows that have products run by run") {
  for (const auto placement : {Placement::sequential, Placement::parallel})
    check_gradients(6, 40, {.max_rank = max_rank, .alpha = 3.0f, .scale = ScalePolicy::over_rank}, placement);
}

TEST_CASE("a bottleneck is x + s B^T gelu(A x) of its first units, or that without x beside something") {
  constexpr Index width = 6, tokens = 5;
  for (const auto placement : {Placement::sequential, Placement::parallel})
    for (const auto scale : {ScalePolicy::constant, ScalePolicy::over_rank, ScalePolicy::over_sqrt_rank}) {
      auto adapter = make_adapter<double>(width, {.max_rank = max_rank, .alpha = 3.0f, .scale = scale}, placement);
      const Double x = test::normal_matrix<double>(tokens, width, 1), before = test::normal_matrix<double>(tokens, width, 21);
      const auto ranks = std::vector<Index>{1, 0, 5, 3, 2};
      const auto passed = pass(adapter, x, x, qd::RankPlan::per_row(ranks));
      for (Index t = 0; t < tokens; ++t) {
        const Index rank = ranks[static_cast<std::size_t>(t)];
        const double s = scale == ScalePolicy::constant    ? 3.0 / max_rank
                         : scale == ScalePolicy::over_rank ? 3.0 / static_cast<double>(rank)
                                                           : 3.0 / std::sqrt(static_cast<double>(rank));
        for (Index j = 0; j < width; ++j) {
          double expected = placement == Placement::sequential ? x(t, j) : before(t, j);
          for (Index i = 0; i < rank; ++i) {
            double z = 0.0;
            for (Index k = 0; k < width; ++k) z += adapter.adapter().a().value(i, k) * x(t, k);
            expected += s * 0.5 * z * (1.0 + std::erf(z / std::sqrt(2.0))) * adapter.adapter().b().value(i, j);
          }
          CHECK(passed.y(t, j) == Approx(expected).epsilon(1e-12).margin(1e-12));
        }
      }
    }
}

TEST_CASE("a width of a bottleneck is the bottleneck cut to it, bit for bit") {
  constexpr Index width = 96, units = 16;
  for (const auto placement : {Placement::sequential, Placement::parallel})
    for (const auto scale : {ScalePolicy::constant, ScalePolicy::over_rank})
      for (const Index rank : {1, 2, 4, 8})
        for (const Index tokens : {1, 7, 40}) {
          CAPTURE(rank, tokens, name(scale));
          auto wide = make_adapter<float>(width, {.max_rank = units, .alpha = 8.0f, .scale = scale}, placement);
          const float alpha = scale == ScalePolicy::constant ? 8.0f * static_cast<float>(rank) / static_cast<float>(units) : 8.0f;
          auto cut = make_adapter<float>(width, {.max_rank = rank, .alpha = alpha, .scale = scale}, placement);
          qd::copy(std::as_const(wide.adapter().a().value).view().top_rows(rank), cut.adapter().a().value.view());
          qd::copy(std::as_const(wide.adapter().b().value).view().top_rows(rank), cut.adapter().b().value.view());
          const Float x = test::normal_matrix<float>(tokens, width, 3), dy = test::normal_matrix<float>(tokens, width, 4);
          const auto expected = pass(cut, x, dy, qd::RankPlan::uniform(rank)), found = pass(wide, x, dy, qd::RankPlan::uniform(rank));
          CHECK(same_bits(found.y.view(), expected.y.view()));
          CHECK(same_bits(found.dx.view(), expected.dx.view()));
          const auto same_gradient = [&](auto& of_wide, auto& of_cut) {
            return same_bits(std::as_const(of_wide.gradient).view().top_rows(rank), std::as_const(of_cut.gradient).view());
          };
          CHECK(same_gradient(wide.adapter().a(), cut.adapter().a()));
          CHECK(same_gradient(wide.adapter().b(), cut.adapter().b()));
        }
}

TEST_CASE("a batch of mixed widths equals batches of one width row by row, bit for bit") {
  constexpr Index width = 100;
  const float dropout = GENERATE(0.0f, 0.2f);
  for (const auto placement : {Placement::sequential, Placement::parallel}) {
    auto adapter = make_adapter<float>(
        width, {.max_rank = 20, .alpha = 8.0f, .scale = ScalePolicy::over_rank, .dropout = dropout}, placement);
    for (const Index tokens : {5, 33, 80}) {
      CAPTURE(static_cast<int>(placement), tokens, dropout);
      const Float x = test::normal_matrix<float>(tokens, width, 5), dy = test::normal_matrix<float>(tokens, width, 6);
      constexpr Index choice[] = {0, 1, 4, 7, 20};
      std::vector<Index> by_lot, by_run;
      qd::Rng rng(4);
      for (Index i = 0; i < tokens; ++i) {
        by_lot.push_back(choice[rng.below(5)]);
        by_run.push_back(choice[static_cast<std::size_t>(i / 20)]);
      }
      for (const auto& ranks : {by_lot, by_run}) {
        const auto mixed = pass(adapter, x, dy, qd::RankPlan::per_row(ranks));
        bool same = true;
        for (const Index rank : choice) {
          const auto single = pass(adapter, x, dy, qd::RankPlan::uniform(rank));
          for (Index row = 0; row < tokens; ++row)
            if (ranks[static_cast<std::size_t>(row)] == rank)
              same = same && same_bits(mixed.y.view().middle_rows(row, 1), single.y.view().middle_rows(row, 1)) &&
                     same_bits(mixed.dx.view().middle_rows(row, 1), single.dx.view().middle_rows(row, 1));
        }
        CHECK(same);
      }
    }
  }
}

TEST_CASE("a bottleneck of width 0, and one that has not learned, is as if it were absent") {
  const Float x = test::normal_matrix<float>(9, 24, 5), dy = test::normal_matrix<float>(9, 24, 6);
  const Float y = test::normal_matrix<float>(9, 24, 21), dx = test::normal_matrix<float>(9, 24, 22);  // what pass begins with
  for (const auto placement : {Placement::sequential, Placement::parallel}) {
    const bool sequential = placement == Placement::sequential;
    auto off = make_adapter<float>(24, {.max_rank = 4}, placement);
    const auto without = pass(off, x, dy, qd::RankPlan::uniform(0));
    CHECK(same_bits(without.y.view(), (sequential ? x : y).view()));
    CHECK(same_bits(without.dx.view(), (sequential ? dy : dx).view()));
    for (const auto& p : off.parameters())
      for (const float g : p->gradient.span()) CHECK(g == 0.0f);
    qd::BottleneckAdapter<float> fresh(24, {.max_rank = 4}, placement);
    const auto begun = pass(fresh, x, dy, qd::RankPlan::uniform(4));
    CHECK(test::largest_difference(begun.y.view(), (sequential ? x : y).view()) == 0.0);
    CHECK(test::largest_difference(begun.dx.view(), (sequential ? dy : dx).view()) == 0.0);
    CHECK(std::ranges::any_of(fresh.adapter().b().gradient.span(), [](float g) { return g != 0.0f; }));
  }
}

TEST_CASE("a bottleneck computes dx alone, gradients alone, or both, with the same bits") {
  const float dropout = GENERATE(0.0f, 0.25f);
  constexpr Index tokens = 20, width = 40;
  const auto make = [&] { return make_adapter<float>(width, {.max_rank = 6, .dropout = dropout}, Placement::sequential); };
  const Float x = test::normal_matrix<float>(tokens, width, 3), dy = test::normal_matrix<float>(tokens, width, 4);
  auto both = make(), gradients = make(), only_dx = make();
  Float y(tokens, width), dx(tokens, width), dx2(tokens, width);
  qd::BottleneckAdapter<float>::Context context;
  both.forward(x.view(), y.view(), context);
  both.backward(dy.view(), dx.view(), context);
  gradients.forward(x.view(), y.view(), context);
  gradients.backward(dy.view(), {}, context);
  only_dx.forward(x.view(), y.view(), context);
  only_dx.backward(dy.view(), dx2.view(), context, qd::GradientMode::ignore);
  CHECK(same_bits(dx.view(), dx2.view()));
  for (std::size_t i = 0; i < 2; ++i) {
    CHECK(same_bits(both.parameters()[i]->gradient.view(), gradients.parameters()[i]->gradient.view()));
    for (const float g : only_dx.parameters()[i]->gradient.span()) CHECK(g == 0.0f);
  }
}

TEST_CASE("what a caller can do wrong with a bottleneck is a typed error that names it") {
  const std::string adapter_name = "model.layers.3.mlp_adapter";
  const auto fails = [&](Errc code, auto call, const std::string& word) {
    const auto error = test::error_of(call);
    REQUIRE(error);
    CAPTURE(std::string(error->what()));
    CHECK(error->code() == code);
    CHECK(std::string(error->what()).find(adapter_name) != std::string::npos);
    CHECK(std::string(error->what()).find(word) != std::string::npos);
  };
  using Adapter = qd::BottleneckAdapter<float>;
  fails(Errc::unsupported, [&] { Adapter(8, {.max_rank = 4, .name = adapter_name, .gated_ranks = {2}}); }, "gates");
  fails(Errc::unsupported, [&] { Adapter(8, {.max_rank = 4, .name = adapter_name, .dora = true}); }, "magnitude");
  fails(Errc::rank_range, [&] { Adapter(8, {.max_rank = 0, .name = adapter_name}); }, "max_rank");
  Adapter adapter(8, {.max_rank = 4, .name = adapter_name});
  fails(Errc::rank_range, [&] { adapter.set_rank(5); }, "5");
  fails(Errc::rank_range, [&] { adapter.set_ranks(qd::RankPlan::of_runs({{2, 1}, {1, 9}})); }, "9");
  Float x(3, 8), y(3, 8), dx(3, 8), narrow(3, 7);
  Adapter::Context context;
  fails(Errc::state_order, [&] { adapter.backward(y.view(), dx.view(), context); }, "backward before forward");
  fails(Errc::shape_mismatch, [&] { adapter.forward(narrow.view(), y.view(), context); }, "[3, 7]");
  fails(Errc::shape_mismatch, [&] { adapter.forward(x.view(), narrow.view(), context); }, "[3, 7]");
  fails(Errc::bad_argument, [&] { adapter.forward(x.view(), x.view(), context); }, "y is x");
  adapter.set_ranks(qd::RankPlan::of_runs({{2, 1}}));
  fails(Errc::shape_mismatch, [&] { adapter.forward(x.view(), y.view(), context); }, "2 rows");
  fails(Errc::state_order, [&] { adapter.backward(y.view(), dx.view(), context); }, "backward before forward");
  adapter.set_rank(4);
  adapter.forward(x.view(), y.view(), context);
  fails(Errc::shape_mismatch, [&] { adapter.backward(narrow.view(), dx.view(), context); }, "[3, 7]");
  fails(Errc::shape_mismatch, [&] { adapter.backward(y.view(), narrow.view(), context); }, "[3, 7]");
  fails(Errc::bad_argument, [&] { adapter.backward(y.view(), y.view(), context); }, "dx is dy");
  Float none(0, 8), nothing(0, 8);
  adapter.forward(none.view(), nothing.view(), context);
  adapter.backward(none.view(), nothing.view(), context);
}

TEST_CASE("a frozen layer is one at rank 0 without parameters") {
  using Layer = qd::DynamicLoRALinear<float>;
  Layer layer(test::normal_matrix<float>(16, 24, 1, 0.1), {.max_rank = 4});
  auto frozen = Layer::frozen(layer.base(), "fc");
  CHECK(frozen.parameters().empty());
  CHECK(frozen.adapter().max_rank() == 0);
  CHECK(code_of([&] { frozen.set_rank(1); }) == Errc::rank_range);
  CHECK(code_of([&] { Layer::frozen(nullptr, "fc"); }) == Errc::bad_argument);
  const Float x = test::normal_matrix<float>(5, 24, 2), dy = test::normal_matrix<float>(5, 16, 3);
  layer.set_rank(0);
  CHECK(same_bits(frozen.forward(x), layer.forward(x)));
  CHECK(same_bits(frozen.backward(dy.view()), layer.backward(dy.view())));
}

TEST_CASE("adapter methods have names") {
  using qd::AdapterMethod;
  for (const auto method : {AdapterMethod::lora, AdapterMethod::houlsby, AdapterMethod::parallel})
    CHECK(qd::adapter_method(name(method)) == method);
  const auto error = test::error_of([] { qd::adapter_method("prefix"); });
  REQUIRE(error);
  CHECK(error->code() == Errc::bad_argument);
  CHECK(std::string(error->what()).find("lora, houlsby, parallel") != std::string::npos);
}

}  // namespace bottleneck_test
