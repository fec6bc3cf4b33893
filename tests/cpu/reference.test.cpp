// The reference itself, against values from elsewhere: torch's and bitsandbytes' golden results, and cases with known answers.
#include <qdylora/cpu/reference.hpp>

#include <cmath>
#include <numeric>
#include <vector>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/golden.hpp"
#include "support/random_data.hpp"

namespace reference_test {

namespace qd = qdylora;
namespace reference = qdylora::reference;
using qd::Index;
using qd::MatrixView;
using qd::Update;

namespace {

double largest_difference(const std::vector<float>& a, const std::vector<float>& b) {
  double largest = a.size() == b.size() ? 0.0 : INFINITY;
  for (std::size_t i = 0; i < std::min(a.size(), b.size()); ++i)
    largest = std::max(largest, std::fabs(static_cast<double>(a[i]) - static_cast<double>(b[i])));
  return largest;
}

}  // namespace

TEST_CASE("a linear layer's output and input gradient are torch's on bitsandbytes' weights", "[reference]") {
  const qd::SafetensorsFile file(test::golden("linear4bit_io.safetensors"));
  auto weight = test::load<float>(file, "W"), x = test::load<float>(file, "X"), dy = test::load<float>(file, "dY"),
       bias = test::load<float>(file, "bias");
  const MatrixView<const float> w(weight.data(), 96, 128);
  const auto check = [&](const std::string& variant, auto tensor) {
    CAPTURE(variant);
    std::vector<float> values(96 * 128), y(10 * 96), dx(10 * 128);
    reference::dequantize(tensor.view(), MatrixView(values.data(), 96, 128));
    CHECK(largest_difference(values, test::load<float>(file, variant + "/W_dequant")) == 0.0);
    reference::matmul(MatrixView(x.data(), 10, 128), tensor.view(), MatrixView(y.data(), 10, 96), Update::overwrite);
    reference::add_row(MatrixView(bias.data(), 1, 96), MatrixView(y.data(), 10, 96));
    CHECK(largest_difference(y, test::load<float>(file, variant + "/Y")) <= 1e-5);
    reference::matmul_transposed(MatrixView(dy.data(), 10, 96), tensor.view(), MatrixView(dx.data(), 10, 128), Update::overwrite);
    CHECK(largest_difference(dx, test::load<float>(file, variant + "/dX")) <= 1e-5);
  };
  check("nf4_nodq", reference::quantize<qd::NF4, qd::Float32Scales>(w));
  check("fp4_nodq", reference::quantize<qd::FP4, qd::Float32Scales>(w));
}

TEST_CASE("AdamW walks torch's golden trajectories", "[reference]") {
  const qd::SafetensorsFile file(test::golden("adamw.safetensors"));
  const auto check = [&](const std::string& name, qd::AdamWUpdate update) {
    CAPTURE(name);
    auto p = test::load<float>(file, "p0"), grads = test::load<float>(file, "grads");
    const auto expected = test::load<float>(file, "torch_" + name + "/p");
    std::vector<float> m(300), v(300);
    const auto row = [](std::vector<float>& values) { return MatrixView(values.data(), 1, 300); };
    const double rounding = 3e-6;  // of ten steps in float32, on values up to 3; the reference computes in double
    std::ptrdiff_t saved = 0;
    for (update.step = 1; update.step <= 10; ++update.step) {
      reference::adamw(row(p), MatrixView(grads.data() + 300 * (update.step - 1), 1, 300), row(m), row(v), update);
      if (update.step == 1 || update.step == 2 || update.step == 10) {
        const auto at = expected.begin() + 300 * saved;
        CHECK(largest_difference(p, {at, at + 300}) <= rounding);
        ++saved;
      }
    }
    CHECK(largest_difference(m, test::load<float>(file, "torch_" + name + "/exp_avg")) <= 1e-6);
    CHECK(largest_difference(v, test::load<float>(file, "torch_" + name + "/exp_avg_sq")) <= 1e-6);
  };
  check("default", {.lr = 1e-3, .weight_decay = 0.01});
  check("qlora", {.lr = 2e-4});
  check("wd0.1", {.lr = 1e-2, .beta2 = 0.95, .epsilon = 1e-6, .weight_decay = 0.1});
}

TEST_CASE("rope turns pairs by their angle and attention scores depend on distance alone", "[reference]") {
  qd::Matrix<double> table(10, 2);
  for (Index p = 0; p < 10; ++p) {
    table(p, 0) = std::cos(0.3 * static_cast<double>(p));
    table(p, 1) = std::sin(0.3 * static_cast<double>(p));
  }
  const auto score = [&](std::int32_t i, std::int32_t j) {
    double q[2] = {1.0, 2.0}, k[2] = {-0.5, 0.7};
    reference::rope(MatrixView(q, 1, 2), std::span(&i, 1), table.view(), qd::RopeLayout::interleaved, 1);
    reference::rope(MatrixView(k, 1, 2), std::span(&j, 1), table.view(), qd::RopeLayout::interleaved, 1);
    return q[0] * k[0] + q[1] * k[1];
  };
  CHECK(score(5, 3) == Approx(score(9, 7)));
  CHECK(score(5, 3) != Approx(score(3, 5)));
  double x[4] = {1, 0, 0, 1};  // two heads of (1, 0) and (0, 1): a quarter turn goes to (0, 1) and (-1, 0)
  double quarter[2] = {0, 1};
  const std::int32_t zero = 0;
  reference::rope(MatrixView(x, 1, 4), std::span(&zero, 1), MatrixView(quarter, 1, 2), qd::RopeLayout::half_split, 1);
  CHECK((x[0] == 0 && x[1] == 1 && x[2] == -1 && x[3] == 0));
  double pair[4] = {1, 2, 3, 4};  // the layouts differ in which elements belong together
  double turns[4] = {0, 1, 1, 0};
  reference::rope(MatrixView(pair, 1, 4), std::span(&zero, 1), MatrixView(turns, 1, 4), qd::RopeLayout::half_split, 1);
  CHECK((pair[0] == -3 && pair[2] == 1 && pair[1] == 2 && pair[3] == 4));
}

TEST_CASE("attention of equal keys is the mean of what came before, in each sequence alone", "[reference]") {
  qd::Matrix<double> q(5, 4), k(5, 2), v(5, 2), y(5, 4), lse(5, 2);
  for (Index t = 0; t < 5; ++t) v(t, 0) = static_cast<double>(t), v(t, 1) = static_cast<double>(-t);
  for (double& x : q.span()) x = 1.0;
  for (double& x : k.span()) x = 3.0;
  const std::vector<Index> offsets = {0, 3, 5};
  reference::attention(q.view(), k.view(), v.view(), std::span<const Index>(offsets), {2, 1, 2}, y.view(), lse.view());
  const double means[] = {0.0, 0.5, 1.0, 3.0, 3.5};
  const double seen[] = {1, 2, 3, 1, 2};
  for (Index t = 0; t < 5; ++t) {
    CHECK(y(t, 0) == Approx(means[t]));
    CHECK(y(t, 3) == Approx(-means[t]));
    CHECK(lse(t, 1) == Approx(6.0 / std::sqrt(2.0) + std::log(seen[t])));
  }
}

TEST_CASE("a query chooses the value of the key it matches, of the head it belongs to", "[reference]") {
  // Two key-value heads of one feature, four query heads: query heads 0 and 1 read head 0, 2 and 3 read head 1.
  qd::Matrix<double> q(2, 4), k(2, 2), v(2, 2), y(2, 4), lse(2, 4);
  for (double& x : q.span()) x = 100.0;
  k(0, 0) = 1.0, k(1, 0) = -1.0, k(0, 1) = -1.0, k(1, 1) = 1.0;
  v(0, 0) = 10.0, v(1, 0) = 20.0, v(0, 1) = 30.0, v(1, 1) = 40.0;
  const std::vector<Index> offsets = {0, 2};
  reference::attention(q.view(), k.view(), v.view(), std::span<const Index>(offsets), {4, 2, 1}, y.view(), lse.view());
  CHECK((y(1, 0) == Approx(10) && y(1, 1) == Approx(10) && y(1, 2) == Approx(40) && y(1, 3) == Approx(40)));
  const std::vector<MatrixView<const double>> keys = {k}, values = {v};
  qd::Matrix<double> decoded(1, 4);
  reference::attention_decode(q.view().middle_rows(1, 1), std::span(keys), std::span(values), {4, 2, 1}, decoded.view());
  for (Index j = 0; j < 4; ++j) CHECK(decoded(0, j) == Approx(y(1, j)));
}

TEST_CASE("activations, norm and cross-entropy have their textbook values", "[reference]") {
  double x[3] = {1.0, 0.0, -2.0}, y[3];
  reference::gelu(MatrixView(x, 1, 3), MatrixView(y, 1, 3));
  CHECK(y[0] == Approx(0.8413447460685429));
  CHECK(y[1] == 0.0);
  CHECK(y[2] == Approx(-0.04550026389635842));
  double up[3] = {2.0, 5.0, -1.0};
  reference::swiglu(MatrixView(x, 1, 3), MatrixView(up, 1, 3), MatrixView(y, 1, 3));
  CHECK(y[0] == Approx(2 * 0.7310585786300049));
  CHECK(y[2] == Approx(2 * 0.11920292202211755));
  double w[3] = {1.0, 1.0, 2.0}, r = 0;
  reference::rms_norm(MatrixView(x, 1, 3), MatrixView(w, 1, 3), 0.0f, MatrixView(y, 1, 3), MatrixView(&r, 1, 1));
  CHECK(r == Approx(std::sqrt(3.0 / 5.0)));
  CHECK(y[2] == Approx(-4.0 * std::sqrt(3.0 / 5.0)));
  double z[4] = {0, 0, 0, 0}, loss = 0;
  const std::int32_t target = 2;
  reference::cross_entropy(MatrixView(z, 1, 4), std::span(&target, 1), 2.0, MatrixView(&loss, 1, 1));
  CHECK(loss == Approx(std::log(4.0)));
  CHECK((z[0] == Approx(0.5) && z[2] == Approx(-1.5)));
}

TEST_CASE("dropout keeps the expected share and the expected value", "[reference]") {
  qd::Matrix<double> x(300, 100), y(300, 100);
  for (double& v : x.span()) v = 1.0;
  reference::dropout(x.view(), 0.25f, {.seed = 5, .layer = 1, .step = 9}, y.view(), Update::overwrite);
  const auto kept = std::count_if(y.data(), y.data() + y.size(), [](double v) { return v != 0.0; });
  CHECK(static_cast<double>(kept) / 30000 == Approx(0.75).margin(5 * std::sqrt(0.75 * 0.25 / 30000)));
  for (const double v : y.span()) CHECK((v == 0.0 || v == Approx(4.0 / 3)));
}

}  // namespace reference_test
