// The CPU backend: the Backend concept on this machine's threads and vector units.
#pragma once

#include <memory>
#include <utility>

#include <qdylora/backend.hpp>
#include <qdylora/cpu/binary_products.hpp>
#include <qdylora/cpu/elementwise.hpp>
#include <qdylora/cpu/transformer.hpp>

namespace qdylora {

class ScratchPlan;  // cpu/scratch_plan.hpp

/// A handle: copies share one pool of threads. `Cpu{}` uses the pool of the process, which has a thread for every processor and starts
/// them at its first parallel loop; `Cpu{n}` makes a pool of n; a trainer with threads of its own passes an Executor.
/// Operations are done when they return, so synchronize does nothing.
class Cpu {
 public:
  using Memory = HostMemory;

  Cpu() : Cpu(shared_pool(), nullptr) {}
  explicit Cpu(int threads) : Cpu(threads <= 0 ? shared_pool() : std::make_shared<ThreadPool>(threads), nullptr) {}
  explicit Cpu(Executor executor) : Cpu(nullptr, std::make_shared<const Executor>(std::move(executor))) {}

  /// The same threads with an instruction set of choice. Throws Errc::unsupported where the machine lacks it.
  Cpu with_isa(Isa isa) const {
    QDYLORA_EXPECTS(supported(isa), unsupported, "this machine has no " + std::string(name(isa)));
    Cpu other = *this;
    other.run_.isa = isa;
    return other;
  }
  Isa isa() const noexcept { return run_.isa; }
  /// The same threads with another arithmetic of products: Cpu{}.with_compute(Compute::bits16).
  Cpu with_compute(Compute compute) const {
    Cpu other = *this;
    other.run_.compute = compute;
    return other;
  }
  Compute compute() const noexcept { return run_.compute; }
  Cpu exact() const { return with_compute(Compute::exact); }
  /// 0 where an Executor decides.
  int threads() const noexcept { return run_.pool ? run_.pool->threads() : 0; }

  /// f(0) ... f(count - 1), each once, on the backend's threads.
  void parallel_for(Index count, LoopBody f) const {
    run_.parallel_for(count, f);
  }

  // memory
  template <class T>
  void fill(MatrixView<T> y, std::type_identity_t<T> value) const {
    run_.parallel_ranges(y.rows, detail::row_grain(y.cols), [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) std::fill_n(y.row(i), y.cols, value);
    });
  }
  /// Element types may differ; values are rounded to the target's.
  template <class X, class Y>
  void copy(MatrixView<X> x, MatrixView<Y> y) const {
    detail::convert(run_, MatrixView<const std::remove_const_t<X>>(x), y);
  }
  template <class T>
  void upload(In<T> x, MatrixView<T> y) const {
    qdylora::copy(x, y);
  }
  template <class T>
  void download(In<T> x, MatrixView<T> y) const {
    qdylora::copy(x, y);
  }
  void synchronize() const noexcept {}

  // frozen weights
  template <CodeFormat Format = NF4, class Scales = DoubleQuant<>, class T>
  QuantizedTensor<Format, Scales> quantize(MatrixView<T> weight, QuantizeOptions options = {}) const {
    const auto parallel = [this](Index count, LoopBody f) { run_.parallel_for(count, f); };
    return qdylora::quantize<Format, Scales>(MatrixView<const std::remove_const_t<T>>(weight), options, parallel, encoder<Format>());
  }
  /// How Quantizer::append encodes blocks fastest here; the same codes as its own way.
  template <CodeFormat Format>
  auto encoder() const {
    if constexpr (Format::bits == 4) {
      return [encode = run_.codes().encode](const float* x, Index count, bool partial, std::uint8_t* out) {
        return encode(x, count, partial, Format::thresholds.data(), static_cast<Index>(Format::thresholds.size()),
                      Format::ascending.data(), out);
      };
    } else {
      return detail::BlockEncoder<Format>{};
    }
  }
  template <class T, CodeFormat Format, class Scales>
  void dequantize(const QuantizedView<Format, Scales>& weight, MatrixView<T> y) const {
    expect_shape("dequantize: y", y, weight.rows, weight.cols);
    detail::dequantize(run_, weight, y);
  }
  template <class S>
  void dequantize(const BinaryCodedView<S>& weight, MatrixView<S> y) const {
    expect_shape("dequantize: y", y, weight.rows, weight.cols);
    detail::dequantize(run_, weight, y);
  }

  // products
  template <class T, class W, class Y>
  void matmul(MatrixView<T> x, const W& w, MatrixView<Y> y, Update update = Update::overwrite) const {
    detail::matmul(run_, MatrixView<const std::remove_const_t<T>>(x), w, y, update);
  }
  template <class T, class W, class Y>
  void matmul_transposed(MatrixView<T> x, const W& w, MatrixView<Y> y, Update update = Update::overwrite) const {
    detail::matmul_transposed(run_, MatrixView<const std::remove_const_t<T>>(x), w, y, update);
  }
  template <class U, class T, class S>
  void weight_gradient(MatrixView<U> u, MatrixView<T> x, MatrixView<S> g, Update update = Update::overwrite) const {
    detail::weight_gradient(run_, MatrixView<const S>(u), MatrixView<const std::remove_const_t<T>>(x), g, update);
  }

  template <class S>
  void add_sums_of_signs(In<S> d, const BinaryCodedView<S>& w, Index first, MatrixView<S> sums) const {
    detail::add_sums_of_signs(run_, d, w, first, sums);
  }

  // elementwise
  template <class T>
  void add(In<T> x, MatrixView<T> y) const {
    detail::add(run_, x, y);
  }
  template <class T>
  void add_row(In<Accumulator<T>> row, MatrixView<T> y) const {
    detail::add_row(run_, row, y);
  }
  template <class T>
  void scale_columns(In<T> x, std::span<const Accumulator<T>> factors, MatrixView<T> y) const {
    detail::scale_columns(run_, x, factors, y);
  }
  template <class T, class U, class S>
  void column_products(MatrixView<T> first, MatrixView<U> second, MatrixView<S> sums) const {
    using X = std::remove_const_t<T>;
    detail::column_products(run_, MatrixView<const X>(first), MatrixView<const X>(second), sums);
  }
  template <class T>
  void dropout(In<T> x, float probability, DropoutKey key, MatrixView<T> y, Update update = Update::overwrite) const {
    detail::dropout(run_, x, probability, key, y, update);
  }

  // optimizer
  template <class S>
  void adamw(MatrixView<S> value, In<S> gradient, MatrixView<S> m, MatrixView<S> v, const AdamWUpdate& update) const {
    detail::adamw(run_, value, gradient, m, v, update);
  }
  void adamw(MatrixView<float> value, In<float> gradient, const Moments8View& moments, const AdamWUpdate& update) const {
    detail::adamw(run_, value, gradient, moments, update);
  }
  template <class S>
  void lion(MatrixView<S> value, In<S> gradient, MatrixView<S> m, const LionUpdate& update) const {
    detail::lion(run_, value, gradient, m, update);
  }
  template <class S>
  double sum_squares(MatrixView<S> x) const {
    return detail::sum_squares(run_, MatrixView<const std::remove_const_t<S>>(x));
  }

  // transformer
  template <class T>
  void rms_norm(In<T> x, In<Accumulator<T>> weight, float epsilon, MatrixView<T> y, MatrixView<Accumulator<T>> inverse_rms) const {
    detail::rms_norm(run_, x, weight, epsilon, y, inverse_rms);
  }
  template <class T>
  void rms_norm_backward(In<T> dy, In<T> x, In<Accumulator<T>> weight, In<Accumulator<T>> inverse_rms, MatrixView<T> dx,
                         Update update = Update::overwrite) const {
    detail::rms_norm_backward(run_, dy, x, weight, inverse_rms, dx, update);
  }
  template <class T>
  void layer_norm(In<T> x, In<Accumulator<T>> weight, In<Accumulator<T>> bias, float epsilon, MatrixView<T> y,
                  MatrixView<Accumulator<T>> moments) const {
    detail::layer_norm(run_, x, weight, bias, epsilon, y, moments);
  }
  template <class T>
  void layer_norm_backward(In<T> dy, In<T> x, In<Accumulator<T>> weight, In<Accumulator<T>> moments, MatrixView<T> dx,
                           Update update = Update::overwrite) const {
    detail::layer_norm_backward(run_, dy, x, weight, moments, dx, update);
  }
  template <class T>
  void rope(MatrixView<T> x, std::span<const std::int32_t> positions, In<Accumulator<T>> table, RopeLayout layout, int direction) const {
    detail::rope(run_, x, positions, table, layout, direction);
  }
  template <class T>
  void attention(In<T> q, In<T> k, In<T> v, std::span<const Index> offsets, HeadShape shape, MatrixView<T> y,
                 MatrixView<Accumulator<T>> lse) const {
    detail::attention(run_, q, k, v, offsets, shape, y, lse);
  }
  template <class T>
  void attention_backward(In<T> dy, In<T> q, In<T> k, In<T> v, In<T> y, In<Accumulator<T>> lse, std::span<const Index> offsets,
                          HeadShape shape, MatrixView<T> dq, MatrixView<T> dk, MatrixView<T> dv) const {
    detail::attention_backward(run_, dy, q, k, v, y, lse, offsets, shape, dq, dk, dv);
  }
  template <class T>
  void attention_decode(In<T> q, std::span<const MatrixView<const T>> keys, std::span<const MatrixView<const T>> values, HeadShape shape,
                        MatrixView<T> y) const {
    detail::attention_decode(run_, q, keys, values, shape, y);
  }
  template <class T>
  void swiglu(In<T> gate, In<T> up, MatrixView<T> y) const {
    detail::swiglu(run_, gate, up, y);
  }
  template <class T>
  void swiglu_backward(In<T> dy, In<T> gate, In<T> up, MatrixView<T> dgate, MatrixView<T> dup) const {
    detail::swiglu_backward(run_, dy, gate, up, dgate, dup);
  }
  template <class T>
  void gelu(In<T> x, MatrixView<T> y) const {
    detail::gelu(run_, x, y);
  }
  template <class T>
  void gelu_backward(In<T> dy, In<T> x, MatrixView<T> dx) const {
    detail::gelu_backward(run_, dy, x, dx);
  }
  template <class T, class Table>
  void embed(std::span<const std::int32_t> ids, const Table& table, MatrixView<T> y) const {
    detail::embed(run_, ids, table, y);
  }
  template <class T>
  void embed_backward(std::span<const std::int32_t> ids, MatrixView<const T> dy, MatrixView<Accumulator<T>> gradient) const {
    detail::embed_backward(run_, ids, dy, gradient);
  }
  template <class T>
  void gather_rows(In<T> x, std::span<const Index> rows, MatrixView<T> y) const {
    detail::gather_rows(run_, x, rows, y);
  }
  template <class T>
  void scatter_rows(In<T> x, std::span<const Index> rows, MatrixView<T> y) const {
    detail::scatter_rows(run_, x, rows, y);
  }
  template <class T>
  void copy_rows(In<T> x, std::span<const MatrixView<T>> targets) const {
    detail::copy_rows(run_, x, targets);
  }
  template <class S>
  void cross_entropy(MatrixView<S> logits, std::span<const std::int32_t> targets, double scale, MatrixView<S> losses) const {
    detail::cross_entropy(run_, logits, targets, scale, losses);
  }

 private:
  friend class ScratchPlan;

  Cpu(std::shared_ptr<ThreadPool> pool, std::shared_ptr<const Executor> executor)
      : run_{std::move(pool), std::move(executor), best_isa(), Compute::automatic} {}

  static std::shared_ptr<ThreadPool> shared_pool() {
    // Never destroyed: other threads may still be in it when the process ends.
    static const auto* const pool = new std::shared_ptr<ThreadPool>(std::make_shared<ThreadPool>());
    return *pool;
  }

  detail::CpuRun run_;
};

static_assert(HasAdamW8<Cpu> && HasLion<Cpu, float> && HasLayerNorm<Cpu, float> && HasLayerNorm<Cpu, bfloat16> && HasBinaryCodes<Cpu, double>);
static_assert(FullBackend<Cpu, float> && FullBackend<Cpu, double> && FullBackend<Cpu, bfloat16> && FullBackend<Cpu, half>);

}  // namespace qdylora
