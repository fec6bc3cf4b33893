// What the emulator remembers of a byte of memory.
#pragma once

#include <array>
#include <cstdint>

namespace test::emulator {

inline constexpr int warp_size = 32;

enum class Access { read, write, atomic };

using Clock = std::array<std::uint32_t, warp_size>;  // of each lane of a warp, the last moment that one of them has seen

// Of a byte of shared memory: the last write, and the reads since. Reads of several warps need no times: no thread may write after them.
struct Shadow {
  std::uint64_t block = 0;    // that last touched it: for another one it is new
  std::uint32_t written = 0;  // epochs; the first is 1
  std::uint32_t write_time = 0;
  int writer = -1;
  bool atomic = false;
  int copier = -1;
  std::uint32_t publications = 0;  // of its writer, when it wrote
  int products = 0;                // that are reading it
  std::uint32_t read = 0;
  std::uint32_t reading_warps = 0;
  Clock read_times{};
};

// Who touched a byte of global memory last, and when: a thread of a launch's block.
struct Deed {
  std::uint32_t launch = 0, block = 0, epoch = 0, time = 0;
  std::int16_t thread = 0;
};
struct Trace {
  Deed write, read;
  bool atomic = false;        // the write
  bool several_read = false;  // blocks; of others than the last one nothing is known
};

}  // namespace test::emulator
