// bitsandbytes' kernels through the C functions of its shared library, without Python or PyTorch around them. Declarations follow the
// argument lists that its own Python passes (bitsandbytes 0.50, backends/cuda/ops.py).
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <cstdint>
#include <string>

#include <qdylora/core/error.hpp>

namespace bench {

class Bitsandbytes {
 public:
  /// Throws Errc::open where the library, or a function of it, is not to be had.
  explicit Bitsandbytes(const std::string& file) : library_(dlopen(file.c_str(), RTLD_NOW | RTLD_LOCAL)) {
    if (library_ == nullptr) throw qdylora::Error(qdylora::Errc::open, dlerror(), {.file = file});
    gemm_ = find<Gemm>(file, "cgemm_4bit_bf16");
    dequantize_ = find<Dequantize>(file, "cdequantize_blockwise_bf16_nf4");
    dequantize_scales_ = find<Dequantize>(file, "cdequantize_blockwise_fp32");
  }

  /// out [m, n] = a [m, k] . b [n, k]^T, all bfloat16 but b: codes, and the scales of double quantization.
  void gemm(const void* a, const std::uint8_t* b, const float* nested_absmax, const std::uint8_t* scale_codes, const float* map,
            const float* offset, void* out, int m, int n, int k, cudaStream_t stream) const {
    constexpr int nf4 = 2, block = 64;
    gemm_(a, b, nested_absmax, scale_codes, map, offset, out, nullptr, m, n, k, block, nf4, stream);
  }
  /// out [count] bfloat16 from NF4 codes and a float scale for each 64.
  void dequantize(const std::uint8_t* codes, const float* absmax, void* out, int count, cudaStream_t stream) const {
    dequantize_(nullptr, codes, absmax, out, 64, count, stream);
  }
  /// The scales before their offset is added.
  void dequantize_scales(const float* map, const std::uint8_t* scale_codes, const float* nested_absmax, float* out, int count,
                         cudaStream_t stream) const {
    dequantize_scales_(map, scale_codes, nested_absmax, out, 256, count, stream);
  }

 private:
  using Gemm = void (*)(const void*, const void*, const void*, const void*, const void*, const void*, void*, const void*, std::int32_t,
                        std::int32_t, std::int32_t, std::int32_t, std::int32_t, cudaStream_t);
  using Dequantize = void (*)(const void*, const void*, const void*, void*, std::int32_t, std::int32_t, cudaStream_t);

  template <class F>
  F find(const std::string& file, const char* name) const {
    void* const symbol = dlsym(library_, name);
    if (symbol == nullptr) throw qdylora::Error(qdylora::Errc::open, std::string("has no function ") + name, {.file = file});
    return reinterpret_cast<F>(symbol);
  }

  void* library_;  // until the process ends: its kernels are registered with the driver
  Gemm gemm_;
  Dequantize dequantize_, dequantize_scales_;
};

}  // namespace bench
