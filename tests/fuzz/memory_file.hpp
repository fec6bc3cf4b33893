// A file that exists in memory only and has a path, so that readers of files can be fuzzed at full speed. Linux.
#pragma once

#include <cstddef>
#include <cstdlib>
#include <filesystem>
#include <span>
#include <string>

#include <sys/mman.h>
#include <unistd.h>

namespace test {

class MemoryFile {
 public:
  MemoryFile() : file_(::memfd_create("fuzz", MFD_CLOEXEC)), path_("/proc/self/fd/" + std::to_string(file_)) {
    if (file_ < 0) std::abort();
  }
  MemoryFile(const MemoryFile&) = delete;
  MemoryFile& operator=(const MemoryFile&) = delete;
  ~MemoryFile() { ::close(file_); }

  const std::filesystem::path& path() const { return path_; }

  void set(std::span<const std::byte> content) {
    if (::ftruncate(file_, 0) != 0) std::abort();
    if (::pwrite(file_, content.data(), content.size(), 0) != static_cast<ssize_t>(content.size())) std::abort();
  }

 private:
  int file_;
  std::filesystem::path path_;
};

}  // namespace test
