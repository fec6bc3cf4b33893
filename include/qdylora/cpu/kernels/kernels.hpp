// The CPU kernels behind one table per scalar and instruction set, float and double.
#pragma once

#include <algorithm>
#include <cmath>
#include <type_traits>

#include <qdylora/core/scalar.hpp>
#include <qdylora/cpu/kernels/isa.hpp>

namespace qdylora::detail {

template <class S>
struct KernelTable {
  /// c[m, n] (+)= sum_k a[m * a_row + k * a_depth] * b[k * b_depth + n]
  void (*gemm)(Index m, Index n, Index depth, const S* a, Index a_row, Index a_depth, const S* b, Index b_depth, S* c, Index c_row,
               bool accumulate);
  S (*dot)(Index count, const S* a, const S* b);
  S (*exp_sum)(Index count, S* x, S scale, S shift);
  void (*sigmoid)(Index count, const S* x, S* y);
};

namespace generic {
#define QDYLORA_VECTOR_BYTES 16
#define QDYLORA_TILE_ROWS 4
#define QDYLORA_TILE_VECTORS 2
#include <qdylora/cpu/kernels/body.inc>
#undef QDYLORA_VECTOR_BYTES
#undef QDYLORA_TILE_ROWS
#undef QDYLORA_TILE_VECTORS
}  // namespace generic

#if defined(QDYLORA_X86_TARGETS)
QDYLORA_TARGET_BEGIN("avx2,fma")
namespace avx2 {
#define QDYLORA_VECTOR_BYTES 32
#define QDYLORA_TILE_ROWS 6
#define QDYLORA_TILE_VECTORS 2
#include <qdylora/cpu/kernels/body.inc>
#undef QDYLORA_VECTOR_BYTES
#undef QDYLORA_TILE_ROWS
#undef QDYLORA_TILE_VECTORS
}  // namespace avx2
QDYLORA_TARGET_END

QDYLORA_TARGET_BEGIN("avx2,fma,avx512f,avx512bw,avx512dq,avx512vl")
namespace avx512 {
#define QDYLORA_VECTOR_BYTES 64
#define QDYLORA_TILE_ROWS 12
#define QDYLORA_TILE_VECTORS 2
#include <qdylora/cpu/kernels/body.inc>
#undef QDYLORA_VECTOR_BYTES
#undef QDYLORA_TILE_ROWS
#undef QDYLORA_TILE_VECTORS
}  // namespace avx512
QDYLORA_TARGET_END
#endif

template <class S>
const KernelTable<S>& kernels(Isa isa) noexcept {
#if defined(QDYLORA_X86_TARGETS)
  if (isa == Isa::avx512) return avx512::table<S>;
  if (isa == Isa::avx2) return avx2::table<S>;
#endif
  static_cast<void>(isa);
  return generic::table<S>;
}

}  // namespace qdylora::detail
