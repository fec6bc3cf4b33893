// A and B of an adapter in the type of activations, for a product that takes an adapter along (HasAdapterTerm): where few tokens are
// multiplied, what a product costs is what it reads, and this is half of what float is.
#pragma once

#include <memory>
#include <mutex>

#include <qdylora/backend.hpp>
#include <qdylora/nn/lora_adapter.hpp>

namespace qdylora {

/// The first rows of both, a [rank, in] and b [rank, out].
template <Scalar T, MemoryResource Memory>
struct RoundedFactors {
  Matrix<T, Memory> a, b;

  template <class S, class Backend>
  RoundedFactors(const LoRAAdapter<S, Memory>& adapter, Index rank, const Backend& backend)
      : a(temporary<T>(backend, rank, adapter.in())), b(temporary<T>(backend, rank, adapter.out())) {
    assign(adapter, backend);
  }
  template <class S, class Backend>
  void assign(const LoRAAdapter<S, Memory>& adapter, const Backend& backend) {
    backend.copy(adapter.a().value.view().top_rows(a.rows()), a.view());
    backend.copy(adapter.b().value.view().top_rows(b.rows()), b.view());
  }
};

/// Those of one adapter and all its rows, kept while it stays as it is, in memory that is theirs for as long as this lives: a recorded pass
/// may read them.
template <Scalar T, MemoryResource Memory>
class KeptFactors {
 public:
  using Factors = RoundedFactors<T, Memory>;

  /// Rounded anew since forget(). Of a pass that is recorded they are its own then, as nothing is done before it is launched. Several threads
  /// may ask at a time.
  template <class S, class Backend>
  std::shared_ptr<const Factors> find(const LoRAAdapter<S, Memory>& adapter, const Backend& backend) {
    const std::scoped_lock lock(mutex_);
    if (current_) return kept_;
    if (backend.recording()) return std::make_shared<const Factors>(adapter, adapter.max_rank(), backend);
    if (!kept_) kept_ = std::make_shared<Factors>(adapter, adapter.max_rank(), backend);
    else kept_->assign(adapter, backend);
    current_ = true;
    return kept_;
  }
  void forget() noexcept {
    const std::scoped_lock lock(mutex_);
    current_ = false;
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<Factors> kept_;
  bool current_ = false;
};

}  // namespace qdylora
