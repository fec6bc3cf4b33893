// How a kernel is launched. tests/support/cuda_emulator has a header of the same name, by which it runs on a CPU.
#pragma once

#include <qdylora/cuda/error.cuh>
#include <qdylora/cuda/kernel.cuh>

namespace qdylora::device {

/// How many blocks of K one processor must have registers for. Kernels that keep much in registers say so; without a word of theirs the
/// compiler may spill a few to make room for another block.
template <class K>
inline constexpr int least_blocks = 0;
template <class K>
  requires requires { K::least_blocks; }
inline constexpr int least_blocks<K> = K::least_blocks;

/// The most threads a block of K may have: of a kernel that is not there, fewer than any launch has, so that none succeeds.
template <class K>
inline constexpr int most_threads = K::threads;
template <class K>
  requires(K::needs_sm90a)
inline constexpr int most_threads<K> = is_sm90a ? K::threads : warp_size;

template <Kernel K>
__global__ void __launch_bounds__(most_threads<K>, least_blocks<K>) run(const __grid_constant__ K kernel) {
  extern __shared__ __align__(1024) unsigned char bytes[];
  kernel(SharedMemory(bytes));
}

#if !defined(QDYLORA_DEVICE_ONLY)
/// Starts the kernel; returns before it is done.
template <Kernel K>
void launch(const Launch& how, const K& kernel) {
  constexpr int without_asking = 48 * 1024;
  if (how.empty()) return;
  if (how.shared_bytes > without_asking)
    QDYLORA_CUDA_TRY(cudaFuncSetAttribute(run<K>, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared_bytes));
  // <<<>>> would leave its error where those of other calls of the program lie, which are not this kernel's.
  void* arguments[] = {const_cast<K*>(&kernel)};
  QDYLORA_CUDA_TRY(
      cudaLaunchKernel(run<K>, how.blocks, K::threads, arguments, static_cast<std::size_t>(how.shared_bytes), how.stream));
}
#endif
}  // namespace qdylora::device
