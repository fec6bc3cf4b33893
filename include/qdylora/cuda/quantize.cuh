// Quantization on the device: codes and scales equal to qdylora::quantize's to the bit.
#pragma once

#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include <qdylora/cuda/context.cuh>
#include <qdylora/cuda/tables.cuh>
#include <qdylora/quant/quantize.hpp>

namespace qdylora {
namespace device {

/// Codes and absmax of the blocks of the flattened x. One warp, one block; the arithmetic of detail::encode_block.
template <CodeFormat Format, Scalar T>
struct QuantizeBlocks {
  static constexpr int threads = 128;

  MatrixView<const T> x;
  std::uint8_t* codes;
  float* absmax;
  int block_size;

  __device__ void operator()(SharedMemory) const {
    const Index b = static_cast<Index>(block().x) * (threads / warp_size) + warp();
    const Index begin = b * block_size, rest = x.size() - begin;
    if (rest <= 0) return;
    const Index first_row = begin / x.cols, first_col = begin - first_row * x.cols;
    const bool partial = rest < block_size;
    const int count = partial ? static_cast<int>(rest) : block_size;

    unsigned largest = 0;  // as an unsigned integer, |x| orders like a float, and NaN is above infinity
    for (int i = lane(); i < count; i += warp_size) {
      const unsigned magnitude = std::bit_cast<unsigned>(element(first_row, first_col + i)) & 0x7FFFFFFFu;
      largest = magnitude > largest ? magnitude : largest;
    }
    const float most = std::bit_cast<float>(reduce_max(largest));
    const float divisor = most < detail::smallest_divisor ? detail::smallest_divisor : most;
    const float reciprocal = divide(1.0f, divisor);
    const auto code = [&](int i) {
      const float value = element(first_row, first_col + i);
      float v = partial ? divide(value, divisor) : multiply(value, reciprocal);
      v = v > 1.0f ? 1.0f : v;
      v = v < -1.0f ? -1.0f : v;
      return encode<Format>(v);
    };
    if constexpr (Format::bits == 8) {
      for (int i = lane(); i < count; i += warp_size) store(codes + begin + i, code(i));
    } else {
      for (int i = 2 * lane(); i < count; i += 2 * warp_size) {
        const unsigned second = i + 1 < count ? code(i + 1) : encode<Format>(0.0f);
        store(codes + (begin + i) / 2, static_cast<std::uint8_t>(static_cast<unsigned>(code(i)) << 4 | second));
      }
    }
    if (lane() == 0) store(absmax + b, partial ? divisor : most);
  }

 private:
  // Element `col` counted from the beginning of a row; a block may run over its end, or over many of short rows.
  __device__ float element(Index row, Index col) const {
    if (col >= x.cols) {
      const Index more = x.cols >= block_size ? 1 : static_cast<unsigned>(col) / static_cast<unsigned>(x.cols);
      row += more;
      col -= more * x.cols;
    }
    return static_cast<float>(load(x.row(row) + col));
  }
};

}  // namespace device

#if !defined(QDYLORA_DEVICE_ONLY)
namespace detail {

/// A copy, whose source lives until it is done.
template <class T>
Buffer<T, DeviceMemory> on_device(const CudaContext& context, const Buffer<T>& source) {
  Buffer<T, DeviceMemory> target(source.size(), context.memory());
  copy_to_device(context, source.data(), target.data(), source.size());
  return target;
}
template <class Scales>
typename Scales::template Storage<DeviceMemory> on_device(const CudaContext& context,
                                                          const typename Scales::template Storage<HostMemory>& scales) {
  if constexpr (Scales::nested) return {on_device(context, scales.codes), on_device(context, scales.nested_absmax), scales.offset};
  else return {on_device(context, scales.absmax)};
}

/// Throws Errc::non_finite, naming the first such element from `begin` on; there is one.
template <class T>
[[noreturn]] void raise_first_non_finite(const CudaContext& context, MatrixView<const T> x, Index begin) {
  for (Index flat = begin;; ++flat) {
    T value;
    copy_to_host(context, x.row(flat / x.cols) + flat % x.cols, &value, 1);
    if (!(std::fabs(static_cast<float>(value)) <= std::numeric_limits<float>::max()))
      raise_non_finite(flat / x.cols, flat % x.cols);
  }
}

/// The device encodes the weights. The host looks through the absmax of all blocks and makes their stored form: the offset of double
/// quantization is a number of the host's, and a sum in the host's order. So it waits.
template <CodeFormat Format, class Scales, Scalar T>
QuantizedTensor<Format, Scales, DeviceMemory> quantize(const CudaContext& context, MatrixView<const T> x, QuantizeOptions options) {
  expect_block_size(options.block_size);
  using Kernel = device::QuantizeBlocks<Format, T>;
  constexpr Index blocks_at_once = Kernel::threads / device::warp_size;
  const Index blocks = div_up(x.size(), options.block_size);
  Buffer<std::uint8_t, DeviceMemory> codes(code_bytes<Format>(x.size()), context.memory());
  Buffer<float, DeviceMemory> absmax(blocks, context.memory());
  device::launch({context.stream(), static_cast<unsigned>(div_up(blocks, blocks_at_once))},
                 Kernel{x, codes.data(), absmax.data(), static_cast<int>(options.block_size)});
  std::vector<float> seen(static_cast<std::size_t>(blocks));
  copy_to_host(context, std::as_const(absmax).data(), seen.data(), blocks);
  if (options.non_finite == NonFinite::reject)
    for (Index b = 0; b < blocks; ++b)
      if (!(seen[static_cast<std::size_t>(b)] <= std::numeric_limits<float>::max()))
        raise_first_non_finite(context, x, b * options.block_size);
  const auto scales = make_scales<Scales>(seen, [](Index count, const auto& f) {
    if (count < 16) SerialFor{}(count, f);  // less than a thread's start takes
    else host_loop(count, f);
  });
  QuantizedTensor<Format, Scales, DeviceMemory> result(x.rows, x.cols, options.block_size, std::move(codes),
                                                       on_device<Scales>(context, scales));
  context.synchronize();  // the host's scales are given back
  return result;
}

}  // namespace detail
#endif
}  // namespace qdylora
