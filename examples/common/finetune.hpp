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
#include <qdylora/model/trainer.hpp>
#include <qdylora/optim/lion.hpp>

#include "adapters.hpp"
#include "data_order.hpp"
#include "evaluation.hpp"
#include "finetune_plan.hpp"
#include "open_model.hpp"
#include "progress.hpp"
#include "report.hpp"
#include "run_state.hpp"
#include "signals.hpp"
#include "text.hpp"
#include "whole_model.hpp"

namespace qdylora::examples {

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

inline double seconds_since(std::chrono::steady_clock::time_point from) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - from).count();
}

/// Trains, or goes on, saving states and the adapter, or the model, in --out, and measures every rank. Nothing where it was stopped, as it
/// says. By --method full the weights are let go, if nobody else has them, once copies have been made of them.
template <Scalar T, class Optimizer, class Device, class Weights, class MomentsMemory>
std::optional<RunReport> train_and_measure(const FinetuneOptions& o, const OpenModel& model, const FinetuneData& data, const Device& device,
                                           Weights weights, const MomentsMemory& moments_memory, const StopSignal& signal) {
  using Backend = typename Device::Backend;
  const std::filesystem::path out = o.out;
  const RankSet ranks = ranks_of(o);
  const AdapterMethod method = adapter_method(o.method);
  const AdapterInit init = adapter_init(o.init, ranks.max());
  const bool scales = trains_scales(o), whole = trains_whole(o);
  const std::size_t base_bytes = weights->linear_bytes();
  const Recipe chosen = recipe_of(o);
  Decoder<T, Backend> decoder(std::move(weights), decoder_options(o), device.backend());
  Trainer<T, Backend, Optimizer> trainer(
      decoder, {.recipe = chosen, .ranks = ranks, .steps = o.steps, .lr = o.lr, .b_lr_ratio = o.lora_plus, .seed = o.seed},
      moments_memory);
  trainer.hold_back(to_batches(data.held_back, batch_tokens));
  const Index adapted = decoder.config().layers * static_cast<Index>(decoder.config().adapted(method).size());
  const Index trainable = trained_parameters(decoder);
  if (scales)
    std::printf("scales     of %lld of %lld planes of all %lld linear layers, %.2f M parameters\n",
                static_cast<long long>(o.trained_planes), static_cast<long long>(o.planes), static_cast<long long>(adapted),
                static_cast<double>(trainable) / 1e6);
  else if (whole)
    std::printf("weights    all %.2f M parameters train: %lld linear layers in %s, norms, embedding and head; masters in float32\n",
                static_cast<double>(trainable) / 1e6, static_cast<long long>(adapted), o.base.c_str());
  else
    std::printf(method == AdapterMethod::lora
                    ? "adapters   rank up to %lld on all %lld linear layers, %.1f M parameters, alpha %g, scale %s, recipe %s%s%s\n"
                    : "adapters   width up to %lld in %lld bottlenecks, %.1f M parameters, alpha %g, scale %s, recipe %s, %s%s\n",
                static_cast<long long>(ranks.max()), static_cast<long long>(adapted), static_cast<double>(trainable) / 1e6,
                static_cast<double>(o.alpha), std::string(name(chosen.scale)).c_str(), chosen.name.c_str(),
                method != AdapterMethod::lora ? o.method.c_str()
                : o.dora                      ? ", DoRA"
                                              : "",
                o.train_bias ? ", biases train" : "");
  if (!o.rank_pattern.empty()) std::printf("           ranks by pattern: %s\n", printable_utf8(o.rank_pattern).c_str());
  if (!o.alpha_pattern.empty()) std::printf("           alphas by pattern: %s\n", printable_utf8(o.alpha_pattern).c_str());
  if (!init.standard())
    std::printf("           begin as %s; rank 0 is %s\n", o.init.c_str(),
                init.changes_base() ? "not the model, but what they leave of it" : "the plain quantized model");
  std::fflush(stdout);

  make_folder(o.out);
  const std::string settings = settings_of(o, model, data).dump();
  RunReport report;
  auto& history = report.history;
  const auto stop = [&] { return signal.requested(); };
  // Losses and answers at ranks, as far as it gets before it is told to stop.
  const auto measure = [&](std::vector<Index> at) {
    auto results = evaluate_losses(decoder, data.validation_samples, at, stop);
    if (!data.questions.empty() && !stop())
      evaluate_answers(decoder, model.need_tokenizer(), model.chat_template(), data.questions, results, o.new_tokens, stop);
    return results;
  };
  if (whole) {  // later there is no base to measure; a run that goes on begins with it too
    std::printf("evaluating the model as it is ...\n");
    std::fflush(stdout);
    report.ranks = measure({1});
    if (stop()) {
      std::printf("stopped before the first step\n");
      return {};
    }
    report.ranks.front().rank = 0;
  }
  if (o.resume) {
    load_run_state(state_file(o), settings, decoder, trainer, history);
    std::printf("resumed    at step %lld of %lld\n", static_cast<long long>(trainer.step_count()), static_cast<long long>(o.steps));
  }

  DataOrder order(data.train, order_options(o));
  const auto training_start = std::chrono::steady_clock::now();
  const double seconds_before = history.seconds;
  const auto save = [&] {
    history.seconds = seconds_before + seconds_since(training_start);
    save_run_state(state_file(o), settings, decoder, trainer, history);
  };
  {
    Progress progress(o.steps, trainer.step_count());
    while (!trainer.done() && !signal.requested()) {
      const auto samples = order.step(trainer.step_count());
      const auto result = trainer.step(to_batches(samples, batch_tokens));
      history.step_losses.push_back(result.loss);
      history.tokens += result.tokens;
      progress.update(trainer.step_count(), result.tokens, result.loss, has_ranks(method) ? std::optional(result.rank) : std::nullopt);
      if (o.save_every > 0 && trainer.step_count() % o.save_every == 0 && !trainer.done()) save();
    }
  }
  save();
  if (!trainer.done()) {
    std::printf("\nstopped at step %lld of %lld; the state is in %s, --resume goes on\n", static_cast<long long>(trainer.step_count()),
                static_cast<long long>(o.steps), state_file(o).string().c_str());
    return {};
  }
  const auto activation_bytes = decoder.activation_bytes();  // evaluation needs less
  if (whole)
    save_whole_model(o, decoder);
  else if (scales)
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
  if (trainer.skipped_steps() > 0)
    std::printf("skipped    %lld steps whose gradient was not finite\n", static_cast<long long>(trainer.skipped_steps()));
  if (chosen.measure)
    std::printf(trainer.reordered_at_end() ? "auto       low ranks need no rows of their own here; re-ordered at the end\n"
                                           : "auto       %.0f %% of the later rows went to low ranks\n",
                100.0 * trainer.nested().share);
  std::printf(has_ranks(method) ? "evaluating every rank ...\n" : "evaluating ...\n");
  std::fflush(stdout);

  std::vector<Index> all = {0};
  if (whole) all.clear();
  all.insert(all.end(), ranks.begin(), ranks.end());
  auto results = measure(all);
  if (stop()) {
    std::printf(whole ? "stopped; the model is in %s\n" : "stopped; the adapter is in %s\n", (out / (whole ? "model" : "adapter")).c_str());
    return {};
  }

  measure_costs(decoder, results, stop);
  if (whole) {
    report.ranks.front().token_seconds = results.front().token_seconds;  // it computes the same
    results.front().tensor_bytes = whole_model_bytes(o);
  }
  report.ranks.insert(report.ranks.end(), std::make_move_iterator(results.begin()), std::make_move_iterator(results.end()));
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
                     {"train_bias", o.train_bias},
                     {"lora_plus", o.lora_plus},
                     {"init", o.init},
                     {"rank_pattern", printable_utf8(o.rank_pattern)},
                     {"alpha_pattern", printable_utf8(o.alpha_pattern)},
                     {"base_bytes", base_bytes},
                     {"adapter_parameters", trainable},
                     {"activation_bytes", activation_bytes},
                     {"nested_share", trainer.nested().share},
                     {"reordered_at_end", trainer.reordered_at_end()}};
  report.settings.update(device.facts());
  if (scales) report.settings.update(Json{{"planes", o.planes}, {"group_size", o.group_size}, {"trained_planes", o.trained_planes}});
  return report;
}

template <Scalar T, class Optimizer, class Device, class MomentsMemory>
int finetune_with(const FinetuneOptions& o, OpenModel& model, const FinetuneData& data, const Device& device,
                  const MomentsMemory& moments_memory) {
  const bool scales = trains_scales(o);
  const MemoryPlan plan = plan_memory<T>(o, data, model, device);
  std::printf("memory     planned, on %s\n%s", device.text().c_str(), plan.to_text().c_str());
  std::fflush(stdout);
  if constexpr (requires { device.expect_room(plan); }) device.expect_room(plan);

  const auto start = std::chrono::steady_clock::now();
  const BaseOptions stored = base_of<T>(o, data, model, device);
  auto weights = device.place(std::exchange(model.read, nullptr)(stored));
  const auto& w = *weights;
  std::printf("model      %s: %lld blocks of width %lld, %.1f M linear weights in %s, %.3f bits each (%.0f MB), read in %.1f s\n",
              model.name.c_str(), static_cast<long long>(w.config.layers), static_cast<long long>(w.config.width),
              static_cast<double>(w.config.linear_weights()) / 1e6, base_text(o).c_str(),
              bits_of(w), static_cast<double>(w.linear_bytes()) / 1e6, seconds_since(start));
  const StopSignal signal;
  auto report = train_and_measure<T, Optimizer>(o, model, data, device, trains_whole(o) ? std::move(weights) : weights, moments_memory, signal);
  if (!report) return 130;
  const RankSummary summary(report->ranks, o.keep);
  if (trains_whole(o)) show_whole(report->ranks.front(), report->ranks.back());
  else if (scales) show_scales(report->ranks);
  else print_table(report->ranks, summary);
  if (!data.questions.empty()) show_answers(report->ranks, data.questions, !has_ranks(adapter_method(o.method)));
  const std::size_t peak = device.peak();
  const auto megabytes = [](std::size_t bytes) { return static_cast<double>(bytes) / 1e6; };
  std::printf("\nmemory     %.0f MB planned, %.0f MB measured at most\n", megabytes(plan.total()), megabytes(peak));
  report->settings.update(Json{{"memory_plan", to_json(plan)}, {"peak_memory_bytes", peak}});
  if (const auto how = how_to_rival(o); how && !o.rival) report->settings["no_rival"] = *how;
  write_report(o.out, *report, summary);
  if (!has_ranks(adapter_method(o.method))) {
    const double base = report->ranks.front().loss, loss = report->ranks.back().loss;
    std::printf("\n%s %s %s: %.3f nats a token, %s %.3f\n", scales ? "The trained scales" : "The trained model",
                loss < base ? (scales ? "beat" : "beats") : (scales ? "do NOT beat" : "does NOT beat"), scales ? "the base" : "the one it was",
                loss, scales ? "the base" : "before", base);
    std::printf("wrote      %s: report.json, report.csv, %s, state.safetensors\n", o.out.c_str(),
                scales ? "adapter/ (scales)" : "model/ (config.json, model.safetensors)");
    return 0;
  }
  const auto worst = *std::max_element(report->ranks.begin() + 1, report->ranks.end(),
                                       [](const RankResult& a, const RankResult& b) { return a.loss < b.loss; });
  std::printf("\n%s: the worst rank, %lld, has %.3f nats a token, the base %.3f\n",
              worst.loss < report->ranks.front().loss ? "Every rank beats the base" : "NOT every rank beats the base",
              static_cast<long long>(worst.rank), worst.loss, report->ranks.front().loss);
  const bool lora = adapter_method(o.method) == AdapterMethod::lora;
  std::printf("wrote      %s: report.json, report.csv, ranks.svg, adapter/ (%s %lld), state.safetensors\n", o.out.c_str(),
              lora ? "PEFT, rank" : "bottlenecks, width", static_cast<long long>(report->ranks.back().rank));
  if (!o.rival) {
    if (const auto how = how_to_rival(o)) std::printf("rival      %s\n", how->c_str());
    return 0;
  }
  const FinetuneOptions of_rival = rival_of(o);
  std::printf("\nrival      QLoRA on the same batches, re-ordered by singular values at the end; in %s\n", of_rival.out.c_str());
  auto rival = train_and_measure<T, Optimizer>(of_rival, model, data, device, weights, moments_memory, signal);
  if (!rival) return 130;
  print_rival(*report, *rival, o.keep);
  const std::size_t peak_of_both = device.peak();
  std::printf("\nmemory     %.0f MB measured at most, with the rival\n", megabytes(peak_of_both));
  rival->settings["peak_memory_bytes"] = peak_of_both;
  write_report(o.out, *report, summary, &*rival);
  std::printf("wrote      %s: report.json, report.csv, ranks.svg with the rival, rival/adapter/ (PEFT, rank %lld)\n", o.out.c_str(),
              static_cast<long long>(rival->ranks.back().rank));
  return 0;
}

template <Scalar T, class Device>
int finetune(const FinetuneOptions& o, OpenModel& model, const FinetuneData& data, const Device& device) {
  using Backend = typename Device::Backend;
  return device.with_moments_memory(o.paged, [&]<class Memory>(const Memory& memory) {
    if (o.optimizer == "adamw8bit") return finetune_with<T, AdamW8bit<T, Backend, Memory>>(o, model, data, device, memory);
    if (o.optimizer == "lion") return finetune_with<T, Lion<T, Backend, Memory>>(o, model, data, device, memory);
    return finetune_with<T, AdamW<T, Backend, Memory>>(o, model, data, device, memory);
  });
}

}  // namespace qdylora::examples
