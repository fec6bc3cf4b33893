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

/// A list that a kernel takes: a short one with its other arguments, which costs no launch, else in memory.
template <class E>
struct List {
  static constexpr int most = 1024 / static_cast<int>(sizeof(E));

  const E* there = nullptr;  // null: in `values`
  E values[most] = {};

  __device__ E operator[](Index i) const { return there != nullptr ? load(there + i) : values[i]; }
};

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

/// The list as a kernel takes it; a long one lies in scratch memory.
template <class E>
device::List<E> listed(const CudaContext& context, Scratch& scratch, std::span<const E> list) {
  static_assert(std::is_trivially_copyable_v<E>);
  using Kernel = device::WriteList<E>;
  device::List<E> result;
  if (list.size() <= static_cast<std::size_t>(result.most)) {
    std::copy(list.begin(), list.end(), result.values);
    return result;
  }
  E* const target = scratch.take<E>(static_cast<Index>(list.size()));
  for (std::size_t begin = 0; begin < list.size(); begin += Kernel::most) {
    Kernel kernel{};
    const auto part = list.subspan(begin, std::min<std::size_t>(Kernel::most, list.size() - begin));
    kernel.target = target + begin;
    kernel.count = static_cast<int>(part.size());
    std::copy(part.begin(), part.end(), kernel.values);
    device::launch({context.stream(), 1}, kernel);
  }
  result.there = target;
  return result;
}

}  // namespace detail
#endif
}  // namespace qdylora
