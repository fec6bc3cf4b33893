// The names of the library's <qdylora/cuda/device.cuh> with their meaning on a CPU, by the definitions of the PTX ISA. It stands before
// the library's in the list of include folders, so that kernels compile against it unchanged.
#pragma once

#include <array>
#include <bit>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <string>
#include <type_traits>

#include <cuda_runtime.h>

#include <qdylora/core/scalar.hpp>
#include <qdylora/cuda/arithmetic.cuh>

#include "support/cuda_emulator/block.hpp"

namespace qdylora::device {

using Running = test::emulator::Block;
using test::emulator::Access;

inline constexpr int warp_size = 32;
inline constexpr unsigned all_lanes = 0xFFFFFFFFu;
inline constexpr bool is_sm80 = true, is_sm90 = true, is_sm90a = true;

template <int N>
struct alignas(4 * N) Words {
  std::uint32_t word[N];
};

// ---- where a thread is -----------------------------------------------------------------------------------------------------------

inline int thread() { return Running::running().thread(); }
inline int block_threads() { return Running::running().threads(); }
inline int lane() { return thread() % warp_size; }
inline int warp() { return thread() / warp_size; }
inline uint3 block() {
  const auto& i = Running::running().index();
  return {i[0], i[1], i[2]};
}
inline dim3 grid() {
  const auto& n = Running::running().grid();
  return {n[0], n[1], n[2]};
}

// ---- shared memory ---------------------------------------------------------------------------------------------------------------

template <class T>
class Shared {
 public:
  explicit Shared(std::ptrdiff_t offset) : offset_(offset) {}

  T load(int i) const { return *checked(i, Access::read); }
  void store(int i, T value) const { *checked(i, Access::write) = value; }
  T atomic_add(int i, T value) const {
    T* const at = checked(i, Access::atomic);
    const T before = *at;
    *at = static_cast<T>(before + value);
    return before;
  }
  template <class U = T>
  Shared<U> from(int i) const {
    return Shared<U>(offset_ + i * static_cast<std::ptrdiff_t>(sizeof(T)));
  }
  std::ptrdiff_t offset() const { return offset_; }

 private:
  T* checked(int i, Access access) const {
    const std::ptrdiff_t at = offset_ + i * static_cast<std::ptrdiff_t>(sizeof(T));
    Running::running().access_shared(at, sizeof(T), alignof(T), access);
    return reinterpret_cast<T*>(Running::running().shared_begin() + at);
  }

  std::ptrdiff_t offset_;
};

class LookUpTable {
 public:
  explicit LookUpTable(const Shared<std::uint32_t>& words) : words_(words) {}
  std::uint32_t load(unsigned i) const { return words_.load(static_cast<int>(i)); }

 private:
  Shared<std::uint32_t> words_;
};

class ByteTable {
 public:
  static constexpr int pitch = 64;

  explicit ByteTable(const Shared<std::uint32_t>& words) : words_(words) {}
  std::uint32_t load(std::uint32_t bytes, int i) const { return words_.load(static_cast<int>(bytes >> (8 * i) & 255u) * pitch + lane()); }

 private:
  Shared<std::uint32_t> words_;
};

class SharedMemory {
 public:
  template <class T>
  Shared<T> take(int count) {
    constexpr int alignment = alignof(T) > 16 ? static_cast<int>(alignof(T)) : 16;
    used_ = (used_ + alignment - 1) / alignment * alignment;
    const Shared<T> taken(used_);
    used_ += count * static_cast<int>(sizeof(T));
    if (used_ > Running::running().shared_bytes())
      Running::running().fail("takes " + std::to_string(used_) + " bytes of shared memory, the launch gave " +
                              std::to_string(Running::running().shared_bytes()));
    return taken;
  }

 private:
  int used_ = 0;
};

// ---- global memory ---------------------------------------------------------------------------------------------------------------

template <class V>
V load(const V* p) {
  Running::running().access_global("reads", p, sizeof(V), alignof(V), Access::read);
  return *p;
}
template <class V>
V load_once(const V* p) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);
  Running::running().access_global("reads", p, sizeof(V), sizeof(V), Access::read);
  return *p;
}
template <class V>
void store(V* p, std::type_identity_t<V> value) {
  Running::running().access_global("writes", p, sizeof(V), alignof(V), Access::write);
  *p = value;
}
namespace emulated {
/// For a change, or a look, that races with no other of its kind.
template <class T>
T& atomically(const T* p) {
  Running::running().access_global("writes", p, sizeof(T), alignof(T), Access::atomic);
  return *const_cast<T*>(p);
}
}  // namespace emulated
template <std::integral T>
void atomic_add(T* p, std::type_identity_t<T> value) {
  T& at = emulated::atomically(p);
  at = static_cast<T>(at + value);
}
template <std::integral T>
void atomic_min(T* p, std::type_identity_t<T> value) {
  T& at = emulated::atomically(p);
  at = std::min(at, value);
}
inline void signal(std::uint32_t* count) {
  Running::running().signal(count);
  atomic_add(count, 1);
}
/// Blocks run one after another: what has not come by now will not.
inline void await(const std::uint32_t* count, std::uint32_t least) {
  if (const std::uint32_t found = emulated::atomically(count); found < least)
    Running::running().fail("waits for " + std::to_string(least) + " signals, of which earlier blocks have given " + std::to_string(found));
  Running::running().see_signals(count);
}
inline std::uint32_t count_up(std::uint32_t* count) { return emulated::atomically(count)++; }
inline void set_count(std::uint32_t* count, std::uint32_t value) { emulated::atomically(count) = value; }

// ---- order -----------------------------------------------------------------------------------------------------------------------

inline void sync_block(int line = __builtin_LINE()) { Running::running().barrier(line); }
inline void sync_warp(unsigned mask = all_lanes, int line = __builtin_LINE()) { Running::running().sync_warp(mask, line); }
inline std::uint16_t not_before(std::uint16_t bits) { return bits; }

// ---- between lanes ---------------------------------------------------------------------------------------------------------------

namespace emulated {

// `source` is the lane to read: the caller's own where PTX says that the value stays.
template <class T>
T exchange(const char* what, T value, int source, unsigned mask, int line) {
  struct Own {
    T value;
    int source;
  } own{value, source};
  if ((mask >> source & 1u) == 0)
    Running::running().fail(std::string(what) + " (line " + std::to_string(line) + ") reads lane " + std::to_string(source) +
                            ", which is not in its mask");
  Running::running().collective(what, mask, line, own, [](const std::array<Own*, warp_size>& lanes) {
    std::array<T, warp_size> values{};
    for (std::size_t l = 0; l < warp_size; ++l)
      if (lanes[l] != nullptr) values[l] = lanes[l]->value;
    for (Own* lane : lanes)
      if (lane != nullptr) lane->value = values[static_cast<std::size_t>(lane->source)];
  });
  return own.value;
}

// Every lane gets combine(all values of the mask).
template <class T, class Combine>
T reduce(const char* what, T value, unsigned mask, int line, Combine combine) {
  T own = value;
  Running::running().collective(what, mask, line, own, [&](const std::array<T*, warp_size>& lanes) {
    T sum{};
    for (std::size_t l = 0; l < warp_size; ++l)
      if (lanes[l] != nullptr) sum = combine(sum, *lanes[l], static_cast<unsigned>(l));
    for (T* lane : lanes)
      if (lane != nullptr) *lane = sum;
  });
  return own;
}

}  // namespace emulated

template <class T>
T shuffle(T value, int from, int width = warp_size, unsigned mask = all_lanes, int line = __builtin_LINE()) {
  const int group = lane() / width * width;
  return emulated::exchange("shuffle", value, group + (from & (width - 1)), mask, line);
}
template <class T>
T shuffle_up(T value, unsigned distance, int width = warp_size, unsigned mask = all_lanes, int line = __builtin_LINE()) {
  const int from = lane() - static_cast<int>(distance);
  return emulated::exchange("shuffle_up", value, from < lane() / width * width ? lane() : from, mask, line);
}
template <class T>
T shuffle_down(T value, unsigned distance, int width = warp_size, unsigned mask = all_lanes, int line = __builtin_LINE()) {
  const int from = lane() + static_cast<int>(distance);
  return emulated::exchange("shuffle_down", value, from >= (lane() / width + 1) * width ? lane() : from, mask, line);
}
// A partner in an earlier group may be read; one in a later group leaves the value as it is.
template <class T>
T shuffle_xor(T value, int bits, int width = warp_size, unsigned mask = all_lanes, int line = __builtin_LINE()) {
  const int from = lane() ^ bits;
  return emulated::exchange("shuffle_xor", value, from >= (lane() / width + 1) * width ? lane() : from, mask, line);
}

inline unsigned ballot(bool predicate, unsigned mask = all_lanes, int line = __builtin_LINE()) {
  return emulated::reduce("ballot", predicate ? 1u : 0u, mask, line,
                          [](unsigned sum, unsigned one, unsigned lane) { return sum | one << lane; });
}
inline bool all(bool predicate, unsigned mask = all_lanes, int line = __builtin_LINE()) { return ballot(predicate, mask, line) == mask; }
inline bool any(bool predicate, unsigned mask = all_lanes, int line = __builtin_LINE()) { return ballot(predicate, mask, line) != 0; }
inline unsigned reduce_add(unsigned value, int line = __builtin_LINE()) {
  return emulated::reduce("reduce_add", value, all_lanes, line, [](unsigned sum, unsigned x, unsigned) { return sum + x; });
}
inline unsigned reduce_max(unsigned value, int line = __builtin_LINE()) {
  return emulated::reduce("reduce_max", value, all_lanes, line, [](unsigned most, unsigned x, unsigned) { return std::max(most, x); });
}

// ---- asynchronous copies ---------------------------------------------------------------------------------------------------------

template <int bytes, class T>
void copy_async(Shared<T> to, const T* from, int valid = bytes) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
  Running::running().copy_async(to.offset(), from, bytes, static_cast<std::size_t>(valid));
}
inline void commit_copies() { Running::running().commit_copies(); }
template <int pending>
void wait_copies() {
  Running::running().wait_copies(pending);
}

// ---- tensor cores ----------------------------------------------------------------------------------------------------------------

template <int matrices, bool transposed = false, class T>
Words<matrices> load_matrices(Shared<T> row, int line = __builtin_LINE()) {
  static_assert(sizeof(T) == 2 && (matrices == 1 || matrices == 2 || matrices == 4));
  struct Own {
    std::uint16_t row[8];
    Words<matrices> result;
  } own{};
  if (lane() < 8 * matrices) {
    Running::running().access_shared(row.offset(), 16, 16, Access::read);
    std::memcpy(own.row, Running::running().shared_begin() + row.offset(), 16);
  }
  Running::running().collective("load_matrices", all_lanes, line, own, [](const std::array<Own*, warp_size>& lanes) {
    for (std::size_t l = 0; l < warp_size; ++l)
      for (std::size_t m = 0; m < matrices; ++m) {
        const auto element = [&](std::size_t i, std::size_t j) -> std::uint32_t {
          return transposed ? lanes[8 * m + j]->row[i] : lanes[8 * m + i]->row[j];
        };
        lanes[l]->result.word[m] = element(l / 4, 2 * (l % 4)) | element(l / 4, 2 * (l % 4) + 1) << 16;
      }
  });
  return own.result;
}

template <class T>
inline constexpr bool multiplies = std::same_as<T, bfloat16> || std::same_as<T, half>;

template <class T>
void multiply_add(float (&d)[4], const Words<4>& a, const Words<2>& b, int line = __builtin_LINE()) {
  static_assert(std::same_as<T, bfloat16> || std::same_as<T, half>);
  if (const auto& m = test::emulator::machine(); std::same_as<T, bfloat16> && std::min(m.compute_capability, m.compiled_capability) < 80)
    Running::running().fail("multiply_add of bfloat16 before sm_80");
  struct Own {
    float* d;
    Words<4> a;
    Words<2> b;
  } own{d, a, b};
  Running::running().collective("multiply_add", all_lanes, line, own, [](const std::array<Own*, warp_size>& lanes) {
    const auto value = [](std::uint32_t word, std::size_t part) -> double {
      return static_cast<float>(T::from_bits(static_cast<std::uint16_t>(word >> (16 * part))));
    };
    double left[16][16], right[16][8];
    for (std::size_t l = 0; l < warp_size; ++l)
      for (std::size_t part = 0; part < 2; ++part) {
        const std::size_t g = l / 4, t = 2 * (l % 4) + part;
        for (std::size_t w = 0; w < 4; ++w) left[g + 8 * (w % 2)][t + 8 * (w / 2)] = value(lanes[l]->a.word[w], part);
        for (std::size_t w = 0; w < 2; ++w) right[t + 8 * w][g] = value(lanes[l]->b.word[w], part);
      }
    for (std::size_t l = 0; l < warp_size; ++l)
      for (std::size_t i = 0; i < 4; ++i) {
        const std::size_t row = l / 4 + 8 * (i / 2), col = 2 * (l % 4) + i % 2;
        double sum = lanes[l]->d[i];
        for (std::size_t k = 0; k < 16; ++k) sum += left[row][k] * right[k][col];
        lanes[l]->d[i] = static_cast<float>(sum);
      }
  });
}

}  // namespace qdylora::device
