// Quantizes the matrices of a safetensors file to bitsandbytes' 4-bit keys; everything else is copied.
//
//   quantize IN.safetensors OUT.safetensors --format nf4|fp4 --block-size 64 --double-quant on|off
#include <cmath>
#include <cstdio>
#include <deque>
#include <memory>
#include <set>
#include <string>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/io.hpp>
#include <qdylora/model/base_weight.hpp>

#include "common/program.hpp"

namespace {

using namespace qdylora;
using namespace qdylora::examples;

bool is_matrix(const TensorInfo& t) {
  return t.shape.size() == 2 && t.shape[0] > 0 && t.shape[1] > 0 &&
         (t.dtype == DType::F32 || t.dtype == DType::F16 || t.dtype == DType::BF16);
}

// Root mean square of what quantization changed, relative to that of the weight; the file is read again, some rows at a time.
double relative_error(const SafetensorsFile& file, const TensorInfo& t, const WeightFor<AnyFormat>& weight) {
  double error = 0.0, size = 0.0;
  const Index step = std::max<Index>(1, (Index{1} << 20) / t.shape[1]);
  Matrix<float> original, decoded;
  for (Index first = 0; first < t.shape[0]; first += step) {
    const Index rows = std::min(step, t.shape[0] - first);
    original.resize(rows, t.shape[1]);
    decoded.resize(rows, t.shape[1]);
    file.read_rows(t.name, first, original.view());
    weight.visit([&]<class View>(const View& view) {
      if constexpr (requires { typename View::format; }) dequantize(view, decoded.view(), first);
    });
    for (std::size_t i = 0; i < original.span().size(); ++i) {
      const double x = static_cast<double>(original.span()[i]);
      error += std::pow(static_cast<double>(decoded.span()[i]) - x, 2);
      size += x * x;
    }
  }
  return size > 0.0 ? std::sqrt(error / size) : 0.0;
}

int quantize_file(const std::string& in, const std::string& out, BaseOptions options) {
  expect_no_overwrite(in, out);
  const Cpu cpu;
  const SafetensorsFile file(in);
  SafetensorsWriter writer;
  BnbStates states;
  std::deque<std::shared_ptr<const WeightFor<AnyFormat>>> weights;  // the writer borrows: these live until it has written
  std::deque<Buffer<std::byte>> copies;
  for (const auto& [key, value] : file.metadata()) writer.metadata(key, value);
  double bits = 0.0;
  Index count = 0;
  std::printf("%-60s %14s %8s %10s\n", "tensor", "shape", "bits", "error");
  for (const auto& t : file.tensors()) {
    if (!is_matrix(t)) {
      copies.push_back(file.bytes(t.name));
      writer.add(t.name, t.dtype, t.shape, copies.back().span());
      continue;
    }
    weights.push_back(at_tensor(in, t.name, [&] {
      return make_base_weight(
          t.shape[0], t.shape[1], options, [&](Index first, MatrixView<float> rows) { file.read_rows(t.name, first, rows); }, cpu);
    }));
    const auto& weight = *weights.back();
    add_bnb_4bit(writer, states, t.name, weight, t.dtype);
    const Index size = t.shape[0] * t.shape[1];
    bits += 8.0 * static_cast<double>(weight.bytes());
    count += size;
    std::printf("%-60s %14s %8.4f %9.3f%%\n", printable(t.name, 60).c_str(),
                (std::to_string(t.shape[0]) + "x" + std::to_string(t.shape[1])).c_str(),
                8.0 * static_cast<double>(weight.bytes()) / static_cast<double>(size), 100.0 * relative_error(file, t, weight));
  }
  QDYLORA_EXPECTS(count > 0, bad_argument, in + ": has no matrix of float32, float16 or bfloat16");
  writer.write(out);
  std::printf("%zu matrices, %.2f M weights, %.4f bits each; %zu other tensors copied; wrote %s\n", weights.size(),
              static_cast<double>(count) / 1e6, bits / static_cast<double>(count), copies.size(), out.c_str());
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Quantizes the matrices of a safetensors file to bitsandbytes' 4-bit keys.", "quantize"};
  std::string in, out, format = "nf4", double_quant = "on";
  Index block_size = 64;
  app.add_option("IN", in, "safetensors file to read")->required()->check(not_empty());
  app.add_option("OUT", out, "safetensors file to write")->required()->check(not_empty());
  app.add_option("--format", format, "nf4 or fp4")->check(CLI::IsMember({"nf4", "fp4"}))->capture_default_str();
  app.add_option("--block-size", block_size, "weights that share a scale")
      ->check(CLI::IsMember(std::set<Index>{32, 64, 128, 256, 512, 1024, 2048, 4096}))
      ->capture_default_str();
  app.add_option("--double-quant", double_quant, "quantize the scales too: on or off")
      ->check(CLI::IsMember({"on", "off"}))
      ->capture_default_str();
  return run_program(app, argc, argv, [&] {
    return quantize_file(in, out, {.format = base_format(format), .double_quant = double_quant == "on", .block_size = block_size});
  });
}
