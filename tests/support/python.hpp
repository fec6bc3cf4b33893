// Scripts in tests/python, which call the programs that the library's files are for. The interpreter is $QDYLORA_PYTHON, or python3.
#pragma once

#include <cstdlib>
#include <filesystem>
#include <string>

namespace test {

namespace detail {

inline std::string shell_quoted(const std::string& text) {
  std::string result = "'";
  for (const char c : text) result += c == '\'' ? std::string("'\\''") : std::string(1, c);
  return result + "'";
}

inline std::string interpreter() {
  const char* set = std::getenv("QDYLORA_PYTHON");
  return shell_quoted(set != nullptr ? set : "python3");
}

}  // namespace detail

/// Whether the interpreter is there and has all of these modules.
inline bool has_python(const std::string& modules) {
  return std::system((detail::interpreter() + " -c 'import " + modules + "' >/dev/null 2>&1").c_str()) == 0;
}

/// The exit status of tests/python/<script> on a folder; its output stays visible.
inline int run_python(const std::string& script, const std::filesystem::path& folder) {
  const auto path = std::filesystem::path(QDYLORA_GOLDEN_DIR).parent_path() / "python" / script;
  return std::system(("PYTHONDONTWRITEBYTECODE=1 HF_HUB_OFFLINE=1 " + detail::interpreter() + " " +
                      detail::shell_quoted(path.native()) + " " + detail::shell_quoted(folder.native()) + " 2>&1")
                         .c_str());
}

}  // namespace test
