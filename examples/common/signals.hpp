// Ctrl-C: the first SIGINT or SIGTERM asks for a clean stop, the second one ends the process.
#pragma once

#include <csignal>

#include <qdylora/core/error.hpp>

namespace qdylora::examples {

/// While it lives, signals are caught; a loop asks `requested()` between steps, saves, and returns. One at a time.
class StopSignal {
 public:
  StopSignal() {
    QDYLORA_EXPECTS(!installed_, state_order, "StopSignal: another one is in use");
    installed_ = true;
    flag_ = 0;
    struct sigaction action {};
    action.sa_handler = &StopSignal::handle;
    action.sa_flags = SA_RESTART;  // a read or write that is under way goes on
    ::sigemptyset(&action.sa_mask);
    ::sigaction(SIGINT, &action, &interrupt_);
    ::sigaction(SIGTERM, &action, &terminate_);
  }
  StopSignal(const StopSignal&) = delete;
  StopSignal& operator=(const StopSignal&) = delete;
  ~StopSignal() {
    ::sigaction(SIGINT, &interrupt_, nullptr);
    ::sigaction(SIGTERM, &terminate_, nullptr);
    installed_ = false;
  }

  bool requested() const noexcept { return flag_ != 0; }

 private:
  // A handler gets no argument of its own, so what it writes to has to be global.
  static inline volatile std::sig_atomic_t flag_ = 0;
  static inline bool installed_ = false;

  static void handle(int signal) {
    if (flag_ != 0) {
      std::signal(signal, SIG_DFL);
      std::raise(signal);  // delivered when this handler returns
    }
    flag_ = 1;
  }

  struct sigaction interrupt_ {}, terminate_ {};
};

}  // namespace qdylora::examples
