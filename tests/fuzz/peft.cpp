// libFuzzer harness: an adapter folder of PEFT. The input is adapter_config.json, a NUL byte, adapter_model.safetensors, a line
// "--gates--" and qdylora_gates.safetensors. See README.md.
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>

#include <qdylora/io/peft.hpp>

#include "fuzz/memory_file.hpp"

namespace qd = qdylora;

namespace {

// A folder of links to files in memory.
struct Folder {
  test::MemoryFile config, model, gates;
  std::filesystem::path path = std::filesystem::temp_directory_path() / ("fuzz-peft-" + std::to_string(::getpid()));

  Folder() {
    std::filesystem::remove_all(path);
    std::filesystem::create_directory(path);
    std::filesystem::create_symlink(config.path(), path / "adapter_config.json");
    std::filesystem::create_symlink(model.path(), path / "adapter_model.safetensors");
    std::filesystem::create_symlink(gates.path(), path / "qdylora_gates.safetensors");
  }
  ~Folder() { std::filesystem::remove_all(path); }
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static Folder folder;
  const std::string_view input(reinterpret_cast<const char*>(data), size);
  const auto config_end = std::min(input.find('\0'), size);
  const auto rest = input.substr(std::min(config_end + 1, size));
  constexpr std::string_view separator = "\n--gates--\n";
  const auto model_end = std::min(rest.find(separator), rest.size());
  const auto bytes = [](std::string_view text) { return std::as_bytes(std::span(text)); };
  folder.config.set(bytes(input.substr(0, config_end)));
  folder.model.set(bytes(rest.substr(0, model_end)));
  folder.gates.set(bytes(rest.substr(std::min(model_end + separator.size(), rest.size()))));
  for (const bool force : {false, true}) {
    try {
      const auto adapter = qd::load_peft_adapter(folder.path, {.force = force, .saved_modules = true});
      for (const auto& module : adapter.modules) {
        const auto copy = qd::to_adapter(module);
        if (copy.max_rank() != module.rank()) std::abort();
      }
    } catch (const qd::Error&) {
    }
  }
  return 0;
}
