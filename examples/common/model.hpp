// The models the programs work on: a GGUF file, a Hugging Face folder, or a toy made on the spot.
#pragma once

#include <filesystem>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/io/peft.hpp>
#include <qdylora/model.hpp>

#include "text.hpp"

namespace qdylora::examples {

struct OpenModel {
  std::string name;
  std::shared_ptr<const DecoderWeights<float>> weights;
  std::optional<Tokenizer> tokenizer;
  bool chat = false;  // whether prompts go through the chat template

  /// Errc::unsupported where the model has no tokenizer.
  const Tokenizer& need_tokenizer() const {
    QDYLORA_EXPECTS(tokenizer.has_value(), unsupported,
                    name + ": the folder has no tokenizer.json; give --tokenizer, a .gguf file or a folder that has one");
    return *tokenizer;
  }
};

/// Throws Errc::bad_argument where sequences of --seq-len tokens, whose last is no input, do not fit the model.
inline void expect_seq_len(Index seq_len, const DecoderConfig& config) {
  QDYLORA_EXPECTS(seq_len <= config.context + 1, bad_argument,
                  "--seq-len " + std::to_string(seq_len) + ": the model's context is " + std::to_string(config.context));
}

/// Throws Errc::rank_range above the model's width: one side of every linear layer, so no update has a higher rank.
inline void expect_ranks(const RankSet& ranks, const DecoderConfig& config) {
  QDYLORA_EXPECTS(ranks.max() <= config.width, rank_range,
                  "--ranks: " + std::to_string(ranks.max()) + " is above the model's width of " + std::to_string(config.width));
}

/// Throws Errc::bad_config for a tokenizer of more tokens than the model knows.
inline void expect_vocabulary(Index tokens, const DecoderConfig& config, const std::string& file) {
  if (tokens > config.vocab)
    throw Error(Errc::bad_config,
                "a tokenizer of " + std::to_string(tokens) + " tokens does not fit a model of " + std::to_string(config.vocab),
                {.file = file});
}

/// The tokenizer of a .gguf file or of a Hugging Face folder.
inline Tokenizer open_tokenizer(const std::filesystem::path& path) {
  return std::filesystem::is_directory(path) ? load_tokenizer_json(path) : load_tokenizer(GgufFile(path));
}

/// Opens a .gguf file or a Hugging Face folder; `tokenizer_file` is another one whose tokenizer is used instead, "" for none.
inline OpenModel open_model(const std::filesystem::path& path, const std::string& tokenizer_file, BaseOptions options, const Cpu& cpu) {
  OpenModel model;
  model.name = printable_utf8((path.has_filename() ? path : path.parent_path()).filename().string());
  if (!std::filesystem::exists(path)) throw Error(Errc::open, "no such file or folder", {.file = path.string()});
  if (!tokenizer_file.empty()) model.tokenizer = open_tokenizer(tokenizer_file);
  if (std::filesystem::is_directory(path)) {
    if (tokenizer_file.empty() && std::filesystem::exists(path / "tokenizer.json")) model.tokenizer = open_tokenizer(path);
    model.weights = load_hugging_face(path, options, cpu);
  } else {
    const GgufFile file(path);
    model.weights = load_gguf(file, options, cpu);
    if (tokenizer_file.empty()) model.tokenizer = load_tokenizer(file);
  }
  if (model.tokenizer) {
    expect_vocabulary(model.tokenizer->vocab_size(), model.weights->config, tokenizer_file.empty() ? path.string() : tokenizer_file);
    model.chat = model.tokenizer->id("<|im_start|>").has_value();
  }
  return model;
}

/// A small transformer with random weights over single bytes. Its adapters have as many rows as it has features, so they can learn what a
/// base never knew.
inline OpenModel toy_model(BaseOptions options, const Cpu& cpu, std::uint64_t seed = 1) {
  OpenModel model;
  model.name = "toy";
  TokenizerData data;
  for (const char32_t letter : qdylora::detail::byte_alphabet) {
    data.tokens.emplace_back();
    append_utf8(data.tokens.back(), letter);
    data.token_types.push_back(1);
  }
  data.tokens.push_back("<|end|>");
  data.token_types.push_back(3);
  data.pre_tokenizer = "gpt-2";
  data.eos = 256;
  model.tokenizer = Tokenizer(std::move(data));

  auto weights = std::make_shared<DecoderWeights<float>>();
  auto& c = weights->config;
  c.vocab = 257;
  c.width = 64;
  c.mlp_width = 192;
  c.layers = 3;
  c.heads = {4, 2, 16};
  c.context = 512;
  c.rope_layout = RopeLayout::interleaved;
  Rng rng(seed, Purpose::init);
  const auto normal = [&](Index rows, Index cols, float deviation) {
    Matrix<float> m(rows, cols);
    for (float& x : m.span()) x = deviation * rng.normal();
    return m;
  };
  const auto ones = [](Index cols) {
    Matrix<float> m(1, cols);
    for (float& x : m.span()) x = 1.0f;
    return m;
  };
  weights->embedding = normal(c.vocab, c.width, 0.3f);
  weights->final_norm = ones(c.width);
  const auto shapes = c.linear_shapes();
  for (Index i = 0; i < c.layers; ++i) {
    auto block = std::make_shared<BlockWeights<float>>();
    block->attention_norm = ones(c.width);
    block->mlp_norm = ones(c.width);
    for (std::size_t p = 0; p < 7; ++p) {
      const auto w = normal(shapes[p].first, shapes[p].second, 0.6f / std::sqrt(static_cast<float>(shapes[p].second)));
      block->linear[p] = make_base_weight(
          w.rows(), w.cols(), options, [&](Index first, MatrixView<float> out) { copy(w.view().middle_rows(first, out.rows), out); }, cpu);
    }
    weights->blocks.push_back(std::move(block));
  }
  model.weights = std::move(weights);
  return model;
}

/// f(layer, heads) for every linear layer: heads is what save_peft_adapter and assign take as rope_heads, which is 0 but for q and k in
/// GGUF's rotary layout.
template <class Model, class F>
void for_each_adapter(Model& model, F&& f) {
  const auto& c = model.config();
  Index at = 0;
  model.for_each_linear([&](auto& linear) {
    const auto p = static_cast<Projection>(at++ % 7);
    const bool turned = c.rope_layout == RopeLayout::interleaved && (p == Projection::q || p == Projection::k);
    f(linear, !turned ? 0 : p == Projection::q ? c.heads.heads : c.heads.kv_heads);
  });
}

/// The adapters of a decoder as save_peft_adapter takes them: those of q and k leave GGUF's rotary layout.
inline std::vector<NamedAdapter> named_adapters(const Decoder<float>& model) {
  std::vector<NamedAdapter> adapters;
  for_each_adapter(model, [&](const auto& linear, Index heads) {
    adapters.push_back({linear.adapter().options().name, &linear.adapter(), heads});
  });
  return adapters;
}

/// Puts the adapter of a folder into a decoder. Errors, with the folder: those of assign, and missing_tensor for modules the model lacks.
inline void assign_adapter(const PeftAdapter& adapter, const std::string& folder, Decoder<float>& model) {
  std::size_t used = 0;
  at_tensor(folder, "", [&] {
    for_each_adapter(model, [&](auto& linear, Index heads) {
      const auto* module = adapter.find(linear.adapter().options().name);
      if (module == nullptr) return;
      assign(*module, linear.adapter(), heads);
      ++used;
    });
    QDYLORA_EXPECTS(used == adapter.modules.size(), missing_tensor,
                    "is of another model: it has " + std::to_string(adapter.modules.size()) + " modules, of which the model has " +
                        std::to_string(used));
  });
}

}  // namespace qdylora::examples
