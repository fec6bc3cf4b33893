// The one place that names compilers. Every macro of the library starts with QDYLORA_.
#pragma once

#if !defined(__cplusplus) || __cplusplus < 202002L
#error "qdylora needs a C++20 compiler: pass -std=c++20 or link the CMake target qdylora::qdylora"
#endif

// Weights, gradients and scales are asked whether they are finite, which -ffast-math answers beforehand.
#if defined(__FAST_MATH__) && !defined(QDYLORA_ALLOW_FAST_MATH)
#error "qdylora looks for NaN and infinity, which -ffast-math takes for absent: compile files that include it without, or define QDYLORA_ALLOW_FAST_MATH"
#endif

// Callable on host and device: expands to nothing unless the CUDA compiler reads the header.
#if defined(__CUDACC__)
#define QDYLORA_HD __host__ __device__
#else
#define QDYLORA_HD
#endif

// NVRTC compiles for the device alone: nothing is launched from what it reads, and nothing thrown.
#if defined(__CUDACC_RTC__)
#define QDYLORA_DEVICE_ONLY
#endif

// Pointers that do not alias, so that loops over them vectorize.
#if defined(__GNUC__) || defined(__clang__) || defined(_MSC_VER)
#define QDYLORA_RESTRICT __restrict
#else
#define QDYLORA_RESTRICT
#endif
