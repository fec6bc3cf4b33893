// How the frozen linear weights of a model are stored, and their making from rows that a file hands out.
#pragma once

#include <charconv>
#include <cmath>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/nn/low_rank.hpp>
#include <qdylora/nn/weight.hpp>
#include <qdylora/quant/binary_quantize.hpp>
#include <qdylora/quant/quantize.hpp>

namespace qdylora {

enum class BaseFormat { nf4, fp4, int4, fp8, bfloat16, float32 };

constexpr std::string_view name(BaseFormat format) noexcept {
  switch (format) {
    case BaseFormat::nf4: return "nf4";
    case BaseFormat::fp4: return "fp4";
    case BaseFormat::int4: return "int4";
    case BaseFormat::fp8: return "fp8";
    case BaseFormat::bfloat16: return "bfloat16";
    case BaseFormat::float32: return "float32";
  }
  return "unknown";
}

/// The format of a name; Errc::bad_argument lists them if there is none such.
inline BaseFormat base_format(std::string_view text) {
  std::string known;
  for (const auto format :
       {BaseFormat::nf4, BaseFormat::fp4, BaseFormat::int4, BaseFormat::fp8, BaseFormat::bfloat16, BaseFormat::float32}) {
    if (text == name(format)) return format;
    known += (known.empty() ? "" : ", ") + std::string(name(format));
  }
  throw Error(Errc::bad_argument, "no base format '" + printable(text) + "'; there are " + known);
}

/// The root mean square of each input, [in], of every linear weight of a model, in the order of Decoder::for_each_linear.
using InputScales = std::vector<std::vector<float>>;

struct BaseOptions {
  BaseFormat format = BaseFormat::nf4;
  bool double_quant = true;  // nf4 and fp4; int4 and fp8 always have it
  Index block_size = 64;
  AdapterInit init = {};  // what the adapters begin with, of which the base may be made anew; see initial_weight.hpp
  std::shared_ptr<const InputScales> input_rms = {};  // what an init that is calibrated() begins with; see calibrate.hpp
  std::optional<BinaryCodeOptions> binary = {};  // planes of signs in place of a format, for AdapterMethod::alpha
};

/// Throws Errc::non_finite naming the first element that is NaN or infinite; `first_row` is the number of the first row.
inline void expect_finite(MatrixView<const float> weight, Index first_row = 0) {
  for (Index i = 0; i < weight.rows; ++i)
    for (Index j = 0; j < weight.cols; ++j)
      if (!std::isfinite(weight(i, j))) detail::raise_non_finite(first_row + i, j);
}

/// f(), with file and tensor added to an Error that does not name its file yet.
template <class F>
auto at_tensor(const std::string& file, const std::string& tensor, F&& f) {
  try {
    return f();
  } catch (const Error& error) {
    if (!error.file().empty()) throw;
    throw Error(error.code(), error.what(), {.file = file, .tensor = tensor});
  }
}

/// A matrix that a file held, once it is known to be [rows, cols] and finite. Errc::shape_mismatch, non_finite.
inline Matrix<float> checked_weight(Matrix<float> matrix, Index rows, Index cols, const std::string& file, const std::string& tensor) {
  if (matrix.rows() != rows || matrix.cols() != cols)
    throw Error(Errc::shape_mismatch,
                "expected " + detail::shape_text(rows, cols) + ", found " + detail::shape_text(matrix.rows(), matrix.cols()),
                {.file = file, .tensor = tensor});
  at_tensor(file, tensor, [&] { expect_finite(matrix.view()); });
  return matrix;
}

/// Throws Errc::unexpected_tensor for a tensor "<prefix><n>..." with n >= layers: without it, the file would be another model. `count` says
/// where `layers` is from.
inline void expect_within_layers(const std::string& file, std::string_view tensor, std::string_view prefix, Index layers,
                                 const std::string& count) {
  if (!tensor.starts_with(prefix)) return;
  std::uint64_t layer = 0;
  const auto status = std::from_chars(tensor.data() + prefix.size(), tensor.data() + tensor.size(), layer).ec;
  if (status == std::errc::invalid_argument || (status == std::errc{} && layer < static_cast<std::uint64_t>(layers))) return;
  throw Error(Errc::unexpected_tensor, "lies beyond the " + std::to_string(layers) + " layers of " + count,
              {.file = file, .tensor = std::string(tensor)});
}

namespace detail {

constexpr Index rows_of_chunk(Index cols) noexcept { return std::max<Index>(1, (Index{1} << 20) / std::max<Index>(cols, 1)); }

/// A backend's own way of encoding blocks, or the plain one. (nvcc takes no such question within a generic lambda.)
template <CodeFormat Format, class Backend>
auto block_encoder(const Backend& backend) {
  if constexpr (requires { backend.template encoder<Format>(); }) return backend.template encoder<Format>();
  else return BlockEncoder<Format>{};
}

/// append(chunk, parallel_for) for the rows of a weight [rows, cols], which read_rows(first_row, MatrixView<float>) fills in order, at most
/// 4 MiB at a time.
template <class ReadRows, class Backend, class Append>
void for_each_chunk(Index rows, Index cols, ReadRows&& read_rows, const Backend& backend, Append&& append) {
  const Index step = rows_of_chunk(cols);
  const auto parallel_for = [&](Index count, auto&& f) { backend.parallel_for(count, f); };
  Matrix<float> chunk;
  for (Index first = 0; first < rows; first += step) {
    chunk.resize(std::min(step, rows - first), cols);
    read_rows(first, chunk.view());
    append(MatrixView<const float>(chunk.view()), parallel_for);
  }
}

}  // namespace detail

/// Planes of signs of a weight [rows, cols] from read_rows, which is called as by make_base_weight. Errors of the reader and of
/// BinaryQuantizer pass through.
template <class ReadRows, class Backend>
std::shared_ptr<const BinaryCodedTensor<>> make_binary_weight(Index rows, Index cols, BinaryCodeOptions options, ReadRows&& read_rows,
                                                              const Backend& backend) {
  BinaryQuantizer quantizer(rows, cols, options);
  detail::for_each_chunk(rows, cols, read_rows, backend,
                         [&](MatrixView<const float> chunk, const auto& parallel_for) { quantizer.append(chunk, parallel_for); });
  return std::make_shared<const BinaryCodedTensor<>>(std::move(quantizer).finish());
}

/// A weight [rows, cols] from read_rows(first_row, MatrixView<float>), which is called in order with at most 4 MiB at a time: the weight
/// never exists in full precision unless the format is float32. Errors of the reader and of Quantizer pass through; non_finite, of what
/// bfloat16 rounds to infinity as well; bad_argument where the options say planes of signs, which make_binary_weight makes.
template <class ReadRows, class Backend>
std::shared_ptr<const WeightFor<AnyFormat>> make_base_weight(Index rows, Index cols, BaseOptions options, ReadRows&& read_rows,
                                                             const Backend& backend) {
  using Any = WeightFor<AnyFormat>;
  QDYLORA_EXPECTS(!options.binary, bad_argument, "make_base_weight: planes of signs are no format of a low-rank adapter's base");
  const auto quantized = [&]<class Format, class Scales>(Format, Scales) {
    Quantizer<Format, Scales> quantizer(rows, cols, {.block_size = options.block_size});
    const auto encode = detail::block_encoder<Format>(backend);
    detail::for_each_chunk(rows, cols, read_rows, backend,
                           [&](MatrixView<const float> chunk, const auto& parallel_for) { quantizer.append(chunk, parallel_for, encode); });
    return std::make_shared<const Any>(std::move(quantizer).finish([&](Index count, auto&& f) { backend.parallel_for(count, f); }));
  };
  const bool nested = options.double_quant;
  switch (options.format) {
    case BaseFormat::nf4: return nested ? quantized(NF4{}, DoubleQuant<>{}) : quantized(NF4{}, Float32Scales{});
    case BaseFormat::fp4: return nested ? quantized(FP4{}, DoubleQuant<>{}) : quantized(FP4{}, Float32Scales{});
    case BaseFormat::int4: return quantized(INT4{}, DoubleQuant<>{});
    case BaseFormat::fp8: return quantized(FP8E4M3{}, DoubleQuant<>{});
    case BaseFormat::bfloat16: {
      Matrix<bfloat16> narrow(rows, cols);
      Index first = 0;
      detail::for_each_chunk(rows, cols, read_rows, backend, [&](MatrixView<const float> chunk, const auto&) {
        for (Index i = 0; i < chunk.rows; ++i, ++first)
          for (Index j = 0; j < cols; ++j) {
            const auto x = narrow(first, j) = bfloat16(chunk(i, j));
            if (!std::isfinite(static_cast<float>(x))) detail::raise_non_finite(first, j);
          }
      });
      return std::make_shared<const Any>(std::move(narrow));
    }
    case BaseFormat::float32: break;
  }
  Matrix<float> dense(rows, cols);
  const Index step = detail::rows_of_chunk(cols);
  for (Index first = 0; first < rows; first += step) {
    const auto chunk = dense.view().middle_rows(first, std::min(step, rows - first));
    read_rows(first, chunk);
    expect_finite(chunk, first);
  }
  return std::make_shared<const Any>(std::move(dense));
}

}  // namespace qdylora
