// Log-likelihoods of texts that may follow a prompt, such as the answers to a multiple-choice question. The prompt is run once for all its
// texts, which go on from copies of its keys and values.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/model/decoder.hpp>

namespace qdylora {

/// Token ids of a prompt and of each text that may follow it.
struct Continuations {
  std::vector<std::int32_t> prompt;
  std::vector<std::vector<std::int32_t>> texts;
};

namespace detail {

/// ln softmax of a row of logits, at any of its tokens.
template <class S>
class LogSoftmax {
 public:
  explicit LogSoftmax(std::span<const S> logits) : logits_(logits) {
    const auto most = static_cast<double>(*std::max_element(logits.begin(), logits.end()));
    double sum = 0.0;
    for (const S x : logits) sum += std::exp(static_cast<double>(x) - most);
    normalizer_ = most + std::log(sum);
    QDYLORA_EXPECTS(std::isfinite(normalizer_), non_finite, "log_likelihoods: the logits are not finite");
  }
  double operator()(std::int32_t token) const noexcept {
    return static_cast<double>(logits_[static_cast<std::size_t>(token)]) - normalizer_;
  }

 private:
  std::span<const S> logits_;
  double normalizer_ = 0.0;
};

/// A cache of its own with the same tokens, and room for `capacity`.
template <class Model>
typename Model::Cache copy_of(const typename Model::Cache& cache, Index capacity, const Model& model) {
  typename Model::Cache copy(model.config(), capacity);
  for (std::size_t i = 0; i < cache.keys.size(); ++i) {
    model.backend().copy(cache.keys[i].view().top_rows(cache.length), copy.keys[i].view().top_rows(cache.length));
    model.backend().copy(cache.values[i].view().top_rows(cache.length), copy.values[i].view().top_rows(cache.length));
  }
  copy.length = cache.length;
  return copy;
}

}  // namespace detail

/// [prompt][text] ln P(text | prompt) in nats, summed over the text's tokens, at the rank that `ranks` gives the prompt. All prompts make one
/// batch, and texts of one token take no other pass. Leaves the model at full rank with dropout off. Errors: bad_argument (a prompt or text
/// that is empty, one that does not fit the context, a token outside of the vocabulary), non_finite (logits).
template <class T, class Backend>
std::vector<std::vector<double>> log_likelihoods(Decoder<T, Backend>& model, std::span<const Continuations> asked, const RankPlan& ranks) {
  using Model = Decoder<T, Backend>;
  using Cache = typename Model::Cache;
  using Acc = typename Model::Acc;
  struct Text {
    std::size_t prompt, text;
  };
  std::vector<std::vector<double>> sums(asked.size());
  if (asked.empty()) return sums;
  const std::vector<Index> rank_of = ranks.of_rows(static_cast<Index>(asked.size()));
  Batch batch;
  std::vector<Cache> caches;
  for (std::size_t i = 0; i < asked.size(); ++i) {
    const auto& prompt = asked[i].prompt;
    const auto who = [i] { return "log_likelihoods: prompt " + std::to_string(i); };
    QDYLORA_EXPECTS(!prompt.empty(), bad_argument, who() + " is empty");
    for (const auto& text : asked[i].texts) {
      QDYLORA_EXPECTS(!text.empty(), bad_argument, who() + " has an empty text after it");
      const auto length = static_cast<Index>(prompt.size() + text.size()) - 1;
      QDYLORA_EXPECTS(length <= model.config().context, bad_argument,
                      who() + " and a text after it take " + std::to_string(length) + " tokens, the model's context is " +
                          std::to_string(model.config().context));
      for (const auto token : text)
        QDYLORA_EXPECTS(token >= 0 && token < model.config().vocab, bad_argument,
                        "token id " + std::to_string(token) + " is outside the vocabulary of " + std::to_string(model.config().vocab));
    }
    batch.ids.insert(batch.ids.end(), prompt.begin(), prompt.end());
    batch.offsets.push_back(batch.tokens());
    caches.emplace_back(model.config(), static_cast<Index>(prompt.size()));
    sums[i].resize(asked[i].texts.size());
  }
  model.set_training(false);
  Matrix<Acc> logits;
  const auto run = [&](const std::vector<Index>& rows) {
    model.set_ranks(RankPlan::per_row(rows));
    batch.targets.assign(batch.ids.size(), -1);
    const auto there = model.infer(batch, caches);
    logits.resize(there.rows(), there.cols());
    model.backend().download(there.view(), logits.view());
  };
  const auto row = [&](std::size_t i) {
    const auto vocab = static_cast<std::size_t>(logits.cols());
    return detail::LogSoftmax<Acc>(std::as_const(logits).span().subspan(i * vocab, vocab));
  };

  run(rank_of);
  Batch next;
  std::vector<Cache> next_caches;
  std::vector<Text> running;  // texts with tokens to come, a row of the batch each
  for (std::size_t i = 0; i < asked.size(); ++i) {
    const auto log_probability = row(i);
    for (std::size_t t = 0; t < asked[i].texts.size(); ++t) {
      const auto& text = asked[i].texts[t];
      sums[i][t] = log_probability(text.front());
      if (text.size() == 1) continue;
      next.ids.push_back(text.front());
      next.offsets.push_back(next.tokens());
      next_caches.push_back(detail::copy_of(caches[i], caches[i].length + static_cast<Index>(text.size()) - 1, model));
      running.push_back({i, t});
    }
  }
  for (std::size_t at = 1; !running.empty(); ++at) {
    batch = std::exchange(next, {});
    caches = std::exchange(next_caches, {});
    std::vector<Index> rows;
    for (const auto& r : running) rows.push_back(rank_of[r.prompt]);
    run(rows);
    std::vector<Text> still;
    for (std::size_t s = 0; s < running.size(); ++s) {
      const auto [i, t] = running[s];
      const auto& text = asked[i].texts[t];
      sums[i][t] += row(s)(text[at]);
      if (at + 1 == text.size()) continue;
      next.ids.push_back(text[at]);
      next.offsets.push_back(next.tokens());
      next_caches.push_back(std::move(caches[s]));
      still.push_back(running[s]);
    }
    running = std::move(still);
  }
  model.set_ranks(RankPlan::uniform(model.options().lora.max_rank));
  return sums;
}

}  // namespace qdylora
