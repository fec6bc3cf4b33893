// The CUDA backend: <qdylora/qdylora.hpp>'s layers on a GPU, by the template argument Backend = Cuda. Reads no Eigen.
// Compiled for sm_75 ... sm_120 and executed by an emulator on a CPU (tests/support/cuda_emulator); not yet run on a GPU.
#pragma once

#if !defined(__CUDACC__) && !defined(QDYLORA_CUDA_EMULATOR)
#error "<qdylora/cuda.hpp> is for the CUDA compiler: include it in a .cu file that nvcc reads, or leave it out to stay on the CPU"
#endif
#if defined(__CUDACC__) && !defined(__CUDACC_RELAXED_CONSTEXPR__)
#error "qdylora's constexpr functions are called by kernels: pass --expt-relaxed-constexpr to nvcc"
#endif

#include <qdylora/cuda/cuda.cuh>
