// DecoderOptions: what trains in a decoder, and how it keeps its activations.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include <qdylora/core/paged_memory.hpp>
#include <qdylora/io/module_patterns.hpp>
#include <qdylora/model/config.hpp>
#include <qdylora/nn/adapter_method.hpp>
#include <qdylora/nn/alpha_linear.hpp>
#include <qdylora/nn/lora_adapter.hpp>

namespace qdylora {

/// Maximal ranks and alphas of single layers, by their names as PEFT's rank_pattern and alpha_pattern have them: those that no pattern
/// matches have LoRAOptions'. A layer takes part in a higher rank than its own with all its rows.
struct LayerPatterns {
  ModulePatterns rank = ModulePatterns("rank pattern"), alpha = ModulePatterns("alpha pattern");

  bool empty() const noexcept { return rank.empty() && alpha.empty(); }

  /// Errc::rank_range for what is no rank from 1 to `most`.
  Index rank_of(const std::string& name, Index most) const {
    const double found = rank.value_or(name, static_cast<double>(most));
    char text[32];
    std::snprintf(text, sizeof text, "%g", found);
    QDYLORA_EXPECTS(found >= 1.0 && found <= static_cast<double>(most) && found == std::floor(found), rank_range,
                    name + ": rank " + text + " by its pattern is not in 1 ... " + std::to_string(most));
    return static_cast<Index>(found);
  }
  float alpha_of(const std::string& name, float usual) const {
    return static_cast<float>(alpha.value_or(name, static_cast<double>(usual)));
  }
};

struct DecoderOptions {
  LoRAOptions lora = {};    // of every adapter; names and layer numbers are filled in
  bool checkpoint = false;  // keep only each block's input and run blocks again in the backward pass: a third more work, far less memory
  PagedMemory checkpoint_memory = {};  // of these inputs, on a backend in the host's memory: files of its folder, if it has one
  bool offload_checkpoints = false;    // these inputs wait in the host's memory while a device computes; three of them are on the device
  AdapterMethod method = AdapterMethod::lora;  // by alpha and full, max_rank is 1, whatever lora says
  AlphaOptions alpha = {};                     // of every layer by that method; names are filled in
  LayerPatterns patterns = {};                 // by AdapterMethod::lora, and without gates
};

/// The maximal rank of each linear layer's adapter, in the order of DecoderConfig::linear_names. Errc::rank_range.
inline std::vector<Index> layer_ranks(const DecoderOptions& options, const DecoderConfig& config) {
  std::vector<Index> ranks;
  for (const auto& name : config.linear_names()) ranks.push_back(options.patterns.rank_of(name, options.lora.max_rank));
  return ranks;
}

/// Throws for patterns that a model cannot have: Errc::unsupported by another method or with gates, bad_argument for one that matches no
/// layer, rank_range for ranks that are none, or where no layer is left that has LoRAOptions::max_rank.
inline void expect_fits(const DecoderOptions& options, const DecoderConfig& config) {
  if (options.patterns.empty()) return;
  QDYLORA_EXPECTS(options.method == AdapterMethod::lora && options.lora.gated_ranks.empty(), unsupported,
                  "patterns of ranks and alphas are for low-rank adapters without gates");
  const auto names = config.linear_names();
  options.patterns.rank.expect_matches(names);
  options.patterns.alpha.expect_matches(names);
  const Index most = std::ranges::max(layer_ranks(options, config));
  QDYLORA_EXPECTS(most == options.lora.max_rank, rank_range,
                  "by their patterns no layer has rank " + std::to_string(options.lora.max_rank) + ", the most is " + std::to_string(most));
}

}  // namespace qdylora
