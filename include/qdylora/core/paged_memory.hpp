// PagedMemory: a memory resource whose blocks a disk can hold. For Linux.
#pragma once

#include <cerrno>
#include <cstddef>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <system_error>
#include <utility>

#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <qdylora/core/error.hpp>
#include <qdylora/core/memory.hpp>

namespace qdylora {

/// Memory for what is used seldom and in order, as an optimizer's moments are (Dettmers et al., "QLoRA", 2023: paged optimizers). Each
/// block maps a file of its own in a folder; the kernel writes its pages out when memory is short, and reads them again. The file has no
/// name and ends with the block. The folder should be a disk's: files of a tmpfs are memory themselves.
///
/// Without a folder it is HostMemory, so that a program may choose when it runs.
class PagedMemory {
 public:
  static constexpr bool host = true;
  static constexpr bool zeroed = true;

  PagedMemory() = default;
  explicit PagedMemory(std::string folder) : folder_(std::make_shared<const std::string>(std::move(folder))) {}

  bool has_folder() const noexcept { return folder_ != nullptr; }

  /// Takes the space on the disk at once: to run out of it later would be a signal (SIGBUS), not an error. Errors name the folder and the
  /// bytes: Errc::open (it takes no file), no_space, write, memory (no addresses left to map it to).
  void* allocate(std::size_t bytes) const {
    if (!has_folder()) return std::memset(HostMemory::allocate(bytes), 0, bytes);
    const int file = reserved_file(bytes);
    void* const pointer = ::mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    const int error = errno;
    ::close(file);  // the mapping keeps it
    if (pointer == MAP_FAILED) fail(Errc::memory, error, bytes);
    ::madvise(pointer, bytes, MADV_SEQUENTIAL);  // a hint: failure changes nothing
    return pointer;
  }
  void deallocate(void* pointer, std::size_t bytes) const noexcept {
    if (has_folder()) ::munmap(pointer, bytes);
    else HostMemory::deallocate(pointer, bytes);
  }

  /// Takes a whole block out of this process' memory until it is touched again. Nothing is lost: what changed is the kernel's to write.
  void page_out(void* pointer, std::size_t bytes) const noexcept {
    if (has_folder()) ::madvise(pointer, bytes, MADV_DONTNEED);  // of memory without a file this would make zeros
  }

 private:
  int reserved_file(std::size_t bytes) const {
    std::string name = *folder_ + "/qdylora-paged-XXXXXX";
    const int file = ::mkostemp(name.data(), O_CLOEXEC);
    if (file < 0) fail(Errc::open, errno, bytes);
    ::unlink(name.c_str());
    int error = EINTR;
    while (error == EINTR) error = ::posix_fallocate(file, 0, static_cast<off_t>(bytes));
    if (error == 0) return file;
    ::close(file);
    fail(error == ENOSPC || error == EDQUOT || error == EFBIG ? Errc::no_space : Errc::write, error, bytes);
  }
  [[noreturn]] void fail(Errc code, int error, std::size_t bytes) const {
    throw Error(code, "PagedMemory: cannot have " + std::to_string(bytes) + " bytes: " + std::generic_category().message(error),
                {.file = *folder_});
  }

  std::shared_ptr<const std::string> folder_;  // shared, so that copies cannot fail
};

static_assert(MemoryResource<PagedMemory>);

}  // namespace qdylora
