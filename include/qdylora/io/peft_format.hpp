// LoRA adapters in the folders that Hugging Face PEFT writes and reads:
//
//   adapter_config.json         r, lora_alpha, target_modules, ...; rank_pattern and alpha_pattern for modules that differ
//   adapter_model.safetensors   of each module M: base_model.model.M.lora_A.weight [r, in] and ...lora_B.weight [out, r]; with use_dora
//                               ...lora_magnitude_vector [out] too; with bias "lora_only" of those that have one ...base_layer.bias [out],
//                               to be used instead of the model's, as is of a module M that modules_to_save names the whole
//                               base_model.model.M.weight (or .bias)
//   qdylora_gates.safetensors   ours, only for a whole adapter with gates: M.gates, M.gated_ranks, M.lora_B.weight without gates
//
// A reader computes W x + (lora_alpha / r) B A x, and by DoRA makes each row of that weight as long as its magnitude. It finds the rows'
// own lengths by itself, so one magnitude serves all ranks. What is saved at rank b is such that this is our function at rank b: r = b,
// lora_alpha = b * s_b for the scale s_b of whatever policy, gates multiplied into B. What only we can use stands where others do
// not look: in the tensor file's metadata under "qdylora.", and in the third file. Saved whole, an adapter comes back to the bit.
// <qdylora/io/peft_save.hpp> writes such folders, <qdylora/io/peft_load.hpp> reads them; <qdylora/io/peft.hpp> is both.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <qdylora/backend.hpp>
#include <qdylora/core/matrix.hpp>
#include <qdylora/io/json.hpp>
#include <qdylora/nn/adapter_method.hpp>
#include <qdylora/nn/lora_adapter.hpp>
#include <qdylora/nn/low_rank.hpp>

namespace qdylora {

struct PeftConfig {
  Index rank = 0;
  double alpha = 0.0;
  bool use_rslora = false;  // scale alpha / sqrt(r)
  bool use_dora = false;
  bool trains_bias = false;  // bias "lora_only"
  bool fan_in_fan_out = false;  // the base stores its weights [in, out] (Conv1D); A, B and magnitudes are the same
  double dropout = 0.0;
  std::string base_model;
  std::string task_type;
  std::vector<std::string> target_modules;  // empty if the file has a pattern instead of names
};

/// The adapter of one module, in our orientation.
struct PeftModule {
  std::string name;
  Matrix<float> a;  // [r, in]
  Matrix<float> b;  // [r, out], without gates
  double alpha = 0.0;  // the scale at rank r is alpha / r
  ScalePolicy policy = ScalePolicy::constant;  // of lower ranks
  std::vector<Index> gated_ranks;
  Matrix<float> gates;  // [gated ranks, r]
  Matrix<float> magnitude;  // [1, out] with DoRA, else empty
  Matrix<float> bias;       // [1, out] where one trained, else empty

  Index rank() const noexcept { return a.rows(); }
  Index in() const noexcept { return a.cols(); }
  Index out() const noexcept { return b.cols(); }
  bool dora() const noexcept { return magnitude.size() > 0; }
  bool biased() const noexcept { return bias.size() > 0; }
};

/// A tensor of a module that was trained whole.
struct PeftTensor {
  std::string name;  // "lm_head.weight"
  Matrix<float> value;
  bool vector = false;  // of [n] numbers, which value has as [1, n]

  std::string_view module() const noexcept { return std::string_view(name).substr(0, name.rfind('.')); }
};

/// The modules that were trained whole (modules_to_save).
struct PeftSaved {
  std::vector<std::string> names;  // modules whose names end so
  std::vector<PeftTensor> tensors;
  bool ties_weights = false;  // ensure_weight_tying: what is tied in the model stays so

  const PeftTensor* find(std::string_view name) const noexcept {
    const auto at = std::ranges::find(tensors, name, &PeftTensor::name);
    return at == tensors.end() ? nullptr : &*at;
  }
};

struct PeftAdapter {
  AdapterMethod method = AdapterMethod::lora;  // another one where load_bottleneck_adapter has read it
  PeftConfig config;
  std::vector<PeftModule> modules;  // sorted by name
  PeftSaved saved;
  std::vector<Index> ranks;         // PeftOptions::ranks; empty if it is not ours
  AdapterInit init = {};            // PeftOptions::init; standard if it is not ours
  std::string base_format = "";     // PeftOptions::base_format
  std::map<std::string, std::string, std::less<>> metadata;

  const PeftModule* find(std::string_view module) const noexcept {
    const auto at = std::ranges::lower_bound(modules, module, {}, &PeftModule::name);
    return at != modules.end() && at->name == module ? &*at : nullptr;
  }
  Index max_rank() const noexcept {
    Index most = 0;
    for (const PeftModule& m : modules) most = std::max(most, m.rank());
    return most;
  }
};

namespace detail {

inline constexpr std::string_view peft_config_file = "adapter_config.json";
inline constexpr std::string_view peft_model_file = "adapter_model.safetensors";
inline constexpr std::string_view peft_gates_file = "qdylora_gates.safetensors";
inline constexpr std::string_view bottleneck_config_file = "bottleneck_config.json";  // no PEFT adapter: <qdylora/io/bottleneck.hpp>
inline constexpr std::string_view alpha_config_file = "alpha_config.json";            // nor this: <qdylora/io/alpha_adapter.hpp>
inline constexpr std::string_view peft_prefix = "base_model.model.";
inline constexpr std::string_view peft_a = ".lora_A.weight";
inline constexpr std::string_view peft_b = ".lora_B.weight";
inline constexpr std::string_view peft_magnitude = ".lora_magnitude_vector";
inline constexpr std::string_view peft_bias = ".base_layer.bias";

/// Where output `o` of the interleaved layout stands in the half-split one. heads 0: in the same place.
inline Index half_split_position(Index o, Index heads, Index out) {
  if (heads == 0) return o;
  const Index d = out / heads;
  const Index i = o % d;
  return o - i + i % 2 * (d / 2) + i / 2;
}

inline void expect_rope_heads(Index heads, Index out, const std::string& module) {
  QDYLORA_EXPECTS(heads >= 0 && (heads == 0 || (out % heads == 0 && out / heads % 2 == 0)), shape_mismatch,
                  module + ": " + std::to_string(out) + " outputs are not " + std::to_string(heads) + " heads of even size");
}

/// Gates of rank `rank`, 1 where it has none.
inline std::vector<float> gates_at(std::span<const Index> gated_ranks, MatrixView<const float> gates, Index rank) {
  std::vector<float> result(static_cast<std::size_t>(rank), 1.0f);
  const auto at = std::ranges::find(gated_ranks, rank);
  if (at != gated_ranks.end()) std::copy_n(gates.row(at - gated_ranks.begin()), rank, result.begin());
  return result;
}

/// B as files have it: [r, out] to [out, r], row i multiplied by factors[i], outputs moved to a rotary layout from the other one (heads 0:
/// they stay).
inline Matrix<float> outward(MatrixView<const float> b, std::span<const float> factors, Index heads, RopeLayout layout) {
  const bool to_half_split = layout == RopeLayout::half_split;
  Matrix<float> result(b.cols, b.rows);
  for (Index o = 0; o < b.cols; ++o) {
    const Index turned = half_split_position(o, heads, b.cols);
    for (Index i = 0; i < b.rows; ++i)
      result(to_half_split ? turned : o, i) = factors[static_cast<std::size_t>(i)] * b(i, to_half_split ? o : turned);
  }
  return result;
}

inline void expect_finite(MatrixView<const float> matrix, const ErrorPlace& place) {
  for (Index i = 0; i < matrix.rows; ++i) {
    for (Index j = 0; j < matrix.cols; ++j) {
      if (!std::isfinite(matrix(i, j))) throw Error(Errc::non_finite, "element " + shape_text(i, j) + " is not finite", place);
    }
  }
}

/// The policy of a name; none where there is no such.
inline std::optional<ScalePolicy> scale_policy(std::string_view text) {
  for (const auto policy : {ScalePolicy::constant, ScalePolicy::over_rank, ScalePolicy::over_sqrt_rank})
    if (text == name(policy)) return policy;
  return std::nullopt;
}

inline std::string join(std::span<const Index> numbers) {
  std::string text;
  for (const Index n : numbers) text += (text.empty() ? "" : ",") + std::to_string(n);
  return text;
}

/// A whole number without a fraction, as PEFT writes lora_alpha.
inline Json short_number(double value) {
  if (value == std::floor(value) && std::fabs(value) < 0x1p53) return static_cast<std::int64_t>(value);
  return value;
}

}  // namespace detail

}  // namespace qdylora
