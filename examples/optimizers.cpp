// The same run with each optimizer: AdamW with moments in 32 and in 8 bits, Lion, and each of them with its moments paged to files
// (QLoRA's paged optimizers). How the training loss goes, what every rank loses in the end, and what memory it takes.
//
//   optimizers --model stories260K.bin --tokenizer tok512.bin --data shakespeare.txt --steps 300 --alpha 64 --lr 3e-3 --lion-lr 3e-4
//
// A paged run must end with the parameters of the one that is not, to the bit: the program says so, and fails where it does not.
#include <malloc.h>

#include <algorithm>
#include <cstdio>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/core/paged_memory.hpp>
#include <qdylora/model.hpp>
#include <qdylora/optim/lion.hpp>

#include "common/evaluation.hpp"
#include "common/model.hpp"
#include "common/program.hpp"
#include "common/progress.hpp"
#include "common/rows.hpp"

namespace {

using namespace qdylora;
using namespace qdylora::examples;

struct Options {
  std::string model, tokenizer, data, optimizers = "adamw,adamw8bit,lion", recipe = "order-then-nest", seeds = "0";
  std::string ranks = "1,2,4,8,16,32,64", base = "nf4", chat = "model", folder = ".";
  float alpha = 16.0f;
  double lr = 1e-3, lion_lr = 1e-4;
  std::int64_t steps = 300, every = 50;
  Index batch = 16, seq_len = 128, eval_rows = 64;
  int threads = 0;
};

void declare(CLI::App& app, Options& o) {
  app.add_option("--model", o.model, "a llama2.c .bin file, a .gguf file, or a Hugging Face folder")->required()->check(not_empty());
  app.add_option("--tokenizer", o.tokenizer, "of a .bin model: llama2.c's; else a .gguf file or a folder with tokenizer.json")
      ->check(not_empty());
  app.add_option("--data", o.data, "plain text (.txt), or JSON lines, as for compare")->required()->check(not_empty());
  app.add_option("--optimizers", o.optimizers, "of adamw, adamw8bit (moments in 8 bits), lion (one moment)")->capture_default_str();
  app.add_option("--paged", o.folder, "a folder on a disk, for the moments of paged runs")->check(not_empty())->capture_default_str();
  app.add_option("--recipe", o.recipe, "as for finetune; auto does as order-then-nest, for nothing is held back")->capture_default_str();
  app.add_option("--seeds", o.seeds, "of adapters, data order and ranks; the same for every optimizer")->capture_default_str();
  app.add_option("--ranks", o.ranks, "ranks")->capture_default_str();
  app.add_option("--base-format", o.base, "base weights")->capture_default_str();
  add_number(app, "--alpha", o.alpha, "of the recipe's scale", 1e-6, 1e6);
  add_number(app, "--lr", o.lr, "peak learning rate", 1e-9, 10.0);
  add_number(app, "--lion-lr", o.lion_lr, "the same of lion, whose good ones are a third to a tenth of AdamW's", 1e-9, 10.0);
  add_number(app, "--steps", o.steps, "optimizer steps", 1, most_steps);
  add_number(app, "--every", o.every, "steps whose mean loss is one number of the trajectory", 1, most_steps);
  add_number(app, "--batch", o.batch, "rows a step", 1, most_batch);
  add_number(app, "--seq-len", o.seq_len, "tokens a row; of examples at most", 8, most_tokens);
  add_number(app, "--eval-rows", o.eval_rows, "held-out rows", 1, most_examples);
  add_chat_template(app, o.chat);
  add_number(app, "--threads", o.threads, "0: one for each processor", 0, most_threads);
}

struct Run {
  std::string name;
  std::vector<double> trajectory, losses;  // mean training losses; held out, at every rank
  std::size_t moments = 0;                 // bytes
  Index resident = 0;                      // the most between steps, when moments are paged out, above what was so before the run
  std::vector<Matrix<float>> parameters;
};

template <class Optimizer>
Run train(const Options& o, const HostWeights& weights, const Rows& rows, std::uint64_t seed, double lr, const Cpu& cpu,
          const PagedMemory& memory) {
  ::malloc_trim(0);  // what the run before has left is not counted
  const Index before = memory_use().bytes;
  const Recipe chosen = recipe(o.recipe);
  const RankSet ranks = parse_ranks(o.ranks);
  Decoder<float> decoder(weights, {.lora = adapter_options(chosen, ranks, o.alpha, seed)}, cpu);
  Trainer<float, Cpu, Optimizer> trainer(decoder, {.recipe = chosen, .ranks = ranks, .steps = o.steps, .lr = lr, .seed = seed}, memory);
  Run run;
  Progress progress(o.steps);
  double sum = 0.0;
  std::int64_t summed = 0;
  while (!trainer.done()) {
    const auto report = trainer.step(rows.step(seed, trainer.step_count(), o.batch));
    progress.update(trainer.step_count(), report.tokens, report.loss, report.rank);
    run.resident = std::max(run.resident, memory_use().bytes - before);
    sum += report.loss;
    if (++summed == o.every || trainer.done()) {
      run.trajectory.push_back(sum / static_cast<double>(summed));
      sum = 0.0;
      summed = 0;
    }
  }
  progress.finish();
  run.moments = trainer.optimizer().bytes();
  for (const auto& r : evaluate_losses(decoder, rows.test(), ranks.span())) run.losses.push_back(r.loss);
  for (const auto& p : decoder.parameters()) copy(p->value.view(), run.parameters.emplace_back(p->value.rows(), p->value.cols()).view());
  return run;
}

bool same_bits(const std::vector<Matrix<float>>& a, const std::vector<Matrix<float>>& b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](const auto& x, const auto& y) {
    return x.size() == y.size() && std::memcmp(x.data(), y.data(), x.span().size_bytes()) == 0;
  });
}

void print_table(const std::string& of, const std::vector<std::string>& columns, const std::vector<Run>& runs,
                 std::vector<double> Run::*numbers) {
  std::printf("\n| %s |", of.c_str());
  for (const auto& column : columns) std::printf(" %s |", column.c_str());
  std::printf("\n|---|");
  for (std::size_t i = 0; i < columns.size(); ++i) std::printf("---|");
  for (const auto& run : runs) {
    std::printf("\n| %s |", run.name.c_str());
    for (const double x : run.*numbers) std::printf(" %.4f |", x);
  }
  std::printf("\n");
}

// Returns whether every paged run has the bits of the one before it.
bool compare(const Options& o, const HostWeights& weights, const Rows& rows, std::uint64_t seed, const Cpu& cpu) {
  std::vector<Run> runs;
  std::vector<std::string> columns, ranks, verdicts;
  bool all = true;
  for (const auto& name : parse_list("--optimizers", o.optimizers)) {
    std::vector<Matrix<float>> unpaged;
    for (const auto& memory : {PagedMemory(), PagedMemory(o.folder)}) {
      const bool paged = memory.has_folder();
      std::fprintf(stderr, "%s%s, seed %llu\n", name.c_str(), paged ? ", paged" : "", static_cast<unsigned long long>(seed));
      if (name == "adamw") runs.push_back(train<AdamW<float, Cpu, PagedMemory>>(o, weights, rows, seed, o.lr, cpu, memory));
      else if (name == "adamw8bit") runs.push_back(train<AdamW8bit<float, Cpu, PagedMemory>>(o, weights, rows, seed, o.lr, cpu, memory));
      else runs.push_back(train<Lion<float, Cpu, PagedMemory>>(o, weights, rows, seed, o.lion_lr, cpu, memory));
      auto& run = runs.back();
      run.name = name + (paged ? ", paged" : "");
      const bool same = !paged || same_bits(run.parameters, unpaged);
      all = all && same;
      verdicts.push_back(!paged ? "" : same ? "the bits of the run before" : "**not** the bits of the run before");
      unpaged = std::move(run.parameters);
    }
  }
  for (std::int64_t step = 0; step < o.steps; step += o.every)
    columns.push_back(std::to_string(step + 1) + "–" + std::to_string(std::min(step + o.every, o.steps)));
  for (const Index rank : parse_ranks(o.ranks)) ranks.push_back(std::to_string(rank));
  std::printf("\nSeed %llu:\n", static_cast<unsigned long long>(seed));
  print_table("training loss, mean over steps", columns, runs, &Run::trajectory);
  print_table("held-out loss at rank", ranks, runs, &Run::losses);
  std::printf(
      "\n| memory, MB | moments | of it in files | resident between steps, of the run | parameters in the end |\n|---|---|---|---|---|\n");
  for (std::size_t i = 0; i < runs.size(); ++i) {
    const double moments = static_cast<double>(runs[i].moments) / 1e6, resident = static_cast<double>(runs[i].resident) / 1e6;
    std::printf("| %s | %.2f | %.2f | %.1f | %s |\n", runs[i].name.c_str(), moments, i % 2 == 1 ? moments : 0.0, resident,
                verdicts[i].c_str());
  }
  return all;
}

int optimizers(const Options& o) {
  for (const auto& name : parse_list("--optimizers", o.optimizers))
    QDYLORA_EXPECTS(name == "adamw" || name == "adamw8bit" || name == "lion", bad_argument,
                    "--optimizers: no optimizer '" + printable(name) + "'; there are adamw, adamw8bit and lion");
  static_cast<void>(recipe(o.recipe));
  const auto ranks = parse_ranks(o.ranks);
  const auto seeds = parse_numbers<std::uint64_t>("--seeds", o.seeds);
  expect_rows_fit(o.data, o.model.ends_with(".bin"));
  const Cpu cpu(o.threads);
  auto model = open_model(o.model, o.tokenizer, {.format = base_format(o.base)}, cpu);
  if (!plain_text(o.data)) choose_chat_template(model, o.chat);
  expect_seq_len(o.seq_len, model.config);
  expect_ranks(ranks, model.config);
  const Rows rows({.data = o.data, .seq_len = o.seq_len, .eval_rows = o.eval_rows}, model);
  const HostWeights weights = std::exchange(model.read, nullptr)(model.base);
  bool all = true;
  for (const auto seed : seeds) all = compare(o, weights, rows, seed, cpu) && all;
  if (!all) std::fprintf(stderr, "optimizers: paging has changed parameters\n");
  return all ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"The same run with each optimizer, its moments in memory and paged to files.", "optimizers"};
  Options options;
  declare(app, options);
  return run_program(app, argc, argv, [&] { return optimizers(options); });
}
