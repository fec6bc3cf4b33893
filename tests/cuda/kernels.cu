// Compiled by nvcc for each architecture, run by nothing: every kernel of the library, and one that uses each primitive of device.cuh.
#include <qdylora/cuda.hpp>

namespace qd = qdylora;
namespace device = qdylora::device;

template <class T>
struct EveryPrimitive {
  static constexpr int threads = 64;
  const T* in;
  float* out;
  unsigned* words;

  __device__ void operator()(device::SharedMemory memory) const {
    using namespace device;
    const auto tile = memory.take<T>(512);
    const auto counts = memory.take<unsigned>(1);
    tile.store(thread(), load(in + thread()));
    if (thread() == 0) counts.store(0, 0u);
    sync_block();
    counts.atomic_add(0, 1u);
    sync_warp();
    unsigned bits = shuffle(1u, 2) + shuffle_up(3u, 1) + shuffle_down(4u, 1) + shuffle_xor(5u, 1, 8) + device::ballot(lane() > 3);
    bits += reduce_add(bits) + reduce_max(bits) + (device::all(bits > 0) ? 1u : 0u) + (device::any(bits > 1) ? 2u : 0u);
    float d[4] = {};
    copy_async<16>(tile.from(8 * thread()), in + 8 * thread());
    copy_async<8>(tile.from(4 * thread()), in + 4 * thread());
    copy_async<16>(tile.from(8 * thread()), in + 8 * thread(), 4);
    commit_copies();
    wait_copies<0>();
    sync_block();
    if constexpr (multiplies<T>)
      multiply_add<T>(d, load_matrices<4>(tile.from(lane() * 8)), load_matrices<2, true>(tile.from(lane() * 8)));
    bits += load_matrices<1>(tile.from(lane() * 8)).word[0] + load_matrices<4, true>(tile.from(lane() * 8)).word[3];
    bits += load_matrices<2>(tile.from(lane() * 8)).word[1] + load_matrices<1, true>(tile.from(lane() * 8)).word[0];
    bits += load_once(words + thread()) + load_once(reinterpret_cast<const Words<2>*>(words)).word[1];
    atomic_add(words, bits + pack<T>(d[0], d[1]));
    atomic_min(words + 1, static_cast<unsigned>(block_threads()) + counts.load(0));
    store(out + thread(), divide(add(multiply(d[2], 2.0f), d[3]), 3.0f) + device::exp2(widen(narrow<T>(d[0]))) + float(warp()));
  }
};

template <class T>
void every_operation(const qd::Cuda& cuda, qd::MatrixView<T> x, qd::MatrixView<qd::Accumulator<T>> a, std::span<const std::int32_t> ids,
                     std::span<const qd::Index> rows) {
  cuda.fill(x, T{});
  cuda.copy(x, a);
  cuda.copy(a, x);
  cuda.add(x, x);
  cuda.add_if_finite(a, a, a, a);
  cuda.add_row(a, x);
  cuda.scale_columns(a, std::span<const qd::Accumulator<T>>(), a);
  cuda.column_products(a, a, a);
  cuda.column_products(x, x, a);
  cuda.scale_columns(x, a, x);
  cuda.row_squares(cuda.quantize<qd::NF4, qd::DoubleQuant<>>(x).view(), a);
  cuda.row_squares(cuda.quantize<qd::FP8E4M3, qd::DoubleQuant<>>(x).view(), a);
  cuda.row_squares(x, a);
  cuda.row_norms(a, a, 2, a);
  cuda.magnitude_factors(a, a, 1, a);
  cuda.add_over_norms(a, a, a);
  cuda.dropout(x, 0.5f, {}, x);
  cuda.adamw(a, a, a, a, {});
  if constexpr (std::is_same_v<decltype(a), qd::MatrixView<float>>) cuda.adamw_paged(a, a, qd::Moments8View{}, {});
  cuda.lion(a, a, a, {});
  cuda.sum_squares(a);
  cuda.rms_norm(x, a, 1e-5f, x, a);
  cuda.rms_norm_backward(x, x, a, a, x);
  cuda.layer_norm(x, a, a, 1e-5f, x, a);
  cuda.layer_norm_backward(x, x, a, a, x);
  cuda.rope(x, ids, a, qd::RopeLayout::half_split, 1);
  cuda.swiglu(x, x, x);
  cuda.swiglu_backward(x, x, x, x, x);
  cuda.gelu(x, x);
  cuda.gelu_backward(x, x, x);
  cuda.embed(ids, a, x);
  cuda.embed(ids, cuda.quantize<qd::INT8, qd::Float32Scales>(x, {.block_size = 32}).view(), x);
  cuda.embed_backward(ids, qd::MatrixView<const T>(x), a);
  cuda.gather_rows(x, rows, x);
  cuda.scatter_rows(x, rows, x);
  cuda.copy_rows(x, std::span<const qd::MatrixView<T>>());
  cuda.cross_entropy(a, ids, 1.0, a);
  cuda.attention(x, x, x, rows, {}, x, a);
  cuda.attention_backward(x, x, x, x, x, a, rows, {}, x, x, x);
  cuda.attention_decode(x, std::span<const qd::MatrixView<const T>>(), std::span<const qd::MatrixView<const T>>(), {}, x);
  cuda.dequantize(qd::BinaryCodedView<qd::Accumulator<T>>(), a);
  cuda.add_sums_of_signs(a, qd::BinaryCodedView<qd::Accumulator<T>>(), 0, a);
  cuda.dequantize(cuda.quantize<qd::NF4, qd::DoubleQuant<>>(x).view(), x);
  cuda.dequantize(cuda.quantize<qd::FP4, qd::Float32Scales>(x).view(), x);
  cuda.dequantize(cuda.quantize<qd::INT4, qd::DoubleQuant<qd::FP8E4M3>>(x).view(), x);
  cuda.dequantize(cuda.quantize<qd::FP8E4M3, qd::DoubleQuant<>>(x).view(), x);
  cuda.dequantize(cuda.quantize<qd::FP8E5M2, qd::Float32Scales>(x).view(), x);
}

template <class T>
void every_product(const qd::Cuda& cuda, qd::MatrixView<T> x, qd::MatrixView<qd::Accumulator<T>> a, qd::MatrixView<qd::bfloat16> bf16,
                   qd::MatrixView<qd::half> fp16) {
  const auto both_ways = [&](const auto& w) {
    cuda.matmul(x, w, x);
    cuda.matmul_transposed(x, w, x);
  };
  both_ways(cuda.quantize<qd::NF4, qd::DoubleQuant<>>(x).view());
  both_ways(cuda.quantize<qd::NF4, qd::Float32Scales>(x).view());
  both_ways(cuda.quantize<qd::FP4, qd::DoubleQuant<>>(x).view());
  both_ways(cuda.quantize<qd::FP8E4M3, qd::DoubleQuant<>>(x).view());
  both_ways(qd::BinaryCodedView<qd::Accumulator<T>>());
  cuda.matmul(x, cuda.quantize<qd::NF4, qd::DoubleQuant<>>(x).view(), a);
  if constexpr (sizeof(T) == 2) {
    cuda.matmul(x, cuda.quantize<qd::NF4, qd::DoubleQuant<>>(x).view(), x, qd::Update::accumulate, {a, x});
    cuda.matmul_transposed(x, cuda.quantize<qd::NF4, qd::DoubleQuant<>>(x).view(), x, qd::Update::accumulate, {a, x});
  }
  both_ways(bf16);
  both_ways(fp16);
  cuda.matmul(x, a, a);
  cuda.matmul_transposed(a, a, x);
  cuda.weight_gradient(a, x, a);
}

template void every_product(const qd::Cuda&, qd::MatrixView<float>, qd::MatrixView<float>, qd::MatrixView<qd::bfloat16>,
                            qd::MatrixView<qd::half>);
template void every_product(const qd::Cuda&, qd::MatrixView<double>, qd::MatrixView<double>, qd::MatrixView<qd::bfloat16>,
                            qd::MatrixView<qd::half>);
template void every_product(const qd::Cuda&, qd::MatrixView<qd::bfloat16>, qd::MatrixView<float>, qd::MatrixView<qd::bfloat16>,
                            qd::MatrixView<qd::half>);
template void every_product(const qd::Cuda&, qd::MatrixView<qd::half>, qd::MatrixView<float>, qd::MatrixView<qd::bfloat16>,
                            qd::MatrixView<qd::half>);
template void every_operation(const qd::Cuda&, qd::MatrixView<float>, qd::MatrixView<float>, std::span<const std::int32_t>,
                              std::span<const qd::Index>);
template void every_operation(const qd::Cuda&, qd::MatrixView<qd::half>, qd::MatrixView<float>, std::span<const std::int32_t>,
                              std::span<const qd::Index>);
template void every_operation(const qd::Cuda&, qd::MatrixView<qd::bfloat16>, qd::MatrixView<float>, std::span<const std::int32_t>,
                              std::span<const qd::Index>);
template void every_operation(const qd::Cuda&, qd::MatrixView<double>, qd::MatrixView<double>, std::span<const std::int32_t>,
                              std::span<const qd::Index>);
template void device::launch(const device::Launch&, const EveryPrimitive<qd::half>&);
template void device::launch(const device::Launch&, const EveryPrimitive<qd::bfloat16>&);
