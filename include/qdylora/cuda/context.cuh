// CudaContext: what the operations of one device share. The user makes it, owns it, and hands it to Cuda.
#pragma once

#include <qdylora/config.hpp>
#if !defined(QDYLORA_DEVICE_ONLY)

#include <algorithm>
#include <compare>
#include <cstdint>
#include <limits>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <type_traits>

#include <qdylora/core/matrix.hpp>
#include <qdylora/cuda/launch.cuh>
#include <qdylora/cuda/memory.cuh>
#include <qdylora/cuda/product_plan.hpp>

namespace qdylora {

class Pager;  // cuda/paging.cuh

namespace device {

struct Nothing {
  static constexpr int threads = warp_size;
  __device__ void operator()(SharedMemory) const {}
};
struct NothingOfSm90a {
  static constexpr bool needs_sm90a = true;
  static constexpr int threads = 4 * warp_size;
  __device__ void operator()(SharedMemory) const {}
};

}  // namespace device

struct CudaOptions {
  int device = 0;
  /// Scratch memory of all operations; they allocate no other. It takes two slabs of 1024 lines of 32768 numbers in 16 bits, 64 MiB each,
  /// as much as one of activations in another type (512 rows of Falcon's logits), and the 32 MiB that cuBLASLt makes use of.
  std::size_t workspace_bytes = std::size_t{256} << 20;
  std::size_t slab_bytes = 0;  // decoded weights at once in products of many tokens; 0: as cuda/product_plan.hpp has it
  bool overlap_slabs = true;  // a slab is decoded, on a stream of its own, while the one before is multiplied
  ProductLimits product_limits = {};  // which kernel makes a product, by its tokens

  /// Bytes of the device's memory that a context holds: its workspace, and a count by which blocks wait for each other.
  constexpr std::size_t context_bytes() const noexcept { return workspace_bytes + sizeof(std::uint32_t); }
};

namespace detail {

struct Destroy {
  void operator()(cudaStream_t stream) const noexcept { cudaStreamDestroy(stream); }
  void operator()(cudaEvent_t event) const noexcept { cudaEventDestroy(event); }
  void operator()(cublasLtHandle_t handle) const noexcept { cublasLtDestroy(handle); }
  void operator()(cudaGraph_t graph) const noexcept { cudaGraphDestroy(graph); }
  void operator()(cudaGraphExec_t graph) const noexcept { cudaGraphExecDestroy(graph); }
};
/// A stream, an event, a handle of cuBLASLt's or a graph, destroyed with its owner.
template <class Handle>
using Owned = std::unique_ptr<std::remove_pointer_t<Handle>, Destroy>;

using Event = Owned<cudaEvent_t>;
inline Event make_event() {
  cudaEvent_t event = nullptr;
  QDYLORA_CUDA_TRY(cudaEventCreateWithFlags(&event, cudaEventDisableTiming));
  return Event(event);
}

/// A stream that waits for no other unless told to. Its blocks go first where processors have room: what it makes is waited for.
using Stream = Owned<cudaStream_t>;
inline Stream make_side_stream() {
  cudaStream_t stream = nullptr;
  int least = 0, greatest = 0;
  QDYLORA_CUDA_TRY(cudaDeviceGetStreamPriorityRange(&least, &greatest));
  QDYLORA_CUDA_TRY(cudaStreamCreateWithPriority(&stream, cudaStreamNonBlocking, greatest));
  return Stream(stream);
}

/// What lies in `later` from now on waits for all that lies in `earlier` so far.
inline void order(cudaStream_t earlier, cudaStream_t later, const Event& event) {
  QDYLORA_CUDA_TRY(cudaEventRecord(event.get(), earlier));
  QDYLORA_CUDA_TRY(cudaStreamWaitEvent(later, event.get(), 0));
}

/// A stream on which one of two slabs is decoded while the other is multiplied on the context's.
struct DecodingStream {
  Stream stream = make_side_stream();
  Event begun = make_event();
  Event decoded[2] = {make_event(), make_event()};
  Event multiplied[2] = {make_event(), make_event()};
};

/// What kernels were compiled for that run on the current device: their __CUDA_ARCH__ / 10, which is less than the device's where it
/// translates PTX of an earlier one (nvcc's default is sm_75). Bodies for more are not in them.
inline int compiled_capability(const cudaDeviceProp& properties) {
  cudaFuncAttributes attributes{};
  const cudaError_t error = cudaFuncGetAttributes(&attributes, device::run<device::Nothing>);
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction) {
    cudaGetLastError();
    raise(Errc::unsupported, std::string("this program's kernels were not compiled for ") + properties.name + ", compute capability " +
                                 std::to_string(properties.major) + "." + std::to_string(properties.minor) +
                                 " (CMAKE_CUDA_ARCHITECTURES, nvcc -arch)");
  }
  QDYLORA_CUDA_TRY(error);
  return attributes.ptxVersion;
}

/// Whether the current device is one of sm_90a, and kernels were compiled for that.
inline bool has_sm90a(const cudaDeviceProp& properties) {
  if (properties.major != 9 || properties.minor != 0) return false;
  cudaFuncAttributes attributes{};
  QDYLORA_CUDA_TRY(cudaFuncGetAttributes(&attributes, device::run<device::NothingOfSm90a>));
  return attributes.maxThreadsPerBlock >= device::NothingOfSm90a::threads;
}

/// What cuBLASLt chooses an algorithm by.
struct GemmProblem {
  int type, output_type;
  bool a_transposed, b_transposed;
  Index m, n, k, a_stride, b_stride, y_stride;
  std::uint32_t a_alignment, b_alignment, y_alignment;
  std::size_t workspace_bytes;

  auto operator<=>(const GemmProblem&) const = default;
};

}  // namespace detail

/// A device, a stream, a cuBLASLt handle and scratch memory. Throws Errc::device where there is no such device or the driver is too old,
/// Errc::unsupported below compute capability 7.5 and where kernels were compiled for other devices alone, Errc::memory where the workspace
/// does not fit. For one host thread at a time, with the device as that thread's current one; it outlives every handle and all memory that
/// names its stream.
class CudaContext {
 public:
  explicit CudaContext(CudaOptions options = {})
      : device_(options.device),
        properties_(select(options.device)),
        compute_capability_(std::min(10 * properties_.major + properties_.minor, detail::compiled_capability(properties_))),
        sm90a_(detail::has_sm90a(properties_)),
        stream_(make_stream()),
        blas_(make_blas()),
        product_limits_(options.product_limits) {
    const auto half_cache = static_cast<std::size_t>(properties_.l2CacheSize) / 2;
    if (options.overlap_slabs) decoding_ = std::make_unique<const detail::DecodingStream>();
    if (options.slab_bytes > 0) {
      slab_bytes_ = static_cast<Index>(options.slab_bytes);
      converted_bytes_ = slab_bytes_ / 2;
    } else {
      slab_bytes_ = static_cast<Index>(std::min(half_cache, options.workspace_bytes / 2));
      converted_bytes_ = static_cast<Index>(options.workspace_bytes / 4);
      least_slab_lines_ = qdylora::least_slab_lines;
    }
    // Memory that is given back stays in the pool, else every synchronization would return it to the driver.
    cudaMemPool_t pool = nullptr;
    std::uint64_t keep = std::numeric_limits<std::uint64_t>::max();
    QDYLORA_CUDA_TRY(cudaDeviceGetDefaultMemPool(&pool, device_));
    QDYLORA_CUDA_TRY(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrReleaseThreshold, &keep));
    workspace_ = Buffer<std::byte, DeviceMemory>(static_cast<Index>(options.workspace_bytes), memory());
    signals_ = Buffer<std::uint32_t, DeviceMemory>(1, memory());
    QDYLORA_CUDA_TRY(cudaMemsetAsync(signals_.data(), 0, sizeof(std::uint32_t), stream()));
  }
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

  int device() const noexcept { return device_; }
  const cudaDeviceProp& properties() const noexcept { return properties_; }
  /// What kernels may make use of, 10 * major + minor: the device's, or that which they were compiled for where it is less.
  int compute_capability() const noexcept { return compute_capability_; }
  /// Whether kernels may make use of what sm_90a alone has.
  bool sm90a() const noexcept { return sm90a_; }
  cudaStream_t stream() const noexcept { return stream_.get(); }
  cublasLtHandle_t blas() const noexcept { return blas_.get(); }
  /// Memory in the order of this context's stream.
  DeviceMemory memory() const noexcept { return {stream()}; }
  /// Bytes of a weight that products decode at once, and the lines that they do where those take more.
  Index slab_bytes() const noexcept { return slab_bytes_; }
  Index least_slab_lines() const noexcept { return least_slab_lines_; }
  /// Bytes of an operand's copy in another type; a weight's gradient has two.
  Index converted_bytes() const noexcept { return converted_bytes_; }
  /// Null where slabs are not to overlap.
  const detail::DecodingStream* decoding_stream() const noexcept { return decoding_.get(); }
  /// The kernel for a product.
  ProductKernel choose_product(const ProductProblem& problem) const noexcept {
    return qdylora::choose_product(problem, {compute_capability_, properties_.multiProcessorCount, sm90a_}, product_limits_);
  }
  /// Whether products by slabs take an adapter's term along, of which x with what is appended to it and the smallest slab have so many bytes:
  /// beside slabs and what cuBLASLt works in, the workspace has room for those.
  bool augments(Index x_cols, Index y_cols, Index bytes) const noexcept {
    return qdylora::augments(x_cols, y_cols, product_limits_) && bytes <= workspace_.size() / 4 * 3 - slab_bytes_;
  }
  /// Algorithms that cuBLASLt has chosen: it takes longer to choose one than many a product takes.
  std::map<detail::GemmProblem, cublasLtMatmulAlgo_t>& gemm_algorithms() const noexcept { return gemm_algorithms_; }
  /// A count on the device by which blocks of one launch wait for each other; zero between launches.
  std::uint32_t* signals() const noexcept { return const_cast<std::uint32_t*>(signals_.data()); }
  /// Streams for state in the host's memory, made when they are first asked for.
  const Pager& pager() const;
  void synchronize() const { QDYLORA_CUDA_TRY(cudaStreamSynchronize(stream())); }
  /// Whether what is queued now is recorded as a graph instead of done.
  bool recording() const {
    cudaStreamCaptureStatus status{};
    QDYLORA_CUDA_TRY(cudaStreamIsCapturing(stream(), &status));
    return status != cudaStreamCaptureStatusNone;
  }

 private:
  friend class Scratch;

  using Stream = detail::Stream;
  using Blas = detail::Owned<cublasLtHandle_t>;

  static cudaDeviceProp select(int device) {
    int count = 0;
    const cudaError_t error = cudaGetDeviceCount(&count);
    if (error == cudaErrorNoDevice || error == cudaErrorInsufficientDriver) {
      cudaGetLastError();
      detail::raise(Errc::device, error == cudaErrorNoDevice ? "this machine has no CUDA device, or its driver is not loaded"
                                                             : "the driver is older than the CUDA runtime this program was built with");
    }
    QDYLORA_CUDA_TRY(error);
    QDYLORA_EXPECTS(device >= 0 && device < count, device,
                    "CUDA device " + std::to_string(device) + " was asked for; this machine has " + std::to_string(count));
    QDYLORA_CUDA_TRY(cudaSetDevice(device));
    cudaDeviceProp properties{};
    QDYLORA_CUDA_TRY(cudaGetDeviceProperties(&properties, device));
    QDYLORA_EXPECTS(properties.major * 10 + properties.minor >= 75, unsupported,
                    std::string(properties.name) + " has compute capability " + std::to_string(properties.major) + "." +
                        std::to_string(properties.minor) + "; 7.5 is the least");
    return properties;
  }
  // A stream that the legacy default stream waits for, and it for that: what DeviceMemory{} relies on.
  static Stream make_stream() {
    cudaStream_t stream = nullptr;
    QDYLORA_CUDA_TRY(cudaStreamCreate(&stream));
    return Stream(stream);
  }
  static Blas make_blas() {
    cublasLtHandle_t handle = nullptr;
    QDYLORA_CUDA_TRY(cublasLtCreate(&handle));
    return Blas(handle);
  }

  int device_;
  cudaDeviceProp properties_;
  int compute_capability_;
  bool sm90a_;
  Stream stream_;
  Blas blas_;
  std::unique_ptr<const detail::DecodingStream> decoding_;
  ProductLimits product_limits_;
  Index slab_bytes_ = 0, converted_bytes_ = 0, least_slab_lines_ = 0;
  mutable std::map<detail::GemmProblem, cublasLtMatmulAlgo_t> gemm_algorithms_;
  Buffer<std::byte, DeviceMemory> workspace_;
  Buffer<std::uint32_t, DeviceMemory> signals_;
  mutable std::shared_ptr<const Pager> pager_;
};

/// The workspace, dealt out to one operation from its beginning. The next operation takes the same memory: the stream keeps them apart.
class Scratch {
 public:
  explicit Scratch(const CudaContext& context) : workspace_(context.workspace_) {}

  /// `count` elements, uninitialized, for a kernel to write.
  template <class T>
  T* take(Index count) {
    const Index begin = used_;
    used_ += detail::rounded_up(count * static_cast<Index>(sizeof(T)), alignment);
    QDYLORA_EXPECTS(used_ <= workspace_.size(), memory,
                    "an operation needs a workspace of " + std::to_string(used_) + " bytes; CudaOptions::workspace_bytes is " +
                        std::to_string(workspace_.size()));
    return reinterpret_cast<T*>(const_cast<std::byte*>(workspace_.data()) + begin);
  }
  /// What is left, `most` bytes at most. The next take begins there again.
  std::span<std::byte> rest(Index most) const {
    return {const_cast<std::byte*>(workspace_.data()) + used_, static_cast<std::size_t>(std::min(most, workspace_.size() - used_))};
  }
  /// Bytes that so many takes may have between them, each of which begins at an alignment.
  Index room_for(Index takes) const noexcept { return std::max<Index>(room() - takes * (alignment - 1), 0); }
  /// Bytes that are left.
  Index room() const noexcept { return workspace_.size() - used_; }

 private:
  static constexpr Index alignment = 256;

  const Buffer<std::byte, DeviceMemory>& workspace_;
  Index used_ = 0;
};

namespace detail {

/// Copies between contiguous memory of host and device, in the order of the context's stream.
template <class T>
void copy_to_device(const CudaContext& context, const T* source, T* target, Index count) {
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
  if (count > 0) QDYLORA_CUDA_TRY(cudaMemcpyAsync(target, source, bytes, cudaMemcpyHostToDevice, context.stream()));
}
/// Waits.
template <class T>
void copy_to_host(const CudaContext& context, const T* source, T* target, Index count) {
  const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
  if (count > 0) QDYLORA_CUDA_TRY(cudaMemcpyAsync(target, source, bytes, cudaMemcpyDeviceToHost, context.stream()));
  context.synchronize();
}

}  // namespace detail
}  // namespace qdylora
#endif
