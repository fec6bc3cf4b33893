// Activation functions of small models, as values in and out.
#pragma once

#include <type_traits>

#include <qdylora/backend.hpp>

namespace qdylora {

/// x * Phi(x) (Hendrycks & Gimpel 2016), exact form. x [tokens, features].
template <class T, class Backend = Cpu>
auto gelu(MatrixView<T> x, Backend backend = {}) {
  Matrix<std::remove_const_t<T>, typename Backend::Memory> y;
  y.resize(x.rows, x.cols);
  backend.gelu(x, y.view());
  return y;
}

/// The gradient of gelu at x, times dy.
template <class T, class U, class Backend = Cpu>
auto gelu_backward(MatrixView<T> x, MatrixView<U> dy, Backend backend = {}) {
  Matrix<std::remove_const_t<T>, typename Backend::Memory> dx;
  dx.resize(x.rows, x.cols);
  backend.gelu_backward(dy, x, dx.view());
  return dx;
}

}  // namespace qdylora
