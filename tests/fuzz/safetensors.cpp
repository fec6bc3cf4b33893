// libFuzzer harness: any bytes as a safetensors file. See README.md.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

#include <qdylora/io/safetensors.hpp>

#include "fuzz/memory_file.hpp"

namespace qd = qdylora;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static test::MemoryFile memory;
  memory.set(std::as_bytes(std::span(data, size)));
  try {
    const qd::SafetensorsFile file(memory.path());
    std::uint64_t total = 0;
    for (const auto& tensor : file.tensors()) {
      total += static_cast<std::uint64_t>(file.bytes(tensor.name).size());
      try {
        const auto matrix = file.matrix(tensor.name);
        if (matrix.size() > 0) {
          qd::Matrix<float> last(1, matrix.cols());
          file.read_rows(tensor.name, matrix.rows() - 1, last.view());
        }
      } catch (const qd::Error& error) {
        if (error.code() != qd::Errc::dtype && error.code() != qd::Errc::shape) std::abort();  // nothing else is left to go wrong
      }
    }
    if (total > size) std::abort();  // tensors of an accepted file do not overlap
  } catch (const qd::Error&) {
  }
  return 0;
}
