// Which kernel makes a product with a quantized weight. Host code alone: a plan can be asked for, and tested, without a device.
//
//   small_batch   decodes into tensor cores, each block 16 rows of the weight: memory-bound, though it reads x once for every 16 rows
//   tiles         decodes into tensor cores, each block 128 rows of the weight and a tile of tokens, which lies in shared memory
//   warpgroup_tiles  the same by the products of Hopper's warpgroups, where kernels were compiled for sm_90a and rows are multiples of 256
//   slabs         decodes a slab into the workspace and leaves the product to cuBLASLt: any types, any shape, and the best there is where
//                 the product outweighs the decoding
//
// The most tokens that each takes, by compute capability, where the codes have 4 bits, activations 16, and rows are whole chunks of 64:
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
// On 9.0 warpgroup_tiles should be ahead of tiles from 33 tokens on and of slabs up to some hundreds, perhaps 1024: at best 85 % of what tensor
// cores do, by what shared memory moves, where tiles do 50 %. It takes products only where ProductLimits asks for it, until it has been run
// on a device.
//
// An adapter's term comes with small_batch, and with slabs where y is at least twice as wide as x: u is appended to a copy of x and B to each
// slab (K-augmentation). The copy takes 4 bytes for each of tokens x columns of x, adding to y afterwards 4 for each of tokens x columns of y.
//
// The numbers come from instruction counts and data sheets, not from measurements. ProductLimits overrides them.
//
// How many lines a slab has (rows of w forward, columns backward, K numbers each), for a product with x [T, K]. By what others measured of
// an H100 (an H200), 790 (770) TFLOP/s in bfloat16 and 3.0 (4.3) TB/s, it is at least:
//
//   x is read again for each slab, 2 T K bytes beside 2 T K lines operations: hidden from 263 (179) lines on
//   a wave of tiles of 128 x 256 is full: T / 128 x lines / 256 of 132 processors, at T = 4096 with 1024 lines 128 of them
//
// and, so that two of them stay in half of the L2 cache, 12.5 MB each of 50, at most 762 lines of K = 8192, or 190 of K = 32768. Out of the
// cache a slab's 2 bytes a weight are written and read, 1.3 ps beside 2 T / 790e12 = 10 ps of arithmetic at T = 4096. So 1024 lines it has,
// in the cache or not, where the workspace takes two. Falcon-40b's 4h -> h [8192, 32768] at T = 4096 is 2.8 ms of arithmetic: 64 products
// of 128 lines, 32 tiles each, read x 64 times, 17 GB in 5.7 ms; 8 products of 1024 lines read it 8 times, in 0.7 ms.
#pragma once

#include <algorithm>

#include <qdylora/core/scalar.hpp>

namespace qdylora {

enum class ProductKernel { small_batch, tiles, warpgroup_tiles, slabs };

/// What a choice depends on.
struct ProductProblem {
  Index tokens = 0, out = 0, in = 0;
  bool fused_types = false;   // 4-bit codes, bfloat16 or half activations
  bool whole_chunks = false;  // `in` and the block size are multiples of 64, and codes are aligned
};

struct ProductDevice {
  int compute_capability = 90;  // 10 * major + minor
  int processors = 132;
  bool sm90a = false;  // kernels for sm_90a, and a device of compute capability 9.0
};

/// The most tokens that a kernel is given, for small_batch 32 at most; -1: what the table has. warpgroup_tiles is there where
/// CudaContext::sm90a(): of kernels compiled for 90a (CMAKE_CUDA_ARCHITECTURES=90a-real), which CMake's `native` is not.
struct ProductLimits {
  Index small_batch = -1;
  Index tiles = -1;
  Index warpgroup_tiles = -1;
  Index augmented = -1;  // how many columns y has for each of x's, at least, where slabs take an adapter's term along; 0: nowhere; -1: 2
};

/// Whether a product by slabs takes an adapter's term along.
constexpr bool augments(Index x_cols, Index y_cols, ProductLimits limits = {}) noexcept {
  const Index ratio = limits.augmented < 0 ? 2 : limits.augmented;
  return ratio > 0 && y_cols >= ratio * x_cols;
}

constexpr ProductLimits default_limits(int compute_capability) noexcept {
  if (compute_capability < 80) return {0, 0, 0};
  if (compute_capability == 80 || compute_capability == 90) return {32, 256, 0};
  if (compute_capability < 90 || compute_capability >= 120) return {32, 512, 0};
  return {32, 64, 0};
}

constexpr ProductKernel choose_product(const ProductProblem& problem, const ProductDevice& device, ProductLimits limits = {}) noexcept {
  const ProductLimits table = default_limits(device.compute_capability);
  if (limits.small_batch < 0) limits.small_batch = table.small_batch;
  if (limits.tiles < 0) limits.tiles = table.tiles;
  if (limits.warpgroup_tiles < 0) limits.warpgroup_tiles = table.warpgroup_tiles;
  if (!problem.fused_types || !problem.whole_chunks || device.compute_capability < 80) return ProductKernel::slabs;
  constexpr Index most_rows = 128 * Index{65535};  // of a grid
  const Index by_warpgroups = device.sm90a && problem.in % 256 == 0 && problem.out <= most_rows ? limits.warpgroup_tiles : 0;
  if (problem.tokens > 32 && problem.tokens <= by_warpgroups) return ProductKernel::warpgroup_tiles;
  const bool fits_tiles = problem.tokens <= limits.tiles && problem.out <= most_rows;
  if (fits_tiles && problem.tokens > 16 && detail::div_up(problem.out, 128) >= device.processors / 2) return ProductKernel::tiles;
  if (problem.tokens <= std::min<Index>(limits.small_batch, 32)) return ProductKernel::small_batch;
  return fits_tiles ? ProductKernel::tiles : ProductKernel::slabs;
}

/// Ranges of columns, `most` at most, in which to make so many tiles of outputs: more of them fill a round of blocks, but each is
/// written in float32 and read again. By an H100's numbers that takes as long as 512 columns of a tile do where all blocks are busy, and the
/// launch that adds the parts as 300. Fewer where more are not ahead by a sixteenth.
constexpr Index parts_of_tiles(Index tiles, Index blocks_at_once, Index columns, Index most) noexcept {
  Index best = 1, best_cost = 0;
  for (Index parts = 1; parts <= std::max<Index>(most, 1); ++parts) {
    const Index rounds = detail::div_up(tiles * parts, blocks_at_once);
    const Index cost = rounds * columns / parts + (parts > 1 ? 512 * parts * tiles / blocks_at_once + 300 : 0);
    if (parts > 1 && 16 * cost > 15 * best_cost) continue;
    best = parts;
    best_cost = cost;
  }
  return best;
}

inline constexpr Index least_slab_lines = 1024;

/// Lines of a slab whose product with so many tokens gives each processor a tile of 128 tokens by 256 lines, such as cuBLASLt's.
constexpr Index filling_lines(Index tokens, Index processors) noexcept {
  const Index rows = std::max<Index>(detail::div_up(tokens, 128), 1);
  return 256 * std::max<Index>(processors / rows, 1);
}
/// Of `most` lines the number whose tiles leave fewest processors without one in their last round; the larger one where two are within 2 %.
constexpr Index lines_of_full_rounds(Index tokens, Index processors, Index most) noexcept {
  const Index rows = std::max<Index>(detail::div_up(tokens, 128), 1);
  Index best = most, best_percent = 0;
  for (Index columns = most / 256; columns > 0; --columns) {
    const Index tiles = rows * columns, rounds = detail::div_up(tiles, processors), percent = 100 * tiles / (rounds * processors);
    if (percent <= best_percent + 2) continue;
    best = 256 * columns;
    best_percent = percent;
  }
  return best;
}

/// Lines in each of so many slabs at once, at most: what of them cache_bytes hold, and at least least_lines as far as memory_bytes go.
constexpr Index slab_lines(Index line_bytes, Index slabs, Index cache_bytes, Index least_lines, Index memory_bytes) noexcept {
  const Index bytes = slabs * std::max<Index>(line_bytes, 1);
  return std::max(cache_bytes / bytes, std::min(least_lines, memory_bytes / bytes));
}

}  // namespace qdylora
