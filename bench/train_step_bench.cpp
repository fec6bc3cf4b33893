// A whole training step of a model of SmolLM2-135M's shape with random weights, its embedding in the 8 bits of its GGUF file: forward,
// backward, clipping and AdamW, adapters of rank 64 on all linear layers, one sequence (of 256 tokens beside the peers), in float32 or with 16-bit products. peers/train_step.py is the same step in PyTorch,
// PEFT and bitsandbytes.
#include "common.hpp"

#include <cstdio>
#include <fstream>
#include <string>

#include <qdylora/model/base_weight.hpp>
#include <qdylora/model/decoder.hpp>
#include <qdylora/optim/adamw.hpp>

namespace {

using namespace qdylora;

double peak_memory_mib() {
  std::ifstream status("/proc/self/status");
  for (std::string line; std::getline(status, line);)
    if (line.starts_with("VmHWM:")) return std::stod(line.substr(6)) / 1024.0;
  return 0.0;
}

std::shared_ptr<const DecoderWeights<float>> random_weights(const Cpu& cpu) {
  auto weights = std::make_shared<DecoderWeights<float>>();
  auto& c = weights->config;
  c = {.vocab = 49152, .width = 576, .mlp_width = 1536, .layers = 30, .heads = {9, 3, 64}, .context = 2048};
  Rng rng(1);
  const auto ones = [&] {
    Matrix<float> m(1, c.width);
    for (float& x : m.span()) x = 1.0f;
    return m;
  };
  weights->embedding = quantize<INT8, Float32Scales>(bench::normal_matrix(c.vocab, c.width, 0.02f, 2).view(), {.block_size = 32});
  weights->final_norm = ones();
  const auto shapes = c.linears();
  for (Index i = 0; i < c.layers; ++i) {
    auto block = std::make_shared<BlockWeights<float>>(c);
    block->attention_norm = ones();
    block->mlp_norm = ones();
    for (std::size_t p = 0; p < shapes.size(); ++p)
      block->linear[p] = make_base_weight(
          shapes[p].out, shapes[p].in, {},
          [&](Index, MatrixView<float> out) {
            for (Index r = 0; r < out.rows; ++r)
              for (Index j = 0; j < out.cols; ++j) out(r, j) = 0.02f * rng.normal();
          },
          cpu);
    weights->blocks.push_back(std::move(block));
  }
  return weights;
}

void train_step(benchmark::State& state) {
  const Cpu cpu = Cpu(static_cast<int>(state.range(0))).with_compute(state.range(2) != 0 ? Compute::bits16 : Compute::exact);
  static const auto weights = random_weights(Cpu{});
  Decoder<float> model(weights, {.lora = {.max_rank = 64, .alpha = 16}, .checkpoint = state.range(1) != 0}, cpu);
  AdamW<float> optimizer(model.parameters(), {.lr = 1e-4, .max_gradient_norm = 0.3}, cpu);
  Rng rng(3);
  const auto tokens = state.range(3);
  std::vector<std::int32_t> ids(static_cast<std::size_t>(tokens + 1));
  for (auto& id : ids) id = static_cast<std::int32_t>(rng.below(49152));
  Batch batch;
  batch.add(ids);
  const auto step = [&] {
    optimizer.zero_grad();
    benchmark::DoNotOptimize(model.loss_and_gradient(batch, 1.0 / static_cast<double>(tokens)));
    optimizer.step();
  };
  step();
  for (auto _ : state) step();
  state.counters["tokens/s"] = benchmark::Counter(static_cast<double>(tokens * state.iterations()), benchmark::Counter::kIsRate);
  state.counters["peak MiB"] = peak_memory_mib();
}

// Fewest bytes first: the peak is the process's, and only grows.
BENCHMARK(train_step)
    ->ArgNames({"threads", "checkpoint", "bits16", "tokens"})
    ->Args({2, 1, 0, 256})
    ->Args({2, 1, 1, 256})
    ->Args({2, 0, 0, 256})
    ->Args({2, 0, 1, 256})
    ->Args({1, 0, 0, 256})
    ->Args({1, 0, 1, 256})
    ->Args({2, 0, 0, 64})  // time against tokens
    ->Args({2, 0, 0, 128})
    ->Args({2, 0, 0, 512})
    ->Args({2, 0, 0, 1024})
    ->Args({2, 0, 0, 2048})
    ->Iterations(3)
    ->Repetitions(3)
    ->UseRealTime()
    ->Unit(benchmark::kMillisecond);

}  // namespace

BENCHMARK_MAIN();
