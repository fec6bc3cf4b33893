// One block of threads, each a fiber that runs until it has to wait for others. Barriers and the exchanges of a warp are kept to their
// rules, and shared memory to the order that only they make:
//
//   sync_block   all threads, at one place of the source, none of them ended
//   collectives  (shuffles, votes, sync_warp, ldmatrix, mma) every lane of the mask, each naming the same mask
//   global memory: between a write and another access to the same byte by another thread of the block as below, by another block as
//   grid.hpp has it
//   shared memory: between a write and another access to the same byte by another thread there is a barrier of the block, or within a
//   warp a sync_warp of both lanes. Order is kept as vector clocks (Mattern 1988), one a lane; a barrier of the block orders all.
//   what a product of warpgroups reads, who wrote it has published before the barrier; until it is waited for, nobody writes there
//   asynchronous copies land when their thread waits for them, the last moment a GPU may take; until then their target is untouchable.
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <exception>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "support/cuda_emulator/fault.hpp"
#include "support/cuda_emulator/fiber.hpp"
#include "support/cuda_emulator/global_memory.hpp"
#include "support/cuda_emulator/grid.hpp"
#include "support/cuda_emulator/shadow.hpp"

namespace test::emulator {

class Block {
 public:
  Block(Grid& grid, std::array<unsigned, 3> index, int threads, int shared_bytes)
      : grid_(grid),
        index_(index),
        number_((index[2] * grid.size[1] + index[1]) * grid.size[0] + index[0]),
        shared_(static_cast<std::size_t>(shared_bytes) + 1024),
        shared_bytes_(shared_bytes),
        threads_(static_cast<std::size_t>(threads)),
        warps_(static_cast<std::size_t>((threads + warp_size - 1) / warp_size)) {
    ++block_number;
    if (shadows.size() < static_cast<std::size_t>(shared_bytes)) shadows.resize(static_cast<std::size_t>(shared_bytes));
    for (int t = 0; t < threads; ++t) threads_[static_cast<std::size_t>(t)].seen[static_cast<std::size_t>(t % warp_size)] = 1;
  }

  /// Runs the body once for each thread. Throws the first Fault.
  void run(const std::function<void()>& body) {
    static const auto stacks = std::make_unique<std::byte[]>(stack_bytes * 1024);
    running_block = this;
    body_ = &body;
    for (std::size_t t = 0; t < threads_.size(); ++t) threads_[t].fiber.begin(stacks.get() + t * stack_bytes, stack_bytes, &Block::enter);
    while (step()) {
    }
    running_block = nullptr;
    if (failure_) std::rethrow_exception(failure_);
    for (std::size_t w = 0; w < warps_.size(); ++w)
      if (!warps_[w].open.empty() || !warps_[w].groups.empty())
        fail("ends while a product is on its way: no wait_products", static_cast<int>(w) * warp_size);
  }

  static Block& running() { return *running_block; }

  int thread() const { return current_; }
  int threads() const { return static_cast<int>(threads_.size()); }
  int lane() const { return current_ % warp_size; }
  const std::array<unsigned, 3>& index() const { return index_; }
  const std::array<unsigned, 3>& grid() const { return grid_.size; }

  [[noreturn]] void fail(const std::string& what) const { fail(what, current_); }

  // ---- order -------------------------------------------------------------------------------------------------------------------

  void barrier(int line) { wait(State::at_barrier, "sync_block", line); }

  /// Every lane of the mask brings `own`; the last to come performs the exchange for all: perform(lanes), lanes[l] pointing at what
  /// lane l brought, null where it is not in the mask.
  template <class Own, class Perform>
  void collective(const char* what, unsigned mask, int line, Own& own, Perform perform) {
    if ((mask >> lane() & 1u) == 0) fail(place_text(what, line) + " by a lane that is not in its mask");
    Thread& self = threads_[static_cast<std::size_t>(current_)];
    self.mask = mask;
    self.brought = &own;
    bool complete = true;
    const int first = current_ - lane();
    for (int l = 0; l < warp_size; ++l) {
      const Thread& other = threads_[static_cast<std::size_t>(first + l)];
      if ((mask >> l & 1u) == 0 || first + l == current_) continue;
      if (other.state == State::ended) fail(place_text(what, line) + " waits for lane " + std::to_string(l) + ", which has ended");
      const bool there = other.state == State::in_collective;
      const bool same = there && other.mask == mask && is_same(other.doing, what);
      if (there && !same && (other.mask >> lane() & 1u))
        fail(place_text(what, line) + " meets lane " + std::to_string(l) + " in " + place_text(other.doing, other.line) +
             ": another exchange or another mask");
      complete = complete && same;
    }
    if (!complete) return wait(State::in_collective, what, line);
    std::array<Own*, warp_size> lanes{};
    for (int l = 0; l < warp_size; ++l)
      if (mask >> l & 1u) lanes[static_cast<std::size_t>(l)] = static_cast<Own*>(threads_[static_cast<std::size_t>(first + l)].brought);
    perform(lanes);
    for (int l = 0; l < warp_size; ++l)
      if ((mask >> l & 1u) && first + l != current_) threads_[static_cast<std::size_t>(first + l)].state = State::ready;
  }

  /// What one lane of the mask did before, the others have seen.
  void sync_warp(unsigned mask, int line) {
    Thread& self = threads_[static_cast<std::size_t>(current_)];
    collective("sync_warp", mask, line, self, [](const std::array<Thread*, warp_size>& lanes) {
      Clock joint{};
      for (const Thread* t : lanes)
        for (std::size_t l = 0; t != nullptr && l < warp_size; ++l) joint[l] = std::max(joint[l], t->seen[l]);
      for (std::size_t l = 0; l < warp_size; ++l)
        if (lanes[l] != nullptr) {
          lanes[l]->seen = joint;
          ++lanes[l]->seen[l];
        }
    });
  }

  // ---- memory ------------------------------------------------------------------------------------------------------------------

  std::byte* shared_begin() {
    return shared_.data() + (1024 - reinterpret_cast<std::uintptr_t>(shared_.data()) % 1024) % 1024;
  }
  int shared_bytes() const { return shared_bytes_; }

  /// Checks an access of the current thread to shared memory, and remembers it.
  void access_shared(std::ptrdiff_t offset, std::size_t bytes, std::size_t aligned, Access access) {
    const char* const what = access == Access::read ? "reads" : "writes";
    if (offset < 0 || offset + static_cast<std::ptrdiff_t>(bytes) > shared_bytes_)
      fail(std::string(what) + " " + std::to_string(bytes) + " bytes at " + std::to_string(offset) + " of " +
           std::to_string(shared_bytes_) + " bytes of shared memory");
    if (static_cast<std::size_t>(offset) % aligned != 0)
      fail(std::string(what) + " shared memory at " + std::to_string(offset) + ", which is not aligned to " + std::to_string(aligned) +
           " bytes");
    for (std::size_t i = 0; i < bytes; ++i) {
      Shadow& byte = shadow(static_cast<std::size_t>(offset) + i);
      const auto refuse = [&](const std::string& why) {
        fail(std::string(what) + " byte " + std::to_string(offset + static_cast<std::ptrdiff_t>(i)) + " of shared memory, " + why);
      };
      if (byte.copier >= 0) refuse("where a copy of thread " + std::to_string(byte.copier) + " is on its way: no wait_copies");
      if (access != Access::read && byte.products > 0) refuse("which a product is reading: no wait_products");
      if (access == Access::read && byte.writer < 0) refuse("which nobody has written");
      if (byte.written == epoch_ && !seen(byte.writer, byte.write_time) && !(access == Access::atomic && byte.atomic))
        refuse("which thread " + std::to_string(byte.writer) + " has written, with no barrier between");
      if (access == Access::read) note_read(byte);
      else note_write(byte, access == Access::atomic, refuse);
    }
  }

  /// Begins a copy of `valid` bytes, and zeros up to `bytes`.
  void copy_async(std::ptrdiff_t offset, const void* source, std::size_t bytes, std::size_t valid) {
    if (valid > 0) access_global("copies from", source, valid, bytes, Access::read);
    access_shared(offset, bytes, bytes, Access::write);
    for (std::size_t i = 0; i < bytes; ++i) shadow(static_cast<std::size_t>(offset) + i).copier = current_;
    threads_[static_cast<std::size_t>(current_)].open.push_back({offset, source, bytes, valid});
  }
  void commit_copies() {
    Thread& self = threads_[static_cast<std::size_t>(current_)];
    self.groups.push_back(std::exchange(self.open, {}));
  }
  void wait_copies(std::size_t pending) {
    Thread& self = threads_[static_cast<std::size_t>(current_)];
    for (; self.groups.size() > pending; self.groups.erase(self.groups.begin()))
      for (const Copy& copy : self.groups.front()) {
        for (std::size_t i = 0; i < copy.bytes; ++i) shadow(static_cast<std::size_t>(copy.offset) + i).copier = -1;
        access_shared(copy.offset, copy.bytes, 1, Access::write);
        std::memset(shared_begin() + copy.offset, 0, copy.bytes);
        if (copy.valid > 0) std::memcpy(shared_begin() + copy.offset, copy.source, copy.valid);
      }
  }

  // ---- products of warpgroups (warpgroup.cuh): what a warp defers, it does when the group it belongs to is waited for ---------------

  void publish() { ++threads_[static_cast<std::size_t>(current_)].publications; }
  void begin_products() { threads_[static_cast<std::size_t>(current_)].products_begun = true; }
  bool has_begun_products() const { return threads_[static_cast<std::size_t>(current_)].products_begun; }
  void defer_product(std::function<void()> landing) { own_warp().open.push_back(std::move(landing)); }
  void commit_products(int line) {
    int own = 0;
    collective("commit_products", ~0u, line, own, [&](const auto&) { own_warp().groups.push_back(std::exchange(own_warp().open, {})); });
    threads_[static_cast<std::size_t>(current_)].products_begun = false;
  }
  void wait_products(std::size_t pending, int line) {
    int own = 0;
    collective("wait_products", ~0u, line, own, [&](const auto&) {
      for (auto& groups = own_warp().groups; groups.size() > pending; groups.erase(groups.begin()))
        for (const auto& land : groups.front()) land();
    });
    threads_[static_cast<std::size_t>(current_)].products_begun = false;
  }
  /// A product's reading, from its beginning to its landing.
  void begin_reading(std::ptrdiff_t offset, std::size_t bytes) {
    access_shared(offset, bytes, bytes, Access::read);
    for (std::size_t i = 0; i < bytes; ++i) {
      Shadow& byte = shadow(static_cast<std::size_t>(offset) + i);
      if (threads_[static_cast<std::size_t>(byte.writer)].publications == byte.publications)
        fail("a product reads byte " + std::to_string(offset + static_cast<std::ptrdiff_t>(i)) + " of shared memory, which thread " +
             std::to_string(byte.writer) + " has written and not published");
      ++byte.products;
    }
  }
  void end_reading(std::ptrdiff_t offset, std::size_t bytes) {
    for (std::size_t i = 0; i < bytes; ++i) {
      Shadow& byte = shadow(static_cast<std::size_t>(offset) + i);
      --byte.products;
      note_read(byte);
    }
  }

  void access_global(const char* what, const void* p, std::size_t bytes, std::size_t aligned, Access access) {
    if (const auto complaint = global_memory().complaint(p, bytes, aligned))
      fail(std::string(what) + " global memory: " + std::to_string(bytes) + " bytes at an address that " + *complaint);
    const Deed own{grid_.launch, number_, epoch_, now(), static_cast<std::int16_t>(current_)};
    const auto expect_seen = [&](const Deed& other, const char* did, bool others_too) {
      if (other.launch != own.launch || (is_seen(other) && !others_too)) return;
      const bool here = other.block == own.block;
      fail(std::string(what) + " global memory that thread " + std::to_string(other.thread) +
           (here ? "" : " of the grid's block " + std::to_string(other.block)) + " has " + did + ", with no " + (here ? "barrier" : "signal") +
           " between");
    };
    Trace* const traces = global_memory().traces(p);
    for (std::size_t i = 0; i < bytes; ++i) {
      Trace& byte = traces[i];
      const bool both_atomic = access == Access::atomic && byte.atomic;
      if (!both_atomic) expect_seen(byte.write, "written", false);
      if (access == Access::read) {
        byte.several_read = byte.read.launch == own.launch && (byte.several_read || byte.read.block != own.block);
        byte.read = own;
      } else {
        if (!both_atomic) expect_seen(byte.read, "read", byte.several_read);
        byte.write = own;
        byte.atomic = access == Access::atomic;
      }
    }
  }

  /// What the thread has seen and done, all have seen who see its signal.
  void signal(const void* count) {
    Knowledge& given = grid_.signals[count];
    given.join(known_);
    if (informed_ == current_) given.join(newly_known_);
    given.see(grid_.blocks(), number_, {epoch_, current_});
  }
  void see_signals(const void* count) {
    if (informed_ != current_) newly_known_.clear();
    informed_ = current_;
    newly_known_.join(grid_.signals[count]);
  }

 private:
  enum class State { ready, at_barrier, in_collective, ended };

  struct Copy {
    std::ptrdiff_t offset;
    const void* source;
    std::size_t bytes, valid;
  };
  struct Thread {
    Fiber fiber;
    State state = State::ready;
    const char* doing = "";  // what it waits in
    int line = 0;
    unsigned mask = 0;
    void* brought = nullptr;
    Clock seen{};
    std::vector<Copy> open;
    std::vector<std::vector<Copy>> groups;
    std::uint32_t publications = 0;
    bool products_begun = false;
  };
  struct Warp {
    std::vector<std::function<void()>> open;
    std::vector<std::vector<std::function<void()>>> groups;
  };

  static constexpr std::size_t stack_bytes = 64 * 1024;
  static inline Block* running_block = nullptr;
  static inline std::uint64_t block_number = 0;
  static inline std::vector<Shadow> shadows;  // kept from block to block: they are larger than what they stand for

  static Shadow& shadow(std::size_t at) {
    Shadow& byte = shadows[at];
    if (byte.block != block_number) {
      byte = {};
      byte.block = block_number;
    }
    return byte;
  }

  static bool is_same(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }
  static std::string place_text(const char* what, int line) { return std::string(what) + " (line " + std::to_string(line) + ")"; }

  [[noreturn]] void fail(const std::string& what, int thread) const {
    throw Fault({grid_.kernel, {index_[0], index_[1], index_[2]}, thread}, what);
  }

  static void enter() {
    Block& block = running();
    try {
      (*block.body_)();
    } catch (...) {
      block.failure_ = std::current_exception();
    }
    Thread& self = block.threads_[static_cast<std::size_t>(block.current_)];
    self.state = State::ended;
    self.fiber.pause();
  }

  void wait(State state, const char* doing, int line) {
    Thread& self = threads_[static_cast<std::size_t>(current_)];
    self.state = state;
    self.doing = doing;
    self.line = line;
    self.fiber.pause();
  }

  // Lets every thread that is ready run until it waits; false when all have ended or one has failed.
  bool step() {
    bool progress = false;
    for (std::size_t t = 0; t < threads_.size(); ++t)
      if (threads_[t].state == State::ready) {
        current_ = static_cast<int>(t);
        progress = true;
        threads_[t].fiber.resume();
        if (failure_) return false;
      }
    if (progress) return true;
    int ended = -1, waiting = -1, exchanging = -1;
    for (int t = 0; t < threads(); ++t) {
      const State state = threads_[static_cast<std::size_t>(t)].state;
      (state == State::ended ? ended : state == State::at_barrier ? waiting : exchanging) = t;
    }
    if (waiting < 0 && exchanging < 0) return false;
    try {
      if (exchanging >= 0) fail_exchange(exchanging);
      release_barrier(waiting, ended);
    } catch (const Fault&) {
      failure_ = std::current_exception();
      return false;
    }
    return true;
  }

  void release_barrier(int waiting, int ended) {
    const int line = threads_[static_cast<std::size_t>(waiting)].line;
    if (ended >= 0)
      fail("waits at " + place_text("sync_block", line) + ", which thread " + std::to_string(ended) + " has not reached before it ended",
           waiting);
    for (const Thread& t : threads_)
      if (t.line != line)
        fail("waits at " + place_text("sync_block", line) + ", others at " + place_text("sync_block", t.line), waiting);
    for (Thread& t : threads_) t.state = State::ready;
    ++epoch_;
    known_.join(newly_known_);
    newly_known_.clear();
    informed_ = -1;
  }

  [[noreturn]] void fail_exchange(int waiting) {
    const Thread& t = threads_[static_cast<std::size_t>(waiting)];
    std::string missing;
    for (int l = 0; l < warp_size; ++l) {
      const Thread& other = threads_[static_cast<std::size_t>(waiting / warp_size * warp_size + l)];
      if ((t.mask >> l & 1u) && (other.state != State::in_collective || other.mask != t.mask || !is_same(other.doing, t.doing)))
        missing += (missing.empty() ? "" : ", ") + std::to_string(l);
    }
    fail("waits in " + place_text(t.doing, t.line) + " for lanes " + missing + ", which do not come", waiting);
  }

  // Whether the current thread has seen what another did at a moment of this epoch.
  bool seen(int other, std::uint32_t time) const {
    if (other == current_) return true;
    return other / warp_size == current_ / warp_size &&
           threads_[static_cast<std::size_t>(current_)].seen[static_cast<std::size_t>(other % warp_size)] >= time;
  }
  // Whether the current thread has seen what a thread of the grid did.
  bool is_seen(const Deed& deed) const {
    if (deed.block == number_) return deed.epoch < epoch_ || seen(deed.thread, deed.time);
    return known_.covers(deed) || (informed_ == current_ && newly_known_.covers(deed));
  }
  Warp& own_warp() { return warps_[static_cast<std::size_t>(current_ / warp_size)]; }
  std::uint32_t now() const { return threads_[static_cast<std::size_t>(current_)].seen[static_cast<std::size_t>(lane())]; }

  void note_read(Shadow& byte) {
    if (byte.read != epoch_) {
      byte.read = epoch_;
      byte.reading_warps = 0;
      byte.read_times = {};
    }
    byte.reading_warps |= 1u << (current_ / warp_size);
    byte.read_times[static_cast<std::size_t>(lane())] = now();
  }
  template <class Refuse>
  void note_write(Shadow& byte, bool atomic, const Refuse& refuse) {
    if (byte.read == epoch_) {
      const int warp = current_ / warp_size;
      if (const std::uint32_t others = byte.reading_warps & ~(1u << warp); others != 0)
        refuse("which warp " + std::to_string(std::countr_zero(others)) + " has read, with no barrier between");
      for (int l = 0; l < warp_size; ++l)
        if (!seen(warp * warp_size + l, byte.read_times[static_cast<std::size_t>(l)]))
          refuse("which lane " + std::to_string(l) + " of its warp has read, with no sync_warp between");
    }
    byte.read = 0;
    byte.written = epoch_;
    byte.writer = current_;
    byte.publications = threads_[static_cast<std::size_t>(current_)].publications;
    byte.write_time = now();
    byte.atomic = atomic;
  }

  Grid& grid_;
  std::array<unsigned, 3> index_;
  std::uint32_t number_;
  Knowledge known_;        // of the grid's other blocks, to all threads
  Knowledge newly_known_;  // since the last barrier, to the thread that has waited
  int informed_ = -1;
  std::vector<std::byte> shared_;
  int shared_bytes_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  const std::function<void()>* body_ = nullptr;
  int current_ = 0;
  std::uint32_t epoch_ = 1;
  std::exception_ptr failure_;
};

}  // namespace test::emulator
