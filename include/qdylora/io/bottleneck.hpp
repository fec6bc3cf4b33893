// Bottleneck adapters (<qdylora/nn/bottleneck_adapter.hpp>) in folders of our own: PEFT has no such kind, and does not take them for one.
//
//   bottleneck_config.json          format, version; method, activation; width; alpha and scale, of which s_b at each width b; ranks, recipe
//   bottleneck_model.safetensors    of each module M: M.down.weight [width, in] = A and M.up.weight [width, out] = B
//
// Both matrices are laid out unit by unit: the first b rows of both are the bottleneck of width b. What is saved at a width has our function
// at it and below. It is read as a PeftAdapter whose method is not lora, and whose modules are A and B without a change of a weight.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/io/json.hpp>
#include <qdylora/io/peft_format.hpp>
#include <qdylora/io/peft_save.hpp>
#include <qdylora/io/safetensors.hpp>

namespace qdylora {

namespace detail {

inline constexpr std::string_view bottleneck_model_file = "bottleneck_model.safetensors";
inline constexpr std::string_view bottleneck_format = "qdylora.bottleneck";
inline constexpr std::string_view bottleneck_a = ".down.weight";
inline constexpr std::string_view bottleneck_b = ".up.weight";

}  // namespace detail

/// Whether a folder holds what save_bottleneck_adapter writes.
inline bool is_bottleneck_adapter(const std::filesystem::path& folder) {
  return std::filesystem::exists(folder / detail::bottleneck_config_file);
}

/// Saves the bottlenecks of a model as a folder, which is made if it is absent, crash-safe as save_peft_adapter; a PEFT adapter there goes.
/// Of the options rank, base_model, ranks and recipe count. Errc::bad_argument (no adapters, or of several widths, scales or alphas; a
/// method without bottlenecks), unsupported (initial values), rank_range, duplicate, non_finite, open, and those of AtomicFile.
inline void save_bottleneck_adapter(const std::filesystem::path& folder, AdapterMethod method, std::span<const NamedAdapter> adapters,
                                    const PeftOptions& options = {}) {
  QDYLORA_EXPECTS(has_bottlenecks(method), bad_argument, "save_bottleneck_adapter: " + std::string(name(method)) + " has no bottlenecks");
  QDYLORA_EXPECTS(!adapters.empty(), bad_argument, "save_bottleneck_adapter: no adapters");
  QDYLORA_EXPECTS(options.init.standard(), unsupported, "save_bottleneck_adapter: initial values are for low-rank updates");
  QDYLORA_EXPECTS(adapters.front().adapter != nullptr, bad_argument, "save_bottleneck_adapter: no adapter");
  const LoRAOptions& first = adapters.front().adapter->options();
  const Index width = options.rank == 0 ? first.max_rank : options.rank;
  QDYLORA_EXPECTS(width >= 1 && width <= first.max_rank, rank_range,
                  "save_bottleneck_adapter: width " + std::to_string(width) + " is not in 1 ... " + std::to_string(first.max_rank));
  SafetensorsWriter model;
  for (const auto& [module, adapter, heads, own_rank] : adapters) {
    QDYLORA_EXPECTS(adapter != nullptr && heads == 0 && own_rank == 0 && adapter->max_rank() == first.max_rank &&
                        adapter->options().alpha == first.alpha && adapter->options().scale == first.scale,
                    bad_argument, "save_bottleneck_adapter: " + module + " differs from " + adapters.front().module + " in more than its values");
    for (const auto& [suffix, parameter] : {std::pair(detail::bottleneck_a, &adapter->a()), std::pair(detail::bottleneck_b, &adapter->b())}) {
      const std::string key = module + std::string(suffix);
      const auto rows = parameter->value.view().top_rows(width);
      detail::expect_finite(rows, {.tensor = key});
      model.add(key, rows);
    }
  }
  // Under alpha / r the scale is that of the whole width, whatever is kept of it.
  double alpha = static_cast<double>(first.alpha);
  if (first.scale == ScalePolicy::constant) alpha = alpha * static_cast<double>(width) / static_cast<double>(first.max_rank);
  Json config = {{"format", std::string(detail::bottleneck_format)}, {"version", 1},
                 {"method", std::string(name(method))},              {"activation", "gelu"},
                 {"width", width},                                   {"alpha", detail::short_number(alpha)},
                 {"scale", std::string(name(first.scale))},          {"ranks", detail::ranks_up_to(width, options.ranks)}};
  if (!options.recipe.empty()) config["recipe"] = options.recipe;
  if (!options.base_model.empty()) config["base_model_name_or_path"] = options.base_model;

  detail::replace_adapter(folder, detail::bottleneck_config_file, config,
                          [&](const auto&) { model.write(folder / detail::bottleneck_model_file); });
}

/// Reads such a folder, strictly. Errc::bad_config, version, unsupported (an activation or method that is not ours), missing_tensor,
/// unexpected_tensor, shape_mismatch, non_finite, and those of read_json and SafetensorsFile.
inline PeftAdapter load_bottleneck_adapter(const std::filesystem::path& folder, const Limits& limits = {}) {
  const std::filesystem::path config_path = folder / detail::bottleneck_config_file;
  const ErrorPlace place{.file = config_path.native()};
  const Json json = read_json(config_path, limits);
  if (const auto format = get_string(json, "format", place); format != detail::bottleneck_format)
    throw Error(Errc::bad_config, "expected format " + std::string(detail::bottleneck_format) + ", found '" + printable(format, 32) + "'", place);
  if (const auto version = get_integer(json, "version", 0, std::numeric_limits<std::int32_t>::max(), place); version != 1)
    throw Error(Errc::version, "expected version 1, found " + std::to_string(version), place);
  if (const auto activation = get_string(json, "activation", place); activation != "gelu")
    throw Error(Errc::unsupported, "expected activation gelu, found '" + printable(activation, 32) + "'", place);
  PeftAdapter adapter;
  const auto method = get_string(json, "method", place);
  if (method != name(AdapterMethod::houlsby) && method != name(AdapterMethod::parallel))
    throw Error(Errc::unsupported, "expected method houlsby or parallel, found '" + printable(method, 32) + "'", place);
  adapter.method = adapter_method(method);
  const auto most = static_cast<Index>(limits.ranks);
  const Index width = adapter.config.rank = get_integer(json, "width", 1, most, place);
  const double alpha = adapter.config.alpha = get_number(json, "alpha", place);
  if (!(alpha > 0.0 && alpha <= static_cast<double>(std::numeric_limits<float>::max())))
    throw Error(Errc::bad_config, "expected a positive alpha, found " + std::to_string(alpha), place);
  const auto scale = get_string(json, "scale", place);
  const auto policy = detail::scale_policy(scale);
  if (!policy) throw Error(Errc::unsupported, "unknown scale '" + printable(scale, 32) + "'", place);
  adapter.ranks = get_integers(json, "ranks", 1, width, place);
  adapter.config.base_model = get_string_or(json, "base_model_name_or_path", "", place);

  const SafetensorsFile file(folder / detail::bottleneck_model_file, limits);
  for (const TensorInfo& tensor : file.tensors()) {
    const ErrorPlace at{.file = file.name(), .tensor = tensor.name};
    const std::string_view key = tensor.name;
    const bool is_a = key.ends_with(detail::bottleneck_a);
    const std::string_view suffix = is_a ? detail::bottleneck_a : detail::bottleneck_b;
    if (!key.ends_with(suffix) || key.size() == suffix.size())
      throw Error(Errc::unexpected_tensor, "expected <module>.down.weight or .up.weight", at);
    const std::string module(key.substr(0, key.size() - suffix.size()));
    const std::string other = module + std::string(is_a ? detail::bottleneck_b : detail::bottleneck_a);
    if (!file.contains(other)) throw Error(Errc::missing_tensor, "its pair '" + printable(other) + "' is not in the file", at);
    if (tensor.shape.size() != 2 || tensor.shape[0] != width)
      throw Error(Errc::shape_mismatch,
                  "expected " + std::to_string(width) + " rows, the config's width, found " + detail::shape_text(std::span(tensor.shape)), at);
    if (!is_a) continue;  // the pair is read once, after its own shape is known to be right
    const auto& shape = file.info(other).shape;
    if (shape != tensor.shape)
      throw Error(Errc::shape_mismatch,
                  "expected " + detail::shape_text(std::span(tensor.shape)) + ", found " + detail::shape_text(std::span(shape)),
                  {.file = file.name(), .tensor = other});
    PeftModule part;
    part.name = module;
    part.a = file.matrix(key);
    part.b = file.matrix(other);
    part.policy = *policy;
    part.alpha = *policy == ScalePolicy::over_sqrt_rank ? alpha * std::sqrt(static_cast<double>(width)) : alpha;
    detail::expect_finite(part.a.view(), at);
    detail::expect_finite(part.b.view(), {.file = file.name(), .tensor = other});
    adapter.modules.push_back(std::move(part));
  }
  if (adapter.modules.empty()) throw Error(Errc::missing_tensor, "the adapter is empty", {.file = file.name()});
  std::ranges::sort(adapter.modules, {}, &PeftModule::name);
  return adapter;
}

}  // namespace qdylora
