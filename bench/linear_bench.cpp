// The products of a quantized linear layer, of NF4 and of planes of signs, and the layer with its adapter. `error` is the normalized squared
// error of some output rows against double arithmetic on the same decoded weights.
#include "common.hpp"

#include <qdylora/cpu/reference.hpp>

namespace {

using namespace qdylora;

NF4Tensor nf4(Index out, Index in, const Cpu& cpu) { return cpu.quantize<NF4>(bench::normal_matrix(out, in, 0.02f, 1).view()); }

// Three planes of signs, a scale for 64 columns.
BinaryCodedTensor<> signs(Index out, Index in, const Cpu&) {
  const BinaryCodeShape shape{out, in, 3, 64};
  Buffer<std::uint8_t> bits(shape.planes * out * shape.row_bytes());
  Rng rng(1);
  for (std::uint8_t& byte : bits.span()) byte = static_cast<std::uint8_t>(rng.next());
  return {shape, std::move(bits), bench::normal_matrix(shape.planes * out, shape.groups(), 0.02f, 2)};
}

auto view_of(const NF4Tensor& w) { return w.view(); }
auto view_of(const BinaryCodedTensor<>& w) { return w.view(w.planes(), MatrixView<const float>()); }

// Two tokens are compared; the oracle is slow.
template <class W>
double error_of(const W& w, MatrixView<const float> x, MatrixView<const float> y, bool transposed) {
  const Index rows = std::min<Index>(x.rows, 2);
  Matrix<double> expected(rows, y.cols);
  const auto compare = [&](const auto& weight) {
    if (transposed) reference::matmul_transposed(x.top_rows(rows), weight, expected.view(), Update::overwrite);
    else reference::matmul(x.top_rows(rows), weight, expected.view(), Update::overwrite);
  };
  if constexpr (std::is_same_v<W, NF4Tensor>) {
    compare(w.view());
  } else {
    Matrix<float> decoded(w.rows(), w.cols());
    decode(w, decoded.view());
    compare(std::as_const(decoded).view());
  }
  return bench::normalized_error({y.data, static_cast<std::size_t>(rows * y.cols)}, expected.span());
}

template <bool Backward, auto make>
void product(benchmark::State& state) {
  const Index out = state.range(0), in = state.range(1), tokens = state.range(2);
  const Cpu cpu(static_cast<int>(state.range(3)));
  bench::WeightCycle weights([&] { return make(out, in, cpu); });
  const auto x = bench::normal_matrix(tokens, Backward ? out : in, 1.0f, 2);
  Matrix<float> y(tokens, Backward ? in : out);
  const auto run = [&](const auto& w) {
    if constexpr (Backward) cpu.matmul_transposed(x.view(), view_of(w), y.view());
    else cpu.matmul(x.view(), view_of(w), y.view());
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

BENCHMARK(product<false, nf4>)->Name("forward")->Apply(products);
BENCHMARK(product<true, nf4>)->Name("backward")->Apply(products);
BENCHMARK(product<false, signs>)->Name("signs_forward")->Apply(products);
BENCHMARK(product<true, signs>)->Name("signs_backward")->Apply(products);
BENCHMARK(layer)->Apply(layers);

}  // namespace

BENCHMARK_MAIN();
