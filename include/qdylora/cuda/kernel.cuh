// What a kernel is, and what its launch is told: the same on a device and on the emulator.
#pragma once

#include <type_traits>

#include <qdylora/cuda/device.cuh>

namespace qdylora::device {

/// A kernel is a class: its members are the arguments, `threads` the size of its blocks, and operator() what a thread does with the
/// block's shared memory.
template <class K>
concept Kernel = std::is_trivially_copyable_v<K> && K::threads % warp_size == 0 && K::threads <= 1024;

#if !defined(QDYLORA_DEVICE_ONLY)
struct Launch {
  cudaStream_t stream = nullptr;
  dim3 blocks;
  int shared_bytes = 0;

  /// A grid without blocks is no work.
  bool empty() const noexcept { return blocks.x == 0 || blocks.y == 0 || blocks.z == 0; }
};
#endif

}  // namespace qdylora::device
