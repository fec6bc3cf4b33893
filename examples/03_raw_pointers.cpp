// The layer in a trainer written as C programs are: one block of parameters, one of activations, functions over raw pointers (llm.c's
// way). A MatrixView is a pointer with a shape: nothing is copied.
//   * Any float's address will do; rows that start at multiples of 64 bytes are read fastest. Rows may have any stride: {p, rows, cols, stride}.
//   * Weights are quantized when a layer is made and may be freed then. `inp` is borrowed until matmul_backward: it must not change.
//   * matmul_backward overwrites dinp (llm.c's adds to it) and adds to the gradients of A and B; dinp = NULL is not computed.
//   * A Context is one pass in flight. Use one for each layer and micro-batch, and forward may run on several batches before backward does.
//   * The layer's loops run on a pool with a thread for each processor. A trainer with its own (OpenMP, ...) passes Cpu{n}, or Cpu{executor}
//     that runs them on it, as the last argument of a layer; Cpu{1} runs them on the caller's thread.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "common/toy_task.hpp"

namespace qd = qdylora;
using Task = qd::examples::ToyTask;
using Layer = qd::DynamicLoRALinear<float>;

void matmul_forward(float* out, const float* inp, const Layer& layer, Layer::Context& saved, long rows) {
  layer.forward({inp, rows, layer.in()}, {out, rows, layer.out()}, saved);
}

void matmul_backward(float* dinp, const float* dout, Layer& layer, Layer::Context& saved, long rows) {
  layer.backward({dout, rows, layer.out()}, {dinp, rows, layer.in()}, saved);
}

void gelu_forward(float* out, const float* inp, long n) {
  for (long i = 0; i < n; ++i) out[i] = 0.5f * inp[i] * (1.0f + std::erf(inp[i] * 0.70710678f));
}

void gelu_backward(float* dinp, const float* inp, const float* dout, long n) {
  for (long i = 0; i < n; ++i) {
    const float density = 0.39894228f * std::exp(-0.5f * inp[i] * inp[i]);
    dinp[i] = dout[i] * (0.5f * (1.0f + std::erf(inp[i] * 0.70710678f)) + inp[i] * density);
  }
}

// The mean of squares, and its gradient.
float mse(float* dy, const float* y, const float* target, long n) {
  double loss = 0.0;
  for (long i = 0; i < n; ++i) {
    const float error = y[i] - target[i];
    loss += static_cast<double>(error * error) / static_cast<double>(n);
    dy[i] = 2.0f * error / static_cast<float>(n);
  }
  return static_cast<float>(loss);
}

float* floats(long count) {
  auto* block = static_cast<float*>(std::malloc(static_cast<std::size_t>(count) * sizeof(float)));
  if (block == nullptr) std::abort();
  return block;
}

int main() {
  constexpr long N = Task::tokens, C = Task::in, H = Task::hidden, O = Task::out;
  Task task;

  float* params = floats(H * C + O * H);  // as a checkpoint would fill it
  float *w_up = params, *w_down = w_up + H * C;
  std::memcpy(w_up, task.up.data(), sizeof(float) * H * C);
  std::memcpy(w_down, task.down.data(), sizeof(float) * O * H);
  Layer up{qd::MatrixView(w_up, H, C), {.max_rank = 8, .alpha = 8, .name = "up"}};
  Layer down{qd::MatrixView(w_down, O, H), {.max_rank = 8, .alpha = 8, .layer = 1, .name = "down"}};
  std::free(params);

  float* acts = floats(N * (C + 4 * H + 3 * O));
  float *x = acts, *h = x + N * C, *a = h + N * H, *da = a + N * H, *dh = da + N * H;
  float *y = dh + N * H, *dy = y + N * O, *target = dy + N * O;
  Layer::Context saved_up, saved_down;

  const auto forward = [&] {
    matmul_forward(h, x, up, saved_up, N);
    gelu_forward(a, h, N * H);
    matmul_forward(y, a, down, saved_down, N);
    return mse(dy, y, target, N * O);
  };
  qd::RankSampler ranks{qd::RankSet{1, 2, 4, 8}, qd::Rng{3}};
  qd::AdamW<float> optimizer{qd::parameters(up, down), {.lr = 1e-2}};
  for (int step = 0; step < 600; ++step) {
    task.next({x, N, C}, {target, N, O});
    qd::set_ranks(ranks.next(N), up, down);
    forward();
    optimizer.zero_grad();
    matmul_backward(da, dy, down, saved_down, N);
    gelu_backward(dh, h, da, N * H);
    matmul_backward(nullptr, dh, up, saved_up, N);
    optimizer.step();
  }

  task.next({x, N, C}, {target, N, O});  // a batch that was not trained on
  const int status = Task::verdict(ranks.set(), [&](qd::Index rank) {
    qd::set_ranks(qd::RankPlan::uniform(rank), up, down);
    return forward();
  });
  std::free(acts);
  return status;
}
