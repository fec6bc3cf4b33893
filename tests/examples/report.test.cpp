// Reports of hand-made results: what their tables, JSON and CSV say, against closed forms.
#include <cmath>
#include <filesystem>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/model.hpp>

#include "common/report.hpp"
#include "support/catch.hpp"
#include "support/files.hpp"

namespace report_test {

namespace qd = qdylora;
namespace ex = qdylora::examples;
using qd::Index;

namespace {

// The base and two ranks on 200 examples of 1 to 4 tokens. The base answers every fourth right; rank 2 these and some more, but not all.
std::vector<ex::RankResult> results() {
  std::vector<ex::RankResult> all(3);
  for (std::size_t r = 0; r < 3; ++r) {
    auto& result = all[r];
    result.rank = r == 0 ? 0 : 2 << (r - 1);
    result.parameters = 100 * result.rank;
    double sum = 0.0, tokens = 0.0;
    for (int i = 0; i < 200; ++i) {
      result.example_tokens.push_back(1.0 + i % 4);
      result.example_losses.push_back(2.0 + 0.01 * i - 0.25 * static_cast<double>(r) + (r == 2 ? 0.05 * (i % 7) : 0.0));
      result.matches.push_back((r == 0 ? i % 4 == 0 : i % 3 == 0) ? 1.0 : 0.0);
      sum += result.example_tokens.back() * result.example_losses.back();
      tokens += result.example_tokens.back();
    }
    result.loss = sum / tokens;
  }
  return all;
}

// Fields of the line of a rank, by the names in the first line.
std::map<std::string, std::string> csv_line(const std::filesystem::path& file, const std::string& rank) {
  const auto split = [](const std::string& line) {
    std::vector<std::string> fields(1);
    for (const char c : line)
      if (c == ',') fields.emplace_back();
      else fields.back() += c;
    return fields;
  };
  std::istringstream lines(test::read_file(file));
  std::string line;
  REQUIRE(std::getline(lines, line));
  const auto names = split(line);
  while (std::getline(lines, line)) {
    const auto fields = split(line);
    REQUIRE(fields.size() == names.size());
    if (fields[0] != rank) continue;
    std::map<std::string, std::string> found;
    for (std::size_t i = 0; i < names.size(); ++i) CHECK(found.emplace(names[i], fields[i]).second);  // no name stands twice
    return found;
  }
  FAIL("no rank " << rank);
  return {};
}

}  // namespace

TEST_CASE("a task's gain has the interval of its discordant pairs", "[report]") {
  const auto all = results();
  const auto gains = ex::paired_above(all, all[0], &ex::RankResult::matches);
  REQUIRE(gains.size() == 3);
  CHECK(gains[0].value == 0.0);
  CHECK(gains[0].low == 0.0);
  CHECK(gains[0].high == 0.0);
  // McNemar's: b pairs gained and c lost, of n; the difference (b - c) / n has the variance (b + c - (b - c)^2 / n) / n^2.
  double b = 0.0, c = 0.0;
  const double n = 200.0;
  for (std::size_t i = 0; i < 200; ++i) {
    b += all[1].matches[i] > all[0].matches[i] ? 1.0 : 0.0;
    c += all[1].matches[i] < all[0].matches[i] ? 1.0 : 0.0;
  }
  REQUIRE(b == 50.0);
  REQUIRE(c == 33.0);
  const double half = 1.96 * std::sqrt((b + c - (b - c) * (b - c) / n) / (n * n));
  CHECK(gains[1].value == Approx((b - c) / n));
  CHECK(gains[1].low == Approx((b - c) / n - half).margin(0.1 * half));
  CHECK(gains[1].high == Approx((b - c) / n + half).margin(0.1 * half));
  CHECK(ex::paired_above(all, all[0], &ex::RankResult::chosen_right).empty());  // no question was asked
  // Losses are weighed by tokens.
  const auto losses = ex::paired_above(all, all[0], &ex::RankResult::example_losses);
  CHECK(losses[2].value == Approx(all[2].loss - all[0].loss));
}

TEST_CASE("what a measure says over the ranks is of the loss and of each task that was scored, in any order of ranks", "[report]") {
  const Index ranks[] = {2, 0, 8, 1};
  const double losses[] = {1.5, 3.0, 1.0, 2.0}, bleus[] = {4.0, 5.0, 4.5, 3.0};
  const std::vector<double> right[] = {{1, 1, 1, 0}, {1, 0, 0, 0}, {1, 1, 0, 0}, {0, 0, 0, 1}};
  std::vector<ex::RankResult> all(4);
  for (std::size_t i = 0; i < 4; ++i) {
    all[i].rank = ranks[i];
    all[i].loss = losses[i];
    all[i].example_losses = {losses[i]};
    all[i].matches = all[i].chosen_right = right[i];
    all[i].bleu.emplace().score = bleus[i];
  }
  const auto curves = ex::rank_curves(all, 0.75);
  REQUIRE(curves.size() == 4);
  const auto& loss = curves[0];
  CHECK(loss.measure == "loss");
  CHECK(loss.best == 8);
  CHECK(loss.area_linear == Approx((1.75 * 1.0 + 1.25 * 6.0) / 7.0));
  CHECK(loss.area_log2 == Approx((1.75 * 1.0 + 1.25 * 2.0) / 3.0));
  CHECK(loss.enough == Index{2});  // 3 - 0.75 * (3 - 1) is 1.5
  CHECK(ex::rank_curves(all, 0.76)[0].enough == Index{8});
  CHECK(ex::rank_curves(all, 0.5)[0].enough == Index{1});
  for (const std::size_t task : {std::size_t{1}, std::size_t{3}}) {
    const auto& share = curves[task];
    CHECK(share.measure == (task == 1 ? "exact_match" : "accuracy"));
    CHECK(share.best == 2);  // which the higher rank does not reach
    CHECK(share.area_linear == Approx((0.5 * 1.0 + 0.625 * 6.0) / 7.0));
    CHECK(share.area_log2 == Approx((0.5 * 1.0 + 0.625 * 2.0) / 3.0));
    CHECK(share.enough == Index{2});
  }
  CHECK(curves[2].measure == "bleu");
  CHECK(curves[2].best == 8);
  CHECK(curves[2].area_log2 == Approx((3.5 * 1.0 + 4.25 * 2.0) / 3.0));
  CHECK(curves[2].enough == Index{0});  // the base has 5
  CHECK(test::code_of([&] { (void)ex::rank_curves(all, 1.5); }) == qd::Errc::bad_argument);

  all.erase(all.begin() + 1);  // without a base no gain over it is known
  CHECK(ex::rank_curves(all, 0.75)[0].area_linear == loss.area_linear);
  CHECK_FALSE(ex::rank_curves(all, 0.75)[0].enough);
  all = {ex::RankResult{}};
  CHECK(ex::rank_curves(all, 0.75).empty());  // a base alone
}

TEST_CASE("the report of a run has what a rank costs and what its answers gain", "[report]") {
  const test::TemporaryFolder folder;
  const ex::RankSummary summary(results(), 0.5);
  CHECK(summary.best == 4);
  ex::write_report(folder.path(), {.settings = {{"method", "lora"}}, .ranks = results(), .history = {}}, summary);
  const auto json = qd::read_json(folder / "report.json");
  const auto& rank = json.at("ranks")[1];
  CHECK(rank.at("bytes") == 4 * 200);
  CHECK(json.at("keep") == 0.5);
  CHECK(json.at("over_ranks").at("loss").at("mean_over_rank").get<double>() ==
        Approx((results()[1].loss + results()[2].loss) / 2.0));  // of two ranks
  CHECK(json.at("over_ranks").at("exact_match").at("mean_over_log2_rank").get<double>() == Approx(67.0 / 200.0));
  CHECK(json.at("over_ranks").at("exact_match").at("smallest_rank_keeping") == 2);  // of equals
  CHECK(rank.at("answers") == 200);
  CHECK(rank.at("correct") == 67);
  CHECK(rank.at("match_gain").at("value").get<double>() == Approx(17.0 / 200.0));
  const auto line = csv_line(folder / "report.csv", "2");
  CHECK(line.at("bytes") == "800");
  CHECK(line.at("correct") == "67");
  CHECK(std::stod(line.at("match_gain")) == Approx(17.0 / 200.0));
  CHECK(std::stod(line.at("match_gain_low")) == Approx(rank.at("match_gain").at("low").get<double>()));
  CHECK(std::stod(line.at("match_gain_high")) == Approx(rank.at("match_gain").at("high").get<double>()));

  auto silent = results();
  for (auto& r : silent) r.matches.clear();
  ex::write_report(folder.path(), {.settings = {{"method", "lora"}}, .ranks = silent, .history = {}}, ex::RankSummary(silent));
  CHECK_FALSE(qd::read_json(folder / "report.json").at("ranks")[1].contains("match_gain"));
  CHECK(csv_line(folder / "report.csv", "2").at("match_gain").empty());
}

TEST_CASE("the report of a run beside its rival has both at every rank", "[report]") {
  const test::TemporaryFolder folder;
  const ex::RunReport run{.settings = {{"method", "lora"}}, .ranks = results(), .history = {}};
  auto rival = run;
  rival.settings["recipe"] = "qlora-svd";
  for (std::size_t r = 1; r < 3; ++r) {
    rival.ranks[r].loss += 0.5;
    for (double& loss : rival.ranks[r].example_losses) loss += 0.5;
    for (std::size_t i = 0; i < 10; ++i) rival.ranks[r].matches[3 * i] = 0.0;  // ten that the run has right
  }
  ex::write_report(folder.path(), run, ex::RankSummary(run.ranks), &rival);
  const auto json = qd::read_json(folder / "report.json");
  CHECK(json.at("rival").at("recipe") == "qlora-svd");
  const auto mean = [](const qd::Json& of) { return of.at("over_ranks").at("loss").at("mean_over_log2_rank").get<double>(); };
  CHECK(mean(json.at("rival")) == Approx(mean(json) + 0.5));
  const auto& above = json.at("ranks")[2].at("above_rival");
  CHECK(above.at("value").get<double>() == Approx(-0.5));
  CHECK(above.at("low").get<double>() == Approx(-0.5));  // all examples differ by as much
  CHECK(above.at("high").get<double>() == Approx(-0.5));
  const auto line = csv_line(folder / "report.csv", "2");
  CHECK(std::stod(line.at("rival_loss")) == Approx(run.ranks[1].loss + 0.5));
  CHECK(std::stod(line.at("above_rival")) == Approx(-0.5));
  CHECK(line.at("rival_correct") == "57");
  // 10 of 200 pairs are gained and none is lost: McNemar's interval, within a pair and a half, for so few have an uneven distribution.
  const double half = 1.96 * std::sqrt(10.0 - 100.0 / 200.0) / 200.0;
  CHECK(std::stod(line.at("match_above_rival")) == Approx(10.0 / 200.0));
  CHECK(std::stod(line.at("match_above_rival_low")) == Approx(10.0 / 200.0 - half).margin(1.5 / 200.0));
  CHECK(std::stod(line.at("match_above_rival_high")) == Approx(10.0 / 200.0 + half).margin(1.5 / 200.0));
  CHECK(csv_line(folder / "report.csv", "0").at("above_rival") == "0");  // the base is the same
  const auto svg = test::read_file(folder / "ranks.svg");
  CHECK(svg.find("rival: QLoRA, cut by SVD") != std::string::npos);

  ex::write_report(folder.path(), run, ex::RankSummary(run.ranks));
  CHECK_FALSE(qd::read_json(folder / "report.json").contains("rival"));
  CHECK(csv_line(folder / "report.csv", "2").at("rival_loss").empty());
  CHECK(test::read_file(folder / "ranks.svg").find("rival") == std::string::npos);
}

TEST_CASE("the report of an evaluation has differences to the first rank, of what was measured", "[report]") {
  const test::TemporaryFolder folder;
  auto all = results();
  all[0].rank = 1;  // the base was not asked for
  for (auto& r : all) {
    r.chosen = {0, 1, 2};
    r.chosen_right = {1.0, r.rank == 4 ? 1.0 : 0.0, 0.0};
    for (const char* answer : {"a b c d", r.rank == 4 ? "e f g h" : "e f g"})
      r.bleu_counts.push_back(qd::bleu_counts(answer, std::vector<std::string>{answer[0] == 'a' ? "a b c d" : "e f g h"}));
    r.bleu = qd::corpus_bleu(r.bleu_counts);
    r.example_losses.clear();
  }
  const ex::AboveFirst above_first(all);
  CHECK(above_first.loss.empty());
  ex::write_evaluation(folder.path(), {}, all, above_first, 0.9);
  const auto json = qd::read_json(folder / "report.json");
  for (const char* difference : {"accuracy_above_first", "bleu_above_first"}) CHECK_FALSE(json.at("ranks")[0].contains(difference));
  // 7 words of 8 cost the brevity penalty; resamples have 8, 7 or 6 of them, the last with no 4-gram that does not match.
  CHECK(json.at("ranks")[2].at("bleu_above_first").at("value").get<double>() == Approx(100.0 * (1.0 - std::exp(1.0 - 8.0 / 7.0))));
  CHECK(json.at("ranks")[2].at("bleu_above_first").at("low").get<double>() == Approx(0.0).margin(1e-9));
  CHECK_FALSE(json.at("ranks")[2].contains("loss_above_first"));
  CHECK(json.at("ranks")[2].at("accuracy_above_first").at("value").get<double>() == Approx(1.0 / 3.0));
  CHECK(json.at("ranks")[1].at("match_above_first").at("value").get<double>() == Approx(17.0 / 200.0));
  const auto line = csv_line(folder / "report.csv", "4");
  CHECK(line.at("loss").empty());
  CHECK(line.at("questions") == "3");
  CHECK(line.at("right") == "2");
  CHECK(std::stod(line.at("bleu_above_first")) == Approx(json.at("ranks")[2].at("bleu_above_first").at("value").get<double>()));
  CHECK(csv_line(folder / "report.csv", "2").at("bleu_above_first_high") == "0");
  CHECK(std::stod(line.at("accuracy_above_first")) == Approx(1.0 / 3.0));
  CHECK(csv_line(folder / "report.csv", "1").at("accuracy_above_first").empty());
  CHECK(json.at("ranks")[2].at("parameters") == 400);
  CHECK(json.at("ranks")[2].at("bytes") == 1600);
  CHECK(json.at("ranks")[2].at("ms_per_token") == 0.0);
  CHECK(line.at("parameters") == "400");
  CHECK(line.at("bytes") == "1600");
  CHECK(json.at("keep") == 0.9);
  CHECK_FALSE(json.at("over_ranks").contains("loss"));
  CHECK(json.at("over_ranks").at("accuracy").at("best_rank") == 4);
  CHECK_FALSE(json.at("over_ranks").at("accuracy").contains("smallest_rank_keeping"));  // of what is gained over a base

  all.resize(1);
  ex::write_evaluation(folder.path(), {}, all, ex::AboveFirst(all), 0.9);
  CHECK(csv_line(folder / "report.csv", "1").at("accuracy_above_first_low").empty());
}

}  // namespace report_test
