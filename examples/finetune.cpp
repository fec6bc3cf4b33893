// Fine-tunes adapters of every rank in one run, then shows what each rank can do.
//
//   finetune --model FILE.gguf|DIR [--data FILE] [options]      or      finetune --toy
//
// The linear weights are quantized to double-quantized NF4 while they are read and stay frozen; LoRA adapters of the largest rank train on
// all of them, as --recipe says, or bottlenecks beside them, or the weights become planes of signs, whose scales train; or, to compare with,
// all weights train (--method). Loss counts on responses, in texts on all tokens. Results: report.json, report.csv, ranks.svg and a PEFT
// adapter in --out (a folder of its own kind of other methods, of full the model).
// Ctrl-C saves the state and stops; --resume goes on, to the same bytes as an uninterrupted run. --rival puts the same run by QLoRA, cut by
// singular values, beside it.
#include <algorithm>
#include <cstdio>
#include <limits>
#include <string>
#include <tuple>
#include <vector>

#include <qdylora/io.hpp>
#include <qdylora/model.hpp>

#include "common/cpu_device.hpp"
#include "common/finetune.hpp"
#include "common/model.hpp"
#include "common/program.hpp"
#include "common/text.hpp"
#include "common/word_problems.hpp"
#include "cuda/programs.hpp"

namespace {

using namespace qdylora;
using namespace qdylora::examples;

void declare(CLI::App& app, FinetuneOptions& o) {
  auto* model =
      app.add_option("--model", o.model,
                     "a .gguf file (Llama shapes), a Hugging Face folder (Llama, Mistral, Qwen2, Falcon), or a llama2.c .bin file")
          ->check(not_empty());
  app.add_flag("--toy", o.toy, "a small random transformer instead of a model");
  app.add_option("--tokenizer", o.tokenizer,
                 "a .gguf file, or a folder with tokenizer.json, whose tokenizer to use; of a .bin model llama2.c's")
      ->check(not_empty())
      ->needs(model);
  auto* data = app.add_option("--data", o.data,
                              "JSON lines (prompt/response or completion, question/answer, instruction/output, messages or ShareGPT's "
                              "conversations, text) or plain text; default: generated word problems");
  data->check(not_empty());
  app.add_option("--eval", o.eval, "held-out data of the same kinds; default: the last of --data")->check(not_empty())->needs(data);
  app.add_flag("--all-turns", o.all_turns,
               "learn every answer of a conversation, not the last alone: an example each, which reads again what was said before")
      ->needs(data);
  app.add_option("--ranks", o.ranks, "ranks the adapter is to work at")->capture_default_str();
  app.add_option(
         "--method", o.method,
         "what trains: lora, low-rank updates of the linear layers; houlsby, a bottleneck after attention and one after the "
         "perceptron; parallel, one beside the perceptron; ranks are widths of bottlenecks then, and auto is per-row; alpha, scales "
         "of linear layers whose weights are planes of signs (AlphaTuning), which have no ranks; full, all weights, which takes "
         "--base-format bfloat16 or float32 and a tenth of the --lr or less, and saves a Hugging Face folder in --out/model")
      ->capture_default_str();
  add_number(app, "--planes", o.planes, "of signs, by --method alpha: about as many bits a weight", 1, 8);
  add_number(app, "--group-size", o.group_size, "weights of a row that share a scale in each plane, a multiple of 8; 0: whole rows", 0,
             1 << 20);
  add_number(app, "--trained-planes", o.trained_planes, "the first planes, whose scales train; 1 as published", 1, 8);
  app.add_option("--recipe", o.recipe_name,
                 "auto, order-then-nest, qlora or qlora-svd; qdylora, qdylora-frozen or per-row, which take changes, such as "
                 "qdylora+geometric, of +frozen, +geometric, +row, +step, +alpha/r, +alpha/b, +alpha/sqrt(b); qlora takes the last two, "
                 "'qlora+alpha/sqrt(b)' being rsLoRA")
      ->capture_default_str();
  auto* dora = app.add_flag("--dora", o.dora, "train each output's magnitude apart from its direction (DoRA)");
  app.add_flag("--train-bias", o.train_bias, "the biases of linear layers train too, where they have any (PEFT's bias lora_only)");
  app.add_flag("--gates", o.gates, "train a factor for every row at every rank (order-then-nest)");
  app.add_option("--base-format", o.base, "base weights: nf4, fp4, int4, fp8, bfloat16 or float32")->capture_default_str();
  app.add_option("--init", o.init,
                 "what adapters begin with: standard (A random, B zero); loftq, what quantization loses, or qera, which weighs that by the "
                 "inputs of each layer on the first 128 training rows: these make them adapters of the model in --base-format alone; "
                 "pissa or loftq:ITERATIONS, which make them adapters of another base than the quantized model: evaluate and rank_map "
                 "make it again, other programs refuse it")
      ->capture_default_str();
  app.add_option("--optimizer", o.optimizer,
                 "adamw; adamw8bit: moments in 8 bits, a quarter of their memory; lion: one moment, half of it, at a tenth of the --lr")
      ->check(CLI::IsMember({"adamw", "adamw8bit", "lion"}))
      ->capture_default_str();
  app.add_option("--paged", o.paged,
                 "a folder on a disk that is to hold the moments, where memory is too short for them; with --device cuda the word host: they "
                 "stay in the host's memory")
      ->check(not_empty());
  add_number(app, "--alpha", o.alpha, "LoRA's alpha", 1e-6, 1e6);
  app.add_option("--rank-pattern", o.rank_pattern,
                 "the largest ranks of layers that have others, by the ends of their names as PEFT's rank_pattern has them, such as "
                 "q_proj=8,layers.0.mlp.down_proj=32; at higher ranks they use these");
  app.add_option("--alpha-pattern", o.alpha_pattern, "alphas of layers that have others, likewise");
  add_number(app, "--dropout", o.dropout, "on the adapters' inputs", 0.0, 0.99);
  dora->excludes("--init");
  add_number(app, "--lr", o.lr, "peak learning rate", 1e-9, 10.0);
  add_number(app, "--lora-plus", o.lora_plus, "B's learning rate relative to A's (LoRA+: 16 or so, at a lower --lr)", 1e-3, 1e3);
  add_number(app, "--steps", o.steps, "optimizer steps", 1, most_steps);
  add_number(app, "--batch", o.batch, "sequences a step", 1, most_batch);
  add_number(app, "--seq-len", o.seq_len, "tokens of a sequence at most", 8, most_tokens);
  auto* packed = app.add_flag("--pack", o.pack,
                              "put short examples together to rows of --seq-len tokens, each seeing itself alone; --batch counts rows");
  app.add_flag("--group-by-length", o.group_by_length, "examples of like length in a step, whose work is then even")->excludes(packed);
  add_number(app, "--threads", o.threads, "0: one for each processor", 0, most_threads);
  add_device(app, o.device, o.dtype);
  add_compute(app, o.compute, /*trains=*/true);
  app.add_option("--seed", o.seed, "of adapters, data order and ranks")
      ->check(in_range<Index>(0, std::numeric_limits<Index>::max()))  // unsigned, -1 would be taken as 2^64 - 1
      ->capture_default_str();
  add_number(app, "--train-examples", o.examples, "training examples to generate where there is no --data", 2, most_examples);
  add_number(app, "--eval-examples", o.eval_examples, "held-out examples for the losses", 1, most_examples);
  add_number(app, "--answers", o.answers, "held-out examples to answer at every rank; 0: none", 0, most_examples);
  add_number(app, "--max-new-tokens", o.new_tokens, "tokens of an answer at most", 1, most_new_tokens);
  add_keep(app, o.keep);
  add_number(app, "--save-every", o.save_every, "steps between saved states; 0: only when stopped", 0, most_steps);
  auto* checkpoint = app.add_flag("--gradient-checkpointing", o.checkpoint, "recompute activations: less memory, a third more work");
  app.add_option("--offload", o.offload,
                 "a folder on a disk that is to hold what gradient checkpointing keeps between the passes; with --device cuda the word host: it "
                 "waits in the host's memory")
      ->check(not_empty())
      ->needs(checkpoint);
  add_chat_template(app, o.chat);
  app.add_flag("--resume", o.resume, "go on from the state in --out");
  app.add_flag("--rival", o.rival,
               "then train, in --out/rival, what the run has to beat: the same batches at full rank, cut by singular values (qlora-svd); "
               "the report has both, with paired intervals");
  app.add_option("--out", o.out, "folder for results")->check(not_empty())->capture_default_str();
}

FinetuneData load_data(const FinetuneOptions& o, const OpenModel& model, Index held_back) {
  std::vector<Example> train, validation;
  if (o.data.empty()) {
    train = word_problems(Split::train, o.examples, o.seed);
    validation = word_problems(Split::validation, std::max(o.eval_examples, o.answers), o.seed + 1);
    // A short system message of our own: the template's default one would be a quarter of all tokens.
    for (auto* set : {&train, &validation})
      for (auto& example : *set)
        if (model.chat && model.chat->system_place != SystemPlace::none) example.earlier = {{"system", "Solve the problem."}};
  } else {
    train = load_examples(o.data);
    if (!o.eval.empty()) {
      validation = load_examples(o.eval);
    } else {
      const auto count = std::min<std::size_t>(train.size() / 5, static_cast<std::size_t>(std::max(o.eval_examples, o.answers)));
      if (count == 0)
        throw Error(Errc::bad_argument, std::to_string(train.size()) + " examples are too few to hold some out; give 5, or --eval FILE",
                    {.file = o.data});
      validation.assign(train.end() - static_cast<std::ptrdiff_t>(count), train.end());
      train.resize(train.size() - count);
    }
  }
  if (o.all_turns) train = with_every_answer(train);  // held-out examples stay those of other runs
  const auto& tokenizer = model.need_tokenizer();
  const auto fitting = [&](const std::vector<Example>& examples, const std::string& file, std::size_t least) {
    auto samples = tokenize(examples, tokenizer, {.chat = model.chat_template(), .max_length = o.seq_len});
    if (samples.samples.size() < least)
      throw Error(Errc::bad_argument,
                  std::to_string(samples.samples.size()) + " of " + std::to_string(examples.size()) +
                      (least > 1 ? " training" : " held-out") + " examples have a response within --seq-len " + std::to_string(o.seq_len) +
                      ", expected at least " + std::to_string(least),
                  {.file = file});
    return samples;
  };
  FinetuneData data;
  auto samples = fitting(train, o.data, 2);
  data.train = std::move(samples.samples);
  data.validation_samples = fitting(validation, o.eval.empty() ? o.data : o.eval, 1).samples;
  data.validation_samples.resize(std::min<std::size_t>(data.validation_samples.size(), static_cast<std::size_t>(o.eval_examples)));
  data.questions = questions(validation, tokenizer, model.chat_template(), o.seq_len, o.answers);
  if (held_back > 0) {  // at most a tenth of the examples
    const auto count = std::min<std::size_t>(static_cast<std::size_t>(held_back), data.train.size() / 10);
    data.held_back.assign(data.train.end() - static_cast<std::ptrdiff_t>(count), data.train.end());
    data.train.resize(data.train.size() - count);
    if (count == 0) std::printf("data       too few examples to hold some back: auto spends on low ranks what order-then-nest does\n");
  }
  const TokenCounts counts = count_tokens(data.train);
  std::printf("data       %zu training and %zu held-out examples, %.0f tokens each, %.0f %% scored", data.train.size(),
              data.validation_samples.size(), static_cast<double>(counts.tokens) / static_cast<double>(data.train.size()),
              counts.percent_scored());
  if (samples.truncated + samples.dropped > 0)
    std::printf("; %lld cut, %lld left out (--seq-len %lld)", static_cast<long long>(samples.truncated),
                static_cast<long long>(samples.dropped), static_cast<long long>(o.seq_len));
  std::printf("\n");
  constexpr double little = 5.0;
  if (counts.percent_scored() < little)
    std::printf("warning    %.2g %% of the tokens are scored: long prompts, whose answers --seq-len may cut, teach little for their work\n",
                counts.percent_scored());
  if (o.pack) {
    const Index rows = DataOrder(data.train, order_options(o)).rows();
    std::printf("           packed into %lld rows of %lld tokens, %.0f %% full\n", static_cast<long long>(rows),
                static_cast<long long>(o.seq_len), 100.0 * static_cast<double>(counts.tokens) / static_cast<double>(rows * o.seq_len));
  }
  return data;
}

// Throws Errc::bad_argument for an option that the method does not know, `given` among those that its user wrote.
void expect_own_options(const FinetuneOptions& o, AdapterMethod method, const std::vector<std::string>& given) {
  const bool scales = method == AdapterMethod::alpha, whole = method == AdapterMethod::full;
  const auto refuse = [&](const std::vector<std::string>& options, const char* reason) {
    for (const std::string& option : options)
      QDYLORA_EXPECTS(std::find(given.begin(), given.end(), option) == given.end(), bad_argument,
                      option + ": is not for --method " + o.method + reason);
  };
  const std::vector<std::string> of_ranks = {"--ranks", "--recipe", "--alpha", "--dropout", "--lora-plus"};
  if (whole) refuse(of_ranks, ", which trains all weights and has no ranks");
  if (scales) refuse(of_ranks, ", which trains scales of planes of signs and has no ranks");
  if (scales) refuse({"--base-format"}, ", whose format is planes of signs");
  else refuse({"--planes", "--group-size", "--trained-planes"}, ", whose weights are no planes of signs");
  if (!scales) return;
  QDYLORA_EXPECTS(o.trained_planes <= o.planes, bad_argument,
                  "--trained-planes: " + std::to_string(o.trained_planes) + " is above --planes " + std::to_string(o.planes));
  QDYLORA_EXPECTS(o.group_size % 8 == 0, bad_argument,
                  "--group-size: expected a multiple of 8, or 0 for whole rows, found " + std::to_string(o.group_size));
}

int finetune(const FinetuneOptions& o, const std::vector<std::string>& given) {
  QDYLORA_EXPECTS(o.toy != !o.model.empty(), bad_argument, "give either --model or --toy");
  if (!o.resume) expect_no_unfinished_run(state_file(o));
  const AdapterMethod method = adapter_method(o.method);
  const bool patterns = !o.rank_pattern.empty() || !o.alpha_pattern.empty();
  QDYLORA_EXPECTS(method == AdapterMethod::lora || (!o.dora && !o.train_bias && !o.gates && o.init == "standard" && !patterns), unsupported,
                  "--method " + o.method +
                      ": --dora, --train-bias, --gates, --init, --rank-pattern and --alpha-pattern are for low-rank updates");
  QDYLORA_EXPECTS(!o.gates || !patterns, unsupported, "--gates: are of one rank set and one alpha for all layers");
  expect_own_options(o, method, given);
  const Recipe chosen = recipe(o.recipe_name, method);
  if (o.rival) expect_rival(o);
  if (o.rival && !o.resume) expect_no_unfinished_run(state_file(rival_of(o)));
  QDYLORA_EXPECTS(!o.gates || chosen.order_at < 1.0, bad_argument,
                  "--gates: the recipe " + o.recipe_name + " has no second phase to train them in; auto and order-then-nest have");
  for (const auto& [option, place, what] :
       {std::tuple("--paged ", &o.paged, ": moments of --device "), std::tuple("--offload ", &o.offload, ": checkpoints of --device ")})
    QDYLORA_EXPECTS(place->empty() || *place == "host" || o.device == "cpu", bad_argument,
                    option + printable_utf8(*place) + what + o.device + " go to the host's memory; expected host");
  const RankSet ranks = ranks_of(o);
  const CpuDevice cpu(o.threads, compute_of(o.compute, o.device));
  const BaseOptions base{.format = base_format(o.base), .init = adapter_init(o.init, ranks.max()), .binary = binary_code(o)};
  QDYLORA_EXPECTS(base.init.standard() || chosen.scale == ScalePolicy::constant, bad_argument,
                  "--init " + o.init + ": needs a scale that is the same at every rank, and that of the recipe " + o.recipe_name + " is " +
                      std::string(name(chosen.scale)));
  QDYLORA_EXPECTS(!base.init.changes_base() || o.rank_pattern.empty(), unsupported,
                  "--rank-pattern: --init " + o.init + " takes as much from the base of each layer as the largest rank gives back");
  OpenModel model = o.toy ? toy_model(base, cpu.backend()) : open_model(o.model, o.tokenizer, base, cpu.backend());
  if (trains_whole(o)) expect_trains_whole(o, model);
  QDYLORA_EXPECTS(!o.train_bias || model.biases > 0, bad_argument, "--train-bias: no linear layer of " + model.name + " has a bias");
  choose_chat_template(model, o.chat);
  expect_seq_len(o.seq_len, model.config);
  expect_ranks(ranks, model.config);
  expect_fits(decoder_options(o), model.config);
  const auto data = load_data(o, model, chosen.measure ? held_back_rows(o.steps * o.batch, ranks.size()) : 0);
  if (o.device == "cuda") return finetune_on_cuda(o, model, data);
  return with_dtype(o.dtype, [&]<class T>(std::type_identity<T>) { return examples::finetune<T>(o, model, data, cpu); });
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Fine-tunes adapters that work at every rank, in one run.", "finetune"};
  FinetuneOptions options;
  declare(app, options);
  return run_program(app, argc, argv, [&] {
    std::vector<std::string> given;
    for (const CLI::Option* option : app.get_options())
      if (option->count() > 0) given.push_back(option->get_name());
    return finetune(options, given);
  });
}
