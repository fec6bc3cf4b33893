// The kernels whose main loops sass.cmake counts, and whose stores it looks at.
#include <qdylora/cuda/dequantize.cuh>
#include <qdylora/cuda/warpgroup_tiles.cuh>

namespace qd = qdylora;
namespace device = qd::device;

template <int token_tiles>
using FewTokens = device::SmallBatch<qd::NF4, qd::DoubleQuant<>, qd::bfloat16, qd::bfloat16, token_tiles>;
template void device::launch(const device::Launch&, const FewTokens<1>&);
template void device::launch(const device::Launch&, const FewTokens<2>&);
template void device::launch(const device::Launch&, const FewTokens<4>&);

template <int token_tiles>
using ManyTokens = device::CodedTiles<qd::NF4, qd::DoubleQuant<>, qd::bfloat16, qd::bfloat16, token_tiles>;
template void device::launch(const device::Launch&, const ManyTokens<4>&);
template void device::launch(const device::Launch&, const ManyTokens<8>&);

template <int token_tiles>
using Warpgroups = device::WarpgroupTiles<qd::NF4, qd::DoubleQuant<>, qd::bfloat16, qd::bfloat16, token_tiles>;
template void device::launch(const device::Launch&, const Warpgroups<8>&);
template void device::launch(const device::Launch&, const Warpgroups<16>&);

template void device::launch(const device::Launch&, const device::DequantizeWords<qd::NF4, qd::DoubleQuant<>, qd::bfloat16>&);
template void device::launch(const device::Launch&, const device::DequantizeWords<qd::INT8, qd::Float32Scales, qd::half>&);
