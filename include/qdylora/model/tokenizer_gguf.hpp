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

/// Errors: unsupported (a model other than byte-level BPE, "gpt2"; flags that add a space or an end), bad_config (absent keys, or
/// values of other types), and those of Tokenizer's constructor, with the file's name.
inline Tokenizer load_tokenizer(const GgufFile& file) {
  const GgufMetadata& metadata = file.metadata();
  const auto fail = [&](Errc code, const std::string& message) -> void { throw Error(code, message, {.file = file.name()}); };
  const auto expect = [&](std::string_view key, const std::string& wanted) {
    const auto found = metadata.get<std::string>(key);
    if (found != wanted) {
      fail(Errc::unsupported, "key '" + std::string(key) + "': expected '" + wanted + "', found '" + printable(found) + "'");
    }
  };
  expect("tokenizer.ggml.model", "gpt2");
  const auto id = [&](std::string_view key) -> std::int32_t {
    if (!metadata.contains(key)) return -1;
    const auto value = metadata.get<std::uint32_t>(key);
    if (value > static_cast<std::uint32_t>(std::numeric_limits<std::int32_t>::max())) {
      fail(Errc::bad_config, "key '" + std::string(key) + "': " + std::to_string(value) + " is no token id");
    }
    return static_cast<std::int32_t>(value);
  };
  TokenizerData data;
  data.tokens = metadata.array<std::string>("tokenizer.ggml.tokens");
  data.merges = metadata.array<std::string>("tokenizer.ggml.merges");
  if (metadata.contains("tokenizer.ggml.token_type")) data.token_types = metadata.array<std::int32_t>("tokenizer.ggml.token_type");
  data.pre_tokenizer = metadata.get<std::string>("tokenizer.ggml.pre");
  data.bos = id("tokenizer.ggml.bos_token_id");
  data.eos = id("tokenizer.ggml.eos_token_id");
  // What the names of pre-tokenizers imply by the models' own tokenizer.json.
  data.whole_words = data.pre_tokenizer == "llama-bpe";
  data.nfc = data.pre_tokenizer == "qwen2";
  data.adds_bos = metadata.get_or<bool>("tokenizer.ggml.add_bos_token", data.pre_tokenizer == "llama-bpe" && data.bos >= 0);
  // Flags that would change ids and that no model of this shape sets: refused rather than ignored.
  for (const std::string_view key : {"tokenizer.ggml.add_space_prefix", "tokenizer.ggml.add_eos_token"}) {
    if (metadata.get_or<bool>(key, false)) fail(Errc::unsupported, "key '" + std::string(key) + "': expected false, found true");
  }
  try {
    return Tokenizer(std::move(data));
  } catch (const Error& error) {
    throw Error(error.code(), error.what(), {.file = file.name()});
  }
}

}  // namespace qdylora
