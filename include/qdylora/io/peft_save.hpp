// Saves adapters, at any rank, as a folder for Hugging Face PEFT; see <qdylora/io/peft_format.hpp>.
#pragma once

#include <algorithm>
#include <cmath>
#include <deque>
#include <filesystem>
#include <initializer_list>
#include <iterator>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <system_error>
#include <utility>
#include <vector>

#include <qdylora/io/file.hpp>
#include <qdylora/io/json.hpp>
#include <qdylora/io/peft_format.hpp>
#include <qdylora/io/safetensors.hpp>

namespace qdylora {

/// An adapter and the module it belongs to, e.g. "model.layers.0.self_attn.q_proj".
struct NamedAdapter {
  std::string module;
  const LoRAAdapter<float>* adapter = nullptr;
  /// For query and key projections trained in GGUF's layout, where rotary embedding turns the pairs (2i, 2i + 1) of each head: the
  /// number of heads. Outputs are then saved in Hugging Face's layout, which turns (i, i + d / 2): [heads, d / 2, 2] becomes
  /// [heads, 2, d / 2]. 0: saved as they are.
  Index rope_heads = 0;
  Index rank = 0;  // to save at, instead of PeftOptions::rank; at most the adapter's
};

/// The adapters of layers under their names (LoRAOptions::name).
template <class... Layers>
std::vector<NamedAdapter> named(const Layers&... layers) {
  return {NamedAdapter{layers.adapter().options().name, &layers.adapter()}...};
}

namespace detail {

/// The value that most items have; of several, the one that comes first.
template <class Item, class Value>
Value most_common(const std::vector<Item>& items, Value Item::* member) {
  std::map<Value, std::ptrdiff_t> count;
  for (const Item& item : items) ++count[item.*member];
  return (*std::ranges::max_element(items, {}, [&](const Item& item) { return count[item.*member]; })).*member;
}

inline std::vector<Index> ranks_up_to(Index most, std::span<const Index> ranks) {
  std::vector<Index> result;
  std::ranges::copy_if(ranks, std::back_inserter(result), [&](Index rank) { return rank <= most; });
  return result;
}

/// Replaces the adapter of a folder, which is made if it is absent, and each file in it as a whole. write(remove) writes the tensors and
/// removes, by name, files that are not this adapter's. A config that changes is removed before and written last: a crash leaves no new
/// tensors under an old config.
template <class F>
void replace_adapter(const std::filesystem::path& folder, std::string_view config_file, const Json& config, F&& write) {
  std::error_code error;
  std::filesystem::create_directories(folder, error);
  if (error) throw Error(Errc::open, "cannot make the folder: " + error.message(), {.file = folder.native()});
  const auto remove = [&](std::string_view file) {
    std::filesystem::remove(folder / file, error);
    if (error) throw Error(Errc::write, "cannot remove: " + error.message(), {.file = (folder / file).native()});
  };
  const std::string text = config.dump(2) + "\n";
  const std::filesystem::path path = folder / config_file;
  if (std::filesystem::exists(path, error) && read_text(path) != text) remove(config_file);
  for (const auto other : {peft_config_file, bottleneck_config_file, alpha_config_file})  // the folder's former adapter is not this one
    if (other != config_file) remove(other);
  write(remove);
  replace_file(path, text);
}

}  // namespace detail

struct PeftOptions {
  Index rank = 0;  // to save at; modules of lower maximal rank are saved whole. 0: all whole
  std::string base_model = "";
  std::string task_type = "CAUSAL_LM";
  std::vector<Index> ranks = {};  // the ranks the adapter was trained for; those above `rank` are left out
  std::string recipe = "";        // how it was trained
  /// How the adapter began, if not the standard way, and the format of the base it was trained on. Where that base is another one than the
  /// quantized model, init_lora_weights keeps readers from using the adapter on the model as it is: of a whole PiSSA, PEFT makes the base
  /// itself, in float; anything else it refuses.
  AdapterInit init = {};
  std::string base_format = "";
  std::map<std::string, std::string> metadata = {};  // of the tensor file, further entries
  const PeftSaved* saved = nullptr;                  // modules to save whole, beside the adapters
  bool fan_in_fan_out = false;                       // see PeftConfig
};

/// Saves adapters as a folder for PEFT, which is made if it is absent; each file in it is replaced as a whole. A config that
/// changes is removed before and written last: a crash leaves no new tensors under an old config. Errc::rank_range (rank above all
/// adapters'), bad_argument, duplicate, shape_mismatch, non_finite, open, and those of AtomicFile.
inline void save_peft_adapter(const std::filesystem::path& folder, std::span<const NamedAdapter> adapters,
                              const PeftOptions& options = {}) {
  QDYLORA_EXPECTS(!adapters.empty(), bad_argument, "save_peft_adapter: no adapters");
  Index max_rank = 0;
  bool gated = false, biased = false, one_alpha = true, whole = true;
  for (const auto& [module, adapter, heads, own_rank] : adapters) {
    constexpr std::string_view allowed = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-.";
    QDYLORA_EXPECTS(!module.empty() && module.find_first_not_of(allowed) == std::string::npos, bad_argument,
                    "save_peft_adapter: '" + printable(module) + "' is not the name of a module");
    QDYLORA_EXPECTS(adapter != nullptr, bad_argument, "save_peft_adapter: " + module + " has no adapter");
    QDYLORA_EXPECTS(adapter->options().scale == adapters.front().adapter->options().scale, bad_argument,
                    "save_peft_adapter: " + module + " has another scale policy than " + adapters.front().module);
    QDYLORA_EXPECTS(adapter->dora() == adapters.front().adapter->dora(), bad_argument,
                    "save_peft_adapter: of " + module + " and " + adapters.front().module + " only one has a magnitude");
    detail::expect_rope_heads(heads, adapter->out(), module);
    QDYLORA_EXPECTS(own_rank >= 0 && own_rank <= adapter->max_rank(), rank_range,
                    "save_peft_adapter: " + module + ": rank " + std::to_string(own_rank) + " is not in 1 ... " +
                        std::to_string(adapter->max_rank()));
    whole &= own_rank == 0;
    max_rank = std::max(max_rank, adapter->max_rank());
    gated |= adapter->gated();
    biased |= adapter->biased();
    one_alpha &= adapter->options().alpha == adapters.front().adapter->options().alpha;
  }
  QDYLORA_EXPECTS(options.rank >= 0 && options.rank <= max_rank, rank_range,
                  "save_peft_adapter: rank " + std::to_string(options.rank) + " is not in 1 ... " + std::to_string(max_rank));
  const Index rank = options.rank == 0 ? max_rank : options.rank;
  gated &= whole && rank == max_rank;

  SafetensorsWriter model, gates;
  std::deque<Matrix<float>> kept;  // what the writers borrow
  const auto keep = [&kept](Matrix<float> matrix) -> MatrixView<const float> {
    return kept.emplace_back(std::move(matrix)).view();
  };
  Json config = {{"peft_type", "LORA"},
                 {"bias", biased ? "lora_only" : "none"},
                 {"fan_in_fan_out", options.fan_in_fan_out},
                 {"inference_mode", true},
                 {"init_lora_weights", true},
                 {"lora_bias", false},
                 {"modules_to_save", nullptr},
                 {"use_dora", adapters.front().adapter->dora()},
                 {"use_rslora", false},
                 {"rank_pattern", Json::object()},
                 {"alpha_pattern", Json::object()},
                 {"target_modules", Json::array()}};
  if (options.init.changes_base()) {
    const bool made_by_peft = options.init.kind == AdapterInit::Kind::pissa && whole && rank == options.init.rank;
    const std::string other = "of a changed base: " + name(options.init) + " at rank " + std::to_string(options.init.rank);
    config["init_lora_weights"] = made_by_peft ? "pissa" : other;
  }
  if (options.saved != nullptr) {
    if (!options.saved->names.empty()) config["modules_to_save"] = options.saved->names;
    if (options.saved->ties_weights) config["ensure_weight_tying"] = true;
    for (const PeftTensor& tensor : options.saved->tensors) {
      const auto key = std::string(detail::peft_prefix) + tensor.name;
      const auto value = tensor.value.view();
      detail::expect_finite(value, {.tensor = key});
      if (tensor.vector) model.add(key, DType::F32, {value.cols}, std::as_bytes(tensor.value.span()));
      else model.add(key, value);
    }
  }
  config["task_type"] = options.task_type.empty() ? Json() : Json(options.task_type);
  config["base_model_name_or_path"] = options.base_model.empty() ? Json() : Json(options.base_model);
  config["lora_dropout"] = static_cast<double>(adapters.front().adapter->options().dropout);

  struct Scaled {
    std::string pattern;
    Index rank;
    double alpha;
  };
  std::vector<Scaled> scaled;
  for (const auto& [module, adapter, heads, own_rank] : adapters) {
    const Index r = own_rank > 0 ? own_rank : std::min(rank, adapter->max_rank());
    const auto a = adapter->a().value.view().top_rows(r);
    const auto b = adapter->b().value.view().top_rows(r);
    const std::string key = std::string(detail::peft_prefix) + module;
    detail::expect_finite(a, {.tensor = key + std::string(detail::peft_a)});
    detail::expect_finite(b, {.tensor = key + std::string(detail::peft_b)});
    auto factors = std::vector<float>(static_cast<std::size_t>(r), 1.0f);
    if (adapter->gated()) {
      const auto& values = adapter->gates().value;
      detail::expect_finite(values.view(), {.tensor = module + ".gates"});
      factors = detail::gates_at(adapter->options().gated_ranks, values.view(), r);
      if (gated) {
        const std::vector<float> ones(static_cast<std::size_t>(r), 1.0f);
        const auto& ranks = adapter->options().gated_ranks;
        gates.add(module + ".gates", values.view());
        gates.add(module + ".gated_ranks", DType::I64, {static_cast<Index>(ranks.size())}, std::as_bytes(std::span(ranks)));
        gates.add(module + std::string(detail::peft_b), keep(detail::outward(b, ones, heads, RopeLayout::half_split)));
      }
    }
    model.add(key + std::string(detail::peft_a), a);
    model.add(key + std::string(detail::peft_b), keep(detail::outward(b, factors, heads, RopeLayout::half_split)));
    const auto add_vector = [&, turned = heads](std::string_view ending, MatrixView<const float> values) {
      const auto name = key + std::string(ending);
      detail::expect_finite(values, {.tensor = name});
      const auto stored = keep(detail::outward(values, std::vector<float>{1.0f}, turned, RopeLayout::half_split));
      model.add(name, DType::F32, {stored.rows}, std::as_bytes(std::span(stored.data, static_cast<std::size_t>(stored.rows))));
    };
    if (adapter->dora()) add_vector(detail::peft_magnitude, adapter->magnitude().value.view());
    if (adapter->biased()) add_vector(detail::peft_bias, adapter->bias().value.view());

    // lora_alpha = s_r * r
    double alpha = static_cast<double>(adapter->options().alpha);
    switch (adapter->options().scale) {
      case ScalePolicy::constant: alpha = alpha * static_cast<double>(r) / static_cast<double>(adapter->max_rank()); break;
      case ScalePolicy::over_rank: break;
      case ScalePolicy::over_sqrt_rank: alpha *= std::sqrt(static_cast<double>(r)); break;
    }
    // A pattern is a regular expression for the end of a module's name, so it is anchored.
    std::string pattern = "^";
    for (const char c : module) pattern += c == '.' ? std::string("\\.") : std::string(1, c);
    scaled.push_back({std::move(pattern), r, alpha});
    config["target_modules"].push_back(module);
  }
  const Index usual_rank = detail::most_common(scaled, &Scaled::rank);
  const double usual_alpha = detail::most_common(scaled, &Scaled::alpha);
  config["r"] = usual_rank;
  config["lora_alpha"] = detail::short_number(usual_alpha);
  for (const auto& [pattern, r, alpha] : scaled) {
    if (r != usual_rank) config["rank_pattern"][pattern] = r;
    if (alpha != usual_alpha) config["alpha_pattern"][pattern] = detail::short_number(alpha);
  }

  const std::vector<Index> ranks = detail::ranks_up_to(rank, options.ranks);
  const auto& first = adapters.front().adapter->options();
  for (const auto& [key, value] : options.metadata) model.metadata(key, value);
  model.metadata("format", "pt");
  model.metadata("qdylora.version", "1");
  model.metadata("qdylora.scale", std::string(name(first.scale)));
  if (one_alpha) model.metadata("qdylora.alpha", detail::short_number(static_cast<double>(first.alpha)).dump());
  model.metadata("qdylora.max_rank", std::to_string(max_rank));
  if (!ranks.empty()) model.metadata("qdylora.ranks", detail::join(ranks));
  if (!options.recipe.empty()) model.metadata("qdylora.recipe", options.recipe);
  if (gated) model.metadata("qdylora.gates", "true");
  if (!options.init.standard()) {
    model.metadata("qdylora.init", name(options.init));
    model.metadata("qdylora.init_rank", std::to_string(options.init.rank));
    model.metadata("qdylora.base_format", options.base_format);
  }

  detail::replace_adapter(folder, detail::peft_config_file, config, [&](const auto& remove) {
    if (gated) gates.write(folder / detail::peft_gates_file);
    model.write(folder / detail::peft_model_file);
    if (!gated) remove(detail::peft_gates_file);
  });
}
inline void save_peft_adapter(const std::filesystem::path& folder, std::initializer_list<NamedAdapter> adapters,
                              const PeftOptions& options = {}) {
  save_peft_adapter(folder, std::span<const NamedAdapter>(adapters.begin(), adapters.size()), options);
}
/// At one rank, other options at their defaults.
inline void save_peft_adapter(const std::filesystem::path& folder, std::span<const NamedAdapter> adapters, Index rank) {
  QDYLORA_EXPECTS(rank >= 1, rank_range, "save_peft_adapter: rank " + std::to_string(rank) + " is below 1");
  save_peft_adapter(folder, adapters, PeftOptions{.rank = rank});
}

}  // namespace qdylora
