#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstdlib>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <qdylora/io/file.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"

namespace file_test {

namespace qd = qdylora;
using qd::Errc;
using test::code_of;
using test::error_of;
using test::read_file;
using test::write_file;

namespace {

/// POSIX, but the n-th call fails, ends the process, or is served in small pieces with interruptions.
struct FaultySystem {
  static inline int calls = 0;     // so far
  static inline int fail_at = -1;  // this call fails with `error`
  static inline int error = EIO;
  static inline int die_at = -1;  // the process ends before this call
  static inline bool small_pieces = false;

  static void reset() {
    calls = 0;
    fail_at = die_at = -1;
    error = EIO;
    small_pieces = false;
  }
  static bool fails() {
    const int call = calls++;
    if (call == die_at) ::_exit(9);
    if (small_pieces && call % 2 == 0) {
      errno = EINTR;
      return true;
    }
    if (call != fail_at) return false;
    errno = error;
    return true;
  }
  static std::size_t piece(std::size_t n) { return small_pieces ? std::min<std::size_t>(n, 3) : n; }

  using Real = qd::PosixSystem;
  static int open(const char* path, int flags, mode_t mode) { return fails() ? -1 : Real::open(path, flags, mode); }
  static int close(int file) { return Real::close(file); }
  static int fstat(int file, struct stat* status) { return !small_pieces && fails() ? -1 : Real::fstat(file, status); }
  static int stat(const char* path, struct stat* status) { return !small_pieces && fails() ? -1 : Real::stat(path, status); }
  static ssize_t pread(int file, void* target, std::size_t n, off_t offset) {
    return fails() ? -1 : Real::pread(file, target, piece(n), offset);
  }
  static ssize_t write(int file, const void* source, std::size_t n) { return fails() ? -1 : Real::write(file, source, piece(n)); }
  static int lock(int file) { return !small_pieces && fails() ? -1 : Real::lock(file); }
  static int truncate(int file) { return fails() ? -1 : Real::truncate(file); }
  static int sync(int file) { return fails() ? -1 : Real::sync(file); }
  static int rename(const char* from, const char* to) { return !small_pieces && fails() ? -1 : Real::rename(from, to); }
  static int unlink(const char* path) { return Real::unlink(path); }
};

using FaultyInput = qd::BasicInputFile<FaultySystem>;
using FaultyAtomicFile = qd::BasicAtomicFile<FaultySystem>;

std::string pread_text(const auto& file, std::uint64_t offset, std::size_t size) {
  std::string text(size, '?');
  file.pread_exact(offset, std::as_writable_bytes(std::span(text)));
  return text;
}

std::ptrdiff_t open_descriptors() { return std::distance(std::filesystem::directory_iterator("/proc/self/fd"), {}); }

void faulty_replace(const std::filesystem::path& path, const std::string& content) {
  FaultyAtomicFile file(path);
  file.write(content.substr(0, content.size() / 2));
  file.write(content.substr(content.size() / 2));
  file.commit();
}

}  // namespace

TEST_CASE("an input file gives exact ranges, and names the byte where it ends too early") {
  const test::TemporaryFolder folder;
  write_file(folder / "f", "0123456789");
  const qd::InputFile file(folder / "f");
  CHECK(file.size() == 10);
  CHECK(pread_text(file, 0, 10) == "0123456789");
  CHECK(pread_text(file, 3, 4) == "3456");
  CHECK(pread_text(file, 10, 0).empty());

  struct Range {
    std::uint64_t offset;
    std::size_t size;
  };
  for (const Range range : {Range{0, 11}, Range{9, 2}, Range{10, 1}, Range{11, 0}, Range{~0ull, 2}}) {
    const auto error = error_of([&] { pread_text(file, range.offset, range.size); });
    REQUIRE(error);
    CHECK(error->code() == Errc::truncated);
    CHECK(error->offset() == range.offset);
    CHECK(error->file() == file.name());
  }
}

TEST_CASE("only regular files are opened, and a pipe does not make the reader wait") {
  const test::TemporaryFolder folder;
  CHECK(code_of([&] { qd::InputFile(folder / "absent"); }) == Errc::open);
  CHECK(code_of([&] { qd::InputFile(folder.path()); }) == Errc::open);
  CHECK(code_of([&] { qd::InputFile("/dev/zero"); }) == Errc::open);
  CHECK(code_of([&] { qd::InputFile(""); }) == Errc::open);
  REQUIRE(::mkfifo((folder / "pipe").c_str(), 0600) == 0);
  CHECK(code_of([&] { qd::InputFile(folder / "pipe"); }) == Errc::open);
  write_file(folder / "f", "x");
  CHECK(code_of([&] { qd::InputFile((folder / "f").native() + std::string("\0y", 2)); }) == Errc::open);
}

TEST_CASE("interrupted and short reads and writes are continued") {
  const test::TemporaryFolder folder;
  const std::string content = "the quick brown fox jumps over the lazy dog";
  FaultySystem::reset();
  FaultySystem::small_pieces = true;
  faulty_replace(folder / "f", content);
  CHECK(read_file(folder / "f") == content);
  const FaultyInput file(folder / "f");
  CHECK(pread_text(file, 0, content.size()) == content);
  FaultySystem::reset();
}

TEST_CASE("a read that fails names the byte") {
  const test::TemporaryFolder folder;
  write_file(folder / "f", "0123456789");
  FaultySystem::reset();
  const FaultyInput file(folder / "f");
  FaultySystem::fail_at = FaultySystem::calls;
  const auto error = error_of([&] { pread_text(file, 4, 2); });
  FaultySystem::reset();
  REQUIRE(error);
  CHECK(error->code() == Errc::read);
  CHECK(error->offset() == 4u);
}

TEST_CASE("a file that shrinks while it is open is truncated, not undefined") {
  const test::TemporaryFolder folder;
  write_file(folder / "f", "0123456789");
  const qd::InputFile file(folder / "f");
  std::filesystem::resize_file(folder / "f", 5);
  const auto error = error_of([&] { pread_text(file, 2, 8); });
  REQUIRE(error);
  CHECK(error->code() == Errc::truncated);
  CHECK(error->offset() == 5u);
}

TEST_CASE("an input file can be moved and closes once") {
  const test::TemporaryFolder folder;
  write_file(folder / "f", "abc");
  write_file(folder / "g", "defg");
  const auto before = open_descriptors();
  {
    qd::InputFile f(folder / "f");
    qd::InputFile g(std::move(f));
    CHECK(pread_text(g, 0, 3) == "abc");
    qd::InputFile h(folder / "g");
    h = std::move(g);
    CHECK(pread_text(h, 1, 2) == "bc");
    CHECK(open_descriptors() == before + 1);
  }
  CHECK(open_descriptors() == before);
}

TEST_CASE("a text is read whole, up to a limit") {
  const test::TemporaryFolder folder;
  write_file(folder / "f", "abc");
  CHECK(qd::read_text(folder / "f") == "abc");
  CHECK(qd::read_text(folder / "f", 3) == "abc");
  CHECK(code_of([&] { qd::read_text(folder / "f", 2); }) == Errc::limit);
  write_file(folder / "empty", "");
  CHECK(qd::read_text(folder / "empty").empty());
}

TEST_CASE("a cursor reads numbers and text across its window and knows what remains") {
  const test::TemporaryFolder folder;
  test::Bytes bytes;
  for (std::uint32_t i = 0; i < 40'000; ++i) bytes.u32(i).u8(static_cast<std::uint8_t>(i));  // 5-byte records cross every window
  bytes.raw("the end");
  write_file(folder / "f", bytes);
  const qd::InputFile file(folder / "f");

  qd::FileCursor cursor(file);
  bool equal = true;
  for (std::uint32_t i = 0; i < 40'000; ++i) {
    equal = equal && cursor.read<std::uint32_t>() == i && cursor.read<std::uint8_t>() == static_cast<std::uint8_t>(i);
  }
  CHECK(equal);
  CHECK(cursor.position() == 200'000);
  CHECK(cursor.remaining() == 7);
  CHECK(code_of([&] { cursor.read<std::uint64_t>(); }) == Errc::truncated);
  CHECK(cursor.position() == 200'000);
  CHECK(cursor.text(7) == "the end");
  CHECK(code_of([&] { cursor.skip(1); }) == Errc::truncated);

  cursor.back_to(5 * 20'000);
  CHECK(cursor.read<std::uint32_t>() == 20'000);
  cursor.back_to(0);
  CHECK(cursor.text(100'000) == bytes.substr(0, 100'000));  // longer than the window
  cursor.skip(100'000);
  CHECK(cursor.text(3) == "the");
  CHECK(code_of([&] { cursor.back_to(200'007); }) == Errc::bad_argument);

  for (std::uint64_t ahead = 65'530; ahead <= 65'540; ++ahead) {  // around the window's end
    qd::FileCursor fresh(file);
    fresh.read<std::uint8_t>();
    fresh.skip(ahead);
    CHECK(fresh.text(4) == bytes.substr(1 + ahead, 4));
  }

  CHECK_FALSE(code_of([&] { cursor.require(2, 2); }));
  CHECK(code_of([&] { cursor.require(3, 2); }) == Errc::truncated);
  CHECK(code_of([&] { cursor.require(~0ull, ~0ull); }) == Errc::truncated);

  qd::FileCursor bounded(file, 10);
  bounded.skip(8);
  const auto error = error_of([&] { bounded.read<std::uint32_t>(); });
  REQUIRE(error);
  CHECK(error->code() == Errc::limit);  // the file goes on, we do not
  CHECK(error->offset() == 8u);
}

TEST_CASE("an atomic file replaces the old content at commit and leaves nothing beside it") {
  const test::TemporaryFolder folder;
  const auto path = folder / "f";
  qd::replace_file(path, "first");
  CHECK(read_file(path) == "first");
  {
    qd::AtomicFile file(path);
    file.write("second");
    CHECK(file.size() == 6);
    CHECK(read_file(path) == "first");
    file.write(", longer");
    file.commit();
    CHECK(read_file(path) == "second, longer");
    CHECK(code_of([&] { file.write("more"); }) == Errc::state_order);
    CHECK(code_of([&] { file.commit(); }) == Errc::state_order);
  }
  CHECK(read_file(path) == "second, longer");
  CHECK(folder.count() == 1);
  qd::replace_file(path, "");
  CHECK(read_file(path).empty());
}

TEST_CASE("an atomic file that is not committed leaves the old content and no temporary file") {
  const test::TemporaryFolder folder;
  write_file(folder / "f", "old");
  { qd::AtomicFile(folder / "f").write("new"); }
  CHECK(read_file(folder / "f") == "old");
  CHECK(folder.count() == 1);
}

TEST_CASE("a temporary file that a dead process left is taken over") {
  const test::TemporaryFolder folder;
  write_file(folder / "f", "old");
  write_file(folder / "f.tmp", "half of something that was longer than the new content");
  qd::replace_file(folder / "f", "new");
  CHECK(read_file(folder / "f") == "new");
  CHECK(folder.count() == 1);
}

TEST_CASE("two writers of one file do not mix: the second is refused") {
  const test::TemporaryFolder folder;
  qd::AtomicFile first(folder / "f");
  first.write("first");
  const auto error = error_of([&] { qd::replace_file(folder / "f", "second"); });
  REQUIRE(error);
  CHECK(error->code() == Errc::open);
  first.commit();
  CHECK(read_file(folder / "f") == "first");
  qd::replace_file(folder / "f", "second");
  CHECK(read_file(folder / "f") == "second");
  CHECK(folder.count() == 1);
}

TEST_CASE("targets that are no files are refused") {
  const test::TemporaryFolder folder;
  CHECK(code_of([&] { qd::replace_file(folder / "absent" / "f", "x"); }) == Errc::open);
  CHECK(code_of([&] { qd::replace_file(folder.path().native() + "/", "x"); }) == Errc::open);
  std::filesystem::create_directory(folder / "d");
  CHECK(code_of([&] { qd::replace_file(folder / "d", "x"); }) == Errc::write);
  std::filesystem::create_symlink(folder / "elsewhere", folder / "f.tmp");
  CHECK(code_of([&] { qd::replace_file(folder / "f", "x"); }) == Errc::open);  // the temporary file is never a link
  CHECK_FALSE(std::filesystem::exists(folder / "elsewhere"));
}

TEST_CASE("whichever system call fails, the file is the old or the new one, with a typed error") {
  const std::string before = "the old content";
  const std::string after = "the content that replaces it";
  const auto descriptors = open_descriptors();
  FaultySystem::reset();
  {
    const test::TemporaryFolder folder;
    faulty_replace(folder / "f", after);
  }
  const int calls = FaultySystem::calls;
  REQUIRE(calls >= 10);
  for (const int error_number : {EIO, ENOSPC, EDQUOT}) {
    for (int n = 0; n < calls; ++n) {
      CAPTURE(error_number, n);
      const test::TemporaryFolder folder;
      write_file(folder / "f", before);
      FaultySystem::reset();
      FaultySystem::fail_at = n;
      FaultySystem::error = error_number;
      const auto code = code_of([&] { faulty_replace(folder / "f", after); });
      FaultySystem::reset();
      REQUIRE(code);
      if (error_number == EIO) CHECK((code == Errc::open || code == Errc::write || code == Errc::sync));
      else CHECK(code == Errc::no_space);
      const bool renamed = n >= calls - 2;  // what is left after the rename is to open and sync the folder
      CHECK(read_file(folder / "f") == (renamed ? after : before));
      // Until the lock is held the temporary file may be another writer's, so it stays; the next save takes it over.
      if (n >= 4 || n == 0) CHECK(folder.count() == 1);
      qd::replace_file(folder / "f", "next");
      CHECK(read_file(folder / "f") == "next");
      CHECK(folder.count() == 1);
    }
  }
  CHECK(open_descriptors() == descriptors);
}

TEST_CASE("whichever system call a process dies at, the file is the old or the new one") {
  const std::string before = "the old content";
  const std::string after = "the content that replaces it";
  bool died_before_rename = false;
  bool died_after_rename = false;
  for (int n = 0;; ++n) {
    CAPTURE(n);
    const test::TemporaryFolder folder;
    write_file(folder / "f", before);
    const pid_t child = ::fork();
    REQUIRE(child >= 0);
    if (child == 0) {
      FaultySystem::reset();
      FaultySystem::die_at = n;
      try {
        faulty_replace(folder / "f", after);
      } catch (...) {
        ::_exit(1);
      }
      ::_exit(0);
    }
    int status = 0;
    REQUIRE(::waitpid(child, &status, 0) == child);
    REQUIRE(WIFEXITED(status));
    const std::string found = read_file(folder / "f");
    if (WEXITSTATUS(status) == 0) {
      CHECK(found == after);
      break;
    }
    REQUIRE(WEXITSTATUS(status) == 9);
    CHECK((found == before || found == after));
    (found == before ? died_before_rename : died_after_rename) = true;
    qd::replace_file(folder / "f", "next");
    CHECK(read_file(folder / "f") == "next");
    CHECK(folder.count() == 1);
  }
  CHECK(died_before_rename);
  CHECK(died_after_rename);
}

TEST_CASE("a file system without locks is written all the same") {
  const test::TemporaryFolder folder;
  FaultySystem::reset();
  FaultySystem::fail_at = 2;  // open, fstat, lock
  FaultySystem::error = ENOLCK;
  faulty_replace(folder / "f", "content");
  FaultySystem::reset();
  CHECK(read_file(folder / "f") == "content");
  CHECK(folder.count() == 1);
}

}  // namespace file_test
