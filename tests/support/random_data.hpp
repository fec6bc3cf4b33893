// Random test data, the same on every platform: views of any stride, and storage that notices a write beside its view.
#pragma once

#include <cmath>
#include <limits>
#include <vector>

#include <qdylora/core/matrix.hpp>
#include <qdylora/core/random.hpp>

namespace test {

using qdylora::MatrixView;
using qdylora::Matrix;
using qdylora::Index;
using qdylora::Rng;
using qdylora::Scalar;

/// A value rounded to T.
template <Scalar T>
T scalar(double value) {
  if constexpr (std::same_as<T, double>) return value;
  else return static_cast<T>(static_cast<float>(value));
}

/// N(0, deviation^2) samples; the same for every T but for their rounding.
template <Scalar T>
void fill_normal(MatrixView<T> x, Rng& rng, double deviation = 1.0) {
  for (Index i = 0; i < x.rows; ++i)
    for (Index j = 0; j < x.cols; ++j) x(i, j) = scalar<T>(deviation * static_cast<double>(rng.normal()));
}

/// Const, so that the view of a temporary is read-only.
template <Scalar T>
const Matrix<T> normal_matrix(Index rows, Index cols, std::uint64_t seed, double deviation = 1.0) {
  Matrix<T> x(rows, cols);
  Rng rng(seed, qdylora::Purpose::data);
  fill_normal(x.view(), rng, deviation);
  return x;
}

/// The same elements in another type.
template <Scalar To, class From>
const Matrix<To> converted(MatrixView<From> x) {
  Matrix<To> y(x.rows, x.cols);
  for (Index i = 0; i < x.rows; ++i)
    for (Index j = 0; j < x.cols; ++j) y(i, j) = scalar<To>(static_cast<double>(x(i, j)));
  return y;
}

template <class T>
std::vector<T> values_of(MatrixView<T> x) {
  std::vector<T> values;
  for (Index i = 0; i < x.rows; ++i) values.insert(values.end(), x.row(i), x.row(i) + x.cols);
  return values;
}

}  // namespace test
