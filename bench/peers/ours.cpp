// The products of qdylora on NF4 with double-quantized scales, in each of its kinds of arithmetic; and quantizing and decoding.
#include "cells.hpp"

#include <string>
#include <vector>

#include <qdylora/qdylora.hpp>

namespace {

using namespace qdylora;

struct Kernel {
  std::string name, kind;
  Cpu cpu;
  bool has_backward = true;
};

std::vector<Kernel> kernels_of(const Cpu& cpu) {
  std::vector<Kernel> all;
  all.push_back({"qdylora float32", "float32", cpu.with_compute(Compute::exact)});
  all.push_back({"qdylora 16-bit", "16-bit", cpu.with_compute(Compute::bits16)});
  all.push_back({"qdylora int8", "int8", cpu.with_compute(Compute::int8), false});
  if (cpu.isa() != Isa::avx2 && supported(Isa::avx2)) {
    const auto older = cpu.with_isa(Isa::avx2);
    all.push_back({"qdylora float32 avx2", "float32", older.with_compute(Compute::exact)});
    all.push_back({"qdylora 16-bit avx2", "16-bit", older.with_compute(Compute::bits16)});
  }
  return all;
}

}  // namespace

int main(int argc, char** argv) {
  const cells::Task task(argc, argv);
  const cells::Others others;
  const Cpu cpu(task.threads);
  cells::print_version("qdylora", QDYLORA_VERSION_STRING ", " + std::string(name(cpu.isa())) + ", compiled with -O3, " +
#ifdef __clang__
                                      "clang " __clang_version__
#else
                                      "g++ " __VERSION__
#endif
  );
  Matrix<float> w(task.out, task.in), decoded(task.out, task.in);
  const auto numbers = cells::random_matrix(task.out, task.in, 0.02f, 1);
  std::copy(numbers.begin(), numbers.end(), w.data());

  std::vector<NF4Tensor> weights;
  weights.push_back(cpu.quantize<NF4>(w.view()));
  for (Index i = 1; i < task.copies(static_cast<double>(weights.front().bytes())); ++i) weights.push_back(cpu.quantize<NF4>(w.view()));
  cpu.dequantize(weights.front().view(), decoded.view());
  if (task.most_tokens() == 0) {
    double wrong = 0.0, all = 0.0;
    for (std::size_t i = 0; i < numbers.size(); ++i) {
      wrong += std::pow(static_cast<double>(decoded.span()[i]) - static_cast<double>(numbers[i]), 2);
      all += std::pow(static_cast<double>(numbers[i]), 2);
    }
    const auto quantizing = cells::measure(task.seconds, 1, [&](Index) { cpu.quantize<NF4>(w.view()); });
    cells::print_cell(task, "qdylora", "quantization", "quantize", 0, quantizing, std::sqrt(wrong / all));
    const auto decoding = cells::measure(
        task.seconds, 1, [&](Index i) { cpu.dequantize(weights[static_cast<std::size_t>(i) % weights.size()].view(), decoded.view()); });
    cells::print_cell(task, "qdylora", "quantization", "dequantize", 0, decoding, -1.0);
    cells::print_others(others);
    return 0;
  }

  const auto kernels = kernels_of(cpu);
  const std::vector<float> plain(decoded.span().begin(), decoded.span().end());
  for (const bool backward : {false, true}) {
    const Index depth = backward ? task.out : task.in, cols = backward ? task.in : task.out;
    const auto values = cells::random_matrix(task.most_tokens(), depth, 1.0f, 2);
    const cells::Reference reference(task, backward, values, plain);
    for (const Index tokens : task.tokens) {
      Matrix<float> x(tokens, depth), y(tokens, cols);
      std::copy_n(values.begin(), x.size(), x.data());
      const Index group = task.group(tokens);
      for (const auto& kernel : kernels) {
        if (backward && !kernel.has_backward) continue;
        const auto time = cells::measure(task.seconds, group, [&](Index sample) {
          for (Index i = sample * group; i < (sample + 1) * group; ++i) {
            const auto& weight = weights[static_cast<std::size_t>(i) % weights.size()];
            if (backward) kernel.cpu.matmul_transposed(x.view(), weight.view(), y.view());
            else kernel.cpu.matmul(x.view(), weight.view(), y.view());
          }
        });
        cells::print_cell(task, kernel.name.c_str(), kernel.kind.c_str(), backward ? "backward" : "forward", tokens, time,
                          reference.error(y.data(), tokens));
      }
    }
  }
  cells::print_others(others);
}
