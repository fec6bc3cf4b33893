// The names of the library's <qdylora/cuda/launch.cuh>: blocks run one after another, where the stream's order has them.
#pragma once

#include <cxxabi.h>

#include <cstdlib>
#include <memory>
#include <typeinfo>

#include <cuda_runtime.h>

#include <qdylora/cuda/error.cuh>
#include <qdylora/cuda/kernel.cuh>

#include "support/cuda_emulator/streams.hpp"

namespace qdylora::device {

/// Nobody calls it: its address stands for the kernel.
template <Kernel K>
void run(const K&) {}

/// Runs the blocks one after another.
template <Kernel K>
void launch(const Launch& how, const K& kernel) {
  if (how.empty()) return;
  const dim3 n = how.blocks;
  const auto& machine = test::emulator::machine();
  if (n.y > machine.most_blocks || n.z > machine.most_blocks || n.x > 0x7FFFFFFFu || how.shared_bytes > machine.shared_bytes)
    QDYLORA_CUDA_TRY(test::emulator::result(cudaErrorInvalidValue));
  ++test::emulator::machine().launches;
  QDYLORA_CUDA_TRY(test::emulator::result(test::emulator::issue(how.stream, [n, kernel, shared_bytes = how.shared_bytes] {
    const std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(typeid(K).name(), nullptr, nullptr, nullptr), std::free);
    test::emulator::Grid grid(name.get(), {n.x, n.y, n.z});
    for (unsigned z = 0; z < n.z; ++z)
      for (unsigned y = 0; y < n.y; ++y)
        for (unsigned x = 0; x < n.x; ++x)
          Running(grid, {x, y, z}, K::threads, shared_bytes).run([&] { kernel(SharedMemory()); });
  })));
}

}  // namespace qdylora::device
