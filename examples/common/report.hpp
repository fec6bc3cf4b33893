// The report of a fine-tuning run: a table for people, JSON and CSV for programs, an SVG picture of quality over rank. That of an evaluation:
// JSON and CSV.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/io/file.hpp>
#include <qdylora/io/json.hpp>

#include "evaluation.hpp"
#include "folder.hpp"
#include "progress.hpp"
#include "rank_summary.hpp"
#include "run_state.hpp"
#include "svg.hpp"

namespace qdylora::examples {

/// A run of finetune.
struct RunReport {
  Json settings;                  // what the run was told and found: model, recipe, steps, memory ...
  std::vector<RankResult> ranks;  // rank 0 first; by the method full the model before, and as rank 1 after
  RunHistory history;
};

inline void print_table(const std::vector<RankResult>& ranks, const RankSummary& summary) {
  const bool answers = !summary.match_gains.empty();
  std::printf("\n  %4s %8s %10s  %-27s%-*s %10s %10s %9s\n", "rank", "loss", "perplexity", "above the best, 95 %", answers ? 39 : 0,
              answers ? " exact match, points above base, 95 %" : "", "parameters", "file", "ms/token");
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    const auto& r = ranks[i];
    const auto& above = summary.above_best[i];
    char difference[64] = "best";
    if (r.rank != summary.best) std::snprintf(difference, sizeof difference, "%+.4f [%+.4f, %+.4f]", above.value, above.low, above.high);
    std::printf("  %4s %8.4f %10.3f  %-27s", r.rank == 0 ? "base" : std::to_string(r.rank).c_str(), r.loss, std::exp(r.loss), difference);
    if (answers) {
      const auto& gain = summary.match_gains[i];
      char text[64] = "";
      if (r.rank > 0) std::snprintf(text, sizeof text, "%+.1f [%+.1f, %+.1f]", 100.0 * gain.value, 100.0 * gain.low, 100.0 * gain.high);
      std::printf(" %5lld / %-3zu  %-25s", static_cast<long long>(count_right(r.matches)), r.matches.size(), text);
    }
    std::printf(" %8.2f M %7.2f MB %9.2f\n", static_cast<double>(r.parameters) / 1e6, static_cast<double>(r.bytes()) / 1e6,
                1e3 * r.token_seconds);
  }
  print_curves(summary.curves, summary.keep);
}

inline void append(std::vector<double>& numbers, const Interval& interval) {
  numbers.insert(numbers.end(), {interval.value, interval.low, interval.high});
}

/// `count` fields of a line of CSV, each behind a comma: those numbers, then empty ones.
inline std::string csv_fields(const std::vector<double>& numbers, std::size_t count) {
  std::string text;
  for (std::size_t i = 0; i < count; ++i) {
    char number[64] = "";
    if (i < numbers.size()) std::snprintf(number, sizeof number, "%.12g", numbers[i]);
    text += std::string(",") + number;
  }
  return text;
}

/// Of what a rank costs: parameters,bytes,ms_per_token.
inline std::string cost_fields(const RankResult& r) {
  return csv_fields({static_cast<double>(r.parameters), static_cast<double>(r.bytes()), 1e3 * r.token_seconds}, 3);
}

/// A run beside its rival, whose ranks are the same: a table, and what the rival's measures say over the ranks.
inline void print_rival(const RunReport& run, const RunReport& rival, double keep) {
  const AboveRival above(run.ranks, rival.ranks);
  const bool answers = !above.match.empty();
  std::printf("\n  %4s %8s %8s  %-27s%s\n", "rank", "loss", "rival's", "above the rival, 95 %",
              answers ? " exact match     rival's  points above the rival" : "");
  for (std::size_t i = 1; i < run.ranks.size(); ++i) {  // the base is the same
    const auto &ours = run.ranks[i], &theirs = rival.ranks[i];
    char text[64];
    std::snprintf(text, sizeof text, "%+.4f [%+.4f, %+.4f]", above.loss[i].value, above.loss[i].low, above.loss[i].high);
    std::printf("  %4lld %8.4f %8.4f  %-27s", static_cast<long long>(ours.rank), ours.loss, theirs.loss, text);
    if (answers)
      std::printf(" %5lld / %-3zu %5lld / %-3zu  %+.1f [%+.1f, %+.1f]", static_cast<long long>(count_right(ours.matches)),
                  ours.matches.size(), static_cast<long long>(count_right(theirs.matches)), theirs.matches.size(),
                  100.0 * above.match[i].value, 100.0 * above.match[i].low, 100.0 * above.match[i].high);
    std::printf("\n");
  }
  std::printf("  the rival's:\n");
  print_curves(rank_curves(rival.ranks, keep), keep);
}

inline Json to_json(const RunReport& report, const RankSummary& summary) {
  Json json = report.settings;
  json["ranks"] = Json::array();
  for (std::size_t i = 0; i < report.ranks.size(); ++i) {
    const auto& r = report.ranks[i];
    Json rank{{"rank", r.rank},
              {"loss", r.loss},
              {"perplexity", std::exp(r.loss)},
              {"above_best", to_json(summary.above_best[i])},
              {"answers", r.matches.size()},
              {"correct", count_right(r.matches)},
              {"example_losses", r.example_losses},
              {"example_tokens", r.example_tokens}};
    rank.update(cost_json(r));
    if (!r.matches.empty()) rank.update(Json{{"match_gain", to_json(summary.match_gains[i])}, {"example_matches", r.matches}});
    json["ranks"].push_back(std::move(rank));
  }
  json.update(to_json(summary.curves, summary.keep));
  json["tokens"] = report.history.tokens;
  json["training_seconds"] = report.history.seconds;
  json["tokens_per_second"] = report.history.tokens_per_second();
  json["step_losses"] = report.history.step_losses;
  return json;
}

/// A curve over the ranks for each of the runs, beside the base.
template <class Measure>
LineChart rank_chart(const std::string& title, const std::string& y_label, const RunReport& report, const RunReport* rival,
                     Measure&& measure) {
  LineChart chart{.title = title, .x_label = "rank", .y_label = y_label, .series = {}, .base = measure(report.ranks.front())};
  const auto add = [&](const std::string& name, const RunReport& run) {
    Series series{name, {}};
    for (const auto& r : std::span(run.ranks).subspan(1)) series.points.emplace_back(static_cast<double>(r.rank), measure(r));
    chart.series.push_back(std::move(series));
  };
  add("adapter", report);
  if (rival != nullptr) add("rival: QLoRA, cut by SVD", *rival);
  return chart;
}

/// report.json, report.csv and, of ranks, ranks.svg. rival: whose ranks are the same; fields of CSV that have no numbers are empty.
inline void write_report(const std::filesystem::path& folder, const RunReport& report, const RankSummary& summary,
                         const RunReport* rival = nullptr) {
  const bool answers = !summary.match_gains.empty();
  std::optional<AboveRival> above_rival;
  Json json = to_json(report, summary);
  if (rival != nullptr) {
    above_rival.emplace(report.ranks, rival->ranks);
    json["rival"] = to_json(*rival, RankSummary(rival->ranks, summary.keep));
  }
  std::string csv =
      "rank,loss,perplexity,above_best,low,high,answers,correct,match_gain,match_gain_low,match_gain_high,parameters,bytes,ms_per_token,"
      "rival_loss,above_rival,above_rival_low,above_rival_high,"
      "rival_correct,match_above_rival,match_above_rival_low,match_above_rival_high\n";
  for (std::size_t i = 0; i < report.ranks.size(); ++i) {
    const auto& r = report.ranks[i];
    std::vector<double> loss{r.loss, std::exp(r.loss)}, gain, rival_loss, rival_match;
    append(loss, summary.above_best[i]);
    if (answers) append(gain, summary.match_gains[i]);
    if (rival != nullptr) {
      rival_loss = {rival->ranks[i].loss};
      append(rival_loss, above_rival->loss[i]);
      json["ranks"][i]["above_rival"] = to_json(above_rival->loss[i]);
    }
    if (rival != nullptr && answers) {
      rival_match = {static_cast<double>(count_right(rival->ranks[i].matches))};
      append(rival_match, above_rival->match[i]);
      json["ranks"][i]["match_above_rival"] = to_json(above_rival->match[i]);
    }
    csv += std::to_string(r.rank) + csv_fields(loss, 5) + "," + std::to_string(r.matches.size()) + "," +
           std::to_string(count_right(r.matches)) + csv_fields(gain, 3) + cost_fields(r) + csv_fields(rival_loss, 4) +
           csv_fields(rival_match, 4) + "\n";
  }
  replace_file(folder / "report.json", json.dump(1) + "\n");
  replace_file(folder / "report.csv", csv);
  if (!has_ranks(adapter_method(report.settings.at("method").get<std::string>()))) return;  // nothing to draw over ranks
  std::vector<LineChart> charts;
  charts.push_back(rank_chart("Loss at each rank, one run", "nats per token", report, rival, [](const RankResult& r) { return r.loss; }));
  if (answers) {
    charts.push_back(
        rank_chart("Exact match at each rank", "answers", report, rival, [](const RankResult& r) { return accuracy(r.matches); }));
    charts.back().percent = true;
  }
  write_svg(folder / "ranks.svg", charts);
}

/// report.json and report.csv of what evaluate measured at each rank; numbers of what it did not measure are absent, fields empty.
/// keep: of RankCurve::enough.
inline void write_evaluation(const std::filesystem::path& folder, const Json& settings, const std::vector<RankResult>& ranks,
                             const AboveFirst& above_first, double keep) {
  Json json = settings;
  json.update(to_json(rank_curves(ranks, keep), keep));
  json["ranks"] = Json::array();
  std::string csv =
      "rank,loss,perplexity,loss_above_first,loss_above_first_low,loss_above_first_high,"
      "answers,correct,exact_match,exact_match_low,exact_match_high,match_above_first,match_above_first_low,match_above_first_high,"
      "bleu,brevity_penalty,bleu_above_first,bleu_above_first_low,bleu_above_first_high,"
      "questions,right,accuracy,accuracy_low,accuracy_high,accuracy_above_first,accuracy_above_first_low,accuracy_above_first_high,"
      "parameters,bytes,ms_per_token\n";
  for (std::size_t i = 0; i < ranks.size(); ++i) {
    const auto& r = ranks[i];
    Json line{{"rank", r.rank}};
    line.update(cost_json(r));
    std::vector<double> loss, match, bleu, choice;  // as the line of CSV has them
    const auto add = [&](const char* key, const Interval& interval, std::vector<double>& numbers) {
      line[key] = to_json(interval);
      append(numbers, interval);
    };
    const auto add_count = [&](const char* all, const char* right, const std::vector<double>& scores, std::vector<double>& numbers) {
      line.update(Json{{all, scores.size()}, {right, count_right(scores)}});
      numbers = {static_cast<double>(scores.size()), static_cast<double>(count_right(scores))};
      return accuracy_interval(count_right(scores), std::ssize(scores));
    };
    if (!r.example_losses.empty()) {
      loss = {r.loss, std::exp(r.loss)};
      line.update(Json{{"loss", r.loss}, {"perplexity", std::exp(r.loss)}, {"example_losses", r.example_losses},
                       {"example_tokens", r.example_tokens}});
      if (i > 0) add("loss_above_first", above_first.loss[i], loss);
    }
    if (!r.matches.empty()) {
      add("exact_match", add_count("answers", "correct", r.matches, match), match);
      if (i > 0) add("match_above_first", above_first.match[i], match);
      line.update(Json{{"example_matches", r.matches}, {"texts", r.texts}});
    }
    if (r.bleu) {
      bleu = {r.bleu->score, r.bleu->brevity_penalty};
      line["bleu"] = {{"score", r.bleu->score}, {"precisions", r.bleu->precisions}, {"brevity_penalty", r.bleu->brevity_penalty},
                      {"hypothesis_words", r.bleu->hypothesis_words}, {"reference_words", r.bleu->reference_words}};
      if (i > 0) add("bleu_above_first", above_first.bleu[i], bleu);
    }
    if (!r.chosen.empty()) {
      add("accuracy", add_count("questions", "right", r.chosen_right, choice), choice);
      if (i > 0) add("accuracy_above_first", above_first.choice[i], choice);
      line["chosen"] = r.chosen;
    }
    json["ranks"].push_back(std::move(line));
    csv += std::to_string(r.rank) + csv_fields(loss, 5) + csv_fields(match, 8) + csv_fields(bleu, 5) + csv_fields(choice, 8) +
           cost_fields(r) + "\n";
  }
  replace_file(folder / "report.json", json.dump(1, ' ', false, Json::error_handler_t::replace) + "\n");  // an answer may end inside of a letter
  replace_file(folder / "report.csv", csv);
}

}  // namespace qdylora::examples
