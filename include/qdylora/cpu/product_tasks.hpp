// How products are cut into tasks, of which each makes some outputs for some rows of x.
#pragma once

#include <qdylora/cpu/run.hpp>

namespace qdylora::detail {

inline constexpr Index dense_outputs = 2 * panel_width;  // of a task with a dense weight
inline constexpr Index dense_group = 128;        // tokens of a task with a dense weight, which costs little to look at twice

/// Outputs of a task: enough that a line of codes or a panel serves many, few enough that there are tasks for all threads.
constexpr Index task_outputs(Index outputs) noexcept { return outputs >= 2048 ? 128 : outputs >= 1024 ? 64 : 32; }
/// More for so many rows of x that reading them takes longer than products do, if each thread has four tasks still.
inline Index task_outputs(const CpuRun& run, Index outputs, Index x_rows) noexcept {
  constexpr Index wide = 256;
  return x_rows > run.codes().bits16.rows_for_wide_tasks && outputs >= 4 * wide * run.threads() ? wide : task_outputs(outputs);
}

/// How many tasks share a sum. Where outputs are few and sums are long, as in the gradient through a head, tasks by outputs alone would each
/// read all of x.
constexpr Index depth_parts(Index outputs, Index depth) noexcept {
  return depth >= 8192 && depth >= 16 * outputs ? std::min<Index>(depth / 4096, 8) : 1;
}
/// Outputs of a task that shares its sums: panels in its second-level cache.
constexpr Index shared_outputs(Index outputs) noexcept { return rounded_up(outputs / ((outputs + 319) / 320), panel_width); }
/// What a row of sums takes, of a task whose y is not in S, and of all outputs where tasks share them.
constexpr Index own_sum_stride(Index outputs) noexcept { return rounded_up(outputs, panel_width) + 16; }  // as CellPanels
template <class S>
constexpr Index shared_sum_stride(Index outputs) noexcept { return uncrowded_stride<S>(rounded_up(outputs, panel_width)); }
/// Whether sums of S are made in y itself.
template <class S, class Y>
constexpr bool sums_in_place(Index outputs, Index y_stride) noexcept {
  return std::is_same_v<Y, S> && outputs % panel_width == 0 && !crowds_cache(y_stride * static_cast<Index>(sizeof(S)));
}

/// A product cut into tasks, in their order: every `width` outputs; of these, every `group` tokens; of these, the parts of a sum.
struct ProductTasks {
  Index outputs, width, tokens, group, parts = 1;

  struct Task {
    Index first, width, token, tokens, part;
  };
  Index count() const noexcept { return div_up(outputs, width) * groups() * parts; }
  Task operator[](Index task) const noexcept {
    const Index first = task / parts / groups() * width, token = task / parts % groups() * group;
    return {first, std::min(width, outputs - first), token, std::min(group, tokens - token), task % parts};
  }

 private:
  Index groups() const noexcept { return div_up(tokens, group); }
};

}  // namespace qdylora::detail
