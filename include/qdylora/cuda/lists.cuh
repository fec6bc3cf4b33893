// Lists of the host on the device. They travel as arguments of a kernel, not as a copy of pageable memory: the host does not wait for
// the stream, may change the list at once, and a graph that captured the launch keeps it.
#pragma once

#include <algorithm>
#include <span>
#include <type_traits>

#include <qdylora/cuda/context.cuh>
#include <qdylora/cuda/launch.cuh>

namespace qdylora {
namespace device {

/// target[i] = values[i], i < count
template <class E>
struct WriteList {
  static constexpr int threads = 128;
  static constexpr int most = 3840 / static_cast<int>(sizeof(E));  // arguments have room for 4 KiB

  E* target;
  int count;
  E values[most];

  __device__ void operator()(SharedMemory) const {
    for (int i = thread(); i < count; i += threads) store(target + i, values[i]);
  }
};

}  // namespace device

#if !defined(QDYLORA_DEVICE_ONLY)
namespace detail {

/// The list in scratch memory.
template <class E>
const E* listed(const CudaContext& context, Scratch& scratch, std::span<const E> list) {
  static_assert(std::is_trivially_copyable_v<E>);
  using Kernel = device::WriteList<E>;
  E* const target = scratch.take<E>(static_cast<Index>(list.size()));
  for (std::size_t begin = 0; begin < list.size(); begin += Kernel::most) {
    Kernel kernel{};
    const auto part = list.subspan(begin, std::min<std::size_t>(Kernel::most, list.size() - begin));
    kernel.target = target + begin;
    kernel.count = static_cast<int>(part.size());
    std::copy(part.begin(), part.end(), kernel.values);
    device::launch({context.stream(), 1}, kernel);
  }
  return target;
}

}  // namespace detail
#endif
}  // namespace qdylora
