// One base under several adapters, several passes in flight on one layer, and gradients gathered over micro-batches.
#include <memory>
#include <utility>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/random_data.hpp"

namespace sharing_test {

namespace qd = qdylora;
using qd::Index;
using Float = qd::Matrix<float>;
using Layer = qd::DynamicLoRALinear<float>;
using test::same_bits;

namespace {

constexpr Index in = 96, out = 72;

Layer make_layer(std::uint64_t seed = 1, float dropout = 0.0f) {
  return {test::normal_matrix<float>(out, in, 1, 0.1), {.max_rank = 8, .dropout = dropout, .seed = seed}};
}

void fill_b(Layer& layer, std::uint64_t seed) {
  qd::Rng rng(seed);
  test::fill_normal(layer.adapter().b().value.view(), rng, 0.1);
}

double error(const Float& a, const Float& b) { return test::normalised_squared_error(a.view(), b.view()); }

}  // namespace

TEST_CASE("adapters on one base do not disturb each other") {
  Layer first = make_layer(1), alone = make_layer(1);
  Layer second(first.base(), {.max_rank = 4, .alpha = 4.0f, .seed = 2});
  Layer third(first.base(), {.max_rank = 6, .seed = 3});
  CHECK(first.base().use_count() == 3);
  fill_b(first, 5);
  fill_b(alone, 5);
  fill_b(second, 6);
  const Float x = test::normal_matrix<float>(20, in, 7), x2 = test::normal_matrix<float>(20, in, 8);
  const Float dy = test::normal_matrix<float>(20, out, 9);
  const auto y_first = first.forward(x);
  second.forward(x2);
  third.forward(x);
  third.backward(dy.view());
  second.backward(dy.view());
  const auto dx_first = first.backward(dy.view());
  CHECK(same_bits(y_first, alone.forward(x)));
  CHECK(same_bits(dx_first, alone.backward(dy.view())));
  CHECK(same_bits(first.adapter().a().gradient.view(), alone.adapter().a().gradient.view()));
  CHECK(same_bits(first.adapter().b().gradient.view(), alone.adapter().b().gradient.view()));
  CHECK(second.adapter().max_rank() == 4);
}

TEST_CASE("a layer outlives the one whose base it shares") {
  std::unique_ptr<Layer> survivor;
  {
    const Layer first = make_layer();
    survivor = std::make_unique<Layer>(first.base(), qd::LoRAOptions{.max_rank = 2});
  }
  const Float x = test::normal_matrix<float>(9, in, 7);
  Layer again = make_layer();
  again.set_rank(0);
  survivor->set_rank(0);
  CHECK(same_bits(survivor->forward(x), again.forward(x)));
}

TEST_CASE("passes in flight keep to their contexts, whatever the order of their backward passes") {
  const float dropout = GENERATE(0.0f, 0.3f);
  const auto separate = [&](const Float& x, const Float& dy, Index rank, std::uint32_t step, Float& dx, Layer& layer) {
    Float y(x.rows(), out);
    Layer::Context context;
    layer.set_rank(rank);
    layer.set_training(true, step);
    layer.forward(x.view(), y.view(), context);
    dx = Float(x.rows(), in);
    layer.backward(dy.view(), dx.view(), context);
    return y;
  };
  const Float x1 = test::normal_matrix<float>(20, in, 2), x2 = test::normal_matrix<float>(33, in, 3);
  const Float dy1 = test::normal_matrix<float>(20, out, 4), dy2 = test::normal_matrix<float>(33, out, 5);
  Layer one_by_one = make_layer(1, dropout), together = make_layer(1, dropout);
  fill_b(one_by_one, 6);
  fill_b(together, 6);
  Float dx2, dx1;
  const Float y2 = separate(x2, dy2, 8, 1, dx2, one_by_one), y1 = separate(x1, dy1, 3, 0, dx1, one_by_one);

  Float a(20, out), b(33, out), da(20, in), db(33, in);
  Layer::Context first, second;
  together.set_rank(3);
  together.set_training(true, 0);
  together.forward(x1.view(), a.view(), first);
  together.set_rank(8);
  together.set_training(true, 1);
  together.forward(x2.view(), b.view(), second);
  together.set_rank(1);  // of no concern to passes that have begun
  together.set_training(false);
  together.backward(dy2.view(), db.view(), second);
  together.backward(dy1.view(), da.view(), first);
  CHECK(same_bits(a.view(), y1.view()));
  CHECK(same_bits(b.view(), y2.view()));
  CHECK(same_bits(da.view(), dx1.view()));
  CHECK(same_bits(db.view(), dx2.view()));
  CHECK(same_bits(together.adapter().a().gradient.view(), one_by_one.adapter().a().gradient.view()));
  CHECK(same_bits(together.adapter().b().gradient.view(), one_by_one.adapter().b().gradient.view()));
}

TEST_CASE("a context serves pass after pass, of any size and rank") {
  Layer layer = make_layer(1, 0.2f), fresh = make_layer(1, 0.2f);
  fill_b(layer, 6);
  fill_b(fresh, 6);
  Layer::Context reused;
  std::uint64_t seed = 10;
  const std::vector<std::pair<Index, Index>> passes = {{40, 8}, {3, 2}, {12, 0}, {60, 5}, {1, 8}, {0, 3}, {9, 4}};
  for (const auto& [tokens, rank] : passes) {
    CAPTURE(tokens, rank);
    const Float x = test::normal_matrix<float>(tokens, in, seed++), dy = test::normal_matrix<float>(tokens, out, seed++);
    const bool training = seed % 4 != 0;  // with and without dropout
    Float y(tokens, out), dx(tokens, in), y2(tokens, out), dx2(tokens, in);
    Layer::Context context;
    for (auto* l : {&layer, &fresh}) {
      l->set_rank(rank);
      l->set_training(training);
    }
    layer.forward(x.view(), y.view(), reused);
    layer.backward(dy.view(), dx.view(), reused);
    fresh.forward(x.view(), y2.view(), context);
    fresh.backward(dy.view(), dx2.view(), context);
    CHECK(same_bits(y.view(), y2.view()));
    CHECK(same_bits(dx.view(), dx2.view()));
  }
  CHECK(same_bits(layer.adapter().a().gradient.view(), fresh.adapter().a().gradient.view()));
  CHECK(same_bits(layer.adapter().b().gradient.view(), fresh.adapter().b().gradient.view()));
}

TEST_CASE("micro-batches accumulate to the gradient of the whole batch") {
  constexpr Index tokens = 96;
  const Float x = test::normal_matrix<float>(tokens, in, 2), dy = test::normal_matrix<float>(tokens, out, 3);
  for (const Index parts : {1, 2, 3, 6, 32}) {
    CAPTURE(parts);
    Layer whole = make_layer(), split = make_layer();
    fill_b(whole, 6);
    fill_b(split, 6);
    whole.set_rank(5);
    split.set_rank(5);
    whole.forward(x);
    whole.backward(dy.view());
    const Index each = tokens / parts;
    for (Index part = 0; part < parts; ++part) {
      const Float px = qd::clone(x.view().middle_rows(part * each, each));
      const Float pdy = qd::clone(dy.view().middle_rows(part * each, each));
      split.forward(px);
      split.backward(pdy.view());
    }
    CHECK(error(split.adapter().a().gradient, whole.adapter().a().gradient) < 1e-12);
    CHECK(error(split.adapter().b().gradient, whole.adapter().b().gradient) < 1e-12);
  }
}

TEST_CASE("views of any stride pass through a layer") {
  Layer layer = make_layer();
  fill_b(layer, 6);
  const Float wide_x = test::normal_matrix<float>(20, in + 13, 2), wide_dy = test::normal_matrix<float>(20, out + 5, 3);
  const auto x = wide_x.view().middle_cols(4, in);
  const auto dy = wide_dy.view().middle_cols(2, out);
  Float wide_y(20, out + 9), wide_dx(20, in + 7);
  const auto y = wide_y.view().middle_cols(3, out);
  const auto dx = wide_dx.view().middle_cols(1, in);
  Layer::Context context;
  layer.forward(x, y, context);
  layer.backward(dy, dx, context);
  const Float plain_x = qd::clone(x), plain_dy = qd::clone(dy);
  CHECK(same_bits(y, layer.forward(plain_x)));
  CHECK(same_bits(dx, layer.backward(plain_dy.view())));
  for (Index i = 0; i < 20; ++i) {  // nothing is written beside the views
    for (const Index j : {Index{0}, Index{2}, out + 3, out + 8}) CHECK(wide_y(i, j) == 0.0f);
    for (const Index j : {Index{0}, in + 1, in + 6}) CHECK(wide_dx(i, j) == 0.0f);
  }
}

TEST_CASE("merging is exact, whatever the arithmetic of the passes") {
  const auto merged = [](qd::Compute compute) {
    Layer layer(test::normal_matrix<float>(out, in, 1, 0.1), {.max_rank = 64}, {}, qd::Cpu().with_compute(compute));
    fill_b(layer, 6);
    return layer.merged_weight(64);
  };
  CHECK(same_bits(merged(qd::Compute::bits16).view(), merged(qd::Compute::exact).view()));
}

TEST_CASE("merging and dropping the result leaves the layer as it was, bit for bit") {
  Layer layer = make_layer();
  fill_b(layer, 6);
  const Float x = test::normal_matrix<float>(20, in, 2);
  const Float before = qd::clone(layer.forward(x));
  for (const Index rank : {0, 3, 8}) {
    const Float merged = layer.merged_weight(rank);
    Float y(20, out);
    qd::Cpu().matmul(x.view(), merged.view(), y.view());
    layer.set_rank(rank);
    const auto unmerged = layer.forward(x);
    CHECK(test::normalised_squared_error(y.view(), unmerged) < 1e-12);
  }
  layer.set_rank(8);
  CHECK(same_bits(layer.forward(x), before.view()));
}

}  // namespace sharing_test
