// The emulated device's memory: host memory in a register of allocations, against which every access of a kernel is checked.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <iterator>
#include <map>
#include <memory>
#include <new>
#include <optional>
#include <string>

#include "support/cuda_emulator/shadow.hpp"

namespace test::emulator {

class GlobalMemory {
  struct Freed {
    void operator()(Trace* traces) const { std::free(traces); }
  };
  struct Allocation {
    std::size_t bytes = 0;
    bool of_host = false;
    mutable std::unique_ptr<Trace[], Freed> traces = {};  // none until a kernel comes; zeros, whose pages the system makes as they are touched
  };
  using Allocations = std::map<std::byte*, Allocation>;

 public:
  ~GlobalMemory() {
    for (const auto& [begin, allocation] : allocations_) ::operator delete(begin, std::align_val_t{alignment});
  }

  /// Nothing where less is free; pinned memory is the host's, and takes nothing of the device's. Filled with the bits of NaN, so that
  /// results made of uninitialized memory are noticed.
  std::byte* allocate(std::size_t bytes, bool of_host = false) {
    if (!of_host && bytes > free()) return nullptr;
    auto* begin = static_cast<std::byte*>(::operator new(bytes, std::align_val_t{alignment}));
    std::memset(begin, 0xFF, bytes);
    allocations_[begin] = {bytes, of_host};
    if (!of_host) used_ += bytes;
    most_ = std::max(most_, used_);
    return begin;
  }
  bool release(void* begin) {
    const auto found = allocations_.find(static_cast<std::byte*>(begin));
    if (found == allocations_.end()) return false;
    if (!found->second.of_host) used_ -= found->second.bytes;
    ::operator delete(begin, std::align_val_t{alignment});
    allocations_.erase(found);
    return true;
  }

  /// Whether an allocation begins here.
  bool begins(void* p) const { return allocations_.contains(static_cast<std::byte*>(p)); }

  /// What is wrong with an access, if anything is.
  std::optional<std::string> complaint(const void* p, std::size_t bytes, std::size_t aligned) const {
    if (reinterpret_cast<std::uintptr_t>(p) % aligned != 0) return "is not aligned to " + std::to_string(aligned) + " bytes";
    const auto found = last_before(p);
    const std::size_t offset = found == allocations_.end() ? 0 : offset_in(*found, p);
    if (found == allocations_.end() || offset > found->second.bytes + 65536) return "is outside of every allocation";
    if (offset + bytes > found->second.bytes)
      return "ends " + std::to_string(offset + bytes - found->second.bytes) + " bytes behind an allocation of " +
             std::to_string(found->second.bytes);
    return std::nullopt;
  }

  /// Of each byte from `p` on, which lies within an allocation.
  Trace* traces(const void* p) const {
    const auto& found = *last_before(p);
    const auto& [bytes, of_host, traces] = found.second;
    if (!traces) traces.reset(static_cast<Trace*>(std::calloc(bytes, sizeof(Trace))));
    return traces.get() + offset_in(found, p);
  }

  std::size_t total() const noexcept { return total_; }
  std::size_t used() const noexcept { return used_; }
  std::size_t most() const noexcept { return most_; }  // that was used at once
  void forget_most() noexcept { most_ = used_; }
  std::size_t free() const noexcept { return total_ - used_; }
  void set_total(std::size_t bytes) noexcept { total_ = bytes; }

 private:
  static constexpr std::size_t alignment = 256;

  /// The last allocation that begins at p or before; end() where there is none.
  Allocations::const_iterator last_before(const void* p) const {
    const auto next = allocations_.upper_bound(static_cast<std::byte*>(const_cast<void*>(p)));
    return next == allocations_.begin() ? allocations_.end() : std::prev(next);
  }
  static std::size_t offset_in(const Allocations::value_type& allocation, const void* p) {
    return static_cast<std::size_t>(static_cast<const std::byte*>(p) - allocation.first);
  }

  Allocations allocations_;
  std::size_t total_ = std::size_t{1} << 32;
  std::size_t used_ = 0;
  std::size_t most_ = 0;
};

inline GlobalMemory& global_memory() {
  static GlobalMemory memory;
  return memory;
}

}  // namespace test::emulator
