// libFuzzer harness: any bytes as a .npy file. See README.md.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

#include <qdylora/io/npy.hpp>

#include "fuzz/memory_file.hpp"

namespace qd = qdylora;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static test::MemoryFile memory;
  memory.set(std::as_bytes(std::span(data, size)));
  try {
    const qd::NpyFile file(memory.path());
    if (file.bytes().span().size() > size) std::abort();
    (void)file.matrix();
  } catch (const qd::Error&) {
  }
  return 0;
}
