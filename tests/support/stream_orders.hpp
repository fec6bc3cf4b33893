// The orders in which a device may do the work of several streams. On the emulator a test meets each; on a GPU what comes.
#pragma once

#include <cuda_runtime.h>

#include "support/catch.hpp"

namespace test {

template <class F>
void in_every_order(F&& f) {
#ifdef QDYLORA_CUDA_EMULATOR
  using emulator::Late;
  struct Restored {
    ~Restored() { emulator::machine().late = Late::none; }
  } restored;
  for (const Late late : {Late::none, Late::first, Late::others}) {
    CAPTURE(static_cast<int>(late));
    emulator::machine().late = late;
    f();
  }
#else
  f();
#endif
}

}  // namespace test
