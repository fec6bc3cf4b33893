// A weight matrix in 4.127 bits: NF4 codes, scales quantized too, exactly as bitsandbytes stores them.
#include <cmath>
#include <cstdio>

#include <qdylora/qdylora.hpp>

namespace qd = qdylora;

template <class Format, class Scales = qd::DoubleQuant<>>
double show(const char* name, const qd::Matrix<float>& weight) {
  const qd::Cpu cpu;
  const auto tensor = cpu.quantize<Format, Scales>(weight.view());
  qd::Matrix<float> decoded(weight.rows(), weight.cols());
  cpu.dequantize(tensor.view(), decoded.view());
  double error = 0.0;
  for (qd::Index i = 0; i < weight.size(); ++i) error += std::fabs(weight.data()[i] - decoded.data()[i]);
  error /= static_cast<double>(weight.size());
  std::printf("  %-28s %7.4f bits  mean error %.5f\n", name, tensor.bits_per_weight(), error);
  return error;
}

int main() {
  qd::Matrix<float> weight(1024, 1024);
  qd::Rng rng(7);
  for (float& x : weight.span()) x = rng.normal();
  std::printf("1024 x 1024 weights from N(0, 1), blocks of 64:\n");
  const double nf4 = show<qd::NF4>("NF4, double-quantized", weight);
  const double plain = show<qd::NF4, qd::Float32Scales>("NF4, float32 scales", weight);
  const double fp4 = show<qd::FP4>("FP4, double-quantized", weight);
  const double int4 = show<qd::INT4>("INT4, double-quantized", weight);
  show<qd::FP8E4M3>("FP8 E4M3, double-quantized", weight);
  const bool good = nf4 < fp4 && nf4 < int4 && nf4 < 1.005 * plain;
  std::printf("%s\n",
              good ? "NF4 is the best 4-bit format here, and quantizing its scales costs next to nothing." : "UNEXPECTED ORDER");
  return good ? 0 : 1;
}
