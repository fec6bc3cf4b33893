// Work recorded as a graph and launched again, beside the same work queued call by call: the same bits. And what a graph refuses.
#include <algorithm>
#include <utility>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/cuda.hpp>
#include <qdylora/model/decoder.hpp>
#include <qdylora/model/upload.hpp>
#include <qdylora/nn/alpha_linear.hpp>
#include <qdylora/nn/bottleneck_adapter.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>
#include <qdylora/optim/adamw.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/random_data.hpp"
#include "support/stream_orders.hpp"
#include "support/tiny_model.hpp"

namespace graph_test {

namespace qd = qdylora;
using qd::Cuda, qd::CudaGraph, qd::Errc, qd::Index;
template <class T>
using Matrix = qd::Matrix<T, qd::DeviceMemory>;

namespace {

/// The bits of some matrices, one after another.
template <class... M>
std::vector<std::byte> bits(const Cuda& cuda, const M&... matrices) {
  std::vector<std::byte> all;
  const auto append = [&]<class T>(qd::MatrixView<const T> there) {
    qd::Matrix<T> here(there.rows, there.cols);
    cuda.download(there, here.view());
    const auto bytes = std::as_bytes(here.span());
    all.insert(all.end(), bytes.begin(), bytes.end());
  };
  (append(std::as_const(matrices).view()), ...);
  return all;
}

template <class T>
void put(const Cuda& cuda, const qd::Matrix<T>& host, Matrix<T>& there) {
  there.resize(host.rows(), host.cols());
  cuda.upload(host.view(), there.view());
  cuda.synchronize();
}

constexpr Index in = 128, out = 72, tokens = 40;

/// A layer with what one pass reads and writes.
template <class Layer, class T>
struct Pass {
  Cuda cuda;
  Layer& layer;
  Matrix<T> x = Matrix<T>(), dy = Matrix<T>(), y = Matrix<T>(), dx = Matrix<T>();
  typename Layer::Context context = {};

  Pass(const Cuda& cuda_, Layer& layer_) : cuda(cuda_), layer(layer_) {}
  void fill(Index rows, std::uint64_t seed) {
    put(cuda, test::normal_matrix<T>(rows, layer.in(), seed), x);
    put(cuda, test::normal_matrix<T>(rows, layer.out(), seed + 1), dy);
    y.resize(rows, layer.out());
    dx.resize(rows, layer.in());
  }
  void operator()() {
    for (const auto& p : layer.parameters()) cuda.fill(p->gradient.view(), qd::Accumulator<T>{});
    layer.forward(std::as_const(x).view(), y.view(), context);
    layer.backward(std::as_const(dy).view(), dx.view(), context);
  }
  std::vector<std::byte> results() {
    if constexpr (requires { layer.alpha(); }) return bits(cuda, y, dx, layer.alpha().gradient);
    else return adapter_results();
  }
  std::vector<std::byte> adapter_results() {
    const auto& adapter = std::as_const(layer).adapter();
    if (adapter.dora()) return bits(cuda, y, dx, adapter.a().gradient, adapter.b().gradient, adapter.magnitude().gradient);
    return bits(cuda, y, dx, adapter.a().gradient, adapter.b().gradient);
  }
  void spoil() {
    cuda.fill(y.view(), T{1});
    cuda.fill(dx.view(), T{1});
  }
};

template <class T, class Layer>
void check_recorded(const Cuda& cuda, Layer& layer, Index rows) {
  Pass<Layer, T> pass(cuda, layer);
  pass.fill(rows, 10);
  pass();
  const auto expected = pass.results();
  const CudaGraph graph(cuda.context(), [&] { pass(); });
  pass.spoil();
  graph.launch();
  CHECK(pass.results() == expected);
  pass.fill(rows, 20);  // other numbers in the same memory
  pass();
  const auto next = pass.results();
  CHECK(next != expected);
  for (int again = 0; again < 2; ++again) {
    pass.spoil();
    graph.launch();
    CHECK(pass.results() == next);
  }
}

template <class T, class Layer>
void check_layer(const Cuda& cuda, Layer& layer, Index rows, const qd::RankPlan& plan) {
  CAPTURE(rows, plan.max_rank(), plan.is_uniform());
  const auto b = test::normal_matrix<qd::Accumulator<T>>(8, layer.out(), 7, 0.1);
  cuda.upload(b.view(), layer.adapter().b().value.view());
  layer.set_ranks(plan);
  check_recorded<T>(cuda, layer, rows);
}

}  // namespace

TEMPLATE_TEST_CASE("a recorded pass through a layer has the bits of one that is not", "[cuda]", float, qd::bfloat16) {
  using T = TestType;
  const qd::CudaContext context({.workspace_bytes = std::size_t{1} << 20, .slab_bytes = 4096});
  const Cuda cuda(context);
  Matrix<float> weight;
  put(cuda, test::normal_matrix<float>(out, in, 1, 0.3), weight);
  test::in_every_order([&] {
    qd::DynamicLoRALinear<T, Cuda> linear(weight.view(), {.max_rank = 8, .alpha = 4, .seed = 3}, {}, cuda);
    qd::DynamicLoRALinear<T, Cuda> dora(linear.base(), {.max_rank = 8, .alpha = 4, .seed = 3, .dora = true}, cuda);
    qd::BottleneckAdapter<T, Cuda> bottleneck(in, {.max_rank = 8, .alpha = 4, .seed = 3}, qd::BottleneckPlacement::sequential, cuda);
    qd::AlphaLinear<T, Cuda> alpha(test::normal_matrix<float>(out, in, 1, 0.3), {.trained_planes = 2}, {.planes = 3, .group_size = 16}, cuda);
    for (const Index rows : {Index{3}, tokens}) {
      check_recorded<T>(cuda, alpha, rows);
      for (const auto& plan : {qd::RankPlan::uniform(8), qd::RankPlan::of_runs({{1, 2}, {rows - 1, 5}})}) {
        check_layer<T>(cuda, linear, rows, plan);
        check_layer<T>(cuda, dora, rows, plan);
        check_layer<T>(cuda, bottleneck, rows, plan);
      }
    }
  });
}

TEST_CASE("a recorded pass has norms that are its own, or stay as long as the layer", "[cuda]") {
  const qd::CudaContext context({.workspace_bytes = std::size_t{1} << 20});
  const Cuda cuda(context);
  Matrix<float> weight;
  put(cuda, test::normal_matrix<float>(out, in, 1, 0.3), weight);
  qd::DynamicLoRALinear<float, Cuda> layer(weight.view(), {.max_rank = 8, .alpha = 4, .seed = 3, .dora = true}, {}, cuda);
  qd::DynamicLoRALinear<float, Cuda> other(layer.base(), layer.adapter().options(), cuda);
  Matrix<float> x, y;
  put(cuda, test::normal_matrix<float>(tokens, in, 2), x);
  y.resize(tokens, out);
  std::uint64_t seed = 3;
  const auto change = [&](auto& of) {
    const auto b = test::normal_matrix<float>(8, out, seed, 0.1);
    cuda.upload(b.view(), of.b().value.view());
    cuda.synchronize();
  };
  const auto forward = [&](auto& with, auto& pass) {
    with.forward(std::as_const(x).view(), y.view(), pass);
    return bits(cuda, y);
  };
  for (auto* each : {&layer, &other}) {
    each->set_training(false);
    each->set_rank(5);
  }
  // As a layer makes it that keeps nothing.
  const auto expected = [&] {
    typename qd::DynamicLoRALinear<float, Cuda>::Context fresh;
    change(other.adapter());
    return forward(other, fresh);
  };
  typename qd::DynamicLoRALinear<float, Cuda>::Context pass, training;
  const auto launched = [&](const CudaGraph& graph) {
    cuda.fill(y.view(), 1.0f);
    graph.launch();
    return bits(cuda, y);
  };
  change(layer.adapter());
  forward(layer, pass);
  const CudaGraph reads(cuda.context(), [&] { layer.forward(std::as_const(x).view(), y.view(), pass); });
  CHECK(launched(reads) == expected());
  // What the layer keeps stays where it is, whatever passes come in between.
  layer.set_training(true);
  forward(layer, pass);
  layer.set_training(false);
  forward(layer, pass);
  CHECK(launched(reads) == expected());
  ++seed;
  change(layer.adapter());
  CHECK(forward(layer, pass) == expected());
  // What is recorded is not done: others do not take it for made.
  layer.set_training(true);
  forward(layer, training);
  layer.set_training(false);
  ++seed;
  change(layer.adapter());
  const CudaGraph makes(cuda.context(), [&] { layer.forward(std::as_const(x).view(), y.view(), training); });
  CHECK(forward(layer, pass) == expected());
  CHECK(launched(makes) == expected());
  ++seed;
  change(layer.adapter());
  CHECK(launched(makes) == expected());
  // Nor are they given back while a graph writes to them.
  forward(layer, training);
  CHECK(launched(makes) == expected());
}

TEST_CASE("a model's recorded losses, gradients and moments have the bits of those that are not", "[cuda]") {
  using T = qd::bfloat16;
  const qd::CudaContext context({.workspace_bytes = std::size_t{4} << 20});
  const Cuda cuda(context);
  for (const auto& [checkpoint, offload] : {std::pair(false, false), std::pair(true, false), std::pair(true, true)}) {
    auto config = test::tiny_config();
    if (offload) config.layers = 5;  // three streams stay on the device
    const auto weights = test::tiny_weights<float>(config, true, {.format = qd::BaseFormat::float32});
    const qd::DecoderOptions options{
        .lora = {.max_rank = 8, .alpha = 4, .seed = 2}, .checkpoint = checkpoint, .offload_checkpoints = offload};
    qd::Decoder<T, Cuda> model(qd::upload(*weights, cuda), options, cuda);
    model.for_each_trained([&](auto& layer) { layer.adapter().start_collecting(cuda); });
    const auto batch = test::random_batch(config.vocab, {5, 2, 9}, 5, 1);
    const auto set_adapters = [&](std::uint64_t seed) {
      for (const auto& p : model.parameters()) {
        const auto numbers = test::normal_matrix<float>(p->value.rows(), p->value.cols(), seed++, 0.1);
        cuda.upload(numbers.view(), p->value.view());
        cuda.synchronize();
      }
    };
    const auto for_each_moment = [&](auto&& f) {
      model.for_each_trained([&](auto& layer) {
        f(layer.adapter().moment_a);
        f(layer.adapter().moment_b);
      });
    };
    const auto pass = [&] {
      for (const auto& p : model.parameters()) cuda.fill(p->gradient.view(), 0.0f);
      for_each_moment([&](Matrix<float>& moment) { cuda.fill(moment.view(), 0.0f); });
      model.queue_loss_and_gradient(batch, 0.25);
    };
    const auto gradients = [&] {
      std::vector<std::byte> all;
      const auto append = [&](const Matrix<float>& sums) {
        const auto one = bits(cuda, sums);
        all.insert(all.end(), one.begin(), one.end());
      };
      for (const auto& p : model.parameters()) append(p->gradient);
      for_each_moment(append);
      return all;
    };
    set_adapters(1);
    pass();
    const auto first = model.scored_losses();
    const CudaGraph graph(context, pass);
    for (const std::uint64_t seed : {1u, 100u}) {
      set_adapters(seed);
      pass();
      const auto losses = model.scored_losses();
      const auto expected = gradients();
      CHECK((losses == first) == (seed == 1));
      for (const auto& p : model.parameters()) cuda.fill(p->gradient.view(), 1.0f);
      for_each_moment([&](Matrix<float>& moment) { cuda.fill(moment.view(), 1.0f); });
      graph.launch();
      CHECK(model.scored_losses() == losses);
      CHECK(gradients() == expected);
    }
  }
}

TEST_CASE("an optimizer's arithmetic is recorded, with moments on the device and paged", "[cuda]") {
  const qd::CudaContext context({.workspace_bytes = 32 << 10});
  const Cuda cuda(context);
  constexpr Index rows = 30, cols = 300;
  Matrix<float> gradient;
  put(cuda, test::normal_matrix<float>(rows, cols, 2), gradient);
  const qd::AdamWUpdate update{.lr = 0.01, .weight_decay = 0.1};
  std::vector<std::byte> expected;
  for (const bool recorded : {false, true})
    test::in_every_order([&] {
      Matrix<float> p, paged_p, m(rows, cols), v(rows, cols);
      qd::Matrix<float, qd::PinnedMemory> host_m(rows, cols), host_v(rows, cols);
      put(cuda, test::normal_matrix<float>(rows, cols, 1), p);
      put(cuda, test::normal_matrix<float>(rows, cols, 1), paged_p);
      cuda.fill(m.view(), 0.0f);
      cuda.fill(v.view(), 0.0f);
      const auto step = [&] {
        cuda.adamw(p.view(), std::as_const(gradient).view(), m.view(), v.view(), update);
        cuda.adamw_paged(paged_p.view(), std::as_const(gradient).view(), host_m.view(), host_v.view(), update);
      };
      step();
      if (recorded) {
        const CudaGraph graph(context, step);
        for (int i = 0; i < 3; ++i) graph.launch();
        cuda.synchronize();
      } else {
        for (int i = 0; i < 3; ++i) step();
      }
      const auto found = bits(cuda, p, m, v);
      if (expected.empty()) expected = found;
      CHECK(found == expected);
      CHECK(bits(cuda, paged_p) == bits(cuda, p));
    });
}

TEST_CASE("what a graph cannot repeat is refused, and the stream goes on", "[cuda]") {
  const qd::CudaContext context({.workspace_bytes = std::size_t{1} << 20});
  const Cuda cuda(context);
  Matrix<float> x(4, 64), weight;
  put(cuda, test::normal_matrix<float>(out, in, 1, 0.3), weight);
  cuda.fill(x.view(), 2.0f);
  qd::Matrix<float> host(4, 64);
  const auto code = [&](auto&& f) { return test::code_of([&] { CudaGraph(context, f); }); };
  CHECK(code([&] { cuda.synchronize(); }) == Errc::device);
  CHECK(code([&] { cuda.download(std::as_const(x).view(), host.view()); }) == Errc::device);
  CHECK(code([&] { cuda.sum_squares(x.view()); }) == Errc::device);
  CHECK(code([&] { cuda.quantize(weight.view()); }).has_value());
  CHECK(code([&] { cuda.dropout(std::as_const(x).view(), 0.5f, {}, x.view()); }) == Errc::unsupported);
  CHECK(code([&] { Matrix<float>(4, 4); }) == Errc::state_order);  // memory in the order of all streams
  Matrix<float> kept;
  CHECK(code([&] { kept = Matrix<float>(4, 4, context.memory()); }) == Errc::state_order);
  kept = {};
  CHECK_FALSE(code([&] { const Matrix<float> dropped(4, 4, context.memory()); }).has_value());
  // A layer that has not run yet would take the memory of its context.
  qd::DynamicLoRALinear<float, Cuda> layer(weight.view(), {.max_rank = 4}, {}, cuda);
  Matrix<float> input(2, in);
  CHECK(code([&] { layer.forward(input); }) == Errc::state_order);
  const auto adamw = qd::AdamW<float, Cuda>(layer.parameters(), {}, cuda);
  CHECK(code([optimizer = &const_cast<qd::AdamW<float, Cuda>&>(adamw)] { optimizer->step(); }) == Errc::device);

  CHECK_FALSE(context.recording());
  CHECK(cudaPeekAtLastError() == cudaSuccess);
  const CudaGraph graph(context, [&] { cuda.add(std::as_const(x).view(), x.view()); });
  for (int i = 0; i < 3; ++i) graph.launch();
  cuda.download(std::as_const(x).view(), host.view());
  CHECK(std::all_of(host.span().begin(), host.span().end(), [](float value) { return value == 16.0f; }));
}

}  // namespace graph_test
