// What finetune is told, the run that it has to beat, and what both take of memory.
#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/io/json.hpp>
#include <qdylora/model/decoder_options.hpp>
#include <qdylora/model/memory_plan.hpp>
#include <qdylora/model/recipe.hpp>
#include <qdylora/model/trainer.hpp>

#include "data_order.hpp"
#include "dataset.hpp"
#include "evaluation.hpp"
#include "open_model.hpp"
#include "text.hpp"

namespace qdylora::examples {

struct FinetuneOptions {
  std::string model, tokenizer, data, eval, chat = "model", out = "out";
  bool toy = false, resume = false, rival = false, pack = false, group_by_length = false, all_turns = false, gates = false, dora = false;
  bool train_bias = false, checkpoint = false;
  std::string ranks = "1,2,4,8,16,32,64", recipe_name = "auto", method = "lora", base = "nf4", init = "standard", optimizer = "adamw", paged;
  std::string rank_pattern, alpha_pattern, offload;
  std::string device = "cpu", dtype = "float32", compute = "automatic";
  Index planes = 3, group_size = 0, trained_planes = 1;  // of the method alpha
  float alpha = 16.0f, dropout = 0.0f;
  double lr = 1e-3, lora_plus = 1.0, keep = 0.99;
  std::int64_t steps = 80, save_every = 50;
  Index batch = 8, seq_len = 256, examples = 2000, eval_examples = 48, answers = 32, new_tokens = 48;
  int threads = 0;
  std::uint64_t seed = 0;
};

struct FinetuneData {
  std::vector<Example> questions;
  std::vector<Sample> train, held_back, validation_samples;
};

inline bool trains_scales(const FinetuneOptions& o) { return adapter_method(o.method) == AdapterMethod::alpha; }
inline bool trains_whole(const FinetuneOptions& o) { return adapter_method(o.method) == AdapterMethod::full; }
/// Of what has no ranks the set is {1}: trained scales beside 0, the base; or all weights.
inline RankSet ranks_of(const FinetuneOptions& o) { return has_ranks(adapter_method(o.method)) ? parse_ranks(o.ranks) : RankSet{1}; }

/// Planes of signs, by the method alpha; else none.
inline std::optional<BinaryCodeOptions> binary_code(const FinetuneOptions& o) {
  if (!trains_scales(o)) return std::nullopt;
  return BinaryCodeOptions{.planes = o.planes, .group_size = o.group_size};
}
/// The base's format as people read it.
inline std::string base_text(const FinetuneOptions& o) { return trains_scales(o) ? "binary" + std::to_string(o.planes) : o.base; }

/// The file that --resume goes on from.
inline std::filesystem::path state_file(const FinetuneOptions& o) { return std::filesystem::path(o.out) / "state.safetensors"; }

/// The recipe of the run that a run has to beat: the same data, batches and number of steps, all at full rank, then re-ordered by singular
/// values, so that it can be cut.
inline constexpr std::string_view rival_recipe = "qlora-svd";

/// Errors: bad_argument for a run that is its own rival, unsupported for a method whose updates have no singular values to be cut by.
inline void expect_rival(const FinetuneOptions& o) {
  QDYLORA_EXPECTS(adapter_method(o.method) == AdapterMethod::lora, unsupported,
                  "--rival: is cut by singular values, which only low-rank updates have, not those of --method " + o.method);
  QDYLORA_EXPECTS(o.recipe_name != rival_recipe, bad_argument,
                  "--rival: the run would be its own rival, by the recipe " + o.recipe_name + "; give it beside another --recipe");
}

/// How a run without --rival comes to one; nothing where no run of its method can have one.
inline std::optional<std::string> how_to_rival(const FinetuneOptions& o) {
  if (adapter_method(o.method) != AdapterMethod::lora || o.recipe_name == rival_recipe) return std::nullopt;
  return "none measured: the same command with --resume --rival trains QLoRA on these batches, to be cut by singular values";
}

/// A run of its own in --out/rival, which --resume goes on with if it has begun. It comes when the run that it follows has left its memory,
/// and needs no more: neither second moments nor a snapshot.
inline FinetuneOptions rival_of(const FinetuneOptions& o) {
  FinetuneOptions rival = o;
  rival.recipe_name = rival_recipe;
  rival.gates = rival.rival = false;
  rival.out = (std::filesystem::path(o.out) / "rival").string();
  rival.resume = o.resume && std::filesystem::exists(state_file(rival));
  return rival;
}

/// With the gates that --gates asks for.
inline Recipe recipe_of(const FinetuneOptions& o) {
  Recipe chosen = recipe(o.recipe_name, adapter_method(o.method));
  chosen.gates = o.gates;
  return chosen;
}

/// What trains in the model, and how.
inline DecoderOptions decoder_options(const FinetuneOptions& o) {
  DecoderOptions options{.lora = adapter_options(recipe_of(o), ranks_of(o), o.alpha, o.seed),
                         .checkpoint = o.checkpoint,
                         .method = adapter_method(o.method),
                         .alpha = {.trained_planes = o.trained_planes}};
  options.patterns = {parse_patterns("--rank-pattern", o.rank_pattern), parse_patterns("--alpha-pattern", o.alpha_pattern)};
  if (o.device != "cpu") options.offload_checkpoints = !o.offload.empty();
  else if (!o.offload.empty()) options.checkpoint_memory = PagedMemory(o.offload);
  options.lora.dropout = o.dropout;
  options.lora.dora = o.dora;
  options.lora.train_bias = o.train_bias;
  return options;
}

inline DataOrderOptions order_options(const FinetuneOptions& o) {
  return {.rows = o.batch, .seed = o.seed, .pack_length = o.pack ? o.seq_len : 0, .group_by_length = o.group_by_length};
}

/// What the data makes of memory: the largest batches that this run will see.
inline void plan_batches(MemoryOptions& options, const FinetuneOptions& o, const FinetuneData& data, const OpenModel& model,
                         const RankSet& ranks) {
  const auto look = [&options](const std::vector<Sample>& samples, Index& tokens, Index& scored) {
    for (const auto& batch : to_batches(samples, batch_tokens)) {
      tokens = std::max(tokens, batch.tokens());
      scored = std::max(scored, batch.scored());
      for (std::size_t s = 1; s < batch.offsets.size(); ++s)
        options.longest = std::max(options.longest, batch.offsets[s] - batch.offsets[s - 1]);
    }
  };
  constexpr std::int64_t looked_at = 4096;  // steps; of a longer run the worst is assumed
  DataOrder order(data.train, order_options(o));
  for (std::int64_t step = 0; step < std::min(o.steps, looked_at); ++step) look(order.step(step), options.tokens, options.scored);
  if (o.steps > looked_at) {
    Index longest = 0;
    for (const auto& sample : data.train) longest = std::max(longest, static_cast<Index>(sample.ids.size()) - 1);
    options.tokens = options.scored = std::max(longest, std::min(batch_tokens, o.batch * (o.pack ? o.seq_len : longest)));
    options.longest = std::max(options.longest, longest);
  }
  for (const auto* samples : {&data.held_back, &data.validation_samples}) look(*samples, options.forward_tokens, options.forward_scored);
  options.sequences = 1;  // of measure_costs
  options.cache_rows = std::min(timed_tokens + 1, model.config.context);
  const Index together = has_ranks(adapter_method(o.method)) ? ranks.size() + 1 : 1;  // ranks in one batch
  const std::size_t at_once = answered_at_once(o.new_tokens, static_cast<std::size_t>(together));
  for (std::size_t begin = 0; begin < data.questions.size(); begin += at_once) {
    Index prompts = 0;
    const std::size_t end = std::min(data.questions.size(), begin + at_once);
    for (std::size_t i = begin; i < end; ++i) {
      const auto length = static_cast<Index>(prompt_ids(data.questions[i], model.need_tokenizer(), model.chat_template()).size());
      prompts += length;
      options.cache_rows = std::max(options.cache_rows, length + o.new_tokens);
    }
    options.sequences = std::max(options.sequences, static_cast<Index>(end - begin) * together);
    options.forward_tokens = std::max(options.forward_tokens, prompts * together);
  }
  options.longest = std::max(options.longest, options.cache_rows);
}

/// The training rows that the run begins with, as many as calibrate a model, or all.
inline std::vector<Batch> first_batches(const FinetuneOptions& o, const FinetuneData& data) {
  DataOrder order(data.train, order_options(o));
  std::vector<Batch> batches;
  for (std::int64_t step = 0; step < o.steps && step * o.batch < calibration_rows; ++step)
    for (auto& batch : to_batches(order.step(step), batch_tokens)) batches.push_back(std::move(batch));
  return batches;
}

/// How the base is to be stored for the run and its rival. Where both go on from states, these have what has become of initial values.
template <Scalar T, class Device>
BaseOptions base_of(const FinetuneOptions& o, const FinetuneData& data, const OpenModel& model, const Device& device) {
  BaseOptions base = model.base;
  if (!base.init.calibrated()) return base;
  const bool begins = !o.resume || (o.rival && !rival_of(o).resume);
  if (begins) return calibrated<T>(model, first_batches(o, data), device);
  base.init = {};
  return base;
}

/// What a run will take of memory, part by part, on a device.
template <Scalar T, class Device>
MemoryPlan plan_memory(const FinetuneOptions& o, const FinetuneData& data, const OpenModel& model, const Device& device) {
  const RankSet ranks = ranks_of(o);
  const DecoderOptions options = decoder_options(o);
  MemoryOptions memory{.base = {.format = base_format(o.base), .init = adapter_init(o.init, ranks.max()), .binary = binary_code(o)},
                       .coded_tables = model.coded_tables,
                       .trained_planes = trains_scales(o) ? o.trained_planes : 0,
                       .max_rank = ranks.max(),
                       .ranks = options.patterns.rank.empty() ? std::vector<Index>{} : layer_ranks(options, model.config),
                       .dora_ranks = o.dora ? ranks.size() : 0,
                       .trained_biases = o.train_bias,
                       .dropout = o.dropout > 0.0f,
                       .checkpoint = o.checkpoint,
                       .checkpoints_in_file = !o.offload.empty(),
                       .moments_in_8_bits = o.optimizer == "adamw8bit",
                       .one_moment = o.optimizer == "lion",
                       .moments_in_file = !o.paged.empty(),
                       .resumes = o.resume};
  memory.follow(recipe_of(o));
  plan_batches(memory, o, data, model, ranks);
  auto shape = model_shape(model.config, options.method);
  shape.biases = model.biases;
  device.template complete<T>(memory, shape);
  return memory_plan<T>(shape, memory);
}

inline Json to_json(const MemoryPlan& plan) {
  Json json = Json::object();
  for (const auto& part : plan.parts()) json[part.name] = part.bytes;
  json["at most at once"] = plan.total();
  if (plan.file > 0) json["moments in a file"] = plan.file;
  if (plan.checkpoint_file > 0) json["checkpoint files"] = plan.checkpoint_file;
  return json;
}

/// What a resumed run must share with the one that was stopped.
inline Json settings_of(const FinetuneOptions& o, const OpenModel& model, const FinetuneData& data) {
  Json settings{{"model", model.name},
                {"data", printable_utf8(o.data)},
                {"ranks", o.ranks},
                {"recipe", o.recipe_name},
                {"gates", o.gates},
                {"base", o.base},
                {"alpha", o.alpha},
                {"dropout", o.dropout},
                {"lr", o.lr},
                {"steps", o.steps},
                {"batch", o.batch},
                {"seq_len", o.seq_len},
                {"seed", o.seed},
                {"dtype", o.dtype},
                {"compute", o.compute},
                {"examples", data.train.size()},
                {"device", o.device},
                {"optimizer", o.optimizer},
                {"chat", model.chat ? model.chat->name : "none"},
                {"pack", o.pack},
                {"group_by_length", o.group_by_length},
                {"dora", o.dora},
                {"train_bias", o.train_bias},
                {"lora_plus", o.lora_plus},
                {"init", o.init},
                {"method", o.method},
                {"rank_pattern", printable_utf8(o.rank_pattern)},
                {"alpha_pattern", printable_utf8(o.alpha_pattern)}};
  if (trains_scales(o)) settings.update(Json{{"planes", o.planes}, {"group_size", o.group_size}, {"trained_planes", o.trained_planes}});
  return settings;
}

}  // namespace qdylora::examples
