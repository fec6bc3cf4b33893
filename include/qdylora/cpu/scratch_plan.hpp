// ScratchPlan: the memory that the CPU's threads will work in, before they do. Each slot of detail::scratch keeps the most that any operation
// asks it for; the sizes are the operations' own, by the functions and constants that they cut their work by.
#pragma once

#include <algorithm>
#include <array>

#include <qdylora/cpu/cpu.hpp>

namespace qdylora {

/// A weight, as far as scratch memory depends on it: dense or in codes (bits = 1: in planes of signs), with how many numbers share a scale that is
/// decoded beforehand, as those of 4-bit weights under double quantization are; 0: none.
struct ScratchWeight {
  bool coded = false;
  Index bits = 0, decoded_block = 0;
};

/// Of operations that are added one by one, on activations of float or a 16-bit type. What takes few tokens past panels takes less.
class ScratchPlan {
 public:
  explicit ScratchPlan(const Cpu& cpu) : cpu_(cpu) {}

  /// y [tokens, outputs] of Y, of x [tokens, depth] of X and a weight of outputs x depth numbers. y_stride: where it is not `outputs`.
  template <class X, class Y>
  void forward(Index tokens, Index outputs, Index depth, ScratchWeight weight = {}, Index y_stride = 0) {
    if (weight.coded && weight.bits == 1) own(4, detail::panel_width * detail::panel_cells);
    const bool tiles = weight.bits == 4 && bits16<X>() && run().codes().tiles;
    if (!tiles) return multiply<X, Y>(tokens, outputs, depth, weight, depth, y_stride == 0 ? outputs : y_stride);
    scales(outputs * depth, weight);
    const Index width = detail::rounded_up(std::min(detail::task_outputs(run(), outputs, tokens), outputs), detail::panel_width);
    if (sizeof(X) < sizeof(float)) own(2, detail::turned_together * depth);
    const detail::Bits16Cells cells{run().codes().bits16};
    own_cells(10, cells.cells_for(tokens, depth));
    own_cells(0, detail::panel_width * cells.cells_of_panel());
    own(1, width * detail::turned_sum_stride(std::min(tokens, detail::token_group)));
    own(7, detail::turned_together * width);
  }
  /// The same of a weight's rows: y = x W. x_stride: where it is not `depth`.
  template <class X, class Y>
  void backward(Index tokens, Index outputs, Index depth, ScratchWeight weight = {}, Index x_stride = 0) {
    multiply<X, Y>(tokens, outputs, depth, weight, x_stride == 0 ? depth : x_stride, outputs);
  }
  /// g [rows, cols] = u^T x, of u [tokens, rows] in float and x [tokens, cols] of X.
  template <class X>
  void gradient(Index tokens, Index rows, Index cols) {
    const auto& kernels = run().codes().bits16;
    if (!bits16<X>() || tokens < detail::gradient_tokens || rows < kernels.gradient_rows) {
      if (sizeof(X) < sizeof(float)) beside_gradient_ = std::max(beside_gradient_, tokens * cols * float_bytes);
      return;
    }
    round<float>(detail::Bits16Cells{kernels}, std::min(rows, detail::gradient_group), tokens);
    own(2, detail::Bits16Cells::turned_rows * detail::rounded_up(tokens, 16));
    panels<float>(true, std::min(rows, detail::gradient_group), cols, tokens, detail::task_outputs(cols), detail::token_group, cols);
  }
  /// Causal attention over sequences of up to `longest` of `tokens` positions.
  template <class T>
  void attention(Index tokens, Index longest, Index heads, Index head_dim, bool training) {
    const Index rows = detail::query_block, passes = training ? 2 : 1;
    own(5, passes * detail::rounded_up(longest, 16) * head_dim);
    own(6, passes * rows * longest);
    if (training) own(8, rows * head_dim);
    if (sizeof(T) < sizeof(float)) {
      for (const unsigned slot : {2u, 7u}) own(slot, rows * head_dim);
      for (const unsigned slot : {3u, 4u}) own(slot, longest * head_dim);
    }
    if (training) passing_ = std::max(passing_, 2 * tokens * heads * head_dim * float_bytes);  // dk and dv of each head
  }

  /// Bytes that stay.
  std::size_t bytes() const {
    Index shared = 0, own = 0;
    for (std::size_t slot = 0; slot < slots; ++slot)
      (slot < first_shared ? own : shared) += (numbers_[slot] + cells_[slot]) * float_bytes;
    return static_cast<std::size_t>(shared + own * std::max(1, cpu_.threads()));
  }
  /// The most that attention, and that a weight's gradient takes beside and gives back.
  std::size_t passing() const { return static_cast<std::size_t>(passing_); }
  std::size_t beside_gradient() const { return static_cast<std::size_t>(beside_gradient_); }

 private:
  static constexpr Index float_bytes = 4;  // of a number and of a cell
  static constexpr std::size_t slots = 13, first_shared = 10;  // which the thread that calls an operation alone has

  const detail::CpuRun& run() const { return cpu_.run_; }
  template <class X>
  bool bits16() const {
    return run().compute_of<X>() != Compute::exact && run().codes().bits16;
  }
  void own(std::size_t slot, Index numbers) { numbers_[slot] = std::max(numbers_[slot], numbers); }
  void own_cells(std::size_t slot, Index cells) { cells_[slot] = std::max(cells_[slot], cells); }

  void scales(Index numbers, ScratchWeight weight) {
    if (weight.decoded_block > 0) own(11, numbers / weight.decoded_block);
  }
  template <class X>
  void round(const detail::Bits16Cells& cells, Index rows, Index cols) {
    if (sizeof(X) < sizeof(float)) own(2, cols);
    own_cells(8, cells.cells_beside(std::min(rows, cells.kernels.x_rows), cols));
    own_cells(10, cells.cells_for(rows, cols));
  }
  template <class X, class Y>
  void multiply(Index tokens, Index outputs, Index depth, ScratchWeight weight, Index x_stride, Index y_stride) {
    scales(outputs * depth, weight);
    const bool narrow = bits16<X>() && (weight.coded || tokens >= detail::few_dots);
    if (narrow) round<X>(detail::Bits16Cells{run().codes().bits16}, tokens, depth);
    else if (sizeof(X) < sizeof(float) || detail::crowds_cache(x_stride * float_bytes))
      own(10, detail::PlainCells<float>::cells_for(tokens, depth));
    const Index task = !weight.coded ? detail::dense_outputs
                       : narrow      ? detail::task_outputs(run(), outputs, tokens)
                                     : detail::task_outputs(outputs);
    panels<Y>(narrow, tokens, outputs, depth, task, weight.coded ? detail::token_group : detail::dense_group, y_stride);
  }
  template <class Y>
  void panels(bool narrow, Index tokens, Index outputs, Index depth, Index task, Index group, Index y_stride) {
    const Index parts = detail::depth_parts(outputs, depth);
    const Index width = std::min(parts > 1 ? detail::shared_outputs(outputs) : task, outputs);
    if (parts > 1) own(12, parts * tokens * detail::shared_sum_stride<float>(outputs));
    else if (!detail::sums_in_place<float, Y>(outputs, y_stride)) own(1, std::min(tokens, group) * detail::own_sum_stride(width));
    const Index padded = detail::rounded_up(width, detail::panel_width);
    if (!narrow) return own(0, padded * detail::panel_cells);
    own_cells(0, padded * detail::Bits16Cells{run().codes().bits16}.cells_of_panel());
    own(9, detail::rounded_rows * detail::panel_width);
  }

  Cpu cpu_;
  std::array<Index, slots> numbers_{}, cells_{};
  Index passing_ = 0, beside_gradient_ = 0;
};

}  // namespace qdylora
