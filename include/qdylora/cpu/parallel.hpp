// Threads of the CPU backend: parallel_for over a fixed number of tasks. Which thread runs a task never changes its result: callers cut
// work by shape alone and give every output element to one task.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <exception>
#include <functional>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <type_traits>
#include <utility>
#include <vector>

#include <qdylora/core/error.hpp>
#include <qdylora/core/scalar.hpp>

#if defined(__unix__)
#include <pthread.h>
#endif

namespace qdylora {

/// What a trainer with its own threads gives the backend instead of ours: runs f(0) ... f(count - 1), each once, in any order, on any
/// threads, and returns when all are done. Until then the calling thread may do nothing else with this library: what it has at hand lies in
/// scratch memory of that thread. A pool whose waiting threads take up other work has to be kept from it (tbb::this_task_arena::isolate).
using Executor = std::function<void(Index count, const std::function<void(Index)>& f)>;

/// The body f of a loop, borrowed: it may not outlive f. One type for every f, so that what runs loops is compiled once.
class LoopBody {
 public:
  template <class F>
    requires(!std::is_same_v<std::remove_cvref_t<F>, LoopBody> && std::is_invocable_v<F&, Index>)
  LoopBody(F&& f) noexcept  // NOLINT: a lambda is passed as it stands
      : context_(const_cast<void*>(static_cast<const void*>(std::addressof(f)))),
        invoke_([](void* context, Index i) { (*static_cast<std::remove_reference_t<F>*>(context))(i); }) {}
  void operator()(Index i) const { invoke_(context_, i); }

 private:
  void* context_;
  void (*invoke_)(void*, Index);
};

namespace detail {

/// How many forks lie between the process that began and this one, counted from the first call on.
inline int forks() noexcept {
  static std::atomic<int> count{0};
#if defined(__unix__)
  [[maybe_unused]] static const int watched = pthread_atfork(nullptr, nullptr, [] { count.fetch_add(1, std::memory_order_relaxed); });
#endif
  return count.load(std::memory_order_relaxed);
}

}  // namespace detail

/// A fork-join pool. The caller works too, so `threads` - 1 are started, at the first call that has use for them. Each thread has a share of
/// a loop's tasks, in a row, and takes what others left when it is done: threads seldom wait for a counter that another one holds. Between
/// calls workers spin for some microseconds (a layer is a chain of short parallel loops) and then sleep. Where the system gives fewer threads
/// than asked for, those there are do the work; so does the calling thread alone in a process that was forked off one with threads, which has
/// none of them. Workers keep the floating-point environment (rounding, denormals) of the thread that made the first call.
class ThreadPool {
 public:
  /// threads = 0: as many as the hardware runs at once.
  explicit ThreadPool(int threads = 0)
      : threads_(threads > 0 ? threads : static_cast<int>(std::max(1u, std::thread::hardware_concurrency()))),
        shares_(static_cast<std::size_t>(threads_)) {}
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;
  ~ThreadPool() {
    if (forked()) {  // the workers are another process's, and what they wait for cannot be destroyed
      static_cast<void>(workers_.release());
      static_cast<void>(wake_.release());
      return;
    }
    stop_.store(true);
    round_.fetch_add(1);
    {
      const std::lock_guard lock(sleep_mutex_);
    }
    wake_->notify_all();
    for (auto& worker : *workers_) worker.join();
  }

  int threads() const noexcept { return threads_; }

  /// Rethrows the exception of the task with the lowest index, after all tasks ended. A nested call, and a call while another thread's
  /// loop holds the pool, runs on the calling thread alone.
  void run(Index count, LoopBody f) {
    if (count <= 0) return;
    if (count == 1 || threads_ == 1 || inside() || forked() || !busy_.try_lock()) return run_alone(count, f);
    const std::lock_guard hold(busy_, std::adopt_lock);
    if (!started_) start();
    if (workers_->empty()) return run_alone(count, f);
    if (++tag_ == 0) {  // after four billion loops tags come again: no share may keep one of before
      for (Share& share : shares_) share.claimed.store(0, std::memory_order_relaxed);
      tag_ = 1;
    }
    body_ = &f;
    count_ = count;
    error_ = nullptr;
    error_task_ = count;
    shares_[0].working.store(static_cast<int>(workers_->size()), std::memory_order_relaxed);
    round_.fetch_add(1, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      {
        const std::lock_guard lock(sleep_mutex_);
      }
      wake_->notify_all();
    }
    work(0);
    for (int spin = 0; shares_[0].working.load(std::memory_order_acquire) > 0; ++spin)
      if (spin > spins_before_yield) std::this_thread::yield();
      else pause();
    if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
  }

 private:
  static constexpr int spins_before_yield = 4000;
  static constexpr int spins_before_sleep = 20000;

  static bool& inside() noexcept {
    thread_local bool value = false;
    return value;
  }
  static void pause() noexcept {
#if defined(__x86_64__) || defined(__i386__)
    __builtin_ia32_pause();
#endif
  }

  bool forked() const noexcept { return detail::forks() != forks_; }

  static void run_alone(Index count, LoopBody f) {
    std::exception_ptr first;
    for (Index i = 0; i < count; ++i) {
      try {
        f(i);
      } catch (...) {
        if (!first) first = std::current_exception();
      }
    }
    if (first) std::rethrow_exception(first);
  }

  void start() {
    started_ = true;
    workers_->reserve(static_cast<std::size_t>(threads_ - 1));
    const std::uint64_t round = round_.load();
    try {
      for (int i = 1; i < threads_; ++i) workers_->emplace_back([this, i, round] { serve(i, round); });
    } catch (const std::system_error&) {  // no more are to be had
    }
  }

  void work(int self) noexcept {
    inside() = true;
    for (int t = 0; t < threads_; ++t) {
      const Index owner = (self + t) % threads_, begin = count_ * owner / threads_, size = count_ * (owner + 1) / threads_ - begin;
      Share& share = shares_[static_cast<std::size_t>(owner)];
      for (Index i = claim(share, size); i < size; i = claim(share, size)) {
        try {
          (*body_)(begin + i);
        } catch (...) {
          const std::lock_guard lock(error_mutex_);
          if (begin + i < error_task_) {
            error_task_ = begin + i;
            error_ = std::current_exception();
          }
        }
      }
    }
    inside() = false;
  }

  struct alignas(64) Share {                // of a loop's tasks
    std::atomic<std::uint64_t> claimed{0};  // above, the tag of the loop of the last claim; below, how many tasks were claimed in it
    std::atomic<int> working{0};            // in the first share: threads that have not ended. Who ends has looked at that share just before.
  };

  /// The next task of a share that nobody has claimed in this loop, or `size`. A loop's first claim sets the count anew: nobody writes into
  /// another thread's share to begin.
  Index claim(Share& share, Index size) const noexcept {
    const std::uint64_t none = std::uint64_t{tag_} << 32;
    std::uint64_t seen = share.claimed.load(std::memory_order_relaxed);
    for (;;) {
      const std::uint64_t now = seen >> 32 == tag_ ? seen : none;
      const auto task = static_cast<Index>(now - none);
      if (task >= size) return size;
      if (share.claimed.compare_exchange_weak(seen, now + 1, std::memory_order_relaxed)) return task;
    }
  }

  void serve(int self, std::uint64_t seen) {
    for (;;) {
      for (int spin = 0; round_.load(std::memory_order_acquire) == seen; ++spin) {
        if (spin < spins_before_sleep) {
          pause();
          continue;
        }
        std::unique_lock lock(sleep_mutex_);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        wake_->wait(lock, [&] { return round_.load(std::memory_order_seq_cst) != seen; });
        sleepers_.fetch_sub(1);
      }
      if (stop_.load()) return;
      ++seen;
      work(self);
      shares_[0].working.fetch_sub(1, std::memory_order_release);
    }
  }

  const int threads_;
  const int forks_ = detail::forks();
  bool started_ = false;
  std::mutex busy_;  // held by the caller whose loop runs
  std::unique_ptr<std::vector<std::thread>> workers_ = std::make_unique<std::vector<std::thread>>();

  // The loop at hand. What threads wait for together lies together, and apart from what others write meanwhile.
  std::vector<Share> shares_;
  alignas(64) std::atomic<std::uint64_t> round_{0};
  std::atomic<bool> stop_{false};
  std::uint32_t tag_ = 0;
  const LoopBody* body_ = nullptr;
  Index count_ = 0;
  alignas(64) std::mutex error_mutex_;
  std::exception_ptr error_;
  Index error_task_ = 0;

  alignas(64) std::atomic<int> sleepers_{0};
  std::mutex sleep_mutex_;
  std::unique_ptr<std::condition_variable> wake_ = std::make_unique<std::condition_variable>();
};

}  // namespace qdylora
