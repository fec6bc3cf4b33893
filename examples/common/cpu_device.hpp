// Where a program's arithmetic is done: here, on this machine's processors. cuda/cuda_device.cuh has the same members for a GPU.
#pragma once

#include <string>

#include <qdylora/core/paged_memory.hpp>
#include <qdylora/cpu/cpu.hpp>
#include <qdylora/io/json.hpp>
#include <qdylora/model/memory_plan.hpp>

#include "open_model.hpp"
#include "progress.hpp"

namespace qdylora::examples {

class CpuDevice {
 public:
  using Backend = Cpu;

  explicit CpuDevice(int threads, Compute compute = Compute::automatic) : cpu_(Cpu(threads).with_compute(compute)) {}

  const Cpu& backend() const noexcept { return cpu_; }
  std::string text() const { return std::to_string(cpu_.threads()) + " threads, " + std::string(name(cpu_.isa())); }
  Json facts() const { return {{"device", "cpu"}, {"threads", cpu_.threads()}, {"isa", std::string(name(cpu_.isa()))}}; }

  /// Where an optimizer keeps its moments: in files of the folder that --paged names.
  PagedMemory moments_memory(const std::string& folder) const { return folder.empty() ? PagedMemory() : PagedMemory(folder); }
  /// Weights where the backend has its memory.
  HostWeights place(HostWeights weights) const { return weights; }
  /// What the plan cannot know: memory of this process so far, and what the threads work in.
  void complete(MemoryOptions& options, const ModelShape& shape) const {
    options.process_bytes = static_cast<std::size_t>(memory_use().bytes);
    // Two weights' gradients by head, which attention sums up; the sums of a gradient through the head in eight parts.
    const Index rows = std::max(options.tokens, options.forward_tokens), heads = shape.linears.front().out;
    options.backend_bytes = static_cast<std::size_t>(options.training ? 2 * rows * heads * 4 + 8 * head_chunk(false) * shape.width * 4 : 0);
  }
  /// The most memory so far, as the plan's total counts it.
  std::size_t peak() const { return static_cast<std::size_t>(memory_use().peak); }

 private:
  Cpu cpu_;
};

}  // namespace qdylora::examples
