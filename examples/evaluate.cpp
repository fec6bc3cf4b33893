// What a model says, with or without an adapter, at any rank: loss on data, exact match and BLEU of its answers, accuracy in multiple-choice
// questions, and what the rank costs; or logits of given token ids.
//
//   evaluate --model FILE.gguf|DIR [--adapter DIR] [--rank b] --data FILE
//   evaluate --model FILE.gguf|DIR [--adapter DIR] [--ranks 0,1,4] --choices FILE --shots 5        or     --data FILE --bleu
//   evaluate --model FILE.gguf|DIR [--adapter DIR] [--rank b] --ids 1,2,3 --logits OUT.safetensors|OUT.npy
#include <string>
#include <vector>

#include <qdylora/io.hpp>
#include <qdylora/model.hpp>

#include "common/cpu_device.hpp"
#include "common/evaluate.hpp"
#include "common/model.hpp"
#include "common/program.hpp"
#include "cuda/programs.hpp"

namespace {

using namespace qdylora;
using namespace qdylora::examples;

void declare(CLI::App& app, EvaluateOptions& o) {
  app.add_option("--model", o.model,
                 "a .gguf file (Llama shapes), a Hugging Face folder (Llama, Mistral, Qwen2, Falcon), or a llama2.c .bin file")
      ->required()
      ->check(not_empty());
  app.add_option("--tokenizer", o.tokenizer,
                 "a .gguf file, or a folder with tokenizer.json, whose tokenizer to use; of a .bin model llama2.c's")
      ->check(not_empty());
  app.add_option("--base-format", o.base,
                 "base weights: nf4, fp4, int4, fp8, bfloat16 or float32; those already in 4 bits stay as they are")
      ->capture_default_str();
  app.add_option("--adapter", o.adapter,
                 "an adapter folder: PEFT's, or the bottlenecks or scales of finetune --method; of scales rank 1 are the trained ones, "
                 "rank 0 those they began as")
      ->check(not_empty());
  auto* rank = app.add_option("--rank", o.rank, "use this many rows of the adapter; default: all, 0: none, but its whole modules")
                   ->check(in_range<Index>(0, most_rank));
  app.add_option("--ranks", o.ranks, "measure at each of these; default with --choices or --bleu: 0 and all that the adapter is made for")
      ->check(not_empty())
      ->excludes(rank);
  auto* data = app.add_option("--data", o.data, "JSON lines or plain text, as for finetune")->check(not_empty());
  auto* ids = app.add_option("--ids", o.ids, "token ids, separated by commas")->check(not_empty());
  auto* logits =
      app.add_option("--logits", o.logits,
                     "write the logits of --ids here, float32 [tokens, vocab]: safetensors, or NumPy's array if the name ends in .npy")
          ->check(not_empty());
  auto* choices = add_choices(app, o.choices, o.shots, o.shots_file, o.choice_score);
  app.add_flag("--bleu", o.bleu, "answer the data greedily and compare with its answers: BLEU as sacrebleu has it, and exact match")
      ->needs(data);
  app.add_option("--out", o.out, "folder for report.json and report.csv")->check(not_empty())->excludes(ids);
  add_keep(app, o.keep)->excludes(ids);
  data->excludes(ids);
  choices->excludes(ids);
  ids->needs(logits);
  logits->needs(ids);
  add_number(app, "--max-examples", o.max_examples, "use this many examples of the data and questions of --choices at most", 1,
             most_examples);
  add_number(app, "--answers", o.answers, "examples of the data to answer and compare; 0: none, with --bleu all", 0, most_examples)
      ->needs(data);
  add_number(app, "--max-new-tokens", o.new_tokens, "tokens of an answer at most", 1, most_new_tokens);
  add_number(app, "--seq-len", o.seq_len, "tokens of a sequence at most", 2, most_tokens);
  add_number(app, "--threads", o.threads, "0: one for each processor", 0, most_threads);
  add_device(app, o.device, o.dtype);
  add_compute(app, o.compute, /*trains=*/false);
  add_chat_template(app, o.chat);
}

int evaluate(const EvaluateOptions& o, bool base_given) {
  QDYLORA_EXPECTS(!o.data.empty() || !o.choices.empty() || !o.ids.empty(), bad_argument,
                  "give --data, --choices, or --ids with --logits; see --help");
  if (!o.ids.empty()) static_cast<void>(parse_numbers<std::int32_t>("--ids", o.ids));
  for (const auto& in : {o.model, o.tokenizer, o.adapter}) expect_no_overwrite(in, o.logits);
  const CpuDevice cpu(o.threads, compute_of(o.compute, o.device));
  const OpenAdapter adapter = o.adapter.empty() ? OpenAdapter{} : open_adapter(o.adapter);
  QDYLORA_EXPECTS(!adapter.alpha || !base_given, unsupported,
                  "--adapter: scales of planes of signs have a base of their own; leave out --base-format");
  BaseOptions base{.format = base_format(o.base)};
  if (adapter.peft) base = base_of(*adapter.peft, o.adapter, o.base);
  if (adapter.alpha) base.binary = adapter.alpha->code;
  auto model = open_model(o.model, o.tokenizer, base, cpu.backend());
  if (o.ids.empty()) choose_chat_template(model, o.chat);
  if (o.device == "cuda") return evaluate_on_cuda(o, adapter, model);
  return with_dtype(o.dtype, [&]<class T>(std::type_identity<T>) { return examples::evaluate<T>(o, adapter, model, cpu); });
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Loss, task scores and logits of a model, with an adapter at any rank.", "evaluate"};
  EvaluateOptions options;
  declare(app, options);
  return run_program(app, argc, argv, [&] { return evaluate(options, app.count("--base-format") > 0); });
}
