// The norms of decoders, RMS or layer: which one it is, its weights say.
#pragma once

#include <string>
#include <utility>

#include <qdylora/model/config.hpp>

namespace qdylora {

/// Frozen weights of a norm, [1, width]. A layer norm has a bias, an RMS norm none.
template <class Acc, MemoryResource Memory = HostMemory>
struct NormWeights {
  Matrix<Acc, Memory> weight, bias;

  NormWeights() = default;
  NormWeights(Matrix<Acc, Memory> weight_, Matrix<Acc, Memory> bias_ = {}) : weight(std::move(weight_)), bias(std::move(bias_)) {}
};

/// Throws Errc::shape_mismatch, naming the norm, unless it is one of the architecture's kind and of width features.
template <class Acc, class Memory>
void expect_norm(const std::string& name, const NormWeights<Acc, Memory>& norm, const DecoderConfig& config) {
  expect_shape(name.c_str(), norm.weight.view(), 1, config.width);
  const bool biased = config.architecture == Architecture::falcon;
  expect_shape((name + "'s bias").c_str(), norm.bias.view(), biased ? 1 : 0, biased ? config.width : 0);
}

/// y = norm(x), both [tokens, width]; `statistics` is made, for the backward pass: [tokens, 1] of an RMS norm, [tokens, 2] of a layer norm.
template <class T, class Backend>
void normalize(const Backend& backend, In<T> x, const NormWeights<Accumulator<T>, typename Backend::Memory>& norm, float epsilon,
               MatrixView<T> y, Matrix<Accumulator<T>, typename Backend::Memory>& statistics) {
  if (norm.bias.size() == 0) {
    statistics.resize(x.rows, 1);
    backend.rms_norm(x, norm.weight.view(), epsilon, y, statistics.view());
  } else if constexpr (HasLayerNorm<Backend, T>) {
    statistics.resize(x.rows, 2);
    backend.layer_norm(x, norm.weight.view(), norm.bias.view(), epsilon, y, statistics.view());
  } else {
    throw Error(Errc::unsupported, "this backend has no layer norm");
  }
}

/// dx (+)= the gradient of x where y = norm(x) has the gradient dy.
template <class T, class Backend>
void normalize_backward(const Backend& backend, In<T> dy, In<T> x, const NormWeights<Accumulator<T>, typename Backend::Memory>& norm,
                        const Matrix<Accumulator<T>, typename Backend::Memory>& statistics, MatrixView<T> dx, Update update) {
  if (norm.bias.size() == 0) {
    backend.rms_norm_backward(dy, x, norm.weight.view(), statistics.view(), dx, update);
  } else if constexpr (HasLayerNorm<Backend, T>) {
    backend.layer_norm_backward(dy, x, norm.weight.view(), statistics.view(), dx, update);
  }
}

}  // namespace qdylora
