// add_column_sums: the gradient of what is added to every row of an output, a bias.
#pragma once

#include <utility>

#include <qdylora/backend.hpp>

namespace qdylora::detail {

/// sums [1, cols] += the sums of x's columns.
template <class Backend, class T, class S>
void add_column_sums(const Backend& backend, MatrixView<const T> x, MatrixView<S> sums) {
  auto ones = temporary<S>(backend, x.rows, 1);
  backend.fill(ones.view(), S{1});
  backend.weight_gradient(std::as_const(ones).view(), x, sums, Update::accumulate);
}

}  // namespace qdylora::detail
