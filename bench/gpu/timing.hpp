// Timing on a device: what is timed is captured as a CUDA graph and replayed, competitors take turns, the median counts.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstdio>
#include <functional>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/cuda.hpp>

namespace bench {

/// Whether there is a device; says so if not. Whatever else goes wrong with one is an error.
inline bool device_there() {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error == cudaSuccess && count > 0) return true;
  std::fprintf(stderr, "no GPU: %s\n", error == cudaSuccess ? "the driver has none" : cudaGetErrorString(error));
  return false;
}

struct Competitor {
  std::string name;
  std::function<void()> run;  // queues `repetitions` of the operation, with as many different weights
};

class Stopwatch {
 public:
  explicit Stopwatch(const qdylora::CudaContext& context) : context_(&context) {
    QDYLORA_CUDA_TRY(cudaEventCreate(&begin_));
    QDYLORA_CUDA_TRY(cudaEventCreate(&end_));
  }
  ~Stopwatch() {
    cudaEventDestroy(begin_);
    cudaEventDestroy(end_);
  }
  Stopwatch(const Stopwatch&) = delete;
  Stopwatch& operator=(const Stopwatch&) = delete;

  /// Microseconds of what f queues.
  double measure(const std::function<void()>& f) const {
    QDYLORA_CUDA_TRY(cudaEventRecord(begin_, context_->stream()));
    f();
    QDYLORA_CUDA_TRY(cudaEventRecord(end_, context_->stream()));
    QDYLORA_CUDA_TRY(cudaEventSynchronize(end_));
    float milliseconds = 0.0f;
    QDYLORA_CUDA_TRY(cudaEventElapsedTime(&milliseconds, begin_, end_));
    return 1e3 * static_cast<double>(milliseconds);
  }

  struct Spread {
    double median, least, most;  // microseconds of one repetition; least and most are the quartiles
  };
  /// Each competitor's. They take turns: what a device's clocks do happens to all.
  std::vector<Spread> compare(const std::vector<Competitor>& competitors, int repetitions, int rounds) const {
    std::vector<qdylora::CudaGraph> recorded;
    std::vector<std::vector<double>> times(competitors.size());
    for (const auto& competitor : competitors) {
      competitor.run();
      context_->synchronize();
      recorded.emplace_back(*context_, competitor.run);
    }
    for (int round = 0; round < rounds + 1; ++round)  // the first warms up
      for (std::size_t i = 0; i < competitors.size(); ++i) {
        recorded[i].launch();  // the device is busy until the next is queued: how long the host takes to launch it is no part of its time
        const double time = measure([&] { recorded[i].launch(); });
        if (round > 0) times[i].push_back(time / repetitions);
      }
    std::vector<Spread> result;
    for (auto& all : times) {
      std::sort(all.begin(), all.end());
      result.push_back({all[all.size() / 2], all[all.size() / 4], all[all.size() * 3 / 4]});
    }
    return result;
  }

 private:
  const qdylora::CudaContext* context_;
  cudaEvent_t begin_ = nullptr, end_ = nullptr;
};

}  // namespace bench
