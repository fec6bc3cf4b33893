// The products of a quantized linear layer, and the layer with its adapter. `error` is the normalized squared error of some output rows
// against double arithmetic on the same decoded weights.
#include "common.hpp"

#include <qdylora/cpu/reference.hpp>

namespace {

using namespace qdylora;

// Two tokens are compared; the oracle is slow.
double error_of(const NF4Tensor& w, MatrixView<const float> x, MatrixView<const float> y, bool transposed) {
  const Index rows = std::min<Index>(x.rows, 2);
  Matrix<double> expected(rows, y.cols);
  if (transposed) reference::matmul_transposed(x.top_rows(rows), w.view(), expected.view(), Update::overwrite);
  else reference::matmul(x.top_rows(rows), w.view(), expected.view(), Update::overwrite);
  return bench::normalized_error({y.data, static_cast<std::size_t>(rows * y.cols)}, expected.span());
}

template <bool Backward>
void product(benchmark::State& state) {
  const Index out = state.range(0), in = state.range(1), tokens = state.range(2);
  const Cpu cpu(static_cast<int>(state.range(3)));
  bench::WeightCycle weights(out, in, cpu);
  const auto x = bench::normal_matrix(tokens, Backward ? out : in, 1.0f, 2);
  Matrix<float> y(tokens, Backward ? in : out);
  const auto run = [&](const NF4Tensor& w) {
    if constexpr (Backward) cpu.matmul_transposed(x.view(), w.view(), y.view());
    else cpu.matmul(x.view(), w.view(), y.view());
  };
  for (auto _ : state) {
    run(weights.next());
    benchmark::ClobberMemory();
  }
  run(weights.front());
  state.counters["error"] = error_of(weights.front(), x.view(), std::as_const(y).view(), Backward);
  state.counters["GFLOP/s"] =
      benchmark::Counter(2e-9 * static_cast<double>(tokens * out * in * state.iterations()), benchmark::Counter::kIsRate);
}

// Forward and backward of a layer with an adapter of rank `rank`, inputs' gradient included.
void layer(benchmark::State& state) {
  const Index out = state.range(0), in = state.range(1), tokens = state.range(2), rank = state.range(4);
  const Cpu cpu(static_cast<int>(state.range(3)));
  const auto weight = bench::normal_matrix(out, in, 0.02f, 1);
  DynamicLoRALinear<float> linear(weight, {.max_rank = 64, .alpha = 64}, {}, cpu);
  Rng rng(3);
  for (float& b : linear.adapter().b().value.span()) b = 0.01f * rng.normal();
  linear.set_rank(rank);
  const auto x = bench::normal_matrix(tokens, in, 1.0f, 2), dy = bench::normal_matrix(tokens, out, 1.0f, 4);
  for (auto _ : state) {
    linear.forward(x);
    benchmark::DoNotOptimize(linear.backward(dy.view()).data);
  }
  state.counters["tokens/s"] = benchmark::Counter(static_cast<double>(tokens * state.iterations()), benchmark::Counter::kIsRate);
}

void products(benchmark::internal::Benchmark* b) {
  b->ArgNames({"out", "in", "tokens", "threads"})->UseRealTime()->Unit(benchmark::kMicrosecond);
  for (const auto& s : bench::shapes)
    for (const Index tokens : {1, 4, 16, 64, 256, 512})
      for (const Index threads : {1, 2}) b->Args({s[0], s[1], tokens, threads});
}
void layers(benchmark::internal::Benchmark* b) {
  b->ArgNames({"out", "in", "tokens", "threads", "rank"})->UseRealTime()->Unit(benchmark::kMicrosecond);
  for (const auto& s : {bench::shapes[0], bench::shapes[4]})
    for (const Index rank : {0, 1, 8, 64})
      for (const Index threads : {1, 2}) b->Args({s[0], s[1], 256, threads, rank});
}

BENCHMARK(product<false>)->Name("forward")->Apply(products);
BENCHMARK(product<true>)->Name("backward")->Apply(products);
BENCHMARK(layer)->Apply(layers);

}  // namespace

BENCHMARK_MAIN();
