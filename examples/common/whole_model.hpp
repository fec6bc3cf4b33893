// What finetune does with a model whose weights all train (--method full): its folder, and one row that says what became of it.
#pragma once

#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>

#include <qdylora/model/save_hugging_face.hpp>

#include "finetune_plan.hpp"
#include "folder.hpp"
#include "model_folder.hpp"
#include "open_model.hpp"
#include "report.hpp"

namespace qdylora::examples {

/// The Hugging Face folder that the model is saved to.
inline std::filesystem::path whole_model_folder(const FinetuneOptions& o) { return std::filesystem::path(o.out) / "model"; }

/// Before anything trains: Errc::bad_argument where the base is in codes, which have no gradients, or the folder would be that of the
/// model; unsupported for a model with biases from another kind of file, of which config.json cannot tell.
inline void expect_trains_whole(const FinetuneOptions& o, const OpenModel& model) {
  const BaseFormat format = base_format(o.base);
  QDYLORA_EXPECTS(format == BaseFormat::float32 || format == BaseFormat::bfloat16, bad_argument,
                  "--base-format " + o.base + ": --method full trains the weights themselves, in bfloat16 or float32; give one of these");
  if (o.toy) return;
  expect_no_overwrite(o.model, whole_model_folder(o));
  QDYLORA_EXPECTS(std::filesystem::is_directory(o.model) || model.biases == 0, unsupported,
                  model.name + ": --method full saves a model with biases only where it is from a Hugging Face folder");
}

/// Saves the model. One that was in a Hugging Face folder keeps its config.json, but for the type of its weights, and what lies beside it;
/// another has a Llama's config.json, and its tokenizer stays where it is. Errors: those of save_hugging_face_weights and of the files.
template <class T, class Backend>
void save_whole_model(const FinetuneOptions& o, Decoder<T, Backend>& decoder) {
  const auto out = whole_model_folder(o);
  make_folder(out);
  save_hugging_face_weights(out / SafetensorsFolder::one_file, decoder);
  if (o.toy || !std::filesystem::is_directory(o.model)) {
    replace_file(out / "config.json", hugging_face_json(decoder).dump(2) + "\n");
    return;
  }
  copy_beside(o.model, out, [&](Json& config) {
    const char* const key = config.contains("dtype") ? "dtype" : "torch_dtype";  // transformers 5's name, or the earlier one
    config[key] = computes_in_bfloat16(decoder) ? "bfloat16" : "float32";
  });
}

/// The bytes of its tensors in the folder.
inline Index whole_model_bytes(const FinetuneOptions& o) {
  std::uint64_t bytes = 0;
  const SafetensorsFile file(whole_model_folder(o) / SafetensorsFolder::one_file);
  for (const auto& tensor : file.tensors()) bytes += tensor.size();
  return static_cast<Index>(bytes);
}

/// One row: the model before and after, and what it costs. Losses in nats a token, their difference on the same examples.
inline void show_whole(const RankResult& before, const RankResult& after) {
  const Interval change = paired_above(after, before, &RankResult::example_losses);
  char difference[64];
  std::snprintf(difference, sizeof difference, "%+.4f [%+.4f, %+.4f]", change.value, change.low, change.high);
  const bool answers = !after.matches.empty();
  std::printf("\n  %11s %8s  %-27s%s %11s %12s %9s\n", "loss before", "after", "change, 95 %",
              answers ? "  exact match before      after" : "", "parameters", "file", "ms/token");
  std::printf("  %11.4f %8.4f  %-27s", before.loss, after.loss, difference);
  if (answers)
    std::printf(" %13lld / %-4zu %5lld / %-4zu", static_cast<long long>(count_right(before.matches)), before.matches.size(),
                static_cast<long long>(count_right(after.matches)), after.matches.size());
  std::printf(" %9.2f M %9.2f MB %9.2f\n", static_cast<double>(after.parameters) / 1e6, static_cast<double>(after.bytes()) / 1e6,
              1e3 * after.token_seconds);
}

}  // namespace qdylora::examples
