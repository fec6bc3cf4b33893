// Instruction sets of the CPU kernels. Kernels are compiled once per set inside a target region, each in a namespace of its own, and
// chosen at run time: a generic -O2 build runs at full speed, and a test can force any set the machine has.
#pragma once

#include <array>
#include <string_view>

#if defined(__x86_64__) && defined(__linux__) && (defined(__GNUC__) || defined(__clang__))
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace qdylora {

enum class Isa {
  generic,      // whatever the compiler targets by default
  avx2,         // AVX2 + FMA
  avx512,       // AVX-512 F, BW, DQ, VL (Skylake-X)
  avx512_vnni,  // + VBMI, VNNI (Ice Lake): byte look-ups, sums of 8- and 16-bit products
  avx512_bf16,  // + BF16 (Sapphire Rapids, Zen 4)
  amx,          // + AMX-TILE, AMX-BF16 (Sapphire Rapids, on Linux): products of matrix tiles
};

inline constexpr std::array all_isas = {Isa::generic, Isa::avx2, Isa::avx512, Isa::avx512_vnni, Isa::avx512_bf16, Isa::amx};

constexpr std::string_view name(Isa isa) noexcept {
  switch (isa) {
    case Isa::generic: return "generic";
    case Isa::avx2: return "avx2";
    case Isa::avx512: return "avx512";
    case Isa::avx512_vnni: return "avx512_vnni";
    case Isa::avx512_bf16: return "avx512_bf16";
    case Isa::amx: return "amx";
  }
  return "unknown";
}

namespace detail {

/// Whether the processor has matrix tiles and the system lets this process use them, for which Linux is asked once.
inline bool tiles_supported() noexcept {
#if defined(__x86_64__) && defined(__linux__) && (defined(__GNUC__) || defined(__clang__))
  static const bool granted = [] {
    constexpr unsigned tile = 1u << 24, bf16 = 1u << 22, all = tile | bf16;
    constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & all) == all && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
  }();
  return granted;
#else
  return false;
#endif
}

}  // namespace detail

/// Whether this machine (and its operating system) runs the set. Each contains the ones before it. With Isa::amx, where the processor has it, this
/// asks Linux for its tiles, for the whole process and for good (ARCH_REQ_XCOMP_PERM): a signal handler's alternate stack needs 8 KiB more from
/// then on.
inline bool supported(Isa isa) noexcept {
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__)) && !defined(__CUDACC__)
  switch (isa) {
    case Isa::generic: return true;
    case Isa::avx2: return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    case Isa::avx512:
      return supported(Isa::avx2) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    case Isa::avx512_vnni:
      return supported(Isa::avx512) && __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("avx512vnni");
    case Isa::avx512_bf16: return supported(Isa::avx512_vnni) && __builtin_cpu_supports("avx512bf16");
    case Isa::amx: return supported(Isa::avx512_bf16) && detail::tiles_supported();
  }
  return false;
#else
  return isa == Isa::generic;
#endif
}

/// The quickest set of this machine, which asks for tiles as supported() does. Intel's cores (measured: Emerald Rapids) take a product of bfloat16
/// vectors in four times the time of one of 16-bit integers, so where one of them has no tiles it is avx512_vnni.
inline Isa best_isa() noexcept {
  static const Isa best = [] {
    Isa found = Isa::generic;
    for (const Isa isa : all_isas)
      if (supported(isa)) found = isa;
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__)) && !defined(__CUDACC__)
    if (found == Isa::avx512_bf16 && __builtin_cpu_is("intel")) found = Isa::avx512_vnni;
#endif
    return found;
  }();
  return best;
}

}  // namespace qdylora

// A target region: every function between BEGIN and END is compiled for the set. nvcc cannot read one: in .cu files the CPU backend has the
// generic set alone, which is enough to compare with. A program that uses it in .cpp files keeps it out of its .cu files.
#if defined(__CUDACC__)
#elif defined(__x86_64__) && defined(__clang__)
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

#if defined(QDYLORA_X86_TARGETS)
// g++ 12 takes the undefined operands inside its own AVX-512 headers for uninitialized variables.
#pragma GCC diagnostic push
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#pragma GCC diagnostic ignored "-Wuninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#define QDYLORA_AVX2 "avx2,fma"
#define QDYLORA_AVX512 "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl"
#define QDYLORA_AVX512_VNNI "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni"
#define QDYLORA_AVX512_BF16 "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512bf16"
#define QDYLORA_AMX "avx2,fma,avx512f,avx512bw,avx512dq,avx512vl,avx512vbmi,avx512vnni,avx512bf16,amx-tile,amx-bf16"
#endif
