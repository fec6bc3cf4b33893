// The kernels whose results are the host's to the bit; rounding.cmake looks at what they were compiled to.
#include <qdylora/cuda/dequantize.cuh>
#include <qdylora/cuda/quantize.cuh>

namespace qd = qdylora;
namespace device = qd::device;

template <class Format, class Scales>
void launch_all() {
  device::launch({}, device::QuantizeBlocks<Format, float>{});
  device::launch({}, device::QuantizeBlocks<Format, qd::bfloat16>{});
  device::launch({}, device::ForEach<device::DequantizeElement<Format, Scales, float>>{});
  if constexpr (Format::bits == 4) device::launch({}, device::DequantizeWords<Format, Scales, qd::bfloat16>{});
}
template void launch_all<qd::NF4, qd::DoubleQuant<>>();
template void launch_all<qd::FP4, qd::Float32Scales>();
template void launch_all<qd::INT4, qd::DoubleQuant<qd::FP8E4M3>>();
template void launch_all<qd::INT8, qd::Float32Scales>();
template void launch_all<qd::FP8E4M3, qd::DoubleQuant<>>();
template void launch_all<qd::FP8E5M2, qd::Float32Scales>();
template void launch_all<qd::DynamicMap8, qd::Float32Scales>();
