// The safetensors container (github.com/huggingface/safetensors): u64 N | N bytes of JSON | tensor data.
//
// JSON: {"<name>": {"dtype": "F32", "shape": [2, 3], "data_offsets": [begin, end]}, ..., "__metadata__": {"<key>": "<text>", ...}},
// offsets in bytes from the start of the data. What the reader accepts the reference accepts too; these alone are errors here: a
// key beside the three of a tensor, a duplicate key, null for __metadata__, a blank before the first brace, an extent beyond
// int64, and anything over Limits. The writer's files are byte-identical to the reference's for at most one metadata entry; more
// are sorted here and in no fixed order there.
//
// Data is only as aligned as the writer made it, so readers copy bytes and never cast pointers. (Long because reader and
// writer share these rules.)
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <functional>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/core/matrix.hpp>
#include <qdylora/io/checked.hpp>
#include <qdylora/io/dtype.hpp>
#include <qdylora/io/file.hpp>
#include <qdylora/io/json.hpp>

namespace qdylora {

/// A stored tensor; its data is bytes [begin, end) of the data section.
struct TensorInfo {
  std::string name;
  DType dtype = DType::F32;
  std::vector<Index> shape;
  std::uint64_t begin = 0;
  std::uint64_t end = 0;

  /// In bytes.
  std::uint64_t size() const noexcept { return end - begin; }
};

namespace detail {

/// Receives the header's JSON event by event, so that no document is built of a text that may be 100 MB and nothing like a header.
class SafetensorsHeader {
 public:
  std::vector<TensorInfo> tensors;  // in the order of the text
  std::map<std::string, std::string, std::less<>> metadata;

  SafetensorsHeader(ErrorPlace place, const Limits& limits) : place_(std::move(place)), limits_(limits) {}

  // The interface that Json::sax_parse calls. What does not belong where it stands ends in unexpected(), which throws.
  bool null() { return unexpected("null"); }
  bool boolean(bool) { return unexpected("a boolean"); }
  bool number_integer(std::int64_t) { return unexpected("a negative number"); }
  bool number_float(double, const std::string&) { return unexpected("a number that is no 64-bit integer"); }
  bool binary(Json::binary_t&) { return unexpected("binary data"); }

  bool number_unsigned(std::uint64_t value) {
    if (at_ == At::in_shape) {
      if (tensor().shape.size() == limits_.dimensions) {
        throw Error(Errc::limit, "more than " + std::to_string(limits_.dimensions) + " dimensions", here());
      }
      tensor().shape.push_back(checked_narrow<Index>(value, here()));
    } else if (at_ == At::in_offsets && offsets_ < 2) {
      (offsets_++ == 0 ? tensor().begin : tensor().end) = value;
    } else {
      unexpected("a number");
    }
    return true;
  }

  bool string(std::string& text) {
    if (at_ == At::dtype) {
      const auto dtype = dtype_from_name(text);
      if (!dtype) throw Error(Errc::dtype, "unknown dtype '" + printable(text, 32) + "'", here());
      tensor().dtype = *dtype;
      at_ = At::tensor;
    } else if (at_ == At::metadata_value) {
      if (text.size() > limits_.string_bytes) throw Error(Errc::limit, "a metadata string is too long", here());
      if (!metadata.emplace(std::move(key_), std::move(text)).second) {
        throw Error(Errc::duplicate, "a metadata key occurs twice", here());
      }
      at_ = At::metadata;
    } else {
      unexpected("a string");
    }
    return true;
  }

  bool start_object(std::size_t) {
    if (at_ == At::start) at_ = At::top;
    else if (at_ == At::tensor_value) at_ = At::tensor;
    else if (at_ == At::metadata_section) at_ = At::metadata;
    else unexpected("an object");
    return true;
  }

  bool key(std::string& text) {
    if (at_ == At::tensor) return tensor_key(text);
    // What is left is At::top or At::metadata: the parser gives keys inside objects only.
    if (at_ == At::top && text == "__metadata__") {
      if (std::exchange(has_metadata_, true)) throw Error(Errc::duplicate, "two __metadata__ sections", place_);
      at_ = At::metadata_section;
      return true;
    }
    if (text.size() > limits_.name_bytes) {
      throw Error(Errc::limit, "a name of " + std::to_string(text.size()) + " bytes", here());
    }
    if (at_ == At::metadata) {
      if (metadata.size() == limits_.metadata_entries) throw Error(Errc::limit, "too many metadata entries", place_);
      key_ = std::move(text);
      at_ = At::metadata_value;
    } else {
      if (tensors.size() == limits_.tensors) throw Error(Errc::limit, "too many tensors", place_);
      tensors.push_back({.name = std::move(text), .shape = {}});
      has_ = 0;
      at_ = At::tensor_value;
    }
    return true;
  }

  bool end_object() {
    if (at_ == At::tensor) {
      if (has_ != (has_dtype | has_shape | has_offsets)) throw Error(Errc::json, "dtype, shape or data_offsets is absent", here());
      at_ = At::top;
    } else {
      at_ = at_ == At::metadata ? At::top : At::end;
    }
    return true;
  }

  bool start_array(std::size_t) {
    if (at_ == At::shape) at_ = At::in_shape;
    else if (at_ == At::offsets) at_ = At::in_offsets;
    else unexpected("an array");
    return true;
  }

  bool end_array() {
    if (at_ == At::in_offsets && offsets_ != 2) throw Error(Errc::json, "expected two data_offsets", here());
    at_ = At::tensor;
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const Json::exception& exception) {
    raise_json(exception, shifted(place_, position == 0 ? 0 : position - 1));
  }

 private:
  // What comes next: `start` the document, `top` a name or the end, `tensor_value` a tensor's object, `tensor` one of its keys or
  // its end, `dtype`, `shape`, `offsets` the values of these keys, `in_...` items of that array, `metadata...` likewise.
  enum class At {
    start, top, tensor_value, tensor, dtype, shape, in_shape, offsets, in_offsets, metadata_section, metadata, metadata_value, end
  };
  static constexpr unsigned has_dtype = 1, has_shape = 2, has_offsets = 4;

  TensorInfo& tensor() { return tensors.back(); }

  ErrorPlace here() const {
    ErrorPlace place = place_;
    if (!tensors.empty() && at_ >= At::tensor_value && at_ <= At::in_offsets) place.tensor = tensors.back().name;
    return place;
  }

  [[noreturn]] bool unexpected(const char* what) const {
    throw Error(Errc::json, std::string("the header is not of the safetensors form: unexpected ") + what, here());
  }

  bool tensor_key(const std::string& text) {
    unsigned bit = 0;
    if (text == "dtype") {
      bit = has_dtype;
      at_ = At::dtype;
    } else if (text == "shape") {
      bit = has_shape;
      at_ = At::shape;
    } else if (text == "data_offsets") {
      bit = has_offsets;
      at_ = At::offsets;
      offsets_ = 0;
    } else {
      throw Error(Errc::json, "unknown key '" + printable(text, 32) + "'", here());
    }
    if (has_ & bit) throw Error(Errc::duplicate, "key '" + text + "' twice", here());
    has_ |= bit;
    return true;
  }

  ErrorPlace place_;  // the first byte of the JSON text
  const Limits& limits_;
  At at_ = At::start;
  unsigned has_ = 0;      // keys of the current tensor
  unsigned offsets_ = 0;  // items of its data_offsets
  bool has_metadata_ = false;
  std::string key_;
};

}  // namespace detail

/// A safetensors file open for reading. The constructor validates all of the header before anything is allocated for data; reading
/// is const and may happen in several threads.
class SafetensorsFile {
 public:
  /// Errc::open, read, truncated, magic, header_size, utf8, json, duplicate, dtype, shape, overflow, offset, overlap, hole,
  /// trailing, limit.
  explicit SafetensorsFile(const std::filesystem::path& path, const Limits& limits = {}) : file_(path) {
    parse(limits);
    check_offsets();
    std::ranges::sort(tensors_, {}, &TensorInfo::name);
    const auto twice = std::ranges::adjacent_find(tensors_, {}, &TensorInfo::name);
    if (twice != tensors_.end()) throw Error(Errc::duplicate, "the tensor occurs twice", place(*twice));
  }

  /// The path it was opened with.
  const std::string& name() const noexcept { return file_.name(); }
  /// Sorted by name.
  const std::vector<TensorInfo>& tensors() const noexcept { return tensors_; }
  const std::map<std::string, std::string, std::less<>>& metadata() const noexcept { return metadata_; }

  bool contains(std::string_view tensor) const noexcept { return find(tensor) != nullptr; }

  /// Errc::missing_tensor.
  const TensorInfo& info(std::string_view tensor) const {
    if (const TensorInfo* found = find(tensor)) return *found;
    throw Error(Errc::missing_tensor, "is not in the file", {.file = name(), .tensor = std::string(tensor)});
  }

  /// Copies a tensor's bytes; `target` has exactly its size. Errc::missing_tensor, shape_mismatch, read, truncated.
  void read(std::string_view tensor, std::span<std::byte> target) const {
    const TensorInfo& found = info(tensor);
    if (target.size() != found.size()) {
      throw Error(Errc::shape_mismatch,
                  "expected room for " + std::to_string(found.size()) + " bytes, found " + std::to_string(target.size()),
                  place(found));
    }
    file_.pread_exact(position(found), target);
  }

  Buffer<std::byte> bytes(std::string_view tensor) const {
    const TensorInfo& found = info(tensor);
    Buffer<std::byte> result(checked_narrow<Index>(found.size(), place(found)));
    read(tensor, result.span());
    return result;
  }

  /// A tensor of floating-point type as float: [n] becomes [1, n]. Errc::missing_tensor, dtype, shape, read, truncated.
  Matrix<float> matrix(std::string_view tensor) const {
    const TensorInfo& found = info(tensor);
    return detail::read_matrix(file_, stored(found), place(found));
  }

  /// Rows [first_row, first_row + out.rows) of such a tensor; only these are read. Also Errc::shape_mismatch.
  void read_rows(std::string_view tensor, Index first_row, MatrixView<float> out) const {
    const TensorInfo& found = info(tensor);
    detail::read_rows(file_, stored(found), first_row, out, place(found));
  }

 private:
  static constexpr std::uint64_t length_bytes = 8;

  ErrorPlace place(const TensorInfo& tensor) const {
    return {.file = name(), .tensor = tensor.name, .offset = position(tensor)};
  }
  // Of the tensor's first byte in the file. Offsets that check_offsets() has yet to refuse are pinned to the end.
  std::uint64_t position(const TensorInfo& tensor) const noexcept {
    return data_begin_ + std::min(tensor.begin, file_.size() - data_begin_);
  }

  const TensorInfo* find(std::string_view tensor) const noexcept {
    const auto at = std::ranges::lower_bound(tensors_, tensor, {}, &TensorInfo::name);
    return at != tensors_.end() && at->name == tensor ? &*at : nullptr;
  }

  detail::StoredMatrix stored(const TensorInfo& tensor) const {
    const auto [rows, cols] = detail::matrix_shape(tensor.shape, place(tensor));
    return {detail::element_format(tensor.dtype, place(tensor)), position(tensor), rows, cols};
  }

  void parse(const Limits& limits) {
    FileCursor cursor(file_);
    const auto length = cursor.read<std::uint64_t>();
    if (length > limits.header_bytes) {
      throw Error(Errc::header_size,
                  "a header of " + std::to_string(length) + " bytes, at most " + std::to_string(limits.header_bytes),
                  file_.place(0));
    }
    const ErrorPlace start = cursor.place();
    const std::string text = cursor.text(length);
    data_begin_ = cursor.position();
    if (!text.starts_with('{')) throw Error(Errc::magic, "the header does not start with '{'", start);
    detail::expect_json_text(text, start);
    detail::SafetensorsHeader header(start, limits);
    Json::sax_parse(text.begin(), text.end(), &header);
    tensors_ = std::move(header.tensors);
    metadata_ = std::move(header.metadata);
  }

  // Sorted by offset the tensors must tile the data section: no overlap, no hole, nothing after the last.
  void check_offsets() {
    std::ranges::sort(tensors_, {}, [](const TensorInfo& t) { return std::pair(t.begin, t.end); });
    std::uint64_t next = 0;
    for (const TensorInfo& t : tensors_) {
      const auto expected = [&](Errc code, const std::string& text) {
        return Error(code, text + ", found [" + std::to_string(t.begin) + ", " + std::to_string(t.end) + ")", place(t));
      };
      if (t.begin > t.end) throw expected(Errc::offset, "data_offsets must not fall");
      if (t.begin < next) throw expected(Errc::overlap, "expected data from " + std::to_string(next));
      if (t.begin > next) throw expected(Errc::hole, "expected data from " + std::to_string(next));
      const std::uint64_t size = detail::tensor_bytes(t.dtype, t.shape, place(t));
      if (size != t.size()) throw expected(Errc::shape, "shape and dtype make " + std::to_string(size) + " bytes");
      next = t.end;
    }
    const std::uint64_t available = file_.size() - data_begin_;
    if (next != available) {
      throw Error(next > available ? Errc::truncated : Errc::trailing,
                  "expected " + std::to_string(next) + " bytes of tensor data, found " + std::to_string(available),
                  file_.place(next > available ? file_.size() : checked_add(data_begin_, next, {})));
    }
  }

  InputFile file_;
  std::vector<TensorInfo> tensors_;
  std::map<std::string, std::string, std::less<>> metadata_;
  std::uint64_t data_begin_ = 0;
};

/// Collects tensors and writes them as one file. It borrows their data, which must live until write().
class SafetensorsWriter {
 public:
  /// `data` is the tensor's bytes, row-major, little-endian. Errc::duplicate, utf8, shape, shape_mismatch, overflow, bad_argument.
  void add(std::string tensor, DType dtype, std::vector<Index> shape, std::span<const std::byte> data) {
    const ErrorPlace place{.tensor = tensor};
    const std::uint64_t size = detail::tensor_bytes(dtype, shape, place);
    if (size != data.size()) {
      throw Error(Errc::shape_mismatch,
                  detail::shape_text(shape) + " of " + std::string(name(dtype)) + " is " + std::to_string(size) + " bytes, found " +
                      std::to_string(data.size()),
                  place);
    }
    insert({std::move(tensor), dtype, std::move(shape), size, data.data(), 1, data.size(), 0});
  }
  /// A matrix [rows, cols], rows of any stride.
  void add(std::string tensor, MatrixView<const float> matrix) { add_matrix(std::move(tensor), matrix); }
  void add(std::string tensor, MatrixView<const double> matrix) { add_matrix(std::move(tensor), matrix); }
  void add(std::string tensor, MatrixView<const bfloat16> matrix) { add_matrix(std::move(tensor), matrix); }
  void add(std::string tensor, MatrixView<const half> matrix) { add_matrix(std::move(tensor), matrix); }
  template <class T, class Memory>
  void add(std::string tensor, Matrix<T, Memory>&& matrix) = delete;  // its data would be gone before write()

  /// Calls f once the data of the tensor that was added last has been written: it will not be read again.
  void when_written(std::function<void()> f) { entries_.back().written = std::move(f); }

  /// Sets an entry of __metadata__. Errc::utf8.
  void metadata(std::string key, std::string value) {
    expect_utf8(key, key);
    expect_utf8(key, value);
    metadata_[std::move(key)] = std::move(value);
  }

  /// Writes the file, all or nothing (see AtomicFile): wide types first, which keeps them aligned, then by name.
  /// Errc::header_size, and AtomicFile's.
  void write(const std::filesystem::path& path) const {
    std::vector<const Entry*> order;
    for (const Entry& entry : entries_) order.push_back(&entry);
    std::ranges::sort(order, [](const Entry* a, const Entry* b) {
      return a->dtype != b->dtype ? a->dtype > b->dtype : a->name < b->name;
    });
    const std::string text = header(order);
    const std::uint64_t length = text.size();
    if (length > Limits{}.header_bytes) {
      throw Error(Errc::header_size, "a header of " + std::to_string(length) + " bytes is more than readers accept",
                  {.file = path.native()});
    }
    AtomicFile file(path);
    file.write(std::as_bytes(std::span(&length, 1)));
    file.write(text);
    for (const Entry* entry : order) {
      for (std::uint64_t i = 0; i < entry->runs; ++i) file.write({entry->data + i * entry->stride, entry->run_bytes});
      if (entry->written) entry->written();
    }
    file.commit();
  }

 private:
  struct Entry {
    std::string name;
    DType dtype;
    std::vector<Index> shape;
    std::uint64_t size;     // in bytes
    const std::byte* data;  // `runs` runs of `run_bytes` bytes, `stride` bytes from start to start
    std::uint64_t runs;
    std::uint64_t run_bytes;
    std::uint64_t stride;
    std::function<void()> written = {};
  };

  static void expect_utf8(std::string_view where, std::string_view text) {
    if (utf8_error(text)) throw Error(Errc::utf8, "'" + printable(where) + "': the text is not UTF-8");
  }

  template <Scalar T>
  void add_matrix(std::string tensor, MatrixView<const T> matrix) {
    expect_shape("SafetensorsWriter::add", matrix, matrix.rows, matrix.cols);
    const bool one_run = matrix.contiguous() || matrix.empty();
    const std::vector<Index> shape{matrix.rows, matrix.cols};
    const std::uint64_t size = detail::tensor_bytes(dtype_of<T>(), shape, {.tensor = tensor});
    const auto runs = one_run ? std::uint64_t{1} : static_cast<std::uint64_t>(matrix.rows);
    insert({std::move(tensor), dtype_of<T>(), shape, size, reinterpret_cast<const std::byte*>(matrix.data), runs, size / runs,
            static_cast<std::uint64_t>(matrix.stride) * sizeof(T)});
  }

  void insert(Entry entry) {
    expect_utf8(entry.name, entry.name);
    QDYLORA_EXPECTS(entry.name != "__metadata__", bad_argument, "SafetensorsWriter::add: '__metadata__' is reserved by the format");
    if (!names_.insert(entry.name).second) throw Error(Errc::duplicate, "is already there", {.tensor = entry.name});
    entries_.push_back(std::move(entry));
  }

  // The JSON text, as the reference spaces it, padded with blanks so that data starts at a multiple of 8.
  std::string header(std::span<const Entry* const> order) const {
    std::string text = "{";
    if (!metadata_.empty()) text += "\"__metadata__\":" + Json(metadata_).dump();
    std::uint64_t begin = 0;
    for (const Entry* entry : order) {
      const std::uint64_t end = checked_add(begin, entry->size, {.tensor = entry->name});
      if (text.size() > 1) text += ',';
      text += Json(entry->name).dump() + ":{\"dtype\":\"" + std::string(name(entry->dtype)) + "\",\"shape\":" +
              Json(entry->shape).dump() + ",\"data_offsets\":" + Json({begin, end}).dump() + "}";
      begin = end;
    }
    text += '}';
    text.resize((text.size() + 7) / 8 * 8, ' ');
    return text;
  }

  std::vector<Entry> entries_;
  std::set<std::string, std::less<>> names_;
  std::map<std::string, std::string, std::less<>> metadata_;
};

}  // namespace qdylora
