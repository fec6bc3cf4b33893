// What passes make of a layer's parameters, kept while those stay as they are.
#pragma once

#include <memory>
#include <mutex>

#include <qdylora/backend.hpp>

namespace qdylora {

/// One such value. Its memory stays its own for as long as this lives: a recorded pass may read it.
template <class Value>
class Kept {
 public:
  /// The value as make(Value&) last left it, which is called if forget() was since. Null in a pass that is recorded and would have to make
  /// it: nothing is done before that is launched, and what it makes is its own. Several threads may ask at a time.
  template <class Backend, class Make>
  std::shared_ptr<const Value> find(const Backend& backend, const Make& make) {
    const std::scoped_lock lock(mutex_);
    if (current_) return kept_;
    if constexpr (!Backend::Memory::host)
      if (backend.recording()) return nullptr;
    if (!kept_) kept_ = std::make_shared<Value>();
    make(*kept_);
    current_ = true;
    return kept_;
  }
  void forget() noexcept {
    const std::scoped_lock lock(mutex_);
    current_ = false;
  }

 private:
  std::mutex mutex_;
  std::shared_ptr<Value> kept_;
  bool current_ = false;
};

}  // namespace qdylora
