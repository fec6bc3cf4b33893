// Writing a Hugging Face folder that is made of another: its weights file by file, their index, and what lies beside them.
#pragma once

#include <cstdint>
#include <filesystem>
#include <utility>

#include <qdylora/io.hpp>
#include <qdylora/model/load_hugging_face.hpp>

#include "folder.hpp"

namespace qdylora::examples {

/// Errc::open where there is no such folder.
inline void expect_folder(const std::filesystem::path& folder) {
  if (!std::filesystem::is_directory(folder)) throw Error(Errc::open, "no such folder", {.file = folder.string()});
}

/// Makes the folder `out` for what is made of the weights in `model`. Errc::bad_argument where that is the same folder, or has weights that
/// would not be replaced, but lie beside those written; open.
inline void make_folder_of(const std::filesystem::path& model, const SafetensorsFolder& weights, const std::filesystem::path& out) {
  expect_no_overwrite(model, out);
  const auto other = out / (weights.indexed() ? SafetensorsFolder::one_file : SafetensorsFolder::index_file);
  if (std::filesystem::exists(other))
    throw Error(Errc::bad_argument, "is of another model that lies there; give another folder", {.file = other.string()});
  make_folder(out);
}

/// write(file, path) for each file of weights, path of the same name in `out`; then the index, if there is one.
template <class Write>
void write_weights(const SafetensorsFolder& weights, const std::filesystem::path& out, Write&& write) {
  Json map = Json::object();
  std::uint64_t size = 0;
  for (const auto& file : weights.files()) {
    const auto name = std::filesystem::path(file.name()).filename();
    write(file, out / name);
    if (!weights.indexed()) continue;
    const SafetensorsFile written(out / name);
    for (const auto& tensor : written.tensors()) {
      map[tensor.name] = name.string();
      size += tensor.size();
    }
  }
  if (weights.indexed())
    replace_file(out / SafetensorsFolder::index_file,
                 Json({{"metadata", {{"total_size", size}}}, {"weight_map", std::move(map)}}).dump(1) + "\n");
}

/// Copies the files beside the weights: tokenizer, chat template, settings; config.json as change(json) leaves it.
template <class Change>
void copy_beside(const std::filesystem::path& model, const std::filesystem::path& out, Change&& change) {
  for (const auto& entry : std::filesystem::directory_iterator(model)) {
    const auto file = entry.path().filename();
    const auto kind = file.extension();
    if (!entry.is_regular_file() || (kind != ".json" && kind != ".txt" && kind != ".jinja" && kind != ".model" && kind != ".md")) continue;
    if (file == SafetensorsFolder::index_file) continue;
    if (file == "config.json") {
      auto config = read_json(entry.path());
      if (!config.is_object()) throw Error(Errc::bad_config, "expected an object", {.file = entry.path().string()});
      change(config);
      replace_file(out / file, config.dump(2) + "\n");
    } else {
      replace_file(out / file, read_text(entry.path()));
    }
  }
}

}  // namespace qdylora::examples
