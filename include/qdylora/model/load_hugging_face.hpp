// Decoder weights from a Hugging Face folder of a Llama, Mistral, Qwen2 or Falcon: config.json and model.safetensors, or shards
// with model.safetensors.index.json. Weights are float32, float16 or bfloat16, or already in bitsandbytes' 4 bits.
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
#include <qdylora/model/decoder.hpp>
#include <qdylora/model/hugging_face_config.hpp>
#include <qdylora/model/initial_weight.hpp>

namespace qdylora {

/// The tensors of one checkpoint, in one file or several.
class SafetensorsFolder {
 public:
  static constexpr const char* one_file = "model.safetensors";
  static constexpr const char* index_file = "model.safetensors.index.json";

  /// Errors: those of the files; bad_config where the index names a path instead of a file, missing_tensor where it lies.
  explicit SafetensorsFolder(const std::filesystem::path& folder) {
    const auto index = folder / index_file;
    if (!std::filesystem::exists(index)) {
      files_.emplace_back(folder / one_file);
      return;
    }
    indexed_ = true;
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
  /// Whether they are shards that an index names.
  bool indexed() const noexcept { return indexed_; }
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
  bool indexed_ = false;
};

/// Reads a model. Linear weights in float are stored as `options` says while they are read; those already in 4 bits stay as they are,
/// unless they are to be planes of signs.
/// Errors: those of hugging_face_config and of the files, missing_tensor, unexpected_tensor (a layer beyond the count), shape_mismatch,
/// non_finite weights.
template <class Backend = Cpu>
std::shared_ptr<DecoderWeights<float>> load_hugging_face(const std::filesystem::path& folder, BaseOptions options = {},
                                                         Backend backend = {}) {
  auto weights = std::make_shared<DecoderWeights<float>>();
  const auto model = detail::read_hugging_face_config(folder / "config.json");
  const auto config = weights->config = model.config;
  const SafetensorsFolder files(folder);
  for (const auto& file : files.files())
    for (const auto& tensor : file.tensors())
      expect_within_layers(file.name(), tensor.name, config.block_names(), config.layers, "config.json's num_hidden_layers");
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
      decode(weight, matrix.view(), backend);
    } else {
      matrix = file.matrix(tensor);
    }
    return checked_weight(std::move(matrix), rows, cols, file.name(), tensor);
  };
  const auto linear = [&](BlockWeights<float>& block, Index index, std::size_t p, const std::string& tensor, Index rows, Index cols) {
    const auto& file = files.file_of(tensor);
    if (is_bnb_4bit(file, tensor)) {
      if (!options.init.standard())
        throw Error(Errc::unsupported, "is in 4 bits already, and " + name(options.init) + " begins with a weight in float",
                    {.file = file.name(), .tensor = tensor});
      auto weight = std::make_shared<const WeightFor<AnyFormat>>(load_bnb_4bit(file, tensor));
      if (weight->rows() != rows || weight->cols() != cols) throw mismatch(file, tensor, rows, cols, weight->rows(), weight->cols());
      if (options.binary) {
        Matrix<float> decoded(rows, cols);
        decode(*weight, decoded.view(), backend);
        at_tensor(file.name(), tensor, [&] {
          read_linear(
              block, index, p, rows, cols, options,
              [&](Index first, MatrixView<float> out) { copy(decoded.view().middle_rows(first, out.rows), out); }, backend);
        });
      } else {
        block.linear[p] = std::move(weight);
      }
      return;
    }
    const auto& shape = file.info(tensor).shape;
    if (shape.size() != 2 || shape[0] != rows || shape[1] != cols)
      throw mismatch(file, tensor, rows, cols, shape.empty() ? 0 : shape[0], shape.size() < 2 ? 1 : shape[1]);
    at_tensor(file.name(), tensor, [&] {
      read_linear(
          block, index, p, rows, cols, options, [&](Index first, MatrixView<float> out) { file.read_rows(tensor, first, out); }, backend);
    });
  };
  const auto norm = [&](const std::string& module) -> NormWeights<float> {
    auto weight = dense(module + ".weight", 1, config.width);
    if (config.architecture == Architecture::llama) return {std::move(weight)};
    return {std::move(weight), dense(module + ".bias", 1, config.width)};
  };
  const auto names = config.module_names();
  weights->embedding = dense(names.embedding + ".weight", config.vocab, config.width);
  if (!config.tied_head) weights->head = dense(names.head + ".weight", config.vocab, config.width);
  weights->final_norm = norm(names.final_norm);
  const auto shapes = config.linears();
  for (Index i = 0; i < config.layers; ++i) {
    const std::string prefix = config.block_name(i);
    auto block = std::make_shared<BlockWeights<float>>(config);
    block->attention_norm = norm(prefix + names.attention_norm);
    if (!config.shared_norm) block->mlp_norm = norm(prefix + names.mlp_norm);
    for (std::size_t p = 0; p < shapes.size(); ++p) {
      const std::string name = prefix + std::string(shapes[p].name);
      linear(*block, i, p, name + ".weight", shapes[p].out, shapes[p].in);
      if (p < model.biased_linears || files.contains(name + ".bias")) block->bias[p] = dense(name + ".bias", 1, shapes[p].out);
    }
    weights->blocks.push_back(std::move(block));
  }
  return weights;
}

}  // namespace qdylora
