// QuantizedTensor: a frozen weight matrix as codes and block scales, in bitsandbytes' layout.
//
// The matrix [rows, cols] is flattened row-major and cut into blocks of block_size elements: blocks run across row boundaries, and the
// last may be short. Element i has code c_i and decodes to  T(Format::values[c_i] * absmax[i / block_size]),  the product rounded to
// float32, then once to T.
//   4-bit codes: two to a byte, element 2i in the high nibble; an odd element count leaves the code of zero in the last low nibble.
//   8-bit codes: one to a byte.
// Scales, one float absmax a block, are stored as
//   Float32Scales        as they are: 32 / block_size bits per weight
//   DoubleQuant<Code>    8-bit codes of (absmax - offset), offset = their mean, in blocks of 256 with a float absmax each
//                        (QLoRA's double quantization): absmax' = Code::values[q] * nested_absmax[b / 256] + offset, rounded twice.
//                        Block 64 costs 4 + 8/64 + 32/(64*256) = 4.127 bits per weight.
#pragma once

#include <string>

#include <qdylora/core/matrix.hpp>
#include <qdylora/quant/format.hpp>

namespace qdylora {

struct Float32Scales {
  static constexpr bool nested = false;

  struct View {
    const float* absmax = nullptr;
    QDYLORA_HD float operator[](Index block) const noexcept { return absmax[block]; }
  };

  template <MemoryResource Memory>
  struct Storage {
    Buffer<float, Memory> absmax;

    View view() const noexcept { return {absmax.data()}; }
    std::size_t bytes() const noexcept { return absmax.bytes(); }
  };
};

template <CodeFormat Code = DynamicMap8>
struct DoubleQuant {
  static_assert(Code::bits == 8, "the second level of double quantization is an 8-bit code");
  using SecondLevel = Code;
  static constexpr bool nested = true;
  static constexpr Index nested_block_size = 256;

  struct View {
    const std::uint8_t* codes = nullptr;
    const float* nested_absmax = nullptr;
    float offset = 0.0f;
    float operator[](Index block) const noexcept {  // the host's: devices have the values of a code as tables of their own
      return detail::rounded(Code::values[codes[block]] * nested_absmax[block / nested_block_size]) + offset;
    }
  };

  template <MemoryResource Memory>
  struct Storage {
    Buffer<std::uint8_t, Memory> codes;   // [blocks]
    Buffer<float, Memory> nested_absmax;  // [ceil(blocks / 256)]
    float offset = 0.0f;

    View view() const noexcept { return {codes.data(), nested_absmax.data(), offset}; }
    std::size_t bytes() const noexcept { return codes.bytes() + nested_absmax.bytes() + sizeof(offset); }
  };
};

/// What kernels read: pointers and shape, trivially copyable.
template <CodeFormat Format, class Scales>
struct QuantizedView {
  using format = Format;
  const std::uint8_t* codes = nullptr;
  typename Scales::View scales;
  Index rows = 0;
  Index cols = 0;
  Index block_size = 64;

  QDYLORA_HD std::uint8_t code(Index i) const noexcept {
    if constexpr (Format::bits == 8) return codes[i];
    else return static_cast<std::uint8_t>((i & 1) ? codes[i >> 1] & 15 : codes[i >> 1] >> 4);
  }
  float operator()(Index i, Index j) const noexcept {
    const Index flat = i * cols + j;
    return Format::values[code(flat)] * scales[flat / block_size];
  }
};

namespace detail {

/// Throws Errc::shape_mismatch unless `out`, at (first_row, first_col), lies inside the tensor.
template <CodeFormat Format, class Scales, class T>
void expect_inside(const QuantizedView<Format, Scales>& tensor, MatrixView<T> out, Index first_row, Index first_col) {
  QDYLORA_EXPECTS(first_row >= 0 && first_col >= 0 && first_row <= tensor.rows - out.rows && first_col <= tensor.cols - out.cols,
                  shape_mismatch,
                  "dequantize: " + shape_text(out) + " at " + shape_text(first_row, first_col) + " is outside " +
                      shape_text(tensor.rows, tensor.cols));
}

}  // namespace detail

/// Block sizes bitsandbytes writes for 4-bit weights, which are the ones accepted here.
constexpr bool is_block_size(Index size) noexcept { return size >= 32 && size <= 4096 && (size & (size - 1)) == 0; }

inline void expect_block_size(Index size) {
  QDYLORA_EXPECTS(is_block_size(size), block_size, "block size " + std::to_string(size) + ": expected a power of two in 32 ... 4096");
}

/// Bytes that `count` codes take.
template <CodeFormat Format>
constexpr Index code_bytes(Index count) noexcept {
  return Format::bits == 8 ? count : count / 2 + (count & 1);
}

template <CodeFormat Format = NF4, class Scales = DoubleQuant<DynamicMap8>, MemoryResource Memory = HostMemory>
class QuantizedTensor {
 public:
  using format = Format;
  using scales_type = Scales;
  using ScaleStorage = typename Scales::template Storage<Memory>;

  QuantizedTensor() = default;
  /// Takes existing codes and scales, e.g. those of a file. Throws Errc::shape_mismatch unless their sizes fit the shape.
  QuantizedTensor(Index rows, Index cols, Index block_size, Buffer<std::uint8_t, Memory> codes, ScaleStorage scales)
      : rows_(rows), cols_(cols), block_size_(block_size), codes_(std::move(codes)), scales_(std::move(scales)) {
    expect_block_size(block_size);
    QDYLORA_EXPECTS(rows >= 0 && cols >= 0 && (cols == 0 || rows <= std::numeric_limits<Index>::max() / cols), bad_argument,
                    "QuantizedTensor: " + detail::shape_text(rows, cols) + " is not a shape");
    expect_count("codes", codes_.size(), code_bytes<Format>(size()));
    if constexpr (Scales::nested) {
      expect_count("scale codes", scales_.codes.size(), blocks());
      expect_count("nested absmax", scales_.nested_absmax.size(),
                   (blocks() + Scales::nested_block_size - 1) / Scales::nested_block_size);
    } else {
      expect_count("absmax", scales_.absmax.size(), blocks());
    }
  }

  Index rows() const noexcept { return rows_; }
  Index cols() const noexcept { return cols_; }
  Index size() const noexcept { return rows_ * cols_; }
  Index block_size() const noexcept { return block_size_; }
  Index blocks() const noexcept { return size() / block_size_ + (size() % block_size_ != 0); }

  const Buffer<std::uint8_t, Memory>& codes() const noexcept { return codes_; }
  const ScaleStorage& scales() const noexcept { return scales_; }
  QuantizedView<Format, Scales> view() const noexcept { return {codes_.data(), scales_.view(), rows_, cols_, block_size_}; }

  std::size_t bytes() const noexcept { return codes_.bytes() + scales_.bytes(); }
  double bits_per_weight() const noexcept { return size() == 0 ? 0.0 : 8.0 * static_cast<double>(bytes()) / static_cast<double>(size()); }

 private:
  static void expect_count(const char* what, Index found, Index expected) {
    QDYLORA_EXPECTS(found == expected, shape_mismatch,
                    std::string(what) + ": expected " + std::to_string(expected) + " elements, found " + std::to_string(found));
  }

  Index rows_ = 0;
  Index cols_ = 0;
  Index block_size_ = 64;
  Buffer<std::uint8_t, Memory> codes_;
  ScaleStorage scales_{};
};

using NF4Tensor = QuantizedTensor<NF4>;
using FP4Tensor = QuantizedTensor<FP4>;
using INT4Tensor = QuantizedTensor<INT4>;
using FP8Tensor = QuantizedTensor<FP8E4M3>;

}  // namespace qdylora
