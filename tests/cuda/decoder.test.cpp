// A whole transformer on the emulated device, beside the same on the CPU: losses, gradients, recipes, decoding.
#include <cmath>
#include <tuple>
#include <utility>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/cuda.hpp>
#include <qdylora/model/trainer.hpp>
#include <qdylora/model/upload.hpp>

#include "backend/harness.inc"
#include "support/catch.hpp"
#include "support/random_data.hpp"
#include "support/stream_orders.hpp"
#include "support/tiny_model.hpp"

namespace decoder_test {

namespace qd = qdylora;
using qd::Cpu, qd::Cuda, qd::Index;

namespace {

const qd::RankSet ranks{1, 2, 4, 8};

qd::DecoderConfig config_of_blocks() {  // rows of whole blocks of 64, and others
  auto config = test::tiny_config();
  config.width = 64;
  config.mlp_width = 72;
  config.heads = {.heads = 4, .kv_heads = 2, .head_dim = 16};
  return config;
}

const qd::BaseOptions nf4{.format = qd::BaseFormat::nf4, .double_quant = true, .block_size = 64};

template <class S, class Memory>
std::vector<double> numbers(const Cuda& cuda, const qd::Matrix<S, Memory>& there) {
  test::Matrix<S> here(there.rows(), there.cols());
  cuda.download(there.view(), here.view());
  return {here.span().begin(), here.span().end()};
}

double distance(const std::vector<double>& found, const std::vector<double>& expected) {
  REQUIRE(found.size() == expected.size());
  double error = 0.0, size = 0.0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    error += (found[i] - expected[i]) * (found[i] - expected[i]);
    size += expected[i] * expected[i];
  }
  return std::sqrt(error / std::max(size, 1e-300));
}

template <class T>
constexpr double limit = std::is_same_v<T, float> ? 2e-5 : 6e-2;

/// A model on the CPU, with adapters of random numbers, and the same on the device.
template <class T>
struct Twins {
  using Acc = qd::Accumulator<T>;

  Cuda cuda;
  qd::Decoder<T> here;
  qd::Decoder<T, Cuda> there;

  Twins(const std::shared_ptr<const qd::DecoderWeights<Acc>>& weights, const qd::DecoderOptions& options, const Cuda& cuda_)
      : cuda(cuda_), here(weights, options, Cpu(1)), there(qd::upload(*weights, cuda), options, cuda) {
    test::randomize_adapters(here);
    std::vector<const qd::LoRAAdapter<Acc>*> adapters;
    here.for_each_trained([&](auto& layer) { adapters.push_back(&layer.adapter()); });
    std::size_t next = 0;
    there.for_each_trained([&](auto& layer) { qd::assign(layer.adapter(), *adapters[next++], cuda); });
  }

  void check_gradients(const qd::Batch& batch, const qd::RankPlan& plan, double scale) {
    test::zero_gradients(here);
    for (const auto& p : there.parameters()) cuda.fill(p->gradient.view(), Acc{});
    here.set_ranks(plan);
    there.set_ranks(plan);
    const double loss = here.loss_and_gradient(batch, scale);
    CHECK(std::fabs(there.loss_and_gradient(batch, scale) - loss) <= limit<T> * loss);
    std::vector<double> found, expected;
    for (const auto& p : there.parameters())
      for (const double g : numbers(cuda, p->gradient)) found.push_back(g);
    for (const Acc g : test::gradients(here)) expected.push_back(static_cast<double>(g));
    CHECK(distance(found, expected) <= limit<T>);
  }
};

}  // namespace

TEMPLATE_TEST_CASE("a model has the losses and gradients on the device that it has on the CPU", "[cuda]", float, qd::bfloat16) {
  using T = TestType;
  using Acc = qd::Accumulator<T>;
  const qd::CudaContext context({.workspace_bytes = std::size_t{4} << 20});
  const Cuda cuda(context);
  struct Case {
    qd::DecoderConfig config;
    qd::BaseOptions base;
    bool biases, checkpoint;
    qd::AdapterMethod method = qd::AdapterMethod::lora;
  };
  auto falcon_of_blocks = config_of_blocks();
  falcon_of_blocks.architecture = qd::Architecture::falcon;
  for (const auto& [config, base, biases, checkpoint, method] :
       {Case{test::tiny_config(), {.format = qd::BaseFormat::float32}, true, false}, Case{config_of_blocks(), nf4, false, true},
        Case{test::tiny_falcon_config(1), {.format = qd::BaseFormat::float32}, true, false}, Case{falcon_of_blocks, nf4, false, true},
        Case{config_of_blocks(), {.format = qd::BaseFormat::bfloat16}, true, false},
        Case{config_of_blocks(), nf4, false, true, qd::AdapterMethod::houlsby},
        Case{falcon_of_blocks, nf4, false, false, qd::AdapterMethod::parallel}}) {
    const std::shared_ptr<const qd::DecoderWeights<Acc>> weights = test::tiny_weights<Acc>(config, biases, base);
    const qd::DecoderOptions options{.lora = {.max_rank = 8, .alpha = 4, .seed = 2}, .checkpoint = checkpoint, .method = method};
    Twins<T> twins(weights, options, cuda);
    auto& here = twins.here;
    auto& there = twins.there;

    const auto batch = test::random_batch(config.vocab, {5, 2, 9, 3}, 5, 1);
    for (const auto& plan : {qd::RankPlan::uniform(8), qd::RankPlan::of_runs({{1, 0}, {2, 3}, {1, 8}})}) {
      here.set_ranks(plan);
      there.set_ranks(plan);
      CHECK(distance(there.losses(batch), here.losses(batch)) <= limit<T>);
      twins.check_gradients(batch, plan, 1.0 / static_cast<double>(batch.scored()));
    }

    // A prompt each, then tokens one at a time.
    using HostCache = typename qd::Decoder<T>::Cache;
    using DeviceCache = typename qd::Decoder<T, Cuda>::Cache;
    std::vector<HostCache> host_caches;
    std::vector<DeviceCache> device_caches;
    for (int s = 0; s < 2; ++s) {
      host_caches.emplace_back(config, 8);
      device_caches.emplace_back(config, 8);
    }
    here.set_ranks(qd::RankPlan::uniform(4));
    there.set_ranks(qd::RankPlan::uniform(4));
    for (const auto& tokens : {test::random_batch(config.vocab, {4, 6}, 9), test::random_batch(config.vocab, {2, 2}, 11)}) {
      const auto expected = here.infer(tokens, host_caches);
      const auto found = numbers(cuda, there.infer(tokens, device_caches));
      CHECK(distance(found, {expected.span().begin(), expected.span().end()}) <= limit<T>);
    }
  }
}

TEMPLATE_TEST_CASE("all weights of a model have the gradients on the device that they have on the CPU", "[cuda]", float, qd::bfloat16) {
  using Acc = qd::Accumulator<TestType>;
  const qd::CudaContext context({.workspace_bytes = std::size_t{4} << 20});
  auto untied = config_of_blocks();
  untied.tied_head = false;
  for (const auto& [config, format, checkpoint] :
       {std::tuple{untied, qd::BaseFormat::float32, true}, std::tuple{test::tiny_falcon_config(1), qd::BaseFormat::float32, false},
        std::tuple{config_of_blocks(), qd::BaseFormat::bfloat16, false}}) {
    CAPTURE(static_cast<int>(config.architecture), config.tied_head, checkpoint);
    const std::shared_ptr<const qd::DecoderWeights<Acc>> weights = test::tiny_weights<Acc>(config, true, {.format = format});
    Twins<TestType> twins(weights, {.checkpoint = checkpoint, .method = qd::AdapterMethod::full}, Cuda(context));
    const auto batch = test::random_batch(config.vocab, {5, 2, 9, 3}, 5, 1);
    twins.check_gradients(batch, qd::RankPlan::uniform(1), 1.0 / static_cast<double>(batch.scored()));
  }
}

TEST_CASE("what enters blocks may wait on the host: losses and gradients are the same to the bit", "[cuda]") {
  using T = qd::bfloat16;
  const qd::CudaContext context({.workspace_bytes = std::size_t{1} << 20});
  const Cuda cuda(context);
  const auto layers = GENERATE(Index{2}, Index{3}, Index{6});
  auto config = layers == 3 ? test::tiny_falcon_config() : test::tiny_config();
  config.layers = layers;
  CAPTURE(layers, static_cast<int>(config.architecture));
  const auto weights = qd::upload(*test::tiny_weights<float>(config, false, {.format = qd::BaseFormat::float32}), cuda);
  const auto make = [&](bool offload) {
    return std::make_unique<qd::Decoder<T, Cuda>>(
        weights, qd::DecoderOptions{.lora = {.max_rank = 8, .alpha = 4, .seed = 2}, .checkpoint = true, .offload_checkpoints = offload}, cuda);
  };
  test::in_every_order([&] {
    const auto kept = make(false), offloaded = make(true);
    std::uint64_t seed = 1;
    for (const auto& p : kept->parameters()) {
      const auto values = test::normal_matrix<float>(p->value.rows(), p->value.cols(), seed++, 0.2);
      cuda.upload(values.view(), p->value.view());
      for (const auto& q : offloaded->parameters())
        if (q->name == p->name) cuda.upload(values.view(), q->value.view());
      cuda.synchronize();
    }
    for (const Index longest : {3, 2, 5}) {  // grows once, and keeps what it has in between
      const auto batch = test::random_batch(config.vocab, {longest, 3}, 5, 1);
      std::vector<std::vector<double>> found;
      std::vector<std::size_t> bytes;
      for (auto* model : {kept.get(), offloaded.get()}) {
        for (const auto& p : model->parameters()) cuda.fill(p->gradient.view(), 0.0f);
        for (int pass = 0; pass < 2; ++pass) {  // the second begins while the first may still be under way
          model->queue_loss_and_gradient(batch, 0.5);
          if (pass > 0) found.push_back(model->scored_losses());
        }
        for (const auto& p : model->parameters()) found.push_back(numbers(cuda, p->gradient));
        bytes.push_back(model->activation_bytes());
        found.push_back(model->losses(batch));
      }
      const auto half = static_cast<std::ptrdiff_t>(found.size() / 2);
      CHECK(std::equal(found.begin(), found.begin() + half, found.begin() + half, found.end()));
      const auto stream = static_cast<std::size_t>(batch.tokens() * config.width) * sizeof(T);
      CHECK(bytes[0] >= bytes[1] + static_cast<std::size_t>(layers - 2) * stream);
      if (layers == 2) CHECK(bytes[0] == bytes[1]);
    }
    CHECK(test::code_of([&] { offloaded->stream(layers); }) == qd::Errc::unsupported);
  });
  CHECK(test::code_of([&] { qd::Decoder<T, Cuda>(weights, {.offload_checkpoints = true}, cuda); }) == qd::Errc::bad_argument);
}

TEST_CASE("a pass that fails leaves what is offloaded to the next in order", "[cuda]") {
  const qd::CudaContext context({.workspace_bytes = std::size_t{1} << 20});
  const Cuda cuda(context);
  auto config = test::tiny_config();
  config.layers = 6;
  const auto weights = qd::upload(*test::tiny_weights<float>(config, false, {.format = qd::BaseFormat::float32}), cuda);
  const qd::DecoderOptions options{.lora = {.max_rank = 8, .alpha = 4, .seed = 2}, .checkpoint = true, .offload_checkpoints = true};
  qd::ResidualStreams<float, Cuda> streams(options, cuda);
  const Index rows = 5, cols = 12;
  const std::size_t count = 8;
  test::in_every_order([&] {
    const auto up = [&](float first, std::size_t last) {
      streams.begin(count, rows, cols);
      for (std::size_t i = 0; i <= last; ++i) {
        cuda.fill(streams[i], first + static_cast<float>(i));
        streams.leave(i);
      }
    };
    const auto down = [&](float first, std::size_t last) {
      for (std::size_t i = count; i-- > last;) {
        qd::Matrix<float> found(rows, cols);
        cuda.download(qd::MatrixView<const float>(streams[i]), found.view());
        for (const float x : found.span()) CHECK(x == first + static_cast<float>(i));
        cuda.fill(streams[i], -1.0f);
        streams.release(i);
      }
    };
    for (const std::size_t given_up : {std::size_t{0}, std::size_t{4}, count - 1}) {  // on the way up
      up(100.0f, given_up);
      up(200.0f, count - 1);
      down(200.0f, 0);
    }
    for (const std::size_t given_up : {std::size_t{6}, std::size_t{2}}) {  // and down
      up(300.0f, count - 1);
      down(300.0f, given_up);
      up(400.0f, count - 1);
      down(400.0f, 0);
    }
  });
}

TEST_CASE("a model in half has the CPU's gradients of a step that scores many tokens", "[cuda]") {
  // That of a logit, its probability over as many tokens, is below half's least number.
  constexpr double scored = 4096;
  const qd::CudaContext context({.workspace_bytes = std::size_t{4} << 20});
  const qd::DecoderOptions options{.lora = {.max_rank = 8, .alpha = 4, .seed = 2}};
  for (const bool blocks : {false, true}) {
    const auto config = blocks ? config_of_blocks() : test::tiny_config();
    const std::shared_ptr<const qd::DecoderWeights<float>> weights =
        test::tiny_weights<float>(config, false, blocks ? nf4 : qd::BaseOptions{.format = qd::BaseFormat::float32});
    Twins<qd::half> twins(weights, options, Cuda(context));
    const auto batch = test::random_batch(config.vocab, {5, 9}, 5, 1);
    twins.check_gradients(batch, qd::RankPlan::uniform(8), 1.0 / scored);
  }
}

TEST_CASE("recipes train on the device as on the CPU, re-ordering and ranks by row among them", "[cuda]") {
  const qd::CudaContext context({.workspace_bytes = std::size_t{4} << 20});
  const Cuda cuda(context);
  const std::shared_ptr<const qd::DecoderWeights<float>> weights = test::tiny_weights<float>(config_of_blocks(), false, nf4);
  const auto there_weights = qd::upload(*weights, cuda);
  for (const auto& [name, steps] : {std::pair("order-then-nest", 4), std::pair("qdylora-frozen", 2)}) {
    CAPTURE(name);
    auto recipe = qd::recipe(name);
    recipe.collect_steps = 2;
    const qd::TrainerOptions options{.recipe = recipe, .ranks = ranks, .steps = steps, .lr = 1e-2, .warmup_steps = 2};
    const qd::DecoderOptions decoder_options{.lora = qd::adapter_options(recipe, ranks, 8.0f, 1)};
    qd::Decoder<float> here(weights, decoder_options, Cpu(1));
    qd::Decoder<float, Cuda> there(there_weights, decoder_options, cuda);
    qd::Trainer<float> expected(here, options);
    qd::Trainer<float, Cuda> found(there, options);
    const auto held_back = [] { return test::counting_batch(17, 2, 6, 7); };
    while (!expected.done()) {
      const auto batch = test::counting_batch(17, 4, 6, 100 + static_cast<std::uint64_t>(expected.step_count()));
      const auto a = expected.step(batch);
      const auto b = found.step(batch);
      CAPTURE(expected.step_count());
      CHECK(b.rank == a.rank);
      CHECK(std::fabs(b.loss - a.loss) <= 2e-3 * a.loss);
    }
    const auto a = expected.losses_by_rank(held_back()), b = found.losses_by_rank(held_back());
    CHECK(distance(b, a) <= 5e-3);
    CHECK(found.reordered_at_end() == expected.reordered_at_end());
  }
}

}  // namespace decoder_test
