// The blocks of one launch beside each other. They run one after another here, and in any order on a GPU: what one of them does to global
// memory another must not touch in the same launch, unless it has waited for a signal that was given after it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>
#include <vector>

#include "support/cuda_emulator/shadow.hpp"

namespace test::emulator {

/// What is seen of a block: all that it did before an epoch (its barriers counted, from 1), and what one thread did in it.
struct Moment {
  std::uint32_t epoch = 0;
  int thread = -1;

  bool covers(const Deed& deed) const { return deed.epoch < epoch || (deed.epoch == epoch && deed.thread == thread); }
};

/// Of every block of the launch; empty where nothing is seen of any.
class Knowledge {
 public:
  void see(std::size_t blocks, std::size_t block, Moment moment) {
    moments_.resize(blocks);
    if (moments_[block].epoch <= moment.epoch) moments_[block] = moment;
  }
  void join(const Knowledge& other) {
    for (std::size_t b = 0; b < other.moments_.size(); ++b)
      if (other.moments_[b].epoch > 0) see(other.moments_.size(), b, other.moments_[b]);
  }
  bool covers(const Deed& deed) const { return deed.block < moments_.size() && moments_[deed.block].covers(deed); }
  void clear() { moments_.clear(); }

 private:
  std::vector<Moment> moments_;
};

struct Grid {
  Grid(std::string kernel_, std::array<unsigned, 3> size_) : kernel(std::move(kernel_)), size(size_) {}

  std::size_t blocks() const { return std::size_t{size[0]} * size[1] * size[2]; }

  std::string kernel;
  std::array<unsigned, 3> size;
  std::uint32_t launch = ++launches;
  std::map<const void*, Knowledge> signals;  // what who waits for a count has seen

 private:
  static inline std::uint32_t launches = 0;
};

}  // namespace test::emulator
