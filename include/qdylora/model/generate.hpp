// Text generation with a key-value cache, greedy or sampled, for a batch of prompts at ranks of their own.
#pragma once

#include <algorithm>
#include <cmath>
#include <span>
#include <vector>

#include <qdylora/model/decoder.hpp>

namespace qdylora {

struct GenerateOptions {
  Index max_tokens = 64;        // new tokens of each sequence
  float temperature = 0.0f;     // 0: greedy
  std::uint64_t seed = 0;
  std::int32_t stop_token = -1; // ends a sequence; not part of the result
};

/// A token from a row of logits: the largest (lowest id on ties) at temperature 0, else a draw from softmax(logits / temperature).
template <class S>
std::int32_t sample(std::span<const S> logits, float temperature, Rng& rng) {
  const auto best = std::max_element(logits.begin(), logits.end());
  if (temperature <= 0.0f) return static_cast<std::int32_t>(best - logits.begin());
  std::vector<double> weights(logits.size());
  double sum = 0.0;
  for (std::size_t i = 0; i < logits.size(); ++i)
    sum += weights[i] = std::exp((static_cast<double>(logits[i]) - static_cast<double>(*best)) / static_cast<double>(temperature));
  double at = static_cast<double>(rng.next()) * 0x1p-32 * sum;
  for (std::size_t i = 0; i + 1 < weights.size(); ++i) {
    at -= weights[i];
    if (at < 0.0) return static_cast<std::int32_t>(i);
  }
  return static_cast<std::int32_t>(weights.size() - 1);
}

/// Continues every prompt, at the rank that `ranks` gives it. Sequences that ended leave the batch. Leaves the model at full rank with
/// dropout off. Throws Errc::bad_argument on an empty prompt or one that does not fit the context.
template <class T, class Backend>
std::vector<std::vector<std::int32_t>> generate(Decoder<T, Backend>& model, std::span<const std::vector<std::int32_t>> prompts,
                                                const RankPlan& ranks, const GenerateOptions& options = {}) {
  using Cache = typename Decoder<T, Backend>::Cache;
  std::vector<std::vector<std::int32_t>> results(prompts.size());
  if (prompts.empty() || options.max_tokens <= 0) return results;
  const std::vector<Index> rank_of = ranks.of_rows(static_cast<Index>(prompts.size()));
  Batch batch;
  std::vector<Cache> caches;
  std::vector<std::size_t> running;
  std::vector<Rng> rngs;
  for (std::size_t i = 0; i < prompts.size(); ++i) {
    QDYLORA_EXPECTS(!prompts[i].empty(), bad_argument, "generate: prompt " + std::to_string(i) + " is empty");
    const auto length = static_cast<Index>(prompts[i].size());
    const Index room = std::min(model.config().context, length + options.max_tokens);
    QDYLORA_EXPECTS(length <= model.config().context, bad_argument,
                    "generate: prompt " + std::to_string(i) + " has " + std::to_string(length) + " tokens, the model's context is " +
                        std::to_string(model.config().context));
    batch.ids.insert(batch.ids.end(), prompts[i].begin(), prompts[i].end());
    batch.offsets.push_back(batch.tokens());
    caches.emplace_back(model.config(), room);
    running.push_back(i);
    rngs.emplace_back(options.seed, Purpose::sample, static_cast<std::uint32_t>(i));
  }
  model.set_training(false);
  while (!running.empty()) {
    std::vector<Index> now;
    for (const auto i : running) now.push_back(rank_of[i]);
    model.set_ranks(RankPlan::per_row(now));
    batch.targets.assign(batch.ids.size(), -1);
    const auto logits = model.infer(batch, caches);
    Matrix<typename Decoder<T, Backend>::Acc> host(logits.rows(), logits.cols());
    model.backend().download(logits.view(), host.view());
    Batch next;
    std::vector<Cache> next_caches;
    std::vector<std::size_t> next_running;
    for (std::size_t s = 0; s < running.size(); ++s) {
      const auto i = running[s];
      const auto row = host.span().subspan(s * static_cast<std::size_t>(host.cols()), static_cast<std::size_t>(host.cols()));
      const auto token = sample(std::span<const typename Decoder<T, Backend>::Acc>(row), options.temperature, rngs[i]);
      if (token == options.stop_token) continue;
      results[i].push_back(token);
      if (static_cast<Index>(results[i].size()) >= options.max_tokens || caches[s].length >= caches[s].keys.front().rows()) continue;
      next.ids.push_back(token);
      next.offsets.push_back(next.tokens());
      next_caches.push_back(std::move(caches[s]));
      next_running.push_back(i);
    }
    batch = std::move(next);
    caches = std::move(next_caches);
    running = std::move(next_running);
  }
  model.set_ranks(RankPlan::uniform(model.options().lora.max_rank));
  return results;
}

}  // namespace qdylora
