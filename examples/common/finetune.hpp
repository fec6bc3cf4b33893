// What finetune does once its model is open and its data is read, for any type of activations and any device.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/io/json.hpp>
#include <qdylora/model/memory_plan.hpp>
#include <qdylora/model/trainer.hpp>
#include <qdylora/optim/lion.hpp>

#include "adapters.hpp"
#include "data_order.hpp"
#include "dataset.hpp"
#include "evaluation.hpp"
#include "open_model.hpp"
#include "progress.hpp"
#include "report.hpp"
#include "run_state.hpp"
#include "signals.hpp"
#include "text.hpp"

namespace qdylora::examples {

struct FinetuneOptions {
  std::string model, tokenizer, data, eval, chat = "model", out = "out";
  bool toy = false, resume = false, pack = false, group_by_length = false, gates = false, dora = false, checkpoint = false;
  std::string ranks = "1,2,4,8,16,32,64", recipe_name = "auto", method = "lora", base = "nf4", init = "standard", optimizer = "adamw", paged;
  std::string device = "cpu", dtype = "float32", compute = "automatic";
  Index planes = 3, group_size = 0, trained_planes = 1;  // of the method alpha
  float alpha = 16.0f, dropout = 0.0f;
  double lr = 1e-3, lora_plus = 1.0;
  std::int64_t steps = 80, save_every = 50;
  Index batch = 8, seq_len = 256, examples = 2000, eval_examples = 48, answers = 32, new_tokens = 48;
  int threads = 0;
  std::uint64_t seed = 0;
};

struct FinetuneData {
  std::vector<Example> questions;
  std::vector<Sample> train, held_back, validation_samples;
};

/// What trains has no ranks: the rank set is {1}, the trained scales beside 0, the base.
inline bool trains_scales(const FinetuneOptions& o) { return adapter_method(o.method) == AdapterMethod::alpha; }
inline RankSet ranks_of(const FinetuneOptions& o) { return trains_scales(o) ? RankSet{1} : parse_ranks(o.ranks); }

/// Planes of signs, by the method alpha; else none.
inline std::optional<BinaryCodeOptions> binary_code(const FinetuneOptions& o) {
  if (!trains_scales(o)) return std::nullopt;
  return BinaryCodeOptions{.planes = o.planes, .group_size = o.group_size};
}
/// The base's format as people read it.
inline std::string base_text(const FinetuneOptions& o) { return trains_scales(o) ? "binary" + std::to_string(o.planes) : o.base; }

/// Scales have no ranks. Their losses and answers stand in two rows, 0 and 1.
inline void show_scales(const std::vector<RankResult>& results) {
  std::printf("\n  %-14s %8s %10s %12s %10s %10s %9s\n", "scales", "loss", "perplexity", "exact match", "parameters", "file", "ms/token");
  for (const auto& r : results) {
    char match[32] = "";
    if (!r.matches.empty())
      std::snprintf(match, sizeof match, "%lld / %zu", static_cast<long long>(count_right(r.matches)), r.matches.size());
    std::printf("  %-14s %8.4f %10.3f %12s %8.2f M %7.2f MB %9.2f\n", r.rank == 0 ? "the base's" : "trained", r.loss, std::exp(r.loss),
                match, static_cast<double>(r.parameters) / 1e6, static_cast<double>(r.bytes()) / 1e6, 1e3 * r.token_seconds);
  }
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
  const Index together = trains_scales(o) ? 1 : ranks.size() + 1;  // ranks in one batch
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

inline Json to_json(const MemoryPlan& plan) {
  Json json = Json::object();
  for (const auto& part : plan.parts()) json[part.name] = part.bytes;
  json["at most at once"] = plan.total();
  if (plan.file > 0) json["moments in a file"] = plan.file;
  return json;
}

/// Of the base, the lowest and the highest rank.
inline void show_answers(const std::vector<RankResult>& results, const std::vector<Example>& examples, bool scales) {
  const auto line = [](std::string text) {
    std::replace(text.begin(), text.end(), '\n', ' ');
    return printable_utf8(text);
  };
  const std::set<std::size_t> shown = {0, std::min<std::size_t>(1, results.size() - 1), results.size() - 1};
  std::printf("\nSome answers\n");
  for (std::size_t i = 0; i < std::min<std::size_t>(2, examples.size()); ++i) {
    std::printf("  %s\n    %-8s %s\n", line(examples[i].prompt).c_str(), "expected", line(examples[i].response).c_str());
    for (const std::size_t at : shown) {
      const auto& r = results[at];
      std::printf("    %-8s %s\n",
                  r.rank == 0 ? "base"
                  : scales    ? "trained"
                              : ("rank " + std::to_string(r.rank)).c_str(),
                  line(r.texts[i]).c_str());
    }
  }
}

template <Scalar T, class Optimizer, class Device>
int finetune_with(const FinetuneOptions& o, OpenModel& model, const FinetuneData& data, const Device& device) {
  using Clock = std::chrono::steady_clock;
  const auto seconds_since = [](Clock::time_point from) { return std::chrono::duration<double>(Clock::now() - from).count(); };
  using Backend = typename Device::Backend;
  const std::filesystem::path out = o.out;
  const auto state_file = out / "state.safetensors";
  const RankSet ranks = ranks_of(o);
  const AdapterMethod method = adapter_method(o.method);
  const bool scales = method == AdapterMethod::alpha;
  Recipe chosen = recipe(o.recipe_name, method);
  chosen.gates = o.gates;
  const auto lora = [&] {
    auto options = adapter_options(chosen, ranks, o.alpha, o.seed);
    options.dropout = o.dropout;
    options.dora = o.dora;
    return options;
  }();

  const AdapterInit init = adapter_init(o.init, ranks.max());
  MemoryOptions memory{.base = {.format = base_format(o.base), .init = init, .binary = binary_code(o)},
                       .coded_tables = model.coded_tables,
                       .trained_planes = scales ? o.trained_planes : 0,
                       .max_rank = ranks.max(),
                       .dora_ranks = o.dora ? ranks.size() : 0,
                       .dropout = o.dropout > 0.0f,
                       .checkpoint = o.checkpoint,
                       .moments_in_8_bits = o.optimizer == "adamw8bit",
                       .one_moment = o.optimizer == "lion",
                       .moments_in_file = !o.paged.empty()};
  memory.follow(chosen);
  plan_batches(memory, o, data, model, ranks);
  auto shape = model_shape(model.config, method);
  shape.biases = model.biases;
  device.complete(memory, shape);
  const MemoryPlan plan = memory_plan<T>(shape, memory);
  std::printf("memory     planned, on %s\n%s", device.text().c_str(), plan.to_text().c_str());
  std::fflush(stdout);

  const auto start = Clock::now();
  const auto weights = device.place(std::exchange(model.read, nullptr)());
  const auto& w = *weights;
  std::printf("model      %s: %lld blocks of width %lld, %.1f M linear weights in %s, %.3f bits each (%.0f MB), read in %.1f s\n",
              model.name.c_str(), static_cast<long long>(w.config.layers), static_cast<long long>(w.config.width),
              static_cast<double>(w.config.linear_weights()) / 1e6, base_text(o).c_str(),
              8.0 * static_cast<double>(w.linear_bytes()) / static_cast<double>(w.config.linear_weights()),
              static_cast<double>(w.linear_bytes()) / 1e6, seconds_since(start));
  Decoder<T, Backend> decoder(weights,
                              {.lora = lora, .checkpoint = o.checkpoint, .method = method, .alpha = {.trained_planes = o.trained_planes}},
                              device.backend());
  Trainer<T, Backend, Optimizer> trainer(
      decoder, {.recipe = chosen, .ranks = ranks, .steps = o.steps, .lr = o.lr, .b_lr_ratio = o.lora_plus, .seed = o.seed},
      device.moments_memory(o.paged));
  trainer.hold_back(to_batches(data.held_back, batch_tokens));
  const Index adapted = w.config.layers * static_cast<Index>(w.config.adapted(method).size());
  Index trainable = 0;
  for (const auto& p : decoder.parameters()) trainable += p->value.size();
  if (scales)
    std::printf("scales     of %lld of %lld planes of all %lld linear layers, %.2f M parameters\n",
                static_cast<long long>(o.trained_planes), static_cast<long long>(o.planes), static_cast<long long>(adapted),
                static_cast<double>(trainable) / 1e6);
  else
    std::printf(method == AdapterMethod::lora
                    ? "adapters   rank up to %lld on all %lld linear layers, %.1f M parameters, alpha %g, scale %s, recipe %s%s\n"
                    : "adapters   width up to %lld in %lld bottlenecks, %.1f M parameters, alpha %g, scale %s, recipe %s, %s\n",
                static_cast<long long>(ranks.max()), static_cast<long long>(adapted), static_cast<double>(trainable) / 1e6,
                static_cast<double>(o.alpha), std::string(name(chosen.scale)).c_str(), chosen.name.c_str(),
                method != AdapterMethod::lora ? o.method.c_str()
                : o.dora                      ? ", DoRA"
                                              : "");
  if (!init.standard())
    std::printf("           begin as %s; rank 0 is %s\n", o.init.c_str(),
                init.changes_base() ? "not the model, but what they leave of it" : "the plain quantized model");
  std::fflush(stdout);

  make_folder(o.out);
  // What a resumed run must share with the one that was stopped.
  const std::string data_name = printable_utf8(o.data);
  Json settings_json{{"model", model.name},
                     {"data", data_name},
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
                     {"lora_plus", o.lora_plus},
                     {"init", o.init},
                     {"method", o.method}};
  if (scales) settings_json.update(Json{{"planes", o.planes}, {"group_size", o.group_size}, {"trained_planes", o.trained_planes}});
  const std::string settings = settings_json.dump();
  RunReport report;
  auto& history = report.history;
  if (o.resume) {
    load_run_state(state_file, settings, decoder, trainer, history);
    std::printf("resumed    at step %lld of %lld\n", static_cast<long long>(trainer.step_count()), static_cast<long long>(o.steps));
  }

  StopSignal signal;
  DataOrder order(data.train, order_options(o));
  const auto training_start = Clock::now();
  const double seconds_before = history.seconds;
  const auto save = [&] {
    history.seconds = seconds_before + seconds_since(training_start);
    save_run_state(state_file, settings, decoder, trainer, history);
  };
  {
    Progress progress(o.steps, trainer.step_count());
    while (!trainer.done() && !signal.requested()) {
      const auto samples = order.step(trainer.step_count());
      const auto result = trainer.step(to_batches(samples, batch_tokens));
      history.step_losses.push_back(result.loss);
      history.tokens += result.tokens;
      progress.update(trainer.step_count(), result.tokens, result.loss, result.rank);
      if (o.save_every > 0 && trainer.step_count() % o.save_every == 0 && !trainer.done()) save();
    }
  }
  save();
  if (!trainer.done()) {
    std::printf("\nstopped at step %lld of %lld; the state is in %s, --resume goes on\n", static_cast<long long>(trainer.step_count()),
                static_cast<long long>(o.steps), state_file.string().c_str());
    return 130;
  }
  const auto activation_bytes = decoder.activation_bytes();  // evaluation needs less
  if (scales)
    with_alpha_layers(decoder, [&](const auto& layers) { save_alpha_adapter(out / "adapter", layers, *binary_code(o), model.name); });
  else
    save_adapters(out / "adapter", decoder,
                  {.rank = ranks.max(),
                   .base_model = model.name,
                   .ranks = {ranks.begin(), ranks.end()},
                   .recipe = chosen.name,
                   .init = init,
                   .base_format = o.base});
  std::printf("trained    %lld steps, %lld tokens in %.0f s (%.0f tokens/s)\n", static_cast<long long>(o.steps),
              static_cast<long long>(history.tokens), history.seconds, history.tokens_per_second());
  if (chosen.measure)
    std::printf(trainer.reordered_at_end() ? "auto       low ranks need no rows of their own here; re-ordered at the end\n"
                                           : "auto       %.0f %% of the later rows went to low ranks\n",
                100.0 * trainer.nested().share);
  std::printf(scales ? "evaluating ...\n" : "evaluating every rank ...\n");
  std::fflush(stdout);

  std::vector<Index> all = {0};
  all.insert(all.end(), ranks.begin(), ranks.end());
  const auto stop = [&] { return signal.requested(); };
  report.ranks = evaluate_losses(decoder, data.validation_samples, all, stop);
  if (!data.questions.empty() && !stop())
    evaluate_answers(decoder, model.need_tokenizer(), model.chat_template(), data.questions, report.ranks, o.new_tokens, stop);
  if (stop()) {
    std::printf("stopped; the adapter is in %s\n", (out / "adapter").string().c_str());
    return 130;
  }

  measure_costs(decoder, report.ranks, stop);
  const RankSummary summary(report.ranks);
  if (scales) show_scales(report.ranks);
  else print_table(report.ranks, summary);
  if (!data.questions.empty()) show_answers(report.ranks, data.questions, scales);
  const std::size_t peak = device.peak();
  const auto megabytes = [](std::size_t bytes) { return static_cast<double>(bytes) / 1e6; };
  std::printf("\nmemory     %.0f MB planned, %.0f MB measured at most\n", megabytes(plan.total()), megabytes(peak));
  report.settings = {{"model", model.name},
                     {"recipe", chosen.name},
                     {"method", o.method},
                     {"base", base_text(o)},
                     {"alpha", o.alpha},
                     {"lr", o.lr},
                     {"steps", o.steps},
                     {"batch", o.batch},
                     {"seed", o.seed},
                     {"dtype", o.dtype},
                     {"compute", o.compute},
                     {"optimizer", o.optimizer},
                     {"dora", o.dora},
                     {"lora_plus", o.lora_plus},
                     {"init", o.init},
                     {"base_bytes", w.linear_bytes()},
                     {"adapter_parameters", trainable},
                     {"activation_bytes", activation_bytes},
                     {"memory_plan", to_json(plan)},
                     {"peak_memory_bytes", peak},
                     {"nested_share", trainer.nested().share},
                     {"reordered_at_end", trainer.reordered_at_end()}};
  report.settings.update(device.facts());
  if (scales) report.settings.update(Json{{"planes", o.planes}, {"group_size", o.group_size}, {"trained_planes", o.trained_planes}});
  write_report(out, report, summary);
  if (scales) {
    const double base = report.ranks.front().loss, loss = report.ranks.back().loss;
    std::printf("\n%s: %.3f nats a token, the base %.3f\n",
                loss < base ? "The trained scales beat the base" : "The trained scales do NOT beat the base", loss, base);
    std::printf("wrote      %s: report.json, report.csv, adapter/ (scales), state.safetensors\n", out.string().c_str());
    return 0;
  }
  const auto worst = *std::max_element(report.ranks.begin() + 1, report.ranks.end(),
                                       [](const RankResult& a, const RankResult& b) { return a.loss < b.loss; });
  std::printf("\n%s: the worst rank, %lld, has %.3f nats a token, the base %.3f\n",
              worst.loss < report.ranks.front().loss ? "Every rank beats the base" : "NOT every rank beats the base",
              static_cast<long long>(worst.rank), worst.loss, report.ranks.front().loss);
  std::printf("wrote      %s: report.json, report.csv, ranks.svg, adapter/ (%s %lld), state.safetensors\n", out.string().c_str(),
              method == AdapterMethod::lora ? "PEFT, rank" : "bottlenecks, width", static_cast<long long>(ranks.max()));
  return 0;
}

template <Scalar T, class Device>
int finetune(const FinetuneOptions& o, OpenModel& model, const FinetuneData& data, const Device& device) {
  using Backend = typename Device::Backend;
  using Memory = decltype(device.moments_memory(o.paged));
  if (o.optimizer == "adamw8bit") return finetune_with<T, AdamW8bit<T, Backend, Memory>>(o, model, data, device);
  if (o.optimizer == "lion") return finetune_with<T, Lion<T, Backend, Memory>>(o, model, data, device);
  return finetune_with<T, AdamW<T, Backend, Memory>>(o, model, data, device);
}

}  // namespace qdylora::examples
