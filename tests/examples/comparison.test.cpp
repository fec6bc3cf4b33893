// Lines of compare's results and its tables, on hand-made runs.
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include <qdylora/core/random.hpp>

#include "common/comparison.hpp"
#include "support/catch.hpp"
#include "support/files.hpp"

namespace comparison_test {

namespace qd = qdylora;
namespace ex = qdylora::examples;
using qd::Index;

namespace {

constexpr std::size_t examples = 120;

// What BLEU counts in answers of seven words, of which as many are right as a draw says, in a row.
std::vector<qd::BleuCounts> answers_of(std::uint64_t seed, std::uint32_t most_right) {
  qd::Rng rng(seed);
  std::vector<qd::BleuCounts> answers(20);
  for (auto& counts : answers) {
    const auto right = static_cast<Index>(4 + rng.below(most_right - 3));
    for (Index n = 0; n < 4; ++n) {
      counts.matched[static_cast<std::size_t>(n)] = right - n;
      counts.total[static_cast<std::size_t>(n)] = 7 - n;
    }
    counts.hypothesis_words = counts.reference_words = 7;
  }
  return answers;
}

// Ranks 1 and 2 and the base on examples of 1 to 3 tokens. An example is as hard for all seeds, and what is added to its loss is its own.
ex::ComparedRun run_of(const std::string& recipe, std::uint64_t seed, double added = 0.0) {
  ex::ComparedRun run{.recipe = recipe, .seed = seed, .on = "nf4", .losses = {}};
  for (std::size_t i = 0; i < examples; ++i) run.example_tokens.push_back(1.0 + static_cast<double>(i % 3));
  for (int rank = 0; rank < 3; ++rank) {
    qd::Rng hard(1), own(2), noise(3 + seed);
    auto& losses = run.examples[ex::held_out_loss].emplace_back();
    auto& right = run.examples["accuracy"].emplace_back();
    double sum = 0.0, tokens = 0.0;
    for (std::size_t i = 0; i < examples; ++i) {
      const double more = rank == 2 ? 0.0 : added * (1.0 + static_cast<double>(own.normal()));
      losses.push_back(5.0 + static_cast<double>(hard.normal()) + 0.01 * static_cast<double>(noise.normal()) + more / (1.0 + rank));
      right.push_back(losses.back() < 5.0 ? 1.0 : 0.0);
      sum += run.example_tokens[i] * losses.back();
      tokens += run.example_tokens[i];
    }
    run.losses.push_back(sum / tokens);
    run.scores["accuracy"].push_back(100.0 * static_cast<double>(std::count(right.begin(), right.end(), 1.0)) / examples);
    run.bleu_counts.push_back(answers_of(10 * seed + static_cast<std::uint64_t>(rank), added > 0.0 ? 7 : 5));
    run.scores["BLEU"].push_back(qd::corpus_bleu(run.bleu_counts.back()).score);
  }
  return run;
}

void write_runs(const std::filesystem::path& file, const std::vector<ex::ComparedRun>& runs, const qd::Json& key) {
  std::string text;
  for (const auto& run : runs) text += ex::to_json(run, key, "nf4").dump() + "\n";
  test::write_file(file, text);
}

}  // namespace

TEST_CASE("lines of results come back as they were, and those of earlier versions without examples", "[comparison]") {
  const test::TemporaryFolder folder;
  const auto file = folder / "runs.jsonl";
  const qd::Json key{{"steps", 3}};
  CHECK(ex::read_runs(file.string(), key, "nf4", 2, {}).empty());  // no file yet
  auto other = run_of("qlora", 1);
  other.on = "fp8";
  other.parameters = 1234;
  other.base_bits = 8.25;
  write_runs(file, {run_of("qlora", 0), other}, key);
  const auto read = ex::read_runs(file.string(), key, "nf4", 2, {"accuracy", "BLEU"});
  REQUIRE(read.size() == 2);
  CHECK(read[0].recipe == "qlora");
  CHECK(read[0].on == "nf4");
  CHECK(read[1].on == "fp8");
  CHECK(read[1].seed == 1);
  CHECK(read[1].parameters == 1234);
  CHECK(read[1].base_bits == 8.25);
  CHECK(read[0].losses == run_of("qlora", 0).losses);
  CHECK(read[0].scores == run_of("qlora", 0).scores);
  CHECK(read[0].examples == run_of("qlora", 0).examples);
  CHECK(read[0].example_tokens == run_of("qlora", 0).example_tokens);
  CHECK(read[0].bleu_counts == run_of("qlora", 0).bleu_counts);
  CHECK(ex::read_runs(file.string(), {{"steps", 4}}, "nf4", 2, {}).empty());
  CHECK(ex::read_runs(file.string(), key, "nf4", 3, {}).empty());         // other ranks
  CHECK(ex::read_runs(file.string(), key, "nf4", 2, {"exact match"}).empty());  // not measured

  test::write_file(file, R"({"key":{"steps":3},"losses":[1.5,null,2.5],"recipe":"qdylora","seed":7,"share":0.25})" "\n");
  const auto old = ex::read_runs(file.string(), key, "nf4", 2, {});
  REQUIRE(old.size() == 1);
  CHECK(old[0].seed == 7);
  CHECK(old[0].share == 0.25);
  CHECK(std::isnan(old[0].losses[1]));
  CHECK(old[0].examples.empty());
  CHECK(old[0].bleu_counts.empty());
  CHECK(old[0].parameters == 0);
}

TEST_CASE("a line of results whose examples do not fit, or without its end, is named", "[comparison]") {
  const test::TemporaryFolder folder;
  const auto file = folder / "runs.jsonl";
  const qd::Json key = qd::Json::object();
  const auto refuses = [&](ex::ComparedRun run, const char* word) {
    write_runs(file, {run_of("qlora", 0), run}, key);
    const auto error = test::error_of([&] { (void)ex::read_runs(file.string(), key, "nf4", 2, {}); });
    CAPTURE(word);
    REQUIRE(error.has_value());
    CHECK(error->code() == qd::Errc::json);
    CHECK(std::string(error->what()).find("line 2") != std::string::npos);
    CHECK(std::string(error->what()).find(word) != std::string::npos);
  };
  auto run = run_of("qlora", 1);
  run.examples["accuracy"][1].pop_back();
  refuses(run, "accuracy");
  run = run_of("qlora", 1);
  run.examples["accuracy"].pop_back();
  refuses(run, "accuracy");
  run = run_of("qlora", 1);
  run.example_tokens.pop_back();
  refuses(run, "held-out loss");
  run = run_of("qlora", 1);
  run.bleu_counts.pop_back();
  refuses(run, "bleu_counts");
  run = run_of("qlora", 1);
  run.bleu_counts[1].pop_back();
  refuses(run, "bleu_counts");
  run = run_of("qlora", 1);
  run.bleu_counts[1][3].matched[2] = 6;  // of 5
  refuses(run, "1- to 4-grams");
  run = run_of("qlora", 1);
  run.bleu_counts[2][0].hypothesis_words = 8;  // have one 1-gram more
  refuses(run, "1- to 4-grams");
  run = run_of("qlora", 1);
  run.bleu_counts[0][0].reference_words = -1;
  refuses(run, "1- to 4-grams");
  for (const auto& damaged : {qd::Json(7), qd::Json::array(), qd::Json::array({7}), qd::Json::array({qd::Json::array({1, 2})}),
                              qd::Json::array({{1, 0, 0, 0, 1, 0, 0, 0, 1, "1"}}), qd::Json::array({{1, 0, 0, 0, 1, 0, 0, 0, 1, 0.5}}),
                              qd::Json::array({{1, 0, 0, 0, 1, 0, 0, 0, 1, 18446744073709551615u}})}) {
    CAPTURE(damaged.dump());
    CHECK(test::code_of([&] { (void)ex::read_bleu_counts(damaged); }) == qd::Errc::json);
  }
  CHECK(ex::read_bleu_counts(qd::Json::array({{1, 0, 0, 0, 1, 0, 0, 0, 1, 9}})).front().reference_words == 9);
  test::write_file(file, "{\"key\":{}");
  CHECK(test::code_of([&] { (void)ex::read_runs(file.string(), key, "nf4", 2, {}); }) == qd::Errc::truncated);
}

TEST_CASE("paired differences are of examples, whose seeds are no more of them", "[comparison]") {
  const std::vector<ex::ComparedRun> ours{run_of("a", 0, 0.5), run_of("a", 1, 0.5)}, theirs{run_of("b", 0), run_of("b", 1)};
  const auto one = ex::paired_differences({{&ours[0], &theirs[0]}}, ex::held_out_loss);
  const auto two = ex::paired_differences({{&ours[0], &theirs[0]}, {&ours[1], &theirs[1]}}, ex::held_out_loss);
  REQUIRE(two.size() == 3);  // two ranks and their mean
  for (std::size_t at = 0; at < 2; ++at) {
    const double mean = (ours[0].losses[at] - theirs[0].losses[at] + ours[1].losses[at] - theirs[1].losses[at]) / 2.0;
    CHECK(two[at].value == Approx(mean));
  }
  CHECK(two[2].value == Approx((two[0].value + two[1].value) / 2.0));
  // The interval at rank 1 is that of a weighted mean of examples' differences, to first order.
  double whole = 0.0, variance = 0.0;
  for (const double w : ours[0].example_tokens) whole += w;
  for (std::size_t i = 0; i < examples; ++i) {
    const auto d = ours[0].examples.at(ex::held_out_loss)[0][i] - theirs[0].examples.at(ex::held_out_loss)[0][i] - one[0].value;
    variance += std::pow(ours[0].example_tokens[i] / whole * d, 2);
  }
  const double width = 2.0 * 1.96 * std::sqrt(variance);
  CHECK(one[0].high - one[0].low == Approx(width).epsilon(0.1));
  // Another seed of the same differences makes it no narrower.
  CHECK(two[0].high - two[0].low == Approx(width).epsilon(0.1));
  CHECK(one[0].low > 0.0);
  // What is half as large at rank 2 has half the interval.
  CHECK(one[1].high - one[1].low == Approx(width / 2.0).epsilon(0.1));

  auto elsewhere = theirs[1];
  elsewhere.example_tokens[0] = 9.0;
  CHECK(test::code_of([&] { (void)ex::paired_differences({{&ours[0], &theirs[0]}, {&ours[1], &elsewhere}}, ex::held_out_loss); }) ==
        qd::Errc::bad_argument);
}

TEST_CASE("tables have means of all runs, and intervals of those with examples", "[comparison]") {
  ex::Comparison c{.recipes = {"a", "b", "absent"}, .seeds = {0, 1}, .ranks = {1, 2}, .against = "b", .runs = {}};
  c.runs = {run_of("a", 0, 0.5), run_of("a", 1, 0.5), run_of("b", 0), run_of("b", 1)};
  const auto printed = [](const char* format, double x) {
    char text[32];
    std::snprintf(text, sizeof text, format, x);
    return std::string(text);
  };
  const auto whole = ex::tables(c, "nf4", ex::held_out_loss);
  CAPTURE(whole);
  double mean[2];
  for (std::size_t at = 0; at < 2; ++at) mean[at] = (c.runs[0].losses[at] + c.runs[1].losses[at]) / 2.0;
  CHECK(whole.find("\n| held-out loss, mean over seeds | 1 | 2 | mean |\n|---|---|---|---|\n| a (2) | " + printed("%.3f", mean[0]) + " | " +
                   printed("%.3f", mean[1]) + " | " + printed("%.3f", (mean[0] + mean[1]) / 2.0) + " |\n| b (2) |") != std::string::npos);
  CHECK(whole.find("| a, seed 1 | " + printed("%+.3f", c.runs[1].losses[0] - c.runs[3].losses[0]) + " |") != std::string::npos);
  const auto interval = ex::paired_differences({{&c.runs[0], &c.runs[2]}, {&c.runs[1], &c.runs[3]}}, ex::held_out_loss)[0];
  CHECK(whole.find("\n| difference to b, mean over seeds, 95 % over examples | 1 | 2 | mean |\n|---|---|---|---|\n| a (2) | " +
                   printed("%+.3f", interval.value) + " [" + printed("%+.3f", interval.low) + ", " + printed("%+.3f", interval.high) +
                   "] |") != std::string::npos);
  CHECK(whole.find("absent") == std::string::npos);
  const auto accuracy = ex::tables(c, "nf4", "accuracy");
  CHECK(accuracy.find("\n| a (2) | " + printed("%+.1f", (c.runs[0].scores["accuracy"][0] + c.runs[1].scores["accuracy"][0]) / 2.0 -
                                                             (c.runs[2].scores["accuracy"][0] + c.runs[3].scores["accuracy"][0]) / 2.0) +
                      " [") != std::string::npos);

  // A run without examples still counts for means; the interval is of the other seed.
  c.runs[3].examples.clear();
  const auto part = ex::tables(c, "nf4", ex::held_out_loss);
  const auto before_intervals = [](const std::string& text) { return text.substr(0, text.find("| difference to b, mean over seeds")); };
  CHECK(before_intervals(part) == before_intervals(whole));
  CHECK(part.find("95 % over examples | 1 | 2 | mean |\n|---|---|---|---|\n| a (1) | ") != std::string::npos);
  c.runs[2].examples.clear();
  CHECK(ex::tables(c, "nf4", ex::held_out_loss).find("95 %") == std::string::npos);
  // A BLEU is of all answers together, and so are its resamples; the means are of seeds, and the last of ranks too.
  const auto bleu = ex::paired_differences({{&c.runs[0], &c.runs[2]}, {&c.runs[1], &c.runs[3]}}, "BLEU");
  REQUIRE(bleu.size() == 3);
  for (std::size_t at = 0; at < 2; ++at) {
    const auto score = [&](std::size_t run) { return c.runs[run].scores.at("BLEU")[at]; };
    CHECK(bleu[at].value == Approx((score(0) + score(1) - score(2) - score(3)) / 2.0));
    CHECK(bleu[at].low > 0.0);
    CHECK(bleu[at].high > bleu[at].low);
  }
  CHECK(bleu[2].value == Approx((bleu[0].value + bleu[1].value) / 2.0));
  CHECK(ex::tables(c, "nf4", "BLEU").find("95 % over examples | 1 | 2 | mean |\n|---|---|---|---|\n| a (2) | " +
                                          printed("%+.1f", bleu[0].value) + " [" + printed("%+.1f", bleu[0].low) + ", ") !=
        std::string::npos);
  c.runs[1].bleu_counts[0].pop_back();
  CHECK(test::code_of([&] { (void)ex::tables(c, "nf4", "BLEU"); }) == qd::Errc::bad_argument);
  for (auto& run : c.runs) run.bleu_counts.clear();
  CHECK(ex::tables(c, "nf4", "BLEU").find("95 %") == std::string::npos);
}

TEST_CASE("a table says what trained and on what, of runs that know it", "[comparison]") {
  ex::Comparison c{.recipes = {"a", "b", "absent"}, .seeds = {0}, .ranks = {1, 2}, .against = "b", .runs = {run_of("b", 0), run_of("a", 0)}};
  CHECK(ex::costs(c, "nf4").empty());
  c.runs[1].parameters = 524288;
  c.runs[1].base_bits = 4.127;
  const std::string head = "\n| at rank 2 | parameters trained | bits of a base weight |\n|---|---|---|\n";
  CHECK(ex::costs(c, "nf4") == head + "| a | 524288 | 4.13 |\n");
  CHECK(ex::costs(c, "fp8").empty());
  c.runs[0].parameters = 7;
  c.runs[0].base_bits = 16.0;
  CHECK(ex::costs(c, "nf4") == head + "| a | 524288 | 4.13 |\n| b | 7 | 16.00 |\n");
}

}  // namespace comparison_test
