// add_if_finite: sums over many steps that one step's NaN must not spoil.
#pragma once

#include <algorithm>
#include <cmath>

#include <qdylora/backend.hpp>

namespace qdylora::detail {

/// y += x and c += a, or neither where a number of x or a is not finite. On a device nothing waits to know.
template <class Backend, class S>
void add_if_finite(const Backend& backend, MatrixView<const S> x, MatrixView<S> y, MatrixView<const S> a, MatrixView<S> c) {
  if constexpr (Backend::Memory::host) {
    const auto finite = [](MatrixView<const S> m) {
      for (Index i = 0; i < m.rows; ++i)
        if (!std::all_of(m.row(i), m.row(i) + m.cols, [](S value) { return std::isfinite(value); })) return false;
      return true;
    };
    if (!finite(x) || !finite(a)) return;
    backend.add(x, y);
    backend.add(a, c);
  } else {
    backend.add_if_finite(x, y, a, c);
  }
}

}  // namespace qdylora::detail
