// Normalization, rotary embedding and activations on the device. Values are computed in Accumulator<T> and rounded once.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <string>

#include <qdylora/cuda/elementwise.cuh>
#include <qdylora/cuda/lists.cuh>
#include <qdylora/cuda/reduce.cuh>

namespace qdylora {
namespace device {

/// One block, one token.
template <class T, bool whole>
struct RmsNorm {
  using S = Accumulator<T>;
  static constexpr int threads = 256;
  static constexpr int shared_bytes = threads / warp_size * static_cast<int>(sizeof(S));
  using Piece = RowPiece<S, whole>;

  MatrixView<const T> x;
  MatrixView<const S> weight;
  S epsilon;
  MatrixView<T> y;
  MatrixView<S> inverse;

  __device__ void operator()(SharedMemory memory) const {
    const Index i = block().x;
    S squares{};
    for_each_piece<threads, Piece>(x.cols, [&](const Piece& piece) {
      const auto of_x = piece.read(x, i);
      piece.for_each([&](int k) { squares += of_x.at[k] * of_x.at[k]; });
    });
    squares = sum_block<threads>(memory.take<S>(threads / warp_size), squares);
    const S r = S{1} / std::sqrt(squares / static_cast<S>(x.cols) + epsilon);
    for_each_piece<threads, Piece>(x.cols, [&](const Piece& piece) {
      const auto of_weight = piece.read(weight, 0);
      auto value = piece.read(x, i);
      piece.for_each([&](int k) { value.at[k] = value.at[k] * r * of_weight.at[k]; });
      piece.write(value, y, i);
    });
    if (thread() == 0) write(inverse, i, 0, r);
  }
};

template <class T, bool whole>
struct RmsNormBackward {
  using S = Accumulator<T>;
  static constexpr int threads = 256;
  static constexpr int shared_bytes = threads / warp_size * static_cast<int>(sizeof(S));
  using Piece = RowPiece<S, whole>;

  MatrixView<const T> dy, x;
  MatrixView<const S> weight, inverse;
  MatrixView<T> dx;
  Update update;

  __device__ void operator()(SharedMemory memory) const {
    const Index i = block().x;
    S dot{};
    for_each_piece<threads, Piece>(x.cols, [&](const Piece& piece) {
      const auto of_dy = piece.read(dy, i), of_x = piece.read(x, i);
      const auto of_weight = piece.read(weight, 0);
      piece.for_each([&](int k) { dot += of_dy.at[k] * of_weight.at[k] * of_x.at[k]; });
    });
    dot = sum_block<threads>(memory.take<S>(threads / warp_size), dot);
    const S r = device::read(inverse, i, 0);
    const S mean = dot / static_cast<S>(x.cols) * r * r;
    for_each_piece<threads, Piece>(x.cols, [&](const Piece& piece) {
      const auto of_dy = piece.read(dy, i), of_x = piece.read(x, i);
      const auto of_weight = piece.read(weight, 0);
      typename Piece::template Of<T> value = {};
      if (update == Update::accumulate) value = piece.read(dx, i);
      piece.for_each([&](int k) { value.at[k] += r * (of_dy.at[k] * of_weight.at[k] - of_x.at[k] * mean); });
      piece.write(value, dx, i);
    });
  }
};

/// Column j of the loop is pair j of a token, over all heads. `width` neighbours are pairs of one head.
template <class T>
struct Rope {
  using S = Accumulator<T>;
  MatrixView<T> x;
  List<std::int32_t> positions;
  MatrixView<const S> table;
  RopeLayout layout;
  S direction;

  template <int width>
  __device__ void neighbours(Index t, Index j) const {
    const auto half = static_cast<unsigned>(table.cols / 2), at = static_cast<unsigned>(j);  // 64-bit division is a call
    const Index pair = at % half, head = at / half * table.cols;
    const bool interleaved = layout == RopeLayout::interleaved;
    T* const first = x.row(t) + head + (interleaved ? 2 * pair : pair);
    T* const second = first + (interleaved ? Index{width} : Index{half});
    const S* const angles = table.row(positions[t]) + 2 * pair;
    using Pieces = Neighbours<width, T>;
    auto a = Pieces::load_from(first), b = Pieces::load_from(second);
    const auto element = [&](int k) -> S& { return k < width ? a.at[k] : b.at[k - width]; };
    if (interleaved) rotate<width, 2, 1>(angles, element);
    else rotate<width, 1, width>(angles, element);
    a.store_to(first);
    b.store_to(second);
  }

 private:
  /// Pair k is element(step * k) and the one `apart` further.
  template <int width, int step, int apart, class F>
  __device__ void rotate(const S* angles, const F& element) const {
    using Angle = Neighbours<2, S>;  // cosine and sine
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const S* const at = angles + 2 * k;
      const auto angle = width > 1 ? Angle::load_from(at) : Angle{load(at), load(at + 1)};
      S &p = element(step * k), &q = element(step * k + apart);
      const S c = angle.at[0], s = direction * angle.at[1], a = p, b = q;
      p = a * c - b * s;
      q = a * s + b * c;
    }
  }
};

template <class S>
__device__ inline S sigmoid(S x) {
  return S{1} / (S{1} + std::exp(-x));
}
template <class S>
__device__ inline S normal_cdf(S x) {
  return S{0.5} * std::erfc(-x * static_cast<S>(0.70710678118654752440));
}

template <class T>
struct Swiglu {
  MatrixView<const T> gate, up;
  MatrixView<T> y;
  template <int width>
  __device__ void neighbours(Index i, Index j) const {
    auto g = read_neighbours<width>(gate, i, j);
    const auto u = read_neighbours<width>(up, i, j);
#pragma unroll
    for (int k = 0; k < width; ++k) g.at[k] = g.at[k] * sigmoid(g.at[k]) * u.at[k];
    g.store_to(y.row(i) + j);
  }
};

template <class T>
struct SwigluBackward {
  MatrixView<const T> dy, gate, up;
  MatrixView<T> dgate, dup;
  template <int width>
  __device__ void neighbours(Index i, Index j) const {
    using S = Accumulator<T>;
    const auto d = read_neighbours<width>(dy, i, j);
    auto g = read_neighbours<width>(gate, i, j), u = read_neighbours<width>(up, i, j);  // all before dgate and dup, which may be their memory
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const S s = sigmoid(g.at[k]), silu = g.at[k] * s;
      g.at[k] = d.at[k] * u.at[k] * (s + silu * (S{1} - s));
      u.at[k] = d.at[k] * silu;
    }
    g.store_to(dgate.row(i) + j);
    u.store_to(dup.row(i) + j);
  }
};

template <class T>
struct Gelu {
  MatrixView<const T> x;
  MatrixView<T> y;
  template <int width>
  __device__ void neighbours(Index i, Index j) const {
    auto v = read_neighbours<width>(x, i, j);
#pragma unroll
    for (int k = 0; k < width; ++k) v.at[k] = v.at[k] * normal_cdf(v.at[k]);
    v.store_to(y.row(i) + j);
  }
};

template <class T>
struct GeluBackward {
  MatrixView<const T> dy, x;
  MatrixView<T> dx;
  template <int width>
  __device__ void neighbours(Index i, Index j) const {
    using S = Accumulator<T>;
    const auto d = read_neighbours<width>(dy, i, j);
    auto v = read_neighbours<width>(x, i, j);
#pragma unroll
    for (int k = 0; k < width; ++k) {
      const S density = static_cast<S>(0.39894228040143267794) * std::exp(S{-0.5} * v.at[k] * v.at[k]);
      v.at[k] = d.at[k] * (normal_cdf(v.at[k]) + v.at[k] * density);
    }
    v.store_to(dx.row(i) + j);
  }
};

}  // namespace device

#if !defined(QDYLORA_DEVICE_ONLY)
namespace detail {

template <class T, class S>
void rms_norm(const CudaContext& context, MatrixView<const T> x, MatrixView<const S> weight, float epsilon, MatrixView<T> y,
              MatrixView<S> inverse) {
  expect_shape("rms_norm: weight", weight, 1, x.cols);
  expect_shape("rms_norm: y", y, x.rows, x.cols);
  expect_shape("rms_norm: inverse rms", inverse, x.rows, 1);
  by_whole_pieces<S>(x.cols, [&]<bool whole>(std::bool_constant<whole>) {
    using Kernel = device::RmsNorm<T, whole>;
    device::launch({context.stream(), static_cast<unsigned>(x.rows), Kernel::shared_bytes},
                   Kernel{x, weight, static_cast<S>(epsilon), y, inverse});
  }, x, weight, y);
}

template <class T, class S>
void rms_norm_backward(const CudaContext& context, MatrixView<const T> dy, MatrixView<const T> x, MatrixView<const S> weight,
                       MatrixView<const S> inverse, MatrixView<T> dx, Update update) {
  expect_shape("rms_norm_backward: x", x, dy.rows, dy.cols);
  expect_shape("rms_norm_backward: weight", weight, 1, x.cols);
  expect_shape("rms_norm_backward: inverse rms", inverse, x.rows, 1);
  expect_shape("rms_norm_backward: dx", dx, x.rows, x.cols);
  by_whole_pieces<S>(x.cols, [&]<bool whole>(std::bool_constant<whole>) {
    using Kernel = device::RmsNormBackward<T, whole>;
    device::launch({context.stream(), static_cast<unsigned>(x.rows), Kernel::shared_bytes}, Kernel{dy, x, weight, inverse, dx, update});
  }, dy, x, weight, dx);
}

template <class T, class S>
void rope(const CudaContext& context, MatrixView<T> x, std::span<const std::int32_t> positions, MatrixView<const S> table,
          RopeLayout layout, int direction) {
  expect_rope(x, positions, table);
  Scratch scratch(context);
  const device::Rope<T> rotate{x, listed(context, scratch, positions), table, layout, direction >= 0 ? S{1} : S{-1}};
  constexpr int width = 16 / sizeof(T);
  const bool whole = are_whole<width>(table.cols / 2, x) && has_aligned_rows<2>(table);
  for_each_width_on<width>(context.stream(), context, x.rows, x.cols / 2, whole, rotate);
}

template <class T>
void swiglu(const CudaContext& context, MatrixView<const T> gate, MatrixView<const T> up, MatrixView<T> y) {
  expect_shape("swiglu: up", up, gate.rows, gate.cols);
  expect_shape("swiglu: y", y, gate.rows, gate.cols);
  for_each_neighbours(context, y.rows, y.cols, device::Swiglu<T>{gate, up, y}, gate, up, y);
}

template <class T>
void swiglu_backward(const CudaContext& context, MatrixView<const T> dy, MatrixView<const T> gate, MatrixView<const T> up,
                     MatrixView<T> dgate, MatrixView<T> dup) {
  expect_shape("swiglu_backward: gate", gate, dy.rows, dy.cols);
  expect_shape("swiglu_backward: up", up, dy.rows, dy.cols);
  expect_shape("swiglu_backward: dgate", dgate, dy.rows, dy.cols);
  expect_shape("swiglu_backward: dup", dup, dy.rows, dy.cols);
  for_each_neighbours(context, dy.rows, dy.cols, device::SwigluBackward<T>{dy, gate, up, dgate, dup}, dy, gate, up, dgate, dup);
}

template <class T>
void gelu(const CudaContext& context, MatrixView<const T> x, MatrixView<T> y) {
  expect_shape("gelu: y", y, x.rows, x.cols);
  for_each_neighbours(context, x.rows, x.cols, device::Gelu<T>{x, y}, x, y);
}

template <class T>
void gelu_backward(const CudaContext& context, MatrixView<const T> dy, MatrixView<const T> x, MatrixView<T> dx) {
  expect_shape("gelu_backward: x", x, dy.rows, dy.cols);
  expect_shape("gelu_backward: dx", dx, dy.rows, dy.cols);
  for_each_neighbours(context, x.rows, x.cols, device::GeluBackward<T>{dy, x, dx}, dy, x, dx);
}

}  // namespace detail
#endif
}  // namespace qdylora
