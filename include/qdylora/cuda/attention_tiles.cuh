// The two products that attention is made of, on tiles of one head's rows, with and without tensor cores. Both kinds of tiles have the
// same names, so that attention.cuh states each algorithm once:
//
//   own rows     a block has `own` of them, the same ones throughout; it meets `other` rows, `step` at a time
//   scores       S [own, step] = own . other^T, a product over the head's columns
//   sums         Y [own, width] += S . other, a product over the rows that are met
//
// A thread holds a part of S and Y: `rows` of their rows, which `row_lanes` neighbouring lanes share; row(r), column(c) and output(c) tell
// which. Rows and columns that do not exist are zeros.
#pragma once

#include <cstdint>
#include <type_traits>

#include <qdylora/core/view.hpp>
#include <qdylora/cuda/for_each.cuh>

namespace qdylora::device {

/// By fused multiply-adds, for every type, up to 256 columns. A warp has 4 own rows; a lane has one of the 32 rows they meet while the
/// scores are made, and every 32nd column while sums are. Rows pass through shared memory 32 columns at a time, 36 elements apart: the
/// eight lanes that take 16 bytes each at once begin at banks 0, 4 ... 28. (Doubles take twice the banks, and twice the time.)
template <class T>
class PlainTiles {
 public:
  using Element = T;
  using S = Accumulator<T>;
  static constexpr int widest = 256;
  static constexpr int warps = 4, threads = warps * warp_size;
  static constexpr int rows = 4, row_lanes = warp_size;
  static constexpr int own = rows * warps, step = warp_size;
  static constexpr int columns = 1, outputs = widest / warp_size;
  static constexpr bool available = true;

  struct Rows {
    MatrixView<const T> x;
    int first;
  };
  struct Scores {
    S value[rows];
    __device__ S& at(int r, int) { return value[r]; }
  };
  struct Sums {
    S value[rows][outputs];
    __device__ S& at(int r, int c) { return value[r][c]; }
  };

  __device__ PlainTiles(SharedMemory& memory, int head_dim, bool)
      : own_(memory.take<S>(own * stride)),
        other_(memory.take<S>(step * stride)),
        weights_(memory.take<Four>(warps * step)),
        head_dim_(head_dim) {}

  static constexpr int shared_bytes(int, int) {
    return static_cast<int>(sizeof(S)) * ((own + step) * stride + rows * warps * step);
  }

  __device__ static int row(int r) { return warp() * rows + r; }
  __device__ static int column(int) { return lane(); }
  __device__ static int output(int c) { return c * warp_size + lane(); }

  // Rows are read when they are used: nothing to begin, nothing to wait for.
  __device__ Rows take_own(SharedMemory&) const { return {}; }
  __device__ Rows take_other(SharedMemory&) const { return {}; }
  __device__ void begin_own(Rows& tile, const MatrixView<const T>& x, int first) const { tile = {x, first}; }
  __device__ void begin(Rows& tile, const MatrixView<const T>& x, int first) const { tile = {x, first}; }
  template <int pending>
  __device__ void arrived() const {}
  __device__ void done() const {}
  __device__ Rows keep(const Rows& mine) const { return mine; }

  __device__ Scores scores(const Rows& mine, const Rows& theirs) const {
    Scores s{};
    for (int begin = 0; begin < head_dim_; begin += chunk) {
      sync_block();
      fill<own>(own_, mine, begin);
      fill<step>(other_, theirs, begin);
      sync_block();
#pragma unroll 1
      for (int k = 0; k < chunk; k += 4) {
        const Four b = other_.template from<Four>(lane() * stride + k).load(0);
#pragma unroll
        for (int r = 0; r < rows; ++r) {
          const Four a = own_.template from<Four>(row(r) * stride + k).load(0);
#pragma unroll
          for (int i = 0; i < 4; ++i) s.value[r] += a.value[i] * b.value[i];
        }
      }
    }
    return s;
  }

  __device__ void accumulate(Sums& sums, const Scores& s, const Rows& theirs) const {
    Four mine;
#pragma unroll
    for (int r = 0; r < rows; ++r) mine.value[r] = s.value[r];
    weights_.store(thread(), mine);
#pragma unroll
    for (int c = 0; c < outputs; ++c)
      if (c * chunk < head_dim_) {
        sync_block();
        fill<step>(other_, theirs, c * chunk);
        sync_block();
#pragma unroll 2
        for (int j = 0; j < step; ++j) {
          const Four weight = weights_.load(warp() * step + j);
          const S x = other_.load(j * stride + lane());
#pragma unroll
          for (int r = 0; r < rows; ++r) sums.value[r][c] += weight.value[r] * x;
        }
      }
  }

  template <class U>
  __device__ void write(U* y, int r, Sums& sums, S factor) const {
#pragma unroll
    for (int c = 0; c < outputs; ++c)
      if (output(c) < head_dim_) store(y + output(c), narrow<U>(sums.value[r][c] * factor));
  }

 private:
  static constexpr int chunk = 32, stride = chunk + 4;
  struct alignas(16) Four {
    S value[4];
  };
  static_assert(rows == 4 && chunk == warp_size);

  template <int count>
  __device__ void fill(const Shared<S>& tile, const Rows& source, int begin) const {
    const int c = begin + lane();
    const int there = c < head_dim_ ? static_cast<int>(source.x.rows) - source.first : 0;
#pragma unroll 2
    for (int r = warp(); r < count; r += warps)
      tile.store(r * stride + lane(), r < there ? read(source.x, source.first + r, c) : S{});
  }

  Shared<S> own_, other_;
  Shared<Four> weights_;
  int head_dim_;
};

/// By mma.sync.m16n8k16, for heads of up to `width` columns. A warp has 16 own rows; beyond 128 columns two warps share them, make the
/// same scores, and halve the sums, whose registers are the ones that run out. Rows lie whole in shared memory, copied asynchronously.
///
/// A row is a multiple of 128 bytes, so that equal columns of all rows meet in the same banks; its 16-byte parts are therefore permuted:
/// part p of row r stands at p ^ (r % 8). The eight rows of an 8x8 matrix, which ldmatrix reads at once, then lie in eight different
/// groups of four banks, and so do the eight parts of a row that eight lanes copy.
template <class T, int width, int row_warps, int step_>
class TensorTiles {
 public:
  using Element = T;
  using S = float;
  static constexpr int halves = width > 128 ? 2 : 1;
  static constexpr int threads = row_warps * halves * warp_size;
  static constexpr int rows = 2, row_lanes = 4;
  static constexpr int own = 16 * row_warps, step = step_;
  static constexpr int columns = step / 4, outputs = width / halves / 4;
  static constexpr bool available = multiplies<T>;
  static_assert(width % 64 == 0 && step % 16 == 0);

  struct Rows {
    Shared<T> tile;
  };
  template <int n>
  struct Fragments {
    float tile[n / 8][4];  // d of multiply_add, for each 8 columns
    __device__ float& at(int r, int c) { return tile[c / 2][2 * r + c % 2]; }
  };
  using Scores = Fragments<step>;
  using Sums = Fragments<width / halves>;
  /// Own rows as operands in registers, where there is room.
  struct Kept {
    Words<4> part[width / 16];
  };

  __device__ TensorTiles(SharedMemory&, int head_dim, bool aligned) : head_dim_(head_dim), aligned_(aligned) {}

  /// For so many tiles of own rows, and of others.
  static constexpr int shared_bytes(int owns, int others) {
    return (owns * own + others * step) * width * static_cast<int>(sizeof(T));
  }

  __device__ static int row(int r) { return warp() / halves * 16 + lane() / 4 + 8 * r; }
  __device__ static int column(int c) { return c / 2 * 8 + lane() % 4 * 2 + c % 2; }
  __device__ static int output(int c) { return first_output() + column(c); }

  __device__ Rows take_own(SharedMemory& memory) const { return {memory.take<T>(own * width)}; }
  __device__ Rows take_other(SharedMemory& memory) const { return {memory.take<T>(step * width)}; }

  /// Begins to copy a tile's rows, the first of which is x's row `first`: one group of copies, empty behind the end of x.
  __device__ void begin(const Rows& tile, const MatrixView<const T>& x, int first) const { copy_rows<step>(tile, x, first); }
  __device__ void begin_own(const Rows& tile, const MatrixView<const T>& x, int first) const { copy_rows<own>(tile, x, first); }
  /// Waits until all but the newest `pending` groups are there for every thread.
  template <int pending>
  __device__ void arrived() const {
    wait_copies<pending>();
    sync_block();
  }
  /// Every thread is done with a tile that is to be copied over.
  __device__ void done() const { sync_block(); }

  __device__ auto keep(const Rows& mine) const {
    if constexpr (width > 128) {
      return mine;
    } else {
      Kept kept;
#pragma unroll
      for (int k = 0; k < width / 16; ++k) kept.part[k] = operand(mine, k);
      return kept;
    }
  }

  template <class Mine>
  __device__ Scores scores(const Mine& mine, const Rows& theirs) const {
    [[maybe_unused]] constexpr int at_once = std::is_same_v<Mine, Rows> ? 4 : width / 16;
    Scores s{};
#pragma unroll at_once
    for (int k = 0; k < width / 16; ++k) {
      const Words<4> a = operand(mine, k);
#pragma unroll
      for (int n = 0; n < step / 16; ++n) {
        // Matrices 0, 1: rows 0 ... 7, columns 0 ... 7 and 8 ... 15; matrices 2, 3: rows 8 ... 15.
        const int j = 16 * n + lane() / 16 * 8 + lane() % 8;
        const auto b = load_matrices<4>(part(theirs, j, 2 * k + lane() / 8 % 2));
        multiply_add<T>(s.tile[2 * n], a, Words<2>{b.word[0], b.word[1]});
        multiply_add<T>(s.tile[2 * n + 1], a, Words<2>{b.word[2], b.word[3]});
      }
    }
    return s;
  }

  /// The scores are rounded to T.
  __device__ void accumulate(Sums& sums, const Scores& s, const Rows& theirs) const {
#pragma unroll
    for (int k = 0; k < step / 16; ++k) {
      // What a lane has of d is what it needs of a: two 8-column results side by side are one operand of 16.
      const auto &left = s.tile[2 * k], &right = s.tile[2 * k + 1];
      const Words<4> a{pack<T>(left[0], left[1]), pack<T>(left[2], left[3]), pack<T>(right[0], right[1]), pack<T>(right[2], right[3])};
#pragma unroll
      for (int n = 0; n < width / halves / 16; ++n) {
        // Matrices 0, 1: columns 0 ... 7 of rows 0 ... 7 and 8 ... 15; matrices 2, 3: columns 8 ... 15. Transposed on the way.
        const int j = 16 * k + lane() % 16;
        const auto b = load_matrices<4, true>(part(theirs, j, first_output() / 8 + 2 * n + lane() / 16));
        multiply_add<T>(sums.tile[2 * n], a, Words<2>{b.word[0], b.word[1]});
        multiply_add<T>(sums.tile[2 * n + 1], a, Words<2>{b.word[2], b.word[3]});
      }
    }
  }

  template <class U>
  __device__ void write(U* y, int r, Sums& sums, float factor) const {
#pragma unroll
    for (int c = 0; c < outputs; c += 2) {
      const int j = output(c);
      const float first = sums.at(r, c) * factor, second = sums.at(r, c + 1) * factor;
      if (std::is_same_v<T, U> && aligned_) {
        if (j < head_dim_) store(reinterpret_cast<std::uint32_t*>(y + j), pack<T>(first, second));
      } else {
        if (j < head_dim_) store(y + j, narrow<U>(first));
        if (j + 1 < head_dim_) store(y + j + 1, narrow<U>(second));
      }
    }
  }

 private:
  __device__ static int first_output() { return warp() % halves * (width / halves); }
  __device__ static Shared<T> part(const Rows& of, int r, int p) { return of.tile.from(r * width + ((p ^ (r % 8)) * 8)); }

  /// Columns 16 k ... of the warp's own rows. Matrices 0, 1: columns 0 ... 7 of rows 0 ... 7 and 8 ... 15; matrices 2, 3: columns 8 ... 15.
  __device__ static Words<4> operand(const Rows& mine, int k) {
    return load_matrices<4>(part(mine, warp() / halves * 16 + lane() % 16, 2 * k + lane() / 16));
  }
  __device__ static Words<4> operand(const Kept& kept, int k) { return kept.part[k]; }

  template <int count>
  __device__ void copy_rows(const Rows& tile, const MatrixView<const T>& x, int first) const {
    constexpr int parts = width / 8;
    if (const int there = static_cast<int>(x.rows) - first; there > 0) {
      const T* const begin = x.row(first);
      for (int i = thread(); i < count * parts; i += threads) {
        const int r = i / parts, c = i % parts * 8;
        const auto to = part(tile, r, i % parts);
        const T* const from = begin + r * x.stride + c;
        if (aligned_) {
          const bool all = r < there && c < head_dim_;
          copy_async<16>(to, all ? from : begin, all ? 16 : 0);
        } else {
          for (int e = 0; e < 8; ++e) to.store(e, r < there && c + e < head_dim_ ? load(from + e) : T{});
        }
      }
    }
    commit_copies();
  }

  int head_dim_;
  bool aligned_;
};

template <class V>
__device__ inline void exchange(V& a, V& b) {
  const V kept = a;
  a = b;
  b = kept;
}

/// The tiles of heads of up to `width` columns: on tensor cores, or, for width 0, without. Heads of 16-bit elements alone have both.
template <class T, int width, int row_warps, int step>
struct ChooseTiles {
  using Type = TensorTiles<T, width, row_warps, step>;
};
template <class T, int row_warps, int step>
struct ChooseTiles<T, 0, row_warps, step> {
  using Type = PlainTiles<T>;
};
template <class T, int width, int row_warps, int step>
using AttentionTiles = typename ChooseTiles<T, width, row_warps, step>::Type;

}  // namespace qdylora::device
