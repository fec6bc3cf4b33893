#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <numeric>
#include <vector>

#include "../../examples/common/data_order.hpp"
#include "support/catch.hpp"

namespace data_order_test {

namespace qd = qdylora;
namespace ex = qdylora::examples;
using qd::Index;

namespace {

/// Samples of these lengths; the first id of each is its number.
std::vector<ex::Sample> samples_of(const std::vector<Index>& lengths) {
  std::vector<ex::Sample> samples;
  for (const Index length : lengths) {
    ex::Sample sample;
    sample.ids.assign(static_cast<std::size_t>(length), 7);
    sample.ids.front() = static_cast<std::int32_t>(samples.size());
    sample.prompt_length = 1;
    samples.push_back(std::move(sample));
  }
  return samples;
}

std::vector<Index> some_lengths(std::size_t count, std::uint64_t seed) {
  qd::Rng rng(seed, qd::Purpose::data);
  std::vector<Index> lengths(count);
  for (Index& n : lengths) n = 2 + static_cast<Index>(rng.below(99));
  return lengths;
}

std::vector<std::int32_t> numbers(const std::vector<ex::Sample>& samples) {
  std::vector<std::int32_t> result;
  for (const auto& sample : samples) result.push_back(sample.ids.front());
  return result;
}

}  // namespace

TEST_CASE("packing puts every sample into one row, and rows are as full as they can be", "[dataset]") {
  const auto sizes = [](const std::vector<Index>& lengths, Index length) {
    const auto samples = samples_of(lengths);
    std::vector<std::size_t> seen;
    std::vector<Index> filled;
    for (const auto& row : ex::pack(samples, length)) {
      Index sum = 0;
      for (const std::size_t i : row) sum += lengths[i];
      CHECK((sum <= length || row.size() == 1));
      filled.push_back(sum);
      seen.insert(seen.end(), row.begin(), row.end());
    }
    std::sort(seen.begin(), seen.end());
    std::vector<std::size_t> all(lengths.size());
    std::iota(all.begin(), all.end(), std::size_t{0});
    CHECK(seen == all);
    return filled;
  };
  CHECK(sizes({6, 4, 5, 5, 3, 7}, 10) == std::vector<Index>{10, 10, 10});
  CHECK(sizes({4, 4, 4}, 10) == std::vector<Index>{8, 4});
  CHECK(sizes({12, 3}, 10) == std::vector<Index>{12, 3});  // too long for a row, and nothing joins it
  CHECK(sizes({10, 2}, 10) == std::vector<Index>{10, 2});
  CHECK(sizes({}, 10).empty());
  for (const std::uint64_t seed : {1u, 2u, 3u}) {
    const auto lengths = some_lengths(1000, seed);
    const Index total = std::accumulate(lengths.begin(), lengths.end(), Index{0});
    const auto rows = sizes(lengths, 256);
    CHECK(static_cast<Index>(rows.size()) <= (total + 255) / 256 + 1);  // of lengths so small against a row nearly nothing is left over
  }
}

TEST_CASE("an epoch trains on every sample once, packed or not, and a step is a function of its number", "[dataset]") {
  const auto lengths = some_lengths(97, 4);
  const auto samples = samples_of(lengths);
  for (const ex::DataOrderOptions options : {ex::DataOrderOptions{.rows = 5, .seed = 3},
                                             {.rows = 5, .seed = 3, .pack_length = 200},
                                             {.rows = 5, .seed = 3, .group_by_length = true}}) {
    CAPTURE(options.pack_length, options.group_by_length);
    ex::DataOrder order(samples, options);
    const std::int64_t rows = order.rows();
    CHECK((options.pack_length > 0 ? rows < 40 : rows == 97));
    // `rows` steps of 5 rows are 5 epochs; a step may end one epoch and begin the next.
    std::vector<int> seen(97);
    for (std::int64_t step = 0; step < rows; ++step)
      for (const std::int32_t i : numbers(order.step(step))) ++seen[static_cast<std::size_t>(i)];
    CHECK(std::all_of(seen.begin(), seen.end(), [](int n) { return n == 5; }));
    ex::DataOrder again(samples, options);
    for (const std::int64_t step : {std::int64_t{30}, std::int64_t{2}, rows}) CHECK(numbers(again.step(step)) == numbers(order.step(step)));
    CHECK(numbers(order.step(0)) != numbers(order.step(rows)));
    ex::DataOrder other(samples, {.rows = 5, .seed = 4, .pack_length = options.pack_length, .group_by_length = options.group_by_length});
    CHECK(numbers(other.step(0)) != numbers(order.step(0)));
  }
}

TEST_CASE("grouped by length, the samples of a step are alike, in every epoch, and steps do not come by length", "[dataset]") {
  const auto samples = samples_of(some_lengths(997, 5));  // 997 samples are no whole number of steps
  const auto spread = [&](bool grouped) {
    ex::DataOrder order(samples, {.rows = 8, .seed = 1, .group_by_length = grouped});
    double sum = 0.0;
    for (std::int64_t step = 0; step < 250; ++step) {  // two epochs
      const auto chosen = order.step(step);
      const auto [least, most] = std::minmax_element(chosen.begin(), chosen.end(),
                                                     [](const ex::Sample& a, const ex::Sample& b) { return a.ids.size() < b.ids.size(); });
      sum += static_cast<double>(most->ids.size() - least->ids.size());
    }
    return sum / 250.0;
  };
  CHECK(spread(true) < 8.0);  // of lengths 2 ... 100
  CHECK(spread(false) > 60.0);
  ex::DataOrder order(samples, {.rows = 8, .seed = 1, .group_by_length = true});
  int rises = 0;
  for (std::int64_t step = 0; step < 40; ++step)
    rises += order.step(step + 1).front().ids.size() > order.step(step).front().ids.size() ? 1 : 0;
  CHECK(rises > 8);
  CHECK(rises < 32);
}

TEST_CASE("the tokens of samples and those that are scored are counted", "[dataset]") {
  auto samples = samples_of({10, 30});
  samples[1].prompt_length = 21;
  const auto counts = ex::count_tokens(samples);
  CHECK(counts.tokens == 40);
  CHECK(counts.scored == 18);
  CHECK(counts.percent_scored() == Approx(45.0));
  CHECK(ex::count_tokens({}).percent_scored() == 0.0);
}

}  // namespace data_order_test
