// The models the programs work on: a GGUF file, a Hugging Face folder, a llama2.c checkpoint, or a toy made on the spot.
#pragma once

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/model.hpp>

#include "llama2c.hpp"
#include "open_model.hpp"
#include "text.hpp"

namespace qdylora::examples {

/// The tokenizer of a .gguf file or of a Hugging Face folder.
inline Tokenizer open_tokenizer(const std::filesystem::path& path) {
  return std::filesystem::is_directory(path) ? load_tokenizer_json(path) : load_tokenizer(GgufFile(path));
}

/// The chat template of a .gguf file or of a Hugging Face folder, "" for none, and where it stands.
inline std::pair<std::string, std::string> read_chat_template(const std::filesystem::path& path) {
  if (!std::filesystem::is_directory(path)) return {chat_template_text(GgufFile(path)), path.string() + ", tokenizer.chat_template"};
  const bool own = std::filesystem::exists(path / "chat_template.jinja");
  return {chat_template_text(path), (path / (own ? "chat_template.jinja" : "tokenizer_config.json")).string()};
}

/// Sets what prompts are written in: the model's own template where the library knows it.
inline void find_chat_template(OpenModel& model, const std::filesystem::path& path) {
  const auto [text, place] = read_chat_template(path);
  if (text.empty()) {
    model.chat_problem = "the model has no chat template";
    return;
  }
  model.chat = recognize_chat_template(text);
  constexpr std::size_t shown = 60;
  if (!model.chat)
    model.chat_problem = printable_utf8(place) + ": not a chat template that is known here: '" + printable(text, shown) + "'";
}

/// --chat-template: "model", the model's own, without which prompts are plain and a line says so; a template's name; "none".
/// Errors: bad_argument.
inline void choose_chat_template(OpenModel& model, const std::string& choice) {
  if (choice == "none") model.chat.reset();
  else if (choice != "model") model.chat = chat_template(choice);
  else if (!model.chat && !model.chat_problem.empty())
    std::printf("chat       %s; prompts are plain text (--chat-template NAME for one)\n", model.chat_problem.c_str());
}

/// Opens a .gguf file or a Hugging Face folder; `tokenizer_file` is another one whose tokenizer is used instead, "" for none. A .bin file is
/// llama2.c's, and so is its tokenizer file, which it needs: Errc::bad_argument.
inline OpenModel open_model(const std::filesystem::path& path, const std::string& tokenizer_file, BaseOptions base, const Cpu& cpu) {
  OpenModel model;
  model.base = std::move(base);
  model.name = printable_utf8((path.has_filename() ? path : path.parent_path()).filename().string());
  const bool llama2c = model.llama2c = path.extension() == ".bin" && !std::filesystem::is_directory(path);
  QDYLORA_EXPECTS(!llama2c || !tokenizer_file.empty(), bad_argument, "--tokenizer: a llama2.c model needs its tokenizer file");
  if (!std::filesystem::exists(path)) throw Error(Errc::open, "no such file or folder", {.file = path.string()});
  if (!tokenizer_file.empty()) model.tokenizer = llama2c ? load_llama2c_tokenizer(tokenizer_file) : open_tokenizer(tokenizer_file);
  const auto own_tokenizer = [&](auto&& load) {
    try {
      model.tokenizer = load();
    } catch (const Error& error) {
      if (error.code() != Errc::unsupported) throw;
      model.tokenizer_problem = error.what();
    }
  };
  if (std::filesystem::is_directory(path)) {
    model.config = hugging_face_config(path / "config.json");
    if (tokenizer_file.empty() && std::filesystem::exists(path / "tokenizer.json")) own_tokenizer([&] { return open_tokenizer(path); });
    const SafetensorsFolder files(path);
    for (const auto& linear : model.config.linears())
      if (files.contains(model.config.block_name(0) + std::string(linear.name) + ".bias")) model.biases += linear.out;
    model.read = [=](const BaseOptions& options) { return load_hugging_face(path, options, cpu); };
  } else if (llama2c) {
    model.config = llama2c_config(path);
    model.read = [=](const BaseOptions& options) { return load_llama2c(path, options, cpu); };
  } else {
    const auto file = std::make_shared<const GgufFile>(path);
    model.config = gguf_config(*file);
    model.coded_tables = file->info("token_embd.weight").type->name == "Q8_0";
    for (const auto& tensor : file->tensors())
      if (tensor.name.starts_with("blk.0.") && tensor.name.ends_with(".bias") && tensor.shape.size() == 1)
        model.biases += std::min(tensor.shape.front(), std::max(model.config.mlp_width, model.config.query_width()));
    if (tokenizer_file.empty()) own_tokenizer([&] { return load_tokenizer(*file); });
    model.read = [=](const BaseOptions& options) { return load_gguf(*file, options, cpu); };
  }
  if (model.tokenizer) {
    expect_vocabulary(model.tokenizer->vocab_size(), model.config, tokenizer_file.empty() ? path.string() : tokenizer_file);
    if (!llama2c) find_chat_template(model, tokenizer_file.empty() ? path : std::filesystem::path(tokenizer_file));
  }
  return model;
}

/// Random linear weights and embedding, norms of one.
inline std::shared_ptr<DecoderWeights<float>> toy_weights(const DecoderConfig& c, BaseOptions options, const Cpu& cpu, std::uint64_t seed) {
  auto weights = std::make_shared<DecoderWeights<float>>();
  weights->config = c;
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
  const auto shapes = c.linears();
  for (Index i = 0; i < c.layers; ++i) {
    auto block = std::make_shared<BlockWeights<float>>(c);
    block->attention_norm = ones(c.width);
    block->mlp_norm = ones(c.width);
    for (std::size_t p = 0; p < shapes.size(); ++p) {
      const auto w = normal(shapes[p].out, shapes[p].in, 0.6f / std::sqrt(static_cast<float>(shapes[p].in)));
      read_linear(
          *block, i, p, w.rows(), w.cols(), options,
          [&](Index first, MatrixView<float> out) { copy(w.view().middle_rows(first, out.rows), out); }, cpu);
    }
    weights->blocks.push_back(std::move(block));
  }
  return weights;
}

/// A small transformer with random weights over single bytes. Its adapters have as many rows as it has features, so they can learn what a
/// base never knew.
inline OpenModel toy_model(BaseOptions base, const Cpu& cpu, std::uint64_t seed = 1) {
  OpenModel model;
  model.base = std::move(base);
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

  auto& c = model.config;
  c.vocab = 257;
  c.width = 64;
  c.mlp_width = 192;
  c.layers = 3;
  c.heads = {4, 2, 16};
  c.context = 512;
  c.rope_layout = RopeLayout::interleaved;
  model.read = [=, config = c](const BaseOptions& options) { return toy_weights(config, options, cpu, seed); };
  return model;
}

}  // namespace qdylora::examples
