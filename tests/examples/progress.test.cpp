#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <cstdio>
#include <limits>
#include <sstream>
#include <string>
#include <vector>

#include "../../examples/common/progress.hpp"
#include "../../examples/common/signals.hpp"
#include "support/catch.hpp"

namespace progress_test {

namespace qd = qdylora;
namespace ex = qdylora::examples;

namespace {

using Clock = ex::Progress::Clock;

Clock::time_point after(double seconds) {
  return Clock::time_point{} + std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double>(seconds));
}

/// What a run of `steps` steps, `step_seconds` each, prints.
std::string output_of(bool terminal, qd::Index steps, double step_seconds) {
  std::FILE* file = std::tmpfile();
  REQUIRE(file != nullptr);
  {
    ex::Progress progress(steps, 0, {.out = file, .terminal = terminal}, after(0));
    for (qd::Index step = 1; step <= steps; ++step) {
      progress.update(step, 100, 2.5, 8, after(step_seconds * static_cast<double>(step)));
    }
  }
  std::rewind(file);
  std::string text;
  for (int c = std::fgetc(file); c != EOF; c = std::fgetc(file)) text += static_cast<char>(c);
  std::fclose(file);
  return text;
}

}  // namespace

TEST_CASE("memory is read from the lines VmRSS and VmHWM", "[progress]") {
  std::istringstream status("Name:\tVmRSS: 5\nVmPeak:\t  999 kB\nVmHWM:\t    2048 kB\nVmRSS:\t 1024 kB\nThreads:\t3");
  const ex::MemoryUse use = ex::read_memory_use(status);
  CHECK(use.bytes == 1024 * 1024);
  CHECK(use.peak == 2048 * 1024);
  std::istringstream other("nothing of this kind");
  CHECK(ex::read_memory_use(other).peak == 0);
#if defined(__linux__)
  const ex::MemoryUse before = ex::memory_use();
  CHECK(before.bytes > 0);
  CHECK(before.peak >= before.bytes);
  std::vector<char> block(std::size_t{64} << 20, 'x');
  CHECK(block[block.size() / 2] == 'x');
  CHECK(ex::memory_use().peak >= before.bytes + (qd::Index{60} << 20));
#endif
}

TEST_CASE("durations are written as clocks do", "[progress]") {
  CHECK(ex::duration_text(0) == "0:00");
  CHECK(ex::duration_text(7.4) == "0:07");
  CHECK(ex::duration_text(754) == "12:34");
  CHECK(ex::duration_text(3723) == "1:02:03");
  CHECK(ex::duration_text(-5) == "0:00");
  CHECK(ex::duration_text(std::numeric_limits<double>::infinity()) == "0:00");
}

TEST_CASE("the line tells step, loss, rank, time left, speed and memory", "[progress]") {
  const ex::ProgressState state{.step = 42, .total = 100, .loss = 1.23456, .rank = 16, .tokens_per_second = 236.4,
                                .seconds_left = 83, .memory = {.bytes = 410'000'000, .peak = 620'000'000}};
  CHECK(ex::progress_text(state) == "42/100  loss 1.2346  rank 16  left 1:23  236 tokens/s  memory 410 MB, peak 620 MB");
  CHECK(ex::progress_text({.step = 0, .total = 9}) == "0/9  left ?  0 tokens/s");
  CHECK(ex::progress_bar({.step = 12, .total = 24}, 200).starts_with("[############............] 12/24"));
  CHECK(ex::progress_bar({.step = 30, .total = 24}, 200).starts_with("[########################] 30/24"));
  CHECK(ex::progress_bar({.step = 0, .total = 0}, 200).starts_with("[........................] 0/0"));
  for (const std::size_t columns : {5u, 40u, 80u}) CHECK(ex::progress_bar(state, columns).size() <= columns);
  CHECK(ex::progress_bar(state, 90).starts_with("42/100"));  // the numbers matter more than the bar
}

TEST_CASE("speed and time left come from the steps of this run", "[progress]") {
  std::FILE* file = std::tmpfile();
  REQUIRE(file != nullptr);
  {
    ex::Progress progress(30, 10, {.out = file, .terminal = false}, after(100));
    progress.update(11, 500, 1.0, {}, after(102));
    progress.update(12, 300, 1.0, {}, after(104));
    CHECK(progress.state().tokens_per_second == Approx(200));
    CHECK(progress.state().seconds_left == Approx(36));
    CHECK(!progress.state().rank);
  }
  std::fclose(file);
}

TEST_CASE("a terminal gets one line, redrawn at most ten times a second", "[progress]") {
  const std::string text = output_of(true, 1000, 0.01);  // ten seconds
  const auto drawn = std::count(text.begin(), text.end(), '\r');
  CHECK(drawn >= 85);
  CHECK(drawn <= 101);
  CHECK(std::count(text.begin(), text.end(), '\n') == 1);
  CHECK(text.back() == '\n');
  CHECK(text.find("1000/1000") != text.npos);
}

TEST_CASE("elsewhere there is a plain line every 25 steps or ten seconds", "[progress]") {
  const std::string fast = output_of(false, 100, 0.01);
  CHECK(std::count(fast.begin(), fast.end(), '\n') == 4);
  CHECK(fast.starts_with("step 25/100  loss 2.5000  rank 8  left "));
  CHECK(fast.find('\r') == fast.npos);
  CHECK(fast.find('\x1b') == fast.npos);
  const std::string slow = output_of(false, 10, 4);
  CHECK(std::count(slow.begin(), slow.end(), '\n') == 4);  // after steps 3, 6, 9 and the last
}

TEST_CASE("the first signal asks to stop, and the old handling comes back", "[signals]") {
  for (const int signal : {SIGINT, SIGTERM}) {
    ex::StopSignal stop;
    CHECK(!stop.requested());
    std::raise(signal);
    CHECK(stop.requested());
    CHECK_THROWS_AS(ex::StopSignal(), qd::Error);
  }
  struct sigaction now {};
  ::sigaction(SIGINT, nullptr, &now);
  const ex::StopSignal fresh;
  CHECK(!fresh.requested());
  struct sigaction caught {};
  ::sigaction(SIGINT, nullptr, &caught);
  CHECK(now.sa_handler != caught.sa_handler);
}

TEST_CASE("the second signal ends the process", "[signals]") {
  const ::pid_t child = ::fork();
  REQUIRE(child >= 0);
  if (child == 0) {
    std::signal(SIGINT, SIG_DFL);
    std::signal(SIGTERM, SIG_DFL);
    const ex::StopSignal stop;
    std::raise(SIGINT);
    if (stop.requested()) std::raise(SIGTERM);
    ::_exit(0);
  }
  int status = 0;
  REQUIRE(::waitpid(child, &status, 0) == child);
  CHECK(WIFSIGNALED(status));
  CHECK(WTERMSIG(status) == SIGTERM);
}

}  // namespace progress_test
