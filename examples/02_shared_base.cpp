// Several adapters on one frozen base: the weight exists once, each adapter learns its own task, and rank 0 is the base itself, bit for
// bit. Then both in one batch, row by row, with the bits they have apart; and their sum as one adapter.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <utility>
#include <vector>

#include <qdylora/qdylora.hpp>

namespace qd = qdylora;
using Layer = qd::DynamicLoRALinear<float>;

// Teaches the layer  y = base(x) + sign * (a fixed rank-2 map of x)  and returns the last loss.
double train(Layer& layer, float sign) {
  qd::Rng rng(11), task(5);
  qd::Matrix<float> u(2, layer.in()), v(2, layer.out());
  for (float& value : u.span()) value = 0.3f * task.normal();
  for (float& value : v.span()) value = 0.3f * task.normal();
  qd::AdamW<float> optimizer(layer.parameters(), {.lr = 1e-2});
  qd::Matrix<float> x(32, layer.in()), dy(32, layer.out());
  double loss = 0.0;
  for (int step = 0; step < 300; ++step) {
    for (float& value : x.span()) value = rng.normal();
    layer.set_rank(0);
    const auto base = qd::clone(layer.forward(x));
    layer.set_rank(4);
    const auto y = layer.forward(x);
    loss = 0.0;
    for (qd::Index i = 0; i < 32; ++i)
      for (qd::Index j = 0; j < layer.out(); ++j) {
        float wanted = base(i, j);
        for (qd::Index r = 0; r < 2; ++r) {
          float z = 0.0f;
          for (qd::Index k = 0; k < layer.in(); ++k) z += u(r, k) * x(i, k);
          wanted += sign * z * v(r, j);
        }
        dy(i, j) = (y(i, j) - wanted) / 32.0f;
        loss += std::pow(y(i, j) - wanted, 2.0) / static_cast<double>(dy.size());
      }
    optimizer.zero_grad();
    layer.backward(dy.view());
    optimizer.step();
  }
  return loss;
}

int main() {
  qd::Matrix<float> weight(48, 64);
  qd::Rng rng(3);
  for (float& x : weight.span()) x = 0.1f * rng.normal();
  Layer plus{weight, {.max_rank = 4, .alpha = 4, .name = "plus"}};
  Layer minus{plus.base(), {.max_rank = 4, .alpha = 4, .layer = 1, .name = "minus"}};  // the same weight, another adapter
  const double loss_plus = train(plus, 1.0f), loss_minus = train(minus, -1.0f);

  qd::Matrix<float> x(8, 64);
  for (float& value : x.span()) value = rng.normal();
  plus.set_rank(0);
  minus.set_rank(0);
  const auto a = plus.forward(x), b = minus.forward(x);
  const bool same = std::memcmp(a.data, b.data, static_cast<std::size_t>(a.size()) * sizeof(float)) == 0;
  std::printf("base %zu bytes, shared by %ld layers\n", plus.base()->bytes(), plus.base().use_count());
  std::printf("loss with adapter \"plus\" %.5f, with \"minus\" %.5f; at rank 0 both give %s\n", loss_plus, loss_minus,
              same ? "the same bits" : "DIFFERENT BITS");

  // Both in one batch, each row with an adapter and a rank of its own: what each adapter makes of its rows alone.
  std::vector<Layer> layers;
  layers.push_back(std::move(plus));
  layers.push_back(std::move(minus));
  qd::MultiLoRALinear<float> both(std::move(layers));
  const std::vector<qd::Index> adapters = {0, 1, 1, 0, 0, 1, 0, 1};
  const auto plan = qd::AdapterPlan::per_row(adapters, qd::RankPlan::of_runs({{4, 4}, {4, 2}}));
  both.set_plan(plan);
  const auto mixed = qd::clone(both.forward(x));
  bool apart = true;
  for (const auto& [adapter, rows, ranks] : plan.shares(x.rows())) {
    auto& layer = both.at(adapter);
    qd::Matrix<float> own(static_cast<qd::Index>(rows.size()), x.cols()), expected(own.rows(), layer.out());
    layer.backend().gather_rows(x.view(), rows, own.view());
    layer.backend().gather_rows(mixed.view(), rows, expected.view());
    layer.set_ranks(ranks);
    apart = apart && std::memcmp(layer.forward(own).data, expected.data(), static_cast<std::size_t>(expected.size()) * sizeof(float)) == 0;
  }
  std::printf("both adapters in one batch give %s as apart\n", apart ? "the same bits" : "OTHER BITS");

  // And their sum as one adapter. The tasks are opposites, so it changes next to nothing.
  const std::vector<qd::WeightedAdapter<float>> terms = {{&both.at(0).adapter(), 1.0f}, {&both.at(1).adapter(), 1.0f}};
  const auto sum = qd::weighted_sum<float>(terms);
  Layer summed{both.at(0).base(), sum.options()};
  qd::assign(summed.adapter(), sum, summed.backend());
  const auto change = [&x](Layer& layer) {
    layer.set_rank(0);
    const auto base = qd::clone(layer.forward(x));
    layer.set_rank(layer.adapter().max_rank());
    const auto y = layer.forward(x);
    double squares = 0.0;
    for (qd::Index i = 0; i < y.size(); ++i) squares += std::pow(y.data[i] - base.data()[i], 2.0);
    return std::sqrt(squares);
  };
  const double of_sum = change(summed), of_plus = change(both.at(0));
  std::printf("\"plus\" changes the outputs by %.2f, the sum of both by %.2f\n", of_plus, of_sum);

  const bool good = same && loss_plus < 0.01 && loss_minus < 0.01 && apart && of_sum < 0.1 * of_plus;
  std::printf("%s\n", good ? "Two tasks, one base." : "NOT LEARNED");
  return good ? 0 : 1;
}
