// Which samples train at each step.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <numeric>
#include <set>
#include <span>
#include <utility>
#include <vector>

#include <qdylora/core/random.hpp>

#include "dataset.hpp"

namespace qdylora::examples {

/// Puts samples together to rows of at most `length` tokens; a longer sample is a row alone. The longest come first, each into the row with
/// the least room that still holds it (best fit decreasing). Rows hold positions in `samples`.
inline std::vector<std::vector<std::size_t>> pack(std::span<const Sample> samples, Index length) {
  std::vector<std::size_t> order(samples.size());
  std::iota(order.begin(), order.end(), std::size_t{0});
  const auto tokens = [&](std::size_t i) { return static_cast<Index>(samples[i].ids.size()); };
  std::stable_sort(order.begin(), order.end(), [&](std::size_t a, std::size_t b) { return tokens(a) > tokens(b); });
  std::vector<std::vector<std::size_t>> rows;
  std::set<std::pair<Index, std::size_t>> room;  // of each row
  for (const std::size_t i : order) {
    Index left = length - tokens(i);
    const auto best = room.lower_bound({tokens(i), 0});
    std::size_t row = rows.size();
    if (best == room.end()) {
      rows.emplace_back();
    } else {
      left = best->first - tokens(i);
      row = best->second;
      room.erase(best);
    }
    rows[row].push_back(i);
    if (left > 0) room.insert({left, row});
  }
  return rows;
}

struct DataOrderOptions {
  Index rows = 1;  // of a step
  std::uint64_t seed = 0;
  Index pack_length = 0;         // tokens of a row that samples are packed into; 0: each is a row
  bool group_by_length = false;  // rows of like length in a step
};

/// What trains at each step: every epoch is a permutation of its own, so the position in the data is a function of the step.
class DataOrder {
 public:
  DataOrder(const std::vector<Sample>& train, DataOrderOptions options) : train_(&train), options_(options) {
    if (options_.pack_length > 0) {
      rows_ = pack(train, options_.pack_length);
    } else {
      for (std::size_t i = 0; i < train.size(); ++i) rows_.push_back({i});
    }
  }

  /// Rows that the samples make.
  Index rows() const noexcept { return static_cast<Index>(rows_.size()); }

  std::vector<Sample> step(std::int64_t step) {
    std::vector<Sample> chosen;
    for (std::int64_t n = step * options_.rows; n < (step + 1) * options_.rows; ++n) {
      const std::int64_t size = rows();
      if (n / size != epoch_) shuffle(n / size);
      for (const std::size_t i : rows_[order_[static_cast<std::size_t>(n % size)]]) chosen.push_back((*train_)[i]);
    }
    return chosen;
  }

 private:
  void shuffle(std::int64_t epoch) {
    epoch_ = epoch;
    order_.resize(rows_.size());
    std::iota(order_.begin(), order_.end(), std::size_t{0});
    Rng rng(options_.seed, Purpose::shuffle, 0, static_cast<std::uint32_t>(epoch));
    rng.shuffle(std::span<std::size_t>(order_));
    if (options_.group_by_length) group(rng);
  }

  /// Sorts stretches of many steps by length, and shuffles their steps, so that what comes together is alike but lengths do not only fall.
  void group(Rng& rng) {
    constexpr std::size_t steps = 50;  // as many as transformers' LengthGroupedSampler sorts together
    const auto rows = static_cast<std::size_t>(options_.rows);
    const auto tokens = [&](std::size_t row) {
      std::size_t sum = 0;
      for (const std::size_t i : rows_[row]) sum += (*train_)[i].ids.size();
      return sum;
    };
    // An epoch may begin in the middle of a step, whose rows stay as they are.
    const auto before = static_cast<std::size_t>(epoch_ * this->rows() % options_.rows);
    for (std::size_t begin = (rows - before) % rows; begin < order_.size(); begin += steps * rows) {
      const std::size_t end = std::min(order_.size(), begin + steps * rows);
      std::vector<std::size_t> sorted(order_.begin() + static_cast<std::ptrdiff_t>(begin),
                                      order_.begin() + static_cast<std::ptrdiff_t>(end));
      std::stable_sort(sorted.begin(), sorted.end(), [&](std::size_t a, std::size_t b) { return tokens(a) > tokens(b); });
      std::vector<std::size_t> parts(sorted.size() / rows);  // whole steps; what is left over, the shortest, stays at the end
      std::iota(parts.begin(), parts.end(), std::size_t{0});
      rng.shuffle(std::span<std::size_t>(parts));
      auto to = order_.begin() + static_cast<std::ptrdiff_t>(begin);
      for (const std::size_t part : parts) to = std::copy_n(sorted.begin() + static_cast<std::ptrdiff_t>(part * rows), rows, to);
      std::copy(sorted.begin() + static_cast<std::ptrdiff_t>(parts.size() * rows), sorted.end(), to);
    }
  }

  const std::vector<Sample>* train_;
  DataOrderOptions options_;
  std::vector<std::vector<std::size_t>> rows_;  // positions in train_
  std::vector<std::size_t> order_;
  std::int64_t epoch_ = -1;
};

}  // namespace qdylora::examples
