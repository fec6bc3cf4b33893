// A full training step of Falcon-40b's shape, adapters of rank 64 on all four linear layers of its blocks, under a cap on the memory of one
// GPU: the claim of QDyLoRA (arXiv 2402.10462), which fine-tunes Falcon-40b for ranks 1 to 64 on 32 GB.
//
//   falcon_step [--batch N] [--tokens N] [--layers N] [--moments 8|32] [--cap GIB] [--steps N] [--rank N] [--offload 1]
//
// Weights are random, made and quantized on the device block by block; tokens are random. Each step draws its rank, or has that of --rank.
// What the cap leaves out of the device's memory, of which the driver's context is a part, is taken away before the model is made. A JSON
// line on stdout; exit 77 without a GPU, 1 where memory does not suffice.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <qdylora/cuda.hpp>
#include <qdylora/model/decoder.hpp>
#include <qdylora/model/memory_plan.hpp>
#include <qdylora/nn/ranks.hpp>
#include <qdylora/optim/adamw.hpp>

#include "random.cuh"
#include "timing.hpp"

namespace {

namespace qd = qdylora;
using qd::bfloat16, qd::Cuda, qd::Index;
using Weights = qd::DecoderWeights<float, qd::DeviceMemory>;
template <class T>
using Matrix = qd::Matrix<T, qd::DeviceMemory>;

struct Options {
  Index batch = 4, tokens = 512, layers = 60, moments = 32, cap = 32, steps = 6, rank = 0, offload = 0;  // rank 0: drawn for every step
};

qd::DecoderConfig falcon_40b(Index layers) {
  qd::DecoderConfig c;
  c.architecture = qd::Architecture::falcon;
  c.vocab = 65024;
  c.width = 8192;
  c.mlp_width = 32768;
  c.layers = layers;
  c.heads = {.heads = 128, .kv_heads = 8, .head_dim = 64};
  c.context = 2048;
  return c;
}

std::shared_ptr<const Weights> random_weights(const Cuda& cuda, const qd::DecoderConfig& c) {
  const auto& context = cuda.context();
  std::uint64_t seed = 0;
  const auto random = [&](Index rows, Index cols) {
    Matrix<float> w(rows, cols);
    bench::fill_random(context, w.view(), seed += 0x100000000ull, 0.02f);
    return w;
  };
  const auto norm = [&]() -> qd::NormWeights<float, qd::DeviceMemory> {
    Matrix<float> weight(1, c.width), bias(1, c.width);
    cuda.fill(weight.view(), 1.0f);
    cuda.fill(bias.view(), 0.0f);
    return {std::move(weight), std::move(bias)};
  };
  auto weights = std::make_shared<Weights>();
  weights->config = c;
  weights->embedding = cuda.quantize<qd::INT8, qd::Float32Scales>(random(c.vocab, c.width).view(), {.block_size = 32});
  weights->final_norm = norm();
  const auto shapes = c.linears();
  for (Index i = 0; i < c.layers; ++i) {
    auto block = std::make_shared<qd::BlockWeights<float, qd::DeviceMemory>>(c);
    block->attention_norm = norm();
    block->mlp_norm = norm();
    for (std::size_t p = 0; p < shapes.size(); ++p)
      block->linear[p] = std::make_shared<const qd::WeightFor<qd::AnyFormat, qd::DeviceMemory>>(
          cuda.quantize<qd::NF4, qd::DoubleQuant<>>(random(shapes[p].out, shapes[p].in).view()));
    weights->blocks.push_back(std::move(block));
  }
  return weights;
}

qd::Batch random_batch(const Options& o, Index vocab, qd::Rng& rng) {
  qd::Batch batch;
  for (Index s = 0; s < o.batch; ++s) {
    std::vector<std::int32_t> ids(static_cast<std::size_t>(o.tokens + 1));
    for (auto& id : ids) id = static_cast<std::int32_t>(rng.below(static_cast<std::uint32_t>(vocab)));
    batch.add(ids);
  }
  return batch;
}

template <class Optimizer>
void run(const Options& o, const qd::CudaContext& context, const qd::MemoryPlan& plan) {
  const Cuda cuda(context);
  const bench::Stopwatch watch(context);
  const auto config = falcon_40b(o.layers);
  const auto weights = random_weights(cuda, config);
  cudaMemPool_t pool = nullptr;
  std::uint64_t peak = 0, reserved = 0;
  QDYLORA_CUDA_TRY(cudaDeviceGetDefaultMemPool(&pool, context.device()));
  QDYLORA_CUDA_TRY(cudaMemPoolSetAttribute(pool, cudaMemPoolAttrUsedMemHigh, &peak));  // from here on: what making weights took is no step's
  qd::Decoder<bfloat16, Cuda> model(weights, {.lora = {.max_rank = 64, .alpha = 16}, .checkpoint = true, .offload_checkpoints = o.offload > 0}, cuda);
  Optimizer optimizer(model.parameters(), {.lr = 1e-4, .max_gradient_norm = 0.3}, cuda);
  qd::Rng rng(1);
  qd::RankSampler ranks(qd::RankSet{1, 2, 4, 8, 16, 32, 64}, rng);
  model.set_training(true);
  std::vector<double> seconds;
  std::string drawn;
  double loss = 0.0;
  for (Index step = 0; step < o.steps; ++step) {
    const auto batch = random_batch(o, config.vocab, rng);
    const Index fixed = o.rank > 0 ? o.rank : step == 0 ? 64 : 0;  // the largest is among those that are drawn
    const auto plan_of_ranks = fixed > 0 ? qd::RankPlan::uniform(fixed) : ranks.next(batch.tokens());
    model.set_ranks(plan_of_ranks);
    seconds.push_back(1e-6 * watch.measure([&] {
      optimizer.zero_grad();
      loss = model.loss_and_gradient(batch, 1.0 / static_cast<double>(batch.scored())) / static_cast<double>(batch.scored());
      optimizer.step();
    }));
    drawn += (drawn.empty() ? "" : ", ") + std::to_string(plan_of_ranks.max_rank());
  }
  std::sort(seconds.begin(), seconds.end());
  QDYLORA_CUDA_TRY(cudaMemPoolGetAttribute(pool, cudaMemPoolAttrUsedMemHigh, &peak));
  QDYLORA_CUDA_TRY(cudaMemPoolGetAttribute(pool, cudaMemPoolAttrReservedMemHigh, &reserved));
  std::printf(
      "{\"falcon_step\": {\"gpu\": \"%s\", \"layers\": %lld, \"batch\": %lld, \"tokens\": %lld, \"moments\": %lld, \"offload\": %lld, "
      "\"cap_gib\": %lld, \"ranks\": [%s], \"loss\": %s, \"median_s\": %.4f, \"planned_gb\": %.3f, \"peak_gb\": %.3f, \"reserved_gb\": %.3f}}\n",
      context.properties().name, static_cast<long long>(o.layers), static_cast<long long>(o.batch), static_cast<long long>(o.tokens),
      static_cast<long long>(o.moments), static_cast<long long>(o.offload), static_cast<long long>(o.cap), drawn.c_str(),
      std::isfinite(loss) ? std::to_string(loss).c_str() : "null", seconds[seconds.size() / 2],
      1e-9 * static_cast<double>(plan.total()), 1e-9 * static_cast<double>(peak), 1e-9 * static_cast<double>(reserved));
}

Options parse(int argc, char** argv) {
  Options o;
  const struct {
    const char* name;
    Index* value;
  } known[] = {{"--batch", &o.batch},     {"--tokens", &o.tokens}, {"--layers", &o.layers},
               {"--moments", &o.moments}, {"--cap", &o.cap},       {"--steps", &o.steps},   {"--rank", &o.rank},
               {"--offload", &o.offload}};
  for (int i = 1; i < argc; ++i) {
    const auto* option = std::find_if(std::begin(known), std::end(known), [&](const auto& k) { return std::strcmp(k.name, argv[i]) == 0; });
    if (option == std::end(known) || i + 1 >= argc || (*option->value = std::atoll(argv[++i])) < 1) {
      std::fprintf(stderr,
                   "falcon_step: expected one of --batch, --tokens, --layers, --moments, --cap, --steps, --rank, --offload and a number, "
                   "found '%s'\n",
                   argv[i]);
      std::exit(2);
    }
  }
  return o;
}

}  // namespace

int main(int argc, char** argv) {
  const Options o = parse(argc, argv);
  try {
    if (!bench::device_there()) return 77;
    const qd::CudaContext context;
    const std::size_t cap = static_cast<std::size_t>(o.cap) << 30;
    std::size_t free = 0, total = 0;
    QDYLORA_CUDA_TRY(cudaMemGetInfo(&free, &total));
    void* beyond_cap = nullptr;
    if (total > cap) QDYLORA_CUDA_TRY(cudaMalloc(&beyond_cap, total - cap));
    const auto plan = qd::memory_plan<bfloat16>(falcon_40b(o.layers), {.coded_tables = true,
                                                                       .max_rank = 64,
                                                                       .checkpoint = true,
                                                                       .offload_checkpoints = o.offload > 0,
                                                                       .moments_in_8_bits = o.moments == 8,
                                                                       .tokens = o.batch * o.tokens,
                                                                       .scored = o.batch * o.tokens,
                                                                       .longest = o.tokens,
                                                                       .device = true,
                                                                       .backend_bytes = qd::CudaOptions{}.context_bytes()});
    std::fprintf(stderr, "%s", plan.to_text().c_str());
    qd::expect_room(plan, Cuda(context));
    if (o.moments == 8) run<qd::AdamW8bit<float, Cuda>>(o, context, plan);
    else run<qd::AdamW<float, Cuda>>(o, context, plan);
    QDYLORA_CUDA_TRY(cudaFree(beyond_cap));
  } catch (const qd::Error& error) {
    std::fprintf(stderr, "falcon_step: %s\n", error.what());
    return 1;
  }
}
