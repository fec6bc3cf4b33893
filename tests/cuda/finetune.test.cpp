// The program finetune on the emulated device, beside the same on the CPU: reports, adapters, resuming, memory.
#include <cmath>
#include <filesystem>
#include <optional>
#include <string>
#include <utility>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/cuda.hpp>
#include <qdylora/model/load_hugging_face.hpp>

#include "common/cpu_device.hpp"
#include "common/evaluate.hpp"
#include "common/finetune.hpp"
#include "cuda/cuda_device.cuh"
#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/tiny_model.hpp"

namespace finetune_test {

namespace qd = qdylora;
namespace examples = qdylora::examples;
using qd::Index;

namespace {

qd::DecoderConfig config() {
  auto c = test::tiny_config();
  c.width = 64;
  c.heads = {.heads = 4, .kv_heads = 2, .head_dim = 16};
  return c;
}

examples::OpenModel open(qd::BaseFormat format = qd::BaseFormat::nf4) {
  examples::OpenModel model;
  model.name = "tiny";
  model.config = config();
  model.read = [=](const qd::BaseOptions&) { return test::tiny_weights<float>(config(), false, {.format = format}); };
  return model;
}

std::vector<examples::Sample> samples(Index count, std::uint64_t seed) {
  std::vector<examples::Sample> all;
  for (Index i = 0; i < count; ++i) {
    const auto start = static_cast<Index>(seed) + i;
    examples::Sample sample{.ids = {}, .prompt_length = 2};
    for (Index t = 0; t < 7; ++t) sample.ids.push_back(static_cast<std::int32_t>((start + t * (1 + i % 2)) % config().vocab));
    all.push_back(std::move(sample));
  }
  return all;
}

examples::FinetuneData data(Index train = 6, Index validation = 2) {
  examples::FinetuneData all;
  all.train = samples(train, 0);
  all.validation_samples = samples(validation, 40);
  return all;
}

/// A run's report.
template <class Device>
qd::Json report(const examples::FinetuneOptions& options, examples::OpenModel model, const examples::FinetuneData& data, const Device& device) {
  REQUIRE(examples::finetune<float>(options, model, data, device) == 0);
  return qd::read_json(std::filesystem::path(options.out) / "report.json");
}

void check_step_losses(const qd::Json& found, const qd::Json& expected) {
  const auto &losses = found.at("step_losses"), &others = expected.at("step_losses");
  REQUIRE(losses.size() == 4);
  for (std::size_t i = 0; i < 4; ++i) CHECK(losses[i].get<double>() == Approx(others[i].get<double>()).epsilon(2e-3));
}

/// The plan beside what the device's pool has held; `filled` by a run that did all that was planned.
void check_plan(const qd::Json& report, bool filled = true) {
  const auto planned = report.at("memory_plan").at("at most at once").get<double>(), peak = report.at("peak_memory_bytes").get<double>();
  const auto workspace = static_cast<double>(qd::CudaOptions{}.context_bytes());
  CHECK(peak <= planned);
  if (filled) CHECK(peak - workspace >= 0.95 * (planned - workspace));
}

double planned(const qd::Json& report, const char* part) { return report.at("memory_plan").at(part).get<double>(); }

/// The reports of two runs on the device, the second with what `place` is of in the host's memory: they have the same losses and adapter.
template <class Open>
std::pair<qd::Json, qd::Json> without_and_on_host(examples::FinetuneOptions options, std::string examples::FinetuneOptions::*place,
                                                  const Open& open_model) {
  const test::TemporaryFolder folder;
  options.ranks = "2,8";
  options.steps = 2;
  options.batch = 2;
  options.lr = 1e-2;
  options.device = "cuda";
  options.base = "bfloat16";
  const auto run = [&](const std::string& where) {
    options.*place = where;
    options.out = (folder / (where + "run")).string();
    return report(options, open_model(), data(4, 1), examples::CudaDevice());
  };
  auto expected = run(""), found = run("host");
  CHECK(found.at("step_losses") == expected.at("step_losses"));
  CHECK(test::read_file(folder / "hostrun/adapter/adapter_model.safetensors") ==
        test::read_file(folder / "run/adapter/adapter_model.safetensors"));
  return {std::move(expected), std::move(found)};
}

}  // namespace

TEST_CASE("finetune and evaluate on the device do what they do on the CPU", "[cuda]") {
  const test::TemporaryFolder folder;
  examples::FinetuneOptions options;
  options.ranks = "1,2,8";
  options.recipe_name = "order-then-nest";
  options.steps = 4;
  options.batch = 2;
  options.lr = 1e-2;
  options.save_every = 2;
  options.dora = GENERATE(false, true);
  options.dropout = options.dora ? 0.1f : 0.0f;
  CAPTURE(options.dora);

  const examples::CpuDevice cpu(1);
  options.out = (folder / "cpu").string();
  const auto expected = report(options, open(), data(), cpu);

  options.out = (folder / "gpu").string();
  options.device = "cuda";
  const examples::CudaDevice gpu;
  for (const bool resumed : {false, true}) {  // the second time there is nothing left to do but to evaluate
    CAPTURE(resumed);
    options.resume = resumed;
    const auto found = report(options, open(), data(), gpu);
    CHECK(found.at("device") == "cuda");
    check_step_losses(found, expected);
    for (std::size_t i = 0; i < 4; ++i)
      CHECK(found.at("ranks")[i].at("loss").get<double>() == Approx(expected.at("ranks")[i].at("loss").get<double>()).epsilon(5e-3));
    check_plan(found);
  }

  // The adapter that was saved, at a lower rank.
  examples::EvaluateOptions asked;
  asked.adapter = (folder / "gpu" / "adapter").string();
  const auto adapter = examples::open_adapter(asked.adapter);
  asked.ids = "3,4,5,6";
  asked.rank = 2;
  auto model = open();
  asked.logits = (folder / "gpu.safetensors").string();
  REQUIRE(examples::evaluate<float>(asked, adapter, model, gpu) == 0);
  model = open();
  asked.logits = (folder / "cpu.safetensors").string();
  REQUIRE(examples::evaluate<float>(asked, adapter, model, cpu) == 0);
  const auto here = qd::SafetensorsFile(folder / "cpu.safetensors").matrix("logits");
  const auto there = qd::SafetensorsFile(folder / "gpu.safetensors").matrix("logits");
  for (Index i = 0; i < here.rows(); ++i)
    for (Index j = 0; j < here.cols(); ++j) CHECK(std::fabs(there(i, j) - here(i, j)) <= 1e-3f);
}

TEST_CASE("all weights train on the device as on the CPU", "[cuda]") {
  const test::TemporaryFolder folder;
  examples::FinetuneOptions options;
  options.toy = true;
  options.method = "full";
  options.steps = 4;
  options.batch = 2;
  options.lr = 1e-2;
  options.save_every = 2;
  const auto format = GENERATE(qd::BaseFormat::float32, qd::BaseFormat::bfloat16);
  options.base = std::string(qd::name(format));
  CAPTURE(options.base);

  options.out = (folder / "cpu").string();
  const auto expected = report(options, open(format), data(), examples::CpuDevice(1));

  options.out = (folder / "gpu").string();
  options.device = "cuda";
  for (const bool resumed : {false, true}) {  // the second time from what the run has saved
    CAPTURE(resumed);
    options.resume = resumed;
    const auto found = report(options, open(format), data(), examples::CudaDevice());
    check_step_losses(found, expected);
    check_plan(found, !resumed);  // the second run has no step left to take
  }

  // The models that were saved.
  const auto saved = [&](const char* device) { return qd::load_hugging_face(folder / device / "model", {.format = format}); };
  qd::Decoder<float> here(saved("cpu"), {}), there(saved("gpu"), {}), before(open(format).read({}), {});
  const auto batch = test::random_batch(config().vocab, {9, 4}, 5);
  const double loss = test::sum_of(here.losses(batch));
  CHECK(test::sum_of(there.losses(batch)) == Approx(loss).epsilon(2e-3));
  CHECK(std::fabs(test::sum_of(before.losses(batch)) - loss) > 2e-2 * loss);
}

TEST_CASE("scales of planes of signs train on the device as on the CPU, and go from one to the other", "[cuda]") {
  const test::TemporaryFolder folder;
  examples::FinetuneOptions options;
  options.toy = true;
  options.method = "alpha";
  options.planes = 3;
  options.group_size = 16;
  options.trained_planes = 2;
  options.steps = 4;
  options.batch = 2;
  options.lr = 1e-2;
  options.save_every = 2;
  const auto coded = [](const qd::BinaryCodeOptions& code) {
    auto model = open();
    model.read = [=](const qd::BaseOptions&) { return test::tiny_weights<float>(config(), false, {.binary = code}); };
    return model;
  };
  const qd::BinaryCodeOptions code{.planes = 3, .group_size = 16};

  options.out = (folder / "cpu").string();
  const auto expected = report(options, coded(code), data(), examples::CpuDevice(1));
  options.out = (folder / "gpu").string();
  options.device = "cuda";
  for (const bool resumed : {false, true}) {
    CAPTURE(resumed);
    options.resume = resumed;
    const auto found = report(options, coded(code), data(), examples::CudaDevice());
    check_step_losses(found, expected);
    check_plan(found, !resumed);
  }

  // The device's scales are the CPU's, and give the same logits on either.
  examples::EvaluateOptions asked;
  asked.adapter = (folder / "gpu" / "adapter").string();
  const auto adapter = examples::open_adapter(asked.adapter);
  REQUIRE(adapter.alpha);
  asked.ids = "3,4,5,6";
  const auto logits = [&](const char* name, const auto& device) {
    auto model = coded(code);
    asked.logits = (folder / name).string();
    REQUIRE(examples::evaluate<float>(asked, adapter, model, device) == 0);
    return qd::SafetensorsFile(asked.logits).matrix("logits");
  };
  const auto here = logits("cpu.safetensors", examples::CpuDevice(1)), there = logits("gpu.safetensors", examples::CudaDevice());
  for (Index i = 0; i < here.rows(); ++i)
    for (Index j = 0; j < here.cols(); ++j) CHECK(std::fabs(there(i, j) - here(i, j)) <= 1e-3f);
}

TEST_CASE("moments in the host's memory change no bit of a run, and are planned there", "[cuda]") {
  examples::FinetuneOptions options;
  options.recipe_name = "order-then-nest";
  const auto [expected, found] = without_and_on_host(options, &examples::FinetuneOptions::paged, [] { return open(qd::BaseFormat::bfloat16); });
  CHECK(planned(found, "at most at once") == planned(expected, "at most at once") - planned(found, "moments"));
  check_plan(found);
}

TEST_CASE("checkpoints in the host's memory change no bit of a run, and are planned there", "[cuda]") {
  examples::FinetuneOptions options;
  options.recipe_name = "qdylora";
  options.checkpoint = true;
  const auto [expected, found] = without_and_on_host(options, &examples::FinetuneOptions::offload, [] {
    auto deep = config();
    deep.layers = 5;
    auto model = open();
    model.config = deep;
    model.read = [=](const qd::BaseOptions&) { return test::tiny_weights<float>(deep, false, {.format = qd::BaseFormat::bfloat16}); };
    return model;
  });
  CHECK(planned(found, "checkpoints") == planned(expected, "checkpoints") / 2);  // three of six streams
  CHECK(planned(found, "offloaded") == planned(found, "checkpoints"));
  check_plan(expected);
  check_plan(found);
}

TEST_CASE("half trains on the device as on the CPU, by a loss scale that leaves its range at times", "[cuda]") {
  auto recipe = qd::recipe("order-then-nest");
  recipe.collect_steps = 2;
  const qd::RankSet ranks{1, 2, 8};
  const qd::TrainerOptions options{.recipe = recipe,
                                   .ranks = ranks,
                                   .steps = 4,
                                   .lr = 1e-2,
                                   .warmup_steps = 2,
                                   .seed = 5,
                                   .loss_scale = {.initial = 0x1p18, .growth_interval = 1}};
  const auto weights = test::tiny_weights<float>(config(), false, {.format = qd::BaseFormat::nf4});
  const qd::DecoderOptions with{.lora = qd::adapter_options(recipe, ranks, 16.0f, 3)};
  const qd::CudaContext context;
  const qd::Cuda cuda(context);
  qd::Decoder<qd::half> here(weights, with, qd::Cpu(1));
  qd::Decoder<qd::half, qd::Cuda> there(qd::upload(*weights, cuda), with, cuda);
  qd::Trainer<qd::half> expected(here, options);
  qd::Trainer<qd::half, qd::Cuda> found(there, options);
  int repeats = 0;
  while (!expected.done()) {
    const auto batch = test::counting_batch(config().vocab, 2, 6, 70 + static_cast<std::uint64_t>(expected.step_count()));
    const auto a = expected.step(batch);
    const auto b = found.step(batch);
    CAPTURE(expected.step_count());
    CHECK(b.loss == Approx(a.loss).epsilon(1e-2));
    CHECK(b.gradient_norm == Approx(a.gradient_norm).epsilon(5e-2));
    CHECK_FALSE(b.skipped);
    repeats += b.repeats;
  }
  CHECK(repeats > 2);  // to find the scale, and to try twice of it
  CHECK(found.skipped_steps() == 0);
}

TEST_CASE("finetune on a device with too little memory says so, with the plan, before it reads the model", "[cuda]") {
  const test::TemporaryFolder folder;
  examples::FinetuneOptions options;
  options.ranks = "1,8";
  options.steps = 1;
  options.batch = 2;
  options.out = (folder / "gpu").string();
  options.device = "cuda";
  const examples::CudaDevice gpu;
  auto model = open();
  model.read = [](const qd::BaseOptions&) -> decltype(test::tiny_weights<float>(config(), false)) {
    throw std::logic_error("the model was read");
  };
  auto& memory = test::emulator::global_memory();
  struct Restored {
    std::size_t total = test::emulator::global_memory().total();
    ~Restored() { test::emulator::global_memory().set_total(total); }
  } restored;
  memory.set_total(memory.used() + (1 << 16));
  const auto error = test::error_of([&] { examples::finetune<float>(options, model, data(), gpu); });
  REQUIRE(error);
  CHECK(error->code() == qd::Errc::memory);
  const std::string text = error->what();
  CHECK(text.find("1 MB are free. The plan:\n") != std::string::npos);
  CHECK(text.find("their gradients") != std::string::npos);
  memory.set_total(restored.total);
  CHECK_THROWS_AS(examples::finetune<float>(options, model, data(), gpu), std::logic_error);  // there is room
}

}  // namespace finetune_test
