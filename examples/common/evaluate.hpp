// What evaluate does once its model is open, for any type of activations and any device.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdio>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/io/npy.hpp>
#include <qdylora/io/safetensors.hpp>
#include <qdylora/model/saved_modules.hpp>

#include "adapters.hpp"
#include "dataset.hpp"
#include "evaluation.hpp"
#include "open_model.hpp"
#include "report.hpp"
#include "text.hpp"

namespace qdylora::examples {

struct EvaluateOptions {
  std::string model, tokenizer, adapter, data, ids, logits, choices, shots_file, ranks, out;
  std::string chat = "model", base = "nf4", device = "cpu", dtype = "float32", compute = "automatic", choice_score = "letters";
  std::optional<Index> rank;
  Index seq_len = 512, answers = 0, new_tokens = 128, max_examples = 1'000'000, shots = 0;
  int threads = 0;
  double keep = 0.99;
  bool bleu = false;
};

/// What is measured at every rank, read and in tokens.
struct EvaluationTasks {
  Samples samples;
  std::vector<Example> questions;  // to answer
  std::optional<ChoiceTask> choices;
};

/// Reads what the options name. Errors: those of the files, and bad_argument where nothing of one can be scored.
inline EvaluationTasks read_tasks(const EvaluateOptions& o, const OpenModel& model) {
  EvaluationTasks tasks;
  if (!o.data.empty()) {
    auto examples = load_examples(o.data);
    expect_seq_len(o.seq_len, model.config);
    if (o.max_examples < static_cast<Index>(examples.size())) examples.resize(static_cast<std::size_t>(o.max_examples));
    tasks.samples = tokenize(examples, model.need_tokenizer(), {.chat = model.chat_template(), .max_length = o.seq_len});
    if (tasks.samples.samples.empty())
      throw Error(Errc::bad_argument, "no example has a scored token within --seq-len " + std::to_string(o.seq_len), {.file = o.data});
    const Index answers = o.bleu && o.answers == 0 ? o.max_examples : o.answers;
    tasks.questions = questions(examples, model.need_tokenizer(), model.chat_template(), o.seq_len, answers);
    if (answers > 0 && tasks.questions.empty())
      throw Error(Errc::bad_argument,
                  (o.bleu ? "--bleu" : "--answers") + std::string(": no example has a prompt within --seq-len ") + std::to_string(o.seq_len),
                  {.file = o.data});
  }
  if (!o.choices.empty()) {
    tasks.choices = choice_task(o.choices, o.shots_file, o.shots, o.choice_score, model);
    if (o.max_examples < static_cast<Index>(tasks.choices->prompts.size())) tasks.choices->resize(static_cast<std::size_t>(o.max_examples));
  }
  return tasks;
}

/// The ranks that are measured: those of --ranks; else --rank; else, where tasks are scored, 0 and those that the adapter was made for; else
/// all of the adapter. Errors: rank_range.
inline std::vector<Index> ranks_to_measure(const EvaluateOptions& o, const OpenAdapter& open) {
  const auto& adapter = open.peft;
  const bool any = adapter || open.alpha;
  const Index most = open.max_rank();
  std::vector<Index> ranks;
  if (!o.ranks.empty()) {
    ranks = parse_numbers<Index>("--ranks", o.ranks);
  } else if (o.rank || (o.choices.empty() && !o.bleu)) {
    ranks = {o.rank.value_or(most)};
  } else {
    ranks = {0};
    for (const Index rank : adapter ? adapter->ranks : std::vector<Index>{})
      if (rank < most) ranks.push_back(rank);
    if (adapter && adapter->ranks.empty())  // no word of ours in the file
      for (Index rank = 1; rank < most; rank *= 2) ranks.push_back(rank);
    if (any) ranks.push_back(most);
  }
  for (const Index rank : ranks) {
    QDYLORA_EXPECTS(std::count(ranks.begin(), ranks.end(), rank) == 1, bad_argument, "--ranks: rank " + std::to_string(rank) + " twice");
    QDYLORA_EXPECTS(any || rank == 0, rank_range, "rank " + std::to_string(rank) + " needs --adapter");
    QDYLORA_EXPECTS(rank <= most, rank_range, "rank " + std::to_string(rank) + ": the adapter has ranks 0 ... " + std::to_string(most));
  }
  return ranks;
}

inline void print_tasks(const std::vector<RankResult>& results, const EvaluationTasks& tasks, const AboveFirst& above_first) {
  const auto first = static_cast<long long>(results.front().rank);
  const auto share = [](const std::vector<double>& scores) {
    const auto interval = accuracy_interval(count_right(scores), std::ssize(scores));
    char text[96];
    std::snprintf(text, sizeof text, "%lld of %zu, %.1f %% [%.1f, %.1f]", static_cast<long long>(count_right(scores)), scores.size(),
                  100.0 * interval.value, 100.0 * interval.low, 100.0 * interval.high);
    return std::string(text);
  };
  for (std::size_t i = 0; i < results.size(); ++i) {
    const auto& r = results[i];
    const auto points_above = [&](const std::vector<Interval>& differences) {
      if (i == 0) return std::string();
      const auto& points = differences[i];
      char text[96];
      std::snprintf(text, sizeof text, ", %+.1f points [%+.1f, %+.1f] above rank %lld", 100.0 * points.value, 100.0 * points.low,
                    100.0 * points.high, first);
      return std::string(text);
    };
    const auto rank = static_cast<long long>(r.rank);
    if (!tasks.samples.samples.empty()) {
      std::printf("rank %lld: loss %.4f nats a token, perplexity %.4f, on %zu examples", rank, r.loss, std::exp(r.loss),
                  tasks.samples.samples.size());
      if (tasks.samples.truncated + tasks.samples.dropped > 0)
        std::printf(" (%lld cut, %lld left out)", static_cast<long long>(tasks.samples.truncated),
                    static_cast<long long>(tasks.samples.dropped));
      if (i > 0)
        std::printf(", %+.4f [%+.4f, %+.4f] above rank %lld", above_first.loss[i].value, above_first.loss[i].low,
                    above_first.loss[i].high, first);
      std::printf("\n");
    }
    if (!r.matches.empty())
      std::printf("rank %lld: exact match %s%s\n", rank, share(r.matches).c_str(), points_above(above_first.match).c_str());
    if (r.bleu) {
      std::printf("rank %lld: BLEU %.2f, brevity penalty %.3f, on %zu answers", rank, r.bleu->score, r.bleu->brevity_penalty,
                  r.texts.size());
      if (i > 0)
        std::printf(", %+.2f [%+.2f, %+.2f] above rank %lld", above_first.bleu[i].value, above_first.bleu[i].low, above_first.bleu[i].high,
                    first);
      std::printf("\n");
    }
    if (!r.chosen.empty())
      std::printf("rank %lld: accuracy %s%s\n", rank, share(r.chosen_right).c_str(), points_above(above_first.choice).c_str());
    std::printf("rank %lld: %.2f M parameters, %.2f MB, %.2f ms a token\n", rank, static_cast<double>(r.parameters) / 1e6,
                static_cast<double>(r.bytes()) / 1e6, 1e3 * r.token_seconds);
  }
}

template <class T, class Backend>
void write_logits(Decoder<T, Backend>& decoder, const std::vector<std::int32_t>& ids, const std::string& file) {
  Batch batch;
  batch.ids = ids;
  batch.targets.assign(ids.size(), -1);
  batch.offsets.push_back(batch.tokens());
  const auto there = decoder.logits(batch);
  Matrix<float> logits(there.rows(), there.cols());
  decoder.backend().download(there.view(), logits.view());
  if (file.ends_with(".npy")) {
    write_npy<float>(file, logits.view());
  } else {
    SafetensorsWriter writer;
    writer.add("logits", logits.view());
    writer.write(file);
  }
  std::printf("wrote %s: logits, float32 [%lld, %lld]\n", file.c_str(), static_cast<long long>(logits.rows()),
              static_cast<long long>(logits.cols()));
}

template <Scalar T, class Device>
int evaluate(const EvaluateOptions& o, const OpenAdapter& open, OpenModel& model, const Device& device) {
  const auto& adapter = open.peft;
  const auto ids = o.ids.empty() ? std::vector<std::int32_t>{} : parse_numbers<std::int32_t>("--ids", o.ids);
  const auto ranks = ranks_to_measure(o, open);
  QDYLORA_EXPECTS(ids.empty() || ranks.size() == 1, bad_argument, "--logits are of one rank; give --rank, not --ranks");
  const LoRAOptions lora = adapter ? lora_options(*adapter) : LoRAOptions{.max_rank = 1};
  const auto tasks = ids.empty() ? read_tasks(o, model) : EvaluationTasks{};  // before anything large is read
  if (!o.out.empty()) make_folder(o.out);
  auto read = std::exchange(model.read, nullptr)(model.base);
  if (adapter) at_tensor(o.adapter, "", [&] { replace_modules(*read, adapter->saved); });
  const auto weights = device.place(std::move(read));
  const AlphaOptions alpha{.trained_planes = open.alpha ? open.alpha->trained_planes : 1};
  Decoder<T, typename Device::Backend> decoder(weights, {.lora = lora, .method = open.method(), .alpha = alpha}, device.backend());
  if (adapter) assign_adapter(*adapter, o.adapter, decoder);
  if (open.alpha) change_alpha_layers(decoder, [&](const auto& layers) { load_alphas(o.adapter, layers); });
  decoder.set_ranks(RankPlan::uniform(ranks.front()));
  if (!ids.empty()) {
    write_logits(decoder, ids, o.logits);
    return 0;
  }
  std::vector<RankResult> results(ranks.size());
  for (std::size_t i = 0; i < ranks.size(); ++i) results[i].rank = ranks[i];
  if (!o.data.empty()) results = evaluate_losses(decoder, tasks.samples.samples, ranks);
  if (!tasks.questions.empty())
    evaluate_answers(decoder, model.need_tokenizer(), model.chat_template(), tasks.questions, results, o.new_tokens);
  if (o.bleu) evaluate_bleu(tasks.questions, results);
  if (tasks.choices) evaluate_choices(decoder, *tasks.choices, results);
  measure_costs(decoder, results);
  if (adapter)  // whole modules are the same at every rank
    for (const auto& tensor : adapter->saved.tensors)
      for (auto& result : results) result.parameters += tensor.value.size();
  const AboveFirst above_first(results);
  print_tasks(results, tasks, above_first);
  print_curves(rank_curves(results, o.keep), o.keep);
  if (!o.out.empty()) {
    Json settings{{"model", model.name},
                  {"adapter", printable_utf8(o.adapter)},
                  {"base", open.alpha ? "binary" + std::to_string(open.alpha->code.planes) : o.base},
                  {"dtype", o.dtype},
                  {"device", o.device},
                  {"chat", model.chat ? model.chat->name : "none"}};
    if (!o.data.empty()) settings.update(Json{{"data", printable_utf8(o.data)}, {"seq_len", o.seq_len}, {"max_new_tokens", o.new_tokens}});
    if (tasks.choices) {
      settings.update(Json{{"choices", printable_utf8(o.choices)}, {"shots", o.shots}, {"choice_score", o.choice_score}});
      for (const auto& prompt : tasks.choices->prompts) settings["right_choices"].push_back(prompt.answer);
    }
    write_evaluation(o.out, settings, results, above_first, o.keep);
    std::printf("wrote %s: report.json, report.csv\n", o.out.c_str());
  }
  return 0;
}

}  // namespace qdylora::examples
