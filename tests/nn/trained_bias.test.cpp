// Biases that train with an adapter (LoRAOptions::train_bias): outputs, gradients, what rank 0 is, and what they do not go with.
#include <algorithm>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/io/gguf_adapter.hpp>
#include <qdylora/io/peft.hpp>
#include <qdylora/nn/bottleneck_adapter.hpp>
#include <qdylora/nn/dense_linear.hpp>
#include <qdylora/nn/multi_lora_linear.hpp>
#include <qdylora/nn/weighted_sum.hpp>
#include <qdylora/optim/adamw.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/gradcheck.hpp"
#include "support/random_data.hpp"
#include "support/rank_plans.hpp"

namespace trained_bias_nn_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using test::code_of;
using Double = qd::Matrix<double>;

namespace {

constexpr Index in = 7, out = 6, max_rank = 5;

template <class T = double, class Format = qd::NF4>
qd::DynamicLoRALinear<T, qd::Cpu, Format> layer_of(qd::LoRAOptions options, bool biased = true) {
  using Acc = qd::Accumulator<T>;
  options.max_rank = max_rank;
  options.seed = 5;
  qd::DynamicLoRALinear<T, qd::Cpu, Format> layer(test::normal_matrix<Acc>(out, in, 1, 0.4), options, {}, qd::Cpu(1));
  if (biased) layer.set_bias(test::normal_matrix<Acc>(1, out, 2).view());
  qd::Rng rng(3);
  test::fill_normal(layer.adapter().b().value.view(), rng, 0.5);
  return layer;
}

bool same(const qd::Matrix<float>& a, const qd::Matrix<float>& b) { return test::same_bits(a.view(), b.view()); }

}  // namespace

TEST_CASE("gradients of trained biases, and of all else beside them, agree with central differences at every rank") {
  for (const bool dora : {false, true})
    for (const float dropout : {0.0f, dora ? 0.0f : 0.3f})  // with dropout the norms of DoRA are held: tests/nn/magnitude.test.cpp
      for (const Index tokens : {3, 40}) {
        auto layer = layer_of({.alpha = 3.0f, .dropout = dropout, .dora = dora, .train_bias = true});
        if (dora) layer.set_training(false);
        auto& bias = std::as_const(layer).adapter().bias();
        CHECK(std::equal(bias.value.data(), bias.value.data() + out, layer.bias().data));
        qd::Rng rng(9);
        test::fill_normal(layer.adapter().bias().value.view(), rng);
        if (dora) layer.set_training(false);
        const auto parameters = layer.parameters();
        REQUIRE(parameters.size() == (dora ? 4u : 3u));
        CHECK(parameters.back()->name.ends_with(".bias"));
        Double x = test::normal_matrix<double>(tokens, in, 13);
        const Double c = test::normal_matrix<double>(tokens, out, 14);
        Double y(tokens, out), dx(tokens, in);
        auto plans = test::rank_plans(max_rank, tokens);
        plans.push_back(qd::RankPlan::uniform(0));
        for (const auto& plan : plans) {
          CAPTURE(dora, dropout, tokens, plan.max_rank(), plan.is_uniform());
          layer.set_ranks(plan);
          for (const auto& p : parameters) {
            std::fill_n(p->gradient.data(), p->gradient.size(), 0.0);
            p->touched.assign(p->touched.size(), false);
          }
          typename decltype(layer)::Context context;
          layer.forward(x.view(), y.view(), context);
          layer.backward(c.view(), dx.view(), context);
          const auto loss = [&] {
            layer.forward(x.view(), y.view(), context);
            return test::product_sum(y.view(), c.view(), plan);
          };
          const auto check = [&](const std::string& name, std::span<double> values, std::span<const double> gradient) {
            const auto report = test::check_gradient(loss, values, gradient, {.absolute = 1e-7, .relative = 1e-6});
            CAPTURE(name, report.element, report.analytic, report.numeric);
            CHECK(report.ok());
          };
          loss();
          check("x", x.span(), dx.span());
          for (const auto& p : parameters) check(p->name, p->value.span(), p->gradient.span());
          CHECK(bias.touched.front() == (plan.max_rank() > 0));
          layer.backward(c.view(), dx.view(), context, qd::GradientMode::ignore);
        }
      }
}

TEST_CASE("rows of rank 0 have the layer's own bias, to the bit") {
  auto layer = layer_of<float>({.train_bias = true});
  auto plain = layer_of<float>({});
  qd::Rng rng(4);
  test::fill_normal(layer.adapter().bias().value.view(), rng);
  const auto x = test::normal_matrix<float>(5, in, 6);
  const auto rows = [&](auto& of, const qd::RankPlan& plan) {
    of.set_ranks(plan);
    return qd::clone(of.forward(x));
  };
  const auto base = rows(plain, qd::RankPlan::uniform(0)), all = rows(layer, qd::RankPlan::uniform(max_rank)),
             mixed = rows(layer, qd::RankPlan::per_row(std::vector<Index>{0, max_rank, 0, 0, max_rank}));
  CHECK(same(rows(layer, qd::RankPlan::uniform(0)), base));
  for (Index t = 0; t < 5; ++t)
    for (Index o = 0; o < out; ++o) {
      CAPTURE(t, o);
      if (t == 1 || t == 4) CHECK(std::abs(mixed(t, o) - all(t, o)) < 1e-5f);
      else CHECK(mixed(t, o) == base(t, o));
    }
}

TEST_CASE("a layer without a bias has none that trains") {
  const auto layer = layer_of<float>({.train_bias = true}, false);
  CHECK(layer.parameters().size() == 2);
  CHECK_FALSE(layer.adapter().biased());
}

TEST_CASE("several adapters on one base train a bias each, with the bits of separate layers") {
  const auto layers_on_one_base = [] {
    std::vector<qd::DynamicLoRALinear<float>> layers;
    layers.push_back(layer_of<float>({.train_bias = true}));
    layers.emplace_back(layers[0].base(), qd::LoRAOptions{.max_rank = max_rank, .seed = 7, .name = "second", .train_bias = true}, qd::Cpu(1));
    layers[1].set_bias(layers[0].bias());
    return layers;
  };
  CHECK(code_of([&] { qd::MultiLoRALinear<float>(layers_on_one_base(), qd::BaseProduct::shared); }) == Errc::unsupported);
  auto apart = layers_on_one_base();
  qd::MultiLoRALinear<float> together(layers_on_one_base());
  const auto x = test::normal_matrix<float>(6, in, 6), dy = test::normal_matrix<float>(6, out, 7);
  together.set_plan(qd::AdapterPlan::of_runs({{4, 0, max_rank}, {2, 1, max_rank}}));
  const auto y = qd::clone(together.forward(x));
  together.backward(dy.view());
  Index first = 0;
  for (const auto& [adapter, rows] : {std::pair<std::size_t, Index>{0, 4}, {1, 2}}) {
    auto& layer = apart[adapter];
    layer.set_rank(max_rank);
    const auto own = layer.forward(qd::MatrixView<const float>(x.view()).middle_rows(first, rows));
    for (Index t = 0; t < rows; ++t)
      for (Index o = 0; o < out; ++o) CHECK(own(t, o) == y(first + t, o));
    layer.backward(qd::MatrixView<const float>(dy.view()).middle_rows(first, rows));
    CHECK(same(layer.adapter().bias().gradient, together.at(static_cast<Index>(adapter)).adapter().bias().gradient));
    first += rows;
  }
}

TEST_CASE("an optimizer steps a trained bias, and not one that had no rows") {
  auto layer = layer_of<float>({.train_bias = true});
  qd::AdamW<float> optimizer(layer.parameters(), {.lr = 0.1});
  const auto x = test::normal_matrix<float>(4, in, 6), dy = test::normal_matrix<float>(4, out, 7);
  const auto before = qd::clone(layer.bias());
  for (const Index rank : {0, 2}) {
    layer.set_rank(rank);
    optimizer.zero_grad();
    layer.forward(x);
    layer.backward(dy.view());
    optimizer.step();
    CHECK(same(layer.adapter().bias().value, before) == (rank == 0));
  }
}

TEST_CASE("what has no place for a trained bias says so") {
  auto layer = layer_of<float>({.train_bias = true});
  layer.set_rank(2);
  const auto x = test::normal_matrix<float>(4, in, 6);
  qd::Matrix<float> y(4, out);
  decltype(layer)::Context context;
  CHECK(code_of([&] { layer.forward_adapter(x.view(), y.view(), context); }) == Errc::unsupported);
  const std::vector<qd::WeightedAdapter<float>> terms = {{&layer.adapter(), 1.0f}};
  CHECK(code_of([&] { qd::weighted_sum<float>(terms); }) == Errc::unsupported);
  CHECK(code_of([&] { qd::update_of_weight(layer.adapter(), 2, {}); }) == Errc::unsupported);
  CHECK(code_of([&] {
          qd::BottleneckAdapter<float>(8, {.train_bias = true}, qd::BottleneckPlacement::parallel);
        }) == Errc::unsupported);
  const test::TemporaryFolder folder;
  const std::vector<qd::GgufAdapterTensor> tensors = {{"blk.0.attn_q.weight", &layer.adapter()}};
  CHECK(code_of([&] { qd::save_gguf_adapter(folder / "a.gguf", tensors); }) == Errc::unsupported);

  // A bias on one side alone.
  qd::save_peft_adapter(folder / "biased", {{"q", &layer.adapter()}});
  auto plain = layer_of<float>({});
  qd::save_peft_adapter(folder / "plain", {{"q", &plain.adapter()}});
  const auto biased_module = qd::load_peft_adapter(folder / "biased"), plain_module = qd::load_peft_adapter(folder / "plain");
  CHECK(code_of([&] { qd::assign(*biased_module.find("q"), plain.adapter()); }) == Errc::bad_config);
  CHECK(code_of([&] { qd::assign(*plain_module.find("q"), layer.adapter()); }) == Errc::bad_config);
  CHECK(same(qd::to_adapter(*biased_module.find("q")).bias().value, layer.adapter().bias().value));
}

TEST_CASE("a bias that is set again is the parameter that an optimizer has") {
  auto layer = layer_of<float>({.train_bias = true});
  const auto* const before = &layer.adapter().bias();
  layer.set_bias(test::normal_matrix<float>(1, out, 12).view());
  CHECK(&layer.adapter().bias() == before);
  CHECK(same(before->value, test::normal_matrix<float>(1, out, 12)));
  qd::DenseLinear<float> dense(test::normal_matrix<float>(out, in, 1));
  dense.set_bias(test::normal_matrix<float>(1, out, 2).view());
  const auto parameter = dense.parameters().back();
  dense.set_bias(test::normal_matrix<float>(1, out, 3).view());
  CHECK(dense.parameters().back() == parameter);
  CHECK(same(parameter->value, test::normal_matrix<float>(1, out, 3)));
}

}  // namespace trained_bias_nn_test
