// Layer normalization on the device.
#pragma once

#include <cmath>

#include <qdylora/backend.hpp>
#include <qdylora/cuda/reduce.cuh>

namespace qdylora {
namespace device {

/// One block, one token. The mean is taken first, so that a large one does not cancel in the variance.
template <class T>
struct LayerNorm {
  using S = Accumulator<T>;
  static constexpr int threads = 256;
  static constexpr int shared_bytes = threads / warp_size * static_cast<int>(sizeof(S));

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
    for (Index j = thread(); j < x.cols; j += threads) sum += read(x, i, j);
    const S mean = sum_block<threads>(sums, sum) / count;
    for (Index j = thread(); j < x.cols; j += threads) {
      const S centred = read(x, i, j) - mean;
      squares += centred * centred;
    }
    const S r = S{1} / std::sqrt(sum_block<threads>(sums, squares) / count + epsilon);
    for (Index j = thread(); j < x.cols; j += threads) write(y, i, j, (read(x, i, j) - mean) * r * read(weight, 0, j) + read(bias, 0, j));
    if (thread() == 0) {
      write(moments, i, 0, mean);
      write(moments, i, 1, r);
    }
  }
};

template <class T>
struct LayerNormBackward {
  using S = Accumulator<T>;
  static constexpr int threads = 256;
  static constexpr int shared_bytes = threads / warp_size * static_cast<int>(sizeof(S));

  MatrixView<const T> dy, x;
  MatrixView<const S> weight, moments;
  MatrixView<T> dx;
  Update update;

  __device__ void operator()(SharedMemory memory) const {
    const auto sums = memory.take<S>(threads / warp_size);
    const Index i = block().x;
    const S mean = read(moments, i, 0), r = read(moments, i, 1), count = static_cast<S>(x.cols);
    S sum{}, dot{};
    for (Index j = thread(); j < x.cols; j += threads) {
      const S d = read(dy, i, j) * read(weight, 0, j);
      sum += d;
      dot += d * (read(x, i, j) - mean);
    }
    const S mean_d = sum_block<threads>(sums, sum) / count;
    const S slope = sum_block<threads>(sums, dot) / count * r * r;
    for (Index j = thread(); j < x.cols; j += threads) {
      const S value = r * (read(dy, i, j) * read(weight, 0, j) - mean_d - (read(x, i, j) - mean) * slope);
      write(dx, i, j, update == Update::accumulate ? read(dx, i, j) + value : value);
    }
  }
};

}  // namespace device

#if !defined(QDYLORA_DEVICE_ONLY)
namespace detail {

template <class T, class S>
void layer_norm(const CudaContext& context, MatrixView<const T> x, MatrixView<const S> weight, MatrixView<const S> bias, float epsilon,
                MatrixView<T> y, MatrixView<S> moments) {
  using Kernel = device::LayerNorm<T>;
  expect_layer_norm(x, weight, bias, y, moments);
  device::launch({context.stream(), static_cast<unsigned>(x.rows), Kernel::shared_bytes},
                 Kernel{x, weight, bias, static_cast<S>(epsilon), y, moments});
}

template <class T, class S>
void layer_norm_backward(const CudaContext& context, MatrixView<const T> dy, MatrixView<const T> x, MatrixView<const S> weight,
                         MatrixView<const S> moments, MatrixView<T> dx, Update update) {
  using Kernel = device::LayerNormBackward<T>;
  expect_layer_norm_backward(dy, x, weight, moments, dx);
  device::launch({context.stream(), static_cast<unsigned>(x.rows), Kernel::shared_bytes}, Kernel{dy, x, weight, moments, dx, update});
}

}  // namespace detail
#endif
}  // namespace qdylora
