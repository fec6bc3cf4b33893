// Where a program's arithmetic is done: here, on this machine's processors. cuda/cuda_device.cuh has the same members for a GPU.
#pragma once

#include <algorithm>
#include <string>

#include <qdylora/core/paged_memory.hpp>
#include <qdylora/cpu/cpu.hpp>
#include <qdylora/cpu/scratch_plan.hpp>
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

  /// f(memory), in which an optimizer keeps its moments: files of the folder that --paged names.
  template <class F>
  auto with_moments_memory(const std::string& folder, const F& f) const {
    return f(folder.empty() ? PagedMemory() : PagedMemory(folder));
  }
  /// Weights where the backend has its memory.
  HostWeights place(HostWeights weights) const { return weights; }
  /// What the plan cannot know: memory of this process so far, and what the threads work in.
  template <Scalar T>
  void complete(MemoryOptions& options, const ModelShape& shape) const {
    options.process_bytes = static_cast<std::size_t>(memory_use().bytes);
    const ScratchPlan scratch = scratch_of<T>(options, shape);
    options.backend_bytes = scratch.bytes();
    options.backend_passing = scratch.passing();
    options.backend_beside_gradient = scratch.beside_gradient();
  }
  /// The most memory so far, as the plan's total counts it.
  std::size_t peak() const { return static_cast<std::size_t>(memory_use().peak); }

 private:
  /// Of a decoder's passes, as its layers make them.
  template <Scalar T>
  ScratchPlan scratch_of(const MemoryOptions& o, const ModelShape& s) const {
    using Acc = Accumulator<T>;
    const bool by_four = o.base.format != BaseFormat::fp8, signs = o.base.binary.has_value();
    const bool coded = (o.base.format < BaseFormat::bfloat16 || signs) && !s.whole;
    const bool floats = o.base.format < BaseFormat::int4 && !o.base.double_quant;  // scales, which are not decoded
    const ScratchWeight base{.coded = coded,
                             .bits = signs ? 1 : by_four ? 4 : 8,
                             .decoded_block = by_four && coded && !floats && !signs ? o.base.block_size : 0};
    const ScratchWeight table{.coded = o.coded_tables && !s.whole, .bits = 8};
    ScratchPlan plan(cpu_);
    const auto passes = [&](Index tokens, Index scored, bool training) {
      if (tokens == 0) return;
      for (const auto& [name, out, in] : s.linears) {
        plan.forward<T, T>(tokens, out, in, base);
        if (training) plan.backward<T, T>(tokens, in, out, base);
        if (training && s.whole) plan.gradient<T>(tokens, out, in);
        if (training && signs) plan.gradient<T>(tokens, std::min(out, alpha_panel_size), in);
      }
      for (const auto& [name, out, in] : s.adapted) {  // z = x A^T, y += u B; t = dy B^T, dx += dz A
        plan.forward<T, Acc>(tokens, o.max_rank, in);
        plan.backward<Acc, T>(tokens, out, o.max_rank);
        if (!training) continue;
        plan.forward<T, Acc>(tokens, o.max_rank, out);
        plan.backward<Acc, T>(tokens, in, o.max_rank);
        for (const Index cols : {in, out}) plan.gradient<T>(tokens, o.max_rank, cols);
      }
      plan.attention<T>(tokens, std::min(tokens, o.longest), s.query_width / s.head_dim, s.head_dim, training);
      const Index rows = std::min(scored, head_chunk(o.device));
      plan.forward<T, Acc>(rows, s.vocab, s.width, table, logits_stride(s.vocab));
      if (training) plan.backward<Acc, T>(rows, s.width, s.vocab, table, logits_stride(s.vocab));
      if (training && s.whole) plan.gradient<T>(rows, s.vocab, s.width);
    };
    passes(o.training ? o.tokens : 0, o.scored, true);
    passes(o.forward_tokens, o.forward_scored, false);
    return plan;
  }

  Cpu cpu_;
};

}  // namespace qdylora::examples
