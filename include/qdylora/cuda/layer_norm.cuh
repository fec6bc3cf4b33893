// Layer normalization on the device.
#pragma once

#include <cmath>

#include <qdylora/backend_checks.hpp>
#include <qdylora/cuda/reduce.cuh>

namespace qdylora {
namespace device {

/// One block, one token. The mean is taken first, so that a large one does not cancel in the variance.
template <class T, bool whole>
struct LayerNorm {
  using S = Accumulator<T>;
  static constexpr int threads = 256;
  static constexpr int shared_bytes = threads / warp_size * static_cast<int>(sizeof(S));
  using Piece = RowPiece<S, whole>;

  MatrixView<const T> x;
  MatrixView<const S> weight, bias;
  S epsilon;
  MatrixView<T> y;
  MatrixView<S> moments;

  __device__ void operator()(SharedMemory memory) const {
    const auto sums = memory.take<S>(threads / warp_size);
    const Index i = block().x;
    const S count = static_cast<S>(x.cols);
    S sum{}, squares{};
    for_each_piece<threads, Piece>(x.cols, [&](const Piece& piece) {
      const auto of_x = piece.read(x, i);
      piece.for_each([&](int k) { sum += of_x.at[k]; });
    });
    const S mean = sum_block<threads>(sums, sum) / count;
    for_each_piece<threads, Piece>(x.cols, [&](const Piece& piece) {
      const auto of_x = piece.read(x, i);
      piece.for_each([&](int k) { squares += (of_x.at[k] - mean) * (of_x.at[k] - mean); });
    });
    const S r = S{1} / std::sqrt(sum_block<threads>(sums, squares) / count + epsilon);
    for_each_piece<threads, Piece>(x.cols, [&](const Piece& piece) {
      const auto of_weight = piece.read(weight, 0), of_bias = piece.read(bias, 0);
      auto value = piece.read(x, i);
      piece.for_each([&](int k) { value.at[k] = (value.at[k] - mean) * r * of_weight.at[k] + of_bias.at[k]; });
      piece.write(value, y, i);
    });
    if (thread() == 0) {
      write(moments, i, 0, mean);
      write(moments, i, 1, r);
    }
  }
};

template <class T, bool whole>
struct LayerNormBackward {
  using S = Accumulator<T>;
  static constexpr int threads = 256;
  static constexpr int shared_bytes = threads / warp_size * static_cast<int>(sizeof(S));
  using Piece = RowPiece<S, whole>;

  MatrixView<const T> dy, x;
  MatrixView<const S> weight, moments;
  MatrixView<T> dx;
  Update update;

  __device__ void operator()(SharedMemory memory) const {
    const auto sums = memory.take<S>(threads / warp_size);
    const Index i = block().x;
    const S mean = read(moments, i, 0), r = read(moments, i, 1), count = static_cast<S>(x.cols);
    S sum{}, dot{};
    for_each_piece<threads, Piece>(x.cols, [&](const Piece& piece) {
      const auto of_dy = piece.read(dy, i), of_x = piece.read(x, i);
      const auto of_weight = piece.read(weight, 0);
      piece.for_each([&](int k) {
        const S d = of_dy.at[k] * of_weight.at[k];
        sum += d;
        dot += d * (of_x.at[k] - mean);
      });
    });
    const S mean_d = sum_block<threads>(sums, sum) / count;
    const S slope = sum_block<threads>(sums, dot) / count * r * r;
    for_each_piece<threads, Piece>(x.cols, [&](const Piece& piece) {
      const auto of_dy = piece.read(dy, i), of_x = piece.read(x, i);
      const auto of_weight = piece.read(weight, 0);
      typename Piece::template Of<T> value = {};
      if (update == Update::accumulate) value = piece.read(dx, i);
      piece.for_each([&](int k) { value.at[k] += r * (of_dy.at[k] * of_weight.at[k] - mean_d - (of_x.at[k] - mean) * slope); });
      piece.write(value, dx, i);
    });
  }
};

}  // namespace device

#if !defined(QDYLORA_DEVICE_ONLY)
namespace detail {

template <class T, class S>
void layer_norm(const CudaContext& context, MatrixView<const T> x, MatrixView<const S> weight, MatrixView<const S> bias, float epsilon,
                MatrixView<T> y, MatrixView<S> moments) {
  expect_layer_norm(x, weight, bias, y, moments);
  by_whole_pieces<S>(x.cols, [&]<bool whole>(std::bool_constant<whole>) {
    using Kernel = device::LayerNorm<T, whole>;
    device::launch({context.stream(), static_cast<unsigned>(x.rows), Kernel::shared_bytes},
                   Kernel{x, weight, bias, static_cast<S>(epsilon), y, moments});
  }, x, weight, bias, y);
}

template <class T, class S>
void layer_norm_backward(const CudaContext& context, MatrixView<const T> dy, MatrixView<const T> x, MatrixView<const S> weight,
                         MatrixView<const S> moments, MatrixView<T> dx, Update update) {
  expect_layer_norm_backward(dy, x, weight, moments, dx);
  by_whole_pieces<S>(x.cols, [&]<bool whole>(std::bool_constant<whole>) {
    using Kernel = device::LayerNormBackward<T, whole>;
    device::launch({context.stream(), static_cast<unsigned>(x.rows), Kernel::shared_bytes}, Kernel{dy, x, weight, moments, dx, update});
  }, dy, x, weight, dx);
}

}  // namespace detail
#endif
}  // namespace qdylora
