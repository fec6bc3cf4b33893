// The table of rotary position embedding: cosines and sines of every position.
#pragma once

#include <cmath>
#include <string>

#include <qdylora/core/matrix.hpp>

namespace qdylora {

/// [positions, head_dim]: column 2i is cos(p * base^(-2i / head_dim)), column 2i + 1 the sine; computed in double.
template <class S>
Matrix<S> rope_table(Index positions, Index head_dim, double base) {
  QDYLORA_EXPECTS(head_dim > 0 && head_dim % 2 == 0, bad_argument, "rope_table: head_dim " + std::to_string(head_dim) + " is not even");
  Matrix<S> table(positions, head_dim);
  for (Index i = 0; i < head_dim / 2; ++i) {
    const double frequency = std::pow(base, -2.0 * static_cast<double>(i) / static_cast<double>(head_dim));
    for (Index p = 0; p < positions; ++p) {
      const double angle = static_cast<double>(p) * frequency;
      table(p, 2 * i) = static_cast<S>(std::cos(angle));
      table(p, 2 * i + 1) = static_cast<S>(std::sin(angle));
    }
  }
  return table;
}

}  // namespace qdylora
