// The CUDA backend: the Backend concept on a device of NVIDIA's.
#pragma once

#include <span>
#include <type_traits>

#include <qdylora/backend.hpp>
#include <qdylora/cuda/attention_decode.cuh>
#include <qdylora/cuda/copy_queue.cuh>
#include <qdylora/cuda/cross_entropy.cuh>
#include <qdylora/cuda/dequantize.cuh>
#include <qdylora/cuda/elementwise.cuh>
#include <qdylora/cuda/graph.cuh>
#include <qdylora/cuda/host_loop.cuh>
#include <qdylora/cuda/layer_norm.cuh>
#include <qdylora/cuda/magnitude.cuh>
#include <qdylora/cuda/paged_adamw.cuh>
#include <qdylora/cuda/products.cuh>
#include <qdylora/cuda/quantize.cuh>
#include <qdylora/cuda/reduce.cuh>
#include <qdylora/cuda/rows.cuh>
#include <qdylora/cuda/transformer.cuh>

namespace qdylora {

/// A handle on a context that the user owns and that outlives it. Operations are queued on the context's stream and return before they
/// are done; download, quantize, the upload of a weight, sum_squares and synchronize wait. Lists of the host (ids, positions, rows) are
/// copied at once.
class Cuda {
 public:
  using Memory = DeviceMemory;

  explicit Cuda(const CudaContext& context) noexcept : context_(&context) {}

  const CudaContext& context() const noexcept { return *context_; }
  /// Whether what is queued now is recorded as a graph (CudaGraph) instead of done.
  bool recording() const { return context_->recording(); }

  // memory
  /// In the order of the context's stream.
  DeviceMemory memory() const noexcept { return context_->memory(); }
  /// Bytes that may be had: what the device has free, and what its pool holds unused.
  std::size_t free_memory() const { return detail::free_memory(context_->device()); }
  template <class T>
  void fill(MatrixView<T> y, std::type_identity_t<T> value) const {
    detail::fill(*context_, y, value);
  }
  /// Element types may differ; values are rounded to the target's.
  template <class X, class Y>
  void copy(MatrixView<X> x, MatrixView<Y> y) const {
    detail::convert(*context_, MatrixView<const std::remove_const_t<X>>(x), y);
  }
  /// The source must live, as it is, until the copy is done: the copy may run beside the host, from pinned memory it does.
  template <class T>
  void upload(In<T> x, MatrixView<T> y) const {
    expect_shape("upload: target", y, x.rows, x.cols);
    transfer(x, y, cudaMemcpyHostToDevice);
  }
  template <class T>
  void download(In<T> x, MatrixView<T> y) const {
    expect_shape("download: target", y, x.rows, x.cols);
    transfer(x, y, cudaMemcpyDeviceToHost);
    synchronize();
  }
  void synchronize() const { context_->synchronize(); }
  CopyQueue copy_queue(std::size_t tickets) const { return {*context_, tickets}; }

  // frozen weights
  template <CodeFormat Format = NF4, class Scales = DoubleQuant<>, class T>
  QuantizedTensor<Format, Scales, DeviceMemory> quantize(MatrixView<T> weight, QuantizeOptions options = {}) const {
    return detail::quantize<Format, Scales>(*context_, MatrixView<const std::remove_const_t<T>>(weight), options);
  }
  template <class T, CodeFormat Format, class Scales>
  void dequantize(const QuantizedView<Format, Scales>& weight, MatrixView<T> y) const {
    expect_shape("dequantize: y", y, weight.rows, weight.cols);
    detail::dequantize(*context_, weight, y);
  }
  template <class S>
  void dequantize(const BinaryCodedView<S>& weight, MatrixView<S> y) const {
    expect_shape("dequantize: y", y, weight.rows, weight.cols);
    detail::dequantize(*context_, weight, y);
  }
  /// A weight that the host has quantized or loaded, and may let go at once. Waits.
  template <CodeFormat Format, class Scales>
  QuantizedTensor<Format, Scales, DeviceMemory> upload(const QuantizedTensor<Format, Scales>& w) const {
    QuantizedTensor<Format, Scales, DeviceMemory> there(w.rows(), w.cols(), w.block_size(), detail::on_device(*context_, w.codes()),
                                                        detail::on_device<Scales>(*context_, w.scales()));
    synchronize();
    return there;
  }
  BinaryCodedTensor<DeviceMemory> upload(const BinaryCodedTensor<>& w) const {
    Matrix<float, DeviceMemory> scales(w.scales().rows, w.scales().cols, context_->memory());
    upload(w.scales(), scales.view());
    BinaryCodedTensor<DeviceMemory> there(w.shape(), detail::on_device(*context_, w.bits()), std::move(scales));
    synchronize();
    return there;
  }
  BinaryCodedTensor<> download(const BinaryCodedTensor<DeviceMemory>& w) const {
    Buffer<std::uint8_t> bits(w.bits().size());
    detail::copy_to_host(*context_, w.bits().data(), bits.data(), bits.size());
    Matrix<float> scales(w.scales().rows, w.scales().cols);
    download(w.scales(), scales.view());
    return {w.shape(), std::move(bits), std::move(scales)};
  }

  // products
  template <class X, class W, class Y>
  void matmul(MatrixView<X> x, const W& w, MatrixView<Y> y, Update update = Update::overwrite) const {
    detail::matmul(*context_, MatrixView<const std::remove_const_t<X>>(x), w, y, update);
  }
  /// Whether the product of x and w may be given an adapter's term of that rank: 16 bits by a weight in 4 bits, of few tokens, or of many
  /// where y is wider than x (product_plan.hpp).
  template <class X, class W>
    requires detail::FusedTypes<W, std::remove_const_t<X>, std::remove_const_t<X>>
  bool takes_adapter(MatrixView<X> x, const W& w, Index rank) const noexcept {
    return detail::takes_adapter(*context_, MatrixView<const std::remove_const_t<X>>(x), w, rank);
  }
  template <class X, class W>
    requires detail::FusedTypes<W, std::remove_const_t<X>, std::remove_const_t<X>>
  bool takes_adapter_transposed(MatrixView<X> x, const W& w, Index rank) const noexcept {
    return detail::takes_adapter_transposed(*context_, MatrixView<const std::remove_const_t<X>>(x), w, rank);
  }
  /// y (+)= x . w^T + scale * u . b, and u where there is an a: a linear layer and its adapter. Of few tokens in one launch, if rows of x and
  /// a are aligned to 16 bytes, and where u is zero with the base's bits; of many in one product, whose u is rounded to X.
  /// Errc::unsupported unless takes_adapter.
  template <class X, class W, class Y>
    requires detail::FusedTypes<W, std::remove_const_t<X>, Y>
  void matmul(MatrixView<X> x, const W& w, MatrixView<Y> y, Update update, const AdapterTerm<std::remove_const_t<X>>& adapter) const {
    detail::matmul(*context_, MatrixView<const std::remove_const_t<X>>(x), w, y, update, adapter);
  }
  template <class X, class W, class Y>
  void matmul_transposed(MatrixView<X> x, const W& w, MatrixView<Y> y, Update update = Update::overwrite) const {
    detail::matmul_transposed(*context_, MatrixView<const std::remove_const_t<X>>(x), w, y, update);
  }
  /// y (+)= x . w + scale * u . b in one product. Errc::unsupported unless takes_adapter_transposed.
  template <class X, class W, class Y>
    requires detail::FusedTypes<W, std::remove_const_t<X>, Y>
  void matmul_transposed(MatrixView<X> x, const W& w, MatrixView<Y> y, Update update, const AdapterTerm<std::remove_const_t<X>>& adapter) const {
    detail::matmul_transposed(*context_, MatrixView<const std::remove_const_t<X>>(x), w, y, update, adapter);
  }
  template <class U, class X, class G>
  void weight_gradient(MatrixView<U> u, MatrixView<X> x, MatrixView<G> g, Update update = Update::overwrite) const {
    detail::weight_gradient(*context_, MatrixView<const std::remove_const_t<U>>(u), MatrixView<const std::remove_const_t<X>>(x), g, update);
  }

  template <class S>
  void add_sums_of_signs(In<S> d, const BinaryCodedView<S>& w, Index first, MatrixView<S> sums) const {
    detail::add_sums_of_signs(*context_, d, w, first, sums);
  }

  // elementwise
  template <class T>
  void add(In<T> x, MatrixView<T> y) const {
    detail::add(*context_, x, y);
  }
  template <class S>
  void add_if_finite(In<S> x, MatrixView<S> y, In<S> a, MatrixView<S> c) const {
    detail::add_if_finite(*context_, x, y, a, c);
  }
  template <class T>
  void add_row(In<Accumulator<T>> row, MatrixView<T> y) const {
    detail::add_row(*context_, row, y);
  }
  template <class S>
  void scale_columns(In<S> x, std::span<const S> factors, MatrixView<S> y) const {
    detail::scale_columns(*context_, x, factors, y);
  }
  template <class T, class U, class S>
  void column_products(MatrixView<T> first, MatrixView<U> second, MatrixView<S> sums) const {
    using X = std::remove_const_t<T>;
    detail::column_products(*context_, MatrixView<const X>(first), MatrixView<const X>(second), sums);
  }
  template <class T>
  void dropout(In<T> x, float probability, DropoutKey key, MatrixView<T> y, Update update = Update::overwrite) const {
    detail::dropout(*context_, x, probability, key, y, update);
  }

  // magnitudes
  template <class T>
  void scale_columns(In<T> x, In<Accumulator<T>> row, MatrixView<T> y) const {
    detail::scale_columns_by(*context_, x, row, y);
  }
  template <class W, class S>
  void row_squares(const W& weight, MatrixView<S> squares) const {
    detail::row_squares(*context_, weight, squares);
  }
  template <class S>
  void row_norms(In<S> squares, In<S> sums, std::type_identity_t<S> scale, MatrixView<S> norms) const {
    detail::row_norms(*context_, squares, sums, scale, norms);
  }
  template <class S>
  void magnitude_factors(In<S> m, In<S> norms, std::type_identity_t<S> less, MatrixView<S> factors) const {
    detail::magnitude_factors(*context_, m, norms, less, factors);
  }
  template <class S>
  void add_over_norms(In<S> sums, In<S> norms, MatrixView<S> gradient) const {
    detail::add_over_norms(*context_, sums, norms, gradient);
  }

  // optimizer
  template <class S>
  void adamw(MatrixView<S> value, In<S> gradient, MatrixView<S> m, MatrixView<S> v, const AdamWUpdate& update) const {
    detail::adamw(*context_, value, gradient, m, v, update);
  }
  void adamw(MatrixView<float> value, In<float> gradient, const Moments8View& moments, const AdamWUpdate& update) const {
    detail::adamw(*context_, value, gradient, moments, update);
  }
  /// The same with moments in the host's pinned memory, which pass through the workspace part by part, beside the arithmetic.
  template <class S>
  void adamw_paged(MatrixView<S> value, In<S> gradient, MatrixView<S> m, MatrixView<S> v, const AdamWUpdate& update) const {
    detail::adamw_paged(*context_, value, gradient, m, v, update);
  }
  void adamw_paged(MatrixView<float> value, In<float> gradient, const Moments8View& moments, const AdamWUpdate& update) const {
    detail::adamw_paged(*context_, value, gradient, moments, update);
  }
  template <class S>
  void lion(MatrixView<S> value, In<S> gradient, MatrixView<S> m, const LionUpdate& update) const {
    detail::lion(*context_, value, gradient, m, update);
  }
  template <class S>
  void lion_paged(MatrixView<S> value, In<S> gradient, MatrixView<S> m, const LionUpdate& update) const {
    detail::lion_paged(*context_, value, gradient, m, update);
  }
  template <class S>
  double sum_squares(MatrixView<S> x) const {
    return detail::sum_squares(*context_, MatrixView<const std::remove_const_t<S>>(x));
  }
  template <class S>
  double sum_squares(std::span<const MatrixView<const S>> matrices) const {
    return detail::sum_squares(*context_, matrices);
  }

  // transformer
  template <class T>
  void rms_norm(In<T> x, In<Accumulator<T>> weight, float epsilon, MatrixView<T> y, MatrixView<Accumulator<T>> inverse_rms) const {
    detail::rms_norm(*context_, x, weight, epsilon, y, inverse_rms);
  }
  template <class T>
  void rms_norm_backward(In<T> dy, In<T> x, In<Accumulator<T>> weight, In<Accumulator<T>> inverse_rms, MatrixView<T> dx,
                         Update update = Update::overwrite) const {
    detail::rms_norm_backward(*context_, dy, x, weight, inverse_rms, dx, update);
  }
  template <class T>
  void layer_norm(In<T> x, In<Accumulator<T>> weight, In<Accumulator<T>> bias, float epsilon, MatrixView<T> y,
                  MatrixView<Accumulator<T>> moments) const {
    detail::layer_norm(*context_, x, weight, bias, epsilon, y, moments);
  }
  template <class T>
  void layer_norm_backward(In<T> dy, In<T> x, In<Accumulator<T>> weight, In<Accumulator<T>> moments, MatrixView<T> dx,
                           Update update = Update::overwrite) const {
    detail::layer_norm_backward(*context_, dy, x, weight, moments, dx, update);
  }
  template <class T>
  void rope(MatrixView<T> x, std::span<const std::int32_t> positions, In<Accumulator<T>> table, RopeLayout layout, int direction) const {
    detail::rope(*context_, x, positions, table, layout, direction);
  }
  template <class T>
  void attention(In<T> q, In<T> k, In<T> v, std::span<const Index> offsets, HeadShape shape, MatrixView<T> y,
                 MatrixView<Accumulator<T>> lse) const {
    detail::attention(*context_, q, k, v, offsets, shape, y, lse);
  }
  template <class T>
  void attention_backward(In<T> dy, In<T> q, In<T> k, In<T> v, In<T> y, In<Accumulator<T>> lse, std::span<const Index> offsets,
                          HeadShape shape, MatrixView<T> dq, MatrixView<T> dk, MatrixView<T> dv) const {
    detail::attention_backward(*context_, dy, q, k, v, y, lse, offsets, shape, dq, dk, dv);
  }
  template <class T>
  void attention_decode(In<T> q, std::span<const MatrixView<const T>> keys, std::span<const MatrixView<const T>> values, HeadShape shape,
                        MatrixView<T> y) const {
    detail::attention_decode(*context_, q, keys, values, shape, y);
  }
  template <class T>
  void swiglu(In<T> gate, In<T> up, MatrixView<T> y) const {
    detail::swiglu(*context_, gate, up, y);
  }
  template <class T>
  void swiglu_backward(In<T> dy, In<T> gate, In<T> up, MatrixView<T> dgate, MatrixView<T> dup) const {
    detail::swiglu_backward(*context_, dy, gate, up, dgate, dup);
  }
  template <class T>
  void gelu(In<T> x, MatrixView<T> y) const {
    detail::gelu(*context_, x, y);
  }
  template <class T>
  void gelu_backward(In<T> dy, In<T> x, MatrixView<T> dx) const {
    detail::gelu_backward(*context_, dy, x, dx);
  }
  template <class T, class Table>
  void embed(std::span<const std::int32_t> ids, const Table& table, MatrixView<T> y) const {
    detail::embed(*context_, ids, table, y);
  }
  template <class T>
  void embed_backward(std::span<const std::int32_t> ids, MatrixView<const T> dy, MatrixView<Accumulator<T>> gradient) const {
    detail::embed_backward(*context_, ids, dy, gradient);
  }
  template <class T>
  void gather_rows(In<T> x, std::span<const Index> rows, MatrixView<T> y) const {
    detail::gather_rows(*context_, x, rows, y);
  }
  template <class T>
  void scatter_rows(In<T> x, std::span<const Index> rows, MatrixView<T> y) const {
    detail::scatter_rows(*context_, x, rows, y);
  }
  template <class T>
  void copy_rows(In<T> x, std::span<const MatrixView<T>> targets) const {
    detail::copy_rows(*context_, x, targets);
  }
  template <class S>
  void cross_entropy(MatrixView<S> logits, std::span<const std::int32_t> targets, double scale, MatrixView<S> losses) const {
    detail::cross_entropy(*context_, logits, targets, scale, losses);
  }

  /// f(0) ... f(count - 1) on the host's threads; returns when all are done.
  template <class F>
  void parallel_for(Index count, F&& f) const {
    detail::host_loop(count, f);
  }

 private:
  template <class T>
  void transfer(MatrixView<const T> x, MatrixView<T> y, cudaMemcpyKind kind) const {
    if (x.empty()) return;
    const auto bytes = [](Index elements) { return static_cast<std::size_t>(elements) * sizeof(T); };
    if (x.contiguous() && y.contiguous())
      QDYLORA_CUDA_TRY(cudaMemcpyAsync(y.data, x.data, bytes(x.size()), kind, context_->stream()));
    else
      QDYLORA_CUDA_TRY(cudaMemcpy2DAsync(y.data, bytes(y.stride), x.data, bytes(x.stride), bytes(x.cols), static_cast<std::size_t>(x.rows),
                                         kind, context_->stream()));
  }

  const CudaContext* context_;
};

template <class T>
inline constexpr bool cuda_has_what_it_says = FullBackend<Cuda, T> && HasLayerNorm<Cuda, T> && HasMagnitude<Cuda, T> && HasBinaryCodes<Cuda, T>;
static_assert(HasAdamW8<Cuda> && HasLion<Cuda, float> && HasCopyQueue<Cuda>);
static_assert(cuda_has_what_it_says<float> && cuda_has_what_it_says<double> && cuda_has_what_it_says<bfloat16> &&
              cuda_has_what_it_says<half>);

}  // namespace qdylora
