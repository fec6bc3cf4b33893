// Decoding on the emulated device, to the bits of the reference.
#include <qdylora/cuda.hpp>

#include <qdylora/cpu/reference.hpp>
#include <qdylora/io/bitsandbytes.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"
#include "support/random_data.hpp"

namespace dequantize_test {

namespace qd = qdylora;
using qd::Index;
using test::Matrix, test::MatrixView;

namespace {

struct Slab {
  Index first_row, rows, first_col, cols;
};

/// Decodes the slab into memory that begins `offset` elements into an allocation, rows `padding` elements apart, and compares every
/// element, the padding's NaN included.
template <class T, class Format, class Scales>
void check(const qd::Cuda& cuda, const qd::QuantizedTensor<Format, Scales>& host, const qd::QuantizedView<Format, Scales>& w,
           const Slab& slab, Index offset, Index padding) {
  CAPTURE(Format::name, host.rows(), host.cols(), host.block_size(), offset, padding, slab.first_row, slab.first_col);
  const Index stride = slab.cols + padding;
  Matrix<T> expected(1, offset + slab.rows * stride), found(1, expected.size());
  for (T& x : expected.span()) x = test::scalar<T>(std::numeric_limits<double>::quiet_NaN());
  Matrix<T, qd::DeviceMemory> memory(1, expected.size());
  cuda.upload(std::as_const(expected).view(), memory.view());
  qd::detail::dequantize(cuda.context(), w, MatrixView<T>(memory.data() + offset, slab.rows, slab.cols, stride), slab.first_row,
                         slab.first_col);
  cuda.download(memory.view(), found.view());
  for (Index i = 0; i < slab.rows; ++i)
    for (Index j = 0; j < slab.cols; ++j)
      expected(0, offset + i * stride + j) =
          qd::reference::to<T>(qd::reference::element(host.view(), slab.first_row + i, slab.first_col + j));
  CHECK(test::same_bits(found.view(), expected.view()));
}

template <class T, class Format, class Scales>
void check_all(const qd::Cuda& cuda) {
  const std::pair<Index, Index> shapes[] = {{0, 8}, {1, 1}, {3, 5}, {7, 43}, {5, 64}, {3, 88}, {33, 24}, {2, 4104}};
  for (const auto& [rows, cols] : shapes)
    for (const Index block : {Index{32}, Index{64}, Index{4096}}) {
      const auto host = qd::reference::quantize<Format, Scales>(test::normal_matrix<float>(rows, cols, 1).view(), block);
      const auto device = cuda.upload(host);
      const Slab whole{0, rows, 0, cols};
      check<T>(cuda, host, device.view(), whole, 0, 0);
      check<T>(cuda, host, device.view(), whole, 0, 8);  // rows of a slab with room for an adapter's
      check<T>(cuda, host, device.view(), whole, 1, 3);
      if (rows > 2 && cols > 40) {
        check<T>(cuda, host, device.view(), {1, rows - 2, 8, 32}, 8, 16);
        check<T>(cuda, host, device.view(), {2, 1, 3, 21}, 0, 1);
      }
    }
}

}  // namespace

TEMPLATE_TEST_CASE("decoded weights are the reference's to the bit", "", float, double, qd::bfloat16, qd::half) {
  using namespace qdylora;
  const CudaContext context;
  const Cuda cuda(context);
  check_all<TestType, NF4, DoubleQuant<>>(cuda);
  check_all<TestType, NF4, Float32Scales>(cuda);
  check_all<TestType, NF4, DoubleQuant<FP8E4M3>>(cuda);
  check_all<TestType, FP4, DoubleQuant<>>(cuda);
  check_all<TestType, INT4, Float32Scales>(cuda);
  check_all<TestType, FP8E4M3, DoubleQuant<>>(cuda);
  check_all<TestType, FP8E5M2, Float32Scales>(cuda);
  check_all<TestType, INT8, Float32Scales>(cuda);
}

TEST_CASE("more rows than a grid takes at once are decoded too") {
  using namespace qdylora;
  const CudaContext context;
  const Cuda cuda(context);
  const auto host = reference::quantize<NF4, DoubleQuant<>>(test::normal_matrix<float>(33300, 8, 1).view(), 64);
  check<bfloat16>(cuda, host, cuda.upload(host).view(), {0, 33300, 0, 8}, 0, 0);
}

TEST_CASE("layers that bitsandbytes stored are decoded to its weights, to the bit") {
  using namespace qdylora;
  const CudaContext context;
  const Cuda cuda(context);
  const SafetensorsFile io(test::golden("linear4bit_io.safetensors"));
  const auto check = [&]<class Format, class Scales, class T>(const std::string& variant, const std::string& tensor, Format, Scales, T) {
    CAPTURE(variant);
    const auto weight = load_bnb_4bit(SafetensorsFile(test::golden("linear4bit_" + variant + ".safetensors")), "weight");
    const auto there = cuda.upload(std::get<QuantizedTensor<Format, Scales>>(weight.storage()));
    const auto expected = test::load<T>(io, tensor);
    test::Matrix<T, DeviceMemory> decoded(96, 128);
    test::Matrix<T> found(96, 128);
    cuda.dequantize(there.view(), decoded.view());
    cuda.download(std::as_const(decoded).view(), found.view());
    CHECK(test::same_bits(found.view(), MatrixView<const T>(expected.data(), 96, 128)));
  };
  check("nf4_dq", "nf4_dq/W_dequant", NF4{}, DoubleQuant<>{}, float{});
  check("nf4_nodq", "nf4_nodq/W_dequant", NF4{}, Float32Scales{}, float{});
  check("fp4_dq", "fp4_dq/W_dequant", FP4{}, DoubleQuant<>{}, float{});
  check("nf4_dq_bf16", "bf16/W_dequant", NF4{}, DoubleQuant<>{}, bfloat16{});
}

TEST_CASE("codes at an odd address are decoded too") {
  const qd::CudaContext context;
  const qd::Cuda cuda(context);
  const auto host = qd::reference::quantize<qd::NF4, qd::DoubleQuant<>>(test::normal_matrix<float>(5, 64, 1).view(), 64);
  const auto device = cuda.upload(host);
  qd::Buffer<std::uint8_t, qd::DeviceMemory> moved(host.codes().size() + 3);
  auto view = device.view();
  cuda.upload(MatrixView<const std::uint8_t>(host.codes().data(), 1, host.codes().size()),
              MatrixView<std::uint8_t>(moved.data() + 3, 1, host.codes().size()));
  view.codes = moved.data() + 3;
  check<qd::bfloat16>(cuda, host, view, {0, 5, 0, 64}, 0, 0);
}

TEST_CASE("a slab outside of the weight is refused") {
  const qd::CudaContext context;
  const qd::Cuda cuda(context);
  const auto device = cuda.upload(qd::quantize(test::normal_matrix<float>(5, 64, 1).view()));
  Matrix<float, qd::DeviceMemory> y(4, 60);
  const auto code = [&](Index row, Index col) {
    return test::code_of([&] { qd::detail::dequantize(context, device.view(), y.view(), row, col); });
  };
  CHECK_FALSE(code(1, 4));
  CHECK(code(2, 0) == qd::Errc::shape_mismatch);
  CHECK(code(0, 5) == qd::Errc::shape_mismatch);
  CHECK(code(-1, 0) == qd::Errc::shape_mismatch);
  CHECK(test::code_of([&] { cuda.dequantize(device.view(), y.view()); }) == qd::Errc::shape_mismatch);
}

}  // namespace dequantize_test
