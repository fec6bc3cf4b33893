// GGUF, versions 2 and 3 (github.com/ggml-org/ggml, docs/gguf.md), little-endian:
//
//   "GGUF" | u32 version | u64 n_tensors | u64 n_kv
//   n_kv x      { string key | u32 type | value }              string = u64 length | bytes; array = u32 type | u64 count | elements
//   n_tensors x { string name | u32 n_dims | u64 ne[n_dims] | u32 ggml type | u64 offset }
//   padding to the alignment | tensor data, each tensor padded to the alignment
//
// ne[0] runs fastest; shapes here are in the usual order, slowest first. The alignment is the value of "general.alignment", or 32.
// Offsets count from the start of the data and must be the running sum of padded sizes, as in the reference. Metadata is kept as
// the bytes of the file, and turned into values where they are asked for, with the stored type and count checked there.
// What follows the last tensor is ignored, as in the reference. (Long because it is one parser, from types to placement.)
#pragma once

#include <algorithm>
#include <array>
#include <bit>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <type_traits>
#include <utility>
#include <vector>

#include <qdylora/core/matrix.hpp>
#include <qdylora/io/checked.hpp>
#include <qdylora/io/dtype.hpp>
#include <qdylora/io/file.hpp>
#include <qdylora/io/ggml_types.hpp>

namespace qdylora {

/// Types of metadata values, with their numbers in files.
enum class GgufType : std::uint32_t {
  uint8, int8, uint16, int16, uint32, int32, float32, boolean, string, array, uint64, int64, float64,
};

namespace detail {

struct GgufTypeEntry {
  std::string_view name;
  std::uint64_t bytes;  // of a value; 0 = varies
};

// Position = the enumerator.
inline constexpr std::array<GgufTypeEntry, 13> gguf_types{{{"uint8", 1}, {"int8", 1}, {"uint16", 2}, {"int16", 2}, {"uint32", 4},
                                                           {"int32", 4}, {"float32", 4}, {"bool", 1}, {"string", 0}, {"array", 0},
                                                           {"uint64", 8}, {"int64", 8}, {"float64", 8}}};
static_assert(static_cast<std::size_t>(GgufType::float64) + 1 == gguf_types.size());

constexpr const GgufTypeEntry& gguf_type_entry(GgufType type) noexcept { return gguf_types[static_cast<std::size_t>(type)]; }

template <class T>
constexpr GgufType gguf_type_of() noexcept {
  if constexpr (std::same_as<T, std::uint8_t>) return GgufType::uint8;
  else if constexpr (std::same_as<T, std::int8_t>) return GgufType::int8;
  else if constexpr (std::same_as<T, std::uint16_t>) return GgufType::uint16;
  else if constexpr (std::same_as<T, std::int16_t>) return GgufType::int16;
  else if constexpr (std::same_as<T, std::uint32_t>) return GgufType::uint32;
  else if constexpr (std::same_as<T, std::int32_t>) return GgufType::int32;
  else if constexpr (std::same_as<T, float>) return GgufType::float32;
  else if constexpr (std::same_as<T, bool>) return GgufType::boolean;
  else if constexpr (std::same_as<T, std::uint64_t>) return GgufType::uint64;
  else if constexpr (std::same_as<T, std::int64_t>) return GgufType::int64;
  else if constexpr (std::same_as<T, double>) return GgufType::float64;
  else return GgufType::string;
}

}  // namespace detail

constexpr std::string_view name(GgufType type) noexcept { return detail::gguf_type_entry(type).name; }

/// The C++ types a metadata value can be asked for as.
template <class T>
concept GgufScalar = std::same_as<T, std::string> || detail::gguf_type_of<T>() != GgufType::string;

/// A metadata value: its type and its bytes as the file has them.
struct GgufValue {
  GgufType type = GgufType::uint8;     // of the elements for an array
  std::optional<std::uint64_t> count;  // elements; nothing for a single value
  std::string bytes;                   // of a single string: without its length
};

/// The key-value pairs of a file. Asking for another type than the stored one is Errc::bad_config: an int32 is no uint32.
class GgufMetadata {
 public:
  using Map = std::map<std::string, GgufValue, std::less<>>;

  /// Every pair, also those this library does not know, sorted by key.
  const Map& entries() const noexcept { return entries_; }
  /// The file they are from.
  const std::string& file() const noexcept { return file_; }

  bool contains(std::string_view key) const noexcept { return entries_.find(key) != entries_.end(); }
  /// Null when absent.
  const GgufValue* find(std::string_view key) const noexcept {
    const auto at = entries_.find(key);
    return at == entries_.end() ? nullptr : &at->second;
  }

  /// A single value. Errc::bad_config when the key is absent or its value is another type.
  template <GgufScalar T>
  T get(std::string_view key) const {
    const GgufValue& value = expect(key, detail::gguf_type_of<T>(), false);
    if constexpr (std::same_as<T, std::string>) return value.bytes;
    else return scalar<T>(value.bytes, 0);
  }
  /// The same, or `fallback` when the key is absent.
  template <GgufScalar T>
  T get_or(std::string_view key, T fallback) const {
    return contains(key) ? get<T>(key) : std::move(fallback);
  }

  /// An array of T. Errc::bad_config when the key is absent, its value is no array, or its elements are another type.
  template <GgufScalar T>
  std::vector<T> array(std::string_view key) const {
    const GgufValue& value = expect(key, detail::gguf_type_of<T>(), true);
    const auto count = static_cast<std::size_t>(*value.count);  // the bytes of so many elements were read: it is small enough
    std::vector<T> result;
    result.reserve(count);
    std::size_t offset = 0;
    for (std::size_t i = 0; i < count; ++i) {
      if constexpr (std::same_as<T, std::string>) {
        const auto length = static_cast<std::size_t>(scalar<std::uint64_t>(value.bytes, offset));
        offset += sizeof(std::uint64_t);
        result.push_back(value.bytes.substr(offset, length));
        offset += length;
      } else {
        result.push_back(scalar<T>(value.bytes, offset));
        offset += sizeof(T);
      }
    }
    return result;
  }

 private:
  friend class GgufFile;

  template <class T>
  static T scalar(const std::string& bytes, std::size_t offset) {
    if constexpr (std::same_as<T, bool>) return bytes[offset] != 0;
    else return detail::from_bytes<T>(reinterpret_cast<const std::byte*>(bytes.data()) + offset);
  }

  const GgufValue& expect(std::string_view key, GgufType type, bool is_array) const {
    const auto text = [](GgufType t, bool a) { return std::string(a ? "an array of " : "a single ") + std::string(name(t)); };
    const GgufValue* value = find(key);
    if (value == nullptr) throw Error(Errc::bad_config, "key '" + printable(key) + "' is absent", {.file = file_});
    if (value->type != type || value->count.has_value() != is_array) {
      throw Error(Errc::bad_config,
                  "key '" + printable(key) + "': expected " + text(type, is_array) + ", found " +
                      text(value->type, value->count.has_value()),
                  {.file = file_});
    }
    return *value;
  }

  std::string file_;
  Map entries_;
};

/// A stored tensor.
struct GgufTensor {
  std::string name;
  const GgmlType* type = nullptr;
  std::vector<Index> shape;   // slowest first: a weight is [out, in]
  std::uint64_t begin = 0;    // of its data, in bytes from the start of the file
  std::uint64_t size = 0;     // in bytes, without padding
};

/// A GGUF file open for reading. The constructor validates all of the header; reading is const and may happen in several threads.
class GgufFile {
 public:
  /// Errc::open, read, truncated, magic, version, utf8, duplicate, dtype, code_range, shape, overflow, offset, alignment, limit,
  /// unsupported.
  explicit GgufFile(const std::filesystem::path& path, const Limits& limits = {}) : file_(path), limits_(limits) { parse(); }

  /// The path it was opened with.
  const std::string& name() const noexcept { return file_.name(); }
  const GgufMetadata& metadata() const noexcept { return metadata_; }
  /// In the order of the file.
  const std::vector<GgufTensor>& tensors() const noexcept { return tensors_; }

  bool contains(std::string_view tensor) const noexcept { return find(tensor) != nullptr; }

  /// Errc::missing_tensor.
  const GgufTensor& info(std::string_view tensor) const {
    if (const GgufTensor* found = find(tensor)) return *found;
    throw Error(Errc::missing_tensor, "is not in the file", {.file = name(), .tensor = std::string(tensor)});
  }

  /// Copies a tensor's bytes; `target` has exactly its size. Errc::missing_tensor, shape_mismatch, read, truncated.
  void read(std::string_view tensor, std::span<std::byte> target) const {
    const GgufTensor& found = info(tensor);
    if (target.size() != found.size) {
      throw Error(Errc::shape_mismatch,
                  "expected room for " + std::to_string(found.size) + " bytes, found " + std::to_string(target.size()),
                  place(found));
    }
    file_.pread_exact(found.begin, target);
  }

  /// Decodes rows [first_row, first_row + out.rows); only these are read. A vector [n] is the row [1, n].
  /// Errc::missing_tensor, unsupported (a type that cannot be decoded), shape, shape_mismatch, read, truncated.
  void read_rows(std::string_view tensor, Index first_row, MatrixView<float> out) const {
    const GgufTensor& found = info(tensor);
    detail::read_rows(file_, stored(found), first_row, out, place(found));
  }

  /// A whole tensor, decoded. Errors as read_rows.
  Matrix<float> matrix(std::string_view tensor) const {
    const GgufTensor& found = info(tensor);
    return detail::read_matrix(file_, stored(found), place(found));
  }

 private:
  static constexpr std::uint64_t default_alignment = 32;
  static constexpr std::uint64_t most_dimensions = 4;
  static constexpr std::uint64_t least_tensor_bytes = 8 + 4 + 4 + 8;  // of its record: an empty name, no dimensions
  static constexpr std::uint64_t least_entry_bytes = 8 + 1 + 4 + 1;   // a key and a value of one byte each

  ErrorPlace place(const GgufTensor& tensor) const { return {.file = name(), .tensor = tensor.name, .offset = tensor.begin}; }

  const GgufTensor* find(std::string_view tensor) const noexcept {
    const auto at =
        std::ranges::lower_bound(by_name_, tensor, {}, [&](std::size_t i) -> std::string_view { return tensors_[i].name; });
    return at != by_name_.end() && tensors_[*at].name == tensor ? &tensors_[*at] : nullptr;
  }

  detail::StoredMatrix stored(const GgufTensor& tensor) const {
    const auto [rows, cols] = detail::matrix_shape(tensor.shape, place(tensor));
    if (!tensor.type->decodable()) {
      throw Error(Errc::unsupported, "type " + std::string(tensor.type->name) + " cannot be read as float", place(tensor));
    }
    return {tensor.type->format, tensor.begin, rows, cols};
  }

  void parse() {
    FileCursor cursor(file_, limits_.header_bytes);
    if (cursor.text(4) != "GGUF") throw Error(Errc::magic, "does not start with 'GGUF'", file_.place(0));
    const auto version = cursor.read<std::uint32_t>();
    if (version != 2 && version != 3) {
      throw Error(Errc::version,
                  "expected version 2 or 3, found " + std::to_string(version) +
                      ((version & 0xFFFF) == 0 && version != 0 ? " (a big-endian file)" : ""),
                  file_.place(4));
    }
    const auto tensors = cursor.read<std::uint64_t>();
    const auto entries = cursor.read<std::uint64_t>();
    expect_count("tensors", tensors, limits_.tensors, cursor, least_tensor_bytes);
    expect_count("metadata entries", entries, limits_.metadata_entries, cursor, least_entry_bytes);

    metadata_.file_ = name();
    for (std::uint64_t i = 0; i < entries; ++i) parse_entry(cursor);
    const std::uint64_t alignment = parse_alignment();
    cursor.require(tensors, least_tensor_bytes);
    tensors_.reserve(static_cast<std::size_t>(tensors));
    for (std::uint64_t i = 0; i < tensors; ++i) parse_tensor(cursor, alignment);
    index_names();
    place_data(cursor, alignment);
  }

  static void expect_count(const char* what, std::uint64_t count, std::uint64_t most, const FileCursor& cursor,
                           std::uint64_t bytes) {
    if (count > most) {
      throw Error(Errc::limit, std::to_string(count) + " " + what + ", at most " + std::to_string(most), cursor.place());
    }
    cursor.require(count, bytes);
  }

  /// A key or a tensor's name: bounded, UTF-8, without NUL.
  std::string parse_name(FileCursor& cursor) const {
    const std::uint64_t start = cursor.position();
    const auto length = cursor.read<std::uint64_t>();
    if (length > limits_.name_bytes) {
      throw Error(Errc::limit, "a name of " + std::to_string(length) + " bytes, at most " + std::to_string(limits_.name_bytes),
                  file_.place(start));
    }
    std::string text = cursor.text(length);
    if (utf8_error(text) || text.find('\0') != text.npos) {
      throw Error(Errc::utf8, "name '" + printable(text) + "' is not UTF-8 text", file_.place(start));
    }
    return text;
  }

  static GgufType parse_type(FileCursor& cursor) {
    const ErrorPlace start = cursor.place();
    const auto number = cursor.read<std::uint32_t>();
    if (number < detail::gguf_types.size()) return static_cast<GgufType>(number);
    throw Error(Errc::dtype, "unknown value type " + std::to_string(number), start);
  }

  /// The length of a string, which is known to follow.
  std::uint64_t parse_length(FileCursor& cursor) const {
    const std::uint64_t start = cursor.position();
    const auto length = cursor.read<std::uint64_t>();
    if (length > limits_.string_bytes) {
      throw Error(Errc::limit, "a string of " + std::to_string(length) + " bytes, at most " + std::to_string(limits_.string_bytes),
                  file_.place(start));
    }
    cursor.require(length);
    return length;
  }

  void parse_entry(FileCursor& cursor) {
    const ErrorPlace start = cursor.place();
    std::string key = parse_name(cursor);
    if (key.empty()) throw Error(Errc::bad_config, "an empty key", start);
    GgufValue value;
    value.type = parse_type(cursor);
    if (value.type == GgufType::array) {
      parse_array(cursor, value);
    } else if (value.type == GgufType::string) {
      value.bytes = cursor.text(parse_length(cursor));
    } else {
      read_values(cursor, value, 1);
    }
    const auto [at, is_new] = metadata_.entries_.emplace(std::move(key), std::move(value));
    if (!is_new) throw Error(Errc::duplicate, "key '" + printable(at->first) + "' twice", start);
  }

  void parse_array(FileCursor& cursor, GgufValue& value) {
    const ErrorPlace start = cursor.place();
    value.type = parse_type(cursor);
    if (value.type == GgufType::array) throw Error(Errc::unsupported, "an array of arrays", start);
    const ErrorPlace at = cursor.place();
    const auto count = cursor.read<std::uint64_t>();
    if (count > limits_.array_elements) {
      throw Error(Errc::limit,
                  "an array of " + std::to_string(count) + " elements, at most " + std::to_string(limits_.array_elements), at);
    }
    value.count = count;
    if (value.type != GgufType::string) return read_values(cursor, value, count);
    // Walk the strings to find where they end, then read them at once: nothing is allocated for an array that is cut off.
    cursor.require(count, sizeof(std::uint64_t));
    const std::uint64_t begin = cursor.position();
    for (std::uint64_t i = 0; i < count; ++i) cursor.skip(parse_length(cursor));
    const std::uint64_t size = cursor.position() - begin;
    cursor.back_to(begin);
    value.bytes = cursor.text(size);
  }

  /// `count` values of fixed size.
  static void read_values(FileCursor& cursor, GgufValue& value, std::uint64_t count) {
    const ErrorPlace start = cursor.place();
    value.bytes = cursor.text(checked_mul(count, detail::gguf_type_entry(value.type).bytes, start));
    if (value.type == GgufType::boolean) {
      if (const auto at = value.bytes.find_first_not_of(std::string_view("\0\1", 2)); at != value.bytes.npos) {
        throw Error(Errc::code_range, "a boolean that is neither 0 nor 1",
                    {.file = start.file, .offset = checked_add(*start.offset, at, start)});
      }
    }
  }

  std::uint64_t parse_alignment() const {
    constexpr std::string_view key = "general.alignment";
    const std::uint64_t alignment = metadata_.get_or<std::uint32_t>(key, default_alignment);
    if (!std::has_single_bit(alignment) || alignment > limits_.alignment) {
      throw Error(Errc::alignment,
                  std::string(key) + ": expected a power of two up to " + std::to_string(limits_.alignment) + ", found " +
                      std::to_string(alignment),
                  {.file = name()});
    }
    return alignment;
  }

  /// Leaves begin relative to the data section.
  void parse_tensor(FileCursor& cursor, std::uint64_t alignment) {
    GgufTensor tensor;
    tensor.name = parse_name(cursor);
    const auto here = [&] {
      ErrorPlace place = cursor.place();
      place.tensor = tensor.name;
      return place;
    };
    const ErrorPlace at_dimensions = here();
    const auto dimensions = cursor.read<std::uint32_t>();
    if (dimensions > std::min(most_dimensions, limits_.dimensions)) {
      throw Error(Errc::shape, std::to_string(dimensions) + " dimensions", at_dimensions);
    }
    std::uint64_t count = 1;
    for (std::uint32_t i = 0; i < dimensions; ++i) {
      const ErrorPlace at = here();
      const auto extent = cursor.read<std::uint64_t>();
      tensor.shape.push_back(checked_narrow<Index>(extent, at));
      count = checked_mul(count, extent, at);
    }
    const ErrorPlace at_type = here();
    tensor.type = &ggml_type(cursor.read<std::uint32_t>(), at_type);
    const Index row = tensor.shape.empty() ? 1 : tensor.shape.front();
    if (row % tensor.type->block_elements() != 0) {
      throw Error(Errc::shape,
                  "rows of " + std::to_string(row) + " elements are not whole blocks of " +
                      std::to_string(tensor.type->block_elements()) + " (" + std::string(tensor.type->name) + ")",
                  at_type);
    }
    std::ranges::reverse(tensor.shape);
    tensor.size = checked_mul(count / static_cast<std::uint64_t>(tensor.type->block_elements()),
                              static_cast<std::uint64_t>(tensor.type->block_bytes()), at_type);
    const ErrorPlace at_offset = here();
    const auto offset = cursor.read<std::uint64_t>();
    const std::uint64_t expected =
        tensors_.empty()
            ? 0
            : checked_pad_up(checked_add(tensors_.back().begin, tensors_.back().size, at_offset), alignment, at_offset);
    if (offset != expected) {
      throw Error(Errc::offset, "expected offset " + std::to_string(expected) + ", found " + std::to_string(offset), at_offset);
    }
    tensor.begin = offset;
    tensors_.push_back(std::move(tensor));
  }

  void index_names() {
    by_name_.resize(tensors_.size());
    std::iota(by_name_.begin(), by_name_.end(), std::size_t{0});
    const auto tensor_name = [&](std::size_t i) -> std::string_view { return tensors_[i].name; };
    std::ranges::sort(by_name_, {}, tensor_name);
    const auto twice = std::ranges::adjacent_find(by_name_, {}, tensor_name);
    if (twice != by_name_.end()) {
      throw Error(Errc::duplicate, "the tensor occurs twice", {.file = name(), .tensor = tensors_[*twice].name});
    }
  }

  /// Turns begin into a position in the file; every tensor, also an empty one, must lie inside.
  void place_data(const FileCursor& cursor, std::uint64_t alignment) {
    const std::uint64_t data_begin = checked_pad_up(cursor.position(), alignment, cursor.place());
    for (GgufTensor& tensor : tensors_) {
      const ErrorPlace at{.file = name(), .tensor = tensor.name, .offset = file_.size()};
      tensor.begin = checked_add(data_begin, tensor.begin, at);
      if (tensor.begin > file_.size() || tensor.size > file_.size() - tensor.begin) {
        throw Error(Errc::truncated,
                    "expected " + std::to_string(tensor.size) + " bytes from byte " + std::to_string(tensor.begin) +
                        " on, found the end of the file",
                    at);
      }
    }
  }

  InputFile file_;
  Limits limits_;
  GgufMetadata metadata_;
  std::vector<GgufTensor> tensors_;
  std::vector<std::size_t> by_name_;     // indices into tensors_, sorted by name
};

}  // namespace qdylora
