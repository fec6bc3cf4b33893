// Reads an adapter folder of Hugging Face PEFT, strictly; see <qdylora/io/peft_format.hpp>.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <map>
#include <set>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/io/checked.hpp>
#include <qdylora/io/json.hpp>
#include <qdylora/io/module_patterns.hpp>
#include <qdylora/io/peft_format.hpp>
#include <qdylora/io/safetensors.hpp>

namespace qdylora {

struct PeftLoadOptions {
  bool force = false;  // accept an adapter that is empty, not finite, or changes nothing because B is zero
  bool changed_base = false;  // accept one of ours on a base that PeftAdapter::init made: the caller makes it again
  bool saved_modules = false;  // accept one with modules that were trained whole: the caller uses PeftAdapter::saved
  Limits limits = {};
};

namespace detail {

/// What a reader of plain LoRA, magnitudes and biases would ignore although it changes the function.
inline void expect_plain_lora(const Json& config, const ErrorPlace& place) {
  const std::string type = get_string(config, "peft_type", place);
  if (type != "LORA") throw Error(Errc::unsupported, "expected peft_type LORA, found '" + printable(type, 32) + "'", place);
  const std::string bias = get_string_or(config, "bias", "none", place);
  if (bias != "none" && bias != "lora_only")
    throw Error(Errc::unsupported, "expected bias none or lora_only, found '" + printable(bias, 32) + "'", place);
  for (const std::string_view key : {"lora_bias", "use_qalora", "use_bdlora", "layer_replication", "trainable_token_indices",
                                     "target_parameters", "alora_invocation_tokens", "arrow_config", "kasa_config", "monteclora_config"}) {
    const Json* value = find_key(config, key, place);
    const bool off = value == nullptr || *value == Json(false) || (value->is_structured() && value->empty());
    if (!off) throw Error(Errc::unsupported, "key '" + std::string(key) + "' is set, which is more than LoRA", place);
  }
}

/// modules_to_save. Errc::unsupported where the caller has no use for them.
inline PeftSaved saved_modules(const Json& config, const PeftLoadOptions& options, const ErrorPlace& place) {
  PeftSaved saved;
  if (find_key(config, "modules_to_save", place) != nullptr) saved.names = get_strings(config, "modules_to_save", place);
  saved.ties_weights = get_bool_or(config, "ensure_weight_tying", false, place);
  for (const std::string& name : saved.names)
    if (name.empty()) throw Error(Errc::bad_config, "modules_to_save: a name is empty", place);
  if (!saved.names.empty() && !options.saved_modules) {
    std::string names;
    for (const std::string& name : saved.names) names += (names.empty() ? "" : ", ") + printable(name, 40);
    throw Error(Errc::unsupported, "modules_to_save: has whole modules (" + names + "), which cannot be used here", place);
  }
  return saved;
}

/// rank_pattern or alpha_pattern.
inline ModulePatterns module_patterns(const Json& config, std::string_view key, const ErrorPlace& place) {
  ModulePatterns patterns(key, place);
  const auto at = config.find(key);
  if (at == config.end() || at->is_null()) return patterns;
  for (const auto& [pattern, value] : get_object(config, key, place).items()) patterns.add(pattern, json_number(value, key, place));
  return patterns;
}

/// Some initial values come with another base weight.
inline void expect_same_base(const Json& config, const ErrorPlace& place) {
  const Json* init = find_key(config, "init_lora_weights", place);
  if (init != nullptr && init->is_string() && *init != "gaussian" && *init != "eva" && *init != "orthogonal") {
    throw Error(Errc::unsupported,
                "init_lora_weights '" + printable(init->get<std::string>(), 32) + "' belongs to a base model that was changed too",
                place);
  }
}

/// PeftOptions::init, of the metadata.
inline AdapterInit peft_init(const std::map<std::string, std::string, std::less<>>& metadata, const ErrorPlace& place,
                             const Limits& limits) {
  const auto rank = metadata.find("qdylora.init_rank");
  if (rank == metadata.end()) throw Error(Errc::bad_config, "has qdylora.init, but no qdylora.init_rank", place);
  const Json json = parse_json("{\"qdylora.init_rank\":" + rank->second + "}", place, limits);
  const Index r = get_integer(json, "qdylora.init_rank", 1, static_cast<Index>(limits.ranks), place);
  try {
    return adapter_init(metadata.at("qdylora.init"), r);
  } catch (const Error& error) {
    throw Error(Errc::unsupported, "qdylora.init: " + std::string(error.what()), place);
  }
}

inline Matrix<float> transposed(const Matrix<float>& matrix) {
  Matrix<float> result(matrix.cols(), matrix.rows());
  for (Index i = 0; i < matrix.rows(); ++i)
    for (Index j = 0; j < matrix.cols(); ++j) result(j, i) = matrix(i, j);
  return result;
}

/// The gates of an adapter saved whole; replaces B by the one without gates.
inline void load_peft_gates(const SafetensorsFile& file, PeftModule& module, std::set<std::string, std::less<>>& used) {
  const std::string gates = module.name + ".gates", ranks = module.name + ".gated_ranks", b = module.name + std::string(peft_b);
  if (!file.contains(gates)) return;
  used.insert({gates, ranks, b});
  const auto fail = [&](Errc code, const std::string& tensor, const std::string& what) {
    throw Error(code, what, {.file = file.name(), .tensor = tensor});
  };
  const TensorInfo& info = file.info(ranks);
  if (info.dtype != DType::I64 || info.shape.size() != 1) fail(Errc::dtype, ranks, "expected a vector of I64");
  module.gated_ranks.resize(static_cast<std::size_t>(info.shape[0]));
  file.read(ranks, std::as_writable_bytes(std::span(module.gated_ranks)));
  Index last = 0;
  for (const Index rank : module.gated_ranks) {
    if (rank <= last || rank > module.rank()) fail(Errc::rank_range, ranks, "expected ranks in 1 ... r that rise");
    last = rank;
  }
  const auto expect = [&](const std::string& tensor, Index rows, Index cols) {
    const auto& shape = file.info(tensor).shape;
    if (shape != std::vector{rows, cols}) {
      fail(Errc::shape_mismatch, tensor, "expected " + shape_text(rows, cols) + ", found " + shape_text(std::span(shape)));
    }
  };
  expect(gates, info.shape[0], module.rank());
  expect(b, module.out(), module.rank());
  module.gates = file.matrix(gates);
  expect_finite(module.gates.view(), {.file = file.name(), .tensor = gates});
  Matrix<float> plain = transposed(file.matrix(b));
  const auto factors = gates_at(module.gated_ranks, module.gates.view(), module.rank());
  for (Index i = 0; i < plain.rows(); ++i) {
    for (Index o = 0; o < plain.cols(); ++o) {
      if (factors[static_cast<std::size_t>(i)] * plain(i, o) != module.b(i, o)) {
        fail(Errc::bad_config, b, "its gates do not make the B of " + std::string(peft_model_file) + ": it is of another adapter");
      }
    }
  }
  module.b = std::move(plain);
}

}  // namespace detail

/// Reads an adapter folder of PEFT or of save_peft_adapter. All of it must be understood: a module without its pair, another
/// tensor, a shape that is not the config's, a config that asks for more than LoRA are errors; keys unknown to us are not.
/// Errc::bad_config, unsupported, version, missing_tensor, unexpected_tensor, shape, shape_mismatch, rank_range, non_finite,
/// dtype, and those of read_json and SafetensorsFile.
inline PeftAdapter load_peft_adapter(const std::filesystem::path& folder, const PeftLoadOptions& options = {}) {
  const std::filesystem::path config_path = folder / detail::peft_config_file;
  const ErrorPlace place{.file = config_path.native()};
  for (const auto& [file, kind] : {std::pair(detail::bottleneck_config_file, "bottleneck adapters, which no change of a weight can do"),
                                   std::pair(detail::alpha_config_file, "scales of planes of signs, which are no low-rank change")})
    if (!std::filesystem::exists(config_path) && std::filesystem::exists(folder / file))
      throw Error(Errc::unsupported, "holds " + std::string(kind) + ": PEFT has none, and they are not to be merged or re-ordered",
                  {.file = folder.native()});
  const Json json = read_json(config_path, options.limits);
  detail::expect_plain_lora(json, place);
  PeftAdapter adapter;
  PeftConfig& config = adapter.config;
  const auto most_ranks = static_cast<Index>(options.limits.ranks);
  config.rank = get_integer(json, "r", 1, most_ranks, place);
  config.alpha = get_number(json, "lora_alpha", place);
  config.use_rslora = get_bool_or(json, "use_rslora", false, place);
  config.use_dora = get_bool_or(json, "use_dora", false, place);
  config.trains_bias = get_string_or(json, "bias", "none", place) == "lora_only";
  config.fan_in_fan_out = get_bool_or(json, "fan_in_fan_out", false, place);
  config.dropout = get_number_or(json, "lora_dropout", 0.0, place);
  adapter.saved = detail::saved_modules(json, options, place);
  config.base_model = get_string_or(json, "base_model_name_or_path", "", place);
  config.task_type = get_string_or(json, "task_type", "", place);
  const Json& targets = detail::expect_key(json, "target_modules", place);
  if (!targets.is_string()) config.target_modules = get_strings(json, "target_modules", place);
  const std::set<std::string, std::less<>> target_names(config.target_modules.begin(), config.target_modules.end());
  const ModulePatterns ranks = detail::module_patterns(json, "rank_pattern", place);
  const ModulePatterns alphas = detail::module_patterns(json, "alpha_pattern", place);

  const SafetensorsFile file(folder / detail::peft_model_file, options.limits);
  adapter.metadata = file.metadata();
  const auto entry = [&](std::string_view key) -> const std::string* {
    const auto at = adapter.metadata.find(key);
    return at == adapter.metadata.end() ? nullptr : &at->second;
  };
  if (const auto* version = entry("qdylora.version"); version != nullptr && *version != "1") {
    throw Error(Errc::version, "expected qdylora.version 1, found '" + printable(*version, 32) + "'", {.file = file.name()});
  }
  ScalePolicy policy = ScalePolicy::constant;
  if (const auto* text = entry("qdylora.scale")) {
    const auto known = detail::scale_policy(*text);
    if (!known) throw Error(Errc::unsupported, "unknown qdylora.scale '" + printable(*text, 32) + "'", {.file = file.name()});
    policy = *known;
  }
  if (const auto* text = entry("qdylora.ranks")) {
    const ErrorPlace at{.file = file.name()};
    adapter.ranks =
        get_integers(parse_json("{\"qdylora.ranks\":[" + *text + "]}", at, options.limits), "qdylora.ranks", 1, most_ranks, at);
  }

  if (entry("qdylora.init") != nullptr) {
    adapter.init = detail::peft_init(adapter.metadata, {.file = file.name()}, options.limits);
    if (const auto* text = entry("qdylora.base_format")) adapter.base_format = *text;
  }
  if (!adapter.init.changes_base()) detail::expect_same_base(json, place);
  else if (!options.changed_base)
    throw Error(Errc::unsupported, "began as " + name(adapter.init) + ": belongs to a base model that was changed too",
                {.file = file.name()});

  for (const TensorInfo& tensor : file.tensors()) {
    const ErrorPlace at{.file = file.name(), .tensor = tensor.name};
    const std::string_view key = tensor.name;
    const bool is_a = key.ends_with(detail::peft_a), is_b = key.ends_with(detail::peft_b);
    const bool is_magnitude = config.use_dora && key.ends_with(detail::peft_magnitude);
    const bool is_bias = config.trains_bias && key.ends_with(detail::peft_bias), known = is_a || is_b || is_magnitude || is_bias;
    const std::size_t frame =
        detail::peft_prefix.size() + (is_magnitude ? detail::peft_magnitude : is_bias ? detail::peft_bias : detail::peft_a).size();
    if (!known && key.starts_with(detail::peft_prefix) && (key.ends_with(".weight") || key.ends_with(".bias"))) {
      PeftTensor whole{std::string(key.substr(detail::peft_prefix.size())), {}, tensor.shape.size() == 1};
      if (std::ranges::any_of(adapter.saved.names, [&](const std::string& name) { return whole.module().ends_with(name); })) {
        whole.value = file.matrix(key);
        if (!options.force) detail::expect_finite(whole.value.view(), at);
        adapter.saved.tensors.push_back(std::move(whole));
        continue;
      }
    }
    if (!key.starts_with(detail::peft_prefix) || !known || key.size() <= frame) {
      throw Error(Errc::unexpected_tensor,
                  "expected base_model.model.<module>.lora_A.weight or .lora_B.weight" +
                      std::string(config.use_dora ? " or .lora_magnitude_vector" : "") +
                      std::string(config.trains_bias ? " or .base_layer.bias" : ""),
                  at);
    }
    const std::string module(key.substr(detail::peft_prefix.size(), key.size() - frame));
    const std::string stem = std::string(detail::peft_prefix) + module;
    const std::string other = stem + std::string(is_a ? detail::peft_b : detail::peft_a);
    const std::string magnitude = stem + std::string(detail::peft_magnitude), bias = stem + std::string(detail::peft_bias);
    if (!file.contains(other)) throw Error(Errc::missing_tensor, "its pair '" + printable(other) + "' is not in the file", at);
    if (is_magnitude || is_bias) continue;  // read with the pair
    if (config.use_dora && !file.contains(magnitude)) {
      throw Error(Errc::missing_tensor, "its magnitude '" + printable(magnitude) + "' is not in the file", at);
    }
    if (tensor.shape.size() != 2) {
      throw Error(Errc::shape, "expected a matrix, found " + std::to_string(tensor.shape.size()) + " dimensions", at);
    }
    const bool targeted = targets.is_string() || ModulePatterns::for_each_ending(module, [&](std::string_view ending) {
                            return target_names.contains(ending);
                          });
    if (!targeted) throw Error(Errc::bad_config, "target_modules of the config names no such module", at);
    const double r = ranks.value_or(module, static_cast<double>(config.rank));
    const Index found = is_a ? tensor.shape[0] : tensor.shape[1];
    if (static_cast<double>(found) != r || found < 1 || found > most_ranks) {
      throw Error(Errc::shape_mismatch,
                  "expected rank " + detail::short_number(r).dump() + ", found " + detail::shape_text(tensor.shape), at);
    }
    if (!is_a) continue;  // the pair is read once
    PeftModule part;
    part.name = module;
    part.a = file.matrix(key);
    part.b = detail::transposed(file.matrix(other));
    part.policy = policy;
    part.alpha = alphas.value_or(module, config.alpha);
    if (config.use_rslora) part.alpha *= std::sqrt(r);
    if (!(part.alpha > 0.0 && part.alpha <= static_cast<double>(std::numeric_limits<float>::max()))) {
      throw Error(Errc::bad_config, "expected a positive lora_alpha, found " + std::to_string(part.alpha), at);
    }
    const auto read_vector = [&](const std::string& name) {
      const auto& shape = file.info(name).shape;
      if (shape != std::vector{part.out()}) {
        throw Error(Errc::shape_mismatch,
                    "expected [" + std::to_string(part.out()) + "], found " + detail::shape_text(std::span(shape)),
                    {.file = file.name(), .tensor = name});
      }
      return file.matrix(name);
    };
    if (config.use_dora) part.magnitude = read_vector(magnitude);
    if (config.trains_bias && file.contains(bias)) part.bias = read_vector(bias);
    if (!options.force) {
      detail::expect_finite(part.a.view(), at);
      detail::expect_finite(part.b.view(), {.file = file.name(), .tensor = other});
      detail::expect_finite(part.magnitude.view(), {.file = file.name(), .tensor = magnitude});
      detail::expect_finite(part.bias.view(), {.file = file.name(), .tensor = bias});
    }
    adapter.modules.push_back(std::move(part));
  }
  std::ranges::sort(adapter.modules, {}, &PeftModule::name);
  for (const std::string& name : adapter.saved.names)
    if (std::ranges::none_of(adapter.saved.tensors, [&](const PeftTensor& tensor) { return tensor.module().ends_with(name); }))
      throw Error(Errc::missing_tensor, "modules_to_save: no tensor of a module '" + printable(name) + "' is in the file",
                  {.file = file.name()});

  if (const auto* text = entry("qdylora.gates"); text != nullptr && *text == "true") {
    const SafetensorsFile gates(folder / detail::peft_gates_file, options.limits);
    std::set<std::string, std::less<>> used;
    for (PeftModule& module : adapter.modules) detail::load_peft_gates(gates, module, used);
    for (const TensorInfo& tensor : gates.tensors()) {
      if (!used.contains(tensor.name)) {
        throw Error(Errc::unexpected_tensor, "belongs to no module of the adapter", {.file = gates.name(), .tensor = tensor.name});
      }
    }
  }
  if (!options.force) {
    if (adapter.modules.empty()) throw Error(Errc::missing_tensor, "the adapter is empty", {.file = file.name()});
    const bool zero = !config.use_dora && adapter.saved.tensors.empty() && std::ranges::all_of(adapter.modules, [](const PeftModule& m) {
      return !m.biased() && std::ranges::all_of(m.b.span(), [](float x) { return x == 0.0f; });
    });
    if (zero) throw Error(Errc::bad_config, "the adapter changes nothing: every B is zero", {.file = file.name()});
  }
  return adapter;
}

/// Copies a module into an adapter of the same shape and of at least its rank; rows above get B = 0. Scale policy and alpha are set
/// such that the adapter computes at each rank what the file says. `rope_heads` undoes NamedAdapter::rope_heads.
/// Errc::shape_mismatch, rank_range, bad_config (other gated ranks, a magnitude or a bias on one side alone).
inline void assign(const PeftModule& module, LoRAAdapter<float>& adapter, Index rope_heads = 0) {
  const Index r = module.rank(), most = adapter.max_rank();
  QDYLORA_EXPECTS(module.in() == adapter.in() && module.out() == adapter.out(), shape_mismatch,
                  module.name + ": an adapter of a weight " + detail::shape_text(module.out(), module.in()) +
                      ", assigned to one of " + detail::shape_text(adapter.out(), adapter.in()));
  QDYLORA_EXPECTS(r <= most, rank_range,
                  module.name + ": rank " + std::to_string(r) + " is above the adapter's " + std::to_string(most));
  QDYLORA_EXPECTS(module.gated_ranks == adapter.options().gated_ranks, bad_config,
                  module.name + ": gates at ranks {" + detail::join(module.gated_ranks) + "}, assigned to an adapter with {" +
                      detail::join(adapter.options().gated_ranks) + "}");
  QDYLORA_EXPECTS(module.dora() == adapter.dora(), bad_config,
                  module.name + (module.dora() ? ": a magnitude (DoRA), assigned to an adapter without"
                                               : ": no magnitude, assigned to an adapter with one (DoRA)"));
  QDYLORA_EXPECTS(module.biased() == adapter.biased(), bad_config,
                  module.name + (module.biased() ? ": a bias, assigned to an adapter without" : ": no bias, assigned to an adapter with one"));
  detail::expect_rope_heads(rope_heads, module.out(), module.name);
  auto& options = adapter.options();
  const double ratio = static_cast<double>(most) / static_cast<double>(r);
  options.scale = module.policy;
  switch (module.policy) {
    case ScalePolicy::constant: options.alpha = static_cast<float>(module.alpha * ratio); break;
    case ScalePolicy::over_rank: options.alpha = static_cast<float>(module.alpha); break;
    case ScalePolicy::over_sqrt_rank: options.alpha = static_cast<float>(module.alpha / std::sqrt(static_cast<double>(r))); break;
  }
  copy(MatrixView<const float>(module.a.view()), adapter.a().value.view().top_rows(r));
  for (Index i = 0; i < most; ++i) {
    for (Index o = 0; o < module.out(); ++o) {
      const Index stored = detail::half_split_position(o, rope_heads, module.out());
      adapter.b().value(i, o) = i < r ? module.b(i, stored) : 0.0f;
    }
  }
  const auto assign_vector = [&](const Matrix<float>& stored, Matrix<float>& values) {
    for (Index o = 0; o < module.out(); ++o) values(0, o) = stored(0, detail::half_split_position(o, rope_heads, module.out()));
  };
  if (module.dora()) assign_vector(module.magnitude, adapter.magnitude().value);
  if (module.biased()) assign_vector(module.bias, adapter.bias().value);
  if (!module.gated_ranks.empty()) {
    auto& gates = adapter.gates().value;
    std::ranges::fill(gates.span(), 1.0f);
    copy(MatrixView<const float>(module.gates.view()), gates.view().left_cols(r));
  }
}

/// Those of an adapter that a module fits, but for the scale and alpha, which assign sets.
inline LoRAOptions lora_options(const PeftModule& module) {
  return {.max_rank = module.rank(),
          .name = module.name,
          .gated_ranks = module.gated_ranks,
          .dora = module.dora(),
          .train_bias = module.biased()};
}

/// The same of the adapters that all of an adapter's modules fit.
inline LoRAOptions lora_options(const PeftAdapter& adapter) {
  return {.max_rank = adapter.max_rank(),
          .gated_ranks = adapter.modules.front().gated_ranks,
          .dora = adapter.config.use_dora,
          .train_bias = adapter.config.trains_bias};
}

/// A module as an adapter of its own, of maximal rank r.
inline LoRAAdapter<float> to_adapter(const PeftModule& module) {
  LoRAAdapter<float> adapter(module.in(), module.out(), lora_options(module));
  if (module.biased()) adapter.add_bias();
  assign(module, adapter);
  return adapter;
}

}  // namespace qdylora
