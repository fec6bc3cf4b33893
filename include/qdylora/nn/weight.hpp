// Frozen weights: quantized in a format fixed at compile time, dense, or whatever a file holds.
#pragma once

#include <string>
#include <type_traits>
#include <utility>
#include <variant>

#include <qdylora/quant/quantize.hpp>
#include <qdylora/quant/quantized_tensor.hpp>

namespace qdylora {

/// Format tag: not quantized, elements of type S.
template <Scalar S>
struct Dense {};

/// Format tag: decided at run time, e.g. by a checkpoint.
struct AnyFormat {};

/// One of `Storages`, const once made, so that several layers may share it.
template <class... Storages>
class Weight {
 public:
  Weight() = default;  // the first storage, empty
  template <class Storage>
    requires(std::is_same_v<std::remove_cvref_t<Storage>, Storages> || ...)
  Weight(Storage&& storage) : storage_(std::forward<Storage>(storage)) {}

  Index rows() const noexcept {
    return std::visit([](const auto& w) { return w.rows(); }, storage_);
  }
  Index cols() const noexcept {
    return std::visit([](const auto& w) { return w.cols(); }, storage_);
  }
  std::size_t bytes() const noexcept {
    return std::visit([](const auto& w) { return size_of(w); }, storage_);
  }
  /// f(view) with the QuantizedView or MatrixView of what is stored.
  template <class F>
  decltype(auto) visit(F&& f) const {
    return std::visit([&](const auto& w) -> decltype(auto) { return f(w.view()); }, storage_);
  }
  const std::variant<Storages...>& storage() const noexcept { return storage_; }
  template <class Storage>
  const Storage& get() const {
    return std::get<Storage>(storage_);
  }

 private:
  template <CodeFormat F, class S, class M>
  static std::size_t size_of(const QuantizedTensor<F, S, M>& w) noexcept {
    return w.bytes();
  }
  template <class S, class M>
  static std::size_t size_of(const Matrix<S, M>& w) noexcept {
    return static_cast<std::size_t>(w.size()) * sizeof(S);
  }

  std::variant<Storages...> storage_;
};

/// Throws Errc::shape_mismatch, naming the weight and both shapes, unless it is [rows, cols].
template <class... Storages>
void expect_shape(const char* what, const Weight<Storages...>& weight, Index rows, Index cols) {
  QDYLORA_EXPECTS(weight.rows() == rows && weight.cols() == cols, shape_mismatch,
                  std::string(what) + ": expected " + detail::shape_text(rows, cols) + ", found " +
                      detail::shape_text(weight.rows(), weight.cols()));
}

/// y [rows, cols] = the weight's elements, decoded where it is quantized.
template <class... Storages, class S, class Backend>
void decode(const Weight<Storages...>& weight, MatrixView<S> y, const Backend& backend) {
  weight.visit([&]<class View>(const View& view) {
    if constexpr (requires { typename View::format; }) backend.dequantize(view, y);
    else backend.copy(view, y);
  });
}

namespace detail {

template <class Format, class Memory>
struct WeightFor {
  static_assert(CodeFormat<Format>, "the format of a layer is a code format (NF4, FP4, INT4, FP8E4M3, FP8E5M2), Dense<S> or AnyFormat");
  using type = Weight<QuantizedTensor<Format, DoubleQuant<>, Memory>>;
};
template <class S, class Memory>
struct WeightFor<Dense<S>, Memory> {
  using type = Weight<Matrix<S, Memory>>;
};
template <class Memory>
struct WeightFor<AnyFormat, Memory> {
  using type = Weight<QuantizedTensor<NF4, DoubleQuant<>, Memory>, QuantizedTensor<NF4, Float32Scales, Memory>,
                      QuantizedTensor<FP4, DoubleQuant<>, Memory>, QuantizedTensor<FP4, Float32Scales, Memory>,
                      QuantizedTensor<INT4, DoubleQuant<>, Memory>, QuantizedTensor<FP8E4M3, DoubleQuant<>, Memory>, Matrix<float, Memory>,
                      Matrix<bfloat16, Memory>>;
};

}  // namespace detail

template <class Format, MemoryResource Memory = HostMemory>
using WeightFor = typename detail::WeightFor<Format, Memory>::type;

/// A weight of `values` in `Format`: coded with double-quantized scales, or copied where the format is dense.
template <class Format, class S, class Backend>
auto make_weight(MatrixView<S> values, const QuantizeOptions& options, const Backend& backend) {
  static_assert(!std::is_same_v<Format, AnyFormat>, "a layer of AnyFormat is made from a weight that exists");
  using Made = WeightFor<Format, typename Backend::Memory>;
  if constexpr (CodeFormat<Format>) {
    return Made(backend.template quantize<Format, DoubleQuant<>>(values, options));
  } else {
    static_cast<void>(options);
    using Storage = std::remove_cvref_t<decltype(std::get<0>(std::declval<const Made&>().storage()))>;
    Storage dense(values.rows, values.cols);
    backend.copy(values, dense.view());
    return Made(std::move(dense));
  }
}

/// An embedding or a head [vocab, width]: dense, or in the 8 bits of GGUF's Q8_0, a quarter of the bytes that every token of a generated
/// text reads.
template <class Acc, MemoryResource Memory = HostMemory>
using TableWeight = Weight<Matrix<Acc, Memory>, QuantizedTensor<INT8, Float32Scales, Memory>>;

}  // namespace qdylora
