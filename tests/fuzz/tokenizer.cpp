// libFuzzer harness: any bytes as a tokenizer's file, a GGUF file if they start like one and tokenizer.json else; what loads encodes the
// file's own bytes. See README.md.
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

#include <qdylora/io/gguf.hpp>
#include <qdylora/model/tokenizer_gguf.hpp>
#include <qdylora/model/tokenizer_json.hpp>

#include "fuzz/memory_file.hpp"

namespace qd = qdylora;

namespace {

// A folder with a link to a file in memory.
struct Folder {
  test::MemoryFile json;
  std::filesystem::path path = std::filesystem::temp_directory_path() / ("fuzz-tokenizer-" + std::to_string(::getpid()));

  Folder() {
    std::filesystem::remove_all(path);
    std::filesystem::create_directory(path);
    std::filesystem::create_symlink(json.path(), path / "tokenizer.json");
  }
  ~Folder() { std::filesystem::remove_all(path); }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static Folder folder;
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  folder.json.set(std::as_bytes(std::span(input)));
  try {
    const auto tokenizer =
        input.starts_with("GGUF") ? qd::load_tokenizer(qd::GgufFile(folder.json.path())) : qd::load_tokenizer_json(folder.path);
    const auto ids = tokenizer.encode(input, {.parse_special = false, .skip_unknown = true});
    (void)tokenizer.decode(ids);
    (void)tokenizer.decode(tokenizer.encode(input));
  } catch (const qd::Error&) {
  }
  return 0;
}
