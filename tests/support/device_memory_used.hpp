// Bytes of the device's memory, emulated or real, that live blocks hold.
#pragma once

#include <cstdint>

#include <qdylora/cuda/memory.cuh>

namespace test {

inline std::size_t device_memory_used() {
  cudaMemPool_t pool = nullptr;
  std::uint64_t used = 0;
  QDYLORA_CUDA_TRY(cudaStreamSynchronize(nullptr));  // blocks are given back in the order of streams
  QDYLORA_CUDA_TRY(cudaDeviceGetDefaultMemPool(&pool, 0));
  QDYLORA_CUDA_TRY(cudaMemPoolGetAttribute(pool, cudaMemPoolAttrUsedMemCurrent, &used));
  return static_cast<std::size_t>(used);
}

}  // namespace test
