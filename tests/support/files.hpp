// Files made by tests: a folder that goes away, bytes put together by hand, and the error a call ends in.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <optional>
#include <stdexcept>
#include <string>
#include <string_view>
#include <type_traits>

#include <qdylora/core/error.hpp>

namespace test {

/// A new folder, removed with all it holds.
class TemporaryFolder {
 public:
  TemporaryFolder() {
    std::string name = (std::filesystem::temp_directory_path() / "qdylora-XXXXXX").native();
    if (::mkdtemp(name.data()) == nullptr) throw std::runtime_error("cannot make a temporary folder");
    path_ = name;
  }
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;
  ~TemporaryFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path_, ignored);
  }
  const std::filesystem::path& path() const { return path_; }
  std::filesystem::path operator/(const std::string& name) const { return path_ / name; }
  /// Entries in it.
  std::ptrdiff_t count() const { return std::distance(std::filesystem::directory_iterator(path_), {}); }

 private:
  std::filesystem::path path_;
};

inline void write_file(const std::filesystem::path& path, std::string_view bytes) {
  std::ofstream(path, std::ios::binary | std::ios::trunc).write(bytes.data(), static_cast<std::streamsize>(bytes.size()));
}

inline std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}

/// Little-endian bytes, appended one after another.
class Bytes : public std::string {
 public:
  template <class T>
    requires std::is_arithmetic_v<T>
  Bytes& number(T value) {
    char bytes[sizeof(T)];
    std::memcpy(bytes, &value, sizeof(T));
    append(bytes, sizeof(T));
    return *this;
  }
  Bytes& u8(std::uint8_t value) { return number(value); }
  Bytes& u32(std::uint32_t value) { return number(value); }
  Bytes& u64(std::uint64_t value) { return number(value); }
  Bytes& raw(std::string_view text) {
    append(text);
    return *this;
  }
  /// A GGUF string: length and bytes.
  Bytes& text(std::string_view text) { return u64(text.size()).raw(text); }
  /// Zeros up to a multiple of `alignment`.
  Bytes& pad(std::size_t alignment) {
    append((alignment - size() % alignment) % alignment, '\0');
    return *this;
  }
};

/// A safetensors file: the length of `header`, `header`, `data`.
inline std::string safetensors_bytes(std::string_view header, std::string_view data = {}) {
  return Bytes().text(header).raw(data);
}

/// The qdylora::Error that `call` ends in; nothing when it returns. Other exceptions pass.
template <class Call>
std::optional<qdylora::Error> error_of(Call call) {
  try {
    call();
  } catch (const qdylora::Error& error) {
    return error;
  }
  return std::nullopt;
}

/// Only the code of it.
template <class Call>
std::optional<qdylora::Errc> code_of(Call call) {
  if (const auto error = error_of(call)) return error->code();
  return std::nullopt;
}

}  // namespace test
