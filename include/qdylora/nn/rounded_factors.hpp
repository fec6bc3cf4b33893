// A and B of an adapter in the type of activations, for a product that takes an adapter along (HasAdapterTerm): where few tokens are
// multiplied, what a product costs is what it reads, and this is half of what float is.
#pragma once

#include <qdylora/backend.hpp>
#include <qdylora/nn/lora_adapter.hpp>

namespace qdylora {

/// The most rows of x for which a layer that does not train keeps them: of more, rounding them is little beside the product.
inline constexpr Index most_rows_of_kept_factors = 32;

/// The first rows of both, a [rank, in] and b [rank, out].
template <Scalar T, MemoryResource Memory>
struct RoundedFactors {
  Matrix<T, Memory> a, b;

  /// In the memory of those that were assigned before, which are of the same shape.
  template <class S, class Backend>
  void assign(const LoRAAdapter<S, Memory>& adapter, Index rank, const Backend& backend) {
    if (a.size() == 0) {
      a = temporary<T>(backend, rank, adapter.in());
      b = temporary<T>(backend, rank, adapter.out());
    }
    backend.copy(adapter.a().value.view().top_rows(rank), a.view());
    backend.copy(adapter.b().value.view().top_rows(rank), b.view());
  }
};

}  // namespace qdylora
