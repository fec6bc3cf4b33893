// Work of the host beside the device's.
#pragma once

#include <algorithm>
#include <atomic>
#include <exception>
#include <thread>
#include <vector>

#include <qdylora/core/scalar.hpp>

namespace qdylora::detail {

/// f(0) ... f(count - 1), each once, on as many threads as the machine has processors; returns when all are done. Throws what the first
/// f that failed has thrown; those that had not begun by then are left out. For work that is long beside the start of a thread.
template <class F>
void host_loop(Index count, F& f) {
  std::atomic<Index> next{0};
  std::atomic_flag failed;
  std::exception_ptr failure;
  const auto work = [&] {
    try {
      for (Index i = next++; i < count; i = next++) f(i);
    } catch (...) {
      if (!failed.test_and_set()) failure = std::current_exception();
      next = count;
    }
  };
  const auto processors = static_cast<Index>(std::thread::hardware_concurrency());
  std::vector<std::jthread> others;
  for (Index i = 1; i < std::min(count, processors); ++i) others.emplace_back(work);
  work();
  others.clear();  // joins
  if (failure) std::rethrow_exception(failure);
}

}  // namespace qdylora::detail
