// Binary codes and their trained scales in safetensors files. A weight P is
//
//   P.binary_shape   I64 [4]: rows, cols, planes, group_size (BinaryCodeShape)
//   P.binary_bits    U8 [planes, rows, bytes of a row]     } as BinaryCodedTensor stores them
//   P.binary_scales  F32 [planes, rows, groups]            }
//   P.alpha          F32 [trained planes, rows, groups]: what a task has of its own, in this file or another
#pragma once

#include <array>
#include <cmath>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/io/safetensors.hpp>
#include <qdylora/nn/alpha_linear.hpp>
#include <qdylora/quant/binary_code.hpp>

namespace qdylora {

namespace detail {

inline void expect_stored(const SafetensorsFile& file, const std::string& tensor, DType dtype, const std::vector<Index>& shape) {
  const TensorInfo& info = file.info(tensor);
  const ErrorPlace place{.file = file.name(), .tensor = tensor};
  if (info.dtype != dtype)
    throw Error(Errc::dtype, "expected " + std::string(name(dtype)) + ", found " + std::string(name(info.dtype)), place);
  if (info.shape != shape)
    throw Error(Errc::shape_mismatch, "expected " + shape_text(shape) + ", found " + shape_text(info.shape), place);
}

/// F32 scales that are to be [planes, rows, groups], as a matrix [planes * rows, groups].
inline Matrix<float> read_scales(const SafetensorsFile& file, const std::string& tensor, Index planes, Index rows, Index groups) {
  expect_stored(file, tensor, DType::F32, {planes, rows, groups});
  Matrix<float> scales(planes * rows, groups);
  file.read(tensor, std::as_writable_bytes(scales.span()));
  for (Index i = 0; i < scales.size(); ++i)
    if (!std::isfinite(scales.data()[i]))
      throw Error(Errc::non_finite, "scale " + std::to_string(i) + " is not finite", {.file = file.name(), .tensor = tensor});
  return scales;
}

}  // namespace detail

/// `tensor` must live until writer.write(). Errors of SafetensorsWriter::add.
inline void add_binary_code(SafetensorsWriter& writer, const std::string& name, const BinaryCodedTensor<>& tensor) {
  const BinaryCodeShape& shape = tensor.shape();
  static_assert(sizeof(BinaryCodeShape) == 4 * sizeof(Index));
  writer.add(name + ".binary_shape", DType::I64, {4}, std::as_bytes(std::span(&shape, 1)));
  writer.add(name + ".binary_bits", DType::U8, {shape.planes, shape.rows, shape.row_bytes()}, std::as_bytes(tensor.bits().span()));
  const MatrixView<const float> scales = tensor.scales();
  writer.add(name + ".binary_scales", DType::F32, {shape.planes, shape.rows, shape.groups()},
             std::as_bytes(std::span(scales.data, static_cast<std::size_t>(scales.size()))));
}
void add_binary_code(SafetensorsWriter&, const std::string&, BinaryCodedTensor<>&&) = delete;  // its data would be gone before write()

/// Errc::missing_tensor, dtype, shape_mismatch, bad_argument and block_size (a shape that is none), non_finite, read, truncated.
inline BinaryCodedTensor<> load_binary_code(const SafetensorsFile& file, std::string_view name) {
  const std::string weight(name);
  const std::string header = weight + ".binary_shape";
  detail::expect_stored(file, header, DType::I64, {4});
  std::array<Index, 4> numbers{};
  file.read(header, std::as_writable_bytes(std::span(numbers)));
  const BinaryCodeShape shape{numbers[0], numbers[1], numbers[2], numbers[3]};
  try {
    expect_valid(shape);
  } catch (const Error& error) {
    throw Error(error.code(), error.what(), {.file = file.name(), .tensor = header});
  }
  detail::expect_stored(file, weight + ".binary_bits", DType::U8, {shape.planes, shape.rows, shape.row_bytes()});
  Buffer<std::uint8_t> bits(shape.planes * shape.rows * shape.row_bytes());
  file.read(weight + ".binary_bits", std::as_writable_bytes(bits.span()));
  Matrix<float> scales = detail::read_scales(file, weight + ".binary_scales", shape.planes, shape.rows, shape.groups());
  return {shape, std::move(bits), std::move(scales)};
}

/// What a task has of its own: the trained scales of a layer, under the layer's name, which must live until writer.write().
template <AlphaLayer Layer>
void add_alpha(SafetensorsWriter& writer, const Layer& layer) {
  writer.add(layer.options().name + ".alpha", DType::F32, {layer.options().trained_planes, layer.codes()->rows(), layer.codes()->groups()},
             std::as_bytes(layer.alpha().value.span()));
}

/// Puts them back into a layer of the same name, shape and trained planes. Errc::missing_tensor, dtype, shape_mismatch, non_finite, read,
/// truncated; the layer is then as it was.
template <AlphaLayer Layer>
void load_alpha(const SafetensorsFile& file, Layer& layer) {
  const Matrix<float> alpha = detail::read_scales(file, layer.options().name + ".alpha", layer.options().trained_planes,
                                                  layer.codes()->rows(), layer.codes()->groups());
  copy(alpha.view(), layer.alpha().value.view());
}

}  // namespace qdylora
