// 4-bit weights in safetensors files as bitsandbytes writes them (the state dict of its Linear4bit). A weight P of n elements is
//
//   P                   U8 [(n + 1) / 2, 1], the codes in QuantizedTensor's order; or the same bytes stored as BF16, F16 or F32
//   P.absmax            F32 [blocks]; with double quantization U8 [blocks], codes of the dynamic map
//   P.quant_map         F32 [16], the format's table
//   P.nested_absmax     F32 [ceil(blocks / 256)]    } with double
//   P.nested_quant_map  F32 [256]                   } quantization
//   P.quant_state.bitsandbytes__nf4 (or __fp4)   U8, the bytes of a JSON object, spaced as Python's json.dumps does:
//     {"quant_type": "nf4", "blocksize": 64, "dtype": "float32", "shape": [96, 128], "nested_blocksize": 256,
//      "nested_dtype": "float32", "nested_offset": 0.0872197225689888}        nested_...: with double quantization
//
// Stored tables must be ours: bitsandbytes' kernels use built-in ones whatever a file says, so others have no defined meaning.
#pragma once

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <concepts>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

#include <qdylora/io/json.hpp>
#include <qdylora/io/safetensors.hpp>
#include <qdylora/nn/weight.hpp>
#include <qdylora/quant/quantized_tensor.hpp>

namespace qdylora {

/// What the JSON object of a 4-bit weight says.
struct BnbState {
  std::string format;  // "nf4" or "fp4"
  Index block_size = 64;
  DType dtype = DType::F32;  // of the weight before quantization: F32, F16 or BF16
  Index rows = 0;
  Index cols = 0;
  bool nested = false;  // double quantization
  float offset = 0.0f;  // of the nested scales
};

namespace detail {

inline constexpr std::string_view bnb_state_key = "quant_state.bitsandbytes__";

/// The tensors whose names start with "<name>.".
inline std::span<const TensorInfo> tensors_under(const SafetensorsFile& file, std::string_view name) {
  const std::string prefix = std::string(name) + ".";
  const auto& all = file.tensors();  // sorted by name
  const auto first = std::ranges::lower_bound(all, prefix, {}, &TensorInfo::name);
  const auto last = std::find_if_not(first, all.end(), [&](const TensorInfo& t) { return t.name.starts_with(prefix); });
  return {first, last};
}

inline void expect_bnb(bool condition, Errc code, const SafetensorsFile& file, const std::string& tensor,
                       const std::string& expected, const std::string& found) {
  if (!condition) throw Error(code, "expected " + expected + ", found " + found, {.file = file.name(), .tensor = tensor});
}

/// A vector [count] stored as exactly this type.
template <class T>
Buffer<T> bnb_vector(const SafetensorsFile& file, const std::string& tensor, DType dtype, Index count) {
  const TensorInfo& info = file.info(tensor);
  expect_bnb(info.dtype == dtype, Errc::dtype, file, tensor, std::string(name(dtype)), std::string(name(info.dtype)));
  expect_bnb(info.shape == std::vector<Index>{count}, Errc::shape_mismatch, file, tensor, shape_text(std::array{count}),
             shape_text(info.shape));
  Buffer<T> result(count);
  file.read(tensor, std::as_writable_bytes(result.span()));
  if constexpr (std::same_as<T, float>) {
    const auto bad = std::ranges::find_if(result.span(), [](float x) { return !std::isfinite(x); });
    expect_bnb(bad == result.span().end(), Errc::non_finite, file, tensor, "finite numbers",
               "another at index " + std::to_string(bad - result.span().begin()));
  }
  return result;
}

/// A stored table must be ours within `tolerance`, relative to each entry.
template <CodeFormat Format>
void expect_bnb_table(const SafetensorsFile& file, const std::string& tensor, float tolerance) {
  const auto table = bnb_vector<float>(file, tensor, DType::F32, static_cast<Index>(Format::values.size()));
  for (std::size_t code = 0; code < Format::values.size(); ++code) {
    const float ours = Format::values[code];
    const float theirs = table.span()[code];
    if (!(std::fabs(theirs - ours) <= std::fabs(ours) * tolerance)) {
      throw Error(Errc::unsupported,
                  "expected the table of " + std::string(Format::name) + ", with " + std::to_string(ours) + " for code " +
                      std::to_string(code) + ", found " + std::to_string(theirs),
                  {.file = file.name(), .tensor = tensor});
    }
  }
}

inline constexpr std::array<std::pair<DType, std::string_view>, 3> bnb_dtypes{
    {{DType::F32, "float32"}, {DType::F16, "float16"}, {DType::BF16, "bfloat16"}}};

template <CodeFormat Format, class Scales>
QuantizedTensor<Format, Scales> load_bnb(const SafetensorsFile& file, const std::string& name, const BnbState& state) {
  const Index size = state.rows * state.cols;  // checked by bnb_4bit_state
  const Index blocks = size / state.block_size + (size % state.block_size != 0);

  const TensorInfo& packed = file.info(name);
  constexpr std::array storage_types{DType::U8, DType::BF16, DType::F16, DType::F32};
  expect_bnb(std::ranges::find(storage_types, packed.dtype) != storage_types.end(), Errc::dtype, file, name,
             "codes as U8, BF16, F16 or F32", std::string(qdylora::name(packed.dtype)));
  const Index units = code_bytes<Format>(size) / static_cast<Index>(bits(packed.dtype) / 8);
  const bool whole = packed.size() == static_cast<std::uint64_t>(code_bytes<Format>(size));
  expect_bnb(whole && (packed.shape == std::vector{units, Index{1}} || packed.shape == std::vector{Index{1}, units}),
             Errc::shape_mismatch, file, name,
             std::to_string(code_bytes<Format>(size)) + " bytes of codes in one column, for a weight " +
                 detail::shape_text(state.rows, state.cols),
             shape_text(packed.shape) + " of " + std::string(qdylora::name(packed.dtype)));
  expect_bnb_table<Format>(file, name + ".quant_map", 0.0f);

  typename Scales::template Storage<HostMemory> scales;
  if constexpr (Scales::nested) {
    // torch.linspace, which the map was made with, rounds by the machine: entries differ by up to 2 units in the last place.
    expect_bnb_table<typename Scales::SecondLevel>(file, name + ".nested_quant_map", 0x1p-21f);
    constexpr Index nested_block = Scales::nested_block_size;
    scales.codes = bnb_vector<std::uint8_t>(file, name + ".absmax", DType::U8, blocks);
    scales.nested_absmax =
        bnb_vector<float>(file, name + ".nested_absmax", DType::F32, blocks / nested_block + (blocks % nested_block != 0));
    scales.offset = state.offset;
  } else {
    scales.absmax = bnb_vector<float>(file, name + ".absmax", DType::F32, blocks);
  }
  Buffer<std::uint8_t> codes(code_bytes<Format>(size));
  file.read(name, std::as_writable_bytes(codes.span()));
  return {state.rows, state.cols, state.block_size, std::move(codes), std::move(scales)};
}

/// A number as Python's repr and json.dumps write it: the shortest digits that read back as the same double.
inline std::string python_number(double value) {
  std::array<char, 64> text{};
  const auto written = [&](std::chars_format format) {
    return std::string(text.data(), std::to_chars(text.data(), text.data() + text.size(), value, format).ptr);
  };
  const double magnitude = std::fabs(value);
  if (magnitude != 0.0 && (magnitude < 1e-4 || magnitude >= 1e16)) return written(std::chars_format::scientific);
  const std::string fixed = written(std::chars_format::fixed);
  return fixed.find('.') == std::string::npos ? fixed + ".0" : fixed;
}

}  // namespace detail

/// Whether the tensor `name` is a 4-bit weight of bitsandbytes, in a format known here or not.
inline bool is_bnb_4bit(const SafetensorsFile& file, std::string_view name) {
  const std::string key = std::string(name) + "." + std::string(detail::bnb_state_key);
  return std::ranges::any_of(detail::tensors_under(file, name), [&](const TensorInfo& t) { return t.name.starts_with(key); });
}

/// Reads and checks the state of the 4-bit weight `name`, but no codes or scales. Errc::missing_tensor, unexpected_tensor,
/// unsupported, dtype, shape, block_size, bad_config, non_finite, overflow, and those of parse_json.
inline BnbState bnb_4bit_state(const SafetensorsFile& file, std::string_view name) {
  const std::string weight(name);
  const ErrorPlace weight_place{.file = file.name(), .tensor = weight};
  static_cast<void>(file.info(weight));
  constexpr std::array<std::string_view, 4> known{"absmax", "quant_map", "nested_absmax", "nested_quant_map"};
  const TensorInfo* packed = nullptr;
  BnbState state;
  for (const TensorInfo& tensor : detail::tensors_under(file, name)) {
    const std::string_view key = std::string_view(tensor.name).substr(weight.size() + 1);
    const ErrorPlace place{.file = file.name(), .tensor = tensor.name};
    if (key.starts_with(detail::bnb_state_key)) {
      if (packed != nullptr) throw Error(Errc::duplicate, "is a second state of one weight, after '" + packed->name + "'", place);
      packed = &tensor;
    } else if (std::ranges::find(known, key) == known.end()) {
      throw Error(Errc::unexpected_tensor, "does not belong to a 4-bit weight", place);
    }
    state.nested |= key == "nested_absmax";
  }
  if (packed == nullptr) {
    throw Error(Errc::missing_tensor, "expected '" + weight + "." + std::string(detail::bnb_state_key) + "nf4' or '...fp4'",
                weight_place);
  }

  const ErrorPlace place{.file = file.name(), .tensor = packed->name};
  state.format = packed->name.substr(weight.size() + 1 + detail::bnb_state_key.size());
  detail::expect_bnb(state.format == NF4::name || state.format == FP4::name, Errc::unsupported, file, packed->name, "nf4 or fp4",
                     "'" + printable(state.format, 32) + "'");
  detail::expect_bnb(packed->dtype == DType::U8 && packed->shape.size() == 1, Errc::dtype, file, packed->name, "a vector of U8",
                     detail::shape_text(packed->shape) + " of " + std::string(qdylora::name(packed->dtype)));
  const auto bytes = file.bytes(packed->name);
  const Json json =
      parse_json({reinterpret_cast<const char*>(bytes.data()), static_cast<std::size_t>(bytes.size())}, place);

  const auto check = [&](bool condition, Errc code, const std::string& expected, const std::string& found) {
    detail::expect_bnb(condition, code, file, packed->name, expected, found);
  };
  const std::string type = get_string(json, "quant_type", place);
  check(type == state.format, Errc::bad_config, "quant_type " + state.format, "'" + printable(type, 32) + "'");
  state.block_size = get_integer(json, "blocksize", 1, std::numeric_limits<Index>::max(), place);
  check(is_block_size(state.block_size), Errc::block_size, "a blocksize that is a power of two in 32 ... 4096",
        std::to_string(state.block_size));
  const std::string dtype = get_string(json, "dtype", place);
  const auto known_dtype = std::ranges::find(detail::bnb_dtypes, std::string_view(dtype), [](const auto& d) { return d.second; });
  check(known_dtype != detail::bnb_dtypes.end(), Errc::unsupported, "dtype float32, float16 or bfloat16",
        "'" + printable(dtype, 32) + "'");
  state.dtype = known_dtype->first;
  const auto shape = get_integers(json, "shape", 1, std::numeric_limits<Index>::max(), place);
  check(shape.size() == 2, Errc::shape, "a matrix", "a shape of " + std::to_string(shape.size()) + " dimensions");
  state.rows = shape[0];
  state.cols = shape[1];
  const auto elements = checked_mul(static_cast<std::uint64_t>(shape[0]), static_cast<std::uint64_t>(shape[1]), place);
  static_cast<void>(checked_narrow<Index>(elements, place));

  std::size_t keys = 4;
  if (state.nested) {
    keys = 7;
    const Index nested_block = get_integer(json, "nested_blocksize", 1, std::numeric_limits<Index>::max(), place);
    check(nested_block == DoubleQuant<>::nested_block_size, Errc::unsupported, "nested_blocksize 256",
          std::to_string(nested_block));
    const std::string nested_dtype = get_string(json, "nested_dtype", place);
    check(nested_dtype == "float32", Errc::unsupported, "nested_dtype float32", "'" + printable(nested_dtype, 32) + "'");
    const double offset = get_number(json, "nested_offset", place);
    state.offset = static_cast<float>(offset);
    check(std::isfinite(state.offset), Errc::non_finite, "a nested_offset within float32", std::to_string(offset));
  }
  check(json.size() == keys, Errc::bad_config, std::to_string(keys) + " keys", std::to_string(json.size()));
  for (const std::string_view nested : {"nested_absmax", "nested_quant_map"}) {
    const std::string tensor = weight + "." + std::string(nested);
    if (file.contains(tensor) != state.nested) {
      throw Error(state.nested ? Errc::missing_tensor : Errc::unexpected_tensor,
                  "double quantization takes both nested_absmax and nested_quant_map", {.file = file.name(), .tensor = tensor});
    }
  }
  return state;
}

/// Reads the 4-bit weight `name`, e.g. "model.layers.0.mlp.up_proj.weight". Errors of bnb_4bit_state, and Errc::shape_mismatch,
/// non_finite, read, truncated.
inline WeightFor<AnyFormat> load_bnb_4bit(const SafetensorsFile& file, std::string_view name) {
  const BnbState state = bnb_4bit_state(file, name);
  const std::string weight(name);
  if (state.format == NF4::name) {
    if (state.nested) return detail::load_bnb<NF4, DoubleQuant<>>(file, weight, state);
    return detail::load_bnb<NF4, Float32Scales>(file, weight, state);
  }
  if (state.nested) return detail::load_bnb<FP4, DoubleQuant<>>(file, weight, state);
  return detail::load_bnb<FP4, Float32Scales>(file, weight, state);
}

/// The JSON objects of weights added to a writer. The writer borrows them, so this must live until its write().
class BnbStates {
 public:
  std::span<const std::byte> keep(std::string text) {
    texts_.push_back(std::move(text));
    return std::as_bytes(std::span(texts_.back()));
  }

 private:
  std::deque<std::string> texts_;  // a deque: elements stay where they are
};

/// Adds a weight under bitsandbytes' keys. `dtype` is that of the weight before quantization: F32, F16 or BF16. `tensor` and
/// `states` must live until writer.write(). Errc::bad_argument, non_finite, and those of SafetensorsWriter::add.
template <class Format, class Scales, MemoryResource Memory>
  requires(Memory::host)
void add_bnb_4bit(SafetensorsWriter& writer, BnbStates& states, const std::string& name,
                  const QuantizedTensor<Format, Scales, Memory>& tensor, DType dtype) {
  static_assert(std::same_as<Format, NF4> || std::same_as<Format, FP4>, "bitsandbytes' 4-bit formats are NF4 and FP4");
  static_assert(std::same_as<Scales, Float32Scales> || std::same_as<Scales, DoubleQuant<DynamicMap8>>,
                "bitsandbytes' scales are Float32Scales and DoubleQuant<DynamicMap8>");
  const auto known = std::ranges::find(detail::bnb_dtypes, dtype, [](const auto& d) { return d.first; });
  QDYLORA_EXPECTS(known != detail::bnb_dtypes.end(), bad_argument,
                  "add_bnb_4bit: a weight of " + std::string(qdylora::name(dtype)) + " is not one that bitsandbytes quantizes");
  const auto add = [&](const std::string& key, DType type, std::vector<Index> shape, const auto& elements) {
    writer.add(name + key, type, std::move(shape), std::as_bytes(std::span(elements)));
  };
  std::string state = "{\"quant_type\": \"" + std::string(Format::name) +
                      "\", \"blocksize\": " + std::to_string(tensor.block_size()) + ", \"dtype\": \"" + std::string(known->second) +
                      "\", \"shape\": [" + std::to_string(tensor.rows()) + ", " + std::to_string(tensor.cols()) + "]";
  add("", DType::U8, {tensor.codes().size(), 1}, tensor.codes().span());
  add(".quant_map", DType::F32, {16}, Format::values);
  const auto& scales = tensor.scales();
  if constexpr (Scales::nested) {
    QDYLORA_EXPECTS(std::isfinite(scales.offset), non_finite, name + ": the offset of the nested scales is not finite");
    state += ", \"nested_blocksize\": " + std::to_string(Scales::nested_block_size) +
             ", \"nested_dtype\": \"float32\", \"nested_offset\": " + detail::python_number(static_cast<double>(scales.offset));
    add(".absmax", DType::U8, {scales.codes.size()}, scales.codes.span());
    add(".nested_absmax", DType::F32, {scales.nested_absmax.size()}, scales.nested_absmax.span());
    add(".nested_quant_map", DType::F32, {256}, Scales::SecondLevel::values);
  } else {
    add(".absmax", DType::F32, {scales.absmax.size()}, scales.absmax.span());
  }
  const auto text = states.keep(state + "}");
  writer.add(name + "." + std::string(detail::bnb_state_key) + std::string(Format::name), DType::U8,
             {static_cast<Index>(text.size())}, text);
}
template <class Format, class Scales, MemoryResource Memory>
void add_bnb_4bit(SafetensorsWriter&, BnbStates&, const std::string&, QuantizedTensor<Format, Scales, Memory>&&,
                  DType) = delete;  // its data would be gone before write()

/// The same for a weight whose format is known at run time. Also Errc::unsupported: a format that bitsandbytes does not have.
inline void add_bnb_4bit(SafetensorsWriter& writer, BnbStates& states, const std::string& name, const WeightFor<AnyFormat>& weight,
                         DType dtype) {
  const auto add = [&]<class Storage>(const Storage& storage) {
    if constexpr (requires { typename Storage::format; }) {
      if constexpr (std::same_as<typename Storage::format, NF4> || std::same_as<typename Storage::format, FP4>) {
        return add_bnb_4bit(writer, states, name, storage, dtype);
      }
    }
    throw Error(Errc::unsupported, "expected a weight in NF4 or FP4", {.tensor = name});
  };
  std::visit(add, weight.storage());
}
void add_bnb_4bit(SafetensorsWriter&, BnbStates&, const std::string&, WeightFor<AnyFormat>&&, DType) = delete;

/// "quantization_config" of the config.json beside such weights: what transformers' BitsAndBytesConfig writes. `format` is nf4 or fp4,
/// `compute` the type that products are to be in: F32, F16 or BF16. The block size is in each weight's own state. Errc::bad_argument.
inline Json bnb_4bit_config(std::string_view format, bool double_quant, DType compute) {
  const auto known = std::ranges::find(detail::bnb_dtypes, compute, [](const auto& d) { return d.first; });
  QDYLORA_EXPECTS(known != detail::bnb_dtypes.end() && (format == NF4::name || format == FP4::name), bad_argument,
                  "bnb_4bit_config: " + std::string(format) + " with products in " + std::string(name(compute)));
  return {{"quant_method", "bitsandbytes"},
          {"load_in_4bit", true},
          {"_load_in_4bit", true},
          {"bnb_4bit_quant_type", format},
          {"bnb_4bit_use_double_quant", double_quant},
          {"bnb_4bit_compute_dtype", known->second},
          {"bnb_4bit_quant_storage", "uint8"},
          {"load_in_8bit", false},
          {"_load_in_8bit", false},
          {"llm_int8_enable_fp32_cpu_offload", false},
          {"llm_int8_has_fp16_weight", false},
          {"llm_int8_skip_modules", nullptr},
          {"llm_int8_threshold", 6.0}};
}

}  // namespace qdylora
