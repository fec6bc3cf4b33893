// Parameter: what an optimizer updates. A matrix with its gradient, shared between the layer that owns it and the optimizer.
#pragma once

#include <algorithm>
#include <memory>
#include <string>
#include <vector>

#include <qdylora/core/matrix.hpp>

namespace qdylora {

/// What a backward pass does with parameter gradients: add to them, or leave them alone (only dx is wanted).
enum class GradientMode { accumulate, ignore };

/// value and gradient are [rows, cols]. In an adapter a row belongs to one rank: row i is used by every rank above i.
template <class S, MemoryResource Memory = HostMemory>
struct Parameter {
  Parameter(std::string name_, Index rows, Index cols, Memory memory = {})
      : name(std::move(name_)), value(rows, cols, memory), gradient(rows, cols, memory), touched(static_cast<std::size_t>(rows)) {}

  std::string name;
  Matrix<S, Memory> value;
  Matrix<S, Memory> gradient;
  std::vector<bool> touched;   // rows that received gradient since the last zero_grad: what a strict optimizer updates, and zeroes up to
  std::vector<float> row_lr;   // learning-rate multiplier of each row; empty: all 1. LoRA+ is one for all rows of B

  void touch(Index begin, Index end) { std::fill(touched.begin() + begin, touched.begin() + end, true); }
};

template <class S, MemoryResource Memory = HostMemory>
using Parameters = std::vector<std::shared_ptr<Parameter<S, Memory>>>;

/// The parameters of several layers, in order.
template <class First, class... Rest>
auto parameters(const First& first, const Rest&... rest) {
  auto all = first.parameters();
  const auto append = [&all](const auto& more) { all.insert(all.end(), more.begin(), more.end()); };
  (append(rest.parameters()), ...);
  return all;
}

}  // namespace qdylora
