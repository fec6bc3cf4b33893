// ModelShape: a decoder as memory sees it, which <qdylora/model/memory_plan.hpp> counts.
#pragma once

#include <algorithm>
#include <vector>

#include <qdylora/model/config.hpp>
#include <qdylora/nn/adapter_method.hpp>

namespace qdylora {

/// A decoder as memory sees it. Widths are numbers a token.
struct ModelShape {
  Index vocab = 0, width = 0, layers = 0;
  Index tables = 1;                  // [vocab, width]: the embedding, and a head of its own
  std::vector<LinearShape> linears;  // of a block
  std::vector<LinearShape> adapted;  // what a block's adapters sit on: the linears, or bottlenecks; by alpha and full there are none
  bool whole = false;                // by AdapterMethod::full all weights train
  Index norms = 0, biases = 0;       // numbers in a block's norms and biases
  Index final_norms = 0;             // and after the last block
  Index statistics = 1;              // numbers that a norm keeps of a token
  Index query_width = 0;             // of the queries of all heads
  Index kv_width = 0;                // of keys, and of values
  Index head_dim = 0;                // of rotary positions
  // What a block keeps of a forward pass for its backward pass, beside its input and the adapters' z: activations, and numbers of the
  // accumulator's type.
  Index kept = 0, kept_accumulators = 0;
  Index forward_products = 1;  // [tokens, rank] that an adapter's forward pass takes and gives back
  // Temporaries of one block, which all blocks share: those that a forward pass needs, and those that only a backward pass needs.
  Index forward_temporaries = 0, backward_temporaries = 0;

  Index linear_weights() const noexcept {
    Index sum = 0;
    for (const auto& linear : linears) sum += linear.out * linear.in;
    return layers * sum;
  }
  Index outputs() const noexcept {
    Index sum = 0;
    for (const auto& linear : linears) sum += linear.out;
    return sum;
  }
  /// Numbers in adapters of a rank.
  Index adapter_numbers(Index rank) const noexcept {
    Index sum = 0;
    for (const auto& linear : adapted) sum += rank * (linear.out + linear.in);
    return layers * sum;
  }
};

/// BlockContext and BlockWorkspace as LlamaBlock and FalconBlock fill them, as widths.
inline ModelShape model_shape(const DecoderConfig& c, AdapterMethod method = AdapterMethod::lora) {
  const Index q = c.query_width(), kv = c.kv_width();
  ModelShape s;
  s.vocab = c.vocab;
  s.width = c.width;
  s.layers = c.layers;
  s.tables = c.tied_head ? 1 : 2;
  s.linears = c.linears();
  if (has_ranks(method)) s.adapted = c.adapted(method);
  s.whole = method == AdapterMethod::full;
  s.query_width = q;
  s.kv_width = kv;
  s.head_dim = c.heads.head_dim;
  const bool falcon = c.architecture == Architecture::falcon;
  const Index norms = c.shared_norm ? 1 : 2, per_norm = falcon ? 2 * c.width : c.width;  // weight, and a layer norm's bias
  s.norms = norms * per_norm;
  s.final_norms = per_norm;
  s.statistics = falcon ? 2 : 1;
  s.kept_accumulators = norms * s.statistics + c.heads.heads;                // the norms' statistics; lse
  s.backward_temporaries = std::max(q, c.mlp_width) + c.width + q + 2 * kv;  // d_wide; d_normed; dq; dk, dv
  if (falcon) {
    s.kept = 2 * q + 2 * kv + c.mlp_width;                           // q, attended; k, v; up
    s.forward_temporaries = 2 * c.width + c.mlp_width + q + 2 * kv;  // normed, part; activated; fused
  } else {
    s.kept = 2 * q + 2 * kv + c.width + 2 * c.mlp_width;  // q, attended; k, v; mid; gate, up
    s.forward_temporaries = c.width + c.mlp_width;        // normed, activated
    s.backward_temporaries += c.width;                    // part
  }
  if (method == AdapterMethod::houlsby) s.kept += 2 * c.width;  // projected
  if (has_bottlenecks(method)) s.forward_products = 2;          // gelu(z); h
  return s;
}

}  // namespace qdylora
