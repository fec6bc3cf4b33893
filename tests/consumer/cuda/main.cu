// A layer of the library on a GPU, as a program elsewhere would use it. Without a GPU it ends with the library's error, which is what a machine
// that only compiles can show.
#include <qdylora/cuda.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>
#include <qdylora/optim/adamw.hpp>

#include <cstdio>

namespace qd = qdylora;

int main() {
  try {
    const qd::CudaContext context;
    const qd::Cuda cuda(context);
    qd::Matrix<float> weight(64, 128), x(8, 128);
    qd::Rng rng(1);
    for (float& w : weight.span()) w = 0.1f * rng.normal();
    for (float& v : x.span()) v = rng.normal();
    qd::Matrix<float, qd::DeviceMemory> weight_there(64, 128), x_there(8, 128), dy(8, 64);
    cuda.upload(weight.view(), weight_there.view());
    cuda.upload(x.view(), x_there.view());
    qd::DynamicLoRALinear<float, qd::Cuda> layer(weight_there, {.max_rank = 8}, {}, cuda);
    qd::AdamW<float, qd::Cuda> optimizer(layer.parameters(), {.lr = 1e-2}, cuda);
    double first = 0.0, last = 0.0;
    for (int step = 0; step < 50; ++step) {  // towards an output of zero
      const auto y = layer.forward(x_there);
      cuda.copy(y, dy.view());
      last = cuda.sum_squares(qd::MatrixView<const float>(y));
      if (step == 0) first = last;
      optimizer.zero_grad();
      layer.backward(dy.view());
      optimizer.step();
    }
    std::printf("%g -> %g\n", first, last);
    return last < first ? 0 : 1;
  } catch (const qd::Error& error) {
    std::printf("%s\n", error.what());
    return error.code() == qd::Errc::device ? 0 : 1;
  }
}
