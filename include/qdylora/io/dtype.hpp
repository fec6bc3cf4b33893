// Element types of stored tensors, by the names of the safetensors format, and reading rows of stored elements as float.
#pragma once

#include <algorithm>
#include <array>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <string_view>

#include <qdylora/core/matrix.hpp>
#include <qdylora/core/scalar.hpp>
#include <qdylora/core/view.hpp>
#include <qdylora/io/file.hpp>

namespace qdylora {

/// In the order of the reference implementation, which its writer sorts tensors by.
enum class DType : std::uint8_t {
  BOOL, F4, F6_E2M3, F6_E3M2, U8, I8, F8_E5M2, F8_E4M3, F8_E8M0, F8_E4M3FNUZ, F8_E5M2FNUZ,
  I16, U16, F16, BF16, I32, U32, F32, C64, F64, I64, U64,
};

namespace detail {

struct DTypeEntry {
  std::string_view name;
  std::uint64_t bits;
};

// Position = the enumerator.
inline constexpr std::array<DTypeEntry, 22> dtype_entries{{
    {"BOOL", 8},    {"F4", 4},      {"F6_E2M3", 6}, {"F6_E3M2", 6},     {"U8", 8},          {"I8", 8},
    {"F8_E5M2", 8}, {"F8_E4M3", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
    {"U16", 16},    {"F16", 16},    {"BF16", 16},   {"I32", 32},        {"U32", 32},        {"F32", 32},
    {"C64", 64},    {"F64", 64},    {"I64", 64},    {"U64", 64},
}};
static_assert(static_cast<std::size_t>(DType::U64) + 1 == dtype_entries.size());

constexpr const DTypeEntry& dtype_entry(DType dtype) noexcept { return dtype_entries[static_cast<std::size_t>(dtype)]; }

}  // namespace detail

/// The format's name of a type, e.g. "BF16".
constexpr std::string_view name(DType dtype) noexcept { return detail::dtype_entry(dtype).name; }

/// Bits of one element; less than 8 for the packed types.
constexpr std::uint64_t bits(DType dtype) noexcept { return detail::dtype_entry(dtype).bits; }

/// The type of that name; nothing when the format has none.
constexpr std::optional<DType> dtype_from_name(std::string_view text) noexcept {
  for (std::size_t i = 0; i < detail::dtype_entries.size(); ++i) {
    if (detail::dtype_entries[i].name == text) return static_cast<DType>(i);
  }
  return std::nullopt;
}

/// The stored type of a scalar type.
template <Scalar T>
constexpr DType dtype_of() noexcept {
  if constexpr (std::same_as<T, float>) return DType::F32;
  else if constexpr (std::same_as<T, double>) return DType::F64;
  else if constexpr (std::same_as<T, bfloat16>) return DType::BF16;
  else return DType::F16;
}

namespace detail {

/// How stored elements become floats: `decode` reads `blocks` blocks of `block_bytes` bytes, unaligned, and writes `block_elements`
/// floats for each. decode is null for types whose size is known but not their meaning.
struct ElementFormat {
  Index block_elements = 1;
  Index block_bytes = 0;
  void (*decode)(const std::byte* source, Index blocks, float* target) = nullptr;
};

template <Scalar T>
void decode_scalars(const std::byte* source, Index count, float* target) {
  for (Index i = 0; i < count; ++i) target[i] = static_cast<float>(from_bytes<T>(source + i * static_cast<Index>(sizeof(T))));
}

template <Scalar T>
constexpr ElementFormat scalar_format() noexcept {
  return {1, static_cast<Index>(sizeof(T)), decode_scalars<T>};
}

/// Of a floating-point type. Errc::dtype.
inline ElementFormat element_format(DType dtype, const ErrorPlace& place) {
  switch (dtype) {
    case DType::F32: return scalar_format<float>();
    case DType::F16: return scalar_format<half>();
    case DType::BF16: return scalar_format<bfloat16>();
    case DType::F64: return scalar_format<double>();
    default: throw Error(Errc::dtype, "expected F32, F16, BF16 or F64, found " + std::string(name(dtype)), place);
  }
}

/// A stored matrix: rows of `cols` elements, a whole number of blocks each, row 0 at byte `begin` of the file.
struct StoredMatrix {
  ElementFormat format;
  std::uint64_t begin = 0;
  Index rows = 0;
  Index cols = 0;
};

inline std::string shape_text(std::span<const Index> shape) {
  std::string text = "[";
  for (const Index n : shape) text += (text.size() > 1 ? ", " : "") + std::to_string(n);
  return text + "]";
}

/// Bytes of a tensor. Errc::overflow, and Errc::shape when packed elements do not fill whole bytes.
inline std::uint64_t tensor_bytes(DType dtype, std::span<const Index> shape, const ErrorPlace& place) {
  std::uint64_t count = 1;
  for (const Index n : shape) count = checked_mul(count, checked_narrow<std::uint64_t>(n, place), place);
  const std::uint64_t total = checked_mul(count, bits(dtype), place);
  if (total % 8 != 0) {
    throw Error(Errc::shape, shape_text(shape) + " of " + std::string(name(dtype)) + " does not fill whole bytes", place);
  }
  return total / 8;
}

/// The shape of a tensor seen as a matrix: [n] is one row. Errc::shape for other ranks than 1 and 2.
inline std::array<Index, 2> matrix_shape(std::span<const Index> shape, const ErrorPlace& place) {
  if (shape.size() == 1) return {1, shape[0]};
  if (shape.size() == 2) return {shape[0], shape[1]};
  throw Error(Errc::shape, "expected a vector or a matrix, found " + std::to_string(shape.size()) + " dimensions", place);
}

/// Reads rows [first_row, first_row + out.rows) into `out`, through a buffer of bounded size. Errc::shape_mismatch, and those of
/// InputFile.
inline void read_rows(const InputFile& file, const StoredMatrix& stored, Index first_row, MatrixView<float> out,
                      const ErrorPlace& place) {
  if (out.cols != stored.cols || out.rows < 0 || first_row < 0 || first_row > stored.rows || out.rows > stored.rows - first_row) {
    throw Error(Errc::shape_mismatch,
                "expected rows of " + shape_text(stored.rows, stored.cols) + ", found a request for " + qdylora::shape_text(out) +
                    " from row " + std::to_string(first_row),
                place);
  }
  expect_shape("read_rows: the target", out, out.rows, out.cols);  // its stride
  if (out.empty()) return;
  const ElementFormat& format = stored.format;
  // Rows without a gap between them are one long row: fewer reads when rows are short.
  const MatrixView<float> target = out.contiguous() ? MatrixView<float>(out.data, 1, out.size()) : out;
  const Index row_blocks = target.cols / format.block_elements;
  const auto block_bytes = static_cast<std::uint64_t>(format.block_bytes);
  const std::uint64_t row_bytes = checked_mul(static_cast<std::uint64_t>(stored.cols / format.block_elements), block_bytes, place);
  std::uint64_t offset =
      checked_add(stored.begin, checked_mul(static_cast<std::uint64_t>(first_row), row_bytes, place), place);

  const Index most_blocks = std::min(row_blocks, (Index{1} << 16) / format.block_bytes);
  Buffer<std::byte> buffer(most_blocks * format.block_bytes);
  for (Index i = 0; i < target.rows; ++i) {
    for (Index b = 0; b < row_blocks; b += most_blocks) {
      const Index count = std::min(most_blocks, row_blocks - b);
      const auto chunk = buffer.span().first(static_cast<std::size_t>(count * format.block_bytes));
      file.pread_exact(offset, chunk);
      format.decode(chunk.data(), count, target.row(i) + b * format.block_elements);
      offset = checked_add(offset, chunk.size(), place);
    }
  }
}

inline Matrix<float> read_matrix(const InputFile& file, const StoredMatrix& stored, const ErrorPlace& place) {
  Matrix<float> result;
  result.resize(stored.rows, stored.cols);  // not zeroed: every element is written below
  read_rows(file, stored, 0, result.view(), place);
  return result;
}

}  // namespace detail
}  // namespace qdylora
