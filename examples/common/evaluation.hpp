// What a model does at each rank: loss on held-out answers, how many answers it gets right and their BLEU, and what it chooses of answers that
// are given.
#pragma once

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <numeric>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include <qdylora/model/bleu.hpp>
#include <qdylora/model/generate.hpp>
#include <qdylora/model/score.hpp>

#include "choices.hpp"
#include "dataset.hpp"
#include "open_model.hpp"

namespace qdylora::examples {

inline constexpr Index batch_tokens = 1024;  // of a micro-batch, at most

/// Cuts samples into batches of at most `tokens` tokens (a longer sample stands alone).
inline std::vector<Batch> to_batches(std::span<const Sample> samples, Index tokens) {
  std::vector<Batch> batches;
  for (const auto& sample : samples) {
    if (batches.empty() || batches.back().tokens() + static_cast<Index>(sample.ids.size()) > tokens) batches.emplace_back();
    batches.back().add(sample.ids, sample.prompt_length);
  }
  return batches;
}

struct RankResult {
  Index rank = 0;                      // 0: the base model
  double loss = 0.0;                   // nats a scored token
  std::vector<double> example_losses;  // the same of each example, for paired comparisons
  std::vector<double> example_tokens;  // scored in each example
  Index parameters = 0;                // of the adapter at this rank, or all that trained
  double token_seconds = 0.0;          // to write one token
  std::vector<std::string> texts;      // the answers written
  std::vector<double> matches;         // of each 1 if it matches exactly, else 0
  std::optional<Bleu> bleu;            // of the answers written
  std::vector<BleuCounts> bleu_counts; // of each of them
  std::vector<std::size_t> chosen;     // of each multiple-choice question
  std::vector<double> chosen_right;    // likewise 1 or 0

  Index tensor_bytes = 0;              // of a file whose tensors are not all float32; else 0

  /// Of the adapter cut to this rank, as the tensors of its file hold it, all float32 (PEFT's, or ours of bottlenecks and scales).
  Index bytes() const noexcept { return tensor_bytes > 0 ? tensor_bytes : static_cast<Index>(sizeof(float)) * parameters; }
};

/// How many examples are right, of scores of 1 and 0.
inline Index count_right(const std::vector<double>& scores) { return std::count(scores.begin(), scores.end(), 1.0); }

/// Their share; 0 of none.
inline double accuracy(const std::vector<double>& scores) {
  return scores.empty() ? 0.0 : static_cast<double>(count_right(scores)) / static_cast<double>(scores.size());
}

/// Loss at each of `ranks`.
template <class T, class Backend>
std::vector<RankResult> evaluate_losses(
    Decoder<T, Backend>& model, std::span<const Sample> samples, std::span<const Index> ranks,
    const std::function<bool()>& stop = [] { return false; }) {
  model.set_training(false);
  std::vector<RankResult> results;
  const auto batches = to_batches(samples, batch_tokens);
  for (const Index rank : ranks) {
    RankResult result;
    result.rank = rank;
    model.set_ranks(RankPlan::uniform(rank));
    double sum = 0.0;
    Index scored = 0;
    for (const auto& batch : batches) {
      if (stop()) return results;
      const auto losses = model.losses(batch);
      std::size_t next = 0;
      for (Index s = 0; s < batch.sequences(); ++s) {
        double own = 0.0;
        Index count = 0;
        for (Index t = batch.offsets[static_cast<std::size_t>(s)]; t < batch.offsets[static_cast<std::size_t>(s) + 1]; ++t)
          if (batch.targets[static_cast<std::size_t>(t)] >= 0) {
            own += losses[next++];
            ++count;
          }
        result.example_losses.push_back(count > 0 ? own / static_cast<double>(count) : 0.0);
        result.example_tokens.push_back(static_cast<double>(count));
        sum += own;
        scored += count;
      }
    }
    result.loss = scored > 0 ? sum / static_cast<double>(scored) : 0.0;
    QDYLORA_EXPECTS(std::isfinite(result.loss), non_finite, "rank " + std::to_string(rank) + ": the held-out loss is not finite");
    results.push_back(std::move(result));
  }
  return results;
}

/// Bits that a linear weight takes, with its share of scales.
template <class Weights>
double bits_of(const Weights& weights) {
  return 8.0 * static_cast<double>(weights.linear_bytes()) / static_cast<double>(weights.config.linear_weights());
}

/// Numbers that train.
template <class Model>
Index trained_parameters(const Model& model) {
  Index sum = 0;
  for (const auto& p : model.parameters()) sum += p->value.size();
  return sum;
}

/// That measure_costs writes in a run, with a cache for them and for the one they begin with.
inline constexpr Index timed_tokens = 16;

/// Parameters at each rank, and the seconds that one token takes, alone in its batch: the fewest of three runs, or of those that begin
/// within a second, after which noise weighs little.
template <class T, class Backend>
void measure_costs(
    Decoder<T, Backend>& model, std::vector<RankResult>& results, const std::function<bool()>& stop = [] { return false; }) {
  constexpr Index rounds = 3;
  constexpr double long_enough = 1.0;
  const std::vector<std::vector<std::int32_t>> prompts = {{0}};
  for (auto& result : results) {
    model.for_each_trained([&](const auto& linear) {
      const Index rank = std::min(result.rank, linear.rank_limit());
      result.parameters += rank * (linear.in() + linear.out()) +
                           (rank > 0 ? (linear.adapter().dora() + linear.adapter().biased()) * linear.out() : 0);
    });
    if (result.rank > 0 && !has_ranks(model.options().method)) result.parameters += trained_parameters(model);
    double spent = 0.0;
    for (Index round = 0; round < rounds && spent < long_enough && !stop(); ++round) {
      const auto start = std::chrono::steady_clock::now();
      const auto written = generate(model, std::span<const std::vector<std::int32_t>>(prompts), RankPlan::uniform(result.rank),
                                    {.max_tokens = timed_tokens});  // fewer where the context is shorter
      const std::chrono::duration<double> taken = std::chrono::steady_clock::now() - start;
      spent += taken.count();
      const double each = taken.count() / static_cast<double>(written.front().size());
      result.token_seconds = round == 0 ? each : std::min(result.token_seconds, each);
    }
  }
}

/// The first `count` examples that ask, with a prompt that leaves room for an answer in `length` tokens.
inline std::vector<Example> questions(std::span<const Example> examples, const Tokenizer& tokenizer, const ChatTemplate* chat, Index length,
                                      Index count) {
  std::vector<Example> chosen;
  for (const auto& e : examples) {
    if (static_cast<Index>(chosen.size()) >= count) break;
    if (!e.prompt.empty() && static_cast<Index>(prompt_ids(e, tokenizer, chat).size()) < length) chosen.push_back(e);
  }
  return chosen;
}

/// Examples that are answered together, at every rank: about as many sequences as keep the caches of a small model below the memory of
/// training.
constexpr std::size_t answered_at_once(Index max_tokens, std::size_t ranks) noexcept {
  const auto sequences = static_cast<std::size_t>(std::clamp<Index>(32768 / std::max<Index>(max_tokens, 1), 1, 64));
  return std::max<std::size_t>(1, sequences / std::max<std::size_t>(ranks, 1));
}

/// Writes an answer to every example at every rank, greedily, many ranks in one batch unless the model takes one alone, and fills in texts
/// and matches.
template <class T, class Backend>
void evaluate_answers(
    Decoder<T, Backend>& model, const Tokenizer& tokenizer, const ChatTemplate* chat, std::span<const Example> examples,
    std::span<RankResult> results, Index max_tokens, const std::function<bool()>& stop = [] { return false; }) {
  if (model.options().method == AdapterMethod::alpha && results.size() > 1) {
    for (auto& result : results) evaluate_answers(model, tokenizer, chat, examples, std::span(&result, 1), max_tokens, stop);
    return;
  }
  const std::size_t examples_at_once = answered_at_once(max_tokens, results.size());
  for (std::size_t begin = 0; begin < examples.size(); begin += examples_at_once) {
    if (stop()) return;
    const auto part = examples.subspan(begin, std::min(examples_at_once, examples.size() - begin));
    std::vector<std::vector<std::int32_t>> prompts;
    std::vector<Index> ranks;
    for (const auto& result : results)
      for (const auto& example : part) {
        prompts.push_back(prompt_ids(example, tokenizer, chat));
        ranks.push_back(result.rank);
      }
    const auto answers = generate(model, std::span<const std::vector<std::int32_t>>(prompts), RankPlan::per_row(ranks),
                                  {.max_tokens = max_tokens, .stop_token = end_of_answer(tokenizer, chat)});
    std::size_t next = 0;
    for (auto& result : results)
      for (const auto& example : part) {
        auto text = tokenizer.decode(answers[next++], {.skip_special = true});
        result.matches.push_back(exact_match(text, example) ? 1.0 : 0.0);
        result.texts.push_back(std::move(text));
      }
  }
}

/// BLEU of the answers that evaluate_answers wrote to `examples`, against all right responses of each.
inline void evaluate_bleu(std::span<const Example> examples, std::vector<RankResult>& results) {
  std::vector<std::vector<std::string>> references;
  for (const auto& example : examples) references.push_back(example.references());
  for (auto& result : results) {
    result.bleu_counts = corpus_counts(result.texts, references);
    result.bleu = corpus_bleu(result.bleu_counts);
  }
}

/// Multiple-choice questions, ready to be asked of a model.
struct ChoiceTask {
  ChoiceScore score = ChoiceScore::letters;  // what choose goes by
  std::vector<ChoicePrompt> prompts;
  std::vector<Continuations> ids;  // of each prompt

  void resize(std::size_t count) {
    prompts.resize(count);
    ids.resize(count);
  }

  /// The choice of the highest score, the first of equals. log_likelihoods: of each choice of question i.
  std::size_t choose(std::size_t i, std::span<const double> log_likelihoods) const {
    std::vector<double> scores(log_likelihoods.begin(), log_likelihoods.end());
    if (score == ChoiceScore::answers)
      for (std::size_t c = 0; c < scores.size(); ++c) scores[c] /= static_cast<double>(code_points(prompts[i].choices[c]));
    return static_cast<std::size_t>(std::max_element(scores.begin(), scores.end()) - scores.begin());
  }

 private:
  static Index code_points(std::string_view text) {
    Index count = 0;
    for (std::size_t at = 0; at < text.size(); at += decode_utf8(text, at).length) ++count;
    return count;
  }
};

/// Of "letters" or "answers". Errors: bad_argument.
inline ChoiceScore choice_score(const std::string& name) {
  if (name == "letters") return ChoiceScore::letters;
  QDYLORA_EXPECTS(name == "answers", bad_argument, "--choice-score: expected letters or answers, found '" + printable(name) + "'");
  return ChoiceScore::answers;
}

/// The questions of a file, or "sample", in the tokens of a model. shots_file: where the answered ones before each are
/// from; "": the sample's own, else the file of the questions. Errors: those of load_choices, choice_prompts and choice_ids.
inline ChoiceTask choice_task(const std::string& file, const std::string& shots_file, Index shots, const std::string& score,
                              const OpenModel& model) {
  const bool sample = file == "sample";
  const auto asked = sample ? read_choices(file, sample_questions, ".jsonl") : load_choices(file);
  std::optional<ChoiceFile> dev;
  if (!shots_file.empty()) dev = load_choices(shots_file);
  else if (sample) dev = read_choices("sample", sample_shots, ".jsonl");
  ChoiceTask task{choice_score(score), choice_prompts(asked, dev ? &*dev : nullptr, shots, choice_score(score)), {}};
  for (const auto& prompt : task.prompts)
    task.ids.push_back(choice_ids(prompt, model.need_tokenizer(), model.chat_template(), model.config.context, asked.file));
  return task;
}

/// Fills in what the model chooses at the ranks of `results`, a pass over each prompt.
template <class T, class Backend>
void evaluate_choices(
    Decoder<T, Backend>& model, const ChoiceTask& task, std::vector<RankResult>& results,
    const std::function<bool()>& stop = [] { return false; }) {
  for (auto& result : results)
    for (std::size_t begin = 0, end; begin < task.ids.size(); begin = end) {
      if (stop()) return;
      std::size_t tokens = task.ids[begin].prompt.size();  // a longer prompt stands alone
      for (end = begin + 1; end < task.ids.size(); ++end) {
        tokens += task.ids[end].prompt.size();
        if (tokens > static_cast<std::size_t>(batch_tokens)) break;
      }
      const auto found = log_likelihoods(model, std::span(task.ids).subspan(begin, end - begin), RankPlan::uniform(result.rank));
      for (std::size_t i = begin; i < end; ++i) {
        result.chosen.push_back(task.choose(i, found[i - begin]));
        result.chosen_right.push_back(result.chosen.back() == task.prompts[i].answer ? 1.0 : 0.0);
      }
    }
}

}  // namespace qdylora::examples
