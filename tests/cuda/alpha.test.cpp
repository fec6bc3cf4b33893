// Planes of signs on the emulated device, beside the same on the CPU: their decoding, AlphaLinear, and what the host has of it.
#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/cuda.hpp>
#include <qdylora/nn/alpha_linear.hpp>

#include "backend/binary_codes.inc"
#include "support/catch.hpp"

namespace alpha_test {

namespace qd = qdylora;
using qd::AlphaLinear, qd::Cpu, qd::Cuda, qd::Index;
using test::Matrix, test::MatrixView;

namespace {

struct Shape {
  Index out, in, group_size;
};
constexpr Index planes = 3;

std::shared_ptr<const qd::BinaryCodedTensor<>> coded(const Shape& shape) {
  return std::make_shared<const qd::BinaryCodedTensor<>>(
      qd::binary_quantize(test::normal_matrix<float>(shape.out, shape.in, 1, 0.2).view(),
                          {.planes = planes, .group_size = shape.group_size, .iterations = 2}));
}

/// A layer on each side, with the same scales, away from the codes', and the same bias.
template <class T>
struct Pair {
  using Acc = qd::Accumulator<T>;

  Pair(const Shape& shape, Index trained, const Cuda& cuda)
      : backend(cuda),
        here(coded(shape), {.trained_planes = trained}, Cpu(1)),
        there(std::make_shared<const qd::BinaryCodedTensor<qd::DeviceMemory>>(cuda.upload(*here.codes())), {.trained_planes = trained}, cuda) {
    qd::Rng rng(21);
    for (auto& a : here.alpha().value.span()) a += static_cast<Acc>(0.1f * rng.normal());
    cuda.upload(std::as_const(here.alpha().value).view(), there.alpha().value.view());
    const auto bias = test::normal_matrix<Acc>(1, shape.out, 2);
    const auto device_bias = up(bias);
    here.set_bias(bias.view());
    there.set_bias(device_bias.view());
    cuda.synchronize();
  }
  template <class S>
  qd::Matrix<S, qd::DeviceMemory> up(const Matrix<S>& x) const {
    qd::Matrix<S, qd::DeviceMemory> y(x.rows(), x.cols());
    backend.upload(x.view(), y.view());
    backend.synchronize();
    return y;
  }
  template <class S>
  auto down(MatrixView<S> x) const {
    using X = std::remove_const_t<S>;
    Matrix<X> y(x.rows, x.cols);
    backend.download(MatrixView<const X>(x), y.view());
    return y;
  }

  Cuda backend;
  AlphaLinear<T> here;
  AlphaLinear<T, Cuda> there;
};

}  // namespace

TEMPLATE_TEST_CASE("products with planes of signs are the reference's on the device", "[cuda]", float, double, qd::bfloat16, qd::half) {
  const qd::CudaContext context({.workspace_bytes = std::size_t{1} << 18});  // several slabs
  test::binary_coded_products<Cuda, TestType>(Cuda(context));
}

TEMPLATE_TEST_CASE("sums of signs are the reference's on the device", "[cuda]", float, double) {
  const qd::CudaContext context({.workspace_bytes = std::size_t{1} << 18});
  test::sums_of_signs<Cuda, TestType>(Cuda(context));
}

TEST_CASE("planes of signs decode on the device to the bits that they have on the host", "[cuda]") {
  const qd::CudaContext context({.workspace_bytes = std::size_t{1} << 20});
  const Cuda cuda(context);
  const auto shape = GENERATE(Shape{6, 7, 0}, Shape{9, 40, 16}, Shape{5, 264, 0}, Shape{37, 136, 64}, Shape{4, 21, 8});
  const auto check = [&]<class T>(T) {
    for (Index trained = 1; trained <= planes; ++trained) {
      const Pair<T> pair(shape, trained, cuda);
      for (Index used = 1; used <= planes; ++used) {
        CAPTURE(shape.out, shape.in, shape.group_size, trained, used);
        CHECK(test::same_bits(pair.down(pair.there.weight(used).view()).view(), pair.here.weight(used).view()));
      }
    }
  };
  check(float{});
  check(double{});

  // From any row and column on, in any type, as slabs are.
  const auto codes = coded(shape);
  const auto there = cuda.upload(*codes);
  qd::Matrix<float> whole(shape.out, shape.in);
  qd::decode(*codes, whole.view());
  const auto part = [&]<class C>(C, Index row, Index col, Index pad) {
    const Index rows = shape.out - row, cols = shape.in - col;
    Matrix<C> expected(rows, cols), found(rows, cols);
    for (Index i = 0; i < rows; ++i)
      for (Index j = 0; j < cols; ++j) expected(i, j) = test::scalar<C>(static_cast<double>(whole(row + i, col + j)));
    qd::Matrix<C, qd::DeviceMemory> y(rows, cols + pad);
    const auto slab = y.view().left_cols(cols);
    qd::detail::decode(context.stream(), context, there.view(planes, MatrixView<const float>()), slab, row, col);
    cuda.download(MatrixView<const C>(slab), found.view());
    CAPTURE(shape.in, shape.group_size, row, col, pad, qd::dtype_name<C>());
    CHECK(test::same_bits(found.view(), expected.view()));
  };
  for (const Index row : {0, 3})
    for (const Index col : {0, 3, 5})
      for (const Index pad : {0, 5, 8}) {
        part(float{}, row, col, pad);
        part(qd::bfloat16{}, row, col, pad);
        part(qd::half{}, row, col, pad);
      }
}

TEMPLATE_TEST_CASE("an alpha layer has on the device the outputs and gradients that it has on the CPU", "[cuda]", float, double, qd::bfloat16,
                   qd::half) {
  using T = TestType;
  const qd::CudaContext context({.workspace_bytes = std::size_t{1} << 18});  // several slabs
  const Cuda cuda(context);
  const auto shape = GENERATE(Shape{6, 7, 0}, Shape{530, 72, 24}, Shape{40, 520, 0});
  const Index trained = GENERATE(Index{1}, Index{3});
  const Index tokens = GENERATE(Index{1}, Index{19});
  Pair<T> pair(shape, trained, cuda);
  const auto x = test::normal_matrix<T>(tokens, shape.in, 3), dy = test::normal_matrix<T>(tokens, shape.out, 4);
  const auto device_x = pair.up(x), device_dy = pair.up(dy);
  for (const Index used : {Index{1}, planes})
    for (const bool tuned : {true, false}) {
      CAPTURE(shape.out, shape.in, trained, tokens, used, tuned);
      pair.here.set_planes(used);
      pair.there.set_planes(used);
      pair.here.set_tuned(tuned);
      pair.there.set_tuned(tuned);
      CHECK(test::normalised_squared_error(pair.down(pair.there.forward(device_x)).view(), pair.here.forward(x)) < test::bound<T>());
      CHECK(test::normalised_squared_error(pair.down(pair.there.backward(device_dy.view())).view(), pair.here.backward(dy.view())) <
            test::bound<T>());
      // Gradients add up.
      const auto gradient = pair.down(pair.there.alpha().gradient.view());
      CHECK(test::normalised_squared_error(gradient.view(), pair.here.alpha().gradient.view()) < test::bound<T>());
      CHECK(pair.there.alpha().touched == pair.here.alpha().touched);
    }

  const auto back = qd::to_host(pair.there);
  CHECK(test::same_bits(back.alpha().value.view(), pair.here.alpha().value.view()));
  CHECK(test::same_bits(back.codes()->scales(), pair.here.codes()->scales()));
  CHECK(std::ranges::equal(back.codes()->bits().span(), pair.here.codes()->bits().span()));
  CHECK(back.codes()->shape() == pair.here.codes()->shape());
}

TEST_CASE("a group may be larger than any weight", "[cuda]") {
  const qd::CudaContext context({.workspace_bytes = std::size_t{1} << 18});
  const Cuda cuda(context);
  for (const Index group_size : {Index{1} << 32, (Index{1} << 32) + 8}) {
    const auto codes = coded({6, 40, group_size});
    const auto there = cuda.upload(*codes);
    Matrix<float> expected(6, 40), found(6, 40);
    qd::decode(*codes, expected.view());
    qd::Matrix<float, qd::DeviceMemory> y(6, 40);
    cuda.dequantize(there.view(planes, MatrixView<const float>()), y.view());
    cuda.download(std::as_const(y).view(), found.view());
    CHECK(test::same_bits(found.view(), expected.view()));
  }
}

TEST_CASE("what is no part of a layer's planes is refused on the device by name", "[cuda]") {
  const qd::CudaContext context({.workspace_bytes = std::size_t{1} << 18});
  const Cuda cuda(context);
  const auto codes = coded({6, 40, 8});
  const auto there = cuda.upload(*codes);
  const auto code = [](auto&& f) { return test::code_of(f); };
  qd::Matrix<float, qd::DeviceMemory> d(4, 40), sums(2 * 6, 5);
  const auto w = there.view(2, MatrixView<const float>());
  cuda.fill(d.view(), 1.0f);
  cuda.fill(sums.view(), 0.0f);
  const MatrixView<const float> part(d.view());
  cuda.add_sums_of_signs(part, w, 2, sums.view());
  CHECK(code([&] { cuda.add_sums_of_signs(part, w, 3, sums.view()); }) == qd::Errc::shape_mismatch);
  CHECK(code([&] { cuda.add_sums_of_signs(part.left_cols(39), w, 0, sums.view()); }) == qd::Errc::shape_mismatch);
  CHECK(code([&] { cuda.add_sums_of_signs(part, w, 0, sums.view().top_rows(11)); }) == qd::Errc::shape_mismatch);
  CHECK(code([&] { cuda.dequantize(w, d.view()); }) == qd::Errc::shape_mismatch);
  CHECK(code([&] { there.view(4, MatrixView<const float>()); }) == qd::Errc::bad_argument);
  CHECK(code([&] { there.view(1, MatrixView<const float>(sums.view())); }) == qd::Errc::shape_mismatch);
}

}  // namespace alpha_test
