// Quantizing and dequantizing a weight matrix. `error` is the mean absolute error relative to the mean absolute weight.
#include "common.hpp"

namespace {

using namespace qdylora;

double relative_error(const Matrix<float>& weight, const Matrix<float>& decoded) {
  double error = 0.0, size = 0.0;
  for (std::size_t i = 0; i < weight.span().size(); ++i) {
    error += std::fabs(static_cast<double>(weight.span()[i]) - static_cast<double>(decoded.span()[i]));
    size += std::fabs(static_cast<double>(weight.span()[i]));
  }
  return error / size;
}

template <class Format>
void quantize(benchmark::State& state) {
  const Cpu cpu(static_cast<int>(state.range(2)));
  const auto weight = bench::normal_matrix(state.range(0), state.range(1), 0.02f, 1);
  for (auto _ : state) benchmark::DoNotOptimize(cpu.quantize<Format>(weight.view()).codes().data());
  const auto tensor = cpu.quantize<Format>(weight.view());
  Matrix<float> decoded(weight.rows(), weight.cols());
  cpu.dequantize(tensor.view(), decoded.view());
  state.SetItemsProcessed(state.iterations() * weight.size());
  state.counters["error"] = relative_error(weight, decoded);
  state.counters["bits"] = tensor.bits_per_weight();
}

template <class Format>
void dequantize(benchmark::State& state) {
  const Cpu cpu(static_cast<int>(state.range(2)));
  const auto weight = bench::normal_matrix(state.range(0), state.range(1), 0.02f, 1);
  const auto tensor = cpu.quantize<Format>(weight.view());
  Matrix<float> decoded(weight.rows(), weight.cols());
  for (auto _ : state) {
    cpu.dequantize(tensor.view(), decoded.view());
    benchmark::ClobberMemory();
  }
  state.SetItemsProcessed(state.iterations() * weight.size());
  state.counters["error"] = relative_error(weight, decoded);
}

void shapes(benchmark::internal::Benchmark* b) {
  b->ArgNames({"out", "in", "threads"})->UseRealTime()->Unit(benchmark::kMicrosecond);
  for (const auto& s : {bench::shapes[0], bench::shapes[4]})
    for (const Index threads : {1, 2}) b->Args({s[0], s[1], threads});
}

BENCHMARK(quantize<NF4>)->Apply(shapes);
BENCHMARK(quantize<FP4>)->Apply(shapes);
BENCHMARK(quantize<FP8E4M3>)->Apply(shapes);
BENCHMARK(dequantize<NF4>)->Apply(shapes);
BENCHMARK(dequantize<FP8E4M3>)->Apply(shapes);

}  // namespace

BENCHMARK_MAIN();
