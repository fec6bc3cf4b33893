// The one real model that tests use where it is at hand: the file that QDYLORA_MODEL names, or the one that examples/run.sh keeps.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <optional>
#include <string>

namespace test {

inline constexpr const char* no_smollm2 = "no model: set QDYLORA_MODEL to SmolLM2-135M-Instruct.Q4_1.gguf";

inline std::optional<std::filesystem::path> smollm2() {
  const auto variable = [](const char* name) {
    const char* value = std::getenv(name);
    return std::string(value == nullptr ? "" : value);
  };
  std::filesystem::path path = variable("QDYLORA_MODEL");
  if (path.empty()) {
    const std::filesystem::path cache = variable("XDG_CACHE_HOME");
    path = (cache.empty() ? std::filesystem::path(variable("HOME")) / ".cache" : cache) / "qdylora/SmolLM2-135M-Instruct.Q4_1.gguf";
  }
  if (!std::filesystem::is_regular_file(path)) return std::nullopt;
  return path;
}

}  // namespace test
