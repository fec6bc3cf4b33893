// What BLEU counts in each answer, as a list of numbers in JSON, so that systems can be compared later.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include <qdylora/io/json.hpp>
#include <qdylora/model/bleu.hpp>

namespace qdylora::examples {

/// Of each answer ten numbers: its 1- to 4-grams that a reference has, all its 1- to 4-grams, its words, the reference's words.
inline Json to_json(const std::vector<BleuCounts>& answers) {
  Json list = Json::array();
  for (const auto& counts : answers) {
    Json numbers = counts.matched;
    for (const Index total : counts.total) numbers.push_back(total);
    numbers.push_back(counts.hypothesis_words);
    numbers.push_back(counts.reference_words);
    list.push_back(std::move(numbers));
  }
  return list;
}

/// The same back. Errors: json for what no answer has.
inline std::vector<BleuCounts> read_bleu_counts(const Json& list) {
  constexpr std::size_t orders = BleuCounts::orders, numbers = 2 * orders + 2;
  const auto expect = [](bool right) {
    QDYLORA_EXPECTS(right, json,
                    "expected of each answer its 1- to 4-grams that a reference has, all of them, its words and the reference's");
  };
  const auto count = [&](const Json& x) {  // of so few that no sum over answers is too large
    const Index value = x.is_number_integer() ? x.get<std::int64_t>() : -1;
    expect(value >= 0 && value <= std::numeric_limits<std::int32_t>::max());
    return value;
  };
  expect(list.is_array() && !list.empty());
  std::vector<BleuCounts> answers;
  for (const auto& line : list) {
    expect(line.is_array() && line.size() == numbers);
    auto& counts = answers.emplace_back();
    counts.hypothesis_words = count(line[2 * orders]);
    counts.reference_words = count(line[2 * orders + 1]);
    for (std::size_t n = 0; n < orders; ++n) {
      counts.matched[n] = count(line[n]);
      counts.total[n] = count(line[orders + n]);
      expect(counts.matched[n] <= counts.total[n]);
      expect(counts.total[n] == std::max<Index>(0, counts.hypothesis_words - static_cast<Index>(n)));
    }
  }
  return answers;
}

}  // namespace qdylora::examples
