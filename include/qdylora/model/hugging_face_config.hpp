// The shape of a model from Hugging Face's config.json: Llama, Mistral, Qwen2 and Falcon (...ForCausalLM), whose defaults are transformers'.
#pragma once

#include <algorithm>
#include <filesystem>
#include <string>

#include <qdylora/io/json.hpp>
#include <qdylora/model/config.hpp>

namespace qdylora {
namespace detail {

struct HuggingFaceConfig {
  Json json;
  ErrorPlace place;

  Index size(const char* key) const { return static_cast<Index>(get_integer(json, key, 1, Index{1} << 32, place)); }
  Index size_or(const char* key, Index fallback) const { return find_key(json, key, place) == nullptr ? fallback : size(key); }
  bool flag(const char* key, bool fallback) const { return get_bool_or(json, key, fallback, place); }
  float epsilon(const char* key, double fallback) const { return static_cast<float>(get_number_or(json, key, fallback, place)); }

  [[noreturn]] void refuse(Errc code, const char* key, const std::string& expected, const std::string& found) const {
    throw Error(code, std::string(key) + ": expected " + expected + ", found " + found, place);
  }
  void expect_name(const Json& object, const char* key, const std::string& expected, std::string found) const {
    found = get_string_or(object, key, std::move(found), place);
    if (found != expected) refuse(Errc::unsupported, key, "'" + expected + "'", "'" + printable(found) + "'");
  }
  void expect_flag(const char* key, bool expected, bool fallback) const {
    if (flag(key, fallback) != expected) refuse(Errc::unsupported, key, expected ? "true" : "false", expected ? "false" : "true");
  }

  /// The base of the rotary positions. transformers 5 writes rope_parameters, earlier ones rope_theta and rope_scaling.
  double rope_base() const {
    const auto* parameters = find_key(json, "rope_parameters", place);
    const auto* scaling = find_key(json, "rope_scaling", place);
    for (const auto* rope : {parameters, scaling})
      if (rope != nullptr && !rope->is_object()) refuse(Errc::bad_config, "rope_scaling", "an object", std::string(rope->type_name()));
    const bool newer = parameters != nullptr;
    if (const auto* rope = newer ? parameters : scaling; rope != nullptr)
      expect_name(*rope, "rope_type", "default", get_string_or(*rope, "type", "default", place));
    return get_number_or(newer ? *parameters : json, "rope_theta", 10000.0, place);
  }

  /// Llama, and what has its shape under another name: Mistral, Qwen2. Within a sliding window there is nothing to slide: sequences are kept
  /// to it.
  DecoderConfig llama(const std::string& type) const {
    DecoderConfig config;
    config.vocab = size("vocab_size");
    config.width = size("hidden_size");
    config.mlp_width = size("intermediate_size");
    config.layers = size("num_hidden_layers");
    config.heads.heads = size("num_attention_heads");
    const bool mistral = type == "mistral", qwen2 = type == "qwen2";
    config.heads.kv_heads = size_or("num_key_value_heads", mistral ? 8 : qwen2 ? 32 : config.heads.heads);
    config.heads.head_dim = size_or("head_dim", config.width / config.heads.heads);
    config.context = size_or("max_position_embeddings", mistral ? 131072 : qwen2 ? 32768 : 2048);
    if (mistral) {
      const Index none = json.contains("sliding_window") ? config.context : 4096;  // null: no window
      config.context = std::min(config.context, size_or("sliding_window", none));
    }
    if (qwen2) expect_flag("use_sliding_window", false, false);
    config.norm_epsilon = epsilon("rms_norm_eps", 1e-6);
    config.tied_head = flag("tie_word_embeddings", false);
    config.rope_base = rope_base();
    expect_name(json, "hidden_act", "silu", "silu");
    return config;
  }

  /// `type` is falcon, or what the first releases had in its place, under other keys and defaults: RefinedWebModel (7B), RefinedWeb (40B).
  DecoderConfig falcon(const std::string& type) const {
    const bool first = type != "falcon";
    const char* const heads_key = first ? "n_head" : "num_attention_heads";
    const char* const kv_heads_key = first ? "n_head_kv" : "num_kv_heads";
    DecoderConfig config;
    config.architecture = Architecture::falcon;
    config.vocab = size("vocab_size");
    config.width = size("hidden_size");
    config.mlp_width = size_or("ffn_hidden_size", 4 * config.width);
    config.layers = size(first ? "n_layer" : "num_hidden_layers");
    config.context = size_or("max_position_embeddings", 2048);
    config.norm_epsilon = epsilon("layer_norm_epsilon", 1e-5);
    config.tied_head = flag("tie_word_embeddings", true);
    config.rope_base = rope_base();
    expect_name(json, "activation", "gelu", "gelu");
    expect_flag("alibi", false, false);
    expect_flag("parallel_attn", true, !first);
    expect_flag("apply_residual_connection_post_layernorm", false, false);

    const Index heads = config.heads.heads = size(heads_key);
    if (config.width % heads != 0)
      refuse(Errc::bad_config, "hidden_size", "a multiple of " + std::string(heads_key) + " = " + std::to_string(heads),
             std::to_string(config.width));
    config.heads.head_dim = config.width / heads;
    const bool grouped = first ? type == "RefinedWeb" : flag("new_decoder_architecture", false);
    const bool multi_query = flag("multi_query", !first);
    const Index kv_heads = size_or(kv_heads_key, heads);
    if (!grouped && !multi_query && kv_heads != heads)
      refuse(Errc::bad_config, kv_heads_key, std::to_string(heads) + ", one for each head", std::to_string(kv_heads));
    config.heads.kv_heads = grouped || !multi_query ? kv_heads : 1;
    const Index norms = size_or("num_ln_in_parallel_attn", grouped ? 2 : 1);
    if (norms > (grouped ? 2 : 1))
      refuse(Errc::unsupported, "num_ln_in_parallel_attn", grouped ? "1 or 2" : "1 without new_decoder_architecture",
             std::to_string(norms));
    config.shared_norm = norms == 1;
    return config;
  }
};

/// What config.json says of a model: its shape, and of how many of a block's first linear layers there must be biases. Those of others are
/// optional.
struct HuggingFaceModel {
  DecoderConfig config;
  std::size_t biased_linears = 0;
};
inline HuggingFaceModel read_hugging_face_config(const std::filesystem::path& config_file) {
  const HuggingFaceConfig file{read_json(config_file), {.file = config_file.string()}};
  const auto type = get_string(file.json, "model_type", file.place);
  HuggingFaceModel model;
  if (type == "llama" || type == "mistral" || type == "qwen2") {
    model.config = file.llama(type);
    model.biased_linears = type == "qwen2" ? 3 : file.flag("attention_bias", false) ? 4 : 0;  // q, k, v; and o
  } else if (type == "falcon" || type == "RefinedWeb" || type == "RefinedWebModel") {
    model.config = file.falcon(type);
    model.biased_linears = file.flag("bias", false) ? 4 : 0;  // all
  } else {
    file.refuse(Errc::unsupported, "model_type", "'llama', 'mistral', 'qwen2' or 'falcon'", "'" + printable(type) + "'");
  }
  try {
    model.config.validate();
  } catch (const Error& error) {
    throw Error(error.code(), error.what(), file.place);
  }
  return model;
}

}  // namespace detail

/// The shape config.json states. Errors: unsupported (another architecture, activation or kind of positions), bad_config.
inline DecoderConfig hugging_face_config(const std::filesystem::path& config_file) {
  return detail::read_hugging_face_config(config_file).config;
}

}  // namespace qdylora
