// Fiber: a function on a stack of its own, which runs until it pauses. The emulator switches tens of millions of times; ucontext's switch
// asks the system for the mask of signals each time, which is most of its cost, so on x86-64 there is one that does not.
#pragma once

#include <cstddef>
#include <cstdint>

#if defined(__x86_64__) && !defined(__SANITIZE_ADDRESS__) && !defined(__SANITIZE_THREAD__)
#define QDYLORA_OWN_SWITCH 1
#else
#include <ucontext.h>
#endif

namespace test::emulator {

#if defined(QDYLORA_OWN_SWITCH)

// *left = where the caller's stack ends, with the registers that a call must keep on it; goes on where `entered` ended.
extern "C" void qdylora_switch_stack(void** left, void* entered) noexcept;
asm(R"(
  .text
  .weak qdylora_switch_stack
  .type qdylora_switch_stack, @function
qdylora_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size qdylora_switch_stack, . - qdylora_switch_stack
)");

class Fiber {
 public:
  /// `entry` may not return, nor let an exception out: it ends with a last pause.
  void begin(std::byte* stack, std::size_t bytes, void (*entry)()) {
    auto* top = reinterpret_cast<std::uintptr_t*>(reinterpret_cast<std::uintptr_t>(stack + bytes) & ~std::uintptr_t{15});
    *--top = 0;                                         // as if called: the stack is aligned but for a return address,
    *--top = reinterpret_cast<std::uintptr_t>(entry);   // and the switch returns to its beginning
    for (int saved = 0; saved < 6; ++saved) *--top = 0;
    paused_ = top;
  }
  /// Runs until it pauses.
  void resume() { qdylora_switch_stack(&resumer_, paused_); }
  void pause() { qdylora_switch_stack(&paused_, resumer_); }

 private:
  void* paused_ = nullptr;
  void* resumer_ = nullptr;
};

#else

class Fiber {
 public:
  void begin(std::byte* stack, std::size_t bytes, void (*entry)()) {
    ::getcontext(&paused_);
    paused_.uc_stack.ss_sp = stack;
    paused_.uc_stack.ss_size = bytes;
    paused_.uc_link = nullptr;
    ::makecontext(&paused_, entry, 0);
  }
  void resume() { ::swapcontext(&resumer_, &paused_); }
  void pause() { ::swapcontext(&paused_, &resumer_); }

 private:
  ucontext_t paused_{}, resumer_{};
};

#endif

}  // namespace test::emulator
