// The trained scales of a model's binary codes (AlphaLinear) in a folder of our own: what a task has of its own, beside a reference to the
// base, of which the codes are made again.
//
//   alpha_config.json          format, version; planes, group_size, iterations (BinaryCodeOptions) and trained_planes; codes, the checksum
//                              of all signs and of the scales that they began with; the model's name
//   alpha_model.safetensors    of each layer M: M.alpha F32 [trained planes, out, groups], as io/binary_code.hpp has it
//
// Scales mean nothing beside other signs than those they were trained with: load_alphas compares the checksum.
#pragma once

#include <filesystem>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/io/binary_code.hpp>
#include <qdylora/io/checksum.hpp>
#include <qdylora/io/json.hpp>
#include <qdylora/io/peft_format.hpp>
#include <qdylora/io/peft_save.hpp>

namespace qdylora {

namespace detail {

inline constexpr std::string_view alpha_model_file = "alpha_model.safetensors";
inline constexpr std::string_view alpha_format = "qdylora.alpha";

/// Of the names, shapes, signs and first scales of layers, in their order.
template <class Layers>
std::string codes_checksum(const Layers& layers) {
  Xxh64 hash;
  for (const auto* layer : layers) {
    const BinaryCodedTensor<>& codes = *layer->codes();
    const MatrixView<const float> scales = codes.scales();
    hash.update(layer->options().name).update(" ").update(shape_text(codes.rows(), codes.cols()));
    hash.update(std::as_bytes(codes.bits().span()));
    hash.update(std::as_bytes(std::span(scales.data, static_cast<std::size_t>(scales.size()))));
  }
  return hash.hex();
}

}  // namespace detail

/// What alpha_config.json says.
struct AlphaAdapter {
  BinaryCodeOptions code;
  Index trained_planes = 1;
  std::string codes;       // their checksum
  std::string base_model;  // its name
};

/// Whether a folder holds what save_alpha_adapter writes.
inline bool is_alpha_adapter(const std::filesystem::path& folder) { return std::filesystem::exists(folder / detail::alpha_config_file); }

/// Saves the trained scales of a model's layers as a folder, which is made if it is absent, crash-safe as save_peft_adapter; another
/// adapter there goes. `code` is what the codes were made with. Errc::bad_argument (no layers; layers of other planes, groups or trained
/// planes than the first or `code`), duplicate, non_finite, open, and those of AtomicFile.
template <AlphaLayer Layer>
void save_alpha_adapter(const std::filesystem::path& folder, const std::vector<Layer*>& layers, const BinaryCodeOptions& code,
                        const std::string& base_model = "") {
  QDYLORA_EXPECTS(!layers.empty(), bad_argument, "save_alpha_adapter: no layers");
  const Index trained = layers.front()->options().trained_planes;
  SafetensorsWriter model;
  for (const auto* layer : layers) {
    const BinaryCodeShape& shape = layer->codes()->shape();
    const AlphaOptions& options = layer->options();
    QDYLORA_EXPECTS(shape.planes == code.planes && shape.group_size == code.group_size && options.trained_planes == trained, bad_argument,
                    "save_alpha_adapter: " + options.name + " has " + std::to_string(shape.planes) + " planes of groups of " +
                        std::to_string(shape.group_size) + ", " + std::to_string(options.trained_planes) + " trained; expected " +
                        std::to_string(code.planes) + ", " + std::to_string(code.group_size) + " and " + std::to_string(trained));
    detail::expect_finite(layer->alpha().value.view(), {.tensor = options.name + ".alpha"});
    add_alpha(model, *layer);
  }
  Json config = {{"format", std::string(detail::alpha_format)},
                 {"version", 1},
                 {"planes", code.planes},
                 {"group_size", code.group_size},
                 {"iterations", code.iterations},
                 {"trained_planes", trained},
                 {"codes", detail::codes_checksum(layers)}};
  if (!base_model.empty()) config["base_model_name_or_path"] = base_model;
  detail::replace_adapter(folder, detail::alpha_config_file, config, [&](const auto&) { model.write(folder / detail::alpha_model_file); });
}

/// Reads the config of such a folder: what the base is to be made with. Errc::bad_config, version, and those of read_json.
inline AlphaAdapter read_alpha_config(const std::filesystem::path& folder, const Limits& limits = {}) {
  const std::filesystem::path path = folder / detail::alpha_config_file;
  const ErrorPlace place{.file = path.native()};
  const Json json = read_json(path, limits);
  if (const auto format = get_string(json, "format", place); format != detail::alpha_format)
    throw Error(Errc::bad_config, "expected format " + std::string(detail::alpha_format) + ", found '" + printable(format, 32) + "'",
                place);
  constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();
  if (const auto version = get_integer(json, "version", 0, most, place); version != 1)
    throw Error(Errc::version, "expected version 1, found " + std::to_string(version), place);
  AlphaAdapter adapter;
  adapter.code.planes = get_integer(json, "planes", 1, most_planes, place);
  adapter.code.group_size = get_integer(json, "group_size", 0, most, place);
  if (adapter.code.group_size % 8 != 0)
    throw Error(Errc::bad_config, "group_size: expected a multiple of 8, found " + std::to_string(adapter.code.group_size), place);
  adapter.code.iterations = get_integer(json, "iterations", 0, most, place);
  adapter.trained_planes = get_integer(json, "trained_planes", 1, adapter.code.planes, place);
  adapter.codes = get_string(json, "codes", place);
  adapter.base_model = get_string_or(json, "base_model_name_or_path", "", place);
  return adapter;
}

/// Puts the scales of a folder into the layers of a model, all that there are. Errc::bad_config (other codes than they were trained with),
/// unexpected_tensor (more layers than the model has), and the errors of read_alpha_config, SafetensorsFile and load_alpha; after one the
/// scales may have changed in part.
template <AlphaLayer Layer>
void load_alphas(const std::filesystem::path& folder, const std::vector<Layer*>& layers, const Limits& limits = {}) {
  const AlphaAdapter adapter = read_alpha_config(folder, limits);
  if (const std::string found = detail::codes_checksum(layers); found != adapter.codes)
    throw Error(Errc::bad_config,
                "the scales were trained on other planes of signs than the model's: expected checksum " + printable(adapter.codes, 32) +
                    ", found " + found,
                {.file = folder.native()});
  const SafetensorsFile file(folder / detail::alpha_model_file, limits);
  if (file.tensors().size() > layers.size())
    throw Error(
        Errc::unexpected_tensor,
        "has " + std::to_string(file.tensors().size()) + " tensors, expected one for each of " + std::to_string(layers.size()) + " layers",
        {.file = file.name()});
  for (auto* layer : layers) load_alpha(file, *layer);
}

}  // namespace qdylora
