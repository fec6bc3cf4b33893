// Errors of the CUDA runtime and of cuBLASLt as qdylora::Error.
#pragma once

#include <qdylora/config.hpp>
#if !defined(QDYLORA_DEVICE_ONLY)

#include <string>

#include <cublasLt.h>
#include <cuda_runtime.h>

#include <qdylora/core/error.hpp>

namespace qdylora::detail {

[[noreturn]] inline void raise_cuda(cudaError_t error, const char* call, const char* file, int line) {
  cudaGetLastError();  // else the next call would report this error again
  raise(error == cudaErrorMemoryAllocation ? Errc::memory : Errc::device,
        std::string(call) + ": " + cudaGetErrorString(error) + " (" + cudaGetErrorName(error) + "), " + file + ":" + std::to_string(line));
}

inline void check_cuda(cudaError_t error, const char* call, const char* file, int line) {
  if (error != cudaSuccess) [[unlikely]]
    raise_cuda(error, call, file, line);
}

inline void check_cuda(cublasStatus_t status, const char* call, const char* file, int line) {
  if (status != CUBLAS_STATUS_SUCCESS) [[unlikely]]
    raise(Errc::device, std::string(call) + ": " + cublasLtGetStatusString(status) + ", " + file + ":" + std::to_string(line));
}

}  // namespace qdylora::detail

// Throws Errc::device, or Errc::memory, with the call, what the runtime says of it, file and line.
#define QDYLORA_CUDA_TRY(call) ::qdylora::detail::check_cuda((call), #call, __FILE__, __LINE__)

#endif
