// The calls of cuBLASLt: what is kept between them, and what the emulated cuBLASLt refuses as the real one does.
#include <qdylora/cuda/gemm.cuh>

#include "support/catch.hpp"
#include "support/cuda_emulator/device_array.hpp"
#include "support/files.hpp"
#include "support/random_data.hpp"

namespace gemm_test {

namespace qd = qdylora;
using qd::Index, qd::Update;
using test::Matrix, test::MatrixView;
using test::emulator::Fault;

TEST_CASE("an algorithm is chosen once for a problem") {
  const qd::CudaContext context({.workspace_bytes = 4096});
  const qd::Scratch scratch(context);
  Matrix<float, qd::DeviceMemory> a(4, 6), b(6, 5), y(4, 5);
  for (Matrix<float, qd::DeviceMemory>* m : {&a, &b}) qd::detail::fill(context, m->view(), 0.5f);
  const auto multiply = [&](Index rows, Update update) {
    qd::detail::gemm<float>(context, scratch, {a.view().top_rows(rows)}, {b.view()}, y.view().top_rows(rows), update);
  };
  multiply(4, Update::overwrite);
  multiply(4, Update::accumulate);
  CHECK(context.gemm_algorithms().size() == 1);
  CHECK(y.data()[7] == 3.0f);
  multiply(3, Update::overwrite);
  CHECK(context.gemm_algorithms().size() == 2);
  CHECK(y.data()[7] == 1.5f);
  CHECK(y.data()[17] == 3.0f);  // the last row was none of it
}

TEST_CASE("a product without depth is zero, or adds nothing") {
  const qd::CudaContext context({.workspace_bytes = 4096});
  const qd::Scratch scratch(context);
  Matrix<float, qd::DeviceMemory> y(2, 3);
  qd::detail::fill(context, y.view(), 2.0f);
  const MatrixView<const float> a(nullptr, 2, 0), b(nullptr, 0, 3);
  qd::detail::gemm<float>(context, scratch, {a}, {b}, y.view(), Update::accumulate);
  CHECK(y.data()[5] == 2.0f);
  qd::detail::gemm<float>(context, scratch, {a}, {b}, y.view(), Update::overwrite);
  CHECK(y.data()[5] == 0.0f);
}

TEST_CASE("the emulated cuBLASLt takes no more than cuBLASLt does") {
  const auto status = [](cublasComputeType_t compute, cudaDataType scale, cudaDataType in, cudaDataType out, Index depth = 4) {
    cublasLtContext handle;
    cublasLtMatmulDescOpaque_t operation;
    cublasLtMatrixLayoutOpaque_t a, b, d;
    cublasLtMatmulPreferenceOpaque_t preference;
    cublasLtMatmulHeuristicResult_t result;
    int found = 0;
    cublasLtMatmulDescInit(&operation, compute, scale);
    cublasLtMatrixLayoutInit(&a, in, 3, static_cast<std::uint64_t>(depth), 3);
    cublasLtMatrixLayoutInit(&b, in, 4, 5, 4);
    cublasLtMatrixLayoutInit(&d, out, 3, 5, 3);
    cublasLtMatmulPreferenceInit(&preference);
    return cublasLtMatmulAlgoGetHeuristic(&handle, &operation, &a, &b, &d, &d, &preference, 1, &result, &found);
  };
  CHECK(status(CUBLAS_COMPUTE_32F, CUDA_R_32F, CUDA_R_16BF, CUDA_R_32F) == CUBLAS_STATUS_SUCCESS);
  CHECK(status(CUBLAS_COMPUTE_32F, CUDA_R_32F, CUDA_R_16F, CUDA_R_16F) == CUBLAS_STATUS_SUCCESS);
  CHECK(status(CUBLAS_COMPUTE_64F, CUDA_R_64F, CUDA_R_64F, CUDA_R_64F) == CUBLAS_STATUS_SUCCESS);
  CHECK(status(CUBLAS_COMPUTE_32F, CUDA_R_32F, CUDA_R_32F, CUDA_R_16BF) == CUBLAS_STATUS_NOT_SUPPORTED);
  CHECK(status(CUBLAS_COMPUTE_32F, CUDA_R_32F, CUDA_R_16F, CUDA_R_16BF) == CUBLAS_STATUS_NOT_SUPPORTED);
  CHECK(status(CUBLAS_COMPUTE_64F, CUDA_R_64F, CUDA_R_32F, CUDA_R_64F) == CUBLAS_STATUS_NOT_SUPPORTED);
  CHECK(status(CUBLAS_COMPUTE_32F, CUDA_R_32F, CUDA_R_32F, CUDA_R_32F, 3) == CUBLAS_STATUS_INVALID_VALUE);
  CHECK(status(CUBLAS_COMPUTE_32F, CUDA_R_32F, CUDA_R_32F, CUDA_R_32F, 0) == CUBLAS_STATUS_INVALID_VALUE);
}

TEST_CASE("a matrix that is not in the device's memory is a fault") {
  const qd::CudaContext context({.workspace_bytes = 4096});
  const qd::Scratch scratch(context);
  Matrix<float, qd::DeviceMemory> a(4, 6), y(4, 5);
  const Matrix<float> host(6, 5);
  const auto multiply = [&](MatrixView<const float> b) {
    qd::detail::gemm<float>(context, scratch, {a.view()}, {b}, y.view(), Update::overwrite);
  };
  CHECK_THROWS_AS(multiply(host.view()), Fault);
  Matrix<float, qd::DeviceMemory> small(5, 5);
  CHECK_THROWS_AS(multiply({small.data(), 6, 5}), Fault);  // its last row is beyond the allocation
}

}  // namespace gemm_test
