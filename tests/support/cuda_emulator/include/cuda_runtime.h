// The part of the CUDA runtime that qdylora calls, for a device that is emulated. Work is done when a call returns, whatever its stream.
// What a machine may lack (a device, a driver, memory) is set in test::emulator::machine().
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "support/cuda_emulator/global_memory.hpp"

#define __host__
#define __device__
#define __constant__
#define __forceinline__ inline

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x = 1, y = 1, z = 1;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
};
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3, cudaMemcpyDefault = 4 };
inline constexpr unsigned cudaMemAttachGlobal = 1;

struct cudaDeviceProp {
  char name[256];
  int major, minor;
  int multiProcessorCount;
  std::size_t totalGlobalMem;
  std::size_t sharedMemPerBlockOptin;
  int l2CacheSize;
};

struct CUstream_st {};
using cudaStream_t = CUstream_st*;

namespace test::emulator {

struct Machine {
  int devices = 1;
  int compute_capability = 90;
  cudaError_t driver = cudaSuccess;  // what every call finds
  cudaError_t last_error = cudaSuccess;
  int streams = 0;  // that live
  int handles = 0;  // of cuBLASLt
  long launches = 0;  // of kernels, ever
};
inline Machine& machine() {
  static Machine machine;
  return machine;
}
inline cudaError_t result(cudaError_t error) {
  if (error == cudaSuccess) error = machine().driver;
  if (error != cudaSuccess) machine().last_error = error;
  return error;
}

}  // namespace test::emulator

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
  }
  return "cudaErrorUnknown";
}
inline const char* cudaGetErrorString(cudaError_t) { return "an emulated error"; }
inline cudaError_t cudaPeekAtLastError() { return test::emulator::machine().last_error; }
inline cudaError_t cudaGetLastError() { return std::exchange(test::emulator::machine().last_error, cudaSuccess); }

inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = test::emulator::machine().devices;
  return test::emulator::result(*count == 0 ? cudaErrorNoDevice : cudaSuccess);
}
inline cudaError_t cudaSetDevice(int device) {
  return test::emulator::result(device < test::emulator::machine().devices ? cudaSuccess : cudaErrorInvalidDevice);
}
inline cudaError_t cudaGetDeviceProperties(cudaDeviceProp* properties, int) {
  const int capability = test::emulator::machine().compute_capability;
  *properties = {"emulated", capability / 10, capability % 10, 4, test::emulator::global_memory().total(), std::size_t{227} << 10,
                 1 << 20};
  return test::emulator::result(cudaSuccess);
}
inline cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *free = test::emulator::global_memory().free();
  *total = test::emulator::global_memory().total();
  return test::emulator::result(cudaSuccess);
}

struct CUmemPoolHandle_st {};
using cudaMemPool_t = CUmemPoolHandle_st*;
enum cudaMemPoolAttr { cudaMemPoolAttrReleaseThreshold = 4, cudaMemPoolAttrUsedMemCurrent = 7, cudaMemPoolAttrUsedMemHigh = 8 };
inline cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  *pool = nullptr;
  return test::emulator::result(cudaSuccess);
}
inline cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr attribute, void*) {
  if (attribute == cudaMemPoolAttrUsedMemHigh) test::emulator::global_memory().forget_most();  // zero is all that may be set
  return test::emulator::result(cudaSuccess);
}
inline cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr attribute, void* value) {
  const auto& memory = test::emulator::global_memory();
  *static_cast<std::uint64_t*>(value) = attribute == cudaMemPoolAttrUsedMemHigh ? memory.most() : memory.used();
  return test::emulator::result(cudaSuccess);
}

inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  *stream = new CUstream_st;
  ++test::emulator::machine().streams;
  return test::emulator::result(cudaSuccess);
}
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  delete stream;
  --test::emulator::machine().streams;
  return test::emulator::result(cudaSuccess);
}
inline constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2;
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) { return cudaStreamCreate(stream); }

struct CUevent_st {};
using cudaEvent_t = CUevent_st*;
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return test::emulator::result(cudaSuccess);
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return test::emulator::result(cudaSuccess);
}
inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return test::emulator::result(cudaSuccess); }
inline cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return test::emulator::result(cudaSuccess); }
inline cudaError_t cudaStreamSynchronize(cudaStream_t) { return test::emulator::result(cudaSuccess); }

inline cudaError_t cudaMallocAsync(void** pointer, std::size_t bytes, cudaStream_t) {
  *pointer = test::emulator::global_memory().allocate(bytes);
  return test::emulator::result(*pointer != nullptr ? cudaSuccess : cudaErrorMemoryAllocation);
}
inline cudaError_t cudaFreeAsync(void* pointer, cudaStream_t) {
  return test::emulator::result(test::emulator::global_memory().release(pointer) ? cudaSuccess : cudaErrorInvalidValue);
}
// Kernels reach pinned and managed memory as well.
inline cudaError_t cudaMallocHost(void** pointer, std::size_t bytes) { return cudaMallocAsync(pointer, bytes, nullptr); }
inline cudaError_t cudaFreeHost(void* pointer) { return cudaFreeAsync(pointer, nullptr); }
inline cudaError_t cudaMallocManaged(void** pointer, std::size_t bytes, unsigned) { return cudaMallocAsync(pointer, bytes, nullptr); }
inline cudaError_t cudaFree(void* pointer) { return cudaFreeAsync(pointer, nullptr); }

inline cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width,
                                     std::size_t height, cudaMemcpyKind kind, cudaStream_t) {
  if (width > to_pitch || width > from_pitch) return test::emulator::result(cudaErrorInvalidValue);
  const auto outside = [&](const void* begin, std::size_t pitch) {
    return test::emulator::global_memory().complaint(begin, (height - 1) * pitch + width, 1).has_value();
  };
  if (width == 0 || height == 0) return test::emulator::result(cudaSuccess);
  if ((kind != cudaMemcpyHostToDevice && outside(from, from_pitch)) || (kind != cudaMemcpyDeviceToHost && outside(to, to_pitch)))
    return test::emulator::result(cudaErrorInvalidValue);
  for (std::size_t i = 0; i < height; ++i)
    std::memmove(static_cast<std::byte*>(to) + i * to_pitch, static_cast<const std::byte*>(from) + i * from_pitch, width);
  return test::emulator::result(cudaSuccess);
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, stream);
}
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t) {
  if (test::emulator::global_memory().complaint(to, bytes, 1)) return test::emulator::result(cudaErrorInvalidValue);
  std::memset(to, value, bytes);
  return test::emulator::result(cudaSuccess);
}
