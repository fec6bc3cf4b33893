// Which kernel makes a product with a quantized weight. Host code alone: a plan can be asked for, and tested, without a device.
//
//   small_batch   decodes into tensor cores, each block 16 rows of the weight: memory-bound, though it reads x once for every 16 rows
//   tiles         decodes into tensor cores, each block 128 rows of the weight and a tile of tokens, which lies in shared memory
//   slabs         decodes a slab into the workspace and leaves the product to cuBLASLt: any types, any shape, and the best there is where
//                 the product outweighs the decoding
//
// The most tokens that each takes, by compute capability, where the codes have 4 bits, activations 16, and rows are whole chunks of 64 (for
// tiles, whole groups of 256):
//
//                          small_batch   tiles
//   7.5                              0       0   no mma.m16n8k16 of bfloat16 or half
//   8.0                             32     256
//   8.6  8.7  8.9  12.x             32     512   less memory bandwidth: to decode through memory costs relatively more
//   9.0                             32     256   beyond, wgmma through cuBLASLt is ahead of mma
//   10.x  11.x                      32      64   mma is a fraction of what tcgen05 does
//
// From 17 tokens on, x is more than four times the codes of 16 rows: tiles are ahead of small_batch as soon as there are blocks of 128 rows
// for half of the processors.
//
// The numbers come from instruction counts and data sheets, not from measurements. ProductLimits overrides them.
#pragma once

#include <algorithm>

#include <qdylora/core/scalar.hpp>

namespace qdylora {

enum class ProductKernel { small_batch, tiles, slabs };

/// What a choice depends on.
struct ProductProblem {
  Index tokens = 0, out = 0, in = 0;
  bool fused_types = false;   // 4-bit codes, bfloat16 or half activations
  bool whole_chunks = false;  // `in` and the block size are multiples of 64, and codes are aligned
};

struct ProductDevice {
  int compute_capability = 90;  // 10 * major + minor
  int processors = 132;
};

/// The most tokens that a kernel is given, for small_batch 32 at most; -1: what the table has.
struct ProductLimits {
  Index small_batch = -1;
  Index tiles = -1;
};

constexpr ProductLimits default_limits(int compute_capability) noexcept {
  if (compute_capability < 80) return {0, 0};
  if (compute_capability == 80 || compute_capability == 90) return {32, 256};
  if (compute_capability < 90 || compute_capability >= 120) return {32, 512};
  return {32, 64};
}

constexpr ProductKernel choose_product(const ProductProblem& problem, const ProductDevice& device, ProductLimits limits = {}) noexcept {
  const ProductLimits table = default_limits(device.compute_capability);
  if (limits.small_batch < 0) limits.small_batch = table.small_batch;
  if (limits.tiles < 0) limits.tiles = table.tiles;
  if (!problem.fused_types || !problem.whole_chunks || device.compute_capability < 80) return ProductKernel::slabs;
  const bool fits_tiles = problem.in % 256 == 0 && problem.tokens <= limits.tiles;
  if (fits_tiles && problem.tokens > 16 && (problem.out + 127) / 128 >= device.processors / 2) return ProductKernel::tiles;
  if (problem.tokens <= std::min<Index>(limits.small_batch, 32)) return ProductKernel::small_batch;
  return fits_tiles ? ProductKernel::tiles : ProductKernel::slabs;
}

}  // namespace qdylora
