// Decoder weights from a GGUF file of architecture "llama" (Llama, SmolLM2 and other models of that shape). Rows of q and k are stored for
// interleaved rotary positions and used so.
#pragma once

#include <array>
#include <cmath>
#include <cstring>
#include <memory>
#include <string>
#include <utility>

#include <qdylora/io/gguf.hpp>
#include <qdylora/model/decoder.hpp>
#include <qdylora/model/initial_weight.hpp>

namespace qdylora {

/// The model's shape. Errors: unsupported (another architecture, scaled rotary positions), bad_config.
inline DecoderConfig gguf_config(const GgufFile& file) {
  const auto& metadata = file.metadata();
  const auto architecture = metadata.get<std::string>("general.architecture");
  if (architecture != "llama")
    throw Error(Errc::unsupported, "general.architecture: expected 'llama', found '" + printable(architecture) + "'",
                {.file = file.name()});
  const auto number = [&](const char* key) { return static_cast<Index>(metadata.get<std::uint32_t>(std::string("llama.") + key)); };
  if (const auto scaling = metadata.get_or<std::string>("llama.rope.scaling.type", "none"); scaling != "none")
    throw Error(Errc::unsupported, "llama.rope.scaling.type: expected 'none', found '" + printable(scaling) + "'", {.file = file.name()});
  // Llama 3.1 and later store the scaling of their rotary positions as a tensor.
  if (file.contains("rope_freqs.weight"))
    throw Error(Errc::unsupported, "scaled rotary positions", {.file = file.name(), .tensor = "rope_freqs.weight"});
  DecoderConfig config;
  config.width = number("embedding_length");
  config.mlp_width = number("feed_forward_length");
  config.layers = number("block_count");
  config.context = number("context_length");
  config.heads.heads = number("attention.head_count");
  config.heads.kv_heads = static_cast<Index>(
      metadata.get_or<std::uint32_t>("llama.attention.head_count_kv", static_cast<std::uint32_t>(config.heads.heads)));
  const Index head_dim = config.heads.heads > 0 ? config.width / config.heads.heads : 0;
  config.heads.head_dim =
      static_cast<Index>(metadata.get_or<std::uint32_t>("llama.rope.dimension_count", static_cast<std::uint32_t>(head_dim)));
  config.rope_base = static_cast<double>(metadata.get_or<float>("llama.rope.freq_base", 10000.0f));
  config.rope_layout = RopeLayout::interleaved;
  config.norm_epsilon = metadata.get<float>("llama.attention.layer_norm_rms_epsilon");
  const auto& embedding = file.info("token_embd.weight");
  config.vocab = embedding.shape.empty() ? 0 : embedding.shape.front();
  config.tied_head = !file.contains("output.weight");
  try {
    config.validate();
  } catch (const Error& error) {
    throw Error(error.code(), error.what(), {.file = file.name()});
  }
  return config;
}

namespace detail {

inline void expect_matrix(const GgufFile& file, const std::string& tensor, Index rows, Index cols) {
  if (const auto& shape = file.info(tensor).shape; shape != std::vector<Index>{rows, cols})
    throw Error(Errc::shape_mismatch, "expected " + shape_text(rows, cols) + ", found " + shape_text(shape),
                {.file = file.name(), .tensor = tensor});
}

/// A matrix of type Q8_0 as it is: x = d q becomes (q / 127) (127 d), and 127 d needs no rounding.
inline QuantizedTensor<INT8, Float32Scales> q8_0_table(const GgufFile& file, const std::string& tensor, Index rows, Index cols) {
  expect_matrix(file, tensor, rows, cols);
  const Index count = rows * cols / BlockQ8_0::elements;
  Buffer<BlockQ8_0> blocks(count);
  file.read(tensor, std::as_writable_bytes(blocks.span()));
  Buffer<std::uint8_t> codes(rows * cols);
  Float32Scales::Storage<HostMemory> scales{Buffer<float>(count)};
  for (Index i = 0; i < count; ++i) {
    std::memcpy(codes.data() + i * BlockQ8_0::elements, blocks[i].codes, sizeof(blocks[i].codes));
    scales.absmax[i] = 127.0f * static_cast<float>(blocks[i].d);
    if (!std::isfinite(scales.absmax[i]))
      throw Error(Errc::non_finite, "the scale of block " + std::to_string(i) + " is not finite", {.file = file.name(), .tensor = tensor});
  }
  return {rows, cols, BlockQ8_0::elements, std::move(codes), std::move(scales)};
}

}  // namespace detail

/// Reads a model. The linear weights of the blocks are stored as `options` says while they are read; embedding and head stay in 8 bits where
/// the file has them so.
/// Errors: those of gguf_config, missing_tensor, unexpected_tensor (a block beyond the count), shape_mismatch, unsupported tensor types,
/// non_finite weights.
template <class Backend = Cpu>
std::shared_ptr<DecoderWeights<float>> load_gguf(const GgufFile& file, BaseOptions options = {}, Backend backend = {}) {
  auto weights = std::make_shared<DecoderWeights<float>>();
  const auto config = weights->config = gguf_config(file);
  for (const auto& tensor : file.tensors()) expect_within_layers(file.name(), tensor.name, "blk.", config.layers, "llama.block_count");
  const auto dense = [&](const std::string& tensor, Index rows, Index cols) {
    return checked_weight(file.matrix(tensor), rows, cols, file.name(), tensor);
  };
  const auto linear = [&](BlockWeights<float>& block, Index index, std::size_t p, const std::string& tensor, Index rows, Index cols) {
    detail::expect_matrix(file, tensor, rows, cols);
    at_tensor(file.name(), tensor, [&] {
      read_linear(
          block, index, p, rows, cols, options,
          [&](Index first, MatrixView<float> out) {  // decoding is the slow part of reading: share it out
            constexpr Index grain = 64;
            backend.parallel_for(detail::div_up(out.rows, grain), [&](Index task) {
              const Index begin = task * grain;
              file.read_rows(tensor, first + begin, out.middle_rows(begin, std::min(grain, out.rows - begin)));
            });
          },
          backend);
    });
  };
  const auto table = [&](const std::string& tensor) -> TableWeight<float> {
    if (file.info(tensor).type->name == "Q8_0") return detail::q8_0_table(file, tensor, config.vocab, config.width);
    return dense(tensor, config.vocab, config.width);
  };
  weights->embedding = table("token_embd.weight");
  if (!config.tied_head) weights->head = table("output.weight");
  weights->final_norm = dense("output_norm.weight", 1, config.width);
  constexpr std::array<const char*, 7> names = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"};
  const auto shapes = config.linears();
  for (Index i = 0; i < config.layers; ++i) {
    const std::string prefix = "blk." + std::to_string(i) + ".";
    auto block = std::make_shared<BlockWeights<float>>(config);
    block->attention_norm = dense(prefix + "attn_norm.weight", 1, config.width);
    block->mlp_norm = dense(prefix + "ffn_norm.weight", 1, config.width);
    for (std::size_t p = 0; p < shapes.size(); ++p) {
      linear(*block, i, p, prefix + names[p] + ".weight", shapes[p].out, shapes[p].in);
      if (const auto bias = prefix + names[p] + ".bias"; file.contains(bias)) block->bias[p] = dense(bias, 1, shapes[p].out);
    }
    weights->blocks.push_back(std::move(block));
  }
  return weights;
}

}  // namespace qdylora
