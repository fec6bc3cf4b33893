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

}  // namespace qdylora::examples
