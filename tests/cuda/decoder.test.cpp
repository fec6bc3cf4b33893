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
