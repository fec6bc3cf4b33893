// Softmax cross-entropy on the device.
#pragma once

#include <cmath>
#include <cstdint>
#include <limits>
#include <span>

#include <qdylora/backend_checks.hpp>
#include <qdylora/cuda/for_each.cuh>
#include <qdylora/cuda/lists.cuh>

namespace qdylora {
namespace device {

/// sum_j e^(x_j - largest) of the x_j that were added, largest = max_j x_j, in one pass (Milakov & Gimelshein 2018).
template <class S>
struct ExpSum {
  S largest = std::numeric_limits<S>::lowest();
  S sum{};

  __device__ void add(S x) {
    if (x > largest) {
      sum = sum * std::exp(largest - x) + S{1};
      largest = x;
    } else {
      sum += std::exp(x - largest);
    }
  }
  __device__ void add(const ExpSum& other) {
    const S joint = other.largest > largest ? other.largest : largest;
    sum = sum * std::exp(largest - joint) + other.sum * std::exp(other.largest - joint);
    largest = joint;
  }
};

/// One block, one row: it is read once for its sum, and again, from the L2 cache where that holds it, for its gradient.
template <class S>
struct CrossEntropy {
  static constexpr int threads = 512;
  static constexpr int warps = threads / warp_size;
  static constexpr int shared_bytes = warps * static_cast<int>(sizeof(ExpSum<S>));

  MatrixView<S> logits;
  List<std::int32_t> targets;
  S scale;
  MatrixView<S> losses;

  __device__ void operator()(SharedMemory memory) const {
    const auto sums = memory.take<ExpSum<S>>(warps);
    const Index i = block().x;
    const Index target = targets[i];
    S* const row = logits.row(i);
    if (target < 0) {
      for (Index j = thread(); j < logits.cols; j += threads) store(row + j, S{});
      if (thread() == 0) store(losses.row(i), S{});
      return;
    }
    ExpSum<S> sum;
    for (Index j = thread(); j < logits.cols; j += threads) sum.add(load(row + j));
    for (int bits = warp_size / 2; bits > 0; bits /= 2)
      sum.add(ExpSum<S>{shuffle_xor(sum.largest, bits), shuffle_xor(sum.sum, bits)});
    if (lane() == 0) sums.store(warp(), sum);
    const S chosen = load(row + target);
    sync_block();  // from here on the row is written
    sum = sums.load(0);
    for (int w = 1; w < warps; ++w) sum.add(sums.load(w));  // the same bits in every thread
    const S factor = scale / sum.sum;
    for (Index j = thread(); j < logits.cols; j += threads)
      store(row + j, std::exp(load(row + j) - sum.largest) * factor - (j == target ? scale : S{}));
    if (thread() == 0) store(losses.row(i), sum.largest - chosen + std::log(sum.sum));
  }
};

}  // namespace device

#if !defined(QDYLORA_DEVICE_ONLY)
namespace detail {

/// losses[i] = log sum_j e^z[i, j] - z[i, target_i];  z[i, j] becomes scale * (e^z[i, j] / sum_k e^z[i, k] - [j == target_i]).
/// A row with target -1 has loss 0 and gradient 0.
template <class S>
void cross_entropy(const CudaContext& context, MatrixView<S> logits, std::span<const std::int32_t> targets, double scale,
                   MatrixView<S> losses) {
  using Kernel = device::CrossEntropy<S>;
  expect_cross_entropy(logits, targets, losses);
  Scratch scratch(context);
  const auto list = listed(context, scratch, targets);
  device::launch({context.stream(), static_cast<unsigned>(logits.rows), Kernel::shared_bytes},
                 Kernel{logits, list, static_cast<S>(scale), losses});
}

}  // namespace detail
#endif
}  // namespace qdylora
