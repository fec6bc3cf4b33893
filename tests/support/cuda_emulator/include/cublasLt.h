// The part of cuBLASLt that qdylora calls, for a device that is emulated.
#pragma once

#include <cuda_runtime.h>

enum cublasStatus_t { CUBLAS_STATUS_SUCCESS = 0, CUBLAS_STATUS_NOT_INITIALIZED = 1 };
struct cublasLtContext {};
using cublasLtHandle_t = cublasLtContext*;

inline const char* cublasLtGetStatusString(cublasStatus_t) { return "an emulated status"; }
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
