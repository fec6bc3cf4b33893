// How far a run is: on a terminal one line that is redrawn, elsewhere plain lines now and then.
#pragma once

#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <fstream>
#include <istream>
#include <optional>
#include <string>
#include <string_view>

#include <qdylora/core/error.hpp>
#include <qdylora/core/scalar.hpp>

namespace qdylora::examples {

struct MemoryUse {
  Index bytes = 0;  // resident now
  Index peak = 0;   // and at most so far
};

/// Reads VmRSS and VmHWM as Linux writes them in /proc/<pid>/status; zero where a line is absent.
inline MemoryUse read_memory_use(std::istream& status) {
  MemoryUse use;
  std::string key, line;
  while (status >> key) {
    Index kilobytes = 0;
    if ((key == "VmRSS:" || key == "VmHWM:") && status >> kilobytes) (key == "VmRSS:" ? use.bytes : use.peak) = 1024 * kilobytes;
    status.clear();
    std::getline(status, line);
  }
  return use;
}

/// This process's memory; zero on systems other than Linux.
inline MemoryUse memory_use() {
  std::ifstream status("/proc/self/status");
  return read_memory_use(status);
}

struct ProgressState {
  Index step = 0;  // steps done
  Index total = 0;
  std::optional<double> loss = {};
  std::optional<Index> rank = {};  // of the last step, where it had one
  double tokens_per_second = 0;
  double seconds_left = 0;
  MemoryUse memory = {};
};

namespace detail {

template <class... Values>
std::string format(const char* pattern, Values... values) {
  char buffer[64];
  const int length = std::snprintf(buffer, sizeof buffer, pattern, values...);
  return length < 0 ? std::string{} : std::string(buffer, std::min(static_cast<std::size_t>(length), sizeof buffer - 1));
}

}  // namespace detail

/// "0:07", "12:34", "1:02:03".
inline std::string duration_text(double seconds) {
  const auto whole = std::isfinite(seconds) ? static_cast<long long>(std::clamp(seconds, 0.0, 3.6e8) + 0.5) : 0;
  const long long hours = whole / 3600, minutes = whole / 60 % 60, rest = whole % 60;
  return hours > 0 ? detail::format("%lld:%02lld:%02lld", hours, minutes, rest) : detail::format("%lld:%02lld", minutes, rest);
}

/// The numbers of a state on one line, what matters most first.
inline std::string progress_text(const ProgressState& state) {
  const auto megabytes = [](Index bytes) { return detail::format("%.0f MB", static_cast<double>(bytes) / 1e6); };
  std::string text = std::to_string(state.step) + "/" + std::to_string(state.total);
  if (state.loss) text += detail::format("  loss %.4f", *state.loss);
  if (state.rank) text += "  rank " + std::to_string(*state.rank);
  text += "  left " + (state.step > 0 ? duration_text(state.seconds_left) : std::string("?"));
  text += detail::format("  %.0f tokens/s", state.tokens_per_second);
  if (state.memory.bytes > 0) text += "  memory " + megabytes(state.memory.bytes) + ", peak " + megabytes(state.memory.peak);
  return text;
}

/// The same behind a bar, no wider than `columns`.
inline std::string progress_bar(const ProgressState& state, std::size_t columns) {
  constexpr std::size_t cells = 24;
  const double total = static_cast<double>(std::max<Index>(state.total, 1));
  const auto filled = static_cast<std::size_t>(std::clamp(static_cast<double>(state.step) / total, 0.0, 1.0) * cells);
  const std::string text = progress_text(state);
  const std::string bar = "[" + std::string(filled, '#') + std::string(cells - filled, '.') + "] ";
  return (bar.size() + text.size() <= columns ? bar + text : text).substr(0, columns);
}

struct ProgressOptions {
  std::FILE* out = stderr;
  std::optional<bool> terminal = {};  // nothing: ask the system what `out` is
  Index plain_steps = 25;             // without a terminal, a line at least every so many steps
  double plain_seconds = 10;          // or seconds
};

class Progress {
 public:
  using Clock = std::chrono::steady_clock;

  /// `first_step`: steps that an earlier run has done.
  explicit Progress(Index total, Index first_step = 0, ProgressOptions options = {}, Clock::time_point now = Clock::now())
      : options_(options),
        terminal_(options.terminal.value_or(::isatty(::fileno(options.out)) == 1)),
        first_step_(first_step),
        shown_step_(first_step),
        start_(now),
        shown_(now) {
    QDYLORA_EXPECTS(total >= 0 && first_step >= 0 && options.plain_steps > 0, bad_argument, "Progress: expected counts");
    state_.total = total;
    state_.step = first_step;
  }
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;
  ~Progress() { finish(); }

  /// After a step: `step` counts from 1, `tokens` were read in it. Shows at most ten lines a second.
  void update(Index step, Index tokens, std::optional<double> loss, std::optional<Index> rank = {},
              Clock::time_point now = Clock::now()) {
    tokens_ += tokens;
    const double elapsed = seconds(start_, now);
    const auto done = static_cast<double>(step - first_step_);
    state_.step = step;
    state_.loss = loss;
    state_.rank = rank;
    state_.tokens_per_second = elapsed > 0 ? static_cast<double>(tokens_) / elapsed : 0;
    state_.seconds_left = done > 0 ? elapsed / done * static_cast<double>(std::max<Index>(state_.total - step, 0)) : 0;
    const double waited = seconds(shown_, now);
    const bool due = terminal_ ? waited >= 0.1 : waited >= options_.plain_seconds || step - shown_step_ >= options_.plain_steps;
    if (due || step == state_.total) show(now);
  }

  /// Ends the redrawn line, so that other output can follow. A later update starts a new one.
  void finish() {
    if (!open_) return;
    std::fputc('\n', options_.out);
    std::fflush(options_.out);
    open_ = false;
  }

  const ProgressState& state() const noexcept { return state_; }

 private:
  static double seconds(Clock::time_point from, Clock::time_point to) { return std::chrono::duration<double>(to - from).count(); }

  std::size_t columns() const {
    winsize size{};
    const bool known = ::ioctl(::fileno(options_.out), TIOCGWINSZ, &size) == 0 && size.ws_col > 1;
    return known ? static_cast<std::size_t>(size.ws_col) - 1 : 100;  // the last column would wrap
  }

  void show(Clock::time_point now) {
    state_.memory = memory_use();
    const std::string text = terminal_ ? "\r" + progress_bar(state_, columns()) + "\x1b[K" : "step " + progress_text(state_) + "\n";
    std::fputs(text.c_str(), options_.out);
    std::fflush(options_.out);
    open_ = terminal_;
    shown_ = now;
    shown_step_ = state_.step;
  }

  ProgressOptions options_;
  bool terminal_;
  bool open_ = false;  // the cursor stands at the end of a line that will be redrawn
  ProgressState state_;
  Index first_step_, shown_step_, tokens_ = 0;
  Clock::time_point start_, shown_;
};

}  // namespace qdylora::examples
