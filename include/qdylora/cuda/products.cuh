// The products of linear layers: which kernel makes them.
#pragma once

#include <algorithm>
#include <concepts>
#include <string>
#include <type_traits>

#include <qdylora/cuda/augmented_slabs.cuh>
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

template <class X, class W, class Y>
void expect_matmul_transposed(MatrixView<const X> x, const W& w, MatrixView<Y> y) {
  QDYLORA_EXPECTS(x.cols == w.rows, shape_mismatch,
                  "matmul_transposed: x " + shape_text(x) + " does not fit weight " + shape_text(w.rows, w.cols));
  expect_shape("matmul_transposed: y", y, x.rows, w.cols);
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

/// Whether a product of x and w takes an adapter's term of that rank along: by small_batch, or by slabs where they are augmented.
template <class X, class W>
bool takes_adapter(const CudaContext& context, MatrixView<const X> x, const W& w, Index rank) noexcept {
  const ProductKernel kernel = fused_kernel(context, x, w);
  if (kernel == ProductKernel::slabs) return context.augments(w.cols, w.rows, augmented_bytes(x, rank, 1));
  return kernel == ProductKernel::small_batch;
}
/// The same of x . w. Not in half: gradients pass below its range, so that a term of floats is multiplied as floats there (ProductType).
template <class X, class W>
bool takes_adapter_transposed(const CudaContext& context, MatrixView<const X> x, const W& w, Index rank) noexcept {
  return std::same_as<X, bfloat16> && context.augments(w.rows, w.cols, augmented_bytes(x, rank, 8));
}

/// The rank of an adapter's term, which fits x and so many columns of y.
template <class X>
Index rank_of_term(const char* product, MatrixView<const X> x, Index y_cols, const AdapterTerm<X>& adapter) {
  const Index rank = std::max({adapter.u.cols, adapter.a.rows, adapter.b.rows});
  if (rank == 0) return 0;
  const std::string name = std::string(product) + ": the adapter's ";
  expect_shape((name + "u").c_str(), adapter.u, x.rows, rank);
  expect_shape((name + "b").c_str(), adapter.b, rank, y_cols);
  if (!adapter.a.empty()) expect_shape((name + "a").c_str(), adapter.a, rank, x.cols);
  return rank;
}
template <class X, class W>
void expect_taken(bool taken, const char* product, MatrixView<const X> x, const W& w, const char* query) {
  QDYLORA_EXPECTS(taken, unsupported,
                  std::string(product) + ": a product of " + shape_text(x) + " and " + shape_text(w.rows, w.cols) +
                      " takes no adapter along; ask " + query + " first");
}

/// y (+)= x . w^T and what an adapter adds, which takes_adapter; else Errc::unsupported. Few tokens in one launch, if rows of x and a are
/// aligned to 16 bytes.
template <class X, class W, class Y>
  requires FusedTypes<W, X, Y>
void matmul(const CudaContext& context, MatrixView<const X> x, const W& w, MatrixView<Y> y, Update update,
            const std::type_identity_t<AdapterTerm<X>>& adapter) {
  expect_matmul(x, w, y);
  const Index rank = rank_of_term("matmul", x, w.rows, adapter);
  if (rank == 0) return matmul(context, x, w, y, update);
  const auto make_u = [&] {
    if (!adapter.a.empty()) matmul(context, x, adapter.a, adapter.u, Update::overwrite);
  };
  if (y.empty()) return make_u();
  expect_taken(takes_adapter(context, x, w, rank), "matmul", x, w, "takes_adapter");
  if (fused_kernel(context, x, w) == ProductKernel::small_batch) return multiply_small_batch(context, x, w, y, update, adapter);
  make_u();
  multiply_by_augmented_slabs(context, x, w, y, update, adapter);
}

/// y [tokens, in] (+)= x [tokens, out] . w [out, in]
template <class X, class W, class Y>
void matmul_transposed(const CudaContext& context, MatrixView<const X> x, const W& w, MatrixView<Y> y, Update update) {
  expect_matmul_transposed(x, w, y);
  if (y.empty()) return;
  if constexpr (!std::is_void_v<Element<W>>) {
    const MatrixView<const Element<W>> dense(w);
    if (is_converted<X, Element<W>, Y> && x.rows <= few_mixed_tokens) return multiply_transposed_few(context, x, dense, y, update);
    multiply_transposed_by_slabs(context, x, dense, y, update);
  } else {
    multiply_transposed_by_slabs(context, x, w, y, update);
  }
}

/// y (+)= x . w and what an adapter adds, which takes_adapter_transposed; else Errc::unsupported.
template <class X, class W, class Y>
  requires FusedTypes<W, X, Y>
void matmul_transposed(const CudaContext& context, MatrixView<const X> x, const W& w, MatrixView<Y> y, Update update,
                       const std::type_identity_t<AdapterTerm<X>>& adapter) {
  expect_matmul_transposed(x, w, y);
  const Index rank = rank_of_term("matmul_transposed", x, w.cols, adapter);
  if (rank == 0) return matmul_transposed(context, x, w, y, update);
  if (!y.empty()) expect_taken(takes_adapter_transposed(context, x, w, rank), "matmul_transposed", x, w, "takes_adapter_transposed");
  if (!adapter.a.empty()) matmul(context, x, adapter.a, adapter.u, Update::overwrite);
  if (!y.empty()) multiply_transposed_by_augmented_slabs(context, x, w, y, update, adapter);
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
