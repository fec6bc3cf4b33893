// Bits, and arithmetic whose rounding is part of a promise, as the hardware has them. tests/support/cuda_emulator has a header of the same name.
#pragma once

#include <concepts>
#include <cstdint>

#include <qdylora/core/scalar.hpp>

namespace qdylora::device {

// ---- bits ------------------------------------------------------------------------------------------------------------------------

/// Byte i of a word, counted from the lowest.
__device__ __forceinline__ unsigned byte_of(std::uint32_t word, int i) { return __byte_perm(word, 0, 0x4440 + static_cast<unsigned>(i)); }
/// Byte i of the result is that of eight, four of `first` and four of `second`, which digit i of `which` names, from the lowest on.
__device__ __forceinline__ std::uint32_t select_bytes(std::uint32_t first, std::uint32_t second, unsigned which) {
  return __byte_perm(first, second, which);
}

// ---- arithmetic that is rounded as written, never fused into a multiply-add. nvcc's -use_fast_math takes subnormal numbers for zero even so,
// and has no macro by which it could be refused: what is promised to the bit is not promised then. ------------------------------------------

__device__ __forceinline__ float multiply(float a, float b) { return __fmul_rn(a, b); }
__device__ __forceinline__ double multiply(double a, double b) { return __dmul_rn(a, b); }
__device__ __forceinline__ float add(float a, float b) { return __fadd_rn(a, b); }
__device__ __forceinline__ float divide(float a, float b) { return __fdiv_rn(a, b); }

/// 2^x, to two units in the last place; a float result below the smallest normal number is zero.
__device__ __forceinline__ float exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ double exp2(double x) { return ::exp2(x); }

/// An activation as what sums are kept in, and back, rounded to nearest even.
template <Scalar T>
__device__ __forceinline__ Accumulator<T> widen(T value) {
  if constexpr (std::same_as<T, half>) {
    float wide;
    asm("cvt.f32.f16 %0, %1;" : "=f"(wide) : "h"(value.bits));
    return wide;
  } else {
    return static_cast<Accumulator<T>>(value);
  }
}
template <Scalar T>
__device__ __forceinline__ T narrow(Accumulator<T> value) {
  if constexpr (std::same_as<T, half>) {
    half rounded;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
    return rounded;
  } else {
#if __CUDA_ARCH__ >= 800
    if constexpr (std::same_as<T, bfloat16>) {
      bfloat16 rounded;
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(rounded.bits) : "f"(value));
      return rounded;
    }
#endif
    return static_cast<T>(value);
  }
}

/// Two floats rounded to T, the first in the low half.
template <class T>
__device__ __forceinline__ std::uint32_t pack(float first, float second) {
#if __CUDA_ARCH__ >= 800
  std::uint32_t word;
  if constexpr (std::same_as<T, bfloat16>) asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  else asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
  return word;
#else
  return T(first).bits | static_cast<std::uint32_t>(T(second).bits) << 16;
#endif
}

}  // namespace qdylora::device
