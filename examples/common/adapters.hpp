// The adapters of a decoder, to files and from them, wherever the decoder has its memory.
#pragma once

#include <deque>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/io/alpha_adapter.hpp>
#include <qdylora/io/bottleneck.hpp>
#include <qdylora/io/peft.hpp>
#include <qdylora/model/base_weight.hpp>
#include <qdylora/model/decoder.hpp>

namespace qdylora::examples {

/// f(layer, heads) for every layer with an adapter: heads are its rope_heads.
template <class Model, class F>
void for_each_adapter(Model& model, F&& f) {
  if (has_bottlenecks(model.options().method)) return model.for_each_trained([&](auto& layer) { f(layer, Index{0}); });
  const auto& c = model.config();
  const std::size_t linears = c.linears().size();
  std::size_t at = 0;
  model.for_each_linear([&](auto& linear) { f(linear, rope_heads(c, at++ % linears)); });
}

/// Saves the adapters of a decoder, layers that have a limit at that rank, and those of limit 0 not at all; q and k leave GGUF's rotary
/// layout. Bottlenecks become a folder of our own, which PEFT has none of.
template <class Model>
void save_adapters(const std::filesystem::path& folder, const Model& model, const PeftOptions& options) {
  std::vector<NamedAdapter> named;
  std::deque<LoRAAdapter<float>> copies;  // of a device's
  for_each_adapter(model, [&](const auto& linear, Index heads) {
    const auto& adapter = linear.adapter();
    const Index limit = linear.rank_limit(), own_rank = limit < adapter.max_rank() ? limit : 0;
    if (limit == 0) return;
    if constexpr (Model::Memory::host) {
      named.push_back({adapter.options().name, &adapter, heads, own_rank});
    } else {
      copies.push_back(to_host(adapter, model.backend()));
      named.push_back({adapter.options().name, &copies.back(), heads, own_rank});
    }
  });
  if (const auto method = model.options().method; has_bottlenecks(method)) save_bottleneck_adapter(folder, method, named, options);
  else save_peft_adapter(folder, named, options);
}

/// What --adapter names: PEFT's folder or bottlenecks, or the trained scales of planes of signs; or nothing.
struct OpenAdapter {
  std::optional<PeftAdapter> peft;
  std::optional<AlphaAdapter> alpha;

  Index max_rank() const noexcept { return peft ? peft->max_rank() : alpha ? 1 : 0; }
  AdapterMethod method() const noexcept { return alpha ? AdapterMethod::alpha : peft ? peft->method : AdapterMethod::lora; }
};

/// Reads an adapter's folder; of scales their config. Errors: those of load_peft_adapter, load_bottleneck_adapter and read_alpha_config.
inline OpenAdapter open_adapter(const std::filesystem::path& folder) {
  if (is_alpha_adapter(folder)) return {.peft = {}, .alpha = read_alpha_config(folder)};
  if (is_bottleneck_adapter(folder)) return {.peft = load_bottleneck_adapter(folder), .alpha = {}};
  return {.peft = load_peft_adapter(folder, {.changed_base = true, .saved_modules = true}), .alpha = {}};
}

/// f(layers) with the layers of a model whose scales train, as save_alpha_adapter takes them: of a device copies on the host.
/// Errc::unsupported on a backend without planes of signs.
template <class T, class Backend, class F>
void with_alpha_layers(Decoder<T, Backend>& model, F&& f) {
  if constexpr (!AlphaBackend<Backend, T>) {
    throw Error(Errc::unsupported, "the method alpha needs a backend that computes with planes of signs");
  } else if constexpr (Backend::Memory::host) {
    std::vector<AlphaLinear<T, Backend>*> layers;
    model.for_each_alpha([&](auto& layer) { layers.push_back(&layer); });
    f(layers);
  } else {
    using Copy = AlphaCopy<Accumulator<T>>;
    std::vector<Copy> copies;
    model.for_each_alpha([&](const auto& layer) { copies.push_back(to_host(layer)); });
    std::vector<Copy*> layers;
    for (Copy& copy : copies) layers.push_back(&copy);
    f(layers);
  }
}
/// The same where f changes their scales.
template <class T, class Backend, class F>
void change_alpha_layers(Decoder<T, Backend>& model, F&& f) {
  with_alpha_layers(model, [&](const auto& layers) {
    f(layers);
    if constexpr (!Backend::Memory::host) {
      auto copy = layers.begin();
      model.for_each_alpha([&](auto& layer) { model.backend().upload(std::as_const((*copy++)->alpha().value).view(), layer.alpha().value.view()); });
      model.backend().synchronize();
    }
  });
}

/// The base that an adapter was trained on, of a model in a format: another one than the model quantized where PeftAdapter::init says so.
/// Errc::bad_argument, with the folder, where it began with what another format loses.
inline BaseOptions base_of(const PeftAdapter& adapter, const std::string& folder, const std::string& format) {
  BaseOptions base{.format = base_format(format)};
  if (adapter.init.changes_base()) base.init = adapter.init;
  if (!adapter.init.standard() && adapter.base_format != format)
    throw Error(Errc::bad_argument,
                "--base-format " + format + ": the adapter began as " + name(adapter.init) + " of a base in " +
                    printable(adapter.base_format, 32),
                {.file = folder});
  return base;
}

/// Puts the adapter of a folder into a decoder; layers that it has nothing for stay as the base is. Errors, with the folder: those of
/// assign, and missing_tensor for modules the model lacks.
template <class Model>
void assign_adapter(const PeftAdapter& adapter, const std::string& folder, Model& model) {
  std::size_t used = 0;
  at_tensor(folder, "", [&] {
    for_each_adapter(model, [&](auto& linear, Index heads) {
      auto& own = linear.adapter();
      const auto* module = adapter.find(own.options().name);
      if (module == nullptr) return linear.limit_rank(0);
      if constexpr (Model::Memory::host) {
        assign(*module, own, heads);
      } else {
        auto copy = to_host(own, model.backend());
        assign(*module, copy, heads);
        own.options() = copy.options();
        assign(own, copy, model.backend());
      }
      linear.limit_rank(module->rank());  // its rows beyond are zero, and a scale may depend on the rank
      ++used;
    });
    QDYLORA_EXPECTS(used == adapter.modules.size(), missing_tensor,
                    "is of another model: it has " + std::to_string(adapter.modules.size()) + " modules, of which the model has " +
                        std::to_string(used));
  });
}

}  // namespace qdylora::examples
