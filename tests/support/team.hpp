#pragma once

#include <algorithm>
#include <barrier>
#include <span>
#include <vector>

#include <qdylora/optim/workers.hpp>

namespace test {

/// An engine whose workers are threads: the first one sums, in the workers' order, while the others wait.
template <class S>
class Team {
 public:
  explicit Team(qdylora::Index count) : barrier_(count), parts_(static_cast<std::size_t>(count)) {}

  qdylora::Workers<S> worker(qdylora::Index index) {
    return {index, static_cast<qdylora::Index>(parts_.size()), [this, index](std::span<S> numbers) {
              parts_[static_cast<std::size_t>(index)] = numbers;
              barrier_.arrive_and_wait();
              if (index == 0) {
                sum_.assign(numbers.size(), S{});
                for (const auto part : parts_)
                  for (std::size_t i = 0; i < sum_.size(); ++i) sum_[i] += part[i];
              }
              barrier_.arrive_and_wait();
              std::copy(sum_.begin(), sum_.end(), numbers.begin());
              barrier_.arrive_and_wait();  // nobody writes the next part before all have read this sum
            }};
  }

 private:
  std::barrier<> barrier_;
  std::vector<std::span<S>> parts_;
  std::vector<S> sum_;
};

}  // namespace test
