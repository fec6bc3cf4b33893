// Training gives the same bytes on any number of threads, on an executor of the caller's, and beside another training.
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/nn/activation.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>
#include <qdylora/optim/adamw.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/random_data.hpp"

namespace determinism_test {

namespace qd = qdylora;
using qd::Index;

namespace {

// Ten steps of a two-layer model with every option on; returns all that training made, outputs, parameters and moments.
template <class T = float>
std::vector<float> train(const qd::Cpu& cpu, std::uint64_t seed, int steps = 10) {
  constexpr Index tokens = 45, width = 100, hidden = 160;
  using Layer = qd::DynamicLoRALinear<T>;
  const auto options = [&](std::uint32_t layer) {
    return qd::LoRAOptions{
        .max_rank = 16, .alpha = 16.0f, .dropout = 0.1f, .seed = seed, .layer = layer, .gated_ranks = {1, 4, 16}};
  };
  Layer up(test::normal_matrix<float>(hidden, width, seed, 0.1), options(0), {}, cpu);
  Layer down(test::normal_matrix<float>(width, hidden, seed + 1, 0.1), options(1), {}, cpu);
  up.adapter().start_collecting();
  auto parameters = qd::parameters(up, down);
  for (const auto* layer : {&up, &down})
    for (const auto& gates : layer->adapter().gate_parameters()) parameters.push_back(gates);
  qd::AdamW<float> optimizer{parameters, {.lr = 1e-2, .weight_decay = 0.01, .max_gradient_norm = 1.0}, cpu};
  qd::RankSampler sampler{qd::RankSet{1, 2, 4, 8, 16}, qd::Rng(seed), {.granularity = qd::SamplerOptions::Granularity::row}};

  std::vector<float> trace;
  const auto keep = [&](auto view) {
    for (Index i = 0; i < view.rows; ++i)
      for (Index j = 0; j < view.cols; ++j) trace.push_back(static_cast<float>(view(i, j)));
  };
  for (int step = 0; step < steps; ++step) {
    const auto x = test::normal_matrix<T>(tokens, width, seed + 100 + static_cast<std::uint64_t>(step));
    const auto target = test::normal_matrix<T>(tokens, width, seed + 200 + static_cast<std::uint64_t>(step));
    qd::set_ranks(sampler.next(tokens), up, down);
    up.set_training(true, static_cast<std::uint32_t>(step));
    down.set_training(true, static_cast<std::uint32_t>(step));
    const auto h = up.forward(x);
    const auto a = qd::gelu(h, cpu);
    const auto y = down.forward(a);
    qd::Matrix<T> dy(tokens, width);
    for (Index i = 0; i < tokens; ++i)
      for (Index j = 0; j < width; ++j)
        dy(i, j) = test::scalar<T>((static_cast<double>(y(i, j)) - static_cast<double>(target(i, j))) / 4500.0);
    optimizer.zero_grad();
    const auto da = down.backward(dy.view());
    const auto dh = qd::gelu_backward(h, da, cpu);
    const auto dx = up.backward(dh.view());
    trace.push_back(static_cast<float>(optimizer.step().gradient_norm));
    keep(y);
    keep(dx);
  }
  for (const auto& p : optimizer.parameters()) keep(p->value.view());
  for (const auto& s : optimizer.states()) {
    keep(s.m.view());
    keep(s.v.view());
  }
  keep(up.adapter().moment_a.view());
  keep(up.adapter().moment_b.view());
  return trace;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  return a.size() == b.size() && std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
}

}  // namespace

TEST_CASE("ten training steps have the same bytes on 1, 2, 3, 4 and 8 threads") {
  const auto one = train(qd::Cpu(1), 7);
  for (const int threads : {2, 3, 4, 8}) {
    CAPTURE(threads);
    CHECK(same(train(qd::Cpu(threads), 7), one));
  }
  CHECK_FALSE(same(train(qd::Cpu(1), 8), one));  // the comparison can fail
}

TEST_CASE("training in bfloat16 has the same bytes on any number of threads") {
  const auto one = train<qd::bfloat16>(qd::Cpu(1), 7, 4);
  CHECK(same(train<qd::bfloat16>(qd::Cpu(4), 7, 4), one));
}

TEST_CASE("an executor of the caller's may run tasks in any order") {
  const auto one = train(qd::Cpu(1), 7, 4);
  const qd::Cpu backwards{qd::Executor([](Index count, const std::function<void(Index)>& f) {
    for (Index i = count; i > 0; --i) f(i - 1);
  })};
  CHECK(same(train(backwards, 7, 4), one));
}

TEST_CASE("two models trained in two threads of one process are each what they are alone") {
  const auto first_alone = train(qd::Cpu{}, 7), second_alone = train(qd::Cpu{}, 8);
  std::vector<float> first, second;
  std::thread a([&] { first = train(qd::Cpu{}, 7); });
  std::thread b([&] { second = train(qd::Cpu{}, 8); });
  a.join();
  b.join();
  CHECK(same(first, first_alone));
  CHECK(same(second, second_alone));
}

TEST_CASE("a layer is read by many threads at once") {
  const qd::DynamicLoRALinear<float> layer(test::normal_matrix<float>(64, 96, 1), {.max_rank = 8});
  const auto x = test::normal_matrix<float>(20, 96, 2);
  const auto forward = [&] {
    qd::Matrix<float> y(20, 64);
    qd::DynamicLoRALinear<float>::Context context;
    layer.forward(x.view(), y.view(), context);
    return y;
  };
  const auto alone = forward();
  std::vector<qd::Matrix<float>> results(8);
  std::vector<std::thread> threads;
  for (auto& result : results) threads.emplace_back([&] { result = forward(); });
  for (auto& thread : threads) thread.join();
  for (const auto& result : results) CHECK(test::same_bits(result.view(), alone.view()));
}

}  // namespace determinism_test
