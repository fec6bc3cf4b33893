// Products with quantized weights. Few tokens with a 4-bit weight need no panel: codes go from memory through registers into sums
// (kernels/few.inc, few_backward). All others go by panels, in the arithmetic of the class. A weight is decoded once a call and never stored in
// full.
#pragma once

#include <cmath>

#include <qdylora/cpu/panels.hpp>

namespace qdylora::detail {

/// At most this many tokens go backward without panels.
constexpr Index few_tokens_backward(const CodedWeight& w, bool in_pairs) noexcept {
  if (in_pairs) return 4;  // panels of pairs come straight from codes, and these kernels are float32
  return w.cols >= 1024 ? 16 : 8;  // sixteen go by strips, of which short rows have too few to share among threads
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

/// How many of the next tokens go at once, 1, 4 or 16, as an index of kernels by tokens; five to eight go by fours.
constexpr int few_kernel(Index tokens, bool has_sixteen = true) noexcept { return tokens == 1 ? 0 : tokens <= 8 || !has_sixteen ? 1 : 2; }

inline constexpr Index few_x_bytes = 65536;     // of 16 tokens, at a time
inline constexpr Index few_code_bytes = 98304;  // of codes that they are used for; a second-level cache holds them and what is fetched meanwhile
inline constexpr Index few_rows = 64;           // whose codes these are, at most

template <class Y>
void few_forward(const CpuRun& run, const FewKernels& few, MatrixView<const float> x, const CodedWeight& w, MatrixView<Y> y,
                 Update update) {
  // Kernels fetch the rows after theirs ahead of time, for themselves if the task goes on there.
  const Index task_rows = w.rows >= 2048 ? 256 : w.rows >= 1024 ? 64 : 32;
  const Index dwords = w.cols / 8, blocks = w.row_blocks();
  for (Index token = 0; token < x.rows;) {
    const int size_index = few_kernel(x.rows - token, few.forward[2] != nullptr);
    const Index tile = few_tile[size_index], tokens = std::min(tile, x.rows - token);
    const Index units = w.cols / std::min(w.block_size, few.unit);
    const Index count = dwords * few.steps, bytes = count * static_cast<Index>(few.cell_bytes);
    auto* token_rows = reinterpret_cast<std::byte*>(scratch<std::uint64_t, 2>(tokens * bytes / 8 + 1));
    constexpr Index padding = 16;  // dwords that a single token may be filled up to
    auto* cells = reinterpret_cast<std::byte*>(scratch<std::uint64_t, 3>(tile * bytes / 8 + padding * few.steps));
    const Index scales_of_x = std::max(2 * units * tile, dwords + padding);
    float* x_scales = scratch<float, 4>(scales_of_x);
    std::int32_t* starts = scratch<std::int32_t, 5>(scales_of_x);
    if (tile == 1) {
      few.single(x.row(token), dwords, w.block_size, cells, x_scales, starts);
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
    const Index strip = tile < 16 ? dwords : std::max<Index>(few_x_bytes / (few.steps * tile * static_cast<Index>(few.cell_bytes)), 16);
    const Index rows_together = strip >= dwords ? 32 : std::clamp<Index>(few_code_bytes / w.row_bytes() / 16 * 16, 16, few_rows);
    run.parallel_ranges(w.rows, task_rows, [&](Index task_begin, Index task_end) {
      float* scales = scratch<float, 6>(rows_together * blocks + 16);
      std::fill_n(scales + rows_together * blocks, 16, 0.0f);
      float* workspace = scratch<float, 7>(std::max(16 * blocks, w.cols / 32 + 16));
      alignas(64) float total[16 * few_rows];
      for (Index begin = task_begin; begin < task_end; begin += rows_together) {
        const Index end = std::min(task_end, begin + rows_together);
        run.codes().scales(w, begin * blocks, (end - begin) * blocks, scales);
        const std::uint8_t* ahead = w.codes + (begin + (strip >= dwords ? 16 : rows_together)) * w.row_bytes();
        for (Index from = 0; from < dwords; from += strip) {
          const Index to = std::min(dwords, from + strip);
          for (Index row = begin; row < end; row += 16, ahead += 64 * (to - from))
            few.forward[size_index](w, scales + (row - begin) * blocks, row, std::min<Index>(16, end - row), from, to, ahead, cells, x_scales,
                                    starts, workspace, total + 16 * (row - begin));
        }
        for (Index t = 0; t < tokens; ++t)
          for (Index i = 0; i < end - begin; ++i) store(y(token + t, begin + i), total[i / 16 * 256 + 16 * t + i % 16], update);
      }
    });
    token += tokens;
  }
}

template <class Y>
void few_backward(const CpuRun& run, MatrixView<const float> dy, const CodedWeight& w, MatrixView<Y> dx, Update update) {
  const float* scales = all_scales(run, w);
  for (Index token = 0; token < dy.rows;) {
    const int size = few_kernel(dy.rows - token);
    const Index tile = few_tile[size], tokens = std::min(tile, dy.rows - token);
    // Tasks share the rows where a kernel has room for the sums of most of a row, else the columns first.
    const Index columns = run.codes().few_columns[size];
    const Index strip = columns > few_strip ? rounded_up(div_up(w.cols, div_up(w.cols, columns)), 128)
                        : w.cols >= 4096    ? few_strip
                        : w.cols >= 2048    ? few_strip / 2
                                            : few_strip / 4;
    const Index strips = div_up(w.cols, strip);
    const Index parts = std::max<Index>(1, std::min(w.rows / 256, 16 / strips)), part_rows = div_up(w.rows, parts);
    const float* by_row = dy.row(token);  // dy of each row of the weight, for every token
    if (tile > 1) {
      float* turned = scratch<float, 3>(w.rows * tile);
      run.parallel_ranges(w.rows, 1024, [&](Index begin, Index end) {
        if (const auto turn = run.codes().few_float32.interleave[size])
          return turn(dy.row(token) + begin, dy.stride, tokens, end - begin, turned + begin * tile);
        for (Index n = begin; n < end; ++n)
          for (Index m = 0; m < tile; ++m) turned[n * tile + m] = m < tokens ? dy(token + m, n) : 0.0f;
      });
      by_row = turned;
    }
    float* sums = parts > 1 ? scratch<float, 4>(parts * tile * w.cols) : nullptr;
    run.parallel_for(strips * parts, [&](Index task) {
      const Index part = task % parts, col = task / parts * strip, width = std::min(strip, w.cols - col);
      const Index begin = part * part_rows, end = std::min(w.rows, begin + part_rows);
      float* total = parts > 1 ? sums + (part * w.cols + col) * tile : scratch<float, 5>(tile * strip);
      run.codes().few_backward[size](w, scales, begin, end, col, width, by_row + begin * tile, total);
      if (parts > 1) return;
      const auto out = dx.middle_rows(token, tokens).middle_cols(col, width);
      for (Index t = 0; t < tokens; ++t) store_row(run, total + t * width, out, t, update);
    });
    constexpr Index piece = 512;
    if (parts > 1)
      run.parallel_for(strips * div_up(strip, piece), [&](Index task) {
        const Index col = task % strips * strip, width = std::min(strip, w.cols - col);
        const Index first = task / strips * piece, count = std::min(piece, width - first);
        if (count <= 0) return;
        const auto out = dx.middle_rows(token, tokens).middle_cols(col + first, count);
        for (Index t = 0; t < tokens; ++t) {
          float* total = sums + col * tile + t * width + first;
          for (Index part = 1; part < parts; ++part) run.kernels<float>().add(count, total + part * w.cols * tile, total);
          store_row(run, total, out, t, update);
        }
      });
    token += tokens;
  }
}

constexpr Index turned_sum_stride(Index tokens) noexcept { return rounded_up(tokens, 32) + 16; }  // a line more, as in CellPanels
inline constexpr Index turned_together = 16;  // tokens that are turned side by side, and whose sums are turned back

/// y[t, j] (+)= sums[j * sum_row + t]
template <class Y>
void store_turned(const CpuRun& run, const float* sums, Index sum_row, MatrixView<Y> y, Update update) {
  const auto& kernels = run.kernels<float>();
  const Index turned_row = rounded_up(y.cols, 16);
  float* turned = scratch<float, 7>(turned_together * turned_row);
  for (Index first = 0; first < y.rows; first += turned_together) {
    const Index count = std::min(turned_together, y.rows - first);
    if constexpr (std::is_same_v<Y, float>)
      if (update == Update::overwrite && y.cols == turned_row) {
        kernels.transpose(y.cols, count, sums + first, sum_row, y.row(first), y.stride);
        continue;
      }
    kernels.transpose(y.cols, count, sums + first, sum_row, turned, turned_row);
    for (Index t = 0; t < count; ++t) store_row(run, turned + t * turned_row, y, first + t, update);
  }
}

/// x as TileKernels take it.
template <class T>
CellPanels prepare_tiles(const CpuRun& run, const Bits16Cells& cells, MatrixView<const T> x) {
  const CellPanels panels = cells.panels_for(x.rows, x.cols);
  each_x_rows(run, x.rows, x.cols, turned_together, [&](Index row, Index rows) {
    MatrixView<const float> floats;
    if constexpr (std::is_same_v<T, float>) {
      floats = x.middle_rows(row, rows);
    } else {
      const MatrixView<float> converted{scratch<float, 2>(turned_together * x.cols), rows, x.cols, x.cols};
      for (Index r = 0; r < rows; ++r) convert_row(run, x.cols, x.row(row + r), converted.row(r));
      floats = converted;
    }
    for (Index k = 0; k < x.cols; k += panels.depth)
      run.codes().tiles.round(floats.row(0) + k, floats.stride, rows, std::min(panels.depth, x.cols - k), panels.at(row, k));
  });
  return panels;
}

/// y [m, rows] (+)= x [m, cols] . w^T by tiles: the sums of a task stand turned until it ends.
template <class T, class Y>
void multiply_tiles(const CpuRun& run, const CodedWeight& w, const float* scales, MatrixView<const T> x, MatrixView<Y> y, Update update) {
  const TileKernels& tiles = run.codes().tiles;
  const Bits16Cells cells{run.codes().bits16};
  const Index depth = cells.panel_depth();
  const CellPanels input = prepare_tiles(run, cells, x);
  const ProductTasks tasks{w.rows, task_outputs(run, w.rows, x.rows), x.rows, token_group};
  run.parallel_for(tasks.count(), [&](Index task) {
    const auto [first, width, token, tokens, whole_sum] = tasks[task];
    const Index next = tasks[task + 1].first;
    const Index sum_row = turned_sum_stride(tokens);
    float* sums = scratch<float, 1>(rounded_up(width, panel_width) * sum_row);
    std::uint32_t* decoded = scratch<std::uint32_t, 0>(panel_width * cells.cells_of_panel());
    const TileScope scope = cells.scope();
    for (Index k = 0; k < w.cols; k += depth) {
      const Index part = std::min(depth, w.cols - k), here = cells.cells_of(part);
      const bool more = k + part < w.cols;  // what comes next, here or in the task that follows, is fetched meanwhile
      const std::uint32_t* ahead = input.at(token, more ? k + part : 0);
      for (Index p = 0; p < width; p += panel_width, ahead += tokens * here / 8) {
        tiles.decode(w, scales + (first + p) * w.row_blocks(), first + p, std::min(panel_width, width - p), k, part, decoded);
        w.prefetch((more ? first : next) + p, panel_width, more ? k + part : 0, depth);
        tiles.gemm(tokens, here, decoded, input.at(token, k), 16 * input.stride(), sums + p * sum_row, sum_row, k > 0, ahead);
      }
    }
    store_turned(run, sums, sum_row, y.middle_rows(token, tokens).middle_cols(first, width), update);
  });
}

/// y [m, rows] (+)= x [m, cols] . w^T in bytes.
template <class T, class Y>
void multiply_bytes(const CpuRun& run, const CodedWeight& w, MatrixView<const T> x, MatrixView<Y> y, Update update) {
  constexpr Index task_rows = 64;
  const CodeKernels& kernels = run.codes();
  const Index blocks = w.row_blocks(), unit = std::min(w.block_size, kernels.few_int8.unit), units = w.cols / unit;
  const Index cols = w.cols / 4, stride = uncrowded_stride<std::uint32_t>(cols), side = kernels.bytes.x_rows;
  std::uint32_t* cells = scratch<std::uint32_t, 10>(rounded_up(x.rows, side) * stride);
  float* x_scales = scratch<float, 4>(rounded_up(x.rows, side) * units);
  std::int32_t* starts = scratch<std::int32_t, 5>(rounded_up(x.rows, side) * units);
  each_x_rows(run, x.rows, x.cols, side, [&](Index row, Index rows) {
    const auto round = [&](std::uint32_t* to, float* scale, std::int32_t* start) {
      for (Index r = 0; r < rows; ++r)
        kernels.few_int8.row(row_as<float, 2>(run, x, row + r), w.cols / 8, w.block_size, to + r * stride, scale + r * units, start + r * units);
    };
    if (side == 1) return round(cells + row * stride, x_scales + row * units, starts + row * units);
    std::uint32_t* row_cells = scratch<std::uint32_t, 8>(rows * stride);
    float* row_scales = scratch<float, 6>(rows * units);
    std::int32_t* row_starts = scratch<std::int32_t, 9>(rows * units);
    round(row_cells, row_scales, row_starts);
    side_by_side(run, side, row_cells, stride, rows, cols, cells + row * stride);
    side_by_side(run, side, row_scales, units, rows, units, x_scales + row * units);
    side_by_side(run, side, row_starts, units, rows, units, starts + row * units);
  });
  const ProductTasks tasks{w.rows, task_rows, x.rows, token_group};
  run.parallel_for(tasks.count(), [&](Index task) {
    const auto [first, width, token, tokens, whole_sum] = tasks[task];
    const Index next = tasks[task + 1].first;
    constexpr Index part = 512;  // of the sum: 16 KiB of bytes for 32 outputs
    float* scales = scratch<float, 6>(task_rows * blocks);
    kernels.scales(w, first * blocks, width * blocks, scales);
    std::uint32_t* panel = scratch<std::uint32_t, 0>(task_rows * part / 4);
    float* panel_scales = scratch<float, 7>(task_rows * part / 32);
    float* out = scratch<float, 1>(tokens * task_rows);
    for (Index k = 0; k < w.cols; k += part) {
      const Index depth = std::min(part, w.cols - k);
      const bool more = k + depth < w.cols;  // what is decoded next, here or in the task that follows, is fetched meanwhile
      for (Index p = 0; p < width; p += panel_width)
        kernels.bytes.forward(w, scales + p * blocks, first + p, std::min(panel_width, width - p), k, depth, panel + p * part / 4,
                              panel_scales + p * part / 32);
      for (Index m = 0; m < tokens; m += token_block)
        for (Index p = 0; p < width; p += panel_width) {
          if (m == 0) w.prefetch((more ? first : next) + p, panel_width, more ? k + depth : 0, part);
          kernels.bytes.gemm(std::min(token_block, tokens - m), depth / unit, unit / 4, cells + (token + m) * stride + k / 4 * side, stride,
                             x_scales + (token + m) * units + k / unit * side, starts + (token + m) * units + k / unit * side, units,
                             panel + p * part / 4, panel_scales + p * part / 32, out + m * task_rows + p, task_rows, k > 0);
        }
    }
    const auto target = y.middle_rows(token, tokens).middle_cols(first, width);
    for (Index m = 0; m < tokens; ++m) store_row(run, out + m * task_rows, target, m, update);
  });
}

template <class T, class W, class Y>
void matmul(const CpuRun& run, MatrixView<const T> x, const W& w, MatrixView<Y> y, Update update);

/// The int8 class without kernels for it: x rounded to 8 bits, multiplied in another class.
template <class T, class W, class Y>
void multiply_rounded(const CpuRun& run, Compute compute, MatrixView<const T> x, const W& w, MatrixView<Y> y, Update update) {
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
  CpuRun other = run;
  other.compute = compute;
  matmul(other, std::as_const(rounded).view(), w, y, update);
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
  if (plain_codes && w.rows > 0) {
    const FewKernels& kernel = compute == Compute::int8       ? kernels.few_int8
                               : bits16 && kernels.few_bits16 ? kernels.few_bits16
                                                              : kernels.few_float32;
    const Index most = direction == Direction::forward
                           ? kernel.most
                           : few_tokens_backward(w, bits16 && kernels.bits16.backward != nullptr);
    if (x.rows <= most) {
      Matrix<float> storage;
      const MatrixView<const float> input = as_scalar<float>(run, x, storage);
      if constexpr (direction == Direction::forward) few_forward(run, kernel, input, w, y, update);
      else few_backward(run, input, w, y, update);
      return;
    }
  }
  if constexpr (direction == Direction::forward) {
    if ((bits16 || compute == Compute::int8) && plain_codes && kernels.tiles) return multiply_tiles(run, w, all_scales(run, w), x, y, update);
    if (compute == Compute::int8) {
      if (plain_codes && kernels.bytes) return multiply_bytes(run, w, x, y, update);
      return multiply_rounded(run, plain_codes ? Compute::bits16 : Compute::exact, x, weight, y, update);
    }
  }
  const CodedPanels<direction> panels{kernels, w, all_scales(run, w)};
  if (bits16 && kernels.bits16)
    multiply_panels<float>(run, Bits16Cells{kernels.bits16}, panels, task_outputs(run, panels.outputs(), x.rows),
                           token_group, x, y, update);
  else
    multiply_panels<float>(run, PlainCells<float>{run.kernels<float>()}, panels, task_outputs(panels.outputs()), token_group, x, y, update);
}

}  // namespace qdylora::detail
