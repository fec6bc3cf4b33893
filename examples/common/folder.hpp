// Folders that programs write into.
#pragma once

#include <filesystem>
#include <system_error>

#include <qdylora/core/error.hpp>

namespace qdylora::examples {

/// A folder for results, made where there is none. Errors: open.
inline void make_folder(const std::filesystem::path& folder) {
  std::error_code failure;
  std::filesystem::create_directories(folder, failure);
  if (failure) throw Error(Errc::open, "cannot make the folder: " + failure.message(), {.file = folder.string()});
}

/// Throws Errc::bad_argument where writing `out` would replace `in`, or a file in the folder `in`, by whatever path they are named.
inline void expect_no_overwrite(const std::filesystem::path& in, const std::filesystem::path& out) {
  std::error_code ignored;  // what is not there is not replaced
  const auto same = [&](const std::filesystem::path& path) { return std::filesystem::equivalent(in, path, ignored); };
  const bool replaces = same(out) || (std::filesystem::is_regular_file(out, ignored) && same(std::filesystem::absolute(out).parent_path()));
  if (replaces) throw Error(Errc::bad_argument, "would be written over, and it is read", {.file = out.string()});
}

}  // namespace qdylora::examples
