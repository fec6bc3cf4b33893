// Compiled by NVRTC: kernels of each header that has some.
#include <qdylora/cuda/adamw8.cuh>
#include <qdylora/cuda/attention_decode.cuh>
#include <qdylora/cuda/augmented_slabs.cuh>
#include <qdylora/cuda/binary_codes.cuh>
#include <qdylora/cuda/cross_entropy.cuh>
#include <qdylora/cuda/few_tokens.cuh>
#include <qdylora/cuda/layer_norm.cuh>
#include <qdylora/cuda/magnitude.cuh>
#include <qdylora/cuda/quantize.cuh>
#include <qdylora/cuda/rows.cuh>
#include <qdylora/cuda/transformer.cuh>
#include <qdylora/cuda/warpgroup_tiles.cuh>

namespace qd = qdylora;
namespace device = qd::device;

#define QDYLORA_KERNEL(...) template __global__ void device::run(const __grid_constant__ device::__VA_ARGS__)
QDYLORA_KERNEL(AdamW8Rows);
QDYLORA_KERNEL(AddSumsOfSigns<float>);
QDYLORA_KERNEL(Attention<device::AttentionTiles<qd::half, 64, 4, 64>>);
QDYLORA_KERNEL(AttentionBackwardQ<device::AttentionTiles<qd::half, 64, 4, 32>>);
QDYLORA_KERNEL(AttentionBackwardKV<device::AttentionTiles<qd::half, 64, 4, 32>>);
QDYLORA_KERNEL(CodedTiles<qd::NF4, qd::DoubleQuant<>, qd::half, qd::half, 4>);
QDYLORA_KERNEL(CrossEntropy<float>);
QDYLORA_KERNEL(DequantizeWords<qd::NF4, qd::DoubleQuant<>, qd::bfloat16>);
QDYLORA_KERNEL(ForEach<device::AdamWRows<float>>);
QDYLORA_KERNEL(ForEach<device::ByNeighbours<device::AddRuns<qd::bfloat16>, 4>>);
QDYLORA_KERNEL(ForEach<device::ByNeighbours<device::AppendColumns<qd::bfloat16>, 8>>);
QDYLORA_KERNEL(ForEach<device::ColumnSums<float, float, qd::bfloat16>>);
QDYLORA_KERNEL(ForEach<device::DequantizeElement<qd::FP8E4M3, qd::Float32Scales, float>>);
QDYLORA_KERNEL(ForEach<device::ByNeighbours<device::DecodePlanes<float, qd::bfloat16>, 8>>);
QDYLORA_KERNEL(ForEach<device::ByNeighbours<device::Dropout<qd::bfloat16>, 8>>);
QDYLORA_KERNEL(ForEach<device::ByNeighbours<device::Gelu<qd::bfloat16>, 8>>);
QDYLORA_KERNEL(ForEach<device::MagnitudeFactors<float>>);
QDYLORA_KERNEL(ForEach<device::ByNeighbours<device::Rope<qd::bfloat16>, 8>>);
QDYLORA_KERNEL(ForEach<device::Transpose<qd::half, 8>>);
QDYLORA_KERNEL(LayerNorm<qd::bfloat16, true>);
QDYLORA_KERNEL(QuantizeBlocks<qd::NF4, qd::half>);
QDYLORA_KERNEL(RmsNorm<qd::bfloat16, true>);
QDYLORA_KERNEL(RowDots<qd::bfloat16, float, float, 8, 4, 1>);
QDYLORA_KERNEL(RowSquares<qd::QuantizedView<qd::NF4, qd::DoubleQuant<>>, float>);
QDYLORA_KERNEL(SmallBatch<qd::NF4, qd::DoubleQuant<>, qd::half, qd::half, 2>);
QDYLORA_KERNEL(SumSquares<float>);
QDYLORA_KERNEL(WarpgroupTiles<qd::NF4, qd::DoubleQuant<>, qd::bfloat16, float, 16>);
QDYLORA_KERNEL(WriteList<float>);
