// Trains every recipe on the same batches with the same budget and compares them rank by rank, seed by seed.
//
//   compare --model stories260K.bin --tokenizer tok512.bin --data shakespeare.txt --steps 300 --lr 3e-3 --alpha 64 --seeds 0,1,2
//   compare --model SmolLM2.gguf --data gsm8k_train.jsonl --batch 2 --steps 120 --seq-len 384 --alpha 16 --lr 1e-3 --eval-rows 24
//
// Plain text is a stream of tokens: a row is a window of --seq-len tokens at a random place, the last tenth of the text is held out. JSON
// lines are examples, as for finetune. Every run is a line of --results (JSON): runs that stand there already are not done again, so a long
// comparison can be stopped and go on. The tables are printed in Markdown: means over seeds, then paired differences to a rival.
//
// Beside the recipes, `separate` stands for as many runs of qlora as there are ranks, each with an adapter of that rank alone, scale alpha/r
// with --alpha-over-rank: what one run replaces.
//
// --answers 24 lets every rank answer held-out examples, a table each for exact match and BLEU; --choices FILE asks multiple-choice questions.
//
// --base-format nf4,fp8,int4 trains on one of three bases at each step, drawn as ranks are (DyQDyLoRA); --eval-formats are those that
// losses are measured on, a table each.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <limits>
#include <map>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/io.hpp>
#include <qdylora/model.hpp>

#include "common/evaluation.hpp"
#include "common/model.hpp"
#include "common/program.hpp"
#include "common/progress.hpp"
#include "common/report.hpp"
#include "common/rows.hpp"
#include "common/signals.hpp"

namespace {

using namespace qdylora;
using namespace qdylora::examples;

struct Options {
  std::string model, tokenizer, data, recipes, chat = "model", seeds = "0,1,2", ranks = "1,2,4,8,16,32,64", base = "nf4", eval_formats;
  std::string init = "standard", against = "qdylora", compute = "automatic";
  std::string out = "compare.jsonl", choices, shots_file, choice_score = "letters";
  float alpha = 64.0f, alpha_over_rank = 16.0f;
  double lr = 3e-3;
  std::int64_t steps = 300;
  Index batch = 16, seq_len = 128, eval_rows = 64, answers = 0, new_tokens = 128, shots = 0;
  int threads = 0;
};

void declare(CLI::App& app, Options& o) {
  app.add_option("--model", o.model, "a llama2.c .bin file, a .gguf file, or a Hugging Face folder")->required()->check(not_empty());
  app.add_option("--tokenizer", o.tokenizer,
                 "of a .bin model: llama2.c's tokenizer file; else a .gguf file or a folder with tokenizer.json")
      ->check(not_empty());
  app.add_option("--data", o.data, "plain text (a stream) or JSON lines (examples)")->required()->check(not_empty());
  app.add_option("--recipes", o.recipes, "which to train, separated by commas, changes of them such as qdylora+frozen, and separate, a run for each rank; "
                 "default: all but that")
      ->check(not_empty());
  app.add_option("--seeds", o.seeds, "of adapters, data order and ranks; the same for every recipe")->capture_default_str();
  app.add_option("--ranks", o.ranks, "ranks")->capture_default_str();
  add_number(app, "--alpha", o.alpha, "of recipes whose scale is alpha/r", 1e-6, 1e6);
  add_number(app, "--alpha-over-rank", o.alpha_over_rank, "of recipes whose scale is alpha/b, and of separate runs", 1e-6, 1e6);
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
  app.add_option("--against", o.against, "the recipe that differences are taken to")->capture_default_str();
  add_chat_template(app, o.chat);
  add_number(app, "--threads", o.threads, "0: one for each processor", 0, most_threads);
  add_compute(app, o.compute, /*trains=*/true);
  app.add_option("--results", o.out, "runs, one JSON line each")->check(not_empty())->capture_default_str();
}

constexpr std::string_view separate_runs = "separate";

struct Result {
  std::string recipe;
  std::uint64_t seed = 0;
  std::string on;              // the format of the base
  std::vector<double> losses;  // at every rank, then the base
  double share = 0.0;
  std::map<std::string, std::vector<double>> scores = {};  // of tasks, the same, in percent
};

// What a run is scored by beside its losses.
std::vector<std::string> scores(const Options& o) {
  std::vector<std::string> names;
  if (o.answers > 0) names = {"exact match", "BLEU"};
  if (!o.choices.empty()) names.push_back("accuracy");
  return names;
}

// A model in one of the formats that it trains on, or that losses are measured on.
struct Base {
  std::string format;
  HostWeights weights;
  bool trains;
};

// What tells runs apart; a line of --results with another key is of another comparison.
Json key(const Options& o) {
  Json key = {{"model", printable_utf8(std::filesystem::path(o.model).filename().string())},
              {"data", printable_utf8(std::filesystem::path(o.data).filename().string())},
              {"base", o.base},
              {"ranks", o.ranks},
              {"alpha", o.alpha},
              {"alpha_over_rank", o.alpha_over_rank},
              {"lr", o.lr},
              {"steps", o.steps},
              {"batch", o.batch},
              {"seq_len", o.seq_len},
              {"eval_rows", o.eval_rows}};
  if (o.init != "standard") key["init"] = o.init;  // lines from before there were others have none
  if (o.chat != "model") key["chat"] = o.chat;
  if (o.compute != "automatic") key["compute"] = o.compute;
  if (o.answers > 0) key.update(Json{{"answers", o.answers}, {"max_new_tokens", o.new_tokens}});
  if (!o.choices.empty())
    key.update(Json{{"choices", printable_utf8(std::filesystem::path(o.choices).filename().string())},
                    {"shots", o.shots},
                    {"shots_file", printable_utf8(std::filesystem::path(o.shots_file).filename().string())},
                    {"choice_score", o.choice_score}});
  return key;
}

std::vector<Result> read_results(const Options& o, const RankSet& ranks) {
  std::vector<Result> results;
  std::ifstream file(o.out);
  Index number = 0;
  for (std::string line; std::getline(file, line);) {
    ++number;
    if (line.empty()) continue;
    at_line(o.out, "line " + std::to_string(number), [&] {
      // Nothing may be written behind a part of a line, which a crash or a full disk leaves.
      QDYLORA_EXPECTS(!file.eof(), truncated, "has no end; remove it");
      const Json json = parse_json(line, {});
      if (get_object(json, "key") != key(o)) return;
      const auto numbers = [](const Json& from, const std::string& field) {
        std::vector<double> all;
        for (const auto& x : from.value(field, Json::array()))  // null: NaN, of a run that went astray
          all.push_back(x.is_number() ? x.get<double>() : std::numeric_limits<double>::quiet_NaN());
        return all;
      };
      const auto whole = [&](const std::vector<double>& all) { return all.size() == static_cast<std::size_t>(ranks.size()) + 1; };
      // A line is of the base that was trained on, unless it says which other.
      Result result{get_string(json, "recipe"), 0, json.contains("on") ? get_string(json, "on") : o.base, {}, get_number(json, "share")};
      result.seed = static_cast<std::uint64_t>(get_integer(json, "seed", 0, std::numeric_limits<std::int64_t>::max()));
      result.losses = numbers(json, "losses");
      bool complete = whole(result.losses);
      for (const auto& name : scores(o)) complete = complete && whole(result.scores[name] = numbers(get_object(json, "scores"), name));
      if (complete) results.push_back(std::move(result));
    });
  }
  return results;
}

// base: whether the base is measured too, as the last.
std::vector<Result> train(const Options& o, const std::vector<Base>& bases, const std::vector<std::string>& eval_formats,
                          const Rows& rows, const OpenModel& model, const std::optional<ChoiceTask>& choices, const RankSet& ranks, bool base,
                          const std::string& name, std::uint64_t seed, const Cpu& cpu, const StopSignal& signal) {
  const bool separate = name == separate_runs;
  const Recipe chosen = recipe(separate ? "qlora" : name);
  const float alpha = separate || chosen.scale == ScalePolicy::over_rank ? o.alpha_over_rank : o.alpha;
  std::vector<const DecoderWeights<float>*> trained;
  for (const auto& b : bases)
    if (b.trains) trained.push_back(b.weights.get());
  Decoder<float> decoder(bases.front().weights, {.lora = adapter_options(chosen, ranks, alpha, seed)}, cpu);
  // Measuring is paid for: a forward pass costs a third of a training row, and every held-back row is run at every rank and without.
  const Index held_back = chosen.measure ? held_back_rows(o.steps * o.batch, ranks.size()) : 0;
  const std::int64_t steps = o.steps - (held_back * (ranks.size() + 1) + 3 * o.batch - 1) / (3 * o.batch);
  QDYLORA_EXPECTS(steps >= 1, bad_argument, "--steps: too few to pay for what " + name + " measures");
  Trainer<float> trainer(decoder, {.recipe = chosen, .ranks = ranks, .steps = steps, .lr = o.lr, .seed = seed});
  std::vector<Sample> back;
  for (Index i = 0; i < held_back; ++i) back.push_back(rows.row(seed, -1 - i));
  trainer.hold_back(to_batches(back, 2048));
  Progress progress(steps);
  while (!trainer.done()) {
    if (signal.requested()) return {};
    if (trained.size() > 1) set_base(decoder, *trained[drawn_base(seed, trainer.step_count(), trained.size())]);
    const auto report = trainer.step(rows.step(seed, trainer.step_count(), o.batch));
    progress.update(trainer.step_count(), report.tokens, report.loss, report.rank);
  }
  progress.finish();
  std::vector<Index> all(ranks.begin(), ranks.end());
  if (base) all.push_back(0);
  std::vector<Result> results;
  for (const auto& format : eval_formats) {
    const auto on = std::find_if(bases.begin(), bases.end(), [&](const Base& b) { return b.format == format; });
    set_base(decoder, *on->weights);
    results.push_back({name, seed, format, {}, trainer.nested().share});
    auto& result = results.back();
    const auto stop = [&] { return signal.requested(); };
    auto measured = evaluate_losses(decoder, rows.test(), all, stop);
    if (!rows.to_answer().empty())
      evaluate_answers(decoder, model.need_tokenizer(), model.chat_template(), rows.to_answer(), measured, o.new_tokens, stop);
    if (choices) evaluate_choices(decoder, *choices, measured, stop);
    if (stop()) return {};
    if (!rows.to_answer().empty()) evaluate_bleu(rows.to_answer(), measured);
    for (const auto& r : measured) {
      result.losses.push_back(r.loss);
      if (r.bleu) {
        result.scores["exact match"].push_back(100.0 * accuracy(r.matches));
        result.scores["BLEU"].push_back(r.bleu->score);
      }
      if (choices) result.scores["accuracy"].push_back(100.0 * accuracy(r.chosen_right));
    }
  }
  return results;
}

// At every rank the results of its own run.
std::vector<Result> train_separately(const RankSet& ranks, const auto& train_at) {
  std::vector<Result> all;
  for (const Index rank : ranks) {
    const std::vector<Result> own = train_at(RankSet{rank}, /*base=*/rank == ranks.max());
    if (own.empty()) return {};
    all.resize(own.size(), {own.front().recipe, own.front().seed, {}, {}});
    for (std::size_t i = 0; i < all.size(); ++i) {
      const auto add = [](std::vector<double>& to, const std::vector<double>& from) { to.insert(to.end(), from.begin(), from.end()); };
      all[i].on = own[i].on;
      add(all[i].losses, own[i].losses);
      for (const auto& [name, scores] : own[i].scores) add(all[i].scores[name], scores);
    }
  }
  return all;
}

// Of losses, or of a task's score.
void print_tables(const Options& o, const std::vector<std::string>& recipes, const std::vector<std::uint64_t>& seeds,
                  const std::vector<Result>& results, const std::string& on, const RankSet& ranks, const std::string& score) {
  const bool losses = score.empty();  // else of a task
  const auto columns = static_cast<std::size_t>(ranks.size());
  const auto head = [&](const char* first) {
    std::printf("\n| %s |", first);
    for (const Index rank : ranks) std::printf(" %lld |", static_cast<long long>(rank));
    std::printf(" mean |\n|---|");
    for (std::size_t i = 0; i <= columns; ++i) std::printf("---|");
    std::printf("\n");
  };
  const auto row = [&](const std::string& name, const std::vector<std::vector<double>>& runs, const char* format) {
    std::printf("| %s |", name.c_str());
    double all = 0.0;
    for (std::size_t i = 0; i < columns; ++i) {
      double sum = 0.0;
      for (const auto& run : runs) sum += run[i];
      std::printf(format, sum / static_cast<double>(runs.size()));
      all += sum / static_cast<double>(runs.size());
    }
    std::printf(format, all / static_cast<double>(columns));
    std::printf("\n");
  };
  std::map<std::string, std::map<std::uint64_t, std::vector<double>>> table;
  for (const auto& r : results)
    if (r.on == on) table[r.recipe][r.seed] = losses ? r.losses : r.scores.at(score);
  head(((losses ? "held-out loss" : score) + ", mean over seeds").c_str());
  for (const auto& name : recipes) {
    std::vector<std::vector<double>> runs;
    for (const auto seed : seeds)
      if (table[name].contains(seed)) runs.push_back(table[name][seed]);
    if (!runs.empty()) row(name + " (" + std::to_string(runs.size()) + ")", runs, losses ? " %.3f |" : " %.1f |");
  }
  head(("difference to " + o.against + ", by seed").c_str());
  for (const auto& name : recipes) {
    if (name == o.against) continue;
    for (const auto seed : seeds) {
      if (!table[name].contains(seed) || !table[o.against].contains(seed)) continue;
      auto difference = table[name][seed];
      for (std::size_t i = 0; i < columns; ++i) difference[i] -= table[o.against][seed][i];
      row(name + ", seed " + std::to_string(seed), {difference}, losses ? " %+.3f |" : " %+.1f |");
    }
  }
}

int compare(const Options& o) {
  const auto recipes =
      o.recipes.empty() ? std::vector<std::string>(recipe_names.begin(), recipe_names.end()) : parse_list("--recipes", o.recipes);
  for (const auto& name : recipes)
    if (name != separate_runs) static_cast<void>(recipe(name));
  if (o.against != separate_runs) static_cast<void>(recipe(o.against));
  const auto seeds = parse_numbers<std::uint64_t>("--seeds", o.seeds);
  for (const auto seed : seeds)  // JSON's integers
    QDYLORA_EXPECTS(seed <= static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max()), bad_argument,
                    "--seeds: " + std::to_string(seed) + " is above 2^63 - 1");
  const RankSet ranks = parse_ranks(o.ranks);
  const Cpu cpu = Cpu(o.threads).with_compute(compute_of(o.compute));
  const auto formats = parse_list("--base-format", o.base);
  const auto eval_formats = o.eval_formats.empty() ? formats : parse_list("--eval-formats", o.eval_formats);
  const AdapterInit init = adapter_init(o.init, ranks.max());
  QDYLORA_EXPECTS(init.standard() || std::find(recipes.begin(), recipes.end(), separate_runs) == recipes.end(), bad_argument,
                  "--init " + o.init + ": runs of one rank each would begin with another base each");
  QDYLORA_EXPECTS(init.standard() || (formats.size() == 1 && eval_formats == formats), bad_argument,
                  "--init " + o.init + ": adapters that begin with something of a base go with that base alone");
  std::vector<Base> bases;  // those that are trained on come first
  for (const auto* names : {&formats, &eval_formats})
    for (const auto& format : *names)
      if (std::none_of(bases.begin(), bases.end(), [&](const Base& b) { return b.format == format; }))
        bases.push_back({format, nullptr, names == &formats});
  QDYLORA_EXPECTS(std::count_if(bases.begin(), bases.end(), [](const Base& b) { return b.trains; }) == std::ssize(formats), bad_argument,
                  "--base-format: a format stands twice in '" + printable(o.base) + "'");
  const auto options_of = [&](const Base& base) { return BaseOptions{.format = base_format(base.format), .init = init}; };
  for (const auto& base : bases) static_cast<void>(options_of(base));
  OpenModel model;
  const bool text = plain_text(o.data);
  QDYLORA_EXPECTS(o.answers == 0 || !text, bad_argument, "--answers: plain text asks nothing; give JSON lines");
  const bool llama2c = o.model.ends_with(".bin");
  QDYLORA_EXPECTS(o.choices.empty() || !llama2c, unsupported, "--choices: a llama2.c model is compared on plain text alone");
  expect_rows_fit(o.data, llama2c);
  for (auto& base : bases) {
    model = open_model(o.model, o.tokenizer, options_of(base), cpu);
    base.weights = model.read();
  }
  if (!text || !o.choices.empty()) choose_chat_template(model, o.chat);
  expect_seq_len(o.seq_len, bases.front().weights->config);
  expect_ranks(ranks, bases.front().weights->config);
  const Rows rows({.data = o.data, .seq_len = o.seq_len, .eval_rows = o.eval_rows, .answers = o.answers}, model);
  std::optional<ChoiceTask> choices;
  if (!o.choices.empty()) choices = choice_task(o.choices, o.shots_file, o.shots, o.choice_score, model);
  auto results = read_results(o, ranks);
  std::ofstream file(o.out, std::ios::app);  // before hours of training
  if (!file) throw Error(Errc::open, "cannot be written", {.file = o.out});
  const StopSignal signal;
  for (const auto seed : seeds)
    for (const auto& name : recipes) {
      const auto missing = [&](const std::string& format) {
        return std::none_of(results.begin(), results.end(),
                            [&](const Result& r) { return r.recipe == name && r.seed == seed && r.on == format; });
      };
      if (std::none_of(eval_formats.begin(), eval_formats.end(), missing)) continue;
      std::fprintf(stderr, "%s, seed %llu\n", name.c_str(), static_cast<unsigned long long>(seed));
      const auto train_at = [&](const RankSet& set, bool base) {
        return train(o, bases, eval_formats, rows, model, choices, set, base, name, seed, cpu, signal);
      };
      const auto run = name == separate_runs ? train_separately(ranks, train_at) : train_at(ranks, true);
      if (run.empty()) {
        std::printf("stopped; the finished runs are in %s\n", o.out.c_str());
        return 130;
      }
      for (const auto& r : run) {
        if (!missing(r.on)) continue;
        Json line{{"key", key(o)}, {"recipe", r.recipe}, {"seed", r.seed}, {"losses", r.losses}, {"share", r.share}};
        if (r.on != o.base) line["on"] = r.on;
        if (!r.scores.empty()) line["scores"] = r.scores;
        file << line.dump() << std::endl;
        if (!file) throw Error(Errc::write, "cannot be written", {.file = o.out});
        results.push_back(r);
      }
    }
  for (const auto& format : eval_formats) {
    if (eval_formats.size() > 1) std::printf("\nOn %s:\n", format.c_str());
    print_tables(o, recipes, seeds, results, format, ranks, "");
    for (const auto& score : scores(o)) print_tables(o, recipes, seeds, results, format, ranks, score);
  }
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Trains every recipe with the same budget and compares them rank by rank.", "compare"};
  Options options;
  declare(app, options);
  return run_program(app, argc, argv, [&] { return compare(options); });
}
