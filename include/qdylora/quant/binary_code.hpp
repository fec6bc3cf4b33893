// BinaryCodedTensor: a frozen weight matrix as planes of signs with scales (binary coding), which AlphaTuning (Kwon et al. 2022) trains:
//
//   W[i, j] ~ sum_k alpha_k[i, j / group_size] * b_k[i, j],   b_k in {-1, +1},   k = 1 ... planes <= 8
//
// Groups are columns of one row: unlike QuantizedTensor's blocks they never run across rows, and the last of a row may be short. Storage,
// plane by plane and row-major in each:
//   bits    1 for +1, 0 for -1; column j is bit j % 8 (from the lowest) of byte j / 8 of its row, whose last byte is filled with 0
//   scales  float32 [planes * rows, groups], row k * rows + i
// A weight costs planes * (1 + 32 / group_size) bits where columns fill bytes and groups; bits_per_weight() is exact for all shapes.
// A prefix of the planes is a coarser weight.
#pragma once

#include <algorithm>
#include <array>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>

#include <qdylora/core/matrix.hpp>

namespace qdylora {

inline constexpr Index most_planes = 8;

/// What a BinaryCodedTensor is of. group_size is a multiple of 8, or 0: a scale for a whole row, as AlphaTuning has it.
struct BinaryCodeShape {
  Index rows = 0;
  Index cols = 0;
  Index planes = 1;
  Index group_size = 0;

  constexpr Index columns_of_group() const noexcept { return group_size == 0 ? std::max<Index>(cols, 1) : group_size; }
  constexpr Index groups() const noexcept { return cols / columns_of_group() + (cols % columns_of_group() != 0); }
  constexpr Index row_bytes() const noexcept { return cols / 8 + (cols % 8 != 0); }
  bool operator==(const BinaryCodeShape&) const = default;

  /// f(group, first, count) for each group that columns [begin, end) touch, with the columns of it that are among them.
  template <class F>
  void for_each_group(Index begin, Index end, F&& f) const {
    const Index size = columns_of_group();
    while (begin < end) {
      const Index stop = std::min(end, (begin / size + 1) * size);
      f(begin / size, begin, stop - begin);
      begin = stop;
    }
  }
};

/// Throws Errc::bad_argument or block_size, saying which of the four numbers is wrong.
inline void expect_valid(const BinaryCodeShape& shape) {
  constexpr Index most = std::numeric_limits<Index>::max() / 64;  // planes * rows * groups floats are a size too
  const auto size = [](Index x) { return x >= 0 && x <= most; };
  QDYLORA_EXPECTS(size(shape.rows) && size(shape.cols) && (shape.cols == 0 || shape.rows <= most / shape.cols), bad_argument,
                  "binary code: " + detail::shape_text(shape.rows, shape.cols) + " is not a shape");
  QDYLORA_EXPECTS(shape.planes >= 1 && shape.planes <= most_planes, bad_argument,
                  "binary code: " + std::to_string(shape.planes) + " planes; expected 1 ... 8");
  QDYLORA_EXPECTS(shape.group_size >= 0 && shape.group_size % 8 == 0, block_size,
                  "binary code: group size " + std::to_string(shape.group_size) + "; expected a multiple of 8, or 0 for whole rows");
}

namespace detail {

// The signs that a byte of a plane stands for. Products with them are exact, so fused multiply-add changes no sum.
alignas(64) inline constexpr auto byte_signs = [] {
  std::array<std::array<float, 8>, 256> signs{};
  for (unsigned byte = 0; byte < 256; ++byte)
    for (unsigned bit = 0; bit < 8; ++bit) signs[byte][bit] = (byte >> bit & 1u) != 0 ? 1.0f : -1.0f;
  return signs;
}();

// out[j] += scale * sign of bit j, j < count
template <class S>
void add_signs(const std::uint8_t* bits, Index count, S scale, S* QDYLORA_RESTRICT out) noexcept {
  for (; count >= 8; count -= 8, out += 8) {
    const auto& signs = byte_signs[*bits++];
    for (std::size_t j = 0; j < 8; ++j) out[j] += scale * static_cast<S>(signs[j]);
  }
  for (Index j = 0; j < count; ++j) out[j] += scale * static_cast<S>(byte_signs[*bits][static_cast<std::size_t>(j)]);
}

}  // namespace detail

/// What operations read of planes of signs: the first `planes` of a tensor's, where `own` has scales for a row of a plane with those.
template <class S>
struct BinaryCodedView : BinaryCodeShape {
  const std::uint8_t* bits = nullptr;
  const float* scales = nullptr;
  MatrixView<const S> own = {};  // [as many planes, the first, * rows, groups], or empty
};

/// Memory: where bits and scales are.
template <MemoryResource Memory = HostMemory>
class BinaryCodedTensor {
 public:
  BinaryCodedTensor() = default;
  /// Takes existing bits and scales, e.g. those of a file. Throws Errc::shape_mismatch unless their sizes fit the shape.
  BinaryCodedTensor(BinaryCodeShape shape, Buffer<std::uint8_t, Memory> bits, Matrix<float, Memory> scales)
      : shape_(shape), bits_(std::move(bits)), scales_(std::move(scales)) {
    expect_valid(shape);
    const Index bytes = shape.planes * shape.rows * shape.row_bytes();
    QDYLORA_EXPECTS(bits_.size() == bytes, shape_mismatch,
                    "binary code: expected " + std::to_string(bytes) + " bytes of bits, found " + std::to_string(bits_.size()));
    expect_shape("binary code: scales", scales_.view(), shape.planes * shape.rows, shape.groups());
  }

  const BinaryCodeShape& shape() const noexcept { return shape_; }
  Index rows() const noexcept { return shape_.rows; }
  Index cols() const noexcept { return shape_.cols; }
  Index planes() const noexcept { return shape_.planes; }
  Index groups() const noexcept { return shape_.groups(); }

  const Buffer<std::uint8_t, Memory>& bits() const noexcept { return bits_; }
  MatrixView<const float> scales() const noexcept { return scales_.view(); }
  /// Row i of plane k, from 0.
  const std::uint8_t* bits(Index plane, Index row) const noexcept {
    return bits_.data() + (plane * shape_.rows + row) * shape_.row_bytes();
  }

  /// The first `planes`, of them the first with other scales, if there are any in `own`. Errc::bad_argument, shape_mismatch.
  template <class S>
  BinaryCodedView<S> view(Index planes, MatrixView<const S> own) const {
    QDYLORA_EXPECTS(planes >= 1 && planes <= shape_.planes, bad_argument,
                    "binary code: " + std::to_string(planes) + " planes of a tensor of " + std::to_string(shape_.planes));
    if (own.rows > 0)
      QDYLORA_EXPECTS(own.rows <= planes * shape_.rows && own.rows % shape_.rows == 0 && own.cols == groups(), shape_mismatch,
                      "binary code: scales " + detail::shape_text(own.rows, own.cols) + " for planes of " +
                          detail::shape_text(shape_.rows, groups()));
    return {{shape_.rows, shape_.cols, planes, shape_.group_size}, bits_.data(), scales_.data(), own};
  }

  std::size_t bytes() const noexcept { return bits_.bytes() + static_cast<std::size_t>(scales_.size()) * sizeof(float); }
  double bits_per_weight() const noexcept {
    const Index size = shape_.rows * shape_.cols;
    return size == 0 ? 0.0 : 8.0 * static_cast<double>(bytes()) / static_cast<double>(size);
  }

 private:
  BinaryCodeShape shape_;
  Buffer<std::uint8_t, Memory> bits_;
  Matrix<float, Memory> scales_;
};

namespace detail {

template <class S>
void expect_sums_of_signs(MatrixView<const S> d, const BinaryCodedView<S>& w, Index first, MatrixView<S> sums) {
  QDYLORA_EXPECTS(first >= 0 && first + d.rows <= w.rows && d.cols == w.cols, shape_mismatch,
                  "add_sums_of_signs: rows " + std::to_string(first) + " ... of " + shape_text(w.rows, w.cols) + " are not " +
                      shape_text(d.rows, d.cols));
  expect_shape("add_sums_of_signs: sums", sums, w.planes * w.rows, w.groups());
}

}  // namespace detail

/// out [rows, cols] = the first `planes` planes of a tensor. Errc::bad_argument outside 1 ... its planes; shape_mismatch.
template <class S>
void decode(const BinaryCodedTensor<>& tensor, MatrixView<S> out, Index planes) {
  static_assert(std::is_same_v<S, float> || std::is_same_v<S, double>, "binary codes decode to float or double");
  const auto w = tensor.view(planes, MatrixView<const S>());
  expect_shape("decode: out", out, tensor.rows(), tensor.cols());
  for (Index i = 0; i < out.rows; ++i) {
    std::fill_n(out.row(i), out.cols, S{});
    for (Index k = 0; k < planes; ++k) {
      const std::uint8_t* signs = tensor.bits(k, i);
      w.for_each_group(0, out.cols, [&](Index group, Index first, Index count) {
        detail::add_signs(signs + first / 8, count, static_cast<S>(w.scales[(k * w.rows + i) * w.groups() + group]), out.row(i) + first);
      });
    }
  }
}
template <class S>
void decode(const BinaryCodedTensor<>& tensor, MatrixView<S> out) {
  decode(tensor, out, tensor.planes());
}

}  // namespace qdylora
