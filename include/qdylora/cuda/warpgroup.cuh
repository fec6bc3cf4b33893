// Products of warpgroups, four warps that begin on a multiple of four: wgmma of Hopper, which sm_90a alone has. They read their right operand
// from shared memory, run beside the threads, and have to be waited for. tests/support/cuda_emulator has a header of the same name.
#pragma once

#include <concepts>
#include <cstdint>

#include <qdylora/cuda/swizzle.cuh>

namespace qdylora::device {

/// Rows of the right operand, the first of SwizzledRows, as products are told of them: PTX's matrix descriptor but for its upper half.
class ProductRows {
 public:
  __device__ __forceinline__ explicit ProductRows(Shared<SwizzledRows> rows) : lower_((rows.address() & 0x3FFFFu) >> 4 | 1u << 16) {}

  /// The rows from 8 i on.
  __device__ __forceinline__ ProductRows from(int i) const { return ProductRows(lower_ + static_cast<unsigned>(i) * (1024 / 16)); }
  /// Of columns 16 step and on. Eight rows take 1024 bytes; 128 of a row are swizzled.
  __device__ __forceinline__ std::uint64_t descriptor(int step) const {
    constexpr std::uint64_t upper = 1024 / 16 | 1u << 30;
    return upper << 32 | (lower_ + 32 / 16 * static_cast<unsigned>(step));
  }

 private:
  __device__ __forceinline__ explicit ProductRows(unsigned lower) : lower_(lower) {}

  unsigned lower_;
};

/// What the thread has written to shared memory, or its copies have, is there for products that begin after a barrier.
__device__ __forceinline__ void publish_to_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
#endif
}

/// Before a product whose registers the thread has touched: what it did with them is done, `a` is complete.
template <int count>
__device__ __forceinline__ void begin_products(Words<4> (&a)[count]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
#pragma unroll
  for (int i = 0; i < count; ++i)
    asm volatile("" : "+r"(a[i].word[0]), "+r"(a[i].word[1]), "+r"(a[i].word[2]), "+r"(a[i].word[3])::"memory");
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#endif
}

#define QDYLORA_FOUR_SUMS(i) "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3])
#define QDYLORA_EIGHT_SUMS(i) QDYLORA_FOUR_SUMS(i), QDYLORA_FOUR_SUMS(i + 4)
#define QDYLORA_OPERANDS "r"(a.word[0]), "r"(a.word[1]), "r"(a.word[2]), "r"(a.word[3]), "l"(b), "n"(accumulate)
// Of 64 and of 32 rows on the right; the last operand says whether sums are added to.
#define QDYLORA_MULTIPLY_64(types)                                                                                                          \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %37, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32." types                                   \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25,"  \
               " %26, %27, %28, %29, %30, %31}, {%32, %33, %34, %35}, %36, p, 1, 1, 0; }"                                                   \
               : QDYLORA_EIGHT_SUMS(0), QDYLORA_EIGHT_SUMS(8), QDYLORA_EIGHT_SUMS(16), QDYLORA_EIGHT_SUMS(24)                               \
               : QDYLORA_OPERANDS)
#define QDYLORA_MULTIPLY_32(types)                                                                                                          \
  asm volatile("{ .reg .pred p; setp.ne.b32 p, %21, 0; wgmma.mma_async.sync.aligned.m64n32k16.f32." types                                   \
               " {%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15}, {%16, %17, %18, %19}, %20, p, 1, 1, 0; }"          \
               : QDYLORA_EIGHT_SUMS(0), QDYLORA_EIGHT_SUMS(8)                                                                               \
               : QDYLORA_OPERANDS)

/// d [64, n] = a [64, 16] . b [n, 16]^T, or += it, T = bfloat16 or half, wgmma.m64nNk16. Warp w of the group has rows 16w ... 16w + 15 of a
/// and d, which lie in its lanes as those of multiply_add do: tile i of eight columns is d[4i] ... d[4i + 3]. b: columns 16 step and on of n
/// rows. Until it has been waited for, d and a belong to the product.
template <class T, bool accumulate, int sums>
__device__ __forceinline__ void multiply_async(float (&d)[sums], const Words<4>& a, const ProductRows& rows, int step) {
  static_assert(std::same_as<T, bfloat16> || std::same_as<T, half>);
  static_assert(sums == 16 || sums == 32);
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  const std::uint64_t b = rows.descriptor(step);
  constexpr bool in_bfloat16 = std::same_as<T, bfloat16>;
  if constexpr (sums == 32 && in_bfloat16) QDYLORA_MULTIPLY_64("bf16.bf16");
  else if constexpr (sums == 32) QDYLORA_MULTIPLY_64("f16.f16");
  else if constexpr (in_bfloat16) QDYLORA_MULTIPLY_32("bf16.bf16");
  else QDYLORA_MULTIPLY_32("f16.f16");
#endif
}

/// Closes a group of the products that have begun.
__device__ __forceinline__ void commit_products() {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
#endif
}

/// Waits until at most the newest `pending` groups are still on their way; d, of an older one, may be read.
template <int pending, int sums>
__device__ __forceinline__ void wait_products(float (&d)[sums]) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(pending) : "memory");
#pragma unroll
  for (int i = 0; i < sums; i += 8) asm volatile("" : QDYLORA_EIGHT_SUMS(i)::"memory");
#endif
}

#undef QDYLORA_MULTIPLY_32
#undef QDYLORA_MULTIPLY_64
#undef QDYLORA_OPERANDS
#undef QDYLORA_EIGHT_SUMS
#undef QDYLORA_FOUR_SUMS

}  // namespace qdylora::device
