// libFuzzer harness: any bytes as a safetensors file with 4-bit weights of bitsandbytes; all that are accepted are decoded.
// See README.md.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <span>

#include <qdylora/io/bitsandbytes.hpp>
#include <qdylora/quant/quantize.hpp>

#include "fuzz/memory_file.hpp"

namespace qd = qdylora;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static test::MemoryFile memory;
  memory.set(std::as_bytes(std::span(data, size)));
  try {
    const qd::SafetensorsFile file(memory.path());
    for (const auto& tensor : file.tensors()) {
      if (!qd::is_bnb_4bit(file, tensor.name)) continue;
      const auto weight = qd::load_bnb_4bit(file, tensor.name);
      if (weight.bytes() > 2 * size) std::abort();  // a weight takes no more memory than its file
      weight.visit([](const auto& view) {
        if constexpr (requires { view.codes; }) {
          qd::Matrix<float> values(view.rows, view.cols);
          qd::dequantize(view, values.view());
        }
      });
    }
  } catch (const qd::Error&) {
  }
  return 0;
}
