// A device made of the host's memory, whose bytes are counted: what holds a memory plan to account. Its operations are the CPU's.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/nn/add_if_finite.hpp>

namespace test {

/// Live bytes and the most there were. Single-threaded programs' alone: allocations come from the thread that drives the model.
struct CountedBytes {
  std::size_t live = 0, peak = 0;
};
inline CountedBytes& counted_bytes() {
  static CountedBytes bytes;
  return bytes;
}

struct CountedMemory {
  static constexpr bool host = false;

  static void* allocate(std::size_t bytes) {
    auto& counted = counted_bytes();
    counted.live += bytes;
    counted.peak = std::max(counted.peak, counted.live);
    return std::memset(qdylora::HostMemory::allocate(bytes), 0xff, bytes);  // NaN in every type: nothing relies on zeros
  }
  static void deallocate(void* pointer, std::size_t bytes) noexcept {
    counted_bytes().live -= bytes;
    qdylora::HostMemory::deallocate(pointer, bytes);
  }
};

class CountedDevice : public qdylora::Cpu {
 public:
  using Memory = CountedMemory;

  CountedDevice() : Cpu(2) {}

  using Cpu::upload;
  template <qdylora::CodeFormat Format, class Scales>
  qdylora::QuantizedTensor<Format, Scales, CountedMemory> upload(const qdylora::QuantizedTensor<Format, Scales>& w) const {
    return {w.rows(), w.cols(), w.block_size(), there(w.codes()), scales_there(w.scales())};
  }
  template <class S>
  void add_if_finite(qdylora::In<S> x, qdylora::MatrixView<S> y, qdylora::In<S> a, qdylora::MatrixView<S> c) const {
    qdylora::detail::add_if_finite(static_cast<const Cpu&>(*this), x, y, a, c);
  }
  /// The host's moments, in place.
  template <class S>
  void adamw_paged(qdylora::MatrixView<S> value, qdylora::In<S> gradient, qdylora::MatrixView<S> m, qdylora::MatrixView<S> v,
                   const qdylora::AdamWUpdate& update) const {
    adamw(value, gradient, m, v, update);
  }

  template <class S>
  void lion_paged(qdylora::MatrixView<S> value, qdylora::In<S> gradient, qdylora::MatrixView<S> m,
                  const qdylora::LionUpdate& update) const {
    lion(value, gradient, m, update);
  }

 private:
  template <class E>
  static qdylora::Buffer<E, CountedMemory> there(const qdylora::Buffer<E>& here) {
    qdylora::Buffer<E, CountedMemory> copy(here.size());
    if (here.size() > 0) std::memcpy(copy.data(), here.data(), here.bytes());
    return copy;
  }
  static auto scales_there(const qdylora::Float32Scales::Storage<qdylora::HostMemory>& scales) {
    return qdylora::Float32Scales::Storage<CountedMemory>{there(scales.absmax)};
  }
  template <class Storage>
  static auto scales_there(const Storage& scales) {
    return qdylora::DoubleQuant<>::Storage<CountedMemory>{there(scales.codes), there(scales.nested_absmax), scales.offset};
  }
};

static_assert(qdylora::TransformerBackend<CountedDevice, float>);

}  // namespace test
