// Memory resources of the CUDA backend.
#pragma once

#include <qdylora/config.hpp>
#if !defined(QDYLORA_DEVICE_ONLY)

#include <cstddef>
#include <cstdint>
#include <string>

#include <qdylora/core/memory.hpp>
#include <qdylora/cuda/error.cuh>

namespace qdylora {
namespace detail {

inline std::string mebibytes(std::size_t bytes) { return std::to_string((bytes + (std::size_t{1} << 20) - 1) >> 20) + " MiB"; }

[[noreturn]] inline void raise_out_of_memory(const char* what, std::size_t bytes) {
  std::size_t free = 0, total = 0;
  cudaGetLastError();
  QDYLORA_CUDA_TRY(cudaMemGetInfo(&free, &total));
  raise(Errc::memory, std::string(what) + ": " + mebibytes(bytes) + " asked for, " + mebibytes(free) + " of the device's " +
                          mebibytes(total) + " are free");
}

/// What the current device, whose number is this, has free, and what its pool holds unused.
inline std::size_t free_memory(int device) {
  std::size_t free = 0, total = 0;
  cudaMemPool_t pool = nullptr;
  std::uint64_t reserved = 0, used = 0;
  QDYLORA_CUDA_TRY(cudaMemGetInfo(&free, &total));
  QDYLORA_CUDA_TRY(cudaDeviceGetDefaultMemPool(&pool, device));
  QDYLORA_CUDA_TRY(cudaMemPoolGetAttribute(pool, cudaMemPoolAttrReservedMemCurrent, &reserved));
  QDYLORA_CUDA_TRY(cudaMemPoolGetAttribute(pool, cudaMemPoolAttrUsedMemCurrent, &used));
  return free + static_cast<std::size_t>(reserved - used);
}

}  // namespace detail

/// The device's memory, from its pool and in the order of a stream: a block may be given back while work that was queued before still
/// uses it. Without a stream of its own the order is the legacy default stream's, which waits for the streams of all contexts and they for
/// it, whatever nvcc's --default-stream is.
struct DeviceMemory {
  static constexpr bool host = false;

  cudaStream_t stream = cudaStreamLegacy;

  void* allocate(std::size_t bytes) const {
    void* pointer = nullptr;
    const cudaError_t error = cudaMallocAsync(&pointer, bytes, stream);
    if (error == cudaErrorMemoryAllocation) detail::raise_out_of_memory("DeviceMemory", bytes);
    if (error == cudaErrorStreamCaptureImplicit) {
      cudaGetLastError();
      detail::raise(Errc::state_order,
                    "DeviceMemory: " + detail::mebibytes(bytes) +
                        " asked for while work is recorded as a graph; do the work once before, so that what it keeps exists");
    }
    QDYLORA_CUDA_TRY(error);
    return pointer;
  }
  void deallocate(void* pointer, std::size_t) const noexcept {
    if (cudaFreeAsync(pointer, stream) != cudaSuccess) cudaGetLastError();  // else the next launch would report it as its own
  }
};

/// The host's memory, page-locked: copies to and from the device run beside everything else.
struct PinnedMemory {
  static constexpr bool host = true;

  static void* allocate(std::size_t bytes) {
    void* pointer = nullptr;
    QDYLORA_CUDA_TRY(cudaMallocHost(&pointer, bytes));
    return pointer;
  }
  static void deallocate(void* pointer, std::size_t) noexcept { cudaFreeHost(pointer); }
};

/// Memory that the driver moves between host and device page by page, as either touches it. Slow where both do; no more of it should
/// be asked for than the device has. The host waits for the device (synchronize) before it touches what a kernel may still use.
struct ManagedMemory {
  static constexpr bool host = true;
  static constexpr bool device = true;  // kernels work on it in place

  static void* allocate(std::size_t bytes) {
    void* pointer = nullptr;
    QDYLORA_CUDA_TRY(cudaMallocManaged(&pointer, bytes, cudaMemAttachGlobal));
    return pointer;
  }
  static void deallocate(void* pointer, std::size_t) noexcept { cudaFree(pointer); }
};

static_assert(MemoryResource<DeviceMemory> && MemoryResource<PinnedMemory> && MemoryResource<ManagedMemory>);

}  // namespace qdylora
#endif
