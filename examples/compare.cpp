// Trains every method and recipe on the same batches with the same budget and compares them rank by rank, seed by seed.
//
//   compare --model stories260K.bin --tokenizer tok512.bin --data shakespeare.txt --steps 300 --lr 3e-3 --alpha 64 --seeds 0,1,2
//   compare --model SmolLM2.gguf --data gsm8k_train.jsonl --batch 2 --steps 120 --seq-len 384 --alpha 16 --lr 1e-3 --eval-rows 24
//
// Plain text is a stream of tokens: a row is a window of --seq-len tokens at a random place, the last tenth of the text is held out. JSON
// lines are examples, as for finetune. Every run is a line of --results (JSON): runs that stand there already are not done again, so a long
// comparison can be stopped and go on. The tables are printed in Markdown: means over seeds; differences to a rival by seed; and the means
// of these with paired intervals over the held-out examples, of runs whose lines have them.
//
// --recipes lists them as [METHOD:]RECIPE[+CHANGE]...[@FORMAT][*FACTOR]; common/compared_method.hpp says what each part may be:
//
//   --recipes qlora,auto,separate,auto+dora,'auto+lora-plus=16*0.25',houlsby,parallel:qdylora,'alpha@binary4*10',qlora@bfloat16,full
//
// `separate` stands for as many runs of qlora as there are ranks, each with an adapter of that rank alone, scale alpha/r with
// --alpha-over-rank: what one run replaces. A method such as houlsby stands for METHOD:auto; its ranks are the bottleneck's widths. alpha
// (scales of binary3's planes, at --lr) and full (all weights, in bfloat16, at a tenth of --lr) have no ranks and the same value at every one. @bfloat16 puts adapters
// on a base of 16 bits, and *0.3 takes that much of --lr, for methods do not have the same best rate. The last table has what each trained.
//
// --answers 24 lets every rank answer held-out examples, a table each for exact match and BLEU; --choices FILE asks multiple-choice questions.
//
// --base-format nf4,fp8,int4 trains on one of three bases at each step, drawn as ranks are (DyQDyLoRA); --eval-formats are those that
// losses are measured on, a table each.
#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include <qdylora/io.hpp>
#include <qdylora/model.hpp>

#include "common/compare.hpp"
#include "common/comparison.hpp"
#include "common/cpu_device.hpp"
#include "common/program.hpp"
#include "common/signals.hpp"

namespace {

using namespace qdylora;
using namespace qdylora::examples;

void declare(CLI::App& app, CompareOptions& o) {
  app.add_option("--model", o.model, "a llama2.c .bin file, a .gguf file, or a Hugging Face folder")->required()->check(not_empty());
  app.add_option("--tokenizer", o.tokenizer,
                 "of a .bin model: llama2.c's tokenizer file; else a .gguf file or a folder with tokenizer.json")
      ->check(not_empty());
  app.add_option("--data", o.data, "plain text (a stream) or JSON lines (examples)")->required()->check(not_empty());
  app.add_option("--recipes", o.recipes,
                 "what to train, separated by commas, each [METHOD:]RECIPE[+CHANGE]...[@FORMAT][*FACTOR]: a method as finetune's (lora if "
                 "none is named; one alone is METHOD:auto); a recipe, or separate, a run for each rank; its changes such as +frozen, or "
                 "+dora, or +lora-plus=RATIO; a base of its own, such as @bfloat16 (of alpha @binary3, or 1 to 8; of full @bfloat16, or "
                 "@float32); what its learning rate is of --lr (1; of full 0.1). Default: all recipes")
      ->check(not_empty());
  app.add_option("--seeds", o.seeds, "of adapters, data order and ranks; the same for every run")->capture_default_str();
  app.add_option("--ranks", o.ranks, "ranks")->capture_default_str();
  add_number(app, "--alpha", o.alpha, "of recipes whose scale is alpha/r", 1e-6, 1e6);
  add_number(app, "--alpha-over-rank", o.alpha_over_rank, "of recipes whose scale is alpha/b or alpha/sqrt(b), and of separate runs", 1e-6, 1e6);
  add_number(app, "--lr", o.lr, "peak learning rate", 1e-9, 10.0);
  add_number(app, "--steps", o.steps, "optimizer steps", 1, most_steps);
  add_number(app, "--batch", o.batch, "rows a step", 1, most_batch);
  add_number(app, "--seq-len", o.seq_len, "tokens a row; of examples at most", 8, most_tokens);
  add_number(app, "--eval-rows", o.eval_rows, "held-out rows", 1, most_examples);
  add_number(app, "--answers", o.answers, "held-out examples to answer at every rank, for exact match and BLEU", 0, most_examples);
  add_number(app, "--max-new-tokens", o.new_tokens, "tokens of an answer at most", 1, most_new_tokens);
  add_choices(app, o.choices, o.shots, o.shots_file, o.choice_score);
  app.add_option("--base-format", o.base, "base weights; of several, such as nf4,fp8,int4, one is drawn for each step")
      ->capture_default_str();
  app.add_option("--eval-formats", o.eval_formats, "base weights that losses are measured on; default: those of --base-format")
      ->check(not_empty());
  app.add_option("--init", o.init, "what adapters begin with, as for finetune; recipes whose scale is alpha/r alone")
      ->capture_default_str();
  app.add_option("--against", o.against, "what differences are taken to, as --recipes has it")->capture_default_str();
  add_chat_template(app, o.chat);
  add_number(app, "--threads", o.threads, "0: one for each processor", 0, most_threads);
  add_compute(app, o.compute, /*trains=*/true);
  app.add_option("--results", o.out, "runs, one JSON line each")->check(not_empty())->capture_default_str();
}

// Throws Errc::bad_argument where a method has no base that the options, which are of all methods, ask for.
void expect_fits(const ComparedMethod& method, const CompareOptions& o) {
  QDYLORA_EXPECTS(o.init == "standard" || !has_ranks(method.method) ||
                      (method.method == AdapterMethod::lora && !method.separate && !method.dora && !method.base),
                  bad_argument,
                  "--init " + o.init + ": not for " + method.name +
                      "; only low-rank updates begin so, without DoRA, of all ranks in one run and on the base of --base-format");
  QDYLORA_EXPECTS((o.eval_formats.empty() && o.base.find(',') == o.base.npos) || !method.base, bad_argument,
                  "--recipes " + method.name + ": has a base of its own, which is in none of several formats");
}

int compare(const CompareOptions& o) {
  Comparison c{.recipes = o.recipes.empty() ? std::vector<std::string>(recipe_names.begin(), recipe_names.end())
                                            : parse_list("--recipes", o.recipes),
               .seeds = parse_numbers<std::uint64_t>("--seeds", o.seeds),
               .ranks = parse_ranks(o.ranks),
               .against = o.against,
               .runs = {}};
  std::vector<ComparedMethod> methods;
  for (const auto& name : c.recipes) {
    methods.push_back(compared_method("--recipes", name));
    expect_fits(methods.back(), o);
  }
  static_cast<void>(compared_method("--against", c.against));
  for (const auto seed : c.seeds)  // JSON's integers
    QDYLORA_EXPECTS(seed <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()), bad_argument,
                    "--seeds: " + std::to_string(seed) + " is above 2^63 - 1");
  const auto input = open_input(o, c.ranks, CpuDevice(o.threads, compute_of(o.compute)));
  const Json key = key_of(o);
  c.runs = read_runs(o.out, key, o.base, c.ranks.size(), tasks_of(o));
  std::ofstream file(o.out, std::ios::app);  // before hours of training
  if (!file) throw Error(Errc::open, "cannot be written", {.file = o.out});
  const StopSignal signal;
  for (const auto seed : c.seeds)
    for (const auto& method : methods) {
      const auto missing = [&](const std::string& format) {
        return std::none_of(c.runs.begin(), c.runs.end(),
                            [&](const ComparedRun& r) { return r.recipe == method.name && r.seed == seed && r.on == format; });
      };
      if (std::none_of(input.eval_formats.begin(), input.eval_formats.end(), missing)) continue;
      std::fprintf(stderr, "%s, seed %llu\n", method.name.c_str(), static_cast<unsigned long long>(seed));
      const auto runs = method.separate ? train_separately(input, c.ranks, method, seed, signal)
                                        : train(input, c.ranks, /*base=*/true, method, seed, signal);
      if (runs.empty()) {
        std::printf("stopped; the finished runs are in %s\n", o.out.c_str());
        return 130;
      }
      for (const auto& run : runs) {
        if (!missing(run.on)) continue;
        file << to_json(run, key, o.base).dump() << std::endl;
        if (!file) throw Error(Errc::write, "cannot be written", {.file = o.out});
        c.runs.push_back(run);
      }
    }
  for (const auto& format : input.eval_formats) {
    if (input.eval_formats.size() > 1) std::printf("\nOn %s:\n", format.c_str());
    std::printf("%s", tables(c, format, held_out_loss).c_str());
    for (const auto& task : tasks_of(o)) std::printf("%s", tables(c, format, task).c_str());
    std::printf("%s", costs(c, format).c_str());
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Trains every method and recipe with the same budget and compares them rank by rank.", "compare"};
  CompareOptions options;
  declare(app, options);
  return run_program(app, argc, argv, [&] { return compare(options); });
}
