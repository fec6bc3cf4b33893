#include <qdylora/cpu/parallel.hpp>

#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <memory>
#include <set>
#include <stdexcept>
#include <thread>
#include <vector>

#include "support/catch.hpp"

namespace parallel_test {

namespace qd = qdylora;
using qd::Index;

TEST_CASE("a pool runs every task once, whatever their number and the threads'", "[cpu]") {
  for (const int threads : {1, 2, 3, 8}) {
    qd::ThreadPool pool(threads);
    CHECK(pool.threads() == threads);
    for (const Index count : {0, 1, 2, 3, 7, 8, 9, 1000}) {
      CAPTURE(threads, count);
      std::vector<std::atomic<int>> runs(static_cast<std::size_t>(count));
      pool.run(count, [&](Index i) { ++runs[static_cast<std::size_t>(i)]; });
      int wrong = 0;
      for (const auto& n : runs) wrong += n != 1;
      CHECK(wrong == 0);
    }
    int calls = 0;
    pool.run(-3, [&](Index) { ++calls; });
    CHECK(calls == 0);
  }
}

TEST_CASE("a pool has a thread at least, and as many as the hardware by default", "[cpu]") {
  CHECK(qd::ThreadPool().threads() >= 1);
  CHECK(qd::ThreadPool(-1).threads() == qd::ThreadPool().threads());
  qd::ThreadPool never_used(8);  // starts and stops without a loop
}

TEST_CASE("all threads of a pool take part, when there is work for all", "[cpu]") {
  qd::ThreadPool pool(4);
  std::mutex mutex;
  std::set<std::thread::id> seen;
  std::atomic<int> inside{0};
  pool.run(4, [&](Index) {
    ++inside;
    // Each waits for the others, so that no thread can take two; the time-out turns a serial pool into a failure and not a hang.
    for (int wait = 0; inside < 4 && wait < 5000; ++wait) std::this_thread::sleep_for(std::chrono::milliseconds(1));
    const std::lock_guard lock(mutex);
    seen.insert(std::this_thread::get_id());
  });
  CHECK(seen.size() == 4);
}

TEST_CASE("many short loops, with and without a pause between them, lose no task", "[cpu]") {
  qd::ThreadPool pool(3);
  Index sum = 0;
  for (int round = 0; round < 3000; ++round) {
    std::atomic<Index> part{0};
    pool.run(5, [&](Index i) { part += i; });
    sum += part;
    if (round % 500 == 0) std::this_thread::sleep_for(std::chrono::milliseconds(20));  // long enough that workers sleep
  }
  CHECK(sum == 3000 * 10);
}

TEST_CASE("an exception of a task reaches the caller, the lowest task's when there are several", "[cpu]") {
  for (const int threads : {1, 2, 8}) {
    qd::ThreadPool pool(threads);
    for (int repeat = 0; repeat < 20; ++repeat) {
      std::string what;
      try {
        pool.run(100, [](Index i) {
          if (i == 37 || i == 38 || i == 90) throw std::runtime_error(std::to_string(i));
        });
      } catch (const std::runtime_error& error) {
        what = error.what();
      }
      CHECK(what == "37");
    }
    std::atomic<int> runs{0};  // the pool works on after that
    pool.run(50, [&](Index) { ++runs; });
    CHECK(runs == 50);
  }
}

TEST_CASE("all tasks have run when an exception reaches the caller", "[cpu]") {
  for (const int threads : {1, 3}) {
    qd::ThreadPool pool(threads);
    std::atomic<int> runs{0};
    const auto body = [&](Index i) {
      ++runs;
      if (i < 2) throw std::runtime_error("early");
    };
    CHECK_THROWS_AS(pool.run(20, body), std::runtime_error);
    CHECK(runs == 20);
  }
}

#if defined(__has_feature)
#define HAS_FEATURE(feature) __has_feature(feature)
#else
#define HAS_FEATURE(feature) 0
#endif
#if !defined(__SANITIZE_THREAD__) && !HAS_FEATURE(thread_sanitizer)  // which ends a process that is forked off one with threads
TEST_CASE("a forked process runs loops on its own thread, and ends", "[cpu]") {
  auto pool = std::make_unique<qd::ThreadPool>(3);
  std::atomic<int> before{0};
  pool->run(64, [&](Index) { ++before; });
  const pid_t child = fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    alarm(20);  // a hang is a failure
    const auto self = std::this_thread::get_id();
    int runs = 0, elsewhere = 0;
    pool->run(64, [&](Index) { ++runs, elsewhere += std::this_thread::get_id() != self; });
    pool.reset();
    qd::ThreadPool own(3);  // made here, it has threads
    std::atomic<int> again{0};
    own.run(64, [&](Index) { ++again; });
    _exit(runs == 64 && elsewhere == 0 && again == 64 ? 0 : 1);
  }
  int status = -1;
  REQUIRE(waitpid(child, &status, 0) == child);
  CHECK((WIFEXITED(status) && WEXITSTATUS(status) == 0));
  std::atomic<int> after{0};
  pool->run(64, [&](Index) { ++after; });
  CHECK(after == 64);
}
#endif

TEST_CASE("all tasks have ended when an exception reaches the caller", "[cpu]") {
  qd::ThreadPool pool(4);
  std::atomic<int> inside{0};
  CHECK_THROWS_AS(pool.run(64,
                           [&](Index i) {
                             ++inside;
                             std::this_thread::sleep_for(std::chrono::microseconds(200));
                             --inside;
                             if (i == 0) throw std::runtime_error("first");
                           }),
                  std::runtime_error);
  CHECK(inside == 0);
}

TEST_CASE("a loop inside a task runs in that task, of the same pool or of another", "[cpu]") {
  qd::ThreadPool pool(4), other(4);
  std::atomic<int> runs{0}, elsewhere{0};
  pool.run(8, [&](Index) {
    const auto self = std::this_thread::get_id();
    const auto body = [&](Index) {
      ++runs;
      elsewhere += std::this_thread::get_id() != self;
      std::this_thread::sleep_for(std::chrono::microseconds(100));  // time enough for another thread to take a task
    };
    pool.run(16, body);
    other.run(16, body);
  });
  CHECK(runs == 8 * 16 + 8 * 16);
  CHECK(elsewhere == 0);
}

TEST_CASE("after a nested loop, and after one that threw, a task's own later loops still run inside it", "[cpu]") {
  qd::ThreadPool pool(4);
  std::atomic<int> elsewhere{0}, runs{0};
  pool.run(8, [&](Index) {
    const auto self = std::this_thread::get_id();
    const auto body = [&](Index) {
      ++runs;
      elsewhere += std::this_thread::get_id() != self;
    };
    pool.run(4, body);
    try {
      pool.run(4, [](Index) { throw 1; });
    } catch (int) {
    }
    pool.run(4, body);
  });
  CHECK(runs == 64);
  CHECK(elsewhere == 0);
}

TEST_CASE("callers on several threads share a pool, each getting all of its own tasks", "[cpu]") {
  qd::ThreadPool pool(3);
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int c = 0; c < 4; ++c)
    callers.emplace_back([&] {
      for (int round = 0; round < 300; ++round) {
        std::vector<std::atomic<int>> runs(17);
        pool.run(17, [&](Index i) { ++runs[static_cast<std::size_t>(i)]; });
        for (const auto& n : runs) wrong += n != 1;
      }
    });
  for (auto& caller : callers) caller.join();
  CHECK(wrong == 0);
}

TEST_CASE("what tasks wrote is visible to the caller", "[cpu]") {
  qd::ThreadPool pool(4);
  std::vector<Index> plain(1000);
  for (Index round = 1; round < 200; ++round) {
    pool.run(1000, [&](Index i) { plain[static_cast<std::size_t>(i)] = round * i; });
    Index wrong = 0;
    for (Index i = 0; i < 1000; ++i) wrong += plain[static_cast<std::size_t>(i)] != round * i;
    REQUIRE(wrong == 0);
  }
}

}  // namespace parallel_test
