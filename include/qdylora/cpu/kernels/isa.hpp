// Instruction sets of the CPU kernels. Kernels are compiled once per set inside a target region, each in a namespace of its own, and
// chosen at run time: a generic -O2 build runs at full speed, and a test can force any set the machine has.
#pragma once

#include <string_view>

namespace qdylora {

enum class Isa {
  generic,  // whatever the compiler targets by default
  avx2,     // AVX2 + FMA
  avx512,   // AVX-512 F, BW, DQ, VL
};

constexpr std::string_view name(Isa isa) noexcept {
  switch (isa) {
    case Isa::generic: return "generic";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
  }
  return "unknown";
}

/// Whether this machine (and its operating system) runs the set.
inline bool supported(Isa isa) noexcept {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
  switch (isa) {
    case Isa::generic: return true;
    case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
             __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("fma");
  }
  return false;
#else
  return isa == Isa::generic;
#endif
}

inline Isa best_isa() noexcept {
  if (supported(Isa::avx512)) return Isa::avx512;
  if (supported(Isa::avx2)) return Isa::avx2;
  return Isa::generic;
}

}  // namespace qdylora

// A target region: every function between BEGIN and END is compiled for the set.
#if defined(__x86_64__) && defined(__clang__)
#define QDYLORA_TARGET_PRAGMA(text) _Pragma(#text)
#define QDYLORA_TARGET_BEGIN(set) QDYLORA_TARGET_PRAGMA(clang attribute push(__attribute__((target(set))), apply_to = function))
#define QDYLORA_TARGET_END _Pragma("clang attribute pop")
#define QDYLORA_X86_TARGETS 1
#elif defined(__x86_64__) && defined(__GNUC__)
#define QDYLORA_TARGET_PRAGMA(text) _Pragma(#text)
#define QDYLORA_TARGET_BEGIN(set) _Pragma("GCC push_options") QDYLORA_TARGET_PRAGMA(GCC target(set))
#define QDYLORA_TARGET_END _Pragma("GCC pop_options")
#define QDYLORA_X86_TARGETS 1
#endif
