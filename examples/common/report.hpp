// The report of a fine-tuning run: a table for people, JSON and CSV for programs, an SVG picture of quality over rank.
#pragma once

#include <cmath>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <string>
#include <vector>

#include <qdylora/io/file.hpp>
#include <qdylora/io/json.hpp>

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

inline double accuracy(const RankResult& r) {
  return r.answers > 0 ? static_cast<double>(r.correct) / static_cast<double>(r.answers) : 0.0;
}

inline void print_table(const std::vector<RankResult>& ranks) {
  const bool answers = !ranks.empty() && ranks.front().answers > 0;
  std::printf("\n  %8s  %8s  %10s%s\n", "rank", "loss", "perplexity", answers ? "  exact match" : "");
  for (const auto& r : ranks) {
    std::printf("  %8s  %8.4f  %10.3f", r.rank == 0 ? "base" : std::to_string(r.rank).c_str(), r.loss, std::exp(r.loss));
    if (answers) std::printf("  %4lld / %-4lld", static_cast<long long>(r.correct), static_cast<long long>(r.answers));
    std::printf("\n");
  }
}

inline void write_text(const std::filesystem::path& path, const std::string& text) {
  replace_file(path, std::as_bytes(std::span(text.data(), text.size())));
}

inline void write_report(const std::filesystem::path& folder, const RunReport& report) {
  Json json = report.settings;
  json["ranks"] = Json::array();
  std::string csv = "rank,loss,perplexity,answers,correct\n";
  Series loss{"adapter", {}}, match{"adapter", {}};
  double base_loss = 0.0, base_match = 0.0;
  bool answers = false;
  for (const auto& r : report.ranks) {
    json["ranks"].push_back({{"rank", r.rank},
                             {"loss", r.loss},
                             {"perplexity", std::exp(r.loss)},
                             {"answers", r.answers},
                             {"correct", r.correct},
                             {"example_losses", r.example_losses}});
    char line[160];
    std::snprintf(line, sizeof line, "%lld,%.6f,%.6f,%lld,%lld\n", static_cast<long long>(r.rank), r.loss, std::exp(r.loss),
                  static_cast<long long>(r.answers), static_cast<long long>(r.correct));
    csv += line;
    answers |= r.answers > 0;
    if (r.rank == 0) {
      base_loss = r.loss;
      base_match = accuracy(r);
    } else {
      loss.points.emplace_back(static_cast<double>(r.rank), r.loss);
      match.points.emplace_back(static_cast<double>(r.rank), accuracy(r));
    }
  }
  json["tokens"] = report.history.tokens;
  json["training_seconds"] = report.history.seconds;
  json["tokens_per_second"] = report.history.tokens_per_second();
  json["step_losses"] = report.history.step_losses;
  write_text(folder / "report.json", json.dump(1) + "\n");
  write_text(folder / "report.csv", csv);
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

}  // namespace qdylora::examples
