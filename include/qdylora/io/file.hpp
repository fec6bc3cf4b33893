// Files, on POSIX: InputFile reads ranges, FileCursor walks a header, AtomicFile replaces a file so that a crash at any moment
// leaves the old or the new content, never a mixture. Every failure is a qdylora::Error that names the file and the byte.
//
// Files are read into owned memory, not mapped: a mapped file that shrinks ends the process (SIGBUS).
#pragma once

#include <algorithm>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <fcntl.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <unistd.h>

#include <qdylora/io/checked.hpp>

namespace qdylora {

/// The system calls files are made of. Tests substitute a system whose n-th call fails.
struct PosixSystem {
  static int open(const char* path, int flags, mode_t mode) noexcept { return ::open(path, flags, mode); }
  static int close(int file) noexcept { return ::close(file); }
  static int fstat(int file, struct stat* status) noexcept { return ::fstat(file, status); }
  static int stat(const char* path, struct stat* status) noexcept { return ::stat(path, status); }
  static ssize_t pread(int file, void* target, std::size_t n, off_t offset) noexcept { return ::pread(file, target, n, offset); }
  static ssize_t write(int file, const void* source, std::size_t n) noexcept { return ::write(file, source, n); }
  static int lock(int file) noexcept { return ::flock(file, LOCK_EX | LOCK_NB); }
  static int truncate(int file) noexcept { return ::ftruncate(file, 0); }
  static int sync(int file) noexcept { return ::fsync(file); }
  static int rename(const char* from, const char* to) noexcept { return ::rename(from, to); }
  static int unlink(const char* path) noexcept { return ::unlink(path); }
};

namespace detail {

/// One read or write call moves at most this much: Linux moves 2 GiB - 4 KiB, and other systems refuse more than an int holds.
inline constexpr std::size_t most_bytes_per_call = std::size_t{1} << 30;

[[noreturn]] inline void raise_system(Errc code, const std::string& action, int error, ErrorPlace place) {
  if (error == ENOSPC || error == EDQUOT) code = Errc::no_space;
  throw Error(code, action + ": " + std::generic_category().message(error), std::move(place));
}

/// Repeats a system call while a signal interrupts it.
template <class Call>
auto uninterrupted(Call call) noexcept {
  auto result = call();
  while (result < 0 && errno == EINTR) result = call();
  return result;
}

/// An open file descriptor: closed once, moved but not copied.
template <class System>
class Descriptor {
 public:
  Descriptor() = default;
  explicit Descriptor(int value) noexcept : value_(value) {}
  Descriptor(Descriptor&& other) noexcept : value_(std::exchange(other.value_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    if (this != &other) {
      close();
      value_ = std::exchange(other.value_, -1);
    }
    return *this;
  }
  ~Descriptor() { close(); }

  int get() const noexcept { return value_; }
  // Not repeated on EINTR: the descriptor is gone either way, and its number may already belong to another thread's file.
  void close() noexcept {
    if (value_ >= 0) System::close(std::exchange(value_, -1));
  }

 private:
  int value_ = -1;
};

/// Opens `path`, which must then be a regular file: a directory, pipe or device is Errc::open. O_NONBLOCK, without effect on
/// regular files, keeps the call from waiting for the other end of a pipe.
template <class System>
Descriptor<System> open_regular(const std::filesystem::path& path, int flags, struct stat& status) {
  const std::string& text = path.native();
  if (text.find('\0') != std::string::npos) throw Error(Errc::open, "the path contains a NUL byte", {.file = printable(text)});
  Descriptor<System> file{
      uninterrupted([&] { return System::open(text.c_str(), flags | O_CLOEXEC | O_NONBLOCK, mode_t{0666}); })};
  if (file.get() < 0) raise_system(Errc::open, "cannot open", errno, {.file = text});
  if (System::fstat(file.get(), &status) != 0) raise_system(Errc::open, "cannot inspect", errno, {.file = text});
  if (!S_ISREG(status.st_mode)) throw Error(Errc::open, "is not a regular file", {.file = text});
  return file;
}

}  // namespace detail

/// A regular file open for reading. Move-only; const calls may run in several threads.
template <class System>
class BasicInputFile {
 public:
  /// Errc::open.
  explicit BasicInputFile(const std::filesystem::path& path) : name_(path.native()) {
    struct stat status {};
    file_ = detail::open_regular<System>(path, O_RDONLY, status);
    size_ = checked_narrow<std::uint64_t>(status.st_size, {.file = name_});
  }

  /// The path it was opened with.
  const std::string& name() const noexcept { return name_; }
  /// In bytes, when it was opened.
  std::uint64_t size() const noexcept { return size_; }
  ErrorPlace place(std::uint64_t offset) const { return {.file = name_, .offset = offset}; }

  /// Fills `target` with the bytes from `offset` on. Errc::truncated when the file ends before, Errc::read.
  void pread_exact(std::uint64_t offset, std::span<std::byte> target) const {
    if (offset > size_ || target.size() > size_ - offset) {
      throw Error(Errc::truncated,
                  "expected " + std::to_string(target.size()) + " bytes, found " +
                      std::to_string(offset > size_ ? 0 : size_ - offset),
                  place(offset));
    }
    while (!target.empty()) {
      const std::size_t count = std::min(target.size(), detail::most_bytes_per_call);
      const ssize_t got = detail::uninterrupted(
          [&] { return System::pread(file_.get(), target.data(), count, static_cast<off_t>(offset)); });
      if (got < 0) detail::raise_system(Errc::read, "cannot read", errno, place(offset));
      if (got == 0) throw Error(Errc::truncated, "the file has become shorter since it was opened", place(offset));
      offset += static_cast<std::uint64_t>(got);  // <= size_, which was checked above
      target = target.subspan(static_cast<std::size_t>(got));
    }
  }

 private:
  std::string name_;
  detail::Descriptor<System> file_;
  std::uint64_t size_ = 0;
};

using InputFile = BasicInputFile<PosixSystem>;

/// The whole file as text. Errc::limit when it is longer than `most` bytes; otherwise as InputFile.
inline std::string read_text(const std::filesystem::path& path, std::uint64_t most = Limits{}.json_bytes) {
  const InputFile file(path);
  if (file.size() > most) {
    throw Error(Errc::limit, "expected at most " + std::to_string(most) + " bytes, found " + std::to_string(file.size()),
                {.file = file.name()});
  }
  std::string text(static_cast<std::size_t>(file.size()), '\0');
  file.pread_exact(0, std::as_writable_bytes(std::span(text)));
  return text;
}

/// Reads forward through the first `most` bytes of a file, in small pieces. The file must outlive it.
class FileCursor {
 public:
  explicit FileCursor(const InputFile& file, std::uint64_t most = std::numeric_limits<std::uint64_t>::max())
      : file_(file), end_(std::min(file.size(), most)) {}

  std::uint64_t position() const noexcept { return position_; }
  /// Bytes to the end of the file or to the limit.
  std::uint64_t remaining() const noexcept { return end_ - position_; }
  ErrorPlace place() const { return file_.place(position_); }

  /// Errc::truncated, or Errc::limit where the file would go on, unless `count` records of `bytes` bytes or more can still follow.
  void require(std::uint64_t count, std::uint64_t bytes = 1) const {
    if (count <= remaining() / bytes) return;
    const bool cut = end_ < file_.size();
    throw Error(cut ? Errc::limit : Errc::truncated,
                "expected at least " + std::to_string(count) + " x " + std::to_string(bytes) + " bytes, found " +
                    std::to_string(remaining()) + (cut ? " before the limit of " + std::to_string(end_) : std::string()),
                place());
  }

  void read(std::span<std::byte> target) {
    require(target.size());
    if (target.size() > window_bytes) {
      file_.pread_exact(position_, target);
    } else if (!target.empty()) {
      if (position_ < window_begin_ || position_ - window_begin_ > window_.size() ||
          target.size() > window_.size() - (position_ - window_begin_)) {
        window_.resize(static_cast<std::size_t>(std::min<std::uint64_t>(window_bytes, remaining())));
        file_.pread_exact(position_, window_);
        window_begin_ = position_;
      }
      std::memcpy(target.data(), window_.data() + (position_ - window_begin_), target.size());
    }
    position_ += target.size();  // <= end_
  }
  template <class T>
    requires std::is_arithmetic_v<T>
  T read() {
    std::byte bytes[sizeof(T)];
    read(bytes);
    return detail::from_bytes<T>(bytes);
  }
  /// `size` bytes as text.
  std::string text(std::uint64_t size) {
    require(size);
    std::string result(static_cast<std::size_t>(size), '\0');
    read(std::as_writable_bytes(std::span(result)));
    return result;
  }
  void skip(std::uint64_t size) {
    require(size);
    position_ += size;
  }
  /// Moves to `position`, which must lie in what was passed already.
  void back_to(std::uint64_t position) {
    QDYLORA_EXPECTS(position <= position_, bad_argument, "FileCursor::back_to: the position lies ahead");
    position_ = position;
  }

 private:
  static constexpr std::size_t window_bytes = std::size_t{1} << 16;

  const InputFile& file_;
  std::uint64_t end_;
  std::uint64_t position_ = 0;
  std::uint64_t window_begin_ = 0;
  std::vector<std::byte> window_;
};

/// Replaces the file `target` as a whole. What is written goes to "<target>.tmp" in the same folder; commit() makes it durable and
/// gives it the target's name, in the order write, fsync(file), rename, fsync(folder). Until then, and when the object is destroyed
/// without commit(), the old file stays as it was and the temporary file is removed. One left by a process that died is taken over.
///
/// The temporary file is locked while in use, so that of two writers of one target the second gets Errc::open. (Where a file system
/// has no locks, callers must see to that.) A symbolic link at `target` is replaced, not followed.
template <class System>
class BasicAtomicFile {
 public:
  /// Errc::open, Errc::no_space.
  explicit BasicAtomicFile(std::filesystem::path target) : target_(std::move(target)), temporary_(target_) {
    if (!target_.has_filename()) throw Error(Errc::open, "is not the name of a file", {.file = target_.native()});
    temporary_ += ".tmp";
    open_temporary();
    try {
      if (detail::uninterrupted([&] { return System::truncate(file_.get()); }) != 0) {
        detail::raise_system(Errc::write, "cannot empty", errno, place());
      }
    } catch (...) {
      discard();
      throw;
    }
  }
  BasicAtomicFile(const BasicAtomicFile&) = delete;
  BasicAtomicFile& operator=(const BasicAtomicFile&) = delete;
  ~BasicAtomicFile() { discard(); }

  /// Bytes written so far.
  std::uint64_t size() const noexcept { return size_; }

  /// Appends. Errc::no_space, Errc::write; Errc::state_order after commit().
  void write(std::span<const std::byte> source) {
    QDYLORA_EXPECTS(file_.get() >= 0, state_order, "AtomicFile::write after commit: " + target_.native());
    while (!source.empty()) {
      const std::size_t count = std::min(source.size(), detail::most_bytes_per_call);
      const ssize_t put = detail::uninterrupted([&] { return System::write(file_.get(), source.data(), count); });
      if (put < 0) detail::raise_system(Errc::write, "cannot write", errno, place());
      if (put == 0) throw Error(Errc::write, "cannot write: the system took no bytes", place());
      size_ += static_cast<std::uint64_t>(put);
      source = source.subspan(static_cast<std::size_t>(put));
    }
  }
  void write(std::string_view text) { write(std::as_bytes(std::span(text))); }

  /// Errc::sync, Errc::write, Errc::no_space: the old file is still there, except when the last step (making the new name durable)
  /// fails: then the new content is in place but may be lost with the machine's power.
  void commit() {
    QDYLORA_EXPECTS(file_.get() >= 0, state_order, "AtomicFile::commit after commit: " + target_.native());
    if (detail::uninterrupted([&] { return System::sync(file_.get()); }) != 0) {
      detail::raise_system(Errc::sync, "cannot sync", errno, place());
    }
    if (System::rename(temporary_.c_str(), target_.c_str()) != 0) {
      detail::raise_system(Errc::write, "cannot rename to " + target_.native(), errno, place());
    }
    file_.close();
    sync_folder();
  }

 private:
  ErrorPlace place() const { return {.file = temporary_.native(), .offset = size_}; }

  void open_temporary() {
    for (;;) {
      struct stat opened {};
      struct stat named {};
      file_ = detail::open_regular<System>(temporary_, O_WRONLY | O_CREAT | O_NOFOLLOW, opened);
      if (System::lock(file_.get()) != 0) {
        if (errno == EWOULDBLOCK) throw Error(Errc::open, "another writer is replacing the target", place());
        if (errno != ENOSYS && errno != ENOLCK && errno != EOPNOTSUPP) {
          detail::raise_system(Errc::open, "cannot lock", errno, place());
        }
      }
      // Between our open and our lock another writer may have renamed or removed this file: then it is not ours to touch.
      if (System::stat(temporary_.c_str(), &named) == 0) {
        if (named.st_dev == opened.st_dev && named.st_ino == opened.st_ino) return;
      } else if (errno != ENOENT) {
        detail::raise_system(Errc::open, "cannot inspect", errno, place());
      }
    }
  }

  void sync_folder() const {
    std::filesystem::path folder = target_.parent_path();
    if (folder.empty()) folder = ".";
    const detail::Descriptor<System> handle{detail::uninterrupted(
        [&] { return System::open(folder.c_str(), O_RDONLY | O_DIRECTORY | O_CLOEXEC, mode_t{0}); })};
    if (handle.get() < 0) detail::raise_system(Errc::sync, "cannot open the folder", errno, {.file = folder.native()});
    // EINVAL: a file system that does not sync folders; there is nothing more to ask for.
    if (detail::uninterrupted([&] { return System::sync(handle.get()); }) != 0 && errno != EINVAL) {
      detail::raise_system(Errc::sync, "cannot sync the folder", errno, {.file = folder.native()});
    }
  }

  void discard() noexcept {
    if (file_.get() < 0) return;
    System::unlink(temporary_.c_str());  // before the lock goes
    file_.close();
  }

  std::filesystem::path target_;
  std::filesystem::path temporary_;
  detail::Descriptor<System> file_;
  std::uint64_t size_ = 0;
};

using AtomicFile = BasicAtomicFile<PosixSystem>;

/// Atomically makes `content` the content of the file `path`. Errors as AtomicFile.
inline void replace_file(const std::filesystem::path& path, std::span<const std::byte> content) {
  AtomicFile file(path);
  file.write(content);
  file.commit();
}
inline void replace_file(const std::filesystem::path& path, std::string_view content) {
  replace_file(path, std::as_bytes(std::span(content)));
}

}  // namespace qdylora
