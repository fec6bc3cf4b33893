// Dense products by cuBLASLt, of operands whose types it multiplies.
#pragma once

#include <qdylora/config.hpp>
#if !defined(QDYLORA_DEVICE_ONLY)

#include <bit>
#include <concepts>
#include <cstdint>
#include <string>
#include <utility>

#include <qdylora/backend.hpp>
#include <qdylora/cuda/elementwise.cuh>

namespace qdylora::detail {

/// Operands of C with a result of Y, as cublasLtMatmul has them. Sums are float32, float64 for double; floats are multiplied as floats, not
/// as TF32.
template <class C, class Y>
concept MultipliedTypes = Scalar<C> && Scalar<Y> && (std::same_as<C, Y> || (sizeof(C) == 2 && std::same_as<Y, float>));

template <Scalar T>
constexpr cudaDataType blas_type() noexcept {
  if constexpr (std::same_as<T, double>) return CUDA_R_64F;
  else if constexpr (std::same_as<T, float>) return CUDA_R_32F;
  else if constexpr (std::same_as<T, half>) return CUDA_R_16F;
  else return CUDA_R_16BF;
}

/// A factor of a product: a view, or its transpose.
template <class C>
struct Factor {
  MatrixView<const C> view;
  bool transposed = false;

  Index rows() const noexcept { return transposed ? view.cols : view.rows; }
  Index cols() const noexcept { return transposed ? view.rows : view.cols; }
  Index stride() const noexcept { return view.rows > 1 ? view.stride : view.cols; }
  std::uint32_t alignment() const noexcept { return alignment_of(view.data); }

  /// What cuBLASLt is promised of an address: no more than it makes use of.
  static std::uint32_t alignment_of(const void* p) noexcept {
    return 1u << std::min(8, std::countr_zero(reinterpret_cast<std::uintptr_t>(p)));
  }
};

/// One product as cuBLASLt takes it. A row-major matrix is its transpose in column-major order, so y^T = b^T a^T is asked for.
class GemmCall {
 public:
  GemmCall(const GemmProblem& problem, cublasComputeType_t compute, cudaDataType scale) {
    const auto type = static_cast<cudaDataType>(problem.type), output_type = static_cast<cudaDataType>(problem.output_type);
    QDYLORA_CUDA_TRY(cublasLtMatmulDescInit(&operation_, compute, scale));
    set(CUBLASLT_MATMUL_DESC_TRANSA, problem.b_transposed);
    set(CUBLASLT_MATMUL_DESC_TRANSB, problem.a_transposed);
    describe(b_, type, problem.k, problem.n, problem.b_stride, problem.b_transposed);
    describe(a_, type, problem.m, problem.k, problem.a_stride, problem.a_transposed);
    describe(y_, output_type, problem.m, problem.n, problem.y_stride, false);
  }

  cublasLtMatmulAlgo_t choose_algorithm(const CudaContext& context, const GemmProblem& problem) {
    cublasLtMatmulPreferenceOpaque_t preference;
    QDYLORA_CUDA_TRY(cublasLtMatmulPreferenceInit(&preference));
    const auto prefer = [&](cublasLtMatmulPreferenceAttributes_t attribute, auto value) {
      QDYLORA_CUDA_TRY(cublasLtMatmulPreferenceSetAttribute(&preference, attribute, &value, sizeof(value)));
    };
    prefer(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, static_cast<std::uint64_t>(problem.workspace_bytes));
    // Where a sum is split, its parts stay in the type of sums and are added in a fixed order.
    prefer(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, static_cast<std::uint32_t>(CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE));
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, problem.b_alignment);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, problem.a_alignment);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, problem.y_alignment);
    prefer(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, problem.y_alignment);
    cublasLtMatmulHeuristicResult_t result{};
    int found = 0;
    const cublasStatus_t status =
        cublasLtMatmulAlgoGetHeuristic(context.blas(), &operation_, &b_, &a_, &y_, &y_, &preference, 1, &result, &found);
    if (status != CUBLAS_STATUS_NOT_SUPPORTED) {
      QDYLORA_EXPECTS(status == CUBLAS_STATUS_SUCCESS || !context.recording(), state_order,
                      "cuBLASLt cannot choose an algorithm while a graph is recorded: do the same work once before");
      QDYLORA_CUDA_TRY(status);
    }
    const auto factor = [](Index rows, Index cols, Index stride, bool transposed) {
      return shape_text(rows, cols) + (transposed ? " (transposed" : " (") + " in rows of " + std::to_string(stride) + ")";
    };
    QDYLORA_EXPECTS(found == 1, unsupported,
                    "cuBLASLt has no algorithm for a product " + factor(problem.m, problem.k, problem.a_stride, problem.a_transposed) +
                        " . " + factor(problem.k, problem.n, problem.b_stride, problem.b_transposed));
    return result.algo;
  }

  template <class S, class C, class Y>
  void run(const CudaContext& context, const cublasLtMatmulAlgo_t& algorithm, const C* a, const C* b, Y* y, Update update,
           std::span<std::byte> workspace) {
    const S alpha = 1, beta = update == Update::accumulate ? 1 : 0;
    QDYLORA_CUDA_TRY(cublasLtMatmul(context.blas(), &operation_, &alpha, b, &b_, a, &a_, &beta, y, &y_, y, &y_, &algorithm,
                                    workspace.data(), workspace.size(), context.stream()));
  }

 private:
  void set(cublasLtMatmulDescAttributes_t attribute, bool transposed) {
    const std::int32_t operation = transposed ? CUBLAS_OP_T : CUBLAS_OP_N;
    QDYLORA_CUDA_TRY(cublasLtMatmulDescSetAttribute(&operation_, attribute, &operation, sizeof(operation)));
  }
  // `rows` and `cols` are those of the factor.
  static void describe(cublasLtMatrixLayoutOpaque_t& layout, cudaDataType type, Index rows, Index cols, Index stride, bool transposed) {
    if (transposed) std::swap(rows, cols);
    QDYLORA_CUDA_TRY(
        cublasLtMatrixLayoutInit(&layout, type, static_cast<std::uint64_t>(cols), static_cast<std::uint64_t>(rows), stride));
  }

  cublasLtMatmulDescOpaque_t operation_;
  cublasLtMatrixLayoutOpaque_t a_, b_, y_;
};

inline constexpr Index gemm_workspace = Index{32} << 20;  // what cuBLASLt makes use of on Hopper; less elsewhere

/// y [m, n] (+)= a [m, k] . b [k, n]. cuBLASLt works in what `scratch` has left.
template <class C, class Y>
  requires MultipliedTypes<C, Y>
void gemm(const CudaContext& context, const Scratch& scratch, const Factor<C>& a, const Factor<C>& b, MatrixView<Y> y, Update update) {
  using S = Accumulator<C>;
  constexpr std::size_t most_algorithms = 4096;
  if (y.empty()) return;
  if (a.cols() == 0) {
    if (update == Update::overwrite) fill(context, y, Y{});
    return;
  }
  const auto workspace = scratch.rest(gemm_workspace);
  const GemmProblem problem{blas_type<C>(), blas_type<Y>(),   a.transposed,  b.transposed,  a.rows(),
                            b.cols(),       a.cols(),         a.stride(),    b.stride(),    y.rows > 1 ? y.stride : y.cols,
                            a.alignment(),  b.alignment(),    Factor<C>::alignment_of(y.data), workspace.size()};
  GemmCall call(problem, std::same_as<S, double> ? CUBLAS_COMPUTE_64F : CUBLAS_COMPUTE_32F, blas_type<S>());
  auto& algorithms = context.gemm_algorithms();
  auto chosen = algorithms.find(problem);
  if (chosen == algorithms.end()) {
    if (algorithms.size() >= most_algorithms) algorithms.clear();  // batches of ever other sizes
    chosen = algorithms.emplace(problem, call.choose_algorithm(context, problem)).first;
  }
  call.template run<S>(context, chosen->second, a.view.data, b.view.data, y.data, update, workspace);
}

}  // namespace qdylora::detail
#endif
