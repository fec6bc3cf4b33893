// Where a program's arithmetic is done: on a GPU.
#pragma once

#include <cstdint>
#include <string>
#include <utility>

#include <qdylora/cuda.hpp>
#include <qdylora/io/json.hpp>
#include <qdylora/model/memory_plan.hpp>
#include <qdylora/model/upload.hpp>

#include "../common/open_model.hpp"
#include "../common/progress.hpp"

namespace qdylora::examples {

class CudaDevice {
 public:
  using Backend = Cuda;

  /// Errors: CudaContext's; Errc::device is the one of a machine without a GPU.
  CudaDevice() : cuda_(context_) {
    std::uint64_t none = 0;
    QDYLORA_CUDA_TRY(cudaDeviceGetDefaultMemPool(&pool_, context_.device()));
    QDYLORA_CUDA_TRY(cudaMemPoolSetAttribute(pool_, cudaMemPoolAttrUsedMemHigh, &none));
  }

  const Cuda& backend() const noexcept { return cuda_; }
  std::string text() const {
    const auto& p = context_.properties();
    return std::string(p.name) + ", compute capability " + std::to_string(p.major) + "." + std::to_string(p.minor);
  }
  Json facts() const { return {{"device", "cuda"}, {"gpu", std::string(context_.properties().name)}}; }

  /// f(memory), in which an optimizer keeps its moments: the device's, or by --paged host the host's.
  template <class F>
  auto with_moments_memory(const std::string& paged, const F& f) const {
    return paged.empty() ? f(DeviceMemory()) : f(PinnedMemory());
  }
  auto place(const HostWeights& weights) const { return upload(*weights, cuda_); }
  /// All work goes through one workspace. What the driver takes for itself, about half a gigabyte, is nobody's to plan.
  template <Scalar T>
  void complete(MemoryOptions& options, const ModelShape&) const {
    options.device = true;
    options.paged_moments = std::exchange(options.moments_in_file, false);  // --paged is to the host's memory, not to a file
    options.offload_checkpoints = std::exchange(options.checkpoints_in_file, false);  // so is --offload
    options.backend_bytes = CudaOptions{}.context_bytes();
    options.process_bytes = static_cast<std::size_t>(memory_use().bytes);
  }
  /// Errors: Errc::memory, with the plan.
  void expect_room(const MemoryPlan& plan) const { qdylora::expect_room(plan, cuda_); }
  /// The most of the device's memory so far, as the plan's total counts it.
  std::size_t peak() const {
    std::uint64_t most = 0;
    QDYLORA_CUDA_TRY(cudaMemPoolGetAttribute(pool_, cudaMemPoolAttrUsedMemHigh, &most));
    return static_cast<std::size_t>(most);
  }

 private:
  CudaContext context_;
  Cuda cuda_;
  cudaMemPool_t pool_ = nullptr;
};

}  // namespace qdylora::examples
