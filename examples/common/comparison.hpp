// What compare keeps of its runs, a JSON line each, and the tables that it prints of them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <fstream>
#include <limits>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/io/json.hpp>
#include <qdylora/model/bleu_difference.hpp>
#include <qdylora/model/rank_report.hpp>
#include <qdylora/nn/ranks.hpp>

#include "bleu_json.hpp"
#include "json_lines.hpp"

namespace qdylora::examples {

/// What every run is measured by; tasks have other names.
inline const std::string held_out_loss = "held-out loss";

/// A run of a recipe as one base has it: at every rank, then the base alone.
struct ComparedRun {
  std::string recipe;
  std::uint64_t seed = 0;
  std::string on;  // the format of the base
  std::vector<double> losses;
  double share = 0.0;                                      // of the rows, what auto spent on low ranks
  std::map<std::string, std::vector<double>> scores = {};  // of tasks, in percent

  /// By measure, again at every rank, then the base: of each held-out example its loss a token, or 1 if it is right and 0 if not. Runs of
  /// earlier versions have none.
  std::map<std::string, std::vector<std::vector<double>>> examples = {};
  std::vector<double> example_tokens = {};  // scored in each example of the loss
  /// Likewise what BLEU, which is of all answers together, counts in each of them.
  std::vector<std::vector<BleuCounts>> bleu_counts = {};
  Index parameters = 0;    // that trained, at the largest rank; 0 in runs of earlier versions
  double base_bits = 0.0;  // of a linear weight of the base; likewise

  const std::vector<double>& measured(const std::string& measure) const {
    return measure == held_out_loss ? losses : scores.at(measure);
  }
  bool has_examples(const std::string& measure) const { return measure == "BLEU" ? !bleu_counts.empty() : examples.contains(measure); }
};

/// The line of a run. base: the format that needs no mention.
inline Json to_json(const ComparedRun& run, const Json& key, const std::string& base) {
  Json line{{"key", key}, {"recipe", run.recipe}, {"seed", run.seed}, {"losses", run.losses}, {"share", run.share}};
  if (run.on != base) line["on"] = run.on;
  if (!run.scores.empty()) line["scores"] = run.scores;
  line.update(Json{{"examples", run.examples},
                   {"example_tokens", run.example_tokens},
                   {"parameters", run.parameters},
                   {"base_bits", run.base_bits}});
  for (const auto& answers : run.bleu_counts) line["bleu_counts"].push_back(to_json(answers));
  return line;
}

namespace detail {

/// null, which JSON has for NaN, is of a run that went astray.
inline std::vector<double> numbers(const Json& list) {
  std::vector<double> all;
  for (const auto& x : list) all.push_back(x.is_number() ? x.get<double>() : std::numeric_limits<double>::quiet_NaN());
  return all;
}

/// The examples of a line, where it has them. Errors: json.
inline void read_examples(const Json& line, ComparedRun& run) {
  if (!line.contains("examples")) return;
  run.example_tokens = numbers(line.value("example_tokens", Json::array()));
  for (const auto& [measure, lists] : get_object(line, "examples").items()) {
    auto& scores = run.examples[measure];
    for (const auto& list : lists) scores.push_back(numbers(list));
    bool whole = scores.size() == run.losses.size() && !scores.front().empty();
    for (const auto& list : scores) whole = whole && list.size() == scores.front().size();
    if (measure == held_out_loss) whole = whole && scores.front().size() == run.example_tokens.size();
    QDYLORA_EXPECTS(whole, json,
                    "'examples': expected a score of every example, at every rank and of the base, in '" + printable(measure) + "'");
  }
}

/// What BLEU counts in the answers of a line, where it has that. Errors: json.
inline void read_bleu(const Json& line, ComparedRun& run) {
  if (!line.contains("bleu_counts")) return;
  const auto expect = [](bool whole) {
    QDYLORA_EXPECTS(whole, json, "'bleu_counts': expected those of every answer, at every rank and of the base");
  };
  const Json& lists = line["bleu_counts"];
  expect(lists.is_array() && lists.size() == run.losses.size());
  for (const auto& list : lists) {
    run.bleu_counts.push_back(read_bleu_counts(list));
    expect(run.bleu_counts.back().size() == run.bleu_counts.front().size());
  }
}

}  // namespace detail

/// The runs of a file, none where there is none, that have this key, a loss at each of `ranks` ranks and of the base, and as many scores of
/// each task. Errors, with the line: truncated (a part of a line, which a crash or a full disk leaves), json.
inline std::vector<ComparedRun> read_runs(const std::string& file, const Json& key, const std::string& base, Index ranks,
                                          const std::vector<std::string>& tasks) {
  std::vector<ComparedRun> runs;
  std::ifstream lines(file);
  Index number = 0;
  for (std::string text; std::getline(lines, text);) {
    ++number;
    if (text.empty()) continue;
    at_line(file, "line " + std::to_string(number), [&] {
      // Nothing may be written behind a part of a line.
      QDYLORA_EXPECTS(!lines.eof(), truncated, "has no end; remove it");
      const Json line = parse_json(text, {});
      if (get_object(line, "key") != key) return;
      ComparedRun run{.recipe = get_string(line, "recipe"),
                      .seed = static_cast<std::uint64_t>(get_integer(line, "seed", 0, std::numeric_limits<std::int64_t>::max())),
                      .on = get_string_or(line, "on", base),
                      .losses = detail::numbers(line.value("losses", Json::array())),
                      .share = get_number(line, "share"),
                      .parameters = get_integer_or(line, "parameters", 0, 0, std::numeric_limits<std::int64_t>::max()),
                      .base_bits = get_number_or(line, "base_bits", 0.0)};
      const auto whole = [&](const std::vector<double>& all) { return std::ssize(all) == ranks + 1; };
      bool complete = whole(run.losses);
      for (const auto& task : tasks)
        complete = complete && whole(run.scores[task] = detail::numbers(get_object(line, "scores").value(task, Json::array())));
      if (!complete) return;
      detail::read_examples(line, run);
      detail::read_bleu(line, run);
      runs.push_back(std::move(run));
    });
  }
  return runs;
}

/// What is compared, in the order of the tables.
struct Comparison {
  std::vector<std::string> recipes;
  std::vector<std::uint64_t> seeds;
  RankSet ranks;
  std::string against;  // the recipe that differences are taken to
  std::vector<ComparedRun> runs;
};

/// Runs of two recipes with the same seed.
struct RunPair {
  const ComparedRun* run;
  const ComparedRun* against;
};

/// Throws Errc::bad_argument for a run that was measured on others.
inline void expect_same_examples(bool same, const ComparedRun& run, const ComparedRun& first) {
  QDYLORA_EXPECTS(same, bad_argument,
                  "--results: " + run.recipe + ", seed " + std::to_string(run.seed) + ", was measured on other examples than " +
                      first.recipe + ", seed " + std::to_string(first.seed));
}

/// Differences of BLEU at every rank, then of its mean over the ranks: of means over the seeds, with intervals over the answers, which
/// every resample draws alike for all runs. pairs: at least one, all with counts. Errors: bad_argument where these are of other answers.
inline std::vector<Interval> paired_bleu_differences(const std::vector<RunPair>& pairs) {
  const ComparedRun& first = *pairs.front().run;
  const std::size_t ranks = first.losses.size() - 1;
  std::vector<std::vector<std::vector<BleuCounts>>> ours(ranks + 1), theirs = ours;  // by rank, then of all ranks
  const auto add = [&](const ComparedRun& run, auto& systems) {
    expect_same_examples(run.bleu_counts.front().size() == first.bleu_counts.front().size(), run, first);
    for (std::size_t rank = 0; rank < ranks; ++rank)
      for (const std::size_t at : {rank, ranks}) systems[at].push_back(run.bleu_counts[rank]);
  };
  for (const auto& pair : pairs) {
    add(*pair.run, ours);
    add(*pair.against, theirs);
  }
  std::vector<Interval> differences;
  for (std::size_t at = 0; at <= ranks; ++at) differences.push_back(paired_bleu_difference(ours[at], theirs[at]));
  return differences;
}

/// Differences of a measure at every rank, then of its mean over the ranks, with intervals over the held-out examples. An example has its
/// mean over the seeds: were each seed one of its own, what it has in common to all would count as often, and intervals be too narrow. The
/// seeds are taken as they are. pairs: at least one, all with examples of the measure. Errors: bad_argument where these are not the same,
/// and those of paired_difference.
inline std::vector<Interval> paired_differences(const std::vector<RunPair>& pairs, const std::string& measure) {
  if (measure == "BLEU") return paired_bleu_differences(pairs);
  const ComparedRun& first = *pairs.front().run;
  const std::size_t ranks = first.losses.size() - 1, examples = first.examples.at(measure).front().size();
  std::vector<std::vector<double>> ours(ranks + 1, std::vector<double>(examples)), theirs = ours;
  const auto add = [&](const ComparedRun& run, std::vector<std::vector<double>>& means) {
    const auto& scores = run.examples.at(measure);
    expect_same_examples(scores.front().size() == examples && (measure != held_out_loss || run.example_tokens == first.example_tokens), run,
                         first);
    for (std::size_t rank = 0; rank < ranks; ++rank)
      for (std::size_t i = 0; i < examples; ++i) {
        const double part = scores[rank][i] / static_cast<double>(pairs.size());
        means[rank][i] += part;
        means[ranks][i] += part / static_cast<double>(ranks);
      }
  };
  for (const auto& pair : pairs) {
    add(*pair.run, ours);
    add(*pair.against, theirs);
  }
  std::vector<Interval> differences;
  for (std::size_t at = 0; at <= ranks; ++at)
    differences.push_back(
        paired_difference(ours[at], theirs[at], measure == held_out_loss ? first.example_tokens : std::vector<double>{}));
  return differences;
}

namespace detail {

/// What printf makes of numbers.
inline std::string printed(const char* format, auto... numbers) {
  char text[96];
  std::snprintf(text, sizeof text, format, numbers...);
  return text;
}

}  // namespace detail

/// A table in Markdown of what trained, at the largest rank, and of its base, where runs know it; "" where none does.
inline std::string costs(const Comparison& c, const std::string& on) {
  std::string rows;
  for (const auto& name : c.recipes) {
    const auto run = std::find_if(c.runs.begin(), c.runs.end(),
                                  [&](const ComparedRun& r) { return r.recipe == name && r.on == on && r.parameters > 0; });
    if (run == c.runs.end()) continue;
    rows += "| " + name + " | " + std::to_string(run->parameters) + detail::printed(" | %.2f |\n", run->base_bits);
  }
  if (rows.empty()) return {};
  return "\n| at rank " + std::to_string(c.ranks.max()) + " | parameters trained | bits of a base weight |\n|---|---|---|\n" + rows;
}

/// Tables in Markdown of one measure on one base: means over seeds, differences by seed, and differences with intervals as far as runs have
/// examples. Errors: those of paired_differences.
inline std::string tables(const Comparison& c, const std::string& on, const std::string& measure) {
  const bool losses = measure == held_out_loss;
  const auto columns = static_cast<std::size_t>(c.ranks.size());
  using detail::printed;
  const auto head = [&](const std::string& first) {
    std::string line = "\n| " + first + " |";
    for (const Index rank : c.ranks) line += " " + std::to_string(rank) + " |";
    line += " mean |\n|---|";
    for (std::size_t i = 0; i <= columns; ++i) line += "---|";
    return line + "\n";
  };
  const auto row = [&](const std::string& name, const std::vector<double>& values, const char* format) {
    std::string line = "| " + name + " |";
    double all = 0.0;
    for (std::size_t i = 0; i < columns; ++i) {
      line += printed(format, values[i]);
      all += values[i];
    }
    return line + printed(format, all / static_cast<double>(columns)) + "\n";
  };
  std::map<std::string, std::map<std::uint64_t, const ComparedRun*>> found;
  for (const auto& run : c.runs)
    if (run.on == on) found[run.recipe][run.seed] = &run;
  const auto counted = [](const std::string& name, std::size_t seeds) { return name + " (" + std::to_string(seeds) + ")"; };

  std::string out = head(measure + ", mean over seeds");
  for (const auto& name : c.recipes) {
    std::vector<double> sums(columns);
    std::size_t runs = 0;
    for (const auto seed : c.seeds) {
      if (!found[name].contains(seed)) continue;
      ++runs;
      for (std::size_t i = 0; i < columns; ++i) sums[i] += found[name][seed]->measured(measure)[i];
    }
    if (runs == 0) continue;
    for (double& sum : sums) sum /= static_cast<double>(runs);
    out += row(counted(name, runs), sums, losses ? " %.3f |" : " %.1f |");
  }

  out += head("difference to " + c.against + ", by seed");
  std::string intervals;
  for (const auto& name : c.recipes) {
    if (name == c.against) continue;
    std::vector<RunPair> pairs;  // with examples
    for (const auto seed : c.seeds) {
      if (!found[name].contains(seed) || !found[c.against].contains(seed)) continue;
      const RunPair pair{found[name][seed], found[c.against][seed]};
      auto difference = pair.run->measured(measure);
      for (std::size_t i = 0; i < columns; ++i) difference[i] -= pair.against->measured(measure)[i];
      out += row(name + ", seed " + std::to_string(seed), difference, losses ? " %+.3f |" : " %+.1f |");
      if (pair.run->has_examples(measure) && pair.against->has_examples(measure)) pairs.push_back(pair);
    }
    if (pairs.empty()) continue;
    intervals += "| " + counted(name, pairs.size()) + " |";
    const double unit = losses || measure == "BLEU" ? 1.0 : 100.0;  // of shares, points
    for (const auto& d : paired_differences(pairs, measure))
      intervals += printed(losses ? " %+.3f [%+.3f, %+.3f] |" : " %+.1f [%+.1f, %+.1f] |", unit * d.value, unit * d.low, unit * d.high);
    intervals += "\n";
  }
  if (!intervals.empty()) out += head("difference to " + c.against + ", mean over seeds, 95 % over examples") + intervals;
  return out;
}

}  // namespace qdylora::examples
