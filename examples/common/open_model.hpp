// A model that the programs work on: open first, its shape and tokenizer known, then read.
#pragma once

#include <functional>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>

#include <qdylora/model/base_weight.hpp>
#include <qdylora/model/calibrate.hpp>
#include <qdylora/model/chat.hpp>
#include <qdylora/model/decoder.hpp>
#include <qdylora/model/tokenizer.hpp>
#include <qdylora/nn/ranks.hpp>

namespace qdylora::examples {

using HostWeights = std::shared_ptr<const DecoderWeights<float>>;

struct OpenModel {
  std::string name;
  DecoderConfig config;
  std::optional<Tokenizer> tokenizer;
  std::string tokenizer_problem;     // why the model's own is not among them: ids need none
  std::optional<ChatTemplate> chat;  // prompts go through it; none: plain prompts
  std::string chat_problem;          // why the model's own is not there
  bool llama2c = false;              // a checkpoint of llama2.c's, with its tokenizer
  bool coded_tables = false;         // the file has its embedding in 8 bits, and so will memory
  Index biases = 0;                  // numbers in a block's biases
  BaseOptions base;                  // how its linear weights are to be stored
  std::function<std::shared_ptr<DecoderWeights<float>>(const BaseOptions&)> read;  // of `base`, or of what calibrated() makes of it

  const ChatTemplate* chat_template() const noexcept { return chat ? &*chat : nullptr; }

  /// Errc::unsupported where the model has no tokenizer.
  const Tokenizer& need_tokenizer() const {
    QDYLORA_EXPECTS(tokenizer.has_value(), unsupported,
                    (tokenizer_problem.empty() ? name + ": the folder has no tokenizer.json" : tokenizer_problem) +
                        "; give --tokenizer, a .gguf file or a folder that has one");
    return *tokenizer;
  }
};

inline constexpr Index calibration_rows = 128;  // of training data, the first of a run

/// How the model's linear weights are to be stored, with what initial values of adapters need to know of the model besides: what passes
/// through it on the texts of some batches, for which it is read once more. device: CpuDevice, or a GPU's.
template <Scalar T, class Device>
BaseOptions calibrated(const OpenModel& model, std::span<const Batch> batches, const Device& device) {
  BaseOptions base = model.base;
  if (!base.init.calibrated()) return base;
  auto plain = base;
  plain.init = {};
  Decoder<T, typename Device::Backend> decoder(device.place(model.read(plain)), {.lora = {.max_rank = 1}}, device.backend());
  base.input_rms = std::make_shared<const InputScales>(calibrate(decoder, batches));
  return base;
}

/// Throws Errc::bad_argument where sequences of --seq-len tokens, whose last is no input, do not fit the model.
inline void expect_seq_len(Index seq_len, const DecoderConfig& config) {
  QDYLORA_EXPECTS(seq_len <= config.context + 1, bad_argument,
                  "--seq-len " + std::to_string(seq_len) + ": the model's context is " + std::to_string(config.context));
}

/// Throws Errc::rank_range above the model's width: one side of every linear layer, so no update has a higher rank.
inline void expect_ranks(const RankSet& ranks, const DecoderConfig& config) {
  QDYLORA_EXPECTS(ranks.max() <= config.width, rank_range,
                  "--ranks: " + std::to_string(ranks.max()) + " is above the model's width of " + std::to_string(config.width));
}

/// Throws Errc::bad_config for a tokenizer of more tokens than the model knows.
inline void expect_vocabulary(Index tokens, const DecoderConfig& config, const std::string& file) {
  if (tokens > config.vocab)
    throw Error(Errc::bad_config,
                "a tokenizer of " + std::to_string(tokens) + " tokens does not fit a model of " + std::to_string(config.vocab),
                {.file = file});
}

}  // namespace qdylora::examples
