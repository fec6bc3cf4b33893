// The adapter: initial values, scales, gates; and dropout as the layer applies it.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>
#include <qdylora/nn/rope.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/random_data.hpp"

namespace adapter_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using qd::ScalePolicy;
using Adapter = qd::LoRAAdapter<float>;
using Layer = qd::DynamicLoRALinear<float>;
using test::same_bits;

TEST_CASE("A starts uniform in +-1/sqrt(in), B and gradients at zero") {
  const Adapter adapter(400, 50, {.max_rank = 64, .seed = 3});
  double sum = 0.0, squares = 0.0, largest = 0.0;
  for (const float a : adapter.a().value.span()) {
    const auto v = static_cast<double>(a);
    sum += v;
    squares += v * v;
    largest = std::max(largest, std::fabs(v));
  }
  const double count = 64 * 400, bound = 1.0 / 20.0;
  CHECK(largest <= bound);
  CHECK(largest > 0.99 * bound);
  CHECK(std::fabs(sum / count) < 5 * bound / std::sqrt(3 * count));
  CHECK(squares / count == Approx(bound * bound / 3).epsilon(0.02));
  for (const auto* matrix : {&adapter.b().value, &adapter.a().gradient, &adapter.b().gradient})
    CHECK(std::all_of(matrix->span().begin(), matrix->span().end(), [](float v) { return v == 0.0f; }));
}

TEST_CASE("initial values depend on the seed and the layer, and on nothing else") {
  const auto a = [](std::uint64_t seed, std::uint32_t layer) {
    const Adapter adapter(20, 10, {.max_rank = 4, .seed = seed, .layer = layer});
    return qd::clone(adapter.a().value.view());
  };
  CHECK(same_bits(a(1, 0).view(), a(1, 0).view()));
  CHECK_FALSE(same_bits(a(1, 0).view(), a(2, 0).view()));
  CHECK_FALSE(same_bits(a(1, 0).view(), a(1, 1).view()));
}

TEST_CASE("the three scale policies") {
  const auto scale = [](ScalePolicy policy, Index rank) {
    return Adapter(8, 8, {.max_rank = 16, .alpha = 8.0f, .scale = policy}).scale(rank);
  };
  for (const Index rank : {1, 4, 16}) {
    CHECK(scale(ScalePolicy::constant, rank) == 0.5f);
    CHECK(scale(ScalePolicy::over_rank, rank) == 8.0f / static_cast<float>(rank));
    CHECK(scale(ScalePolicy::over_sqrt_rank, rank) == Approx(8.0 / std::sqrt(static_cast<double>(rank))));
  }
  CHECK(name(ScalePolicy::constant) == "alpha/r");
  CHECK(name(ScalePolicy::over_rank) == "alpha/b");
  CHECK(name(ScalePolicy::over_sqrt_rank) == "alpha/sqrt(b)");
}

TEST_CASE("gates start at 1 and act at their own rank alone") {
  Adapter adapter(8, 8, {.max_rank = 6, .alpha = 6.0f, .gated_ranks = {4, 2}});
  CHECK(adapter.options().gated_ranks == std::vector<Index>{2, 4});
  CHECK(adapter.gates().value.rows() == 2);
  CHECK(adapter.gates().value.cols() == 6);
  CHECK(adapter.coefficients(4, 6) == std::vector<float>{1, 1, 1, 1, 0, 0});
  adapter.gates().value(1, 2) = 3.0f;  // rank 4
  CHECK(adapter.coefficients(4, 6) == std::vector<float>{1, 1, 3, 1, 0, 0});
  CHECK(adapter.coefficients(3, 6) == std::vector<float>{1, 1, 1, 0, 0, 0});
  CHECK(adapter.coefficients(0, 3) == std::vector<float>{0, 0, 0});
  CHECK(adapter.gate_row(2) == 0);
  CHECK(adapter.gate_row(3) == -1);
  CHECK(adapter.parameters().size() == 2);
  CHECK(adapter.gate_parameters().size() == 1);
  CHECK(Adapter(8, 8, {}).gate_parameters().empty());
}

TEST_CASE("parameters of several layers come in order, with their names") {
  const Layer up(test::normal_matrix<float>(8, 6, 1), {.max_rank = 2, .name = "up"});
  const Layer down(test::normal_matrix<float>(6, 8, 2), {.max_rank = 3, .name = "down"});
  const auto all = qd::parameters(up, down);
  std::vector<std::string> names;
  for (const auto& p : all) names.push_back(p->name);
  CHECK(names == std::vector<std::string>{"up.lora_A", "up.lora_B", "down.lora_A", "down.lora_B"});
  CHECK(all[2]->value.rows() == 3);
  CHECK(all[2].get() == &down.adapter().a());
}

TEST_CASE("dropout masks the adapter's input by seed, layer and step") {
  constexpr Index tokens = 30, in = 40, out = 24;
  const qd::Cpu cpu;
  const auto x = test::normal_matrix<float>(tokens, in, 3);
  const qd::LoRAOptions options{.max_rank = 4, .alpha = 4.0f, .dropout = 0.25f, .seed = 11, .layer = 5};
  Layer layer(test::normal_matrix<float>(out, in, 1), options);
  Layer plain(layer.base(), {.max_rank = 4, .alpha = 4.0f, .seed = 11, .layer = 5});
  qd::Rng rng(2);
  test::fill_normal(layer.adapter().b().value.view(), rng);
  qd::copy<float>(layer.adapter().b().value, plain.adapter().b().value.view());
  plain.set_rank(0);
  const auto base = qd::clone(plain.forward(x));
  plain.set_rank(4);
  const auto update_of = [&](const qd::Matrix<float>& input) {  // the adapter's part of the output
    qd::Matrix<float> z(tokens, 4), y = qd::clone(base.view());
    cpu.matmul(input.view(), std::as_const(layer.adapter().a().value).view(), z.view());
    cpu.matmul_transposed(z.view(), std::as_const(layer.adapter().b().value).view(), y.view(), qd::Update::accumulate);
    return y;
  };
  qd::Matrix<float> masked(tokens, in);
  cpu.dropout(x.view(), 0.25f, {11, 5, 9}, masked.view());
  layer.set_training(true, 9);
  const auto y = qd::clone(layer.forward(x));
  CHECK(test::normalised_squared_error(y.view(), update_of(masked).view()) < 1e-12);
  Index kept = 0, wrong = 0;
  for (Index i = 0; i < tokens; ++i)
    for (Index j = 0; j < in; ++j) {
      const bool keep = qd::random_word(11, qd::Purpose::dropout, 5, 9, static_cast<std::uint64_t>(i * in + j)) >= 0x40000000u;
      wrong += masked(i, j) != (keep ? x(i, j) * (1.0f / 0.75f) : 0.0f);
      kept += keep;
    }
  CHECK(wrong == 0);
  CHECK(std::abs(static_cast<double>(kept) - 900.0) < 5 * std::sqrt(1200 * 0.25 * 0.75));

  CHECK(same_bits(layer.forward(x), y.view()));  // the same step, the same mask
  layer.set_training(true, 10);
  CHECK_FALSE(same_bits(layer.forward(x), y.view()));
  layer.set_training(false);
  CHECK(same_bits(layer.forward(x), plain.forward(x)));
}

TEST_CASE("rotary tables hold cosines and sines of positions, computed in double") {
  const auto table = qd::rope_table<float>(50, 8, 10000.0);
  for (Index p = 0; p < 50; ++p)
    for (Index i = 0; i < 4; ++i) {
      const double angle = static_cast<double>(p) * std::pow(10000.0, -static_cast<double>(2 * i) / 8.0);
      CHECK(table(p, 2 * i) == static_cast<float>(std::cos(angle)));
      CHECK(table(p, 2 * i + 1) == static_cast<float>(std::sin(angle)));
    }
  CHECK(test::code_of([] { qd::rope_table<float>(4, 7, 1e4); }) == Errc::bad_argument);
  CHECK(test::code_of([] { qd::rope_table<float>(4, 0, 1e4); }) == Errc::bad_argument);
}

}  // namespace adapter_test
