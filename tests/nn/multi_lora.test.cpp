// Several adapters in one batch: each row's output, each row's dx and each adapter's gradients are those of separate passes, bit for bit.
#include <string>
#include <utility>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/nn/multi_lora_linear.hpp>
#include <qdylora/optim/adamw.hpp>

#include "support/catch.hpp"
#include "support/counting_backend.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/gradcheck.hpp"
#include "support/random_data.hpp"

namespace multi_lora_test {

namespace qd = qdylora;
using qd::AdapterPlan;
using qd::BaseProduct;
using qd::Errc;
using qd::Index;
using qd::LoRAOptions;
using test::same_bits;

namespace {

constexpr Index in = 96, out = 72;

// Adapters of different ranks, scales and kinds. B is not zero, nor are gates one.
template <class T>
std::vector<qd::DynamicLoRALinear<T>> make_layers(std::vector<LoRAOptions> options, qd::Cpu cpu = {}) {
  using Acc = qd::Accumulator<T>;
  std::vector<qd::DynamicLoRALinear<T>> layers;
  for (std::uint32_t i = 0; i < options.size(); ++i) {
    auto& o = options[i];
    o.layer = i;
    o.name = "adapter " + std::to_string(i);
    if (i == 0) layers.emplace_back(test::normal_matrix<Acc>(out, in, 1, 0.1), o, qd::QuantizeOptions{}, cpu);
    else layers.emplace_back(layers.front().base(), o, cpu);
    auto& layer = layers.back();
    qd::Rng rng(20 + i);
    test::fill_normal(layer.adapter().b().value.view(), rng, 0.1);
    if (layer.adapter().gated()) test::fill_normal(layer.adapter().gates().value.view(), rng);
    layer.set_bias(test::normal_matrix<Acc>(1, out, 2).view());
    layer.set_training(true, 3);
  }
  return layers;
}

const std::vector<LoRAOptions> plain = {{.max_rank = 8},
                                        {.max_rank = 4, .alpha = 4, .scale = qd::ScalePolicy::over_rank},
                                        {.max_rank = 20}};
const std::vector<LoRAOptions> of_all_kinds = {{.max_rank = 8, .dropout = 0.2f},
                                               {.max_rank = 4, .gated_ranks = {2, 4}},
                                               {.max_rank = 20, .gradient_rows = qd::GradientRows::last_row},
                                               {.max_rank = 6, .dora = true},
                                               {.max_rank = 6, .dropout = 0.1f, .dora = true}};

// Rows dealt out in turns of 1 to 3 rows, at different ranks, as many to an adapter as its number says.
AdapterPlan interleaved(std::vector<Index> counts, const std::vector<LoRAOptions>& options) {
  qd::Rng rng(7);
  std::vector<AdapterPlan::Run> runs;
  for (bool any = true; any;) {
    any = false;
    for (std::size_t k = 0; k < counts.size(); ++k) {
      const Index rows = std::min<Index>(counts[k], 1 + static_cast<Index>(rng.below(3)));
      counts[k] -= rows;
      any |= rows > 0;
      if (rows > 0) runs.push_back({rows, static_cast<Index>(k), static_cast<Index>(rng.below(options[k].max_rank + 1))});
    }
  }
  return AdapterPlan::of_runs(std::move(runs));
}

template <class T>
qd::Matrix<T> rows_of(const qd::Matrix<T>& x, const std::vector<Index>& rows) {
  qd::Matrix<T> some(static_cast<Index>(rows.size()), x.cols());
  qd::Cpu().gather_rows(x.view(), std::span<const Index>(rows), some.view());
  return some;
}

template <class Layer>
bool same_gradients(const Layer& a, const Layer& b) {
  auto all_a = a.adapter().parameters(), all_b = b.adapter().parameters();
  for (const auto& [all, layer] : {std::pair(&all_a, &a), std::pair(&all_b, &b)})
    for (const auto& p : layer->adapter().gate_parameters()) all->push_back(p);
  bool same = all_a.size() == all_b.size();
  for (std::size_t i = 0; same && i < all_a.size(); ++i)
    same = same_bits(all_a[i]->gradient.view(), all_b[i]->gradient.view()) && all_a[i]->touched == all_b[i]->touched;
  return same;
}

// Two passes by `plan` against each adapter's own.
template <class T>
void check_separate(const std::vector<LoRAOptions>& options, const AdapterPlan& plan, BaseProduct product, bool same_products = true,
                    const qd::Cpu& cpu = {}) {
  qd::MultiLoRALinear<T> mixed(make_layers<T>(options, cpu), product);
  auto alone = make_layers<T>(options, cpu);
  mixed.set_plan(plan);
  const Index rows = plan.rows();
  for (std::uint64_t pass = 0; pass < 2; ++pass) {
    const auto x = test::normal_matrix<T>(rows, in, 5 + pass), dy = test::normal_matrix<T>(rows, out, 8 + pass);
    const auto y = qd::clone(mixed.forward(x)), dx = qd::clone(mixed.backward(dy.view()));
    Index seen = 0;
    for (const auto& share : plan.shares(rows)) {
      CAPTURE(share.adapter, share.rows.size(), pass);
      auto& layer = alone[static_cast<std::size_t>(share.adapter)];
      layer.set_ranks(share.ranks);
      const auto own_x = rows_of(x, share.rows), own_dy = rows_of(dy, share.rows);
      const auto own_y = layer.forward(own_x), own_dx = layer.backward(own_dy.view());
      if (same_products) {
        CHECK(same_bits(rows_of(y, share.rows).view(), own_y));
        CHECK(same_bits(rows_of(dx, share.rows).view(), own_dx));
      } else {
        CHECK(test::normalised_squared_error(rows_of(y, share.rows).view(), own_y) < 1e-12);
        CHECK(test::normalised_squared_error(rows_of(dx, share.rows).view(), own_dx) < 1e-12);
      }
      seen += own_y.rows;
    }
    CHECK(seen == rows);
    for (Index k = 0; k < mixed.adapters(); ++k) {
      CAPTURE(k);
      CHECK(same_gradients(std::as_const(mixed).at(k), std::as_const(alone[static_cast<std::size_t>(k)])));
    }
  }
}

}  // namespace

TEMPLATE_TEST_CASE("a mixed batch is its adapters' separate passes, bit for bit", "", float, qd::bfloat16, double) {
  // few rows and many, none at all, one adapter alone
  for (const auto& counts : std::vector<std::vector<Index>>{{1, 3, 2}, {7, 40, 18}, {5, 0, 9}, {0, 0, 33}, {0, 12, 0}})
    check_separate<TestType>(plain, interleaved(counts, plain), BaseProduct::by_adapter);
}

TEST_CASE("so it is with every instruction set and in 16 bits") {
  for (const auto isa : {qd::Isa::generic, qd::Isa::avx2, qd::Isa::avx512})
    if (qd::supported(isa))
      for (const auto compute : {qd::Compute::exact, qd::Compute::bits16})
        check_separate<float>(plain, interleaved({1, 11, 40}, plain), BaseProduct::by_adapter, true,
                              qd::Cpu(2).with_isa(isa).with_compute(compute));
}

TEMPLATE_TEST_CASE("and with dropout, gates, gradients of one row, and magnitudes", "", float, qd::bfloat16) {
  check_separate<TestType>(of_all_kinds, interleaved({6, 20, 3, 9, 5}, of_all_kinds), BaseProduct::by_adapter);
}

TEST_CASE("runs that stand in the adapters' order need no rows moved") {
  const auto plan = AdapterPlan::of_runs({{5, 0, 8}, {4, 0, 2}, {17, 2, 20}});
  check_separate<float>(plain, plan, BaseProduct::by_adapter);
  qd::MultiLoRALinear<float> layer(make_layers<float>(plain));
  layer.set_plan(plan);
  decltype(layer)::Context context;
  const auto x = test::normal_matrix<float>(26, in, 5);
  qd::Matrix<float> y(26, out);
  layer.forward(x.view(), y.view(), context);
  CHECK(context.x.size() == 0);
}

TEST_CASE("one product with the base serves all adapters, with separate passes' bits from 32 rows an adapter on") {
  for (const auto isa : {qd::Isa::generic, qd::Isa::avx2, qd::Isa::avx512})
    if (qd::supported(isa)) {
      const auto cpu = qd::Cpu(2).with_isa(isa).with_compute(qd::Compute::exact);
      const auto plan = interleaved({32, 50, 33}, plain);
      check_separate<float>(plain, plan, BaseProduct::shared, true, cpu);
      check_separate<double>(plain, plan, BaseProduct::shared, true, cpu);
      check_separate<qd::half>(plain, plan, BaseProduct::shared, true, cpu);
    }
  check_separate<float>(plain, interleaved({1, 3, 12}, plain), BaseProduct::shared, false);  // gradients have their bits all the same
  const std::vector<LoRAOptions> kinds(of_all_kinds.begin(), of_all_kinds.begin() + 3);
  check_separate<float>(kinds, interleaved({40, 32, 35}, kinds), BaseProduct::shared, true, qd::Cpu().with_compute(qd::Compute::exact));
}

TEST_CASE("a batch is multiplied with the base once for each adapter that has rows, or once") {
  const test::CountingBackend backend;
  qd::DynamicLoRALinear<float, test::CountingBackend> first(test::normal_matrix<float>(out, in, 1), {.max_rank = 4}, {}, backend);
  const auto x = test::normal_matrix<float>(12, in, 3), dy = test::normal_matrix<float>(12, out, 4);
  for (const auto& [product, times] : {std::pair(BaseProduct::by_adapter, 2), std::pair(BaseProduct::shared, 1)}) {
    const std::vector<LoRAOptions> options(3, {.max_rank = 4});
    qd::MultiLoRALinear<float, test::CountingBackend> layer(first.base(), options, product, backend);
    layer.set_plan(AdapterPlan::of_runs({{4, 2, 1}, {4, 0, 4}, {4, 2, 3}}));
    backend.forget();
    layer.forward(x);
    CHECK(backend.counts().matmul_quantized == times);
    layer.backward(dy.view());
    CHECK(backend.counts().matmul_transposed_quantized == times);
  }
}

TEST_CASE("gradients of mixed adapters agree with central differences") {
  constexpr Index tokens = 9;
  for (const auto product : {BaseProduct::by_adapter, BaseProduct::shared}) {
    qd::MultiLoRALinear<double> layer(make_layers<double>({{.max_rank = 3}, {.max_rank = 5, .alpha = 3}, {.max_rank = 2}}), product);
    layer.set_plan(AdapterPlan::of_runs({{2, 1, 5}, {1, 0, 3}, {1, 1, 2}, {2, 0, 0}, {3, 0, 1}}));
    qd::Matrix<double> x = test::normal_matrix<double>(tokens, in, 13);
    const auto c = test::normal_matrix<double>(tokens, out, 14);
    const auto loss = [&] {
      const auto y = layer.forward(x);
      double sum = 0.0;
      for (Index i = 0; i < tokens; ++i)
        for (Index j = 0; j < out; ++j) sum += c(i, j) * y(i, j);
      return sum;
    };
    loss();
    const auto dx = qd::clone(layer.backward(c.view()));
    CHECK(test::check_gradient(loss, x.span(), dx.span()).ok());
    for (const auto& p : layer.parameters()) {
      CAPTURE(p->name);
      CHECK(test::check_gradient(loss, p->value.span(), p->gradient.span()).ok());
    }
    for (const auto& p : layer.at(2).parameters())  // no rows
      for (std::size_t i = 0; i < p->gradient.span().size(); ++i) CHECK(p->gradient.span()[i] == 0.0);
  }
}

TEST_CASE("adapters trained in mixed batches are those trained apart, to the byte") {
  // Towards a target of its own each, with ranks that change from step to step.
  const std::vector<LoRAOptions> options = {{.max_rank = 8, .dropout = 0.1f}, {.max_rank = 4, .alpha = 4}};
  qd::MultiLoRALinear<float> mixed(make_layers<float>(options));
  auto alone = make_layers<float>(options);
  qd::AdamW<float> together(mixed.parameters(), {.lr = 1e-2});
  std::vector<qd::AdamW<float>> apart;
  for (auto& layer : alone) apart.emplace_back(layer.parameters(), qd::AdamWOptions{.lr = 1e-2});
  const auto initial = qd::clone(alone[1].adapter().b().value.view());
  qd::RankSampler ranks(qd::RankSet{1, 2, 4}, qd::Rng(3), {.granularity = qd::SamplerOptions::Granularity::row});
  for (std::uint32_t step = 0; step < 5; ++step) {
    const Index rows = 30;
    qd::Rng rng(step);
    std::vector<Index> adapters;
    for (Index i = 0; i < rows; ++i) adapters.push_back(static_cast<Index>(rng.below(2)));
    const auto plan = AdapterPlan::per_row(adapters, ranks.next(rows));
    const auto x = test::normal_matrix<float>(rows, in, 40 + step), target = test::normal_matrix<float>(rows, out, 60 + step);
    const auto step_of = [&](auto& layer, auto& optimizer, const qd::Matrix<float>& own_x, const qd::Matrix<float>& own_target) {
      layer.set_training(true, step);
      auto dy = qd::clone(layer.forward(own_x));
      for (Index i = 0; i < dy.rows(); ++i)
        for (Index j = 0; j < out; ++j) dy(i, j) -= own_target(i, j);
      optimizer.zero_grad();
      layer.backward(dy.view());
      optimizer.step();
    };
    mixed.set_plan(plan);
    step_of(mixed, together, x, target);
    const auto shares = plan.shares(rows);
    REQUIRE(shares.size() == 2);
    for (const auto& share : shares) {
      const auto k = static_cast<std::size_t>(share.adapter);
      alone[k].set_ranks(share.ranks);
      step_of(alone[k], apart[k], rows_of(x, share.rows), rows_of(target, share.rows));
    }
  }
  for (Index k = 0; k < 2; ++k) {
    auto& layer = alone[static_cast<std::size_t>(k)];
    CHECK(same_bits(mixed.at(k).adapter().a().value.view(), layer.adapter().a().value.view()));
    CHECK(same_bits(mixed.at(k).adapter().b().value.view(), layer.adapter().b().value.view()));
  }
  CHECK_FALSE(same_bits(initial.view(), mixed.at(1).adapter().b().value.view()));
}

TEST_CASE("mixed adapters refuse what does not fit, by name") {
  qd::MultiLoRALinear<float> layer(make_layers<float>(plain));
  using Layer = decltype(layer);
  CHECK(test::code_of([&] { layer.at(3); }) == Errc::bad_argument);
  CHECK(test::code_of([&] { layer.at(-1); }) == Errc::bad_argument);
  CHECK(test::code_of([&] { layer.set_plan(AdapterPlan::uniform(3, 1)); }) == Errc::bad_argument);
  const auto error = test::error_of([&] { layer.set_plan(AdapterPlan::of_runs({{1, 0, 8}, {1, 1, 5}})); });
  REQUIRE(error);
  CHECK(error->code() == Errc::rank_range);
  CHECK(std::string(error->what()).find("adapter 1") != std::string::npos);
  // and the plan is as it was: adapter 0 off
  const qd::Matrix<float> x(6, in), narrow(6, in - 1), dy(6, out), short_dy(5, out);
  CHECK(layer.forward(x).rows == 6);

  layer.set_plan(AdapterPlan::of_runs({{3, 0, 8}, {2, 1, 4}}));
  CHECK(test::code_of([&] { layer.forward(x); }) == Errc::shape_mismatch);
  CHECK(test::code_of([&] { layer.backward(dy.view()); }) == Errc::state_order);  // the pass failed
  layer.set_plan(AdapterPlan::of_runs({{3, 1, 4}, {3, 0, 8}}));
  CHECK(test::code_of([&] { layer.forward(narrow); }) == Errc::shape_mismatch);
  qd::Matrix<float> wide_y(6, out + 1), narrow_dx(6, in - 1), y(6, out);
  Layer::Context context;
  CHECK(test::code_of([&] { layer.backward(dy.view(), {}, context); }) == Errc::state_order);
  CHECK(test::code_of([&] { layer.forward(x.view(), wide_y.view(), context); }) == Errc::shape_mismatch);
  layer.forward(x.view(), y.view(), context);
  CHECK(test::code_of([&] { layer.backward(short_dy.view(), {}, context); }) == Errc::shape_mismatch);
  CHECK(test::code_of([&] { layer.backward(dy.view(), narrow_dx.view(), context); }) == Errc::shape_mismatch);
  layer.backward(dy.view(), {}, context, qd::GradientMode::ignore);

  CHECK(test::code_of([] { Layer(std::vector<Layer::Layer>{}); }) == Errc::bad_argument);
  auto two_bases = make_layers<float>(plain);
  two_bases.push_back(std::move(make_layers<float>(plain).front()));
  CHECK(test::code_of([&] { Layer(std::move(two_bases)); }) == Errc::bad_argument);
  CHECK(test::code_of([] { Layer(make_layers<float>({{.max_rank = 2, .dora = true}}), BaseProduct::shared); }) == Errc::unsupported);
  auto magnitude = make_layers<float>({{.max_rank = 2, .dora = true}});
  Layer::Layer::Context pass;
  CHECK(test::code_of([&] { magnitude.front().forward_adapter(x.view(), y.view(), pass); }) == Errc::unsupported);
  CHECK(test::code_of([&] { Layer(nullptr, {{.max_rank = 2}}); }) == Errc::bad_argument);
}

TEST_CASE("an empty batch passes through mixed adapters") {
  qd::MultiLoRALinear<float> layer(make_layers<float>(plain));
  const qd::Matrix<float> x(0, in), dy(0, out);
  for (const auto& plan : {AdapterPlan::uniform(1, 4), AdapterPlan::of_runs({}), AdapterPlan::of_runs({{0, 2, 3}})}) {
    layer.set_plan(plan);
    CHECK(layer.forward(x).rows == 0);
    CHECK(layer.backward(dy.view()).rows == 0);
  }
}

}  // namespace multi_lora_test
