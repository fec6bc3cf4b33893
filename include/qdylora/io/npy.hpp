// NumPy's files of one array (.npy), format version 1.0 (numpy.org/doc/stable/reference/generated/numpy.lib.format.html):
//
//   "\x93NUMPY"  1  0   length of the header, 2 bytes, little-endian
//   header              a Python dict with the keys descr, fortran_order and shape, padded with blanks and a line feed to a multiple of 64
//   the elements        row-major, little-endian
//
// Element types are those that both NumPy and DType have a number for: <f2, <f4, <f8, <i4, <i8, |u1.
#pragma once

#include <array>
#include <charconv>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <qdylora/core/matrix.hpp>
#include <qdylora/core/memory.hpp>
#include <qdylora/core/scalar.hpp>
#include <qdylora/core/view.hpp>
#include <qdylora/io/checked.hpp>
#include <qdylora/io/dtype.hpp>
#include <qdylora/io/file.hpp>

namespace qdylora {

namespace detail {

inline constexpr std::string_view npy_magic{"\x93NUMPY\x01\x00", 8};  // with the version
inline constexpr std::uint64_t npy_begin = 10;                        // of the header

inline constexpr std::array<std::pair<std::string_view, DType>, 6> npy_types{{
    {"<f2", DType::F16},
    {"<f4", DType::F32},
    {"<f8", DType::F64},
    {"<i4", DType::I32},
    {"<i8", DType::I64},
    {"|u1", DType::U8},
}};

/// The header's dict, which is a Python literal; just the values that it may hold are read.
class NpyHeader {
 public:
  DType dtype = DType::F32;
  std::vector<Index> shape;

  NpyHeader(std::string_view text, const ErrorPlace& place, const Limits& limits) : text_(text), place_(place) {
    expect('{');
    bool descr = false, order = false, dims = false;
    while (!take('}')) {
      const std::string_view key = string();
      expect(':');
      bool& seen = key == "descr" ? descr : key == "fortran_order" ? order : dims;
      if (key != "descr" && key != "fortran_order" && key != "shape")
        fail(Errc::bad_config, "the key '" + printable(key) + "' is not one of the format's");
      if (std::exchange(seen, true)) fail(Errc::duplicate, "the key '" + std::string(key) + "' stands there twice");
      if (key == "descr") read_type();
      else if (key == "shape") read_shape(limits);
      else read_order();
      if (!take(',')) {
        expect('}');
        break;
      }
    }
    blanks();
    if (at_ != text_.size()) fail(Errc::trailing, "expected the end of the header");
    if (!descr || !order || !dims) fail(Errc::bad_config, "expected the keys descr, fortran_order and shape");
  }

 private:
  [[noreturn]] void fail(Errc code, const std::string& what) const {
    throw Error(code, "header of .npy: " + what + ", at character " + std::to_string(at_), place_);
  }
  void blanks() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n')) ++at_;
  }
  bool take(char c) {
    blanks();
    if (at_ == text_.size() || text_[at_] != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!take(c)) fail(Errc::bad_config, std::string("expected '") + c + "'");
  }
  std::string_view string() {
    const char quote = take('"') ? '"' : '\'';
    if (quote == '\'') expect('\'');
    const std::size_t end = text_.find(quote, at_);
    if (end == text_.npos) fail(Errc::bad_config, "a string has no end");
    const auto found = text_.substr(at_, end - at_);
    at_ = end + 1;
    return found;
  }
  bool word(std::string_view expected) {
    blanks();
    if (!text_.substr(at_).starts_with(expected)) return false;
    at_ += expected.size();
    return true;
  }

  void read_type() {
    blanks();
    if (at_ < text_.size() && text_[at_] == '[') fail(Errc::unsupported, "expected one type, found a list of fields");
    const std::string_view text = string();
    for (const auto& [name, type] : npy_types) {
      if (name != text) continue;
      dtype = type;
      return;
    }
    fail(Errc::dtype, "expected a type of <f2, <f4, <f8, <i4, <i8, |u1; found '" + printable(text, 32) + "'");
  }
  void read_order() {
    if (word("True")) fail(Errc::unsupported, "expected row-major order, found Fortran's");
    if (!word("False")) fail(Errc::bad_config, "expected True or False");
  }
  void read_shape(const Limits& limits) {
    expect('(');
    bool comma = true;
    while (!take(')')) {
      if (!comma) fail(Errc::bad_config, "expected ','");
      blanks();
      std::int64_t n = 0;
      const char* const begin = text_.data() + at_;
      const auto [end, status] = std::from_chars(begin, text_.data() + text_.size(), n);
      if (status == std::errc::result_out_of_range) fail(Errc::overflow, "a dimension does not fit in 64 bits");
      if (status != std::errc{} || n < 0) fail(Errc::shape, "expected a dimension, a whole number that is not negative");
      at_ += static_cast<std::size_t>(end - begin);
      if (shape.size() >= limits.dimensions) fail(Errc::limit, "more than " + std::to_string(limits.dimensions) + " dimensions");
      shape.push_back(n);
      comma = take(',');
    }
    if (shape.size() == 1 && !comma) fail(Errc::bad_config, "expected ',' after the only dimension");  // else Python has a number
  }

  std::string_view text_;
  ErrorPlace place_;
  std::size_t at_ = 0;
};

}  // namespace detail

/// An open .npy file. Its constructor reads and checks the header; elements are read on demand. Const calls may run in several threads.
class NpyFile {
 public:
  /// Errc::open, read, truncated, magic, version (other than 1.0), bad_config, duplicate, trailing, dtype, unsupported (Fortran order,
  /// fields), shape, overflow, limit.
  explicit NpyFile(const std::filesystem::path& path, const Limits& limits = {}) : file_(path) {
    std::array<std::byte, detail::npy_begin> begin{};
    file_.pread_exact(0, begin);
    const std::string_view magic(reinterpret_cast<const char*>(begin.data()), detail::npy_magic.size());
    if (magic.substr(0, 6) != detail::npy_magic.substr(0, 6)) throw Error(Errc::magic, "is not a .npy file", file_.place(0));
    if (magic != detail::npy_magic)
      throw Error(Errc::version,
                  "expected .npy version 1.0, found " + std::to_string(std::to_integer<int>(begin[6])) + "." +
                      std::to_string(std::to_integer<int>(begin[7])),
                  file_.place(6));
    const auto length = detail::from_bytes<std::uint16_t>(begin.data() + detail::npy_magic.size());
    std::string text(length, '\0');
    file_.pread_exact(detail::npy_begin, std::as_writable_bytes(std::span(text)));
    detail::NpyHeader header(text, file_.place(detail::npy_begin), limits);
    dtype_ = header.dtype;
    shape_ = std::move(header.shape);
    data_begin_ = checked_add(detail::npy_begin, length, file_.place(0));
    size_ = detail::tensor_bytes(dtype_, shape_, file_.place(detail::npy_begin));
    if (const std::uint64_t available = file_.size() - data_begin_; size_ != available)  // the header was read: it does not wrap
      throw Error(size_ > available ? Errc::truncated : Errc::trailing,
                  "expected " + std::to_string(size_) + " bytes of elements, found " + std::to_string(available), file_.place(data_begin_));
  }

  const std::string& name() const noexcept { return file_.name(); }
  DType dtype() const noexcept { return dtype_; }
  /// Empty for a single number.
  const std::vector<Index>& shape() const noexcept { return shape_; }

  /// The elements, row-major, little-endian.
  Buffer<std::byte> bytes() const {
    Buffer<std::byte> result(checked_narrow<Index>(size_, file_.place(data_begin_)));
    file_.pread_exact(data_begin_, result.span());
    return result;
  }

  /// A vector or matrix of floating-point type as float: [n] becomes [1, n]. Errc::dtype, shape, and those of reading.
  Matrix<float> matrix() const {
    const ErrorPlace place = file_.place(data_begin_);
    const auto [rows, cols] = detail::matrix_shape(shape_, place);
    return detail::read_matrix(file_, {detail::element_format(dtype_, place), data_begin_, rows, cols}, place);
  }

 private:
  InputFile file_;
  DType dtype_ = DType::F32;
  std::vector<Index> shape_;
  std::uint64_t data_begin_ = 0, size_ = 0;
};

namespace detail {

/// Starts a .npy file. Errc::dtype for a type that NumPy has no name for; header_size.
inline void write_npy_header(AtomicFile& file, DType dtype, std::span<const Index> shape, const ErrorPlace& place) {
  std::string_view descr;
  for (const auto& [name, type] : npy_types)
    if (type == dtype) descr = name;
  if (descr.empty())
    throw Error(Errc::dtype, "NumPy's files have no " + std::string(qdylora::name(dtype)) + ": expected F16, F32, F64, I32, I64 or U8",
                place);
  std::string text = "{'descr': '" + std::string(descr) + "', 'fortran_order': False, 'shape': (";
  for (std::size_t i = 0; i < shape.size(); ++i) text += (i > 0 ? ", " : "") + std::to_string(shape[i]);
  text += shape.size() == 1 ? ",), }" : "), }";
  constexpr std::size_t alignment = 64;
  text.resize((npy_begin + text.size() + 1 + alignment - 1) / alignment * alignment - npy_begin - 1, ' ');
  text += '\n';
  if (!std::in_range<std::uint16_t>(text.size())) throw Error(Errc::header_size, "the shape is too long for version 1.0", place);
  const auto length = static_cast<std::uint16_t>(text.size());
  file.write(npy_magic);
  file.write(std::as_bytes(std::span(&length, 1)));
  file.write(text);
}

}  // namespace detail

/// Writes an array, all or nothing. `data` is its elements, row-major. Errc::dtype (bfloat16 and what else NumPy has not), shape_mismatch,
/// overflow, header_size, and those of AtomicFile.
inline void write_npy(const std::filesystem::path& path, DType dtype, std::span<const Index> shape, std::span<const std::byte> data) {
  const ErrorPlace place{.file = path.native()};
  const std::uint64_t size = detail::tensor_bytes(dtype, shape, place);
  if (size != data.size())
    throw Error(Errc::shape_mismatch,
                detail::shape_text(shape) + " of " + std::string(name(dtype)) + " is " + std::to_string(size) + " bytes, found " +
                    std::to_string(data.size()),
                place);
  AtomicFile file(path);
  detail::write_npy_header(file, dtype, shape, place);
  file.write(data);
  file.commit();
}

/// Writes a matrix of float, double or half, whose rows may have gaps between them. Errors as above.
template <Scalar T>
void write_npy(const std::filesystem::path& path, MatrixView<const T> matrix) {
  expect_shape("write_npy", matrix, matrix.rows, matrix.cols);
  const std::array<Index, 2> shape{matrix.rows, matrix.cols};
  AtomicFile file(path);
  detail::write_npy_header(file, dtype_of<T>(), shape, {.file = path.native()});
  for (Index i = 0; i < matrix.rows && matrix.cols > 0; ++i)
    file.write(std::as_bytes(std::span(matrix.row(i), static_cast<std::size_t>(matrix.cols))));
  file.commit();
}

}  // namespace qdylora
