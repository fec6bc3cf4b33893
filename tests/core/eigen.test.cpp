#include <qdylora/core/eigen.hpp>

#include <type_traits>
#include <vector>

#include "support/catch.hpp"
#include "support/files.hpp"

namespace eigen_test {

namespace qd = qdylora;
using RowMatrix = qd::EigenMatrix<float>;

namespace {

template <class T>
bool views(qd::MatrixView<T> view, const float* data, qd::Index rows, qd::Index cols, qd::Index stride) {
  return view.data == data && view.rows == rows && view.cols == cols && view.stride == stride;
}

}  // namespace

TEST_CASE("as_eigen maps the elements of a view, rows of any stride") {
  float data[12] = {};
  const qd::MatrixView view(data, 3, 2, 4);
  qd::as_eigen(view)(2, 1) = 7.0f;
  CHECK(data[9] == 7.0f);
  CHECK(qd::as_eigen(qd::MatrixView<const float>(view)).sum() == 7.0f);
  CHECK(views(qd::as_view(qd::as_eigen(view)), data, 3, 2, 4));
}

TEST_CASE("as_view sees a row-major matrix in place, const where it is const") {
  RowMatrix matrix = RowMatrix::Zero(3, 4);
  const auto view = qd::as_view(matrix);
  static_assert(std::is_same_v<decltype(view), const qd::MatrixView<float>>);
  CHECK(views(view, matrix.data(), 3, 4, 4));
  view(1, 2) = 5.0f;
  CHECK(matrix(1, 2) == 5.0f);
  const auto read_only = qd::as_view(std::as_const(matrix));
  static_assert(std::is_same_v<decltype(read_only), const qd::MatrixView<const float>>);
  CHECK(read_only.data == matrix.data());
  Eigen::Matrix<float, 2, 3, Eigen::RowMajor> fixed;
  CHECK(views(qd::as_view(fixed), fixed.data(), 2, 3, 3));
  Eigen::RowVectorXf bias(5);
  CHECK(views(qd::as_view(bias), bias.data(), 1, 5, 5));
}

TEST_CASE("as_view sees maps, refs and blocks in place") {
  std::vector<float> data(20);
  Eigen::Map<RowMatrix, 0, Eigen::OuterStride<>> map(data.data(), 4, 3, Eigen::OuterStride<>(5));
  CHECK(views(qd::as_view(map), data.data(), 4, 3, 5));
  Eigen::Map<const RowMatrix> read_only(data.data(), 4, 5);
  static_assert(std::is_same_v<decltype(qd::as_view(read_only)), qd::MatrixView<const float>>);
  CHECK(views(qd::as_view(read_only), data.data(), 4, 5, 5));

  RowMatrix matrix(4, 6);
  Eigen::Ref<RowMatrix> ref = matrix.middleCols(1, 3);
  CHECK(views(qd::as_view(ref), matrix.data() + 1, 4, 3, 6));
  const Eigen::Ref<const RowMatrix> const_ref = matrix;
  static_assert(std::is_same_v<decltype(qd::as_view(const_ref)), qd::MatrixView<const float>>);
  CHECK(views(qd::as_view(const_ref), matrix.data(), 4, 6, 6));

  const auto block = qd::as_view(matrix.block(1, 2, 2, 3));  // a temporary, but of elements that stay
  static_assert(std::is_same_v<decltype(block), const qd::MatrixView<float>>);
  CHECK(views(block, matrix.data() + 8, 2, 3, 6));
  static_assert(std::is_same_v<decltype(qd::as_view(std::as_const(matrix).topRows(2))), qd::MatrixView<const float>>);
}

TEST_CASE("a column-major [features, tokens] is a view [tokens, features] of its transpose") {
  Eigen::MatrixXf matrix(3, 5);
  const auto view = qd::as_view(matrix.transpose());
  CHECK(views(view, matrix.data(), 5, 3, 3));
  view(4, 1) = 2.0f;
  CHECK(matrix(1, 4) == 2.0f);
}

TEST_CASE("columns that are not adjacent are no view") {
  float data[24] = {};
  Eigen::Map<RowMatrix, 0, Eigen::Stride<Eigen::Dynamic, Eigen::Dynamic>> map(data, 3, 4, {8, 2});
  const auto error = test::error_of([&] { qd::as_view(map); });
  REQUIRE(error);
  CHECK(error->code() == qd::Errc::unsupported);
  CHECK(std::string(error->what()).find("2 elements apart") != std::string::npos);
}

}  // namespace eigen_test
