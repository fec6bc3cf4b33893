// Adapters that begin with the leading singular triplets of a weight [out, in], or of what its quantization loses.
//
//   pissa   B^T A = the leading triplets of W;  the base is quantize(W - B^T A)                            (Meng et al. 2024)
//   loftq   B^T A = 0, then in turns  base = quantize(W - B^T A),  B^T A = the leading triplets of W - base  (Li et al. 2023)
//   qera    base = quantize(W),  B^T A D = the leading triplets of (W - base) D,  D = diag(rms of each input)
//           (QERA-approx, Zhang et al. 2024)
//
// Singular values fall from row to row and are shared out evenly, A_i = sqrt(sigma_i) v_i, B_i = sqrt(sigma_i) u_i. So every prefix of rows
// is the best of its rank: the error |W - base - sum_{i < b} B_i^T A_i| falls with b. At rank 0 there is the base alone. That of loftq with
// one iteration, and of qera, is the plain quantized weight. That of pissa lacks all the triplets: it trains well at full rank, but its low
// ranks begin far from the model. Prefixes of qera are the best in |(W - base - sum_{i < b} B_i^T A_i) D|, the error that a layer's outputs
// are expected to have where its inputs are not correlated; its rows are balanced too, |A_i| = |B_i|.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include <qdylora/backend.hpp>
#include <qdylora/core/eigen.hpp>
#include <qdylora/core/random.hpp>
#include <qdylora/nn/low_rank.hpp>
#include <qdylora/nn/weight.hpp>

namespace qdylora {

struct SvdOptions {
  Index oversampling = 16;  // directions beyond those asked for
  Index iterations = 4;     // of the power method: what a flat spectrum needs, as that of a quantization error
  std::uint64_t seed = 0;
};

namespace detail {

// Depends on a parameter so that Eigen's decompositions are instantiated by programs that use them alone.
template <class Backend>
struct DoubleRows {
  using type = Eigen::Matrix<double, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;
};

// Rows [l, n], l <= n, become an orthonormal basis of what they span.
template <class Backend>
void orthonormalize_rows(Matrix<float>& rows) {
  using Columns = Eigen::Matrix<typename DoubleRows<Backend>::type::Scalar, Eigen::Dynamic, Eigen::Dynamic>;
  const Eigen::HouseholderQR<Columns> qr(as_eigen(std::as_const(rows).view()).template cast<double>().transpose());
  as_eigen(rows.view()) = (qr.householderQ() * Columns::Identity(rows.cols(), rows.rows())).transpose().template cast<float>();
}

}  // namespace detail

/// The leading `rank` singular triplets of w [out, in], fewer where the rest is zero to float's precision: their product B^T A is the best
/// approximation of that rank, nearly. A randomized range finder with power iterations (Halko, Martinsson & Tropp 2011, algorithm 4.4):
/// products with w, and decompositions of rank + oversampling columns. Errors: rank_range.
template <class Backend>
LowRank<float> leading_triplets(MatrixView<const float> w, Index rank, const Backend& backend, const SvdOptions& options = {}) {
  QDYLORA_EXPECTS(rank >= 1 && options.oversampling >= 0 && options.iterations >= 0, rank_range,
                  "leading_triplets: expected a rank from 1, found " + std::to_string(rank));
  using Rows = typename detail::DoubleRows<Backend>::type;
  const Index probes = std::min({rank + options.oversampling, w.rows, w.cols});
  Matrix<float> left(probes, w.rows), right(probes, w.cols);  // bases of the two sides
  Rng rng(options.seed, Purpose::init);
  for (float& x : right.span()) x = rng.uniform(-1.0f, 1.0f);
  for (Index i = 0;; ++i) {
    backend.matmul(std::as_const(right).view(), w, left.view());  // right W^T
    detail::orthonormalize_rows<Backend>(left);
    backend.matmul_transposed(std::as_const(left).view(), w, right.view());  // left W
    if (i == options.iterations) break;
    detail::orthonormalize_rows<Backend>(right);
  }
  // left^T left W = (left^T P) (P^T right), where P diagonalizes right right^T.
  const Rows q = as_eigen(std::as_const(left).view()).template cast<double>();
  const Rows c = as_eigen(std::as_const(right).view()).template cast<double>();
  const Eigen::SelfAdjointEigenSolver<Rows> solver(c * c.transpose());
  const auto& squares = solver.eigenvalues();  // ascending
  Index kept = 0;
  while (kept < std::min(rank, probes) && squares[probes - 1 - kept] > 1e-12 * squares[probes - 1]) ++kept;
  LowRank<float> result{Matrix<float>(kept, w.cols), Matrix<float>(kept, w.rows)};
  if (kept == 0) return result;
  const Rows p = solver.eigenvectors().rightCols(kept).rowwise().reverse().transpose();
  const auto roots = squares.tail(kept).reverse().array().sqrt().sqrt().eval();  // of the singular values
  as_eigen(result.b.view()) = (roots.matrix().asDiagonal() * (p * q)).template cast<float>();
  as_eigen(result.a.view()) = (roots.inverse().matrix().asDiagonal() * (p * c)).template cast<float>();
  return result;
}

/// A base and what its adapter begins with.
template <class Base>
struct BaseAndAdapter {
  Base base;
  LowRank<float> adapter;
};

namespace detail {

// w -= B^T A
template <class Backend>
void subtract(const LowRank<float>& product, MatrixView<float> w, const Backend& backend) {
  if (product.rank() == 0) return;
  Matrix<float> negative = clone(product.b.view());
  for (float& x : negative.span()) x = -x;
  exact(backend).weight_gradient(std::as_const(negative).view(), product.a.view(), w, Update::accumulate);
}

// error = w - base
template <class Base, class Backend>
void quantization_error(MatrixView<const float> w, const Base& base, MatrixView<float> error, const Backend& backend) {
  decode(base, error, backend);
  for (Index i = 0; i < w.rows; ++i)
    for (Index j = 0; j < w.cols; ++j) error(i, j) = w(i, j) - error(i, j);
}

}  // namespace detail

/// PiSSA of a weight. `quantize` makes a pointer to a Weight of a matrix in float. Takes the memory of one more weight in float.
template <class Quantize, class Backend>
auto pissa(MatrixView<const float> w, Index rank, Quantize&& quantize, const Backend& backend, const SvdOptions& options = {}) {
  auto adapter = leading_triplets(w, rank, backend, options);
  Matrix<float> rest = clone(w);
  detail::subtract(adapter, rest.view(), backend);
  return BaseAndAdapter<decltype(quantize(w))>{quantize(std::as_const(rest).view()), std::move(adapter)};
}

/// LoftQ of a weight. Of the iterations, the one that ends with the smallest error at full rank is kept: later ones may be worse. The same
/// memory.
template <class Quantize, class Backend>
auto loftq(MatrixView<const float> w, Index rank, Index iterations, Quantize&& quantize, const Backend& backend,
           const SvdOptions& options = {}) {
  QDYLORA_EXPECTS(iterations >= 1, bad_argument, "loftq: expected iterations from 1, found " + std::to_string(iterations));
  using Pair = BaseAndAdapter<decltype(quantize(w))>;
  std::optional<Pair> best;
  double least = 0.0;
  Matrix<float> rest = clone(w);
  for (Index i = 0; i < iterations; ++i) {
    Pair pair{quantize(std::as_const(rest).view()), {}};
    detail::quantization_error(w, *pair.base, rest.view(), backend);
    pair.adapter = leading_triplets(std::as_const(rest).view(), rank, backend, options);
    detail::subtract(pair.adapter, rest.view(), backend);
    const double error = backend.sum_squares(std::as_const(rest).view());
    const LowRank<float>& last = pair.adapter;
    if (i + 1 < iterations) {
      copy(w, rest.view());
      detail::subtract(last, rest.view(), backend);
    }
    if (!best || error < least) {
      best = std::move(pair);
      least = error;
    }
  }
  return std::move(*best);
}

/// QERA-approx of a weight [out, in], where input k has the root mean square input_rms[k]. An input that is always zero counts for nothing.
/// Takes the memory of two more weights in float. Errors: shape_mismatch, and bad_argument for what is no root mean square.
template <class Quantize, class Backend>
auto qera(MatrixView<const float> w, Index rank, std::span<const float> input_rms, Quantize&& quantize, const Backend& backend,
          const SvdOptions& options = {}) {
  QDYLORA_EXPECTS(static_cast<Index>(input_rms.size()) == w.cols, shape_mismatch,
                  "qera: expected root mean squares of " + std::to_string(w.cols) + " inputs, found " + std::to_string(input_rms.size()));
  for (const float x : input_rms)
    QDYLORA_EXPECTS(x >= 0.0f && std::isfinite(x), bad_argument, "qera: an input has a root mean square of " + std::to_string(x));
  BaseAndAdapter<decltype(quantize(w))> pair{quantize(w), {}};
  Matrix<float> error(w.rows, w.cols), weighted(w.rows, w.cols);
  detail::quantization_error(w, *pair.base, error.view(), backend);
  backend.scale_columns(std::as_const(error).view(), input_rms, weighted.view());
  pair.adapter = leading_triplets(std::as_const(weighted).view(), rank, backend, options);
  if (pair.adapter.rank() == 0) return pair;
  // With the left vectors U, B^T A D = U^T U (W - base) D: so A = U (W - base), and nothing is divided by D.
  auto a = as_eigen(pair.adapter.a.view()), b = as_eigen(pair.adapter.b.view());
  b.rowwise().normalize();
  backend.matmul_transposed(std::as_const(pair.adapter.b).view(), std::as_const(error).view(), pair.adapter.a.view());
  const auto roots = a.rowwise().norm().array().sqrt().eval();
  a = (roots.inverse().matrix().asDiagonal() * a).eval();
  b = (roots.matrix().asDiagonal() * b).eval();
  return pair;
}

}  // namespace qdylora
