// The tokenizer that a GGUF file carries (keys tokenizer.ggml.*, github.com/ggml-org/ggml, docs/gguf.md).
#pragma once

#include <cstdint>
#include <limits>
#include <string>
#include <string_view>
#include <utility>

#include <qdylora/core/error.hpp>
#include <qdylora/io/gguf.hpp>
#include <qdylora/model/tokenizer.hpp>

namespace qdylora {

/// Errors: unsupported (a model other than byte-level BPE, "gpt2", and SentencePiece's BPE, "llama"; flags that add an end, or a space
/// where the model is byte-level), bad_config (absent keys, or values of other types), and those of Tokenizer's constructor, with the
/// file's name.
inline Tokenizer load_tokenizer(const GgufFile& file) {
  const GgufMetadata& metadata = file.metadata();
  const auto fail = [&](Errc code, std::string_view key, const std::string& message) -> void {
    throw Error(code, "key '" + std::string(key) + "': " + message, {.file = file.name()});
  };
  const auto refuse_flag = [&](std::string_view key) {  // it would change ids, and no model of this kind sets it
    if (metadata.get_or<bool>(key, false)) fail(Errc::unsupported, key, "expected false, found true");
  };
  const auto model = metadata.get<std::string>("tokenizer.ggml.model");
  const bool sentencepiece = model == "llama";
  if (!sentencepiece && model != "gpt2")
    fail(Errc::unsupported, "tokenizer.ggml.model", "expected 'gpt2' or 'llama', found '" + printable(model) + "'");
  const auto id = [&](std::string_view key, std::int32_t fallback) -> std::int32_t {
    if (!metadata.contains(key)) return fallback;
    const auto value = metadata.get<std::uint32_t>(key);
    if (value > static_cast<std::uint32_t>(std::numeric_limits<std::int32_t>::max()))
      fail(Errc::bad_config, key, std::to_string(value) + " is no token id");
    return static_cast<std::int32_t>(value);
  };
  TokenizerData data;
  data.tokens = metadata.array<std::string>("tokenizer.ggml.tokens");
  if (metadata.contains("tokenizer.ggml.token_type")) data.token_types = metadata.array<std::int32_t>("tokenizer.ggml.token_type");
  // What a file leaves out is as llama.cpp has it.
  data.bos = id("tokenizer.ggml.bos_token_id", sentencepiece ? 1 : -1);
  data.eos = id("tokenizer.ggml.eos_token_id", sentencepiece ? 2 : -1);
  refuse_flag("tokenizer.ggml.add_eos_token");
  if (sentencepiece) {
    data.model = TokenizerModel::sentencepiece;
    data.scores = metadata.array<float>("tokenizer.ggml.scores");
    if (data.scores.empty()) fail(Errc::bad_config, "tokenizer.ggml.scores", "expected a score for each token, found none");
    data.pre_tokenizer = "default";
    data.strips_space = metadata.get_or<bool>("tokenizer.ggml.add_space_prefix", true);
    data.space_prefix = data.strips_space ? SpacePrefix::all : SpacePrefix::none;
    data.adds_bos = metadata.get_or<bool>("tokenizer.ggml.add_bos_token", data.bos >= 0);
  } else {
    data.merges = metadata.array<std::string>("tokenizer.ggml.merges");
    data.pre_tokenizer = metadata.get<std::string>("tokenizer.ggml.pre");
    refuse_flag("tokenizer.ggml.add_space_prefix");
    // What the names of pre-tokenizers imply by the models' own tokenizer.json.
    data.whole_words = data.pre_tokenizer == "llama-bpe";
    data.nfc = data.pre_tokenizer == "qwen2";
    data.adds_bos = metadata.get_or<bool>("tokenizer.ggml.add_bos_token", data.pre_tokenizer == "llama-bpe" && data.bos >= 0);
  }
  try {
    return Tokenizer(std::move(data));
  } catch (const Error& error) {
    throw Error(error.code(), error.what(), {.file = file.name()});
  }
}

}  // namespace qdylora
