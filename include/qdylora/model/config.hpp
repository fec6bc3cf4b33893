// The shape of a decoder-only transformer with causal grouped-query attention and rotary positions, of one of two architectures.
#pragma once

#include <string>
#include <string_view>
#include <vector>

#include <qdylora/backend.hpp>
#include <qdylora/nn/adapter_method.hpp>

namespace qdylora {

/// llama (Touvron et al. 2023): RMS norms, separate q, k and v, then a SwiGLU multilayer perceptron on the sum; model/llama_block.hpp.
/// falcon (Almazrouei et al. 2023): layer norms, q, k and v in one projection, beside it a GELU perceptron; model/falcon_block.hpp.
enum class Architecture { llama, falcon };

/// A linear layer of a block: its name within the block, as Hugging Face's checkpoints have it, and its weight's [out, in].
struct LinearShape {
  std::string_view name;
  Index out = 0;
  Index in = 0;
};

/// Modules of a model that are no linear layers, as Hugging Face's checkpoints have them; the last two are within a block.
struct ModuleNames {
  std::string embedding, head, final_norm, attention_norm, mlp_norm;
};

/// Rows of logits in memory at a time, at most. Each chunk decodes the head twice, forward and backward; a device multiplies so fast that
/// with 96 rows it would hardly do anything else.
constexpr Index head_chunk(bool device) noexcept { return device ? 512 : 96; }
/// Their rows lie further apart than they are long: rows a multiple of 4 KiB apart would crowd into few sets of a cache.
constexpr Index logits_stride(Index vocab) noexcept { return vocab + 16; }

struct DecoderConfig {
  Architecture architecture = Architecture::llama;
  Index vocab = 0;  // rows of the embedding
  Index width = 0;  // features of the residual stream
  Index mlp_width = 0;
  Index layers = 0;
  HeadShape heads;    // heads * head_dim need not equal width
  Index context = 0;  // longest sequence
  double rope_base = 10000.0;
  RopeLayout rope_layout = RopeLayout::half_split;
  float norm_epsilon = 1e-5f;
  bool shared_norm = false;  // falcon: attention and perceptron read one norm of the stream, else each its own
  bool tied_head = true;     // logits use the embedding

  Index query_width() const noexcept { return heads.heads * heads.head_dim; }
  Index kv_width() const noexcept { return heads.kv_heads * heads.head_dim; }

  /// The linear layers of a block, in the order of all lists of them.
  std::vector<LinearShape> linears() const {
    const Index q = query_width(), kv = kv_width();
    if (architecture == Architecture::falcon)
      return {{"self_attention.query_key_value", q + 2 * kv, width},
              {"self_attention.dense", width, q},
              {"mlp.dense_h_to_4h", mlp_width, width},
              {"mlp.dense_4h_to_h", width, mlp_width}};
    return {{"self_attn.q_proj", q, width},     {"self_attn.k_proj", kv, width},     {"self_attn.v_proj", kv, width},
            {"self_attn.o_proj", width, q},     {"mlp.gate_proj", mlp_width, width}, {"mlp.up_proj", mlp_width, width},
            {"mlp.down_proj", width, mlp_width}};
  }
  /// What a block's adapters sit on, in the order of all lists of them: its linear layers, or bottlenecks of the residual stream.
  std::vector<LinearShape> adapted(AdapterMethod method) const {
    switch (method) {
      case AdapterMethod::lora:
      case AdapterMethod::alpha:
      case AdapterMethod::full: break;
      case AdapterMethod::houlsby: return {{"attention_adapter", width, width}, {"mlp_adapter", width, width}};
      case AdapterMethod::parallel: return {{"mlp_adapter", width, width}};
    }
    return linears();
  }
  /// Hugging Face's checkpoints and PEFT's adapters name a layer "<block_names><index>.<name within the block>".
  std::string_view block_names() const noexcept { return architecture == Architecture::falcon ? "transformer.h." : "model.layers."; }
  std::string block_name(Index index) const { return std::string(block_names()) + std::to_string(index) + "."; }
  ModuleNames module_names() const {
    if (architecture == Architecture::llama)
      return {"model.embed_tokens", "lm_head", "model.norm", "input_layernorm", "post_attention_layernorm"};
    return {"transformer.word_embeddings", "lm_head", "transformer.ln_f", shared_norm ? "input_layernorm" : "ln_attn",
            shared_norm ? "" : "ln_mlp"};
  }
  /// Of every linear layer, block by block.
  std::vector<std::string> linear_names() const {
    std::vector<std::string> names;
    for (Index i = 0; i < layers; ++i)
      for (const auto& linear : linears()) names.push_back(block_name(i) + std::string(linear.name));
    return names;
  }
  /// Linear weights of the blocks, which are the ones that are quantized.
  Index linear_weights() const {
    Index sum = 0;
    for (const auto& linear : linears()) sum += linear.out * linear.in;
    return layers * sum;
  }

  /// Throws Errc::bad_config naming the first field that makes no model.
  void validate() const {
    const auto positive = [](const char* field, Index value, Index limit) {
      QDYLORA_EXPECTS(value >= 1 && value <= limit, bad_config,
                      std::string(field) + ": expected 1 ... " + std::to_string(limit) + ", found " + std::to_string(value));
    };
    positive("vocabulary", vocab, Index{1} << 22);
    positive("width", width, Index{1} << 20);
    positive("mlp width", mlp_width, Index{1} << 22);
    positive("layers", layers, 4096);
    positive("heads", heads.heads, 4096);
    positive("key-value heads", heads.kv_heads, heads.heads);
    positive("head dimension", heads.head_dim, 4096);
    positive("context", context, Index{1} << 24);
    QDYLORA_EXPECTS(heads.heads % heads.kv_heads == 0, bad_config,
                    std::to_string(heads.heads) + " heads cannot share " + std::to_string(heads.kv_heads) + " key-value heads");
    QDYLORA_EXPECTS(heads.head_dim % 2 == 0, bad_config,
                    "head dimension: rotary positions need an even number, found " + std::to_string(heads.head_dim));
    QDYLORA_EXPECTS(rope_base > 0.0 && rope_base < 1e12, bad_config, "rope base: found " + std::to_string(rope_base));
    QDYLORA_EXPECTS(norm_epsilon >= 0.0f && norm_epsilon < 1.0f, bad_config, "norm epsilon: found " + std::to_string(norm_epsilon));
    QDYLORA_EXPECTS(!shared_norm || architecture == Architecture::falcon, bad_config, "shared norm: only a Falcon has one");
  }
};

}  // namespace qdylora
