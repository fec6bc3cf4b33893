// OwnPass: a layer's passes with a context and outputs that it keeps itself, for models that are a chain.
#pragma once

#include <qdylora/backend.hpp>
#include <qdylora/nn/parameter.hpp>

namespace qdylora {

/// The base of a layer that has out(), in() and
///   forward(In<T> x, MatrixView<T> y, Context&)   and   backward(In<T> dy, MatrixView<T> dx, Context&, GradientMode)
/// for one pass at a time. Results are valid until the next call. x is borrowed until backward, so it cannot be a temporary.
template <class Layer, Scalar T, MemoryResource Memory, class Context>
class OwnPass {
 public:
  MatrixView<T> forward(MatrixView<const T> x) {
    auto& layer = static_cast<Layer&>(*this);
    y_.resize(x.rows, layer.out());
    layer.forward(x, y_.view(), context_);
    return y_.view();
  }
  MatrixView<T> forward(MatrixView<T> x) { return forward(MatrixView<const T>(x)); }
  MatrixView<T> forward(const Matrix<T, Memory>& x) { return forward(x.view()); }
  MatrixView<T> forward(Matrix<T, Memory>&& x) = delete;
  void forward(Matrix<T, Memory>&& x, MatrixView<T> y, Context& context) = delete;  // nor with a context of the caller's
  void forward(Matrix<T, Memory>&& x, MatrixView<T> y, Context& context) const = delete;
  MatrixView<T> backward(In<T> dy, GradientMode mode = GradientMode::accumulate) {
    auto& layer = static_cast<Layer&>(*this);
    dx_.resize(dy.rows, layer.in());
    layer.backward(dy, dx_.view(), context_, mode);
    return dx_.view();
  }

 private:
  Context context_;
  Matrix<T, Memory> y_, dx_;
};

}  // namespace qdylora
