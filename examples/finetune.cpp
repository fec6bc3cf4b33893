// Fine-tunes adapters of every rank in one run, then shows what each rank can do.
//
//   finetune --model FILE.gguf|DIR [--data FILE] [options]      or      finetune --toy
//
// The linear weights are quantized to double-quantized NF4 while they are read and stay frozen; LoRA adapters of the largest rank train on
// all of them, as --recipe says. Loss counts on the response only. Results: report.json, report.csv, ranks.svg and a PEFT adapter in --out.
// Ctrl-C saves the state and stops; --resume goes on, to the same bytes as an uninterrupted run.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <filesystem>
#include <limits>
#include <set>
#include <string>
#include <system_error>
#include <vector>

#include <qdylora/io.hpp>
#include <qdylora/model.hpp>

#include "common/dataset.hpp"
#include "common/evaluation.hpp"
#include "common/model.hpp"
#include "common/program.hpp"
#include "common/progress.hpp"
#include "common/report.hpp"
#include "common/run_state.hpp"
#include "common/signals.hpp"
#include "common/word_problems.hpp"

namespace {

using namespace qdylora;
using namespace qdylora::examples;

struct Options {
  std::string model, tokenizer, data, eval, out = "out";
  bool toy = false, resume = false, no_chat = false, gates = false, checkpoint = false;
  std::string ranks = "1,2,4,8,16,32,64", recipe_name = "auto", base = "nf4";
  float alpha = 16.0f, dropout = 0.0f;
  double lr = 1e-3;
  std::int64_t steps = 80, save_every = 50;
  Index batch = 8, seq_len = 256, examples = 2000, eval_examples = 48, answers = 32, new_tokens = 48;
  int threads = 0;
  std::uint64_t seed = 0;
};

void declare(CLI::App& app, Options& o) {
  auto* model = app.add_option("--model", o.model, "a .gguf file (Llama shapes), or a Hugging Face folder")->check(not_empty());
  app.add_flag("--toy", o.toy, "a small random transformer instead of a model");
  app.add_option("--tokenizer", o.tokenizer, "a .gguf file, or a folder with tokenizer.json, whose tokenizer to use")
      ->check(not_empty())
      ->needs(model);
  auto* data = app.add_option("--data", o.data,
                              "JSON lines (prompt/response, question/answer, instruction/output, messages) or plain text; "
                              "default: generated word problems");
  data->check(not_empty());
  app.add_option("--eval", o.eval, "held-out data of the same kinds; default: the last of --data")->check(not_empty())->needs(data);
  app.add_option("--ranks", o.ranks, "ranks the adapter is to work at")->capture_default_str();
  app.add_option("--recipe", o.recipe_name, "auto, order-then-nest, qdylora, qdylora-frozen, per-row, qlora or qlora-svd")
      ->capture_default_str();
  app.add_flag("--gates", o.gates, "train a factor for every row at every rank (order-then-nest)");
  app.add_option("--base-format", o.base, "base weights: nf4, fp4, int4, fp8 or float32")->capture_default_str();
  add_number(app, "--alpha", o.alpha, "LoRA's alpha", 1e-6, 1e6);
  add_number(app, "--dropout", o.dropout, "on the adapters' inputs", 0.0, 0.99);
  add_number(app, "--lr", o.lr, "peak learning rate", 1e-9, 10.0);
  add_number(app, "--steps", o.steps, "optimizer steps", 1, most_steps);
  add_number(app, "--batch", o.batch, "sequences a step", 1, most_batch);
  add_number(app, "--seq-len", o.seq_len, "tokens of a sequence at most", 8, most_tokens);
  add_number(app, "--threads", o.threads, "0: one for each processor", 0, most_threads);
  app.add_option("--seed", o.seed, "of adapters, data order and ranks")
      ->check(in_range<Index>(0, std::numeric_limits<Index>::max()))  // unsigned, -1 would be taken as 2^64 - 1
      ->capture_default_str();
  add_number(app, "--train-examples", o.examples, "training examples to generate where there is no --data", 2, most_examples);
  add_number(app, "--eval-examples", o.eval_examples, "held-out examples for the losses", 1, most_examples);
  add_number(app, "--answers", o.answers, "held-out examples to answer at every rank; 0: none", 0, most_examples);
  add_number(app, "--max-new-tokens", o.new_tokens, "tokens of an answer at most", 1, most_new_tokens);
  add_number(app, "--save-every", o.save_every, "steps between saved states; 0: only when stopped", 0, most_steps);
  app.add_flag("--gradient-checkpointing", o.checkpoint, "recompute activations: less memory, a third more work");
  app.add_flag("--no-chat-template", o.no_chat, "no chat template around prompts");
  app.add_flag("--resume", o.resume, "go on from the state in --out");
  app.add_option("--out", o.out, "folder for results")->check(not_empty())->capture_default_str();
}

struct Data {
  std::vector<Example> questions;
  std::vector<Sample> train, held_back, validation_samples;
};

Data load_data(const Options& o, const OpenModel& model, Index held_back) {
  std::vector<Example> train, validation;
  if (o.data.empty()) {
    train = word_problems(Split::train, o.examples, o.seed);
    validation = word_problems(Split::validation, std::max(o.eval_examples, o.answers), o.seed + 1);
    // A short system message of our own: the template's default one would be a quarter of all tokens.
    for (auto* set : {&train, &validation})
      for (auto& example : *set)
        if (model.chat) example.earlier = {{"system", "Solve the problem."}};
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
  const auto& tokenizer = model.need_tokenizer();
  const auto fitting = [&](const std::vector<Example>& examples, const std::string& file, std::size_t least) {
    auto samples = tokenize(examples, tokenizer, {.chat = model.chat, .max_length = o.seq_len});
    if (samples.samples.size() < least)
      throw Error(Errc::bad_argument,
                  std::to_string(samples.samples.size()) + " of " + std::to_string(examples.size()) +
                      (least > 1 ? " training" : " held-out") + " examples have a response within --seq-len " + std::to_string(o.seq_len) +
                      ", expected at least " + std::to_string(least),
                  {.file = file});
    return samples;
  };
  Data data;
  auto samples = fitting(train, o.data, 2);
  data.train = std::move(samples.samples);
  data.validation_samples = fitting(validation, o.eval.empty() ? o.data : o.eval, 1).samples;
  data.validation_samples.resize(std::min<std::size_t>(data.validation_samples.size(), static_cast<std::size_t>(o.eval_examples)));
  data.questions = questions(validation, tokenizer, model.chat, o.seq_len, o.answers);
  if (held_back > 0) {  // at most a tenth of the examples
    const auto count = std::min<std::size_t>(static_cast<std::size_t>(held_back), data.train.size() / 10);
    data.held_back.assign(data.train.end() - static_cast<std::ptrdiff_t>(count), data.train.end());
    data.train.resize(data.train.size() - count);
    if (count == 0) std::printf("data       too few examples to hold some back: auto spends on low ranks what order-then-nest does\n");
  }
  Index scored = 0, tokens = 0;
  for (const auto& s : data.train) {
    tokens += static_cast<Index>(s.ids.size());
    scored += static_cast<Index>(s.ids.size()) - s.prompt_length;
  }
  std::printf("data       %zu training and %zu held-out examples, %.0f tokens each, %.0f %% scored", data.train.size(),
              data.validation_samples.size(), static_cast<double>(tokens) / static_cast<double>(data.train.size()),
              100.0 * static_cast<double>(scored) / static_cast<double>(tokens));
  if (samples.truncated + samples.dropped > 0)
    std::printf("; %lld cut, %lld left out (--seq-len %lld)", static_cast<long long>(samples.truncated),
                static_cast<long long>(samples.dropped), static_cast<long long>(o.seq_len));
  std::printf("\n");
  return data;
}

// The samples of step t: every epoch is a permutation of its own, so the position in the data is a function of the step.
std::vector<Sample> step_samples(const std::vector<Sample>& train, std::int64_t step, Index rows, std::uint64_t seed) {
  std::vector<Sample> chosen;
  std::vector<std::size_t> order;
  std::int64_t order_epoch = -1;
  for (std::int64_t n = step * rows; n < (step + 1) * rows; ++n) {
    const auto size = static_cast<std::int64_t>(train.size());
    if (n / size != order_epoch) {
      order_epoch = n / size;
      order.resize(train.size());
      for (std::size_t i = 0; i < order.size(); ++i) order[i] = i;
      Rng rng(seed, Purpose::shuffle, 0, static_cast<std::uint32_t>(order_epoch));
      rng.shuffle(std::span<std::size_t>(order));
    }
    chosen.push_back(train[order[static_cast<std::size_t>(n % size)]]);
  }
  return chosen;
}

// Of the base, the lowest and the highest rank.
void show_answers(const std::vector<RankResult>& results, const std::vector<Example>& examples) {
  const auto line = [](std::string text) {
    std::replace(text.begin(), text.end(), '\n', ' ');
    return printable_utf8(text);
  };
  const std::set<std::size_t> shown = {0, std::min<std::size_t>(1, results.size() - 1), results.size() - 1};
  std::printf("\nSome answers\n");
  for (std::size_t i = 0; i < std::min<std::size_t>(2, examples.size()); ++i) {
    std::printf("  %s\n    %-8s %s\n", line(examples[i].prompt).c_str(), "expected", line(examples[i].response).c_str());
    for (const std::size_t at : shown) {
      const auto& r = results[at];
      std::printf("    %-8s %s\n", r.rank == 0 ? "base" : ("rank " + std::to_string(r.rank)).c_str(), line(r.texts[i]).c_str());
    }
  }
}

int finetune(const Options& o) {
  using Clock = std::chrono::steady_clock;
  const auto seconds_since = [](Clock::time_point from) { return std::chrono::duration<double>(Clock::now() - from).count(); };
  QDYLORA_EXPECTS(o.toy != !o.model.empty(), bad_argument, "give either --model or --toy");
  const std::filesystem::path out = o.out;
  const auto state_file = out / "state.safetensors";
  if (!o.resume) expect_no_unfinished_run(state_file);
  const Cpu cpu(o.threads);
  const RankSet ranks = parse_ranks(o.ranks);
  Recipe chosen = recipe(o.recipe_name);
  chosen.gates = o.gates;
  QDYLORA_EXPECTS(!o.gates || chosen.order_at < 1.0, bad_argument,
                  "--gates: the recipe " + o.recipe_name + " has no second phase to train them in; auto and order-then-nest have");

  const auto start = Clock::now();
  const BaseOptions base{.format = base_format(o.base)};
  OpenModel model = o.toy ? toy_model(base, cpu) : open_model(o.model, o.tokenizer, base, cpu);
  if (o.no_chat) model.chat = false;
  const auto& w = *model.weights;
  std::printf("model      %s: %lld blocks of width %lld, %.1f M linear weights in %s, %.3f bits each (%.0f MB), read in %.1f s\n",
              model.name.c_str(), static_cast<long long>(w.config.layers), static_cast<long long>(w.config.width),
              static_cast<double>(w.config.linear_weights()) / 1e6, o.base.c_str(),
              8.0 * static_cast<double>(w.linear_bytes()) / static_cast<double>(w.config.linear_weights()),
              static_cast<double>(w.linear_bytes()) / 1e6, seconds_since(start));
  expect_seq_len(o.seq_len, w.config);
  expect_ranks(ranks, w.config);
  const Data data = load_data(o, model, chosen.measure ? held_back_rows(o.steps * o.batch, ranks.size()) : 0);

  auto lora = adapter_options(chosen, ranks, o.alpha, o.seed);
  lora.dropout = o.dropout;
  Decoder<float> decoder(model.weights, {.lora = lora, .checkpoint = o.checkpoint}, cpu);
  Trainer<float> trainer(decoder, {.recipe = chosen, .ranks = ranks, .steps = o.steps, .lr = o.lr, .seed = o.seed});
  trainer.hold_back(to_batches(data.held_back, 1024));
  Index trainable = 0;
  for (const auto& p : decoder.parameters()) trainable += p->value.size();
  std::printf("adapters   rank up to %lld on all %lld linear layers, %.1f M parameters, alpha %g, scale %s, recipe %s\n",
              static_cast<long long>(ranks.max()), static_cast<long long>(7 * w.config.layers), static_cast<double>(trainable) / 1e6,
              static_cast<double>(o.alpha), std::string(name(chosen.scale)).c_str(), o.recipe_name.c_str());
  std::printf("machine    %d threads, %s\n", cpu.threads(), std::string(name(cpu.isa())).c_str());
  std::fflush(stdout);

  std::error_code failure;
  std::filesystem::create_directories(out, failure);
  if (failure) throw Error(Errc::open, "cannot make the folder: " + failure.message(), {.file = o.out});
  // What a resumed run must share with the one that was stopped.
  const std::string data_name = printable_utf8(o.data);
  const std::string settings = Json{{"model", model.name},     {"data", data_name},    {"ranks", o.ranks},
                                    {"recipe", o.recipe_name}, {"gates", o.gates},     {"base", o.base},
                                    {"alpha", o.alpha},        {"dropout", o.dropout}, {"lr", o.lr},
                                    {"steps", o.steps},        {"batch", o.batch},     {"seq_len", o.seq_len},
                                    {"seed", o.seed},          {"chat", model.chat},   {"examples", data.train.size()}}
                                   .dump();
  RunReport report;
  auto& history = report.history;
  if (o.resume) {
    load_run_state(state_file, settings, decoder, trainer, history);
    std::printf("resumed    at step %lld of %lld\n", static_cast<long long>(trainer.step_count()), static_cast<long long>(o.steps));
  }

  StopSignal signal;
  const auto training_start = Clock::now();
  const double seconds_before = history.seconds;
  const auto save = [&] {
    history.seconds = seconds_before + seconds_since(training_start);
    save_run_state(state_file, settings, decoder, trainer, history);
  };
  {
    Progress progress(o.steps, trainer.step_count());
    while (!trainer.done() && !signal.requested()) {
      const auto samples = step_samples(data.train, trainer.step_count(), o.batch, o.seed);
      const auto result = trainer.step(to_batches(samples, 1024));
      history.step_losses.push_back(result.loss);
      history.tokens += result.tokens;
      progress.update(trainer.step_count(), result.tokens, result.loss, result.rank);
      if (o.save_every > 0 && trainer.step_count() % o.save_every == 0 && !trainer.done()) save();
    }
  }
  save();
  if (!trainer.done()) {
    std::printf("\nstopped at step %lld of %lld; the state is in %s, --resume goes on\n", static_cast<long long>(trainer.step_count()),
                static_cast<long long>(o.steps), state_file.string().c_str());
    return 130;
  }
  const MemoryUse memory = memory_use();
  const auto activation_bytes = decoder.activation_bytes();  // evaluation needs less
  save_peft_adapter(out / "adapter", named_adapters(decoder),
                    {.rank = ranks.max(), .base_model = model.name, .ranks = {ranks.begin(), ranks.end()}, .recipe = o.recipe_name});
  std::printf("trained    %lld steps, %lld tokens in %.0f s (%.0f tokens/s); memory %.0f MB at most\n", static_cast<long long>(o.steps),
              static_cast<long long>(history.tokens), history.seconds, history.tokens_per_second(), static_cast<double>(memory.peak) / 1e6);
  if (chosen.measure)
    std::printf(trainer.reordered_at_end() ? "auto       low ranks need no rows of their own here; re-ordered at the end\n"
                                           : "auto       %.0f %% of the later rows went to low ranks\n",
                100.0 * trainer.nested().share);
  std::printf("evaluating every rank ...\n");
  std::fflush(stdout);

  std::vector<Index> all = {0};
  all.insert(all.end(), ranks.begin(), ranks.end());
  const auto stop = [&] { return signal.requested(); };
  report.ranks = evaluate_losses(decoder, data.validation_samples, all, stop);
  if (!data.questions.empty() && !stop())
    evaluate_answers(decoder, model.need_tokenizer(), model.chat, data.questions, report.ranks, o.new_tokens, stop);
  if (stop()) {
    std::printf("stopped; the adapter is in %s\n", (out / "adapter").string().c_str());
    return 130;
  }

  print_table(report.ranks);
  if (!data.questions.empty()) show_answers(report.ranks, data.questions);
  report.settings = {{"model", model.name},
                     {"recipe", o.recipe_name},
                     {"base", o.base},
                     {"alpha", o.alpha},
                     {"lr", o.lr},
                     {"steps", o.steps},
                     {"batch", o.batch},
                     {"seed", o.seed},
                     {"threads", cpu.threads()},
                     {"isa", std::string(name(cpu.isa()))},
                     {"base_bytes", w.linear_bytes()},
                     {"adapter_parameters", trainable},
                     {"activation_bytes", activation_bytes},
                     {"peak_memory_bytes", memory.peak},
                     {"nested_share", trainer.nested().share},
                     {"reordered_at_end", trainer.reordered_at_end()}};
  write_report(out, report);
  const auto worst = *std::max_element(report.ranks.begin() + 1, report.ranks.end(),
                                       [](const RankResult& a, const RankResult& b) { return a.loss < b.loss; });
  std::printf("\n%s: the worst rank, %lld, has %.3f nats a token, the base %.3f\n",
              worst.loss < report.ranks.front().loss ? "Every rank beats the base" : "NOT every rank beats the base",
              static_cast<long long>(worst.rank), worst.loss, report.ranks.front().loss);
  std::printf("wrote      %s: report.json, report.csv, ranks.svg, adapter/ (PEFT, rank %lld), state.safetensors\n", out.string().c_str(),
              static_cast<long long>(ranks.max()));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Fine-tunes adapters that work at every rank, in one run.", "finetune"};
  Options options;
  declare(app, options);
  return run_program(app, argc, argv, [&] { return finetune(options); });
}
