// How products of warpgroups want the rows of their right operand in shared memory: the same on a device and on the emulator, which reads them
// by PTX's definition.
#pragma once

#include <qdylora/cuda/device.cuh>

namespace qdylora::device {

/// Eight rows of 128 bytes in shared memory as the products read them: piece p of row i, 16 bytes, lies at p ^ i (PTX: 128-byte swizzle).
struct alignas(1024) SwizzledRows {
  Words<4> piece[64];
};
/// Where piece p of row i is in a tile of SwizzledRows, in pieces.
constexpr int swizzled_piece(int i, int p) { return 8 * i + (p ^ i % 8); }

}  // namespace qdylora::device
