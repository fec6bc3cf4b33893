// What evaluate does once its model is open, for any type of activations and any device.
#pragma once

#include <cmath>
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
#include "text.hpp"

namespace qdylora::examples {

struct EvaluateOptions {
  std::string model, tokenizer, adapter, data, ids, logits, chat = "model", base = "nf4", device = "cpu", dtype = "float32";
  std::optional<Index> rank;
  Index seq_len = 512, answers = 0, new_tokens = 128, max_examples = 1'000'000;
  int threads = 0;
};

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
int evaluate(const EvaluateOptions& o, const std::optional<PeftAdapter>& adapter, OpenModel& model, const Device& device) {
  const auto ids = o.ids.empty() ? std::vector<std::int32_t>{} : parse_numbers<std::int32_t>("--ids", o.ids);
  QDYLORA_EXPECTS(adapter || o.rank.value_or(0) == 0, rank_range, "--rank " + std::to_string(*o.rank) + " needs --adapter");
  const Index max_rank = adapter ? adapter->max_rank() : 1;
  const Index rank = o.rank.value_or(adapter ? max_rank : 0);
  QDYLORA_EXPECTS(rank >= 0 && rank <= (adapter ? max_rank : 0), rank_range,
                  "--rank " + std::to_string(rank) + ": the adapter has ranks 0 ... " + std::to_string(adapter ? max_rank : 0));
  LoRAOptions lora{.max_rank = max_rank};
  if (adapter) {
    lora.gated_ranks = adapter->modules.front().gated_ranks;
    lora.dora = adapter->config.use_dora;
  }
  std::vector<Example> examples;
  if (ids.empty()) {  // before anything large is read
    examples = load_examples(o.data);
    expect_seq_len(o.seq_len, model.config);
    static_cast<void>(model.need_tokenizer());
  }
  auto read = std::exchange(model.read, nullptr)();
  if (adapter) at_tensor(o.adapter, "", [&] { replace_modules(*read, adapter->saved); });
  const auto weights = device.place(std::move(read));
  const auto method = adapter ? adapter->method : AdapterMethod::lora;
  Decoder<T, typename Device::Backend> decoder(weights, {.lora = lora, .method = method}, device.backend());
  if (adapter) assign_adapter(*adapter, o.adapter, decoder);
  decoder.set_ranks(RankPlan::uniform(rank));
  if (!ids.empty()) {
    write_logits(decoder, ids, o.logits);
    return 0;
  }
  if (o.max_examples < static_cast<Index>(examples.size())) examples.resize(static_cast<std::size_t>(o.max_examples));
  const auto samples = tokenize(examples, model.need_tokenizer(), {.chat = model.chat_template(), .max_length = o.seq_len});
  if (samples.samples.empty())
    throw Error(Errc::bad_argument, "no example has a scored token within --seq-len " + std::to_string(o.seq_len), {.file = o.data});
  const auto asked = questions(examples, model.need_tokenizer(), model.chat_template(), o.seq_len, o.answers);
  if (o.answers > 0 && asked.empty())
    throw Error(Errc::bad_argument, "--answers: no example has a prompt within --seq-len " + std::to_string(o.seq_len), {.file = o.data});
  const std::vector<Index> ranks = {rank};
  auto results = evaluate_losses(decoder, samples.samples, ranks);
  std::printf("rank %lld: loss %.4f nats a token, perplexity %.4f, on %zu examples", static_cast<long long>(rank), results[0].loss,
              std::exp(results[0].loss), samples.samples.size());
  if (samples.truncated + samples.dropped > 0)
    std::printf(" (%lld cut, %lld left out)", static_cast<long long>(samples.truncated), static_cast<long long>(samples.dropped));
  std::printf("\n");
  if (!asked.empty()) {
    evaluate_answers(decoder, model.need_tokenizer(), model.chat_template(), asked, results, o.new_tokens);
    std::printf("exact match: %lld of %lld\n", static_cast<long long>(results[0].correct), static_cast<long long>(results[0].answers));
  }
  return 0;
}

}  // namespace qdylora::examples
