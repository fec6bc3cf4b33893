// The matrix products of the CPU backend. Both directions are one algorithm: the weight is decoded panel by panel, 32 outputs side by side,
// into a thread's cache, and rows of x are multiplied with it from there; the direction decides what a panel is cut from. Few tokens with a
// 4-bit weight need no panel: codes go through registers (kernels/few.inc, few_backward). A weight is decoded once a call and never
// stored in full.
//
// Work is cut by shape alone, one task owns each output element, and a sum's order depends on nothing but its length and the way taken
// (few tokens or panels): the bits do not depend on the number of threads, nor on the other rows of x.
#pragma once

#include <qdylora/backend.hpp>
#include <qdylora/cpu/run.hpp>

namespace qdylora::detail {

inline constexpr Index few_tokens = 16;     // at most this many tokens go without panels
inline constexpr Index few_tokens_in_pairs = 4;  // the same where panels would be of bfloat16 and these kernels are float32
inline constexpr Index few_dots = 8;        // below this, with weights that have no such kernels, dot products
inline constexpr Index panel_cells = 256;   // of a sum, decoded at a time: with 32 outputs 32 KiB
inline constexpr Index token_block = 112;   // tokens that pass over the panels of a task together: a multiple of the tiles' rows
inline constexpr Index token_group = 512;   // tokens of a task: a quantized weight is decoded once for so many
inline constexpr Index dense_group = 128;   // the same of a dense weight, which costs little to look at twice

template <class W>
inline constexpr bool is_dense = false;
template <class S>
inline constexpr bool is_dense<MatrixView<S>> = true;

/// Whether rows `stride` bytes apart crowd into few sets of a first-level cache of 4 KiB a way.
constexpr bool crowds_cache(Index stride) noexcept { return stride % 2048 == 0; }
template <class S>
constexpr Index uncrowded_stride(Index cols) noexcept {
  constexpr Index line = 64 / static_cast<Index>(sizeof(S));
  const Index stride = (cols + line - 1) / line * line;
  return crowds_cache(stride * static_cast<Index>(sizeof(S))) ? stride + line : stride;
}

template <class Y, class S>
void store(Y& target, S value, Update update) noexcept {
  target = static_cast<Y>(update == Update::accumulate ? static_cast<S>(target) + value : value);
}

// ---- what panels are cut from: fill(first output, outputs, begin, depth, out [depth][32]) ------------------------------------------

enum class Direction { forward, backward };

/// Forward, the outputs of a product are a weight's rows and its sums run along columns; backward it is the other way.
template <Direction direction>
struct CodedPanels {
  const CodeKernels& kernels;
  const CodedWeight& w;
  const float* scales;  // of the whole weight

  Index outputs() const noexcept { return direction == Direction::forward ? w.rows : w.cols; }
  Index depth() const noexcept { return direction == Direction::forward ? w.cols : w.rows; }
  void fill(Index first, Index count, Index begin, Index part, float* out) const {
    if constexpr (direction == Direction::forward)
      kernels.forward_panel(w, scales + first * w.row_blocks(), first, count, begin, part, out);
    else kernels.backward_panel(w, scales, begin, part, first, count, out);
  }
  void fill(Index first, Index count, Index begin, Index part, std::uint32_t* out) const {
    if (w.bits != 4 || !w.whole_blocks()) {
      float* panel = scratch<float, 9>(part * panel_width);
      fill(first, count, begin, part, panel);
      kernels.pairs.pair_rows(panel, part, out);
    } else if constexpr (direction == Direction::forward) {
      if (count < panel_width) std::fill_n(out, (part + 1) / 2 * panel_width, 0u);
      kernels.pairs.forward(w, scales + first * w.row_blocks(), first, count, begin, part, out);
    } else {
      kernels.pairs.backward(w, scales, begin, part, first, out);
    }
  }
};

/// Of a dense weight, or a quantized one in double: element by element.
template <Direction direction, class W>
struct ElementPanels {
  const CodeKernels& kernels;
  W w;

  Index outputs() const noexcept { return direction == Direction::forward ? w.rows : w.cols; }
  Index depth() const noexcept { return direction == Direction::forward ? w.cols : w.rows; }
  template <class S>
  void fill(Index first, Index count, Index begin, Index part, S* out) const {
    if constexpr (std::is_same_v<S, float> && direction == Direction::forward && std::is_same_v<W, MatrixView<const float>>) {
      kernels.dense_panel(w.data + first * w.stride + begin, w.stride, count, part, out);
    } else {
      for (Index k = 0; k < part; ++k) {
        for (Index j = 0; j < count; ++j)
          out[k * panel_width + j] =
              static_cast<S>(direction == Direction::forward ? w(first + j, begin + k) : w(begin + k, first + j));
        std::fill(out + k * panel_width + count, out + (k + 1) * panel_width, S{});
      }
    }
  }
  void fill(Index first, Index count, Index begin, Index part, std::uint32_t* out) const {
    float* panel = scratch<float, 9>(part * panel_width);
    fill(first, count, begin, part, panel);
    kernels.pairs.pair_rows(panel, part, out);
  }
};

// ---- the arithmetic of a product by panels: what a cell of x and of a panel is -----------------------------------------------------

template <class S>
struct PlainCells {
  using Cell = S;
  static constexpr Index numbers = 1;  // of the sum in a cell
  const KernelTable<S>& kernels;

  /// Rows of x as cells: its own memory where that serves, else the calling thread's.
  template <class T>
  MatrixView<const Cell> prepare(const CpuRun& run, MatrixView<const T> x) const {
    if constexpr (std::is_same_v<T, S>)
      if (x.rows <= 2 || !crowds_cache(x.stride * static_cast<Index>(sizeof(S)))) return x;
    const Index stride = uncrowded_stride<Cell>(x.cols);
    const MatrixView<Cell> cells{scratch<Cell, 10>(x.rows * stride), x.rows, x.cols, stride};
    run.parallel_ranges(x.rows, row_grain(x.cols), [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i)
        for (Index j = 0; j < x.cols; ++j) cells(i, j) = static_cast<S>(x(i, j));
    });
    return cells;
  }
  void gemm(Index m, Index n, Index depth, const Cell* a, Index a_row, const Cell* b, S* c, Index c_row, bool accumulate) const {
    kernels.gemm(m, n, depth, a, a_row, 1, b, panel_width, c, c_row, accumulate);
  }
};

struct PairCells {
  using Cell = std::uint32_t;
  static constexpr Index numbers = 2;
  const PairKernels& kernels;

  template <class T>
  MatrixView<const Cell> prepare(const CpuRun& run, MatrixView<const T> x) const {
    const Index cols = (x.cols + 1) / 2, stride = uncrowded_stride<Cell>(cols);
    const MatrixView<Cell> cells{scratch<Cell, 10>(x.rows * stride), x.rows, cols, stride};
    run.parallel_ranges(x.rows, row_grain(x.cols), [&](Index begin, Index end) {
      for (Index i = begin; i < end; ++i) {
        if constexpr (std::is_same_v<T, float>) {
          kernels.round(x.row(i), x.cols, cells.row(i));
        } else {
          float* row = scratch<float, 2>(x.cols);
          for (Index j = 0; j < x.cols; ++j) row[j] = static_cast<float>(x(i, j));
          kernels.round(row, x.cols, cells.row(i));
        }
      }
    });
    return cells;
  }
  void gemm(Index m, Index n, Index depth, const Cell* a, Index a_row, const Cell* b, float* c, Index c_row, bool accumulate) const {
    kernels.gemm(m, n, depth, a, a_row, 1, b, panel_width, c, c_row, accumulate);
  }
};

/// y [m, outputs] (+)= x [m, depth] . panels
template <class S, class Cells, class Panels, class T, class Y>
void multiply_panels(const CpuRun& run, const Cells& cells, const Panels& panels, Index task_outputs, Index group_tokens,
                     MatrixView<const T> x, MatrixView<Y> y, Update update) {
  using Cell = typename Cells::Cell;
  const MatrixView<const Cell> input = cells.prepare(run, x);
  const Index outputs = panels.outputs(), depth = panels.depth();
  const Index blocks = (outputs + task_outputs - 1) / task_outputs;
  const Index groups = (x.rows + group_tokens - 1) / group_tokens;
  run.parallel_for(blocks * groups, [&](Index task) {
    const Index first = task / groups * task_outputs;
    const Index width = std::min(task_outputs, outputs - first);
    const Index token = task % groups * group_tokens;
    const Index tokens = std::min(group_tokens, x.rows - token);
    const bool direct =
        std::is_same_v<Y, S> && width % panel_width == 0 && !crowds_cache(y.stride * static_cast<Index>(sizeof(S)));
    const Index padded = (width + panel_width - 1) / panel_width * panel_width;
    MatrixView<S> out;
    if constexpr (std::is_same_v<Y, S>)
      if (direct) out = {y.row(token) + first, tokens, width, y.stride};
    if (!direct) out = {scratch<S, 1>(tokens * padded), tokens, padded};
    constexpr Index panel_depth = panel_cells * Cells::numbers;
    Cell* panel = scratch<Cell, 0>(padded * panel_cells);
    for (Index k = 0; k < std::max<Index>(depth, 1); k += panel_depth) {
      const Index part = std::min(panel_depth, depth - k);
      const Index here = (part + Cells::numbers - 1) / Cells::numbers;
      for (Index p = 0; p < width; p += panel_width)
        panels.fill(first + p, std::min(panel_width, width - p), k, part, panel + p * panel_cells);
      const bool add = k > 0 || (direct && update == Update::accumulate);
      for (Index m = 0; m < tokens; m += token_block)
        for (Index p = 0; p < width; p += panel_width)
          cells.gemm(std::min(token_block, tokens - m), width - p > panel_width / 2 ? panel_width : panel_width / 2, here, input.row(token + m) + k / Cells::numbers, input.stride,
                     panel + p * panel_cells, out.row(m) + p, out.stride, add);
    }
    if (!direct)
      for (Index m = 0; m < tokens; ++m)
        for (Index j = 0; j < width; ++j) store(y(token + m, first + j), out(m, j), update);
  });
}

/// Every scale of a weight, where kernels read them as a table.
inline const float* all_scales(const CpuRun& run, const CodedWeight& w) {
  if (w.bits != 4 || !w.whole_blocks()) return nullptr;
  if (w.absmax != nullptr) return w.absmax;
  const Index count = w.rows * w.row_blocks();
  float* scales = scratch<float, 11>(count);
  run.parallel_ranges(count, 8192, [&](Index begin, Index end) { run.codes().scales(w, begin, end - begin, scales + begin); });
  return scales;
}

/// The smallest of 1, 4 and 16 that takes all of the next tokens at once, as an index of kernels by tokens.
constexpr int few_kernel(Index tokens) noexcept { return tokens == 1 ? 0 : tokens <= 8 ? 1 : 2; }

template <class Y>
void few_forward(const CpuRun& run, const FewKernels& few, MatrixView<const float> x, const CodedWeight& w, MatrixView<Y> y, Update update) {
  constexpr Index task_rows = 32;
  const Index dwords = w.cols / 8, blocks = w.row_blocks();
  for (Index token = 0; token < x.rows;) {
    const int size_index = few_kernel(x.rows - token);
    const Index tile = few_tile[size_index], tokens = std::min(tile, x.rows - token);
    const Index units = w.cols / std::min(w.block_size, few.unit);
    const Index count = dwords * few.steps, bytes = count * static_cast<Index>(few.cell_bytes);
    auto* token_rows = reinterpret_cast<std::byte*>(scratch<std::uint64_t, 2>(tokens * bytes / 8 + 1));
    auto* cells = reinterpret_cast<std::byte*>(scratch<std::uint64_t, 3>(tile * bytes / 8 + 1));
    float* x_scales = scratch<float, 4>(2 * units * tile);
    std::int32_t* starts = scratch<std::int32_t, 5>(2 * units * tile);
    if (tile == 1) {
      few.row(x.row(token), dwords, w.block_size, cells, x_scales, starts);
    } else {
      run.parallel_for(tokens, [&](Index t) {
        few.row(x.row(token + t), dwords, w.block_size, token_rows + t * bytes, x_scales + (tile + t) * units, starts + (tile + t) * units);
      });
      constexpr Index part = 1024;
      run.parallel_ranges(count, part, [&](Index begin, Index end) {
        const auto size = static_cast<Index>(few.cell_bytes);
        few.interleave[size_index](token_rows + begin * size, count, tokens, end - begin, cells + begin * size * tile);
      });
      for (Index u = 0; u < units; ++u)
        for (Index t = 0; t < tile; ++t) {
          x_scales[u * tile + t] = t < tokens ? x_scales[(tile + t) * units + u] : 0.0f;
          starts[u * tile + t] = t < tokens ? starts[(tile + t) * units + u] : 0;
        }
    }
    run.parallel_ranges(w.rows, task_rows, [&](Index begin, Index end) {
      float* scales = scratch<float, 6>(task_rows * blocks);
      run.codes().scales(w, begin * blocks, (end - begin) * blocks, scales);
      float* workspace = scratch<float, 7>(16 * blocks);
      alignas(64) float total[16 * 16];
      for (Index row = begin; row < end; row += 16) {
        const Index rows = std::min<Index>(16, end - row);
        few.forward[size_index](w, scales + (row - begin) * blocks, row, rows, cells, x_scales, starts, workspace, total);
        for (Index t = 0; t < tokens; ++t)
          for (Index i = 0; i < rows; ++i) store(y(token + t, row + i), total[16 * t + i], update);
      }
    });
    token += tokens;
  }
}

template <class Y>
void few_backward(const CpuRun& run, MatrixView<const float> dy, const CodedWeight& w, MatrixView<Y> dx, Update update) {
  const Index strip = w.cols >= 2048 ? 128 : w.cols >= 1024 ? 64 : 32;
  const float* scales = all_scales(run, w);
  const Index blocks = w.row_blocks();
  for (Index token = 0; token < dy.rows;) {
    const int size = few_kernel(dy.rows - token);
    const Index tile = few_tile[size], tokens = std::min(tile, dy.rows - token);
    float* factors;  // of each row of the weight: its dy for every token, or for one token its scales times dy
    if (tile == 1) {
      factors = scratch<float, 3>(w.rows * blocks);
      for (Index n = 0; n < w.rows; ++n)
        for (Index b = 0; b < blocks; ++b) factors[n * blocks + b] = scales[n * blocks + b] * dy(token, n);
    } else {
      factors = scratch<float, 3>(w.rows * tile);
      for (Index n = 0; n < w.rows; ++n)
        for (Index m = 0; m < tile; ++m) factors[n * tile + m] = m < tokens ? dy(token + m, n) : 0.0f;
    }
    run.parallel_ranges(w.cols, strip, [&](Index begin, Index end) {
      const Index width = end - begin;
      alignas(64) float total[16 * 128];
      run.codes().few_backward[size](w, tile == 1 ? factors : scales, begin, width, factors, total);
      for (Index t = 0; t < tokens; ++t)
        for (Index j = 0; j < width; ++j) store(dx(token + t, begin + j), total[t * width + j], update);
    });
    token += tokens;
  }
}

/// y [m, rows] (+)= x [m, cols] . w^T in bytes.
template <class T, class Y>
void multiply_bytes(const CpuRun& run, const CodedWeight& w, MatrixView<const T> x, MatrixView<Y> y, Update update) {
  constexpr Index task_rows = 64;
  const CodeKernels& kernels = run.codes();
  const Index blocks = w.row_blocks(), unit = std::min(w.block_size, kernels.few_int8.unit), units = w.cols / unit;
  const Index cols = w.cols / 4, stride = uncrowded_stride<std::uint32_t>(cols);
  std::uint32_t* cells = scratch<std::uint32_t, 10>(x.rows * stride);
  float* x_scales = scratch<float, 4>(x.rows * units);
  std::int32_t* starts = scratch<std::int32_t, 5>(x.rows * units);
  run.parallel_ranges(x.rows, row_grain(x.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      const float* row;
      if constexpr (std::is_same_v<T, float>) {
        row = x.row(i);
      } else {
        float* converted = scratch<float, 2>(x.cols);
        for (Index j = 0; j < x.cols; ++j) converted[j] = static_cast<float>(x(i, j));
        row = converted;
      }
      kernels.few_int8.row(row, w.cols / 8, w.block_size, cells + i * stride, x_scales + i * units, starts + i * units);
    }
  });
  const Index groups = (x.rows + token_group - 1) / token_group;
  run.parallel_for((w.rows + task_rows - 1) / task_rows * groups, [&](Index task) {
    const Index first = task / groups * task_rows, width = std::min(task_rows, w.rows - first);
    const Index token = task % groups * token_group, tokens = std::min(token_group, x.rows - token);
    constexpr Index part = 1024;  // of the sum: 32 KiB of bytes for 32 outputs
    float* scales = scratch<float, 6>(task_rows * blocks);
    kernels.scales(w, first * blocks, width * blocks, scales);
    std::uint32_t* panel = scratch<std::uint32_t, 0>(task_rows * part / 4);
    float* panel_scales = scratch<float, 7>(task_rows * part / 32);
    float* out = scratch<float, 1>(tokens * task_rows);
    for (Index k = 0; k < w.cols; k += part) {
      const Index depth = std::min(part, w.cols - k);
      for (Index p = 0; p < width; p += panel_width)
        kernels.bytes.forward(w, scales + p * blocks, first + p, std::min(panel_width, width - p), k, depth, panel + p * part / 4,
                              panel_scales + p * part / 32);
      for (Index m = 0; m < tokens; m += token_block)
        for (Index p = 0; p < width; p += panel_width)
          kernels.bytes.gemm(std::min(token_block, tokens - m), depth / unit, unit / 4, cells + (token + m) * stride + k / 4, stride,
                             x_scales + (token + m) * units + k / unit, starts + (token + m) * units + k / unit, units,
                             panel + p * part / 4, panel_scales + p * part / 32, out + m * task_rows + p, task_rows, k > 0);
    }
    for (Index m = 0; m < tokens; ++m)
      for (Index j = 0; j < width; ++j) store(y(token + m, first + j), out[m * task_rows + j], update);
  });
}

/// Outputs of a task: enough that a line of codes or a panel serves many, few enough that there are tasks for all threads.
constexpr Index task_outputs(Direction direction, Index outputs) noexcept {
  static_cast<void>(direction);
  return outputs >= 2048 ? 128 : outputs >= 1024 ? 64 : 32;
}

template <class T, class W, class Y>
void matmul(const CpuRun& run, MatrixView<const T> x, const W& w, MatrixView<Y> y, Update update);

/// The int8 class without kernels for it: x rounded to 8 bits, multiplied in float32.
template <class T, class W, class Y>
void multiply_rounded(const CpuRun& run, MatrixView<const T> x, const W& w, MatrixView<Y> y, Update update) {
  constexpr Index group = 64;
  Matrix<float> rounded;
  rounded.resize(x.rows, x.cols);
  run.parallel_ranges(x.rows, row_grain(x.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i)
      for (Index k = 0; k < x.cols; k += group) {
        const Index stop = std::min(x.cols, k + group);
        float most = 0.0f;
        for (Index j = k; j < stop; ++j) most = std::max(most, std::fabs(static_cast<float>(x(i, j))));
        const float step = most / 127.0f;
        for (Index j = k; j < stop; ++j) {
          const float value = static_cast<float>(x(i, j));
          const float steps = std::nearbyint(value / step);  // NaN where the group is zero or not finite
          rounded(i, j) = std::isfinite(value) && steps * 0.0f == 0.0f ? steps * step : value;
        }
      }
  });
  CpuRun exact = run;
  exact.compute = Compute::exact;
  matmul(exact, std::as_const(rounded).view(), w, y, update);
}

template <Direction direction, class T, class W, class Y>
void multiply_coded(const CpuRun& run, MatrixView<const T> x, const W& weight, MatrixView<Y> y, Update update) {
  const CodedWeight w = coded(weight);
  const CodeKernels& kernels = run.codes();
  const Compute compute = run.compute_of<T>();
  const bool bits16 = compute == Compute::bits16;
  QDYLORA_EXPECTS(direction == Direction::forward || compute != Compute::int8, unsupported,
                  "matmul_transposed: Compute::int8 is for inference; gradients need exact or bits16");
  const bool plain_codes = w.bits == 4 && w.whole_blocks() && w.cols > 0;
  const Index few = direction == Direction::backward && bits16 && kernels.pairs ? few_tokens_in_pairs : few_tokens;
  if (plain_codes && x.rows <= few && w.rows > 0) {
    const FewKernels& kernel = compute == Compute::int8               ? kernels.few_int8
                               : bits16 && kernels.few_bits16.steps > 0 ? kernels.few_bits16
                                                                        : kernels.few_float32;
    if (direction == Direction::backward || kernel) {
      Matrix<float> storage;
      const MatrixView<const float> input = as_scalar<float>(x, storage);
      if constexpr (direction == Direction::forward) few_forward(run, kernel, input, w, y, update);
      else few_backward(run, input, w, y, update);
      return;
    }
  }
  if constexpr (direction == Direction::forward)
    if (compute == Compute::int8) {
      if (plain_codes && kernels.bytes) return multiply_bytes(run, w, x, y, update);
      return multiply_rounded(run, x, weight, y, update);
    }
  const CodedPanels<direction> panels{kernels, w, all_scales(run, w)};
  if (bits16 && kernels.pairs)
    multiply_panels<float>(run, PairCells{kernels.pairs}, panels, task_outputs(direction, panels.outputs()), token_group, x, y, update);
  else
    multiply_panels<float>(run, PlainCells<float>{run.kernels<float>()}, panels, task_outputs(direction, panels.outputs()), token_group, x, y, update);
}

// ---- dense weights -----------------------------------------------------------------------------------------------------------------

template <class W>
using ConstView = MatrixView<const typename std::remove_const<std::remove_pointer_t<decltype(W::data)>>::type>;

/// y [m, rows] (+)= x [m, cols] . w^T by dot products: a weight is read once, and few tokens with it.
template <class S, class T, class W, class Y>
void multiply_dots(const CpuRun& run, MatrixView<const T> x, const W& w, MatrixView<Y> y, Update update) {
  Matrix<S> storage;
  const MatrixView<const S> input = as_scalar<S>(x, storage);
  const auto& kernels = run.kernels<S>();
  run.parallel_ranges(w.rows, row_grain(w.cols), [&](Index begin, Index end) {
    for (Index n = begin; n < end; ++n) {
      const S* row;
      if constexpr (std::is_same_v<ConstView<W>, MatrixView<const S>>) {
        row = w.row(n);
      } else {
        S* converted = scratch<S, 0>(w.cols);
        for (Index k = 0; k < w.cols; ++k) converted[k] = static_cast<S>(w(n, k));
        row = converted;
      }
      for (Index t = 0; t < x.rows; ++t) store(y(t, n), kernels.dot(w.cols, row, input.row(t)), update);
    }
  });
}

template <Direction direction, class S, class T, class W, class Y>
void multiply_dense(const CpuRun& run, MatrixView<const T> x, const W& w, MatrixView<Y> y, Update update) {
  const CodeKernels& kernels = run.codes();
  const auto go = [&](const auto& panels) {
    const Index group = is_dense<W> ? dense_group : token_group;
    if constexpr (std::is_same_v<S, float>)
      if (run.compute_of<T>() == Compute::bits16 && kernels.pairs && x.rows >= few_dots)
        return multiply_panels<S>(run, PairCells{kernels.pairs}, panels, 2 * panel_width, group, x, y, update);
    multiply_panels<S>(run, PlainCells<S>{run.kernels<S>()}, panels, 2 * panel_width, group, x, y, update);
  };
  if constexpr (is_dense<W>) go(ElementPanels<direction, ConstView<W>>{kernels, w});
  else go(ElementPanels<direction, W>{kernels, w});
}

template <CodeFormat Format, class Scales, class T>
void dequantize(const CpuRun& run, const QuantizedView<Format, Scales>& weight, MatrixView<T> y) {
  const CodedWeight w = coded(weight);
  run.parallel_ranges(y.rows, row_grain(y.cols), [&](Index begin, Index end) {
    for (Index i = begin; i < end; ++i) {
      if constexpr (std::is_same_v<T, float>) {
        run.codes().decode(w, i * w.cols, w.cols, y.row(i));
      } else {
        float* row = scratch<float, 2>(w.cols);
        run.codes().decode(w, i * w.cols, w.cols, row);
        for (Index j = 0; j < w.cols; ++j) y(i, j) = static_cast<T>(row[j]);
      }
    }
  });
}

// y [m, n] (+)= x [m, k] . w [n, k]^T
template <class T, class W, class Y>
void matmul(const CpuRun& run, MatrixView<const T> x, const W& w, MatrixView<Y> y, Update update) {
  using S = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<Y, double>, double, float>;
  QDYLORA_EXPECTS(x.cols == w.cols, shape_mismatch,
                  "matmul: x " + shape_text(x) + " does not fit weight " + shape_text(w.rows, w.cols));
  expect_shape("matmul: y", y, x.rows, w.rows);
  if (y.empty()) return;
  if constexpr (!is_dense<W> && std::is_same_v<S, float>) {
    multiply_coded<Direction::forward>(run, x, w, y, update);
  } else {
    if constexpr (is_dense<W>)
      if (x.rows < few_dots) return multiply_dots<S>(run, x, w, y, update);
    multiply_dense<Direction::forward, S>(run, x, w, y, update);
  }
}

// y [m, k] (+)= x [m, n] . w [n, k]
template <class T, class W, class Y>
void matmul_transposed(const CpuRun& run, MatrixView<const T> x, const W& w, MatrixView<Y> y, Update update) {
  using S = std::conditional_t<std::is_same_v<T, double> || std::is_same_v<Y, double>, double, float>;
  QDYLORA_EXPECTS(x.cols == w.rows, shape_mismatch,
                  "matmul_transposed: x " + shape_text(x) + " does not fit weight " + shape_text(w.rows, w.cols));
  expect_shape("matmul_transposed: y", y, x.rows, w.cols);
  if (y.empty()) return;
  if constexpr (!is_dense<W> && std::is_same_v<S, float>) multiply_coded<Direction::backward>(run, x, w, y, update);
  else multiply_dense<Direction::backward, S>(run, x, w, y, update);
}

// g [r, k] (+)= u [m, r]^T . x [m, k]
template <class S, class T>
void weight_gradient(const CpuRun& run, MatrixView<const S> u, MatrixView<const T> x, MatrixView<S> g, Update update) {
  constexpr Index slice_cols = 96;
  QDYLORA_EXPECTS(u.rows == x.rows, shape_mismatch,
                  "weight_gradient: u " + shape_text(u) + " and x " + shape_text(x) + " have different tokens");
  expect_shape("weight_gradient: g", g, u.cols, x.cols);
  Matrix<S> storage;
  const MatrixView<const S> input = as_scalar<S>(x, storage);
  const auto& kernels = run.kernels<S>();
  run.parallel_ranges(g.cols, slice_cols, [&](Index begin, Index end) {
    kernels.gemm(g.rows, end - begin, u.rows, u.data, 1, u.stride, input.data + begin, input.stride, g.data + begin, g.stride,
                 update == Update::accumulate);
  });
}

}  // namespace qdylora::detail
