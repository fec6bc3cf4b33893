// The layer with trained scales: outputs and gradients against the definition and central differences, training, and misuse.
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/nn/alpha_linear.hpp>
#include <qdylora/optim/adamw.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/gradcheck.hpp"
#include "support/random_data.hpp"

namespace alpha_linear_test {

namespace qd = qdylora;
using qd::AlphaLinear;
using qd::Errc;
using qd::Index;
using Double = qd::Matrix<double>;

namespace {

// W[i, j] in double by the definition: trained scales from the layer, the others from its codes.
template <class Layer>
Double definition(const Layer& layer, Index planes) {
  const auto& codes = *layer.codes();
  const Index size = codes.shape().group_size == 0 ? codes.cols() : codes.shape().group_size;
  Double w(codes.rows(), codes.cols());
  for (Index k = 0; k < planes; ++k)
    for (Index i = 0; i < w.rows(); ++i)
      for (Index j = 0; j < w.cols(); ++j) {
        const Index row = k * w.rows() + i, group = j / size;
        const double scale = k < layer.options().trained_planes ? static_cast<double>(layer.alpha().value(row, group))
                                                                : static_cast<double>(codes.scales()(row, group));
        w(i, j) += (codes.bits(k, i)[j / 8] >> (j % 8) & 1) != 0 ? scale : -scale;
      }
  return w;
}
template <class X>
Double product(qd::MatrixView<X> x, const Double& w, qd::MatrixView<const double> bias) {
  Double y(x.rows, w.rows());
  for (Index t = 0; t < y.rows(); ++t)
    for (Index i = 0; i < y.cols(); ++i) {
      y(t, i) = bias.empty() ? 0.0 : bias(0, i);
      for (Index j = 0; j < w.cols(); ++j) y(t, i) += static_cast<double>(x(t, j)) * w(i, j);
    }
  return y;
}

template <class S>
void shift(qd::Matrix<S>& alpha) {  // away from the base's
  qd::Rng rng(21);
  for (S& a : alpha.span()) a += static_cast<S>(0.1f * rng.normal());
}

}  // namespace

TEST_CASE("an alpha layer's outputs are x W^T + bias of the planes in use, in any panel and type") {
  struct Shape {
    Index in, out, group_size;
  };
  const auto shape = GENERATE(Shape{7, 6, 0}, Shape{40, 9, 16}, Shape{1030, 530, 64});
  const Index tokens = GENERATE(1, 3, 20);
  const qd::BinaryCodeOptions code{.planes = 3, .group_size = shape.group_size, .iterations = 2};
  const auto codes = std::make_shared<const qd::BinaryCodedTensor<>>(
      qd::binary_quantize(test::normal_matrix<float>(shape.out, shape.in, 1, 0.2).view(), code));
  const auto check = [&]<class T>(T, double tolerance) {
    AlphaLinear<T> layer(codes, {.trained_planes = 2});
    shift(layer.alpha().value);
    const auto bias = test::normal_matrix<qd::Accumulator<T>>(1, shape.out, 2);
    layer.set_bias(bias.view());
    const auto wide_bias = test::converted<double>(bias.view());
    const auto x = test::normal_matrix<T>(tokens, shape.in, 3);
    for (Index planes = 1; planes <= 3; ++planes) {
      CAPTURE(shape.in, tokens, planes, qd::dtype_name<T>());
      layer.set_planes(planes);
      const Double w = definition(layer, planes);
      CHECK(test::normalised_squared_error(layer.weight(planes).view(), w.view()) < 1e-13);
      CHECK(test::normalised_squared_error(layer.forward(x), product(x.view(), w, wide_bias.view()).view()) < tolerance);
    }
  };
  check(double{}, 1e-28);
  check(float{}, 1e-12);
  check(qd::bfloat16{}, 4e-5);
}

TEST_CASE("gradients of an alpha layer agree with central differences") {
  struct Shape {
    Index in, out, group_size;
  };
  const auto shape = GENERATE(Shape{7, 6, 0}, Shape{21, 5, 8}, Shape{32, 4, 16});
  const Index trained = GENERATE(1, 3), tokens = GENERATE(3, 9);
  AlphaLinear<double> layer(test::normal_matrix<double>(shape.out, shape.in, 1, 0.4), {.trained_planes = trained},
                            {.planes = 3, .group_size = shape.group_size});
  shift(layer.alpha().value);
  layer.set_bias(test::normal_matrix<double>(1, shape.out, 2).view());
  Double x = test::normal_matrix<double>(tokens, shape.in, 3);
  const Double c = test::normal_matrix<double>(tokens, shape.out, 4);
  for (Index planes = 1; planes <= 3; ++planes) {
    CAPTURE(shape.in, trained, tokens, planes);
    layer.set_planes(planes);
    const auto loss = [&] {
      Double y(tokens, shape.out);
      AlphaLinear<double>::Context context;
      layer.forward(x.view(), y.view(), context);
      double sum = 0.0;
      for (Index i = 0; i < y.size(); ++i) sum += c.data()[i] * y.data()[i];
      return sum;
    };
    auto& alpha = layer.alpha();
    std::fill_n(alpha.gradient.data(), alpha.gradient.size(), 0.0);
    alpha.touched.assign(alpha.touched.size(), false);
    layer.forward(x);
    const auto dx = layer.backward(c.view());
    const auto dx_report = test::check_gradient(loss, x.span(), std::span<const double>(dx.data, x.span().size()));
    CAPTURE(dx_report.element, dx_report.analytic, dx_report.numeric);
    CHECK(dx_report.ok());
    const auto report = test::check_gradient(loss, alpha.value.span(), alpha.gradient.span());
    CAPTURE(report.element, report.analytic, report.numeric);
    CHECK(report.ok());
    for (Index row = 0; row < alpha.value.rows(); ++row) CHECK(alpha.touched[static_cast<std::size_t>(row)] == (row < planes * shape.out));
  }
}

TEST_CASE("gradients of an alpha layer of several panels are those of the whole product") {
  constexpr Index in = 1030, out = 530, tokens = 12, group = 128;
  const auto check = [&]<class T>(T, double tolerance) {
    AlphaLinear<T> layer(test::normal_matrix<float>(out, in, 1, 0.1), {.trained_planes = 2},
                         {.planes = 2, .group_size = group, .iterations = 1});
    const auto x = test::normal_matrix<T>(tokens, in, 2), dy = test::normal_matrix<T>(tokens, out, 3);
    layer.forward(x);
    const auto dx = layer.backward(dy.view());
    layer.forward(x);
    layer.backward(dy.view());  // adds the same once more
    const Double w = definition(layer, 2);
    Double expected(tokens, in), gradient(2 * out, layer.codes()->groups());
    for (Index t = 0; t < tokens; ++t)
      for (Index i = 0; i < out; ++i)
        for (Index j = 0; j < in; ++j) expected(t, j) += static_cast<double>(dy(t, i)) * w(i, j);
    for (Index k = 0; k < 2; ++k)
      for (Index i = 0; i < out; ++i)
        for (Index j = 0; j < in; ++j) {
          double d = 0.0;
          for (Index t = 0; t < tokens; ++t) d += static_cast<double>(dy(t, i)) * static_cast<double>(x(t, j));
          gradient(k * out + i, j / group) += 2.0 * ((layer.codes()->bits(k, i)[j / 8] >> (j % 8) & 1) != 0 ? d : -d);
        }
    CAPTURE(qd::dtype_name<T>());
    CHECK(test::normalised_squared_error(dx, expected.view()) < tolerance);
    CHECK(test::normalised_squared_error(layer.alpha().gradient.view(), gradient.view()) < 1e-11);
  };
  check(float{}, 1e-12);
  check(qd::bfloat16{}, 4e-5);
}

TEST_CASE("an alpha layer's backward pass computes dx alone, gradients alone, or both, with the same bits") {
  const auto make = [] { return AlphaLinear<float>(test::normal_matrix<float>(20, 40, 1)); };
  const auto x = test::normal_matrix<float>(10, 40, 3), dy = test::normal_matrix<float>(10, 20, 4);
  auto both = make(), gradients = make(), only_dx = make();
  qd::Matrix<float> y(10, 20), dx(10, 40), dx2(10, 40);
  AlphaLinear<float>::Context context;
  both.forward(x.view(), y.view(), context);
  both.backward(dy.view(), dx.view(), context);
  gradients.forward(x.view(), y.view(), context);
  gradients.backward(dy.view(), {}, context);
  only_dx.forward(x.view(), y.view(), context);
  only_dx.backward(dy.view(), dx2.view(), context, qd::GradientMode::ignore);
  CHECK(test::same_bits(dx.view(), dx2.view()));
  CHECK(test::same_bits(both.alpha().gradient.view(), gradients.alpha().gradient.view()));
  CHECK(test::same_bits(only_dx.alpha().gradient.view(), qd::Matrix<float>(20, 1).view()));
  CHECK(only_dx.alpha().touched == std::vector<bool>(20, false));
}

TEST_CASE("a backward pass is of the planes that its forward pass used") {
  AlphaLinear<float> layer(test::normal_matrix<float>(20, 40, 1), {.trained_planes = 3}), other(layer.codes(), {.trained_planes = 3});
  const auto x = test::normal_matrix<float>(10, 40, 3), dy = test::normal_matrix<float>(10, 20, 4);
  layer.set_planes(2);
  other.set_planes(2);
  layer.forward(x);
  layer.set_planes(3);
  other.forward(x);
  CHECK(test::same_bits(layer.backward(dy.view()), other.backward(dy.view())));
  CHECK(test::same_bits(layer.alpha().gradient.view(), other.alpha().gradient.view()));
  CHECK(layer.alpha().touched == other.alpha().touched);
}

TEST_CASE("a task that is other scales on the same signs is learned") {
  // The teacher's scales differ from the student's in the first plane alone, so the best loss is zero.
  constexpr Index in = 48, out = 24, tokens = 64;
  const qd::BinaryCodeOptions code{.planes = 3, .group_size = 16};
  AlphaLinear<float> student(test::normal_matrix<float>(out, in, 1, 0.2), {}, code);
  AlphaLinear<float> teacher(student.codes());
  for (float& a : teacher.alpha().value.span()) a *= 1.5f;
  qd::AdamW<float> optimizer(student.parameters(), {.lr = 5e-3});
  double first = 0.0, last = 0.0;
  for (int step = 0; step < 250; ++step) {
    const auto x = test::normal_matrix<float>(tokens, in, 100 + static_cast<std::uint64_t>(step));
    const auto target = teacher.forward(x), y = student.forward(x);
    qd::Matrix<float> dy(tokens, out);
    last = 0.0;
    for (Index t = 0; t < tokens; ++t)
      for (Index i = 0; i < out; ++i) {
        dy(t, i) = (y(t, i) - target(t, i)) / static_cast<float>(tokens);
        last += static_cast<double>(dy(t, i)) * static_cast<double>(dy(t, i));
      }
    if (step == 0) first = last;
    optimizer.zero_grad();
    student.backward(dy.view());
    optimizer.step();
  }
  CAPTURE(first, last);
  CHECK(last < 1e-4 * first);
  CHECK(test::normalised_squared_error(student.alpha().value.view(), teacher.alpha().value.view()) < 1e-4);
}

TEST_CASE("with all planes trained a layer reaches the least-squares loss of its signs") {
  // Labels that no scales make: with x orthonormal the loss is |W - target|^2, row by row a least-squares problem in 2 scales.
  constexpr Index in = 32, out = 6;
  AlphaLinear<double> layer(test::normal_matrix<float>(out, in, 1), {.trained_planes = 2}, {.planes = 2});
  const auto target = test::normal_matrix<double>(out, in, 2);
  Double x(in, in);
  for (Index j = 0; j < in; ++j) x(j, j) = 1.0;
  double best = 0.0;
  for (Index i = 0; i < out; ++i) {
    double gram = 0.0, c[2] = {0.0, 0.0}, squares = 0.0;
    for (Index j = 0; j < in; ++j) {
      const auto sign = [&](Index k) { return (layer.codes()->bits(k, i)[j / 8] >> (j % 8) & 1) != 0 ? 1.0 : -1.0; };
      gram += sign(0) * sign(1);
      for (Index k = 0; k < 2; ++k) c[k] += sign(k) * target(i, j);
      squares += target(i, j) * target(i, j);
    }
    const double n = static_cast<double>(in), determinant = n * n - gram * gram;
    best += squares - (n * c[0] * c[0] - 2.0 * gram * c[0] * c[1] + n * c[1] * c[1]) / determinant;
  }
  qd::AdamW<double> optimizer(layer.parameters(), {.lr = 1e-2});
  double loss = 0.0;
  for (int step = 0; step < 600; ++step) {
    if (step == 400) optimizer.set_lr(1e-3);
    const auto y = layer.forward(x);
    Double dy(in, out);
    loss = 0.0;
    for (Index j = 0; j < in; ++j)
      for (Index i = 0; i < out; ++i) {
        dy(j, i) = y(j, i) - target(i, j);
        loss += dy(j, i) * dy(j, i);
      }
    optimizer.zero_grad();
    layer.backward(dy.view());
    optimizer.step();
  }
  CHECK(loss > best * (1 - 1e-12));
  CHECK(loss < best * (1 + 1e-4));
}

TEST_CASE("training an alpha layer has the same bytes on any number of threads") {
  const auto train = [](const qd::Cpu& cpu) {
    constexpr Index tokens = 20, in = 100, out = 530;
    AlphaLinear<float> layer(test::normal_matrix<float>(out, in, 7, 0.1), {.trained_planes = 2}, {.planes = 3, .group_size = 32}, cpu);
    qd::AdamW<float> optimizer(layer.parameters(), {.lr = 1e-2, .max_gradient_norm = 1.0}, cpu);
    std::vector<float> trace;
    for (int step = 0; step < 4; ++step) {
      layer.set_planes(step == 2 ? 1 : 3);
      const auto x = test::normal_matrix<float>(tokens, in, 100 + static_cast<std::uint64_t>(step));
      auto dy = qd::clone(layer.forward(x));
      optimizer.zero_grad();
      const auto dx = layer.backward(dy.view());
      optimizer.step();
      for (const qd::MatrixView<float> view : {dy.view(), dx, layer.alpha().value.view()}) {
        const auto values = test::values_of(view);
        trace.insert(trace.end(), values.begin(), values.end());
      }
    }
    return trace;
  };
  const auto one = train(qd::Cpu(1));
  for (const int threads : {2, 3, 8}) {
    const auto more = train(qd::Cpu(threads));
    CAPTURE(threads);
    CHECK((more.size() == one.size() && std::memcmp(more.data(), one.data(), one.size() * sizeof(float)) == 0));
  }
}

TEST_CASE("layers on the same codes have scales of their own") {
  AlphaLinear<float> one(test::normal_matrix<float>(8, 16, 1)), other(one.codes());
  const auto x = test::normal_matrix<float>(3, 16, 2);
  const auto before = qd::clone(other.forward(x));
  shift(one.alpha().value);
  CHECK(one.codes() == other.codes());
  CHECK(test::same_bits(other.forward(x), before.view()));
  CHECK_FALSE(test::same_bits(one.forward(x), before.view()));
  CHECK(qd::parameters(one, other).size() == 2);
}

TEST_CASE("no tokens are no gradient") {
  AlphaLinear<float> layer(test::normal_matrix<float>(8, 16, 1));
  const qd::Matrix<float> none(0, 16), no_gradient(0, 8);
  CHECK(layer.forward(none).rows == 0);
  layer.backward(no_gradient.view());
  CHECK(test::same_bits(layer.alpha().gradient.view(), qd::Matrix<float>(8, 1).view()));
}

TEST_CASE("what a caller can do wrong with an alpha layer is a typed error that names it") {
  const auto w = test::normal_matrix<float>(8, 16, 1);
  const auto make = [&](Index trained) { return AlphaLinear<float>(w, {.trained_planes = trained, .name = "mlp.up"}, {.planes = 3}); };
  const auto fails = [](Errc code, auto&& call) {
    const auto error = test::error_of(call);
    REQUIRE(error);
    CAPTURE(std::string(error->what()));
    CHECK(name(error->code()) == name(code));
    CHECK(std::string(error->what()).find("mlp.up") != std::string::npos);
  };
  fails(Errc::bad_argument, [&] { make(0); });
  fails(Errc::bad_argument, [&] { make(4); });
  fails(Errc::bad_argument, [] { AlphaLinear<float>(std::shared_ptr<const qd::BinaryCodedTensor<>>(), {.name = "mlp.up"}); });
  auto layer = make(1);
  fails(Errc::bad_argument, [&] { layer.set_planes(0); });
  fails(Errc::bad_argument, [&] { layer.set_planes(4); });
  fails(Errc::bad_argument, [&] { layer.weight(4); });
  const auto x = test::normal_matrix<float>(3, 16, 1), narrow = test::normal_matrix<float>(3, 15, 1);
  const auto dy = test::normal_matrix<float>(3, 8, 1);
  qd::Matrix<float> y(3, 8), dx(3, 16);
  AlphaLinear<float>::Context context;
  fails(Errc::state_order, [&] { layer.backward(dy.view(), dx.view(), context); });
  fails(Errc::shape_mismatch, [&] { layer.forward(narrow.view(), y.view(), context); });
  fails(Errc::state_order, [&] { layer.backward(dy.view(), dx.view(), context); });
  fails(Errc::shape_mismatch, [&] { layer.forward(x.view(), dx.view(), context); });
  fails(Errc::shape_mismatch, [&] { layer.set_bias(dy.view()); });
  layer.forward(x.view(), y.view(), context);
  fails(Errc::shape_mismatch, [&] { layer.backward(x.view(), dx.view(), context); });
  fails(Errc::shape_mismatch, [&] { layer.backward(dy.view(), y.view(), context); });
}

}  // namespace alpha_linear_test
