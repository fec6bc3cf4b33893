// The shape of a decoder-only transformer, Llama's kind (Touvron et al. 2023): pre-norm blocks of causal grouped-query attention with
// rotary positions and a SwiGLU multilayer perceptron, RMS norms, no biases unless a file has them.
#pragma once

#include <array>
#include <string>
#include <utility>

#include <qdylora/backend.hpp>

namespace qdylora {

struct DecoderConfig {
  Index vocab = 0;      // rows of the embedding
  Index width = 0;      // features of the residual stream
  Index mlp_width = 0;
  Index layers = 0;
  HeadShape heads;      // heads * head_dim need not equal width
  Index context = 0;    // longest sequence
  double rope_base = 10000.0;
  RopeLayout rope_layout = RopeLayout::half_split;
  float norm_epsilon = 1e-5f;
  bool tied_head = true;  // logits use the embedding

  Index query_width() const noexcept { return heads.heads * heads.head_dim; }
  Index kv_width() const noexcept { return heads.kv_heads * heads.head_dim; }
  /// [out, in] of a block's linear layers q, k, v, o, gate, up, down.
  std::array<std::pair<Index, Index>, 7> linear_shapes() const noexcept {
    const Index q = query_width(), kv = kv_width();
    return {{{q, width}, {kv, width}, {kv, width}, {width, q}, {mlp_width, width}, {mlp_width, width}, {width, mlp_width}}};
  }
  /// Linear weights of the blocks, which are the ones that are quantized.
  Index linear_weights() const noexcept {
    return layers * (width * (query_width() + 2 * kv_width()) + query_width() * width + 3 * width * mlp_width);
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
  }
};

}  // namespace qdylora
