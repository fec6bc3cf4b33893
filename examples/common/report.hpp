// The report of a fine-tuning run: a table for people, JSON and CSV for programs, an SVG picture of quality over rank. That of an evaluation:
// JSON and CSV.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <system_error>
#include <utility>
#include <vector>

#include <qdylora/io/file.hpp>
#include <qdylora/io/json.hpp>
#include <qdylora/model/rank_report.hpp>

#include "evaluation.hpp"
#include "progress.hpp"
#include "run_state.hpp"
#include "svg.hpp"

namespace qdylora::examples {

struct RunReport {
  Json settings;                  // what the run was told and found: model, recipe, steps, memory ...
  std::vector<RankResult> ranks;  // rank 0 first
  RunHistory history;
};

/// Of the adapter's ranks, the one of the lowest loss, as the same examples have it that it is compared on: intervals do not know that it
/// was chosen.
inline const RankResult& best_rank(const std::vector<RankResult>& ranks) {
  return *std::min_element(ranks.begin() + 1, ranks.end(), [](const RankResult& a, const RankResult& b) { return a.loss < b.loss; });
}

/// What the ranks' losses say together.
struct RankSummary {
  static constexpr double share = 0.99;
  Index best = 0;                    // the rank of the lowest loss
  std::vector<Interval> above_best;  // of each result
  double area_linear = 0.0, area_log2 = 0.0;
  Index enough = 0;  // the smallest rank that keeps `share` of the best one's gain

  explicit RankSummary(const std::vector<RankResult>& results) {
    const auto& lowest = best_rank(results);
    best = lowest.rank;
    for (const auto& r : results) above_best.push_back(paired_difference(r.example_losses, lowest.example_losses, r.example_tokens));
    std::vector<Index> ranks;
    std::vector<double> losses;
    for (std::size_t i = 1; i < results.size(); ++i) {
      ranks.push_back(results[i].rank);
      losses.push_back(results[i].loss);
    }
    area_linear = area_under_ranks(ranks, losses, RankScale::linear);
    area_log2 = area_under_ranks(ranks, losses, RankScale::log2);
    enough = smallest_rank_keeping(share, results.front().loss, ranks, losses);
  }
};

/// A folder for results, made where there is none. Errors: open.
inline void make_folder(const std::string& folder) {
  std::error_code failure;
  std::filesystem::create_directories(folder, failure);
  if (failure) throw Error(Errc::open, "cannot make the folder: " + failure.message(), {.file = folder});
}

inline double accuracy(Index right, Index of) { return of > 0 ? static_cast<double>(right) / static_cast<double>(of) : 0.0; }

inline void print_table(const std::vector<RankResult>& ranks, const RankSummary& summary) {
  const bool answers = ranks.front().answers > 0;
  std::printf("\n  %4s %8s %10s  %-27s%s %10s %10s %9s\n", "rank", "loss", "perplexity", "above the best, 95 %", answers ? " exact match" : "",
              "parameters", "file", "ms/token");
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    const auto& r = ranks[i];
    const auto& above = summary.above_best[i];
    char difference[64] = "best";
    if (r.rank != summary.best) std::snprintf(difference, sizeof difference, "%+.4f [%+.4f, %+.4f]", above.value, above.low, above.high);
    std::printf("  %4s %8.4f %10.3f  %-27s", r.rank == 0 ? "base" : std::to_string(r.rank).c_str(), r.loss, std::exp(r.loss), difference);
    if (answers) std::printf(" %5lld / %-3lld", static_cast<long long>(r.correct), static_cast<long long>(r.answers));
    std::printf(" %8.2f M %7.2f MB %9.2f\n", static_cast<double>(r.parameters) / 1e6, static_cast<double>(r.bytes()) / 1e6,
                1e3 * r.token_seconds);
  }
  if (summary.enough > 0)
    std::printf("  rank %lld keeps %.0f %% of what the best rank, %lld, gains\n", static_cast<long long>(summary.enough),
                100.0 * RankSummary::share, static_cast<long long>(summary.best));
}

inline void write_report(const std::filesystem::path& folder, const RunReport& report, const RankSummary& summary) {
  Json json = report.settings;
  json["ranks"] = Json::array();
  std::string csv = "rank,loss,perplexity,above_best,low,high,answers,correct,parameters,bytes,ms_per_token\n";
  Series loss{"adapter", {}}, match{"adapter", {}};
  double base_loss = 0.0, base_match = 0.0;
  bool answers = false;
  for (std::size_t i = 0; i < report.ranks.size(); ++i) {
    const auto& r = report.ranks[i];
    const auto& above = summary.above_best[i];
    json["ranks"].push_back({{"rank", r.rank},
                             {"loss", r.loss},
                             {"perplexity", std::exp(r.loss)},
                             {"above_best", {{"value", above.value}, {"low", above.low}, {"high", above.high}}},
                             {"answers", r.answers},
                             {"correct", r.correct},
                             {"parameters", r.parameters},
                             {"bytes", r.bytes()},
                             {"ms_per_token", 1e3 * r.token_seconds},
                             {"example_losses", r.example_losses},
                             {"example_tokens", r.example_tokens}});
    char line[256];
    std::snprintf(line, sizeof line, "%lld,%.6f,%.6f,%.6f,%.6f,%.6f,%lld,%lld,%lld,%lld,%.4f\n", static_cast<long long>(r.rank), r.loss,
                  std::exp(r.loss), above.value, above.low, above.high, static_cast<long long>(r.answers),
                  static_cast<long long>(r.correct), static_cast<long long>(r.parameters), static_cast<long long>(r.bytes()),
                  1e3 * r.token_seconds);
    csv += line;
    answers |= r.answers > 0;
    if (r.rank == 0) {
      base_loss = r.loss;
      base_match = accuracy(r.correct, r.answers);
    } else {
      loss.points.emplace_back(static_cast<double>(r.rank), r.loss);
      match.points.emplace_back(static_cast<double>(r.rank), accuracy(r.correct, r.answers));
    }
  }
  json["mean_loss_over_rank"] = summary.area_linear;
  json["mean_loss_over_log2_rank"] = summary.area_log2;
  json["smallest_rank_keeping_99_percent"] = summary.enough;
  json["tokens"] = report.history.tokens;
  json["training_seconds"] = report.history.seconds;
  json["tokens_per_second"] = report.history.tokens_per_second();
  json["step_losses"] = report.history.step_losses;
  replace_file(folder / "report.json", json.dump(1) + "\n");
  replace_file(folder / "report.csv", csv);
  if (report.settings.at("method") == name(AdapterMethod::alpha)) return;  // nothing to draw over ranks
  std::vector<LineChart> charts;
  charts.push_back(
      {.title = "Loss at each rank, one run", .x_label = "rank", .y_label = "nats per token", .series = {loss}, .base = base_loss});
  if (answers)
    charts.push_back({.title = "Exact match at each rank",
                      .x_label = "rank",
                      .y_label = "answers",
                      .series = {match},
                      .base = base_match,
                      .percent = true});
  write_svg(folder / "ranks.svg", charts);
}

/// report.json and report.csv of what evaluate measured at each rank; numbers of what it did not measure are absent, fields empty.
inline void write_evaluation(const std::filesystem::path& folder, const Json& settings, const std::vector<RankResult>& ranks) {
  Json json = settings;
  json["ranks"] = Json::array();
  std::string csv =
      "rank,loss,perplexity,answers,correct,exact_match,exact_match_low,exact_match_high,bleu,brevity_penalty,questions,right,accuracy,"
      "accuracy_low,accuracy_high\n";
  const auto fields = [](const std::vector<double>& numbers, std::size_t count) {
    std::string text;
    for (std::size_t i = 0; i < count; ++i) {
      char number[64] = "";
      if (!numbers.empty()) std::snprintf(number, sizeof number, "%.9g", numbers[i]);
      text += std::string(",") + number;
    }
    return text;
  };
  const auto share = [](Index right, Index of, std::vector<double>& numbers) {
    const auto interval = accuracy_interval(right, of);
    numbers = {static_cast<double>(of), static_cast<double>(right), interval.value, interval.low, interval.high};
    return Json{{"value", interval.value}, {"low", interval.low}, {"high", interval.high}};
  };
  for (const auto& r : ranks) {
    Json line{{"rank", r.rank}};
    std::vector<double> loss, match, bleu, accuracy;
    if (!r.example_losses.empty()) {
      loss = {r.loss, std::exp(r.loss)};
      line.update(Json{{"loss", r.loss}, {"perplexity", std::exp(r.loss)}, {"example_losses", r.example_losses},
                       {"example_tokens", r.example_tokens}});
    }
    if (r.answers > 0)
      line.update(Json{{"answers", r.answers}, {"correct", r.correct}, {"exact_match", share(r.correct, r.answers, match)},
                       {"texts", r.texts}});
    if (r.bleu) {
      bleu = {r.bleu->score, r.bleu->brevity_penalty};
      line["bleu"] = {{"score", r.bleu->score}, {"precisions", r.bleu->precisions}, {"brevity_penalty", r.bleu->brevity_penalty},
                      {"hypothesis_words", r.bleu->hypothesis_words}, {"reference_words", r.bleu->reference_words}};
    }
    if (!r.chosen.empty()) {
      const auto questions = static_cast<Index>(r.chosen.size());
      line.update(Json{{"questions", questions}, {"right", r.chosen_right}, {"accuracy", share(r.chosen_right, questions, accuracy)},
                       {"chosen", r.chosen}});
    }
    json["ranks"].push_back(std::move(line));
    csv += std::to_string(r.rank) + fields(loss, 2) + fields(match, 5) + fields(bleu, 2) + fields(accuracy, 5) + "\n";
  }
  replace_file(folder / "report.json", json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n");  // an answer may end inside of a letter
  replace_file(folder / "report.csv", csv);
}

}  // namespace qdylora::examples
