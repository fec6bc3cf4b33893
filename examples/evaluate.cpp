// What a model says, with or without an adapter, at any rank: loss on data, or logits of given token ids.
//
//   evaluate --model FILE.gguf|DIR [--adapter DIR] [--rank b] (--data FILE | --ids 1,2,3 --logits OUT.safetensors)
#include <cmath>
#include <cstdio>
#include <optional>
#include <string>
#include <vector>

#include <qdylora/io.hpp>
#include <qdylora/model.hpp>

#include "common/dataset.hpp"
#include "common/evaluation.hpp"
#include "common/model.hpp"
#include "common/program.hpp"

namespace {

using namespace qdylora;
using namespace qdylora::examples;

struct Options {
  std::string model, tokenizer, adapter, data, ids, logits, base = "nf4";
  std::optional<Index> rank;
  Index seq_len = 512, answers = 0, new_tokens = 128, max_examples = most_examples;
  int threads = 0;
  bool no_chat = false;
};

void declare(CLI::App& app, Options& o) {
  app.add_option("--model", o.model, "a .gguf file (Llama shapes), or a Hugging Face folder")->required()->check(not_empty());
  app.add_option("--tokenizer", o.tokenizer, "a .gguf file, or a folder with tokenizer.json, whose tokenizer to use")->check(not_empty());
  app.add_option("--base-format", o.base, "base weights: nf4, fp4, int4, fp8 or float32; those already in 4 bits stay as they are")
      ->capture_default_str();
  app.add_option("--adapter", o.adapter, "a PEFT adapter folder")->check(not_empty());
  app.add_option("--rank", o.rank, "use this many rows of the adapter; default: all, 0: none")->check(in_range<Index>(0, most_rank));
  auto* data = app.add_option("--data", o.data, "JSON lines or plain text, as for finetune")->check(not_empty());
  auto* ids = app.add_option("--ids", o.ids, "token ids, separated by commas")->check(not_empty());
  auto* logits = app.add_option("--logits", o.logits, "write the logits of --ids here: float32 [tokens, vocab]")->check(not_empty());
  data->excludes(ids);
  ids->needs(logits);
  logits->needs(ids);
  add_number(app, "--max-examples", o.max_examples, "use this many examples of the data at most", 1, most_examples);
  add_number(app, "--answers", o.answers, "examples of the data to answer and compare", 0, most_examples);
  add_number(app, "--max-new-tokens", o.new_tokens, "tokens of an answer at most", 1, most_new_tokens);
  add_number(app, "--seq-len", o.seq_len, "tokens of a sequence at most", 2, most_tokens);
  add_number(app, "--threads", o.threads, "0: one for each processor", 0, most_threads);
  app.add_flag("--no-chat-template", o.no_chat, "no chat template around prompts");
}

void write_logits(Decoder<float>& decoder, const std::vector<std::int32_t>& ids, const std::string& file) {
  Batch batch;
  batch.ids = ids;
  batch.targets.assign(ids.size(), -1);
  batch.offsets.push_back(batch.tokens());
  const auto logits = decoder.logits(batch);
  SafetensorsWriter writer;
  writer.add("logits", logits.view());
  writer.write(file);
  std::printf("wrote %s: logits, float32 [%lld, %lld]\n", file.c_str(), static_cast<long long>(logits.rows()),
              static_cast<long long>(logits.cols()));
}

int evaluate(const Options& o) {
  QDYLORA_EXPECTS(!o.data.empty() || !o.ids.empty(), bad_argument, "give --data, or --ids with --logits; see --help");
  const auto ids = o.ids.empty() ? std::vector<std::int32_t>{} : parse_numbers<std::int32_t>("--ids", o.ids);
  for (const auto& in : {o.model, o.tokenizer, o.adapter}) expect_no_overwrite(in, o.logits);
  const Cpu cpu(o.threads);
  auto model = open_model(o.model, o.tokenizer, {.format = base_format(o.base)}, cpu);
  if (o.no_chat) model.chat = false;
  std::optional<PeftAdapter> adapter;
  if (!o.adapter.empty()) adapter = load_peft_adapter(o.adapter);
  QDYLORA_EXPECTS(adapter || o.rank.value_or(0) == 0, rank_range, "--rank " + std::to_string(*o.rank) + " needs --adapter");
  const Index max_rank = adapter ? adapter->max_rank() : 1;
  const Index rank = o.rank.value_or(adapter ? max_rank : 0);
  QDYLORA_EXPECTS(rank >= 0 && rank <= (adapter ? max_rank : 0), rank_range,
                  "--rank " + std::to_string(rank) + ": the adapter has ranks 0 ... " + std::to_string(adapter ? max_rank : 0));
  LoRAOptions lora{.max_rank = max_rank};
  if (adapter) lora.gated_ranks = adapter->modules.front().gated_ranks;
  Decoder<float> decoder(model.weights, {.lora = lora}, cpu);
  if (adapter) assign_adapter(*adapter, o.adapter, decoder);
  decoder.set_ranks(RankPlan::uniform(rank));
  if (!ids.empty()) {
    write_logits(decoder, ids, o.logits);
    return 0;
  }
  auto examples = load_examples(o.data);
  if (o.max_examples < static_cast<Index>(examples.size())) examples.resize(static_cast<std::size_t>(o.max_examples));
  expect_seq_len(o.seq_len, decoder.config());
  const auto samples = tokenize(examples, model.need_tokenizer(), {.chat = model.chat, .max_length = o.seq_len});
  if (samples.samples.empty())
    throw Error(Errc::bad_argument, "no example has a scored token within --seq-len " + std::to_string(o.seq_len), {.file = o.data});
  const auto asked = questions(examples, model.need_tokenizer(), model.chat, o.seq_len, o.answers);
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
    evaluate_answers(decoder, model.need_tokenizer(), model.chat, asked, results, o.new_tokens);
    std::printf("exact match: %lld of %lld\n", static_cast<long long>(results[0].correct), static_cast<long long>(results[0].answers));
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Loss and logits of a model, with an adapter at any rank.", "evaluate"};
  Options options;
  declare(app, options);
  return run_program(app, argc, argv, [&] { return evaluate(options); });
}
