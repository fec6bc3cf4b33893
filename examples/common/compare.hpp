// What compare trains: every method and recipe on the same rows, from the same model, with the same budget.
#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/model/drawn_base.hpp>
#include <qdylora/model/trainer.hpp>

#include "compared_method.hpp"
#include "comparison.hpp"
#include "cpu_device.hpp"
#include "evaluation.hpp"
#include "model.hpp"
#include "open_model.hpp"
#include "progress.hpp"
#include "rows.hpp"
#include "signals.hpp"
#include "text.hpp"

namespace qdylora::examples {

struct CompareOptions {
  std::string model, tokenizer, data, recipes, chat = "model", seeds = "0,1,2", ranks = "1,2,4,8,16,32,64", base = "nf4", eval_formats;
  std::string init = "standard", against = "qdylora", compute = "automatic";
  std::string out = "compare.jsonl", choices, shots_file, choice_score = "letters";
  float alpha = 64.0f, alpha_over_rank = 16.0f;
  double lr = 3e-3;
  std::int64_t steps = 300;
  Index batch = 16, seq_len = 128, eval_rows = 64, answers = 0, new_tokens = 128, shots = 0;
  int threads = 0;
};

/// The tasks that runs are scored by beside their losses.
inline std::vector<std::string> tasks_of(const CompareOptions& o) {
  std::vector<std::string> names;
  if (o.answers > 0) names = {"exact match", "BLEU"};
  if (!o.choices.empty()) names.push_back("accuracy");
  return names;
}

/// What tells runs apart; a line of --results with another key is of another comparison.
inline Json key_of(const CompareOptions& o) {
  Json key = {{"model", printable_utf8(std::filesystem::path(o.model).filename().string())},
              {"data", printable_utf8(std::filesystem::path(o.data).filename().string())},
              {"base", o.base},
              {"ranks", o.ranks},
              {"alpha", o.alpha},
              {"alpha_over_rank", o.alpha_over_rank},
              {"lr", o.lr},
              {"steps", o.steps},
              {"batch", o.batch},
              {"seq_len", o.seq_len},
              {"eval_rows", o.eval_rows}};
  if (o.init != "standard") key["init"] = o.init;  // lines from before there were others have none
  if (o.chat != "model") key["chat"] = o.chat;
  if (o.compute != "automatic") key["compute"] = o.compute;
  if (o.answers > 0) key.update(Json{{"answers", o.answers}, {"max_new_tokens", o.new_tokens}});
  if (!o.choices.empty())
    key.update(Json{{"choices", printable_utf8(std::filesystem::path(o.choices).filename().string())},
                    {"shots", o.shots},
                    {"shots_file", printable_utf8(std::filesystem::path(o.shots_file).filename().string())},
                    {"choice_score", o.choice_score}});
  return key;
}

/// A model in one of the formats that it trains on, or that losses are measured on.
struct Base {
  std::string format;
  HostWeights weights;
  bool trains;
};

/// What all runs share.
struct CompareInput {
  CompareOptions options;
  std::vector<Base> bases;  // those that are trained on come first
  std::vector<std::string> eval_formats;
  OpenModel model;
  Rows rows;
  std::optional<ChoiceTask> choices;
  Cpu cpu;
};

/// Opens what the options name. Errors: bad_argument and unsupported for options that do not go together, and those of the files.
inline CompareInput open_input(const CompareOptions& o, const RankSet& ranks, const CpuDevice& device) {
  const Cpu& cpu = device.backend();
  const auto formats = parse_list("--base-format", o.base);
  const auto eval_formats = o.eval_formats.empty() ? formats : parse_list("--eval-formats", o.eval_formats);
  const AdapterInit init = adapter_init(o.init, ranks.max());
  QDYLORA_EXPECTS(init.standard() || (formats.size() == 1 && eval_formats == formats), bad_argument,
                  "--init " + o.init + ": adapters that begin with something of a base go with that base alone");
  std::vector<Base> bases;
  for (const auto* names : {&formats, &eval_formats})
    for (const auto& format : *names)
      if (std::none_of(bases.begin(), bases.end(), [&](const Base& b) { return b.format == format; }))
        bases.push_back({format, nullptr, names == &formats});
  QDYLORA_EXPECTS(std::count_if(bases.begin(), bases.end(), [](const Base& b) { return b.trains; }) == std::ssize(formats), bad_argument,
                  "--base-format: a format stands twice in '" + printable(o.base) + "'");
  const auto options_of = [&](const Base& base) { return BaseOptions{.format = base_format(base.format), .init = init}; };
  for (const auto& base : bases) static_cast<void>(options_of(base));
  const bool text = plain_text(o.data), llama2c = o.model.ends_with(".bin");
  QDYLORA_EXPECTS(o.answers == 0 || !text, bad_argument, "--answers: plain text asks nothing; give JSON lines");
  QDYLORA_EXPECTS(o.choices.empty() || !llama2c, unsupported, "--choices: a llama2.c model is compared on plain text alone");
  expect_rows_fit(o.data, llama2c);
  OpenModel model;
  for (auto& base : bases) {
    model = open_model(o.model, o.tokenizer, options_of(base), cpu);
    if (!init.calibrated()) base.weights = model.read(model.base);
  }
  if (!text || !o.choices.empty()) choose_chat_template(model, o.chat);
  expect_seq_len(o.seq_len, model.config);
  expect_ranks(ranks, model.config);
  Rows rows({.data = o.data, .seq_len = o.seq_len, .eval_rows = o.eval_rows, .answers = o.answers}, model);
  // On the same rows whatever --seeds: all lines of --results begin alike.
  if (init.calibrated()) bases.front().weights = model.read(calibrated<float>(model, rows.step(0, 0, calibration_rows), device));
  std::optional<ChoiceTask> choices;
  if (!o.choices.empty()) choices = choice_task(o.choices, o.shots_file, o.shots, o.choice_score, model);
  return {o, std::move(bases), eval_formats, std::move(model), std::move(rows), std::move(choices), cpu};
}

/// Adds what was measured at one rank, or of the base.
inline void add_measured(const RankResult& measured, ComparedRun& run) {
  const auto add_examples = [&](const std::string& measure, const std::vector<double>& scores) { run.examples[measure].push_back(scores); };
  run.losses.push_back(measured.loss);
  run.example_tokens = measured.example_tokens;
  add_examples(held_out_loss, measured.example_losses);
  if (measured.bleu) {
    run.scores["exact match"].push_back(100.0 * accuracy(measured.matches));
    add_examples("exact match", measured.matches);
    run.scores["BLEU"].push_back(measured.bleu->score);
    run.bleu_counts.push_back(measured.bleu_counts);
  }
  if (!measured.chosen.empty()) {
    run.scores["accuracy"].push_back(100.0 * accuracy(measured.chosen_right));
    add_examples("accuracy", measured.chosen_right);
  }
}

/// Takes all steps of a trainer, each after prepare(). False if it was stopped before the last.
template <class F>
bool take_steps(const CompareInput& in, Trainer<float>& trainer, std::int64_t steps, std::uint64_t seed, const StopSignal& signal,
                F&& prepare) {
  Progress progress(steps);
  while (!trainer.done()) {
    if (signal.requested()) return false;
    prepare();
    const auto report = trainer.step(in.rows.step(seed, trainer.step_count(), in.options.batch));
    progress.update(trainer.step_count(), report.tokens, report.loss, report.rank);
  }
  progress.finish();
  return true;
}

/// A decoder at ranks, by all that runs are measured by; cut short where it is told to stop.
inline std::vector<RankResult> measure(const CompareInput& in, Decoder<float>& decoder, const std::vector<Index>& ranks,
                                       const StopSignal& signal) {
  const auto stop = [&] { return signal.requested(); };
  const auto& questions = in.rows.to_answer();
  auto measured = evaluate_losses(decoder, in.rows.test(), ranks, stop);
  if (!questions.empty())
    evaluate_answers(decoder, in.model.need_tokenizer(), in.model.chat_template(), questions, measured, in.options.new_tokens, stop);
  if (in.choices) evaluate_choices(decoder, *in.choices, measured, stop);
  if (!stop() && !questions.empty()) evaluate_bleu(questions, measured);
  return measured;
}

/// One training run, measured on each of the bases, or on the method's own alone, at `ranks` and, where `base` says so, without an adapter
/// as the last. What has no ranks has the same value at all. Empty if it was stopped. Errors: bad_argument for too few steps.
inline std::vector<ComparedRun> train(const CompareInput& in, const RankSet& ranks, bool base, const ComparedMethod& method,
                                      std::uint64_t seed, const StopSignal& signal) {
  const auto& o = in.options;
  const Recipe& chosen = method.recipe;
  const bool whole = method.method == AdapterMethod::full;
  const RankSet own = has_ranks(method.method) ? ranks : RankSet{1};
  const float alpha = method.separate || chosen.scale != ScalePolicy::constant ? o.alpha_over_rank : o.alpha;
  DecoderOptions options{.lora = adapter_options(chosen, own, alpha, seed), .method = method.method};
  options.lora.dora = method.dora;
  HostWeights weights = method.base ? in.model.read(*method.base) : in.bases.front().weights;
  double base_bits = bits_of(*weights);
  Decoder<float> decoder(std::move(weights), options, in.cpu);
  std::vector<RankResult> before;  // of a model that trains whole, of which no base is kept
  if (whole) before = measure(in, decoder, {1}, signal);

  // Measuring is paid for: a forward pass costs a third of a training row, and every held-back row is run at every rank and without.
  const Index held_back = chosen.measure ? held_back_rows(o.steps * o.batch, own.size()) : 0;
  const std::int64_t steps = o.steps - (held_back * (own.size() + 1) + 3 * o.batch - 1) / (3 * o.batch);
  QDYLORA_EXPECTS(steps >= 1, bad_argument, "--steps: too few to pay for what " + method.name + " measures");
  Trainer<float> trainer(decoder, {.recipe = chosen,
                                   .ranks = own,
                                   .steps = steps,
                                   .lr = method.lr * o.lr,
                                   .b_lr_ratio = method.lora_plus,
                                   .seed = seed});
  std::vector<Sample> back;
  for (Index i = 0; i < held_back; ++i) back.push_back(in.rows.row(seed, -1 - i));
  trainer.hold_back(to_batches(back, 2048));
  std::vector<const DecoderWeights<float>*> trained;
  for (const auto& b : in.bases)
    if (b.trains) trained.push_back(b.weights.get());
  const auto draw_base = [&] {
    if (trained.size() > 1) set_base(decoder, *trained[drawn_base(seed, trainer.step_count(), trained.size())]);
  };
  if (!take_steps(in, trainer, steps, seed, signal, draw_base)) return {};

  const Index parameters = trained_parameters(decoder);
  std::vector<Index> at(own.begin(), own.end());
  if (base && !whole) at.push_back(0);
  std::vector<ComparedRun> runs;
  for (const auto& format : in.eval_formats) {
    if (!method.base) {
      const auto on = std::find_if(in.bases.begin(), in.bases.end(), [&](const Base& b) { return b.format == format; });
      set_base(decoder, *on->weights);
      base_bits = bits_of(*on->weights);
    }
    auto measured = measure(in, decoder, at, signal);
    if (signal.requested()) return {};
    measured.insert(measured.begin(), static_cast<std::size_t>(ranks.size() - own.size()), RankResult(measured.front()));
    measured.insert(measured.end(), before.begin(), before.end());
    auto& run = runs.emplace_back(ComparedRun{.recipe = method.name,
                                              .seed = seed,
                                              .on = format,
                                              .losses = {},
                                              .share = trainer.nested().share,
                                              .parameters = parameters,
                                              .base_bits = base_bits});
    for (const auto& at_rank : measured) add_measured(at_rank, run);
  }
  return runs;
}

/// At every rank what its own run has. Empty if one was stopped.
inline std::vector<ComparedRun> train_separately(const CompareInput& in, const RankSet& ranks, const ComparedMethod& method,
                                                 std::uint64_t seed, const StopSignal& signal) {
  std::vector<ComparedRun> all;
  const auto append = [](auto& to, const auto& from) { to.insert(to.end(), from.begin(), from.end()); };
  for (const Index rank : ranks) {
    const auto own = train(in, RankSet{rank}, /*base=*/rank == ranks.max(), method, seed, signal);
    if (own.empty()) return {};
    if (all.empty()) {
      all = own;
      continue;
    }
    for (std::size_t i = 0; i < all.size(); ++i) {
      append(all[i].losses, own[i].losses);
      append(all[i].bleu_counts, own[i].bleu_counts);
      for (const auto& [task, scores] : own[i].scores) append(all[i].scores[task], scores);
      for (const auto& [measure, scores] : own[i].examples) append(all[i].examples[measure], scores);
      all[i].parameters = own[i].parameters;
    }
  }
  return all;
}

}  // namespace qdylora::examples
