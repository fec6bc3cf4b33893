// The difference of two systems' BLEUs, which is of a corpus and no mean over its sentences, with an interval over these.
#pragma once

#include <cstddef>
#include <span>
#include <string>
#include <vector>

#include <qdylora/core/error.hpp>
#include <qdylora/model/bleu.hpp>
#include <qdylora/model/rank_report.hpp>

namespace qdylora {

/// mean_k BLEU(a[k]) - mean_k BLEU(b[k]) and its interval by the paired bootstrap: each resample draws sentences, the same for all, and
/// takes BLEU of the corpus they are (Koehn 2004). a[k], b[k]: what BLEU counts in each sentence by one system of either side, such as a
/// run of each seed, in the same order of sentences. Errors: bad_argument (a side without systems, numbers of sentences that differ, and
/// those of bootstrap).
inline Interval paired_bleu_difference(std::span<const std::vector<BleuCounts>> a, std::span<const std::vector<BleuCounts>> b,
                                       const BootstrapOptions& options = {}) {
  QDYLORA_EXPECTS(!a.empty() && !b.empty(), bad_argument,
                  "paired_bleu_difference: expected systems on both sides, found " + std::to_string(a.size()) + " and " +
                      std::to_string(b.size()));
  const std::size_t sentences = a.front().size();
  for (const auto* side : {&a, &b})
    for (const auto& system : *side)
      QDYLORA_EXPECTS(system.size() == sentences, bad_argument,
                      "paired_bleu_difference: expected the same sentences of every system, found " + std::to_string(sentences) + " and " +
                          std::to_string(system.size()));
  std::vector<std::size_t> drawn(sentences);
  const auto mean = [&](std::span<const std::vector<BleuCounts>> systems) {
    double sum = 0.0;
    for (const auto& system : systems) {
      BleuCounts corpus;
      for (const std::size_t i : drawn) corpus += system[i];
      sum += bleu_of(corpus).score;
    }
    return sum / static_cast<double>(systems.size());
  };
  return bootstrap(sentences, options, [&](auto&& sentence) {
    for (std::size_t k = 0; k < sentences; ++k) drawn[k] = sentence(k);
    return mean(a) - mean(b);
  });
}

}  // namespace qdylora
