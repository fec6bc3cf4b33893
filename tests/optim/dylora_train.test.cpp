// Eight training steps against PyTorch: which rows move, under SGD and both kinds of AdamW, with DyLoRA's ranks drawn in advance.
#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>
#include <qdylora/optim/adamw.hpp>

#include "support/catch.hpp"
#include "support/golden.hpp"

namespace dylora_train_test {

namespace qd = qdylora;
using qd::GradientRows;
using qd::Index;
using Float = qd::Matrix<float>;
using Layer = qd::DynamicLoRALinear<float, qd::Cpu, qd::Dense<float>>;
using Rows = qd::AdamWOptions::UntouchedRows;

namespace {

constexpr Index tokens = 32, in = 20, out = 16, max_rank = 8;
constexpr Index schedule[] = {5, 1, 8, 3, 3, 8, 2, 6};

Float golden(const std::string& tensor, Index rows, Index cols) {
  static const qd::SafetensorsFile file(test::golden("dylora_train.safetensors"));
  const auto values = test::load<float>(file, tensor);
  REQUIRE(static_cast<Index>(values.size()) == rows * cols);
  Float matrix(rows, cols);
  std::copy(values.begin(), values.end(), matrix.data());
  return matrix;
}

Layer make_layer(GradientRows rows) {
  Layer layer(golden("W", out, in),
              {.max_rank = max_rank, .alpha = 16.0f, .scale = qd::ScalePolicy::over_rank, .gradient_rows = rows});
  qd::copy<float>(golden("A0", max_rank, in), layer.adapter().a().value.view());
  return layer;  // B is zero, as the golden B0
}

// Runs the schedule; `update` applies the gradients. Compares losses as they come and A and B at the end.
template <class Update>
void train(const std::string& name, Layer& layer, Update update) {
  CAPTURE(name);
  const Float x = golden("X", tokens, in), target = golden("T", tokens, out), losses = golden(name + "/loss", 1, 8);
  Float dy(tokens, out);
  for (Index step = 0; step < 8; ++step) {
    layer.set_rank(schedule[step]);
    const auto y = layer.forward(x);
    double loss = 0.0;
    for (Index i = 0; i < tokens; ++i)
      for (Index j = 0; j < out; ++j) {
        const float error = y(i, j) - target(i, j);
        loss += static_cast<double>(error) * static_cast<double>(error);
        dy(i, j) = 2.0f * error / static_cast<float>(dy.size());
      }
    CAPTURE(step);
    CHECK(std::fabs(loss / static_cast<double>(dy.size()) - static_cast<double>(losses(0, step))) < 1e-5);
    update(dy);
  }
  const Float a = golden(name + "/A", max_rank, in), b = golden(name + "/B", out, max_rank);
  double worst_a = 0.0, worst_b = 0.0;
  for (Index i = 0; i < max_rank; ++i) {
    for (Index j = 0; j < in; ++j)
      worst_a = std::max(worst_a, std::fabs(static_cast<double>(layer.adapter().a().value(i, j)) - static_cast<double>(a(i, j))));
    for (Index j = 0; j < out; ++j)
      worst_b = std::max(worst_b, std::fabs(static_cast<double>(layer.adapter().b().value(i, j)) - static_cast<double>(b(j, i))));
  }
  CHECK(worst_a < 1e-5);
  CHECK(worst_b < 1e-5);
}

void train_adamw(const std::string& name, GradientRows rows, double weight_decay, Rows untouched) {
  Layer layer = make_layer(rows);
  qd::AdamW<float> optimizer{layer.parameters(), {.lr = 1e-2, .weight_decay = weight_decay, .untouched_rows = untouched}};
  train(name, layer, [&](const Float& dy) {
    optimizer.zero_grad();
    layer.backward(dy.view());
    optimizer.step();
  });
}

void train_sgd(const std::string& name, GradientRows rows) {
  Layer layer = make_layer(rows);
  train(name, layer, [&](const Float& dy) {
    for (const auto& p : layer.parameters()) std::fill_n(p->gradient.data(), p->gradient.size(), 0.0f);
    layer.backward(dy.view());
    for (const auto& p : layer.parameters())
      for (Index i = 0; i < p->value.size(); ++i) p->value.data()[i] -= 0.05f * p->gradient.data()[i];
  });
}

}  // namespace

TEST_CASE("DyLoRA training with SGD is PyTorch's, prefix and frozen") {
  train_sgd("sgd_all", GradientRows::prefix);
  train_sgd("sgd_frozen", GradientRows::last_row);
}

TEST_CASE("DyLoRA training with a dense AdamW is PyTorch's: rows above the rank keep moving") {
  train_adamw("adamw_all_wd0", GradientRows::prefix, 0.0, Rows::dense);
  train_adamw("adamw_all_wd0.1", GradientRows::prefix, 0.1, Rows::dense);
  train_adamw("adamw_frozen_autograd_wd0", GradientRows::last_row, 0.0, Rows::dense);
  train_adamw("adamw_frozen_autograd_wd0.1", GradientRows::last_row, 0.1, Rows::dense);
}

TEST_CASE("frozen DyLoRA with a strict AdamW moves the last row of the rank alone, with a step count of its own") {
  train_adamw("adamw_frozen_strict_wd0.1", GradientRows::last_row, 0.1, Rows::strict);
}

}  // namespace dylora_train_test
