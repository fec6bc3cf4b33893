// libFuzzer harness: any bytes as a GGUF file. See README.md.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <span>
#include <string>

#include <qdylora/io/gguf.hpp>

#include "fuzz/memory_file.hpp"

namespace qd = qdylora;

namespace {

template <class T>
void read_as(const qd::GgufMetadata& metadata, const std::string& key) {
  try {
    metadata.get<T>(key);
  } catch (const qd::Error&) {
  }
  try {
    metadata.array<T>(key);
  } catch (const qd::Error&) {
  }
}

void read_all(const qd::GgufFile& file) {
  for (const auto& [key, value] : file.metadata().entries()) {
    read_as<std::string>(file.metadata(), key);
    read_as<bool>(file.metadata(), key);
    read_as<std::uint8_t>(file.metadata(), key);
    read_as<std::int32_t>(file.metadata(), key);
    read_as<double>(file.metadata(), key);
  }
  for (const auto& tensor : file.tensors()) {
    qd::Buffer<std::byte> bytes(static_cast<qd::Index>(tensor.size));
    file.read(tensor.name, bytes.span());
    try {
      const auto matrix = file.matrix(tensor.name);
      if (matrix.size() > 0) {
        qd::Matrix<float> last(1, matrix.cols());
        file.read_rows(tensor.name, matrix.rows() - 1, last.view());
      }
    } catch (const qd::Error& error) {
      if (error.code() != qd::Errc::unsupported && error.code() != qd::Errc::shape) std::abort();  // nothing else can be wrong
    }
  }
}

}  // namespace

extern "C" std::size_t LLVMFuzzerMutate(std::uint8_t* data, std::size_t size, std::size_t most);

// Files are records of varying length without separators, so an inserted byte breaks all that follows. Half of the mutations
// overwrite one 4- or 8-byte field with a value at an edge instead; without seeds fuzzing starts from the header of an empty file.
extern "C" std::size_t LLVMFuzzerCustomMutator(std::uint8_t* data, std::size_t size, std::size_t most, unsigned seed) {
  if (size < 24) {
    if (most < 24) return LLVMFuzzerMutate(data, size, most);
    constexpr std::uint8_t empty[24] = {'G', 'G', 'U', 'F', 3};
    std::memcpy(data, empty, sizeof(empty));
    return sizeof(empty);
  }
  if (seed % 2 == 0) return LLVMFuzzerMutate(data, size, most);
  constexpr std::uint64_t edges[] = {0,          1,          2,          8,          9,           31,          32,
                                     33,         64,         255,        1ull << 20, 1ull << 26,  1ull << 31,  (1ull << 32) - 1,
                                     1ull << 32, 1ull << 59, 1ull << 61, 1ull << 62, ~0ull >> 1,  1ull << 63,  ~0ull - 31,
                                     ~0ull - 7,  ~0ull};
  const std::uint64_t value = edges[(seed >> 1) % std::size(edges)];
  const std::size_t width = (seed >> 6) % 2 == 0 ? 4 : 8;
  std::memcpy(data + (seed >> 7) % (size - width + 1), &value, width);
  return size;
}

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static test::MemoryFile memory;
  memory.set(std::as_bytes(std::span(data, size)));
  try {
    read_all(qd::GgufFile(memory.path()));
  } catch (const qd::Error&) {
  }
  return 0;
}
