// Memory resources: where an owning container puts its elements. A resource is a small copyable object with
//   void* allocate(std::size_t bytes)             throws std::bad_alloc; aligned to 64 bytes at least
//   void  deallocate(void*, std::size_t) noexcept
//   static constexpr bool host                    elements may be touched by host code
// and may have
//   static constexpr bool zeroed                  blocks begin as zeros
//   void  page_out(void*, std::size_t) noexcept   a whole block will not be touched for a while
// HostMemory is the default; paged, device and pinned memory are other resources with the same members.
#pragma once

#include <concepts>
#include <cstddef>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <qdylora/config.hpp>

namespace qdylora {

template <class M>
concept MemoryResource = std::copyable<M> && requires(M memory, void* pointer, std::size_t bytes) {
  { memory.allocate(bytes) } -> std::same_as<void*>;
  { memory.deallocate(pointer, bytes) } noexcept;
  { M::host } -> std::convertible_to<bool>;
};

/// Ordinary memory. Blocks of 4 MiB and more start on a huge page and ask the kernel for huge pages: with 4 KiB pages, streaming a
/// model's weights loses about a third of the memory bandwidth to page walks.
struct HostMemory {
  static constexpr bool host = true;

  static void* allocate(std::size_t bytes) {
    void* pointer = ::operator new(bytes, std::align_val_t{alignment(bytes)});
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    if (bytes >= large) ::madvise(pointer, bytes & ~(huge_page - 1), MADV_HUGEPAGE);  // a hint: failure changes nothing
#endif
    return pointer;
  }
  static void deallocate(void* pointer, std::size_t bytes) noexcept {
    ::operator delete(pointer, std::align_val_t{alignment(bytes)});
  }

 private:
  static constexpr std::size_t huge_page = std::size_t{1} << 21;
  static constexpr std::size_t large = std::size_t{1} << 22;
  static constexpr std::size_t alignment(std::size_t bytes) noexcept { return bytes >= large ? huge_page : 64; }
};

static_assert(MemoryResource<HostMemory>);

}  // namespace qdylora
