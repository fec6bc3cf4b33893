// Kernels of the benchmark's own: what adds bitsandbytes' offset to scales, reads memory as fast as it goes, and is exact.
#pragma once

#include <cstdint>

#include <qdylora/cuda.hpp>

namespace bench {

namespace qd = qdylora;
using qd::bfloat16, qd::Index, qd::MatrixView;

struct AddConstant {
  MatrixView<float> x;
  const float* constant;
  __device__ void operator()(Index i, Index j) const { qd::device::store(x.row(i) + j, qd::device::load(x.row(i) + j) + *constant); }
};

/// Reads `count` words of 16 bytes.
struct ReadWords {
  static constexpr int threads = 256;

  const qd::device::Words<4>* x;
  Index count;
  std::uint32_t* sum;

  __device__ void operator()(qd::device::SharedMemory) const {
    const Index first = static_cast<Index>(qd::device::block().x) * threads + qd::device::thread();
    std::uint32_t own = 0;
    for (Index i = first; i < count; i += static_cast<Index>(qd::device::grid().x) * threads) {
      const auto v = qd::device::load(x + i);
      own ^= v.word[0] ^ v.word[1] ^ v.word[2] ^ v.word[3];
    }
    if (own == 0x12345678u) qd::device::store(sum, own);  // never mind the value: the loads must happen
  }
};

/// exact[t, c] = sum_k x[t, k] w(n, k) in double, n = c * spread, w(n, k) = w[n * row_step + k * col_step]. A block makes one.
struct ExactProduct {
  static constexpr int threads = 256;
  static constexpr int shared_bytes = threads * static_cast<int>(sizeof(double));

  MatrixView<const bfloat16> x;
  const float* w;
  Index row_step, col_step, spread;
  MatrixView<double> exact;

  __device__ void operator()(qd::device::SharedMemory memory) const {
    const auto part = memory.take<double>(threads);
    const int own = qd::device::thread();
    const Index t = qd::device::block().y, c = qd::device::block().x;
    const float* const column = w + c * spread * row_step;
    double sum = 0.0;
    for (Index k = own; k < x.cols; k += threads)
      sum += static_cast<double>(qd::device::read(x, t, k)) * static_cast<double>(qd::device::load(column + k * col_step));
    part.store(own, sum);
    for (int half = threads / 2; half > 0; half /= 2) {
      qd::device::sync_block();
      if (own < half) part.store(own, part.load(own) + part.load(own + half));
    }
    if (own == 0) qd::device::store(exact.row(t) + c, part.load(0));
  }
};

}  // namespace bench
