// A batch of token sequences laid end to end, without padding.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include <qdylora/core/error.hpp>
#include <qdylora/core/scalar.hpp>

namespace qdylora {

struct BatchCounts {
  Index sequences = 0, tokens = 0, scored = 0;

  BatchCounts& operator+=(const BatchCounts& other) noexcept {
    sequences += other.sequences;
    tokens += other.tokens;
    scored += other.scored;
    return *this;
  }
};

struct Batch {
  std::vector<std::int32_t> ids;      // [tokens] inputs
  std::vector<std::int32_t> targets;  // [tokens] the token to predict at each, -1: not scored
  std::vector<Index> offsets = {0};   // sequence s owns tokens offsets[s] ... offsets[s + 1]

  Index tokens() const noexcept { return static_cast<Index>(ids.size()); }
  Index sequences() const noexcept { return static_cast<Index>(offsets.size()) - 1; }
  Index scored() const noexcept {
    Index count = 0;
    for (const auto target : targets) count += target >= 0;
    return count;
  }
  BatchCounts counts() const noexcept { return {sequences(), tokens(), scored()}; }

  /// Throws Errc::bad_argument unless every sequence has a token, the sequences make up the tokens, and there is a target for each.
  void validate() const {
    QDYLORA_EXPECTS(!ids.empty(), bad_argument, "an empty batch");
    QDYLORA_EXPECTS(targets.size() == ids.size(), bad_argument,
                    "a batch of " + std::to_string(ids.size()) + " tokens with " + std::to_string(targets.size()) + " targets");
    QDYLORA_EXPECTS(!offsets.empty() && offsets.front() == 0 && offsets.back() == tokens(), bad_argument,
                    "the batch's offsets do not begin at 0 and end at its " + std::to_string(tokens()) + " tokens");
    for (Index s = 0; s < sequences(); ++s)
      QDYLORA_EXPECTS(offsets[static_cast<std::size_t>(s)] < offsets[static_cast<std::size_t>(s) + 1], bad_argument,
                      "sequence " + std::to_string(s) + " of the batch has no tokens");
  }
  /// The same unless it is one for a model, besides: ids within its vocabulary, sequences within its context.
  void validate(Index vocab, Index context) const {
    validate();
    for (Index s = 0; s < sequences(); ++s) {
      const Index length = offsets[static_cast<std::size_t>(s) + 1] - offsets[static_cast<std::size_t>(s)];
      QDYLORA_EXPECTS(length <= context, bad_argument,
                      "sequence " + std::to_string(s) + " has " + std::to_string(length) + " tokens, the model's context is " +
                          std::to_string(context));
    }
    for (const auto id : ids)
      QDYLORA_EXPECTS(id >= 0 && id < vocab, bad_argument,
                      "token id " + std::to_string(id) + " is outside the vocabulary of " + std::to_string(vocab));
    for (const auto id : targets)
      QDYLORA_EXPECTS(id >= -1 && id < vocab, bad_argument,
                      "target " + std::to_string(id) + " is outside the vocabulary of " + std::to_string(vocab));
  }

  /// The batch of some of the sequences, in this order. Throws Errc::bad_argument for one that is not there.
  Batch select(std::span<const Index> chosen) const {
    Batch batch;
    for (const Index s : chosen) {
      QDYLORA_EXPECTS(s >= 0 && s < sequences(), bad_argument,
                      "Batch::select: sequence " + std::to_string(s) + " is not in 0 ... " + std::to_string(sequences() - 1));
      const auto first = offsets[static_cast<std::size_t>(s)], last = offsets[static_cast<std::size_t>(s) + 1];
      batch.ids.insert(batch.ids.end(), ids.begin() + first, ids.begin() + last);
      batch.targets.insert(batch.targets.end(), targets.begin() + first, targets.begin() + last);
      batch.offsets.push_back(batch.tokens());
    }
    return batch;
  }

  /// Adds a text of n tokens: its first n - 1 are inputs, its last n - 1 targets, of which those from position `prompt_length` on are
  /// scored. Throws Errc::bad_argument for a text of fewer than two tokens.
  void add(std::span<const std::int32_t> text, Index prompt_length = 0) {
    QDYLORA_EXPECTS(text.size() >= 2, bad_argument, "Batch::add: a text of " + std::to_string(text.size()) + " tokens predicts nothing");
    for (std::size_t i = 0; i + 1 < text.size(); ++i) {
      ids.push_back(text[i]);
      targets.push_back(static_cast<Index>(i) + 1 >= prompt_length ? text[i + 1] : -1);
    }
    offsets.push_back(tokens());
  }
};

}  // namespace qdylora
