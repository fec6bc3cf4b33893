// How a CPU operation runs: on which threads, with which instruction set and arithmetic, in which scratch memory.
#pragma once

#include <memory>
#include <type_traits>
#include <utility>

#include <qdylora/backend.hpp>
#include <qdylora/core/matrix.hpp>
#include <qdylora/cpu/kernels/kernels.hpp>
#include <qdylora/cpu/parallel.hpp>

namespace qdylora {

/// The arithmetic of matrix products of floats. Relative errors are of normal data, root mean square, against exact products of the decoded
/// weights. Products in double are exact in every class.
enum class Compute {
  automatic,  // bits16 where activations are bfloat16, else exact
  exact,      // float32: 3e-7
  bits16,     // 16-bit factors: bfloat16 (2e-3) or integers (3e-4), whichever the machine multiplies faster, where that is faster than
              // float32; few tokens with dense or INT8 weights, and gradients of weights of few rows, stay in float32
  int8,       // for inference: activations in 8 bits, a scale for 64 of them, with weights of 4 bits in 8 (8e-3) or 7 (AVX2: 1.2e-2); products
              // with quantized weights alone, no gradients. With AMX more than 16 tokens take bfloat16 with 4-bit weights: no slower there
};

}  // namespace qdylora

namespace qdylora::detail {

struct CpuRun {
  std::shared_ptr<ThreadPool> pool;
  std::shared_ptr<const Executor> executor;  // instead of the pool, where given
  Isa isa = Isa::generic;
  Compute compute = Compute::automatic;

  void parallel_for(Index count, LoopBody f) const {
    if (executor) (*executor)(count, f);
    else pool->run(count, f);
  }

  /// f(begin, end) over [0, count) in pieces of `grain`.
  template <class F>
  void parallel_ranges(Index count, Index grain, F&& f) const {
    parallel_for(div_up(count, grain), [&](Index task) { f(task * grain, std::min(count, (task + 1) * grain)); });
  }

  template <class S>
  const KernelTable<S>& kernels() const noexcept {
    return detail::kernels<S>(isa);
  }
  const CodeKernels& codes() const noexcept { return code_kernels(isa); }
  /// As many as could be where an Executor decides.
  Index threads() const noexcept { return pool ? pool->threads() : 1024; }

  /// The class of a product of activations T.
  template <class T>
  Compute compute_of() const noexcept {
    if (compute != Compute::automatic) return compute;
    return std::is_same_v<T, bfloat16> ? Compute::bits16 : Compute::exact;
  }
};

/// Rows that hold about 16384 elements: the grain of elementwise loops.
constexpr Index row_grain(Index cols) noexcept { return std::max<Index>(1, 16384 / std::max<Index>(cols, 1)); }

/// Scratch memory of the calling thread, kept until the thread ends. Each Slot is a block of its own; a slot's earlier pointer dies when
/// a larger size is asked for.
template <class S, int Slot>
S* scratch(Index size) {
  thread_local Buffer<S> block;
  if (block.size() < size) {
    block = {};
    block = Buffer<S>(size);
  }
  return block.data();
}

/// Whether rows `stride` bytes apart crowd into few sets of a first-level cache of 4 KiB a way.
constexpr bool crowds_cache(Index stride) noexcept { return stride % 4096 == 0; }
template <class S>
constexpr Index uncrowded_stride(Index cols) noexcept {
  constexpr Index line = 64 / static_cast<Index>(sizeof(S));
  const Index stride = rounded_up(cols, line);
  return crowds_cache(stride * static_cast<Index>(sizeof(S))) ? stride + line : stride;
}

/// y = x, rounded once; a double to 16 bits by way of float.
template <class X, class Y>
void convert_row(const CpuRun& run, Index count, const X* x, Y* y) {
  if constexpr (std::is_same_v<X, bfloat16> && std::is_floating_point_v<Y>) {
    run.kernels<Y>().widen(count, x, y);
  } else if constexpr (std::is_floating_point_v<X> && std::is_same_v<Y, bfloat16>) {
    run.kernels<X>().narrow(count, x, y);
  } else {
    using Between = std::conditional_t<std::is_same_v<X, double> && sizeof(Y) == 2, float, X>;  // what 16 bits are rounded from
    for (Index j = 0; j < count; ++j) y[j] = static_cast<Y>(static_cast<Between>(x[j]));
  }
}

/// Row i of a view as S: in its place where it is that, else converted into scratch memory.
template <class S, int Slot, class T>
const S* row_as(const CpuRun& run, MatrixView<const T> view, Index i) {
  if constexpr (std::is_same_v<S, T>) {
    return view.row(i);
  } else {
    S* row = scratch<S, Slot>(view.cols);
    convert_row(run, view.cols, view.row(i), row);
    return row;
  }
}

/// f(row) writes row i of a view as S; if it adds to what is there, `update` says so.
template <class S, int Slot, class T, class F>
void write_row(const CpuRun& run, MatrixView<T> view, Index i, Update update, F&& f) {
  if constexpr (std::is_same_v<S, T>) {
    f(view.row(i));
  } else {
    S* row = scratch<S, Slot>(view.cols);
    if (update == Update::accumulate) convert_row(run, view.cols, view.row(i), row);
    f(row);
    convert_row(run, view.cols, row, view.row(i));
  }
}

/// Row i of a view (+)= values.
template <class S, class T>
void store_row(const CpuRun& run, const S* values, MatrixView<T> view, Index i, Update update) {
  if (update == Update::overwrite) return convert_row(run, view.cols, values, view.row(i));
  write_row<S, 2>(run, view, i, update, [&](S* sum) { run.kernels<S>().add(view.cols, values, sum); });
}

/// The elements of `view` as S: the view itself where it has them, else converted into `storage`.
template <class S, class T>
MatrixView<const S> as_scalar(const CpuRun& run, MatrixView<const T> view, Matrix<S>& storage) {
  if constexpr (std::is_same_v<S, T>) {
    return view;
  } else {
    storage.resize(view.rows, view.cols);
    const MatrixView<S> converted = storage.view();
    run.parallel_ranges(view.rows, row_grain(view.cols), [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) convert_row(run, view.cols, view.row(i), converted.row(i));
    });
    return converted;
  }
}

}  // namespace qdylora::detail
