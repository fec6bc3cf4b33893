// The products of linear layers: which kernel makes them.
#pragma once

#include <algorithm>
#include <concepts>

#include <qdylora/cuda/few_tokens.cuh>
#include <qdylora/cuda/slabs.cuh>
#include <qdylora/cuda/small_batch.cuh>
#include <qdylora/cuda/tiles.cuh>
#include <qdylora/cuda/warpgroup_tiles.cuh>

namespace qdylora::detail {

/// Whether operands of these types would be converted before cuBLASLt multiplied them, or its result after.
template <class X, class S, class Y>
constexpr bool is_converted = !std::same_as<X, ProductType<X, S, Y>> || !std::same_as<S, ProductType<X, S, Y>> ||
                              !MultipliedTypes<ProductType<X, S, Y>, Y>;

template <class X, class W, class Y>
void expect_matmul(MatrixView<const X> x, const W& w, MatrixView<Y> y) {
  QDYLORA_EXPECTS(x.cols == w.cols, shape_mismatch, "matmul: x " + shape_text(x) + " does not fit weight " + shape_text(w.rows, w.cols));
  expect_shape("matmul: y", y, x.rows, w.rows);
}

/// The kernel for x . w^T of types that are fused.
template <class X, class W>
ProductKernel fused_kernel(const CudaContext& context, MatrixView<const X> x, const W& w) noexcept {
  return context.choose_product(ProductProblem{x.rows, w.rows, w.cols, true, has_whole_chunks(w)});
}

/// y [tokens, out] (+)= x [tokens, in] . w [out, in]^T
template <class X, class W, class Y>
void matmul(const CudaContext& context, MatrixView<const X> x, const W& w, MatrixView<Y> y, Update update) {
  expect_matmul(x, w, y);
  if (y.empty()) return;
  if constexpr (FusedTypes<W, X, Y>) {
    switch (fused_kernel(context, x, w)) {
      case ProductKernel::small_batch: multiply_small_batch(context, x, w, y, update); break;
      case ProductKernel::tiles: multiply_tiles(context, x, w, y, update); break;
      case ProductKernel::warpgroup_tiles: multiply_warpgroup_tiles(context, x, w, y, update); break;
      case ProductKernel::slabs: multiply_by_slabs(context, x, w, y, update); break;
    }
  } else if constexpr (std::is_void_v<Element<W>>) {
    multiply_by_slabs(context, x, w, y, update);
  } else {
    const MatrixView<const Element<W>> dense(w);
    if (is_converted<X, Element<W>, Y> && x.rows <= few_mixed_tokens) multiply_few(context, x, dense, y, update);
    else multiply_by_slabs(context, x, dense, y, update);
  }
}

/// The same and what an adapter adds, of an x whose kernel is small_batch; else Errc::unsupported. In one launch, if rows of x and a are
/// aligned to 16 bytes.
template <class X, class W, class Y>
  requires FusedTypes<W, X, Y>
void matmul(const CudaContext& context, MatrixView<const X> x, const W& w, MatrixView<Y> y, Update update,
            const std::type_identity_t<AdapterTerm<X>>& adapter) {
  expect_matmul(x, w, y);
  const bool makes_u = !adapter.a.empty();
  if (const Index rank = std::max(adapter.u.cols, adapter.a.rows); rank > 0) {
    expect_shape("matmul: the adapter's u", adapter.u, x.rows, rank);
    expect_shape("matmul: the adapter's b", adapter.b, rank, w.rows);
    if (makes_u) expect_shape("matmul: the adapter's a", adapter.a, rank, w.cols);
  }
  if (y.empty()) {
    if (makes_u) matmul(context, x, adapter.a, adapter.u, Update::overwrite);
    return;
  }
  QDYLORA_EXPECTS(
      fused_kernel(context, x, w) == ProductKernel::small_batch, unsupported,
      "matmul: a product of " + shape_text(x) + " and " + shape_text(w.rows, w.cols) + " takes no adapter along; ask takes_adapter first");
  multiply_small_batch(context, x, w, y, update, adapter);
}

/// y [tokens, in] (+)= x [tokens, out] . w [out, in]
template <class X, class W, class Y>
void matmul_transposed(const CudaContext& context, MatrixView<const X> x, const W& w, MatrixView<Y> y, Update update) {
  QDYLORA_EXPECTS(x.cols == w.rows, shape_mismatch,
                  "matmul_transposed: x " + shape_text(x) + " does not fit weight " + shape_text(w.rows, w.cols));
  expect_shape("matmul_transposed: y", y, x.rows, w.cols);
  if (y.empty()) return;
  if constexpr (!std::is_void_v<Element<W>>) {
    const MatrixView<const Element<W>> dense(w);
    if (is_converted<X, Element<W>, Y> && x.rows <= few_mixed_tokens) return multiply_transposed_few(context, x, dense, y, update);
    multiply_transposed_by_slabs(context, x, dense, y, update);
  } else {
    multiply_transposed_by_slabs(context, x, w, y, update);
  }
}

/// g [r, features] (+)= u [tokens, r]^T . x [tokens, features]
template <class U, class X, class G>
void weight_gradient(const CudaContext& context, MatrixView<const U> u, MatrixView<const X> x, MatrixView<G> g, Update update) {
  QDYLORA_EXPECTS(u.rows == x.rows, shape_mismatch,
                  "weight_gradient: u " + shape_text(u) + " and x " + shape_text(x) + " have different tokens");
  expect_shape("weight_gradient: g", g, u.cols, x.cols);
  if (g.empty()) return;
  if (is_converted<X, U, G> && x.rows <= few_mixed_tokens) return weight_gradient_few(context, u, x, g, update);
  weight_gradient_by_slabs(context, u, x, g, update);
}

}  // namespace qdylora::detail
