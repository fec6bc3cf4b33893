// What a kernel asks of the hardware: with arithmetic.cuh and warpgroup.cuh, the only headers with PTX and intrinsics. Kernels are written
// against these names; tests/support/cuda_emulator has headers of the same, by which they run on a CPU, accesses checked. A function is one
// instruction, or a few.
#pragma once

#include <bit>
#include <concepts>
#include <cstdint>
#include <type_traits>

#include <qdylora/core/scalar.hpp>
#include <qdylora/cuda/arithmetic.cuh>

namespace qdylora::device {

inline constexpr int warp_size = 32;
inline constexpr unsigned all_lanes = 0xFFFFFFFFu;

/// Whether code is compiled for sm_80 or later, and for sm_90 or later. The body of a kernel that is not launched on an earlier device need
/// not exist there.
#if defined(__CUDA_ARCH__)
inline constexpr bool is_sm80 = __CUDA_ARCH__ >= 800, is_sm90 = __CUDA_ARCH__ >= 900;
#else
inline constexpr bool is_sm80 = true, is_sm90 = true;
#endif
/// The same of sm_90a, which has more than others of its number. A kernel that needs it says so (needs_sm90a).
#if defined(__CUDA_ARCH__) && !defined(__CUDA_ARCH_FEAT_SM90_ALL)
inline constexpr bool is_sm90a = false;
#else
inline constexpr bool is_sm90a = true;
#endif

/// N 32-bit words that are loaded and stored at once.
template <int N>
struct alignas(4 * N) Words {
  std::uint32_t word[N];
};

// ---- where a thread is: blocks are one-dimensional -------------------------------------------------------------------------------

__device__ __forceinline__ int thread() { return static_cast<int>(threadIdx.x); }
__device__ __forceinline__ int block_threads() { return static_cast<int>(blockDim.x); }
__device__ __forceinline__ int lane() { return thread() % warp_size; }
__device__ __forceinline__ int warp() { return thread() / warp_size; }
__device__ __forceinline__ uint3 block() { return blockIdx; }
__device__ __forceinline__ dim3 grid() { return gridDim; }

// ---- shared memory ---------------------------------------------------------------------------------------------------------------

/// Elements in the block's shared memory. Reads and writes are spelled out, so that an emulator sees each.
template <class T>
class Shared {
 public:
  __device__ __forceinline__ explicit Shared(T* data) : data_(data) {}

  __device__ __forceinline__ T load(int i) const { return data_[i]; }
  __device__ __forceinline__ void store(int i, T value) const { data_[i] = value; }
  /// Adds to an integer; returns what was there.
  __device__ __forceinline__ T atomic_add(int i, T value) const { return atomicAdd(data_ + i, value); }
  /// The elements from i on, as T or as the U whose bytes they are.
  template <class U = T>
  __device__ __forceinline__ Shared<U> from(int i) const {
    return Shared<U>(reinterpret_cast<U*>(data_ + i));
  }
  /// Its address in the window of shared memory, as PTX takes it.
  __device__ __forceinline__ unsigned address() const { return static_cast<unsigned>(__cvta_generic_to_shared(data_)); }

 private:
  T* data_;
};

/// Words of shared memory that are looked up again and again. Their address stays in a register, where a compiler would make it anew from
/// its parts, so that a look-up is one addition and one load.
class LookUpTable {
 public:
  __device__ __forceinline__ explicit LookUpTable(const Shared<std::uint32_t>& words) : address_(words.address()) {
    asm volatile("" : "+r"(address_));
  }
  __device__ __forceinline__ std::uint32_t load(unsigned i) const {
    std::uint32_t word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address_ + 4 * i));
    return word;
  }

 private:
  unsigned address_;
};

/// The same with an entry for each value of a byte, 256 bytes from one to the next, of which lane l has word l: the byte and the lane make the
/// address in one instruction.
class ByteTable {
 public:
  static constexpr int pitch = 64;  // words from an entry to the next

  __device__ __forceinline__ explicit ByteTable(const Shared<std::uint32_t>& words)
      : begin_(words.address()), lane_bytes_(4 * static_cast<unsigned>(lane())) {}
  /// Of byte i of a word.
  __device__ __forceinline__ std::uint32_t load(std::uint32_t bytes, int i) const {
    std::uint32_t word;
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(__byte_perm(bytes, lane_bytes_, 0x5504u + 16 * static_cast<unsigned>(i)) + begin_));
    return word;
  }

 private:
  unsigned begin_, lane_bytes_;
};

/// All of a block's shared memory, dealt out from its beginning. Sizes are constants, and so are the addresses.
class SharedMemory {
 public:
  __device__ __forceinline__ explicit SharedMemory(unsigned char* bytes) : bytes_(bytes) {}

  template <class T>
  __device__ __forceinline__ Shared<T> take(int count) {
    used_ = (used_ + alignment<T> - 1) / alignment<T> * alignment<T>;
    const Shared<T> taken(reinterpret_cast<T*>(bytes_ + used_));
    used_ += count * static_cast<int>(sizeof(T));
    return taken;
  }

 private:
  template <class T>
  static constexpr int alignment = alignof(T) > 16 ? static_cast<int>(alignof(T)) : 16;

  unsigned char* bytes_;
  int used_ = 0;
};

// ---- global memory ---------------------------------------------------------------------------------------------------------------

template <class V>
__device__ __forceinline__ V load(const V* p) {
  return *p;
}

/// Data that no thread writes while the kernel runs, and that is read once: it passes the L1 cache by.
template <class V>
__device__ __forceinline__ V load_once(const V* p) {
  static_assert(sizeof(V) == 4 || sizeof(V) == 8 || sizeof(V) == 16);
  Words<sizeof(V) / 4> v;
  if constexpr (sizeof(V) == 4)
    asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(v.word[0]) : "l"(p));
  else if constexpr (sizeof(V) == 8)
    asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(v.word[0]), "=r"(v.word[1]) : "l"(p));
  else
    asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.word[0]), "=r"(v.word[1]), "=r"(v.word[2]), "=r"(v.word[3])
        : "l"(p));
  return std::bit_cast<V>(v);
}

template <class V>
__device__ __forceinline__ void store(V* p, std::type_identity_t<V> value) {
  *p = value;
}
/// At once, which a compiler may forget of words that it has made one by one.
template <int N>
__device__ __forceinline__ void store(Words<N>* p, const Words<N>& v) {
  static_assert(N == 1 || N == 2 || N == 4);
  if constexpr (N == 1) asm volatile("st.global.u32 [%0], %1;" ::"l"(p), "r"(v.word[0]) : "memory");
  else if constexpr (N == 2) asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]) : "memory");
  else
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(p), "r"(v.word[0]), "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3]) : "memory");
}

/// Integers: their sum and minimum do not depend on the order.
template <std::integral T>
__device__ __forceinline__ void atomic_add(T* p, std::type_identity_t<T> value) {
  atomicAdd(p, value);
}
template <std::integral T>
__device__ __forceinline__ void atomic_min(T* p, std::type_identity_t<T> value) {
  atomicMin(p, value);
}

/// A count by which blocks wait for others of their grid. Who sees it with await sees what the thread has seen and done before.
__device__ __forceinline__ void signal(std::uint32_t* count) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}
/// Until the count is `least` at least, by signals of blocks with lower numbers in a grid along x: GPUs start those first, though CUDA does
/// not say so.
__device__ __forceinline__ void await(const std::uint32_t* count, std::uint32_t least) {
  std::uint32_t found = 0;
  do asm volatile("ld.relaxed.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(count) : "memory");
  while (found < least);
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(found) : "l"(count) : "memory");
}
/// Adds one; returns what was there.
__device__ __forceinline__ std::uint32_t count_up(std::uint32_t* count) { return atomicAdd(count, 1u); }
__device__ __forceinline__ void set_count(std::uint32_t* count, std::uint32_t value) { atomicExch(count, value); }

// ---- order -----------------------------------------------------------------------------------------------------------------------

/// All threads of the block, at the same place.
__device__ __forceinline__ void sync_block() { __syncthreads(); }
/// The lanes of the mask, each of which names the same mask. So it is for all that follows.
__device__ __forceinline__ void sync_warp(unsigned mask = all_lanes) { __syncwarp(mask); }

/// The same bits, not looked at before this place: until here a load of them may be on its way.
__device__ __forceinline__ std::uint16_t not_before(std::uint16_t bits) {
  asm volatile("" : "+h"(bits));
  return bits;
}

// ---- between lanes. Groups of `width` lanes, a power of two, each exchange among themselves; the lanes read from are in the mask -------

template <class T>
__device__ __forceinline__ T shuffle(T value, int from, int width = warp_size, unsigned mask = all_lanes) {
  return __shfl_sync(mask, value, from, width);
}
template <class T>
__device__ __forceinline__ T shuffle_up(T value, unsigned distance, int width = warp_size, unsigned mask = all_lanes) {
  return __shfl_up_sync(mask, value, distance, width);
}
template <class T>
__device__ __forceinline__ T shuffle_down(T value, unsigned distance, int width = warp_size, unsigned mask = all_lanes) {
  return __shfl_down_sync(mask, value, distance, width);
}
template <class T>
__device__ __forceinline__ T shuffle_xor(T value, int bits, int width = warp_size, unsigned mask = all_lanes) {
  return __shfl_xor_sync(mask, value, bits, width);
}

__device__ __forceinline__ bool all(bool predicate, unsigned mask = all_lanes) { return __all_sync(mask, predicate) != 0; }
__device__ __forceinline__ bool any(bool predicate, unsigned mask = all_lanes) { return __any_sync(mask, predicate) != 0; }
__device__ __forceinline__ unsigned ballot(bool predicate, unsigned mask = all_lanes) { return __ballot_sync(mask, predicate); }

/// Over the whole warp; every lane gets the result.
__device__ __forceinline__ unsigned reduce_add(unsigned value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_add_sync(all_lanes, value);
#else
  for (int bits = warp_size / 2; bits > 0; bits /= 2) value += shuffle_xor(value, bits);
  return value;
#endif
}
__device__ __forceinline__ unsigned reduce_max(unsigned value) {
#if __CUDA_ARCH__ >= 800
  return __reduce_max_sync(all_lanes, value);
#else
  for (int bits = warp_size / 2; bits > 0; bits /= 2) value = max(value, shuffle_xor(value, bits));
  return value;
#endif
}

// ---- copies from global to shared memory that run beside the thread. sm_80; before it the thread makes them itself --------------------

/// `bytes` bytes, both ends aligned to as many. They may be read after wait_copies, by other threads after a barrier on top.
template <int bytes, class T>
__device__ __forceinline__ void copy_async(Shared<T> to, const T* from) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
#if __CUDA_ARCH__ >= 800
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to.address()), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(to.address()), "l"(from), "n"(bytes) : "memory");
#else
  using Bytes = Words<bytes / 4>;
  to.template from<Bytes>(0).store(0, load(reinterpret_cast<const Bytes*>(from)));
#endif
}
/// The same where only the first `valid` bytes exist: zeros take the place of the others.
template <int bytes, class T>
__device__ __forceinline__ void copy_async(Shared<T> to, const T* from, int valid) {
  static_assert(bytes == 4 || bytes == 8 || bytes == 16);
#if __CUDA_ARCH__ >= 800
  if constexpr (bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to.address()), "l"(from), "r"(valid) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(to.address()), "l"(from), "n"(bytes), "r"(valid) : "memory");
#else
#pragma unroll
  for (int i = 0; i < bytes / static_cast<int>(sizeof(T)); ++i)
    to.store(i, i * static_cast<int>(sizeof(T)) < valid ? load(from + i) : T{});
#endif
}
/// Closes a group of the copies this thread has begun.
__device__ __forceinline__ void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
/// Waits until at most the newest `pending` groups of this thread are still on their way.
template <int pending>
__device__ __forceinline__ void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
#endif
}

// ---- tensor cores. A fragment word holds two neighbours of a row, the first in its low half ------------------------------------------

/// 8x8 matrices of 16-bit elements: lanes 8i ... 8i + 7 point at the rows of matrix i, 16 bytes each. Word i of lane l is then row l / 4,
/// columns 2 (l % 4) and 2 (l % 4) + 1 of matrix i, or of its transpose. sm_75
template <int matrices, bool transposed = false, class T>
__device__ __forceinline__ Words<matrices> load_matrices(Shared<T> row) {
  static_assert(sizeof(T) == 2 && (matrices == 1 || matrices == 2 || matrices == 4));
  Words<matrices> m;
  auto* const w = m.word;
  const unsigned at = row.address();
  if constexpr (matrices == 1 && !transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(w[0]) : "r"(at) : "memory");
  else if constexpr (matrices == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];" : "=r"(w[0]) : "r"(at) : "memory");
  else if constexpr (matrices == 2 && !transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "r"(at) : "memory");
  else if constexpr (matrices == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];" : "=r"(w[0]), "=r"(w[1]) : "r"(at) : "memory");
  else if constexpr (!transposed)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(w[0]), "=r"(w[1]), "=r"(w[2]), "=r"(w[3])
                 : "r"(at)
                 : "memory");
  return m;
}

/// d [16, 8] += a [16, 16] . b [16, 8], T = bfloat16 or half, mma.sync.m16n8k16. With g = lane / 4, t = lane % 4:
///   a: words (g, 2t) (g + 8, 2t) (g, 2t + 8) (g + 8, 2t + 8), each with its right neighbour
///   b: words (2t, g) (2t + 8, g), each with its lower neighbour      d: (g, 2t) (g, 2t + 1) (g + 8, 2t) (g + 8, 2t + 1)
/// sm_80; on sm_75 half alone, in two steps of m16n8k8.
#if __CUDA_ARCH__ >= 800
template <class T>
inline constexpr bool multiplies = std::same_as<T, bfloat16> || std::same_as<T, half>;
#else
template <class T>
inline constexpr bool multiplies = std::same_as<T, half>;
#endif
template <class T>
__device__ __forceinline__ void multiply_add(float (&d)[4], const Words<4>& a, const Words<2>& b) {
  static_assert(std::same_as<T, bfloat16> || std::same_as<T, half>);
#if __CUDA_ARCH__ >= 800
  if constexpr (std::same_as<T, bfloat16>)
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]), "r"(b.word[1]));
  else
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "r"(b.word[0]), "r"(b.word[1]));
#else
  static_assert(multiplies<T>);
#pragma unroll
  for (int k = 0; k < 2; ++k)
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a.word[2 * k]), "r"(a.word[2 * k + 1]), "r"(b.word[k]));
#endif
}

}  // namespace qdylora::device
