// Decoder weights from a Hugging Face folder of a LlamaForCausalLM: config.json and model.safetensors, or shards with
// model.safetensors.index.json. Weights are float32, float16 or bfloat16, or already in bitsandbytes' 4 bits.
#pragma once

#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/io/bitsandbytes.hpp>
#include <qdylora/io/json.hpp>
#include <qdylora/io/safetensors.hpp>
#include <qdylora/model/base_weight.hpp>
#include <qdylora/model/decoder.hpp>

namespace qdylora {

/// The tensors of one checkpoint, in one file or several.
class SafetensorsFolder {
 public:
  /// Errors: those of the files; bad_config where the index names a path instead of a file, missing_tensor where it lies.
  explicit SafetensorsFolder(const std::filesystem::path& folder) {
    const auto index = folder / "model.safetensors.index.json";
    if (!std::filesystem::exists(index)) {
      files_.emplace_back(folder / "model.safetensors");
      return;
    }
    const auto json = read_json(index);
    const ErrorPlace place{.file = index.string()};
    std::map<std::string, std::size_t> opened;
    const auto& map = get_object(json, "weight_map", place);
    for (const auto& [tensor, value] : map.items()) {
      const auto file = get_string(map, tensor, place);
      // No path from inside a file is opened: a shard lies beside its index.
      if (file.empty() || file != std::filesystem::path(file).filename().string() || file == ".." || file == ".")
        throw Error(Errc::bad_config, "weight_map: expected the name of a file beside the index, found '" + printable(file) + "'", place);
      if (!opened.contains(file)) {
        opened[file] = files_.size();
        files_.emplace_back(folder / file);
      }
      files_[opened[file]].info(tensor);
    }
  }

  const std::vector<SafetensorsFile>& files() const noexcept { return files_; }
  bool contains(std::string_view tensor) const noexcept {
    for (const auto& file : files_)
      if (file.contains(tensor)) return true;
    return false;
  }
  /// The file that holds a tensor; Errc::missing_tensor.
  const SafetensorsFile& file_of(std::string_view tensor) const {
    for (const auto& file : files_)
      if (file.contains(tensor)) return file;
    throw Error(Errc::missing_tensor, "is not in the checkpoint",
                {.file = files_.empty() ? std::string{} : files_.front().name(), .tensor = std::string(tensor)});
  }

 private:
  std::vector<SafetensorsFile> files_;
};

/// The shape config.json states. Errors: unsupported (another architecture, scaled rotary positions), bad_config.
inline DecoderConfig hugging_face_config(const std::filesystem::path& config_file) {
  const auto json = read_json(config_file);
  const ErrorPlace place{.file = config_file.string()};
  if (const auto type = get_string(json, "model_type", place); type != "llama")
    throw Error(Errc::unsupported, "model_type: expected 'llama', found '" + printable(type) + "'", place);
  const auto size = [&](const char* key) { return static_cast<Index>(get_integer(json, key, 1, Index{1} << 32, place)); };
  DecoderConfig config;
  config.vocab = size("vocab_size");
  config.width = size("hidden_size");
  config.mlp_width = size("intermediate_size");
  config.layers = size("num_hidden_layers");
  config.heads.heads = size("num_attention_heads");
  const auto or_size = [&](const char* key, Index fallback) {
    const auto* found = detail::find_key(json, key, place);
    return found == nullptr || found->is_null() ? fallback : size(key);
  };
  config.heads.kv_heads = or_size("num_key_value_heads", config.heads.heads);
  config.heads.head_dim = or_size("head_dim", config.width / config.heads.heads);
  config.context = or_size("max_position_embeddings", 2048);
  config.norm_epsilon = static_cast<float>(get_number_or(json, "rms_norm_eps", 1e-6, place));
  config.tied_head = get_bool_or(json, "tie_word_embeddings", false, place);
  config.rope_layout = RopeLayout::half_split;
  // transformers 5 writes rope_parameters, earlier ones rope_theta and rope_scaling.
  const auto expect_plain = [&](const Json& rope) {
    const auto type = get_string_or(rope, "rope_type", get_string_or(rope, "type", "default", place), place);
    if (type != "default") throw Error(Errc::unsupported, "rope_type: expected 'default', found '" + printable(type) + "'", place);
  };
  if (const auto* rope = detail::find_key(json, "rope_parameters", place); rope != nullptr && rope->is_object()) {
    expect_plain(*rope);
    config.rope_base = get_number_or(*rope, "rope_theta", 10000.0, place);
  } else {
    config.rope_base = get_number_or(json, "rope_theta", 10000.0, place);
    const auto* scaling = detail::find_key(json, "rope_scaling", place);
    if (scaling != nullptr && scaling->is_object()) expect_plain(*scaling);
  }
  if (const auto act = get_string_or(json, "hidden_act", "silu", place); act != "silu")
    throw Error(Errc::unsupported, "hidden_act: expected 'silu', found '" + printable(act) + "'", place);
  try {
    config.validate();
  } catch (const Error& error) {
    throw Error(error.code(), error.what(), place);
  }
  return config;
}

/// Reads a model. Linear weights in float are stored as `options` says while they are read; those already in 4 bits stay as they are.
/// Errors: those of hugging_face_config and of the files, missing_tensor, unexpected_tensor (a layer beyond the count), shape_mismatch,
/// non_finite weights.
template <class Backend = Cpu>
std::shared_ptr<const DecoderWeights<float>> load_hugging_face(const std::filesystem::path& folder, BaseOptions options = {},
                                                               Backend backend = {}) {
  auto weights = std::make_shared<DecoderWeights<float>>();
  const auto config = weights->config = hugging_face_config(folder / "config.json");
  const SafetensorsFolder files(folder);
  for (const auto& file : files.files())
    for (const auto& tensor : file.tensors())
      expect_within_layers(file.name(), tensor.name, "model.layers.", config.layers, "config.json's num_hidden_layers");
  const auto mismatch = [](const SafetensorsFile& file, const std::string& tensor, Index rows, Index cols, Index r, Index c) {
    return Error(Errc::shape_mismatch, "expected " + detail::shape_text(rows, cols) + ", found " + detail::shape_text(r, c),
                 {.file = file.name(), .tensor = tensor});
  };
  const auto dense = [&](const std::string& tensor, Index rows, Index cols) {
    const auto& file = files.file_of(tensor);
    Matrix<float> matrix;
    if (is_bnb_4bit(file, tensor)) {  // an embedding or a head in 4 bits is used decoded
      const auto weight = load_bnb_4bit(file, tensor);
      matrix = Matrix<float>(weight.rows(), weight.cols());
      weight.visit([&]<class View>(const View& view) {
        if constexpr (requires { typename View::format; }) backend.dequantize(view, matrix.view());
      });
    } else {
      matrix = file.matrix(tensor);
    }
    return checked_weight(std::move(matrix), rows, cols, file.name(), tensor);
  };
  const auto linear = [&](const std::string& tensor, Index rows, Index cols) {
    const auto& file = files.file_of(tensor);
    if (is_bnb_4bit(file, tensor)) {
      auto weight = std::make_shared<const WeightFor<AnyFormat>>(load_bnb_4bit(file, tensor));
      if (weight->rows() != rows || weight->cols() != cols) throw mismatch(file, tensor, rows, cols, weight->rows(), weight->cols());
      return weight;
    }
    const auto& shape = file.info(tensor).shape;
    if (shape.size() != 2 || shape[0] != rows || shape[1] != cols)
      throw mismatch(file, tensor, rows, cols, shape.empty() ? 0 : shape[0], shape.size() < 2 ? 1 : shape[1]);
    return at_tensor(file.name(), tensor, [&] {
      return make_base_weight(
          rows, cols, options, [&](Index first, MatrixView<float> out) { file.read_rows(tensor, first, out); }, backend);
    });
  };
  weights->embedding = dense("model.embed_tokens.weight", config.vocab, config.width);
  if (!config.tied_head) weights->head = dense("lm_head.weight", config.vocab, config.width);
  weights->final_norm = dense("model.norm.weight", 1, config.width);
  const auto shapes = config.linear_shapes();
  for (Index i = 0; i < config.layers; ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    auto block = std::make_shared<BlockWeights<float>>();
    block->attention_norm = dense(prefix + "input_layernorm.weight", 1, config.width);
    block->mlp_norm = dense(prefix + "post_attention_layernorm.weight", 1, config.width);
    for (std::size_t p = 0; p < 7; ++p) {
      const std::string name = prefix + projection_names[p];
      block->linear[p] = linear(name + ".weight", shapes[p].first, shapes[p].second);
      if (files.contains(name + ".bias")) block->bias[p] = dense(name + ".bias", 1, shapes[p].first);
    }
    weights->blocks.push_back(std::move(block));
  }
  return weights;
}

}  // namespace qdylora
