// Re-ordering: another pair A', B' with the same product at full rank, whose first rows carry the most. After it, cutting an adapter to
// rank b keeps the best b directions instead of an arbitrary part.
//
//   svd     singular value decomposition of the product B^T A: the best rank-b prefix in Frobenius norm.
//   gram    weighed by what passes through the layer: with the r x r second moments G_A = sum z z^T of z = A x and G_B = sum dz dz^T of
//           dz = B dy (LoRAAdapter::start_collecting gathers them),
//             G_A = L_A L_A^T,  G_B = L_B L_B^T,  U S V^T = L_B^T L_A,  B' = (L_B^-T U)^T B,  A' = V^T L_A^-1 A.
//           Only r x r matrices: no covariance of activations is ever formed.
// Rows are balanced, |A'_i| = |B'_i|. Directions below the numerical rank get B' = 0 and keep a row of A, so that they can learn again.
// The optimizer's moments belong to the old rows: reset them. A magnitude (DoRA) stays: at full rank the product's rows have the norms they
// had. Prefixes are the best of the product, whose rows then have norms of their own and the length m at every rank.
#pragma once

#include <cmath>
#include <string>
#include <vector>

#include <qdylora/core/eigen.hpp>
#include <qdylora/nn/lora_adapter.hpp>

namespace qdylora {

enum class Reordering { svd, gram };

namespace detail {

// Depends on a parameter so that Eigen's decompositions, seconds of a compiler's time, are instantiated by programs that re-order alone.
template <class S>
struct DoubleMatrixFor {
  using type = Eigen::MatrixXd;
};

// L and its inverse transpose for a symmetric positive semidefinite G, eigenvalues floored so that L is invertible.
template <class DoubleMatrix>
struct MomentFactor {
  DoubleMatrix l, inverse_transpose;

  explicit MomentFactor(const DoubleMatrix& moment) {
    const Eigen::SelfAdjointEigenSolver<DoubleMatrix> solver((moment + moment.transpose()) / 2.0);
    Eigen::VectorXd roots = solver.eigenvalues();
    const double largest = std::max(roots.maxCoeff(), 0.0);
    roots = roots.cwiseMax(largest > 0.0 ? 1e-9 * largest : 1.0).cwiseSqrt();
    l = solver.eigenvectors() * roots.asDiagonal();
    inverse_transpose = solver.eigenvectors() * roots.cwiseInverse().asDiagonal();
  }
};

}  // namespace detail

/// Re-orders all rows of an adapter on the host and returns the singular values, largest first (for gram: of the weighed product).
/// Throws Errc::state_order for gram without collected moments, and where gates differ from 1, which a product cannot absorb.
template <class S, MemoryResource Memory>
requires(Memory::host) std::vector<double> reorder(LoRAAdapter<S, Memory>& adapter, Reordering kind = Reordering::svd) {
  using DoubleMatrix = typename detail::DoubleMatrixFor<S>::type;
  if (adapter.gated())
    for (const S g : adapter.gates().value.span())
      QDYLORA_EXPECTS(g == S{1}, state_order, adapter.options().name + ": has trained gates, which a re-ordering cannot keep");
  const Index r = adapter.max_rank();
  const DoubleMatrix a = as_eigen(std::as_const(adapter.a().value).view()).template cast<double>();  // [r, in]
  const DoubleMatrix b = as_eigen(std::as_const(adapter.b().value).view()).template cast<double>();  // [r, out]
  const std::string& name = adapter.options().name;
  QDYLORA_EXPECTS(a.allFinite() && b.allFinite(), non_finite, name + ": reorder of an adapter that is not finite");
  DoubleMatrix new_a, new_b;  // B'^T diag(sigma) A' is the product
  Eigen::VectorXd sigma;
  if (kind == Reordering::gram) {
    QDYLORA_EXPECTS(adapter.moment_a.rows() == r && adapter.moment_b.rows() == r, state_order,
                    adapter.options().name + ": Reordering::gram needs moments; call start_collecting before some training steps");
    QDYLORA_EXPECTS(
        as_eigen(std::as_const(adapter.moment_a).view()).allFinite() && as_eigen(std::as_const(adapter.moment_b).view()).allFinite(),
        non_finite, name + ": reorder by moments that are not finite");
    const detail::MomentFactor<DoubleMatrix> fa(as_eigen(std::as_const(adapter.moment_a).view()).template cast<double>());
    const detail::MomentFactor<DoubleMatrix> fb(as_eigen(std::as_const(adapter.moment_b).view()).template cast<double>());
    const Eigen::JacobiSVD<DoubleMatrix> svd(fb.l.transpose() * fa.l, Eigen::ComputeFullU | Eigen::ComputeFullV);
    sigma = svd.singularValues();
    new_b = (fb.inverse_transpose * svd.matrixU()).transpose() * b;
    new_a = (fa.inverse_transpose * svd.matrixV()).transpose() * a;
  } else {
    const Eigen::HouseholderQR<DoubleMatrix> qa(a.transpose()), qb(b.transpose());
    const Index ka = std::min(r, adapter.in()), kb = std::min(r, adapter.out());
    const DoubleMatrix ra = qa.matrixQR().topRows(ka).template triangularView<Eigen::Upper>();
    const DoubleMatrix rb = qb.matrixQR().topRows(kb).template triangularView<Eigen::Upper>();
    const Eigen::JacobiSVD<DoubleMatrix> svd(rb * ra.transpose(), Eigen::ComputeThinU | Eigen::ComputeThinV);
    sigma = svd.singularValues();
    const Index k = sigma.size();
    const auto expand = [k](const auto& qr, Index rows, const DoubleMatrix& vectors) {
      DoubleMatrix wide = DoubleMatrix::Zero(rows, k);
      wide.topRows(vectors.rows()) = vectors;
      return DoubleMatrix((qr.householderQ() * wide).transpose());
    };
    new_b = expand(qb, adapter.out(), svd.matrixU());
    new_a = expand(qa, adapter.in(), svd.matrixV());
  }

  std::vector<double> values(sigma.data(), sigma.data() + sigma.size());
  double largest = 0.0;
  Eigen::VectorXd weight(sigma.size());
  for (Index i = 0; i < sigma.size(); ++i) {
    weight[i] = sigma[i] * new_a.row(i).norm() * new_b.row(i).norm();
    largest = std::max(largest, weight[i]);
  }
  if (largest == 0.0) return std::vector<double>(values.size());  // B is still zero: nothing to order
  for (Index i = 0; i < r; ++i) {
    const bool kept = i < sigma.size() && weight[i] > 1e-9 * largest;
    const double root = kept ? std::sqrt(weight[i]) : 0.0;
    for (Index j = 0; j < adapter.out(); ++j)
      adapter.b().value(i, j) = kept ? static_cast<S>(new_b(i, j) * (root / new_b.row(i).norm())) : S{};
    if (kept)
      for (Index j = 0; j < adapter.in(); ++j) adapter.a().value(i, j) = static_cast<S>(new_a(i, j) * (root / new_a.row(i).norm()));
  }
  return values;
}

}  // namespace qdylora
