// Planes of signs (quant/binary_code.hpp) on the device: their decoding into slabs, which are multiplied as those of other codes are, and the
// sums that train their scales.
#pragma once

#include <cstdint>
#include <limits>

#include <qdylora/backend.hpp>
#include <qdylora/cuda/reduce.cuh>

namespace qdylora {
namespace device {

/// y[i, j] = w[first_row + i, first_col + j], plane after plane, as the host sums them. 8 neighbours are a byte of each plane.
template <class S, class C>
struct DecodePlanes {
  BinaryCodedView<S> w;
  MatrixView<C> y;
  Index first_row, first_col, row_bytes, groups;
  unsigned columns_of_group;

  template <int width>
  __device__ void neighbours(Index i, Index j) const {
    static_assert(width == 8 || width == 1);
    const Index col = first_col + j;
    const Index group = static_cast<unsigned>(col) / columns_of_group;
    S sums[width] = {};
    for (Index k = 0; k < w.planes; ++k) {
      const Index line = k * w.rows + first_row + i;
      const unsigned signs = static_cast<unsigned>(load(w.bits + line * row_bytes + (col >> 3))) >> (col & 7);
      const S scale = line < w.own.rows ? read(w.own, line, group) : static_cast<S>(load(w.scales + line * groups + group));
#pragma unroll
      for (int n = 0; n < width; ++n) sums[n] += (signs >> n & 1u) != 0 ? scale : -scale;
    }
    constexpr int at_once = width == 1 ? 1 : 16 / static_cast<int>(sizeof(C));
#pragma unroll
    for (int n = 0; n < width; n += at_once) {
      Neighbours<at_once, C> part;
#pragma unroll
      for (int m = 0; m < at_once; ++m) part.at[m] = static_cast<Accumulator<C>>(sums[n + m]);
      part.store_to(y.row(i) + j + n);
    }
  }
};

/// sums[k * rows of w + first + i, g] += sum over columns j of group g of sign_k[first + i, j] * d[i, j]. A warp has a group of a row, and
/// a lane every 32nd byte of it, of all planes.
template <class S>
struct AddSumsOfSigns {
  static constexpr int threads = 256;
  static constexpr int warps = threads / warp_size;

  BinaryCodedView<S> w;
  MatrixView<const S> d;
  MatrixView<S> sums;
  Index first, row_bytes, groups, columns_of_group;

  __device__ void operator()(SharedMemory) const {
    for (Index at = static_cast<Index>(block().x) * warps + warp(); at < d.rows * groups; at += static_cast<Index>(grid().x) * warps) {
      const Index i = at / groups, group = at - i * groups, begin = group * columns_of_group;
      const Index end = w.cols - begin < columns_of_group ? w.cols : begin + columns_of_group;
      S own[most_planes] = {};
      for (Index j = begin + 8 * lane(); j < end; j += 8 * warp_size) {
        S values[8];
#pragma unroll
        for (int n = 0; n < 8; ++n) values[n] = j + n < end ? read(d, i, j + n) : S{};
#pragma unroll
        for (int k = 0; k < most_planes; ++k) {
          if (k >= w.planes) continue;
          const unsigned signs = load(w.bits + (k * w.rows + first + i) * row_bytes + (j >> 3));
#pragma unroll
          for (int n = 0; n < 8; ++n) own[k] += (signs >> n & 1u) != 0 ? values[n] : -values[n];
        }
      }
#pragma unroll
      for (int k = 0; k < most_planes; ++k) {
        if (k >= w.planes) continue;
        const S sum = sum_warp(own[k]);
        const Index line = k * w.rows + first + i;
        if (lane() == 0) write(sums, line, group, read(sums, line, group) + sum);
      }
    }
  }
};

}  // namespace device

#if !defined(QDYLORA_DEVICE_ONLY)
namespace detail {

/// `slab` = the part of w that begins at (first_row, first_col).
template <class S, class C>
void decode(cudaStream_t stream, const CudaContext& context, const BinaryCodedView<S>& w, MatrixView<C> slab, Index first_row,
            Index first_col) {
  if (slab.empty()) return;
  QDYLORA_EXPECTS(w.cols <= std::numeric_limits<std::int32_t>::max(), unsupported, "planes of signs: more than 2^31 - 1 columns");
  const bool whole = first_col % 8 == 0 && slab.cols % 8 == 0 && has_aligned_rows<16 / static_cast<int>(sizeof(C))>(slab);
  for_each_width_on<8>(stream, context, slab.rows, slab.cols, whole,
                       device::DecodePlanes<S, C>{w, slab, first_row, first_col, w.row_bytes(), w.groups(),
                                                  static_cast<unsigned>(std::min(w.columns_of_group(), w.cols))});
}
template <class S, class C>
void dequantize(const CudaContext& context, const BinaryCodedView<S>& w, MatrixView<C> y) {
  decode(context.stream(), context, w, y, 0, 0);
}

template <class S>
void add_sums_of_signs(const CudaContext& context, MatrixView<const S> d, const BinaryCodedView<S>& w, Index first, MatrixView<S> sums) {
  using Kernel = device::AddSumsOfSigns<S>;
  expect_sums_of_signs(d, w, first, sums);
  if (d.empty()) return;
  const Index groups = w.groups(), most = Index{16} * context.properties().multiProcessorCount;
  const auto blocks = static_cast<unsigned>(std::min(div_up(d.rows * groups, Index{Kernel::warps}), most));
  device::launch({context.stream(), blocks}, Kernel{w, d, sums, first, w.row_bytes(), groups, w.columns_of_group()});
}

}  // namespace detail
#endif
}  // namespace qdylora
