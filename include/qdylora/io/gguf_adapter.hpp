// LoRA adapters as llama.cpp reads them (--lora): a GGUF file with general.type "adapter", adapter.type "lora" and adapter.lora.alpha, and
// for each adapted tensor T of the base model T.lora_a [r, in] and T.lora_b [out, r]. A reader computes W x + (alpha / r) B A x.
#pragma once

#include <algorithm>
#include <array>
#include <deque>
#include <filesystem>
#include <span>
#include <string>
#include <string_view>
#include <utility>

#include <qdylora/io/gguf_write.hpp>
#include <qdylora/io/peft_format.hpp>
#include <qdylora/nn/lora_adapter.hpp>

namespace qdylora {

/// An adapter and the tensor of a GGUF file that it belongs to, e.g. "blk.0.attn_q.weight".
struct GgufAdapterTensor {
  std::string tensor;
  const LoRAAdapter<float>* adapter = nullptr;
  /// For query and key projections whose outputs are in Hugging Face's layout: the number of heads. Outputs are then saved in GGUF's, which
  /// turns the pairs (2i, 2i + 1) of each head. 0: saved as they are.
  Index half_split_heads = 0;
};

struct GgufAdapterOptions {
  Index rank = 0;                      // to save at; adapters of lower maximal rank are saved whole. 0: all whole
  std::string architecture = "llama";  // general.architecture of the base model
  std::string name = "";
};

/// The tensor of a Llama-shaped GGUF file that holds a module: "model.layers.3.self_attn.q_proj" is "blk.3.attn_q.weight".
/// Errc::unsupported for any other name.
inline std::string gguf_tensor_of(std::string_view module) {
  static constexpr std::array<std::pair<std::string_view, std::string_view>, 7> names = {{{"self_attn.q_proj", "attn_q"},
                                                                                          {"self_attn.k_proj", "attn_k"},
                                                                                          {"self_attn.v_proj", "attn_v"},
                                                                                          {"self_attn.o_proj", "attn_output"},
                                                                                          {"mlp.gate_proj", "ffn_gate"},
                                                                                          {"mlp.up_proj", "ffn_up"},
                                                                                          {"mlp.down_proj", "ffn_down"}}};
  constexpr std::string_view prefix = "model.layers.";
  if (module.starts_with(prefix)) {
    const std::string_view rest = module.substr(prefix.size());
    const auto dot = rest.find('.');
    const bool number = dot != rest.npos && dot > 0 && rest.substr(0, dot).find_first_not_of("0123456789") == rest.npos;
    const auto* found = number ? std::ranges::find(names, rest.substr(dot + 1), &decltype(names)::value_type::first) : names.end();
    if (found != names.end()) return "blk." + std::string(rest.substr(0, dot)) + "." + std::string(found->second) + ".weight";
  }
  throw Error(Errc::unsupported, "module '" + printable(module) + "' has no tensor in a Llama-shaped GGUF file");
}

/// Saves adapters as one file, replaced as a whole, at a rank: gates, and scales that one alpha cannot state, are multiplied into B.
/// Errc::unsupported for adapters with magnitudes (DoRA) or biases, which the format has no place for; rank_range (rank above all adapters'),
/// bad_argument, duplicate, shape_mismatch, non_finite, and those of AtomicFile.
inline void save_gguf_adapter(const std::filesystem::path& path, std::span<const GgufAdapterTensor> adapters,
                              const GgufAdapterOptions& options = {}) {
  QDYLORA_EXPECTS(!adapters.empty(), bad_argument, "save_gguf_adapter: no adapters");
  Index max_rank = 0;
  for (const auto& [tensor, adapter, heads] : adapters) {
    QDYLORA_EXPECTS(adapter != nullptr, bad_argument, "save_gguf_adapter: " + tensor + " has no adapter");
    QDYLORA_EXPECTS(!adapter->dora(), unsupported, tensor + ": llama.cpp's adapters have no magnitudes (DoRA); merge it into its model");
    QDYLORA_EXPECTS(!adapter->biased(), unsupported, tensor + ": llama.cpp's adapters have no biases; merge it into its model");
    detail::expect_rope_heads(heads, adapter->out(), tensor);
    max_rank = std::max(max_rank, adapter->max_rank());
  }
  QDYLORA_EXPECTS(options.rank >= 0 && options.rank <= max_rank, rank_range,
                  "save_gguf_adapter: rank " + std::to_string(options.rank) + " is not in 1 ... " + std::to_string(max_rank));
  const Index rank = options.rank == 0 ? max_rank : options.rank;
  const auto saved_rank = [&](const LoRAAdapter<float>& adapter) { return std::min(rank, adapter.max_rank()); };
  const auto& first = *adapters.front().adapter;
  const float alpha = first.scale(saved_rank(first)) * static_cast<float>(saved_rank(first));

  GgufWriter file;
  file.metadata("general.architecture", options.architecture);
  file.metadata("general.type", "adapter");
  file.metadata("adapter.type", "lora");
  file.metadata("adapter.lora.alpha", alpha);
  if (!options.name.empty()) file.metadata("general.name", options.name);
  std::deque<Matrix<float>> kept;  // what the writer borrows
  for (const auto& [tensor, adapter, heads] : adapters) {
    const Index r = saved_rank(*adapter);
    const auto a = adapter->a().value.view().top_rows(r);
    const auto b = adapter->b().value.view().top_rows(r);
    detail::expect_finite(a, {.tensor = tensor + ".lora_a"});
    detail::expect_finite(b, {.tensor = tensor + ".lora_b"});
    const float own = adapter->scale(r) * static_cast<float>(r);
    auto factors = std::vector<float>(static_cast<std::size_t>(r), 1.0f);
    if (adapter->gated()) factors = detail::gates_at(adapter->options().gated_ranks, adapter->gates().value.view(), r);
    if (own != alpha)
      for (float& factor : factors) factor = factor * own / alpha;
    auto outward = detail::outward(b, factors, heads, RopeLayout::interleaved);
    detail::expect_finite(outward.view(), {.tensor = tensor + ".lora_b"});
    file.add(tensor + ".lora_a", a);
    file.add(tensor + ".lora_b", kept.emplace_back(std::move(outward)).view());
  }
  file.write(path);
}

}  // namespace qdylora
