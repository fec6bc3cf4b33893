// Products by panels, in both directions one algorithm: a weight is decoded 32 outputs side by side into a thread's cache, and rows of x are
// multiplied with it from there; the direction decides what a panel is cut from.
//
// One task owns each output element, and a sum's order depends on its length alone: the bits depend neither on how work is cut, on the number of
// threads, nor on the other rows of x.
#pragma once

#include <cstring>

#include <qdylora/cpu/elementwise.hpp>
#include <qdylora/cpu/product_tasks.hpp>

namespace qdylora::detail {

inline constexpr Index rounded_rows = 64;  // of a panel, rounded to 16 bits at a time: in a first-level cache

inline constexpr Index x_fetched_ahead = 4 << 20;  // bytes of x, of a task, from which on products would wait for them
inline constexpr Index rows_between_fetches = token_block / 4;  // of x: whole tiles, and whole rows side by side

template <class W>
inline constexpr bool is_dense = false;
template <class S>
inline constexpr bool is_dense<MatrixView<S>> = true;

template <class Y, class S>
void store(Y& target, S value, Update update) noexcept {
  target = static_cast<Y>(update == Update::accumulate ? static_cast<S>(target) + value : value);
}

// ---- what panels are cut from: fill(first output, outputs, begin, depth, out [depth][32]) ------------------------------------------

enum class Direction { forward, backward };

/// A panel in 16 bits, from one in float32.
template <class Panels>
void fill_rounded(const Panels& panels, const CodeKernels& kernels, Index first, Index count, Index begin, Index part, std::uint32_t* out) {
  float* panel = scratch<float, 9>(rounded_rows * panel_width);
  for (Index k = 0; k < part; k += rounded_rows) {
    const Index here = std::min(rounded_rows, part - k);
    panels.fill(first, count, begin + k, here, panel);
    kernels.bits16.round_panel(panel, panel_width, here, out + kernels.bits16.cells_of(k) * panel_width);
  }
}

/// Forward, the outputs of a product are a weight's rows and its sums run along columns; backward it is the other way.
template <Direction direction>
struct CodedPanels {
  const CodeKernels& kernels;
  const CodedWeight& w;
  const float* scales;  // of the whole weight; null where kernels do not read them

  Index outputs() const noexcept { return direction == Direction::forward ? w.rows : w.cols; }
  Index depth() const noexcept { return direction == Direction::forward ? w.cols : w.rows; }
  void fill(Index first, Index count, Index begin, Index part, float* out) const {
    if constexpr (direction == Direction::forward)
      kernels.forward_panel(w, scales_from(first), first, count, begin, part, out);
    else kernels.backward_panel(w, scales, begin, part, first, count, out);
  }
  void fill(Index first, Index count, Index begin, Index part, std::uint32_t* out) const {
    const CellKernels& cells = kernels.bits16;
    const bool numbers = w.byte_step != 0.0f;
    if constexpr (direction == Direction::forward) {
      if (!w.whole_blocks() || (numbers ? !cells.forward_numbers : w.bits != 4 || w.block_size < cells.numbers))
        return fill_rounded(*this, kernels, first, count, begin, part, out);
      if (count < panel_width) std::fill_n(out, cells.cells_of(part) * panel_width, 0u);
      if (numbers) cells.forward_numbers(w, first, count, begin, part, out);
      else cells.forward(w, scales_from(first), first, count, begin, part, out);
    } else {
      if (numbers && w.whole_blocks() && cells.backward_numbers) cells.backward_numbers(w, begin, part, first, out);
      else fill_rounded(*this, kernels, first, count, begin, part, out);
    }
  }
  /// Whether fill_together makes several panels faster than fill does one by one.
  bool fills_together() const noexcept {
    return direction == Direction::backward && w.bits == 4 && w.whole_blocks() && kernels.bits16.backward;
  }
  /// Up to panel_batch of them, `apart` cells apart.
  void fill_together(Index first, Index count, Index begin, Index part, std::uint32_t* out, Index apart) const {
    kernels.bits16.backward(w, scales, begin, part, first, count / panel_width, out, apart);
  }
  /// Asks memory for share i of n of what fill() of these outputs will read, row by row.
  [[gnu::always_inline]] void prefetch(Index first, Index outputs, Index begin, Index part, Index i, Index n) const {
    if (!w.whole_blocks()) return;
    if (direction == Direction::forward) w.prefetch(first + i * outputs / n, outputs / n, begin, part);
    else w.prefetch(begin + i * part / n, (i + 1) * part / n - i * part / n, first, outputs);
  }

 private:
  const float* scales_from(Index row) const noexcept { return scales == nullptr ? nullptr : scales + row * w.row_blocks(); }
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
    } else if constexpr (direction == Direction::backward && std::is_same_v<W, MatrixView<const S>>) {
      const S* row = w.row(begin) + first;
      for (Index k = 0; k < part; ++k, row += w.stride, out += panel_width) {
        if (count == panel_width) {
          std::memcpy(out, row, panel_width * sizeof(S));
        } else {
          std::copy_n(row, count, out);
          std::fill(out + count, out + panel_width, S{});
        }
      }
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
    if constexpr (direction == Direction::backward && std::is_same_v<W, MatrixView<const float>>)
      if (count == panel_width) return kernels.bits16.round_panel(w.row(begin) + first, w.stride, part, out);
    fill_rounded(*this, kernels, first, count, begin, part, out);
  }
};

/// The panels of outputs [first, first + count), `apart` cells apart.
template <class Panels, class Cell>
void fill_panels(const Panels& panels, Index first, Index count, Index begin, Index part, Cell* out, Index apart) {
  if (part == 0) return;  // an empty sum
  if constexpr (requires { panels.fill_together(first, count, begin, part, out, apart); })
    if (panels.fills_together()) return panels.fill_together(first, count, begin, part, out, apart);
  for (Index j = 0; j < count; j += panel_width, out += apart) panels.fill(first + j, std::min(panel_width, count - j), begin, part, out);
}

// ---- the arithmetic of a product by panels: what a cell of x and of a panel is -----------------------------------------------------

/// f(first row, rows) for every x_rows rows of x, which kernels take side by side; in parallel.
template <class F>
void each_x_rows(const CpuRun& run, Index rows, Index cols, Index x_rows, F f) {
  run.parallel_ranges(div_up(rows, x_rows), row_grain(x_rows * cols), [&](Index begin, Index end) {
    for (Index row = begin * x_rows; row < std::min(rows, end * x_rows); row += x_rows) f(row, std::min(x_rows, rows - row));
  });
}

/// out[k * x_rows + r] = x[r * stride + k] of up to x_rows rows, 4 or 16; zero for those that are not there.
template <class Cell>
void side_by_side(const CpuRun& run, Index x_rows, const Cell* x, Index stride, Index rows, Index cols, Cell* out) {
  static_assert(sizeof(Cell) == 4);
  run.codes().few_float32.interleave[x_rows == 4 ? 1 : 2](x, stride, rows, cols, out);
}

/// Rows of x as cells, each in one piece.
template <class Cell>
struct CellRows {
  MatrixView<const Cell> rows;
  /// Where the cells of a panel's part of the sum, from k on, begin; the next row's are stride() further.
  const Cell* at(Index row, Index k) const noexcept { return rows.row(row) + k; }
  Index stride() const noexcept { return rows.stride; }
};

/// Rows of x as cells, those of a panel's part of the sum side by side: few pages, read in a row.
struct CellPanels {
  using Cell = std::uint32_t;
  Cell* data;
  Index rows;
  Index depth;  // numbers of a row in a panel
  Index cells;  // of these
  Cell* at(Index row, Index k) const noexcept { return data + (k / depth * rows + row) * stride(); }
  Index stride() const noexcept { return stride_of(cells); }
  static constexpr Index stride_of(Index cells) noexcept { return cells + 16; }  // a line more: rows spread over a first-level cache
};

/// Asks memory for share i of n of what panels take of rows [row, row + rows) of x, from k on.
template <class Input>
[[gnu::always_inline]] inline void prefetch_rows(const Input& x, Index row, Index rows, Index k, Index cells, Index i, Index n) {
  const auto* begin = x.at(row + i * rows / n, k);
  constexpr Index line = 64 / sizeof(*begin);
  for (Index r = (i + 1) * rows / n - i * rows / n; r > 0; --r, begin += x.stride())
    for (Index c = 0; c < cells; c += line) __builtin_prefetch(begin + c, 0, 2);
}

template <class S>
struct PlainCells {
  using Cell = S;
  const KernelTable<S>& kernels;

  static constexpr Index block() noexcept { return token_block; }
  static constexpr Index batch() noexcept { return 1; }
  static constexpr auto scope() noexcept { return nullptr; }

  /// Of a sum, in a panel.
  static constexpr Index panel_depth() noexcept { return panel_cells; }
  static constexpr Index cells_of_panel() noexcept { return panel_cells; }
  static constexpr Index cells_of(Index depth) noexcept { return depth; }
  /// Cells of x where it is converted.
  static constexpr Index cells_for(Index rows, Index cols) noexcept { return rows * uncrowded_stride<S>(cols); }

  /// Rows of x as cells: its own memory where that serves, else the calling thread's.
  template <class T>
  CellRows<Cell> prepare(const CpuRun& run, MatrixView<const T> x) const {
    if constexpr (std::is_same_v<T, S>)
      if (x.rows <= 2 || !crowds_cache(x.stride * static_cast<Index>(sizeof(S)))) return {x};
    const MatrixView<Cell> cells{scratch<Cell, 10>(cells_for(x.rows, x.cols)), x.rows, x.cols, uncrowded_stride<Cell>(x.cols)};
    convert(run, x, cells);
    return {cells};
  }
  void gemm(Index m, Index n, Index depth, const Cell* a, Index a_row, const Cell* b, S* c, Index c_row, bool accumulate) const {
    kernels.gemm(m, n, depth, a, a_row, 1, b, panel_width, c, c_row, accumulate);
  }
};

/// The rows [cols of u] of u^T.
struct Turned {
  MatrixView<const float> columns;
  Index rows = columns.cols, cols = columns.rows;
};

/// A thread's tiles are set up while one of these lives.
class TileScope {
 public:
  explicit TileScope(const CellKernels& kernels) : kernels_(kernels) {
    if (kernels_.begin_tiles) kernels_.begin_tiles();
  }
  TileScope(const TileScope&) = delete;
  TileScope& operator=(const TileScope&) = delete;
  ~TileScope() {
    if (kernels_.end_tiles) kernels_.end_tiles();
  }

 private:
  const CellKernels& kernels_;
};

struct Bits16Cells {
  using Cell = std::uint32_t;
  const CellKernels& kernels;
  static constexpr Index turned_rows = 16;  // of x_rows, and of what kernels turn side by side

  Index panel_depth() const noexcept { return kernels.panel / kernels.cells * kernels.numbers; }
  Index cells_of_panel() const noexcept { return kernels.panel; }
  Index cells_of(Index depth) const noexcept { return kernels.cells_of(depth); }
  Index block() const noexcept { return kernels.block; }
  Index batch() const noexcept { return kernels.batch; }
  TileScope scope() const { return TileScope(kernels); }
  /// Cells of x.
  Index cells_for(Index rows, Index cols) const noexcept {
    return div_up(std::max<Index>(cols, 1), panel_depth()) * rows_for(rows) * CellPanels::stride_of(kernels.panel);
  }
  /// Of rows on their way to stand side by side.
  Index cells_beside(Index rows, Index cols) const noexcept {
    return kernels.x_rows > 1 ? div_up(cols, panel_depth()) * rows * CellPanels::stride_of(kernels.panel) : 0;
  }
  /// Room for the cells of x.
  CellPanels panels_for(Index rows, Index cols) const {
    return {scratch<Cell, 10>(cells_for(rows, cols)), rows_for(rows), panel_depth(), kernels.panel};
  }
  template <class T>
  CellPanels prepare(const CpuRun& run, MatrixView<const T> x) const {
    const CellPanels cells = panels_for(x.rows, x.cols);
    each_x_rows(run, x.rows, x.cols, kernels.x_rows, [&](Index row, Index rows) {
      round(run, row, rows, x.cols, [&](Index r) { return row_as<float, 2>(run, x, row + r); }, cells);
    });
    return cells;
  }
  CellPanels prepare(const CpuRun& run, Turned x) const {
    const CellPanels cells = panels_for(x.rows, x.cols);
    each_x_rows(run, x.rows, x.cols, turned_rows, [&](Index first, Index count) {
      const Index stride = rounded_up(x.cols, 16);
      float* turned = scratch<float, 2>(turned_rows * stride);
      run.kernels<float>().transpose(x.cols, count, x.columns.data + first, x.columns.stride, turned, stride);
      for (Index row = 0; row < count; row += kernels.x_rows)
        round(run, first + row, std::min(kernels.x_rows, count - row), x.cols, [&](Index r) { return turned + (row + r) * stride; }, cells);
    });
    return cells;
  }
  void gemm(Index m, Index n, Index depth, const Cell* a, Index a_row, const Cell* b, float* c, Index c_row, bool accumulate) const {
    kernels.gemm(m, n, depth, a, a_row, 1, b, panel_width, c, c_row, accumulate);
  }

 private:
  static constexpr Index rows_for(Index rows) noexcept { return rounded_up(rows, 16); }  // tiles take whole ones
  /// Up to x_rows rows, of which row_of(r) gives one at a time.
  template <class RowOf>
  void round(const CpuRun& run, Index row, Index rows, Index count, RowOf row_of, const CellPanels& cells) const {
    const Index side = kernels.x_rows;
    Cell* own = side > 1 ? scratch<Cell, 8>(cells_beside(rows, count)) : nullptr;
    const CellPanels to = own != nullptr ? CellPanels{own, rows, cells.depth, cells.cells} : cells;
    const Index first = own != nullptr ? 0 : row;
    for (Index r = 0; r < rows; ++r) {
      const float* x = row_of(r);
      for (Index k = 0; k < count; k += cells.depth) kernels.round(x + k, std::min(cells.depth, count - k), to.at(first + r, k));
    }
    if (own != nullptr)
      for (Index k = 0; k < count; k += cells.depth)
        side_by_side(run, side, to.at(0, k), to.stride(), rows, cells_of(std::min(cells.depth, count - k)), cells.at(row, k));
  }
};

/// y [m, outputs] (+)= x [m, depth] . panels
template <class S, class Cells, class Panels, class X, class Y>
void multiply_panels(const CpuRun& run, const Cells& cells, const Panels& panels, Index task_outputs, Index group_tokens, X x,
                     MatrixView<Y> y, Update update) {
  using Cell = typename Cells::Cell;
  const Index panel_depth = cells.panel_depth();
  const auto input = cells.prepare(run, x);
  const Index outputs = panels.outputs(), depth = panels.depth();
  const Index parts = depth_parts(outputs, depth);
  const Index part_depth = rounded_up(div_up(std::max<Index>(depth, 1), parts), panel_depth);
  if (parts > 1) task_outputs = shared_outputs(outputs);
  const ProductTasks tasks{outputs, task_outputs, x.rows, group_tokens, parts};
  const Index sum_stride = shared_sum_stride<S>(outputs);
  S* sums = parts > 1 ? scratch<S, 12>(parts * x.rows * sum_stride) : nullptr;
  run.parallel_for(tasks.count(), [&](Index task) {
    const auto [first, width, token, tokens, part_of_sum] = tasks[task];
    const auto next = tasks[task + 1];
    const Index begin = part_of_sum * part_depth, end = std::min(depth, begin + part_depth);
    const bool direct = parts == 1 && sums_in_place<S, Y>(outputs, y.stride);
    const Index padded = rounded_up(width, panel_width);
    MatrixView<S> out;
    if constexpr (std::is_same_v<Y, S>)
      if (direct) out = {y.row(token) + first, tokens, width, y.stride};
    if (parts > 1) out = {sums + (part_of_sum * x.rows + token) * sum_stride + first, tokens, width, sum_stride};
    else if (!direct) out = {scratch<S, 1>(tokens * own_sum_stride(width)), tokens, padded, own_sum_stride(width)};
    const Index block = cells.block(), batch = cells.batch() * panel_width;
    const bool shared = tokens <= block && batch == panel_width;  // panels that serve once have one place, in a first-level cache
    const Index apart = shared ? 0 : cells.cells_of_panel();
    Cell* panel = scratch<Cell, 0>((shared ? panel_width : padded) * cells.cells_of_panel());
    const bool fetch_x = tokens > block && tokens * cells.cells_of(end - begin) * static_cast<Index>(sizeof(Cell)) >= x_fetched_ahead;
    [[maybe_unused]] const auto scope = cells.scope();
    for (Index k = begin; k < std::max(end, begin + 1); k += panel_depth) {
      const Index part = std::clamp<Index>(end - k, 0, panel_depth);
      const Index here = cells.cells_of(part);
      const bool more = k + part < end;  // what comes next, here or in the task that follows, is fetched meanwhile
      const Index next_first = more ? first : next.first, next_token = more ? token : next.token, next_k = more ? k + part : next.part * part_depth;
      const bool add = k > begin || (direct && update == Update::accumulate);
      for (Index m = 0; m < tokens; m += block)
        for (Index p = 0; p < width; p += batch) {
          const Index stop = std::min(width, p + batch);
          if (m == 0) {
            fill_panels(panels, first + p, stop - p, k, part, panel + p * apart, panel_width * apart);
            if constexpr (requires { panels.prefetch(p, p, k, part, p, p); })
              for (Index q = p; q < stop; q += panel_width)
                panels.prefetch(next_first, task_outputs, next_k, panel_depth, q / panel_width, task_outputs / panel_width);
          }
          const Index last = std::min(tokens, m + block), step = fetch_x ? rows_between_fetches : block;
          for (Index r = m; r < last; r += step) {
            if (fetch_x) {
              const bool below = last < tokens;
              const Index row = below ? token + last : next_token, shares = div_up(last - m, step);
              prefetch_rows(input, row, std::min(block, x.rows - row), below ? k : next_k, here, p / batch * shares + (r - m) / step,
                            div_up(width, batch) * shares);
            }
            for (Index q = p; q < stop; q += panel_width)
              cells.gemm(std::min(step, last - r), width - q > panel_width / 2 ? panel_width : panel_width / 2, here, input.at(token + r, k),
                         input.stride(), panel + q * apart, out.row(r) + q, out.stride, add);
          }
        }
    }
    if (direct || parts > 1) return;
    const auto target = y.middle_rows(token, tokens).middle_cols(first, width);
    for (Index m = 0; m < tokens; ++m) store_row(run, out.row(m), target, m, update);
  });
  if (parts == 1) return;
  run.parallel_ranges(x.rows, row_grain(parts * outputs), [&](Index begin, Index end) {
    for (Index m = begin; m < end; ++m) {
      S* sum = sums + m * sum_stride;
      for (Index p = 1; p < parts; ++p) run.kernels<S>().add(outputs, sums + (p * x.rows + m) * sum_stride, sum);
      store_row(run, sum, y, m, update);
    }
  });
}

}  // namespace qdylora::detail
