// Files of llama2.c, written by the test: a checkpoint and a tokenizer (examples/common/llama2c.hpp has their formats).
#pragma once

#include <cstdint>
#include <cstdio>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/model/decoder.hpp>

#include "support/files.hpp"

namespace test {

using qdylora::Index;

/// A checkpoint of dense weights, whose heads are as wide as the model.
inline Bytes llama2c_checkpoint(const qdylora::DecoderWeights<float>& w) {
  const auto& c = w.config;
  Bytes bytes;
  for (const Index field : {c.width, c.mlp_width, c.layers, c.heads.heads, c.heads.kv_heads, c.tied_head ? c.vocab : -c.vocab, c.context})
    bytes.number(static_cast<std::int32_t>(field));
  const auto matrix = [&](const qdylora::Matrix<float>& m) {
    for (const float x : m.span()) bytes.number(x);
  };
  const auto linears = [&](std::size_t p) {
    for (const auto& block : w.blocks) matrix(std::get<qdylora::Matrix<float>>(block->linear[p]->storage()));
  };
  matrix(w.embedding.get<qdylora::Matrix<float>>());
  for (const auto& block : w.blocks) matrix(block->attention_norm.weight);
  for (std::size_t p = 0; p < 4; ++p) linears(p);
  for (const auto& block : w.blocks) matrix(block->mlp_norm.weight);
  for (const auto p : {qdylora::Projection::gate, qdylora::Projection::down, qdylora::Projection::up}) linears(static_cast<std::size_t>(p));
  matrix(w.final_norm.weight);
  for (Index i = 0; i < c.context * c.heads.head_dim; ++i) bytes.number(7.0f);  // never used
  matrix(w.head.get<qdylora::Matrix<float>>());
  return bytes;
}

/// Unknown, begin and end, the bytes, and these.
inline Bytes llama2c_tokenizer(const std::vector<std::pair<std::string, float>>& more, std::int32_t longest = 6) {
  Bytes bytes;
  bytes.number(longest);
  const auto token = [&](std::string_view text, float score) {
    bytes.number(score).number(static_cast<std::int32_t>(text.size())).raw(text);
  };
  for (const char* special : {"<unk>", "<s>", "</s>"}) token(special, 0.0f);
  for (int byte = 0; byte < 256; ++byte) {
    char text[8];
    std::snprintf(text, sizeof(text), "<0x%02X>", byte);
    token(text, 0.0f);
  }
  for (const auto& [text, score] : more) token(text, score);
  return bytes;
}

}  // namespace test
