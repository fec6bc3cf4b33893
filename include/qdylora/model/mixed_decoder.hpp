// MixedDecoder: several adapters on one frozen model, mixed in a batch. Each sequence takes the adapter and the rank that an AdapterPlan
// gives it, in training, in evaluation and in generation.
//
// Each adapter is a Decoder on weights that all share. A batch is cut into one for each adapter that has sequences in it, which is a pass
// of its own: kernels, and with them the order of sums, are chosen by the number of tokens, so that only thus losses, gradients and texts
// are bit for bit those of each adapter's sequences alone. What is shared is the memory of the base, not its products.
#pragma once

#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/model/decoder.hpp>
#include <qdylora/model/generate.hpp>
#include <qdylora/nn/adapter_plan.hpp>

namespace qdylora {

template <Scalar T, class Backend = Cpu>
  requires TransformerBackend<Backend, T>
class MixedDecoder {
 public:
  using Model = Decoder<T, Backend>;
  using Acc = typename Model::Acc;
  using Memory = typename Model::Memory;
  using Weights = typename Model::Weights;

  /// Adapters 0, 1, ... by their options, which may differ in all things. Errc::bad_argument for none; and what Decoder throws.
  MixedDecoder(std::shared_ptr<const Weights> weights, const std::vector<DecoderOptions>& adapters, Backend backend = {}) {
    QDYLORA_EXPECTS(!adapters.empty(), bad_argument, "MixedDecoder: no adapters");
    models_.reserve(adapters.size());
    for (const auto& options : adapters) models_.emplace_back(weights, options, backend);
    first_rows_.resize(adapters.size());
  }

  Index adapters() const noexcept { return static_cast<Index>(models_.size()); }
  /// The model with one adapter alone: to load, to save, to evaluate. Errc::bad_argument for an adapter that is none.
  Model& at(Index adapter) { return models_[checked(adapter)]; }
  const Model& at(Index adapter) const { return models_[checked(adapter)]; }

  Parameters<Acc, Memory> parameters() const {
    Parameters<Acc, Memory> all;
    for (const Model& model : models_)
      for (auto& parameter : model.parameters()) all.push_back(std::move(parameter));
    return all;
  }

  /// The adapter and rank of each sequence of the coming batches, or one for all. Errc::bad_argument, rank_range.
  void set_plan(const AdapterPlan& plan) {
    for (const auto& run : plan.runs()) at(run.adapter).check_rank(run.rank);
    plan_ = plan;
  }
  /// Whether dropout acts, and the step its masks belong to. The micro-batches of a step follow each other: each adapter's masks are those
  /// of one batch of all its tokens.
  void set_training(bool training, std::uint32_t step = 0) {
    training_ = training;
    step_ = step;
    first_rows_.assign(models_.size(), 0);
    for (Model& model : models_) model.set_training(training, step);
  }

  /// What each adapter has of a batch. Errc::bad_argument as Batch::validate, shape_mismatch where the plan is for other sequences.
  std::vector<BatchCounts> counts(const Batch& batch) const {
    batch.validate();
    std::vector<BatchCounts> counts(models_.size());
    for (const auto& share : plan_.shares(batch.sequences())) counts[checked(share.adapter)] = batch.select(share.rows).counts();
    return counts;
  }

  /// Cross-entropy in nats of each scored position, in the batch's order; nothing is kept for a backward pass. Throws as counts does.
  std::vector<double> losses(const Batch& batch) {
    batch.validate();
    std::vector<double> at_token(batch.ids.size()), scored;
    for (const auto& share : plan_.shares(batch.sequences())) {
      const auto own = ready(share).losses(batch.select(share.rows));
      auto next = own.begin();
      for (const Index s : share.rows)
        for (Index t = batch.offsets[static_cast<std::size_t>(s)]; t < batch.offsets[static_cast<std::size_t>(s) + 1]; ++t)
          if (batch.targets[static_cast<std::size_t>(t)] >= 0) at_token[static_cast<std::size_t>(t)] = *next++;
    }
    for (std::size_t t = 0; t < at_token.size(); ++t)
      if (batch.targets[t] >= 0) scored.push_back(at_token[t]);
    return scored;
  }

  /// Each adapter's sum over its scored positions, and gradients of scales[adapter] times it added to its parameters'. Throws as counts
  /// does, and Errc::shape_mismatch unless there is a scale for each adapter.
  std::vector<double> loss_and_gradient(const Batch& batch, std::span<const double> scales) {
    QDYLORA_EXPECTS(scales.size() == models_.size(), shape_mismatch,
                    "MixedDecoder: " + std::to_string(scales.size()) + " scales for " + std::to_string(adapters()) + " adapters");
    batch.validate();
    std::vector<double> sums(models_.size());
    for (const auto& share : plan_.shares(batch.sequences())) {
      const auto k = checked(share.adapter);
      const Batch part = batch.select(share.rows);
      Model& model = ready(share);
      model.set_training(training_, step_, first_rows_[k]);
      sums[k] = model.loss_and_gradient(part, scales[k]);
      first_rows_[k] += part.tokens();
    }
    return sums;
  }

 private:
  std::size_t checked(Index adapter) const {
    QDYLORA_EXPECTS(adapter >= 0 && adapter < adapters(), bad_argument,
                    "MixedDecoder: adapter " + std::to_string(adapter) + " is not in 0 ... " + std::to_string(adapters() - 1));
    return static_cast<std::size_t>(adapter);
  }
  Model& ready(const AdapterPlan::Share& share) {
    Model& model = at(share.adapter);
    model.set_ranks(share.ranks);
    return model;
  }

  std::vector<Model> models_;
  AdapterPlan plan_;
  bool training_ = false;
  std::uint32_t step_ = 0;
  std::vector<Index> first_rows_;  // of the step, tokens that each adapter has had
};

/// Continues every prompt with the adapter and at the rank that `plan` gives it, as generate does with one adapter's prompts alone.
template <class T, class Backend>
std::vector<std::vector<std::int32_t>> generate(MixedDecoder<T, Backend>& model, std::span<const std::vector<std::int32_t>> prompts,
                                                const AdapterPlan& plan, const GenerateOptions& options = {}) {
  std::vector<std::vector<std::int32_t>> results(prompts.size());
  for (const auto& share : plan.shares(static_cast<Index>(prompts.size()))) {
    std::vector<std::vector<std::int32_t>> own;
    for (const Index i : share.rows) own.push_back(prompts[static_cast<std::size_t>(i)]);
    auto texts = generate(model.at(share.adapter), std::span<const std::vector<std::int32_t>>(own), share.ranks, options);
    for (std::size_t i = 0; i < own.size(); ++i) results[static_cast<std::size_t>(share.rows[i])] = std::move(texts[i]);
  }
  return results;
}

}  // namespace qdylora
