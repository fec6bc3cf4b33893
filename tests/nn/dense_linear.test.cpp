// The layer whose weight trains itself: outputs and gradients against the definition and central differences, rounding to bfloat16,
// training, and misuse.
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/nn/dense_linear.hpp>
#include <qdylora/optim/adamw.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/gradcheck.hpp"
#include "support/random_data.hpp"

namespace dense_linear_test {

namespace qd = qdylora;
using qd::DenseLinear;
using qd::Errc;
using qd::Index;
using Double = qd::Matrix<double>;

namespace {

template <class T>
DenseLinear<T> layer_of(Index out, Index in, bool biased, bool narrow = false, qd::Cpu cpu = {}) {
  DenseLinear<T> layer(test::normal_matrix<float>(out, in, 1, 0.3), {.bfloat16 = narrow, .name = "dense"}, cpu);
  if (biased) layer.set_bias(test::normal_matrix<qd::Accumulator<T>>(1, out, 2).view());
  return layer;
}

template <class T>
qd::Matrix<qd::Accumulator<T>>& weight_of(const DenseLinear<T>& layer) {
  return layer.parameters().front()->value;
}

}  // namespace

TEST_CASE("a dense layer's outputs are x W^T + bias, with W in full or in bfloat16") {
  const Index tokens = GENERATE(0, 1, 3, 20);
  const bool biased = GENERATE(false, true), narrow = GENERATE(false, true);
  const auto check = [&]<class T>(T, double tolerance) {
    using Acc = qd::Accumulator<T>;
    auto layer = layer_of<T>(37, 50, biased, narrow);
    CHECK(layer.in() == 50);
    CHECK(layer.out() == 37);
    REQUIRE(layer.parameters().size() == (biased ? 2u : 1u));
    CHECK(layer.parameters().front()->name == "dense.weight");
    if (biased) CHECK(layer.parameters().back()->name == "dense.bias");
    const auto x = test::normal_matrix<T>(tokens, 50, 3);
    Double expected(tokens, 37);
    const auto& w = weight_of(layer);
    for (Index t = 0; t < tokens; ++t)
      for (Index o = 0; o < 37; ++o) {
        if (biased) expected(t, o) = static_cast<double>(layer.parameters()[1]->value(0, o));
        for (Index i = 0; i < 50; ++i) {
          const Acc exact = w(o, i);
          const auto rounded = static_cast<float>(qd::bfloat16(static_cast<float>(exact)));
          expected(t, o) += static_cast<double>(x(t, i)) * (narrow ? static_cast<double>(rounded) : static_cast<double>(exact));
        }
      }
    const auto found = layer.forward(x.view());
    CHECK(test::relative_difference(found, expected.view(), 1.0) <= tolerance);
  };
  check(double{}, 1e-14);
  check(float{}, 1e-6);
  check(qd::bfloat16{}, 8e-3);
}

TEST_CASE("gradients of a dense layer agree with central differences") {
  const bool biased = GENERATE(false, true);
  auto layer = layer_of<double>(7, 9, biased);
  auto x = qd::clone(test::normal_matrix<double>(5, 9, 4).view());
  const auto dy = test::normal_matrix<double>(5, 7, 5);
  const auto loss = [&] {
    const auto y = layer.forward(std::as_const(x).view());
    double sum = 0.0;  // not linear in y, so that dy is of this y alone
    for (Index t = 0; t < y.rows; ++t)
      for (Index o = 0; o < y.cols; ++o) sum += dy(t, o) * std::sin(y(t, o));
    return sum;
  };
  loss();
  const auto y = layer.forward(std::as_const(x).view());
  Double slope(5, 7);
  for (Index t = 0; t < 5; ++t)
    for (Index o = 0; o < 7; ++o) slope(t, o) = dy(t, o) * std::cos(y(t, o));
  const auto dx = qd::clone(layer.backward(slope.view()));
  const auto agrees = [&](std::span<double> values, std::span<const double> gradient) {
    const auto report = test::check_gradient(loss, values, gradient, {.epsilon = 1e-5, .absolute = 1e-9, .relative = 1e-6});
    CAPTURE(report.element, report.analytic, report.numeric, report.excess);
    CHECK(report.ok());
  };
  for (const auto& p : layer.parameters()) {
    CAPTURE(p->name);
    agrees(p->value.span(), p->gradient.span());
    CHECK(std::ranges::count(p->touched, true) == p->value.rows());
  }
  agrees(x.span(), dx.span());

  // A second pass adds, without gradients it leaves them, and dx is the same in all ways.
  const auto once = qd::clone(std::as_const(layer.parameters().front()->gradient).view());
  layer.forward(std::as_const(x).view());
  CHECK(test::same_bits(layer.backward(slope.view(), qd::GradientMode::ignore), dx.view()));
  CHECK(test::same_bits(layer.parameters().front()->gradient.view(), once.view()));
  DenseLinear<double>::Context context;
  Double other(5, 7);
  layer.forward(x.view(), other.view(), context);
  layer.backward(slope.view(), {}, context);
  const auto& twice = layer.parameters().front()->gradient;
  for (Index k = 0; k < once.size(); ++k) CHECK(twice.data()[k] == Approx(2.0 * once.data()[k]).epsilon(1e-12));
}

TEST_CASE("gradients of activations in 16 bits are those of the same numbers in double") {
  const auto check = [](bool narrow) {
    auto layer = layer_of<qd::bfloat16>(40, 30, true, narrow);
    auto exact = layer_of<double>(40, 30, true, narrow);
    const auto x = test::normal_matrix<qd::bfloat16>(33, 30, 6), dy = test::normal_matrix<qd::bfloat16>(33, 40, 7);
    const auto wide_x = test::converted<double>(x.view()), wide_dy = test::converted<double>(dy.view());
    layer.forward(x.view());
    exact.forward(wide_x.view());
    CHECK(test::relative_difference(layer.backward(dy.view()), exact.backward(wide_dy.view())) < 8e-3);
    for (const std::size_t i : {0u, 1u})  // sums in float, of products that are exact
      CHECK(test::relative_difference(layer.parameters()[i]->gradient.view(), exact.parameters()[i]->gradient.view()) < 1e-6);
  };
  check(false);
  check(true);
}

TEST_CASE("the master of a weight in bfloat16 adds up steps that its rounding does not see") {
  qd::Matrix<float> one(1, 1);
  one(0, 0) = 1.0f;
  DenseLinear<float> layer(one, {.bfloat16 = true});
  const auto output = [&] {
    layer.round();
    return layer.forward(one.view())(0, 0);
  };
  constexpr float step = 1.0f / 512.0f;  // bfloat16 next to 1 is 1 + 1/128
  std::vector<float> seen;
  for (int i = 0; i < 5; ++i) {
    seen.push_back(output());
    weight_of(layer)(0, 0) += step;
  }
  CHECK(seen == std::vector<float>{1.0f, 1.0f, 1.0f, 1.0078125f, 1.0078125f});
  // Without round() the passes stay with what they had.
  weight_of(layer)(0, 0) = 3.0f;
  CHECK(layer.forward(one.view())(0, 0) == seen.back());
  CHECK(output() == 3.0f);
}

TEST_CASE("a dense layer learns the weight of its task, to the same bytes on any number of threads") {
  for (const bool narrow : {false, true}) {
    std::vector<float> results[2];
    for (const int threads : {1, 2}) {
      const auto task = test::normal_matrix<float>(24, 100, 8, 0.3);
      auto layer = layer_of<float>(24, 100, true, narrow, qd::Cpu(threads));
      qd::AdamW<float> optimizer(layer.parameters(), {.lr = 2e-2}, qd::Cpu(threads));
      const qd::Cpu cpu(1);
      double first = 0.0, loss = 0.0;
      for (int step = 0; step < 300; ++step) {
        const auto x = test::normal_matrix<float>(64, 100, 100 + static_cast<std::uint64_t>(step));
        qd::Matrix<float> target(64, 24), dy(64, 24);
        cpu.matmul(x.view(), task.view(), target.view());
        layer.round();
        const auto y = layer.forward(x.view());
        loss = 0.0;
        for (Index k = 0; k < dy.size(); ++k) {
          const float error = y.data[k] - target.data()[k];
          dy.data()[k] = 2.0f * error / static_cast<float>(dy.size());
          loss += static_cast<double>(error) * static_cast<double>(error) / static_cast<double>(dy.size());
        }
        if (step == 0) first = loss;
        optimizer.zero_grad();
        layer.backward(dy.view(), qd::GradientMode::accumulate);
        optimizer.step();
      }
      CHECK(first > 10.0);
      CHECK(loss < (narrow ? 2e-2 : 1e-2));
      auto& all = results[threads - 1];
      for (const auto& p : layer.parameters()) all.insert(all.end(), p->value.span().begin(), p->value.span().end());
    }
    CHECK(results[0] == results[1]);
  }
}

TEST_CASE("what a caller can do wrong with a dense layer is a typed error that names it") {
  auto layer = layer_of<float>(4, 6, false);
  DenseLinear<float>::Context context;
  qd::Matrix<float> x(3, 6), y(3, 4), wide(3, 7);
  const auto refused = [](Errc code, auto call) {
    const auto error = test::error_of(call);
    REQUIRE(error);
    CHECK(error->code() == code);
    CHECK(std::string(error->what()).find("dense") != std::string::npos);
  };
  refused(Errc::state_order, [&] { layer.backward(y.view(), x.view(), context); });
  refused(Errc::shape_mismatch, [&] { layer.forward(wide.view(), y.view(), context); });
  refused(Errc::shape_mismatch, [&] { layer.forward(x.view(), wide.view(), context); });
  refused(Errc::state_order, [&] { layer.backward(y.view(), x.view(), context); });  // that pass did not end
  layer.forward(x.view(), y.view(), context);
  refused(Errc::shape_mismatch, [&] { layer.backward(wide.view(), x.view(), context); });
  refused(Errc::shape_mismatch, [&] { layer.backward(y.view(), wide.view(), context); });
  refused(Errc::shape_mismatch, [&] { layer.set_bias(wide.view().top_rows(1)); });
}

}  // namespace dense_linear_test
