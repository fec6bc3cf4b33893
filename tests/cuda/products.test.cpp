// Products on the emulated device: the bodies that the CPU passes, and what is the device's own.
#include <qdylora/cuda.hpp>

#include "backend/products.inc"

namespace qd = qdylora;
using qd::Cuda;
using qd::Index;
using test::Matrix, test::MatrixView;

namespace {

class Gpu {
 public:
  explicit Gpu(qd::CudaOptions options = {.workspace_bytes = std::size_t{4} << 20}) : context_(options) {}
  operator Cuda() const { return Cuda(context_); }

 private:
  qd::CudaContext context_;
};

}  // namespace

#define ON_THE_DEVICE(name, body)                                             \
  TEMPLATE_TEST_CASE(name, "[cuda]", float, double, qd::bfloat16, qd::half) { \
    const Gpu gpu;                                                            \
    body<Cuda, TestType>(gpu);                                                \
  }

ON_THE_DEVICE("quantized products on the device are the reference's", test::quantized_products)
ON_THE_DEVICE("dense products on the device are the reference's", test::dense_products)
ON_THE_DEVICE("dense products with other types on the device", test::dense_products_with_weights_of_other_types)
ON_THE_DEVICE("weight gradients on the device are the reference's", test::weight_gradients)
ON_THE_DEVICE("truncated adapters on the device", test::products_with_the_first_rows_of_an_adapter)
ON_THE_DEVICE("products on the device refuse other shapes", test::products_refuse_other_shapes)

TEMPLATE_TEST_CASE("products go slab by slab through little memory", "[cuda]", float, double, qd::bfloat16, qd::half) {
  using T = TestType;
  const Gpu gpu({.workspace_bytes = 60000, .slab_bytes = 20000});
  const test::ProductShape shapes[] = {{33, 49, 65}, {20, 130, 259}, {40, 31, 640}};
  test::quantized_products_of<qd::NF4, qd::DoubleQuant<>, Cuda, T>(gpu, shapes, 64);
  test::quantized_products_of<qd::FP8E4M3, qd::Float32Scales, Cuda, T>(gpu, shapes, 32);
  test::dense_products_of<Cuda, T, qd::half, T, T>(gpu, shapes);
  test::dense_products_of<Cuda, T, float, T, T>(gpu, shapes);
}

TEST_CASE("a workspace too small for one row of a slab is an error") {
  const qd::CudaContext context({.workspace_bytes = 1024});
  const Cuda cuda(context);
  const auto w = cuda.upload(qd::quantize(test::normal_matrix<float>(5, 640, 1).view()));
  Matrix<float, qd::DeviceMemory> x(3, 640), y(3, 5);
  CHECK(test::code_of([&] { cuda.matmul(x.view(), w.view(), y.view()); }) == qd::Errc::memory);
}
