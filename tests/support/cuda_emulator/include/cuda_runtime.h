// The part of the CUDA runtime that qdylora calls, for a device that is emulated. When work is done: streams.hpp. What a machine may lack
// (a device, a driver, memory) is set in test::emulator::machine().
#pragma once

#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "support/cuda_emulator/global_memory.hpp"
#include "support/cuda_emulator/streams.hpp"

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

enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3, cudaMemcpyDefault = 4 };
inline constexpr unsigned cudaMemAttachGlobal = 1;

struct cudaDeviceProp {
  char name[256];
  int major, minor;
  int multiProcessorCount;
  std::size_t totalGlobalMem;
  std::size_t sharedMemPerBlockOptin, sharedMemPerMultiprocessor;
  int l2CacheSize;
};

using cudaStream_t = CUstream_st*;
inline const cudaStream_t cudaStreamLegacy = test::emulator::legacy_stream;

inline const char* cudaGetErrorName(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "cudaSuccess";
    case cudaErrorInvalidValue: return "cudaErrorInvalidValue";
    case cudaErrorMemoryAllocation: return "cudaErrorMemoryAllocation";
    case cudaErrorInsufficientDriver: return "cudaErrorInsufficientDriver";
    case cudaErrorInvalidDeviceFunction: return "cudaErrorInvalidDeviceFunction";
    case cudaErrorNoDevice: return "cudaErrorNoDevice";
    case cudaErrorInvalidDevice: return "cudaErrorInvalidDevice";
    case cudaErrorNoKernelImageForDevice: return "cudaErrorNoKernelImageForDevice";
    case cudaErrorStreamCaptureUnsupported: return "cudaErrorStreamCaptureUnsupported";
    case cudaErrorStreamCaptureInvalidated: return "cudaErrorStreamCaptureInvalidated";
    case cudaErrorStreamCaptureMerge: return "cudaErrorStreamCaptureMerge";
    case cudaErrorStreamCaptureUnmatched: return "cudaErrorStreamCaptureUnmatched";
    case cudaErrorStreamCaptureUnjoined: return "cudaErrorStreamCaptureUnjoined";
    case cudaErrorStreamCaptureIsolation: return "cudaErrorStreamCaptureIsolation";
    case cudaErrorStreamCaptureImplicit: return "cudaErrorStreamCaptureImplicit";
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
  const auto shared = static_cast<std::size_t>(test::emulator::machine().shared_bytes);
  *properties = {"emulated", capability / 10, capability % 10, 4, test::emulator::global_memory().total(),
                 shared, shared + 1024, 1 << 20};
  return test::emulator::result(cudaSuccess);
}
struct cudaFuncAttributes {
  int ptxVersion;
  int maxThreadsPerBlock;
};
template <class F>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, F*) {
  attributes->ptxVersion = test::emulator::machine().compiled_capability;
  attributes->maxThreadsPerBlock = test::emulator::machine().compiled_for_sm90a ? 1024 : 32;
  return test::emulator::result(attributes->ptxVersion > 0 ? cudaSuccess : cudaErrorNoKernelImageForDevice);
}
enum cudaDeviceAttr { cudaDevAttrClockRate = 13, cudaDevAttrMemoryClockRate = 36 };
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = 1000000;  // kHz
  return test::emulator::result(cudaSuccess);
}
inline cudaError_t cudaDriverGetVersion(int* version) {
  *version = 13000;
  return test::emulator::result(cudaSuccess);
}
inline cudaError_t cudaRuntimeGetVersion(int* version) { return cudaDriverGetVersion(version); }
inline cudaError_t cudaMemGetInfo(std::size_t* free, std::size_t* total) {
  *free = test::emulator::global_memory().free();
  *total = test::emulator::global_memory().total();
  return test::emulator::result(cudaSuccess);
}

struct CUmemPoolHandle_st {};
using cudaMemPool_t = CUmemPoolHandle_st*;
/// The pool holds what is used, and no more.
enum cudaMemPoolAttr {
  cudaMemPoolAttrReleaseThreshold = 4,
  cudaMemPoolAttrReservedMemCurrent = 5,
  cudaMemPoolAttrUsedMemCurrent = 7,
  cudaMemPoolAttrUsedMemHigh = 8
};
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
  (*stream)->first = test::emulator::machine().streams++ == 0;
  test::emulator::streams().push_back(*stream);
  return test::emulator::result(cudaSuccess);
}
/// What is put off is done when something waits for it, at the latest when no stream is left.
inline cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  auto& all = test::emulator::streams();
  const bool last = --test::emulator::machine().streams == 0;
  if (last)
    for (CUstream_st* each : all) each->line->run_all();
  std::erase_if(all, [&](CUstream_st* each) {
    const bool ends = last || (each == stream && each->line->empty());
    if (ends) delete each;
    return ends;
  });
  return test::emulator::result(cudaSuccess);
}
inline constexpr unsigned cudaStreamNonBlocking = 1, cudaEventDisableTiming = 2;
inline cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags) {
  const cudaError_t error = cudaStreamCreate(stream);
  (*stream)->blocking = (flags & cudaStreamNonBlocking) == 0;
  return error;
}

inline cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0;
  *greatest = -5;
  return test::emulator::result(cudaSuccess);
}
inline cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  if (priority > 0 || priority < -5) return test::emulator::result(cudaErrorInvalidValue);
  return cudaStreamCreateWithFlags(stream, flags);
}

using cudaEvent_t = CUevent_st*;
inline cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st;
  return test::emulator::result(cudaSuccess);
}
inline cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
inline cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (event->point != nullptr) event->point->wait();
  return test::emulator::result(cudaSuccess);
}
/// Nothing is timed here.
inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  *milliseconds = 1.0f;
  return test::emulator::result(cudaSuccess);
}
inline cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return test::emulator::result(cudaSuccess);
}
inline cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return test::emulator::result(test::emulator::record(event, stream));
}
inline cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return test::emulator::result(test::emulator::wait(stream, event));
}
inline cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (const auto refused = test::emulator::unless_captured(); refused != cudaSuccess) return test::emulator::result(refused);
  if (!test::emulator::is_default(stream)) stream->line->run_all();
  else if (test::emulator::waits_for_all(stream)) test::emulator::run_blocking_streams();
  test::emulator::machine().unawaited_copies = 0;
  return test::emulator::result(cudaSuccess);
}

// ---- graphs ----------------------------------------------------------------------------------------------------------------------

enum cudaStreamCaptureMode { cudaStreamCaptureModeGlobal = 0, cudaStreamCaptureModeThreadLocal = 1, cudaStreamCaptureModeRelaxed = 2 };
enum cudaStreamCaptureStatus { cudaStreamCaptureStatusNone = 0, cudaStreamCaptureStatusActive = 1, cudaStreamCaptureStatusInvalidated = 2 };
enum cudaGraphNodeType { cudaGraphNodeTypeKernel = 0, cudaGraphNodeTypeMemAlloc = 10, cudaGraphNodeTypeMemFree = 11 };
using cudaGraph_t = CUgraph_st*;
using cudaGraphExec_t = CUgraphExec_st*;
using cudaGraphNode_t = const test::emulator::Recording::Node*;

inline cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  return test::emulator::result(test::emulator::begin_capture(stream));
}
inline cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  return test::emulator::result(test::emulator::end_capture(stream, graph));
}
inline cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  *status = test::emulator::is_default(stream) || !stream->capture ? cudaStreamCaptureStatusNone
            : stream->capture->valid              ? cudaStreamCaptureStatusActive
                                                  : cudaStreamCaptureStatusInvalidated;
  return test::emulator::result(cudaSuccess);
}
/// Fills `nodes`, or counts them where that is null.
inline cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t* nodes, std::size_t* count) {
  const auto& all = graph->recording->nodes;
  if (nodes == nullptr) *count = all.size();
  for (std::size_t i = 0; nodes != nullptr && i < std::min(*count, all.size()); ++i) nodes[i] = &all[i];
  return test::emulator::result(cudaSuccess);
}
inline cudaError_t cudaGraphNodeGetType(cudaGraphNode_t node, cudaGraphNodeType* type) {
  using test::emulator::NodeKind;
  *type = node->kind == NodeKind::allocation ? cudaGraphNodeTypeMemAlloc
          : node->kind == NodeKind::release  ? cudaGraphNodeTypeMemFree
                                             : cudaGraphNodeTypeKernel;
  return test::emulator::result(cudaSuccess);
}
enum { cudaGraphInstantiateFlagUseNodePriority = 8 };
/// Without the flag a GPU forgets the priorities of the streams that work was taken down from.
inline cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* exec, cudaGraph_t graph, unsigned long long flags) {
  if (flags != cudaGraphInstantiateFlagUseNodePriority) return test::emulator::result(cudaErrorInvalidValue);
  *exec = new CUgraphExec_st{graph->recording};
  return test::emulator::result(cudaSuccess);
}
inline cudaError_t cudaGraphLaunch(cudaGraphExec_t exec, cudaStream_t stream) {
  auto& recording = *exec->recording;
  if (recording.leaves_memory() && std::exchange(recording.begun, true)) return test::emulator::result(cudaErrorInvalidValue);
  return test::emulator::result(test::emulator::issue(stream, [recorded = exec->recording] { recorded->run(); }));
}
inline cudaError_t cudaGraphExecDestroy(cudaGraphExec_t exec) {
  delete exec;  // a launch that is put off holds what it runs
  return test::emulator::result(cudaSuccess);
}
inline cudaError_t cudaGraphDestroy(cudaGraph_t graph) {
  delete graph;
  return test::emulator::result(cudaSuccess);
}

// ---- memory ----------------------------------------------------------------------------------------------------------------------

inline cudaError_t cudaMallocAsync(void** pointer, std::size_t bytes, cudaStream_t stream) {
  *pointer = nullptr;
  if (!test::emulator::is_default(stream) && stream->capture) {
    if (!stream->capture->valid) return test::emulator::result(cudaErrorStreamCaptureInvalidated);
    *pointer = stream->capture->recording->allocate(stream->captured_line, bytes);
  } else {
    const auto refused = test::emulator::issue(stream, [] {});
    if (refused != cudaSuccess) return test::emulator::result(refused);
    *pointer = test::emulator::global_memory().allocate(bytes);
  }
  return test::emulator::result(*pointer != nullptr ? cudaSuccess : cudaErrorMemoryAllocation);
}
inline cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
  if (!test::emulator::is_default(stream) && stream->capture) {
    if (stream->capture->recording->release(stream->captured_line, pointer)) return test::emulator::result(cudaSuccess);
    test::emulator::spoil_captures();
    return test::emulator::result(cudaErrorInvalidValue);
  }
  if (!test::emulator::global_memory().begins(pointer)) return test::emulator::result(cudaErrorInvalidValue);
  return test::emulator::result(test::emulator::issue(stream, [pointer] { test::emulator::global_memory().release(pointer); }));
}
// Kernels reach pinned and managed memory as well. To take it, or to give it back, waits for the device.
inline cudaError_t cudaMallocHost(void** pointer, std::size_t bytes) {
  *pointer = nullptr;
  if (const auto refused = test::emulator::unless_captured(); refused != cudaSuccess) return test::emulator::result(refused);
  if (const auto refused = test::emulator::issue(cudaStreamLegacy, [] {}); refused != cudaSuccess) return test::emulator::result(refused);
  *pointer = test::emulator::global_memory().allocate(bytes, true);
  return test::emulator::result(cudaSuccess);
}
inline cudaError_t cudaFreeHost(void* pointer) {
  if (const auto refused = test::emulator::unless_captured(); refused != cudaSuccess) return test::emulator::result(refused);
  return cudaFreeAsync(pointer, cudaStreamLegacy);
}
inline cudaError_t cudaMallocManaged(void** pointer, std::size_t bytes, unsigned) { return cudaMallocHost(pointer, bytes); }
inline cudaError_t cudaFree(void* pointer) { return cudaFreeHost(pointer); }

inline cudaError_t cudaMemcpy2DAsync(void* to, std::size_t to_pitch, const void* from, std::size_t from_pitch, std::size_t width,
                                     std::size_t height, cudaMemcpyKind kind, cudaStream_t stream) {
  if (width > to_pitch || width > from_pitch) return test::emulator::result(cudaErrorInvalidValue);
  if (width == 0 || height == 0) return test::emulator::result(cudaSuccess);
  const auto outside = [=](const void* begin, std::size_t pitch) {
    return test::emulator::global_memory().complaint(begin, (height - 1) * pitch + width, 1).has_value();
  };
  const bool from_outside = outside(from, from_pitch), to_outside = outside(to, to_pitch);
  if ((kind != cudaMemcpyHostToDevice && from_outside) || (kind != cudaMemcpyDeviceToHost && to_outside))
    return test::emulator::result(cudaErrorInvalidValue);
  const auto copy = [=](const std::byte* source, std::size_t pitch) {
    for (std::size_t i = 0; i < height; ++i) std::memmove(static_cast<std::byte*>(to) + i * to_pitch, source + i * pitch, width);
  };
  const auto* const source = static_cast<const std::byte*>(from);
  // Recorded, it would name memory of the host that is not there any more.
  if ((from_outside || to_outside) && !test::emulator::is_default(stream) && stream->capture)
    return test::emulator::result(test::emulator::unless_captured());
  if (from_outside) {  // pageable: it is staged before the call returns, which a GPU does not promise
    ++test::emulator::machine().unawaited_copies;
    std::vector<std::byte> staged(source, source + (height - 1) * from_pitch + width);
    return test::emulator::result(
        test::emulator::issue(stream, [copy, staged = std::move(staged), from_pitch] { copy(staged.data(), from_pitch); }));
  }
  const auto done = test::emulator::issue(stream, [=] {
    if (outside(from, from_pitch) || outside(to, to_pitch) != to_outside)
      throw test::emulator::Fault({"cudaMemcpyAsync"}, "memory has been given back that is yet to be copied");
    copy(source, from_pitch);
  });
  if (to_outside && done == cudaSuccess && !test::emulator::is_default(stream)) cudaStreamSynchronize(stream);  // the host waits
  return test::emulator::result(done);
}
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind, cudaStream_t stream) {
  return cudaMemcpy2DAsync(to, bytes, from, bytes, bytes, 1, kind, stream);
}
inline cudaError_t cudaMemsetAsync(void* to, int value, std::size_t bytes, cudaStream_t stream) {
  if (test::emulator::global_memory().complaint(to, bytes, 1)) return test::emulator::result(cudaErrorInvalidValue);
  return test::emulator::result(test::emulator::issue(stream, [=] { std::memset(to, value, bytes); }));
}
