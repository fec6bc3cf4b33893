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

/// Those of one adapter and all its rows, kept while it stays as it is.
template <Scalar T, MemoryResource Memory>
class KeptFactors {
 public:
  using Factors = RoundedFactors<T, Memory>;

  /// Rounded anew, in the same memory, since forget(): a recorded pass finds them where they were. Several threads may ask at a time.
  template <class S, class Backend>
  std::shared_ptr<const Factors> find(const LoRAAdapter<S, Memory>& adapter, const Backend& backend) {
    const std::scoped_lock lock(mutex_);
    if (!kept_) kept_ = std::make_shared<Factors>(adapter, adapter.max_rank(), backend);
    else if (!current_) kept_->assign(adapter, backend);
    current_ = true;
    return kept_;
  }
  void forget() noexcept { current_ = false; }
  /// Gives their memory back.
  void release() noexcept { kept_.reset(); }

 private:
  std::mutex mutex_;
  std::shared_ptr<Factors> kept_;
  bool current_ = false;
};

}  // namespace qdylora
