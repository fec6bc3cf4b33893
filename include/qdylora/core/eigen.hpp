// The one header that includes Eigen, its warnings fenced, and the bridge between its matrices and views. Eigen never occurs in a
// signature of the library; as_eigen and as_view are for those who have Eigen matrices of their own.
#pragma once

#if defined(__GNUC__)
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wconversion"
#pragma GCC diagnostic ignored "-Wsign-conversion"
#pragma GCC diagnostic ignored "-Wshadow"
#pragma GCC diagnostic ignored "-Wpedantic"
#pragma GCC diagnostic ignored "-Wunused-parameter"
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
#if !defined(__clang__)
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC diagnostic ignored "-Wclass-memaccess"
#endif
#endif
#include <Eigen/Dense>
#if defined(__GNUC__)
#pragma GCC diagnostic pop
#endif

#include <qdylora/core/view.hpp>

static_assert(EIGEN_VERSION_AT_LEAST(3, 4, 0), "qdylora needs Eigen 3.4 or newer");

namespace qdylora {

/// A row-major Eigen matrix.
template <class S>
using EigenMatrix = Eigen::Matrix<std::remove_const_t<S>, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

/// The elements of a view as an Eigen map; nothing is copied.
template <class S>
auto as_eigen(MatrixView<S> view) {
  using Target = std::conditional_t<std::is_const_v<S>, const EigenMatrix<S>, EigenMatrix<S>>;
  return Eigen::Map<Target, 0, Eigen::OuterStride<>>(view.data, view.rows, view.cols, Eigen::OuterStride<>(view.stride));
}

/// A view of what has row-major elements of its own: a matrix, map, ref, or block of them; nothing is copied. Its elements are const where
/// Eigen's are. Throws Errc::unsupported for columns that are not adjacent.
template <class M>
  requires std::is_base_of_v<Eigen::DenseBase<std::remove_cvref_t<M>>, std::remove_cvref_t<M>>
auto as_view(M&& matrix) {
  using Type = std::remove_cvref_t<M>;
  static_assert((int(Type::Flags) & int(Eigen::DirectAccessBit)) != 0, "an expression has no elements: evaluate it first");
  static_assert(Type::IsRowMajor, "views are row-major: use Eigen::RowMajor");
  static_assert(std::is_lvalue_reference_v<M> || !std::is_base_of_v<Eigen::PlainObjectBase<Type>, Type>,
                "a view does not keep a temporary matrix alive: name it first");
  QDYLORA_EXPECTS(matrix.innerStride() == 1 || matrix.cols() <= 1, unsupported,
                  "as_view: columns are " + std::to_string(matrix.innerStride()) + " elements apart, not adjacent");
  return MatrixView(matrix.data(), matrix.rows(), matrix.cols(), matrix.outerStride());
}

}  // namespace qdylora
