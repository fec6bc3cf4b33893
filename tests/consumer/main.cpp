// What a user of the library writes: a quantized layer with an adapter, a few steps, the ranks compared.
#include <qdylora/qdylora.hpp>

#include <cstdio>

namespace qd = qdylora;

int main() {
  qd::Rng rng(1);
  qd::Matrix<float> weight(24, 64), x(16, 64), dy(16, 24);
  for (float& value : weight.span()) value = 0.1f * rng.normal();
  for (float& value : x.span()) value = rng.normal();
  qd::DynamicLoRALinear<float> layer{weight, {.max_rank = 4, .alpha = 4}};
  qd::RankSampler ranks{qd::RankSet{1, 2, 4}, rng};
  qd::AdamW<float> optimizer{layer.parameters(), {.lr = 1e-2}};
  // The output is to become zero: the loss is its mean square.
  const auto loss = [&] {
    const auto y = layer.forward(x);
    double sum = 0.0;
    for (qd::Index i = 0; i < y.rows; ++i)
      for (qd::Index j = 0; j < y.cols; ++j) {
        dy(i, j) = 2.0f * y(i, j) / static_cast<float>(y.size());
        sum += static_cast<double>(y(i, j)) * static_cast<double>(y(i, j)) / static_cast<double>(y.size());
      }
    return sum;
  };
  layer.set_rank(0);
  const double before = loss();
  for (int step = 0; step < 200; ++step) {
    qd::set_ranks(ranks.next(x.rows()), layer);
    loss();
    optimizer.zero_grad();
    layer.backward(dy.view());
    optimizer.step();
  }
  layer.set_rank(4);
  const double after = loss();
  std::printf("qdylora %s: loss %.4f, after 200 steps %.4f\n", QDYLORA_VERSION_STRING, before, after);
  return after < 0.7 * before ? 0 : 1;
}
