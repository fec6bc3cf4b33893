// The part of cuBLASLt that qdylora calls, for a device that is emulated: column-major products by plain loops, summed in double. What
// cuBLASLt would refuse (types that do not go together, no size, a workspace or an algorithm that was not asked for) has its status; what
// it would not notice (a matrix outside of memory, less alignment than promised) is a Fault.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include <cuda_runtime.h>

#include "qdylora/core/scalar.hpp"
#include "support/cuda_emulator/fault.hpp"

enum cublasStatus_t {
  CUBLAS_STATUS_SUCCESS = 0,
  CUBLAS_STATUS_NOT_INITIALIZED = 1,
  CUBLAS_STATUS_INVALID_VALUE = 7,
  CUBLAS_STATUS_EXECUTION_FAILED = 13,
  CUBLAS_STATUS_NOT_SUPPORTED = 15
};
struct cublasLtContext {};
using cublasLtHandle_t = cublasLtContext*;

inline const char* cublasLtGetStatusString(cublasStatus_t) { return "an emulated status"; }
inline std::size_t cublasLtGetVersion() { return 130000; }
inline cublasStatus_t cublasLtCreate(cublasLtHandle_t* handle) {
  *handle = new cublasLtContext;
  ++test::emulator::machine().handles;
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtDestroy(cublasLtHandle_t handle) {
  delete handle;
  --test::emulator::machine().handles;
  return CUBLAS_STATUS_SUCCESS;
}

// ---- descriptors -----------------------------------------------------------------------------------------------------------------

enum cudaDataType { CUDA_R_32F = 0, CUDA_R_64F = 1, CUDA_R_16F = 2, CUDA_R_16BF = 14 };
enum cublasComputeType_t { CUBLAS_COMPUTE_32F = 68, CUBLAS_COMPUTE_64F = 70 };
enum cublasOperation_t { CUBLAS_OP_N = 0, CUBLAS_OP_T = 1 };

struct cublasLtMatmulDescOpaque_t {
  cublasComputeType_t compute;
  cudaDataType scale;
  std::int32_t operation[2];  // of A, of B
};
using cublasLtMatmulDesc_t = cublasLtMatmulDescOpaque_t*;
enum cublasLtMatmulDescAttributes_t { CUBLASLT_MATMUL_DESC_TRANSA = 3, CUBLASLT_MATMUL_DESC_TRANSB = 4 };
inline cublasStatus_t cublasLtMatmulDescInit(cublasLtMatmulDesc_t desc, cublasComputeType_t compute, cudaDataType scale) {
  *desc = {compute, scale, {CUBLAS_OP_N, CUBLAS_OP_N}};
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulDescSetAttribute(cublasLtMatmulDesc_t desc, cublasLtMatmulDescAttributes_t attribute,
                                                     const void* value, std::size_t bytes) {
  if (bytes != sizeof(std::int32_t)) return CUBLAS_STATUS_INVALID_VALUE;
  std::memcpy(&desc->operation[attribute - CUBLASLT_MATMUL_DESC_TRANSA], value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

struct cublasLtMatrixLayoutOpaque_t {
  cudaDataType type;
  std::uint64_t rows, cols;
  std::int64_t ld;
};
using cublasLtMatrixLayout_t = cublasLtMatrixLayoutOpaque_t*;
inline cublasStatus_t cublasLtMatrixLayoutInit(cublasLtMatrixLayout_t layout, cudaDataType type, std::uint64_t rows, std::uint64_t cols,
                                               std::int64_t ld) {
  *layout = {type, rows, cols, ld};
  return CUBLAS_STATUS_SUCCESS;
}

enum cublasLtReductionScheme_t { CUBLASLT_REDUCTION_SCHEME_NONE = 0, CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE = 2 };
enum cublasLtMatmulPreferenceAttributes_t {
  CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES = 1,
  CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK = 3,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES = 5,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES = 6,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES = 7,
  CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES = 8,
};
struct cublasLtMatmulPreferenceOpaque_t {
  std::uint64_t attribute[9];
};
using cublasLtMatmulPreference_t = cublasLtMatmulPreferenceOpaque_t*;
inline cublasStatus_t cublasLtMatmulPreferenceInit(cublasLtMatmulPreference_t preference) {
  *preference = {{0, 0, 0, 3, 0, 256, 256, 256, 256}};
  return CUBLAS_STATUS_SUCCESS;
}
inline cublasStatus_t cublasLtMatmulPreferenceSetAttribute(cublasLtMatmulPreference_t preference,
                                                           cublasLtMatmulPreferenceAttributes_t attribute, const void* value,
                                                           std::size_t bytes) {
  const bool wide = attribute == CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
  if (bytes != (wide ? sizeof(std::uint64_t) : sizeof(std::uint32_t))) return CUBLAS_STATUS_INVALID_VALUE;
  preference->attribute[attribute] = 0;
  std::memcpy(&preference->attribute[attribute], value, bytes);
  return CUBLAS_STATUS_SUCCESS;
}

// ---- products --------------------------------------------------------------------------------------------------------------------

/// What an algorithm was chosen for: it may serve no other product.
struct cublasLtMatmulAlgo_t {
  cublasLtMatmulDescOpaque_t operation;
  cublasLtMatrixLayoutOpaque_t layout[4];
  std::uint64_t alignment[4];
  std::uint64_t workspace;
};
struct cublasLtMatmulHeuristicResult_t {
  cublasLtMatmulAlgo_t algo;
  std::size_t workspaceSize;
  cublasStatus_t state;
};

namespace test::emulator {

/// The documented table of cublasLtMatmul, as far as it is used: CUBLAS_COMPUTE_32F takes A and B of one type, float or 16-bit, C and D
/// of that type or float; CUBLAS_COMPUTE_64F is all double. Alpha and beta are of the scale type.
inline bool go_together(const cublasLtMatmulDescOpaque_t& op, const cublasLtMatrixLayoutOpaque_t& a, const cublasLtMatrixLayoutOpaque_t& b,
                        const cublasLtMatrixLayoutOpaque_t& c, const cublasLtMatrixLayoutOpaque_t& d) {
  if (a.type != b.type || c.type != d.type) return false;
  if (op.compute == CUBLAS_COMPUTE_64F) return op.scale == CUDA_R_64F && a.type == CUDA_R_64F && c.type == CUDA_R_64F;
  return op.scale == CUDA_R_32F && a.type != CUDA_R_64F && (c.type == a.type || c.type == CUDA_R_32F);
}
inline bool fit(const cublasLtMatmulDescOpaque_t& op, const cublasLtMatrixLayoutOpaque_t& a, const cublasLtMatrixLayoutOpaque_t& b,
                const cublasLtMatrixLayoutOpaque_t& c, const cublasLtMatrixLayoutOpaque_t& d) {
  const bool ta = op.operation[0] == CUBLAS_OP_T, tb = op.operation[1] == CUBLAS_OP_T;
  bool ok = (ta ? a.cols : a.rows) == d.rows && (tb ? b.rows : b.cols) == d.cols && (ta ? a.rows : a.cols) == (tb ? b.cols : b.rows);
  ok = ok && c.rows == d.rows && c.cols == d.cols;
  for (const auto* m : {&a, &b, &c, &d}) ok = ok && m->rows > 0 && m->cols > 0 && m->ld >= static_cast<std::int64_t>(m->rows);
  return ok;
}

inline std::size_t bytes_of(cudaDataType type) { return type == CUDA_R_64F ? 8 : type == CUDA_R_32F ? 4 : 2; }

/// A column-major matrix in the device's memory. Faults where one of its columns is not there.
class BlasMatrix {
 public:
  BlasMatrix(const char* name, const void* data, const cublasLtMatrixLayoutOpaque_t& layout, std::uint64_t alignment)
      : data_(static_cast<std::byte*>(const_cast<void*>(data))), layout_(layout) {
    const std::size_t column = layout.rows * bytes_of(layout.type);
    const auto refuse = [&](const std::string& why) { throw Fault({"cublasLtMatmul"}, std::string("matrix ") + name + " " + why); };
    if (reinterpret_cast<std::uintptr_t>(data) % alignment != 0) refuse("is less aligned than was promised");
    for (std::uint64_t j = 0; j < layout.cols; ++j)
      if (const auto complaint = global_memory().complaint(at(0, j), column, bytes_of(layout.type))) refuse(*complaint);
  }

  double load(std::uint64_t i, std::uint64_t j) const {
    switch (layout_.type) {
      case CUDA_R_64F: return read<double>(i, j);
      case CUDA_R_32F: return static_cast<double>(read<float>(i, j));
      case CUDA_R_16F: return static_cast<double>(static_cast<float>(read<qdylora::half>(i, j)));
      default: return static_cast<double>(static_cast<float>(read<qdylora::bfloat16>(i, j)));
    }
  }
  void store(std::uint64_t i, std::uint64_t j, double value) const {
    switch (layout_.type) {
      case CUDA_R_64F: return write(i, j, value);
      case CUDA_R_32F: return write(i, j, static_cast<float>(value));
      case CUDA_R_16F: return write(i, j, qdylora::half(static_cast<float>(value)));
      default: return write(i, j, qdylora::bfloat16(static_cast<float>(value)));
    }
  }

 private:
  std::byte* at(std::uint64_t i, std::uint64_t j) const {
    return data_ + (j * static_cast<std::uint64_t>(layout_.ld) + i) * bytes_of(layout_.type);
  }
  template <class T>
  T read(std::uint64_t i, std::uint64_t j) const {
    return *reinterpret_cast<const T*>(at(i, j));
  }
  template <class T>
  void write(std::uint64_t i, std::uint64_t j, T value) const {
    *reinterpret_cast<T*>(at(i, j)) = value;
  }

  std::byte* data_;
  cublasLtMatrixLayoutOpaque_t layout_;
};

}  // namespace test::emulator

inline cublasStatus_t cublasLtMatmulAlgoGetHeuristic(cublasLtHandle_t handle, cublasLtMatmulDesc_t op, cublasLtMatrixLayout_t a,
                                                     cublasLtMatrixLayout_t b, cublasLtMatrixLayout_t c, cublasLtMatrixLayout_t d,
                                                     cublasLtMatmulPreference_t preference, int requested,
                                                     cublasLtMatmulHeuristicResult_t* results, int* found) {
  *found = 0;
  if (handle == nullptr || requested < 1 || !test::emulator::fit(*op, *a, *b, *c, *d)) return CUBLAS_STATUS_INVALID_VALUE;
  if (!test::emulator::go_together(*op, *a, *b, *c, *d)) return CUBLAS_STATUS_NOT_SUPPORTED;
  const auto& p = preference->attribute;
  results[0] = {{*op, {*a, *b, *c, *d}, {p[5], p[6], p[7], p[8]}, p[CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES]},
                p[CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES],
                CUBLAS_STATUS_SUCCESS};
  *found = 1;
  return CUBLAS_STATUS_SUCCESS;
}

// Not inlined: where alpha is seen to be a float, g++ warns of the double it is not.
[[gnu::noinline]] inline cublasStatus_t cublasLtMatmul(cublasLtHandle_t handle, cublasLtMatmulDesc_t op, const void* alpha, const void* a,
                                                       cublasLtMatrixLayout_t a_layout, const void* b, cublasLtMatrixLayout_t b_layout,
                                                       const void* beta, const void* c, cublasLtMatrixLayout_t c_layout, void* d,
                                                       cublasLtMatrixLayout_t d_layout, const cublasLtMatmulAlgo_t* algorithm,
                                                       void* workspace, std::size_t workspace_bytes, cudaStream_t stream) {
  using namespace test::emulator;
  ++machine().products;
  if (handle == nullptr || !fit(*op, *a_layout, *b_layout, *c_layout, *d_layout)) return CUBLAS_STATUS_INVALID_VALUE;
  if (!go_together(*op, *a_layout, *b_layout, *c_layout, *d_layout)) return CUBLAS_STATUS_NOT_SUPPORTED;
  const auto same = [](const cublasLtMatrixLayoutOpaque_t& x, const cublasLtMatrixLayoutOpaque_t& y) {
    return x.type == y.type && x.rows == y.rows && x.cols == y.cols && x.ld == y.ld;
  };
  const cublasLtMatmulAlgo_t& chosen = *algorithm;
  if (chosen.operation.compute != op->compute || !std::equal(op->operation, op->operation + 2, chosen.operation.operation) ||
      !same(chosen.layout[0], *a_layout) || !same(chosen.layout[1], *b_layout) || !same(chosen.layout[2], *c_layout) ||
      !same(chosen.layout[3], *d_layout) || workspace_bytes < chosen.workspace)
    return CUBLAS_STATUS_INVALID_VALUE;
  const bool wide = op->scale == CUDA_R_64F;
  const auto number = [wide](const void* p) { return wide ? *static_cast<const double*>(p) : *static_cast<const float*>(p); };
  const double al = number(alpha), be = number(beta);
  const auto multiply = [=, operation = *op, chosen = *algorithm, a_shape = *a_layout, b_shape = *b_layout, c_shape = *c_layout,
                         d_shape = *d_layout] {
    if (workspace_bytes > 0) {
      if (const auto complaint = global_memory().complaint(workspace, workspace_bytes, 256))
        throw Fault({"cublasLtMatmul"}, "the workspace " + *complaint);
      std::memset(workspace, 0xFF, workspace_bytes);  // an algorithm may write all of it
    }

    const BlasMatrix left("A", a, a_shape, chosen.alignment[0]), right("B", b, b_shape, chosen.alignment[1]),
        in("C", c, c_shape, chosen.alignment[2]), out("D", d, d_shape, chosen.alignment[3]);
    const bool ta = operation.operation[0] == CUBLAS_OP_T, tb = operation.operation[1] == CUBLAS_OP_T;
    const std::uint64_t depth = ta ? a_shape.rows : a_shape.cols;
    std::vector<double> columns(depth * d_shape.rows), column(depth);
    for (std::uint64_t i = 0; i < d_shape.rows; ++i)
      for (std::uint64_t k = 0; k < depth; ++k) columns[i * depth + k] = ta ? left.load(k, i) : left.load(i, k);
    for (std::uint64_t j = 0; j < d_shape.cols; ++j) {
      for (std::uint64_t k = 0; k < depth; ++k) column[k] = tb ? right.load(j, k) : right.load(k, j);
      for (std::uint64_t i = 0; i < d_shape.rows; ++i) {
        double sum = 0.0;
        for (std::uint64_t k = 0; k < depth; ++k) sum += columns[i * depth + k] * column[k];
        out.store(i, j, al * sum + (be == 0.0 ? 0.0 : be * in.load(i, j)));  // with beta = 0, C is not read
      }
    }
  };
  return result(issue(stream, multiply)) == cudaSuccess ? CUBLAS_STATUS_SUCCESS : CUBLAS_STATUS_EXECUTION_FAILED;
}
