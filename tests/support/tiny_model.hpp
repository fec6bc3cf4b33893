// A random decoder small enough to differentiate number by number, and what tests of models share: texts, adapters that are not
// zero, parameters as one row of numbers.
#pragma once

#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/model/base_weight.hpp>
#include <qdylora/model/decoder.hpp>

#include "support/random_data.hpp"

namespace test {

/// Grouped queries whose heads together are wider than the model, and an odd width of the perceptron.
inline qdylora::DecoderConfig tiny_config() {
  qdylora::DecoderConfig config;
  config.vocab = 17;
  config.width = 12;
  config.mlp_width = 13;
  config.layers = 2;
  config.heads = {.heads = 4, .kv_heads = 2, .head_dim = 4};
  config.context = 32;
  return config;
}

/// A Falcon of grouped queries, with a norm for attention and one for the perceptron (40B's kind), and, with one group, of 7B's.
inline qdylora::DecoderConfig tiny_falcon_config(Index kv_heads = 2) {
  auto config = tiny_config();
  config.architecture = qdylora::Architecture::falcon;
  config.heads.kv_heads = kv_heads;
  config.shared_norm = kv_heads == 1;
  return config;
}

/// One of each kind of block.
inline std::vector<qdylora::DecoderConfig> tiny_configs() { return {tiny_config(), tiny_falcon_config(1), tiny_falcon_config(2)}; }

/// Wide enough that work is shared out among threads; its rows are no multiple of a block of 64.
inline qdylora::DecoderConfig small_config() {
  qdylora::DecoderConfig config;
  config.vocab = 257;
  config.width = 96;
  config.mlp_width = 200;
  config.layers = 2;
  config.heads = {.heads = 6, .kv_heads = 3, .head_dim = 16};
  config.context = 64;
  return config;
}

/// Rows and columns of a block's linear weights, in the order of DecoderConfig::linears.
inline std::vector<std::pair<Index, Index>> linear_shapes(const qdylora::DecoderConfig& c) {
  if (c.architecture == qdylora::Architecture::falcon)
    return {{c.query_width() + 2 * c.kv_width(), c.width}, {c.width, c.query_width()}, {c.mlp_width, c.width}, {c.width, c.mlp_width}};
  return {{c.query_width(), c.width}, {c.kv_width(), c.width}, {c.kv_width(), c.width}, {c.width, c.query_width()},
          {c.mlp_width, c.width},     {c.mlp_width, c.width},  {c.width, c.mlp_width}};
}

/// The dense matrix of a linear weight before it is stored.
inline const Matrix<float> tiny_linear(const qdylora::DecoderConfig& config, Index layer, std::size_t projection) {
  const auto [rows, cols] = linear_shapes(config)[projection];
  return normal_matrix<float>(rows, cols, 100 + 10 * static_cast<std::uint64_t>(layer) + projection,
                              1.0 / std::sqrt(static_cast<double>(cols)));
}

/// A norm of the architecture's kind.
template <class Acc>
qdylora::NormWeights<Acc> tiny_norm(const qdylora::DecoderConfig& config, std::uint64_t seed) {
  Matrix<Acc> weight = qdylora::clone(normal_matrix<Acc>(1, config.width, seed, 0.1).view());
  for (Acc& x : weight.span()) x += Acc{1};
  if (config.architecture == qdylora::Architecture::llama) return qdylora::NormWeights<Acc>(std::move(weight));
  return {std::move(weight), qdylora::clone(normal_matrix<Acc>(1, config.width, seed + 1000, 0.2).view())};
}

/// The random frozen weights of a shape; linear weights are stored as `options` says.
template <class Acc>
std::shared_ptr<qdylora::DecoderWeights<Acc>> tiny_weights(
    const qdylora::DecoderConfig& config, bool biases = false,
    qdylora::BaseOptions options = {.format = qdylora::BaseFormat::float32, .double_quant = true, .block_size = 64}) {
  auto weights = std::make_shared<qdylora::DecoderWeights<Acc>>();
  weights->config = config;
  weights->embedding = qdylora::clone(normal_matrix<Acc>(config.vocab, config.width, 1, 0.7).view());
  if (!config.tied_head) weights->head = qdylora::clone(normal_matrix<Acc>(config.vocab, config.width, 2, 0.7).view());
  weights->final_norm = tiny_norm<Acc>(config, 3);
  for (Index layer = 0; layer < config.layers; ++layer) {
    auto block = std::make_shared<qdylora::BlockWeights<Acc>>(config);
    const auto seed = 10 * static_cast<std::uint64_t>(layer);
    block->attention_norm = tiny_norm<Acc>(config, 4 + seed);
    if (!config.shared_norm) block->mlp_norm = tiny_norm<Acc>(config, 5 + seed);
    for (std::size_t p = 0; p < block->linear.size(); ++p) {
      const Matrix<float> dense = qdylora::clone(tiny_linear(config, layer, p).view());
      const auto read = [&](Index first, MatrixView<float> out) { qdylora::copy(dense.view().middle_rows(first, out.rows), out); };
      if (options.binary) block->codes[p] = qdylora::make_binary_weight(dense.rows(), dense.cols(), *options.binary, read, qdylora::Cpu{});
      else block->linear[p] = qdylora::make_base_weight(dense.rows(), dense.cols(), options, read, qdylora::Cpu{});
      if (biases) block->bias[p] = qdylora::clone(normal_matrix<Acc>(1, dense.rows(), 50 + seed + p, 0.3).view());
    }
    weights->blocks.push_back(std::move(block));
  }
  return weights;
}

/// Every A, B and gate of a model, in a fixed order.
template <class Model>
auto all_parameters(Model& model) {
  auto all = model.parameters();
  model.for_each_trained([&](auto& linear) {
    for (auto& p : linear.adapter().gate_parameters()) all.push_back(p);
  });
  return all;
}

/// Makes every B and gate random: a fresh adapter, whose B is zero, has no gradient in A.
template <class Model>
void randomize_adapters(Model& model, double deviation = 0.3) {
  Rng rng(77, qdylora::Purpose::data);
  model.for_each_trained([&](auto& linear) {
    fill_normal(linear.adapter().b().value.view(), rng, deviation);
    if (linear.adapter().gated())
      for (auto& gate : linear.adapter().gates().value.span()) gate = static_cast<typename Model::Acc>(1.0f + 0.2f * rng.normal());
  });
}

template <class Model>
void zero_gradients(Model& model) {
  for (const auto& p : all_parameters(model)) {
    for (auto& g : p->gradient.span()) g = 0;
    p->touched.assign(p->touched.size(), false);
  }
}

template <class Model>
auto gradients(Model& model) {
  std::vector<typename Model::Acc> all;
  for (const auto& p : all_parameters(model)) all.insert(all.end(), p->gradient.span().begin(), p->gradient.span().end());
  return all;
}

template <class Model>
auto values(Model& model) {
  std::vector<typename Model::Acc> all;
  for (const auto& p : all_parameters(model)) all.insert(all.end(), p->value.span().begin(), p->value.span().end());
  return all;
}

inline double sum_of(const std::vector<double>& losses) { return std::accumulate(losses.begin(), losses.end(), 0.0); }

inline std::vector<std::int32_t> random_ids(Index vocab, Index count, std::uint64_t seed) {
  Rng rng(seed, qdylora::Purpose::data);
  std::vector<std::int32_t> ids;
  for (Index i = 0; i < count; ++i) ids.push_back(static_cast<std::int32_t>(rng.below(static_cast<std::uint64_t>(vocab))));
  return ids;
}

/// Random texts of so many tokens each; the first `prompt` tokens of each are not scored.
inline qdylora::Batch random_batch(Index vocab, const std::vector<Index>& lengths, std::uint64_t seed, Index prompt = 0) {
  qdylora::Batch batch;
  for (const Index length : lengths) batch.add(random_ids(vocab, length, seed++), prompt);
  return batch;
}

/// Texts that can be learnt: every token is the one before plus the text's stride, 1 or 2.
inline qdylora::Batch counting_batch(Index vocab, Index sequences, Index length, std::uint64_t seed) {
  Rng rng(seed, qdylora::Purpose::data);
  qdylora::Batch batch;
  for (Index s = 0; s < sequences; ++s) {
    const auto start = static_cast<Index>(rng.below(static_cast<std::uint64_t>(vocab)));
    const auto stride = 1 + static_cast<Index>(rng.below(2));
    std::vector<std::int32_t> text;
    for (Index t = 0; t < length; ++t) text.push_back(static_cast<std::int32_t>((start + t * stride) % vocab));
    batch.add(text, 2);
  }
  return batch;
}

}  // namespace test
