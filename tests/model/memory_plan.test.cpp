// The memory plan against what a counting memory resource sees, part by part, and against the arithmetic of published models.
#include <optional>

#include <qdylora/model/generate.hpp>
#include <qdylora/model/memory_plan.hpp>
#include <qdylora/model/published_shapes.hpp>
#include <qdylora/model/trainer.hpp>
#include <qdylora/model/upload.hpp>
#include <qdylora/optim/lion.hpp>

#include "support/catch.hpp"
#include "support/counted_memory.hpp"
#include "support/files.hpp"
#include "support/tiny_model.hpp"

namespace memory_plan_test {

using namespace qdylora;
using test::counted_bytes;
using test::CountedDevice;
using test::CountedMemory;

namespace {

/// Bytes that are live after f and were not before.
template <class F>
std::size_t grown(F&& f) {
  const std::size_t before = counted_bytes().live;
  f();
  return counted_bytes().live - before;
}

struct Case {
  BaseOptions base = {};
  bool tied = true, biases = false, checkpoint = false, eight_bits = false;
  float dropout = 0.0f;
  Architecture architecture = Architecture::llama;
  bool shared_norm = false;
  bool patterns = false;
};

template <class Optimizer>
void expect_moments(const Decoder<float, CountedDevice>& model, const CountedDevice& device, std::size_t planned) {
  std::optional<Optimizer> optimizer;
  CHECK(grown([&] { optimizer.emplace(model.parameters(), typename Optimizer::Options{}, device); }) == planned);
}

}  // namespace

TEST_CASE("A memory plan is what memory is asked for, byte by byte", "[memory_plan]") {
  const Case cases[] = {{},
                        {.base = {.format = BaseFormat::nf4, .double_quant = false}, .tied = false},
                        {.base = {.format = BaseFormat::fp8, .block_size = 128}, .biases = true, .checkpoint = true},
                        {.base = {.format = BaseFormat::int4}, .checkpoint = true, .eight_bits = true, .dropout = 0.1f},
                        {.base = {.format = BaseFormat::float32}, .dropout = 0.1f},
                        {.base = {.format = BaseFormat::bfloat16}, .tied = false, .biases = true},
                        {.biases = true, .dropout = 0.1f, .architecture = Architecture::falcon},
                        {.checkpoint = true, .architecture = Architecture::falcon, .shared_norm = true},
                        {.patterns = true},
                        {.checkpoint = true, .eight_bits = true, .dropout = 0.1f, .patterns = true}};
  for (const Case& c : cases) {
    auto config = test::small_config();
    config.tied_head = c.tied;
    config.architecture = c.architecture;
    config.shared_norm = c.shared_norm;
    CAPTURE(static_cast<int>(c.architecture), c.shared_norm);
    CAPTURE(std::string(name(c.base.format)), c.tied, c.biases, c.checkpoint, c.dropout, c.patterns);
    const auto host_weights = test::tiny_weights<float>(config, c.biases, c.base);
    const auto batch = test::random_batch(config.vocab, {33, 40, 40, 40}, 5, 7);
    auto shape = model_shape(config);
    if (c.biases)
      for (const auto& linear : shape.linears) shape.biases += linear.out;
    MemoryOptions options;
    options.base = c.base;
    options.max_rank = 48;
    options.dropout = c.dropout > 0.0f;
    options.checkpoint = c.checkpoint;
    options.moments_in_8_bits = c.eight_bits;
    options.tokens = batch.tokens();
    options.scored = batch.scored();
    options.longest = 39;  // inputs of the longest text
    options.device = true;
    DecoderOptions decoder_options{.lora = {.max_rank = options.max_rank, .dropout = c.dropout}, .checkpoint = c.checkpoint};
    if (c.patterns) {
      for (const auto& [pattern, rank] : {std::pair("q_proj", 5), std::pair("layers.0.mlp.up_proj", 7), std::pair("down_proj", 1)})
        decoder_options.patterns.rank.add(pattern, rank);
      options.ranks = layer_ranks(decoder_options, config);
    }
    REQUIRE(options.scored > head_chunk(false));
    REQUIRE(options.scored < head_chunk(true));  // else the chunk is a little less than planned
    const auto plan = memory_plan<float>(shape, options);

    const CountedDevice device;
    std::shared_ptr<const DecoderWeights<float, CountedMemory>> weights;
    const auto bias_copies = static_cast<std::size_t>(config.layers * shape.biases) * sizeof(float);
    const auto frozen = plan.base_codes + plan.block_scales + plan.nested_scales + plan.tables + plan.norms;
    CHECK(grown([&] { weights = upload(*host_weights, device); }) == frozen - bias_copies);
    CHECK(weights->table_bytes() == plan.tables);
    CHECK(plan.staging == frozen);

    std::optional<Decoder<float, CountedDevice>> model;
    CHECK(grown([&] { model.emplace(weights, decoder_options, device); }) ==
          plan.adapters + plan.gradients + bias_copies);
    if (c.eight_bits) expect_moments<AdamW8bit<float, CountedDevice>>(*model, device, plan.moments);
    else expect_moments<AdamW<float, CountedDevice>>(*model, device, plan.moments);

    model->set_training(true);
    const std::size_t before = counted_bytes().live;
    counted_bytes().peak = before;
    model->loss_and_gradient(batch, 1.0);
    CHECK(counted_bytes().peak - before == plan.checkpoints + plan.activations + plan.workspace + plan.logits);
    // Again, there is nothing more to allocate but what is given back.
    const std::size_t after = counted_bytes().live;
    model->loss_and_gradient(batch, 1.0);
    CHECK(counted_bytes().live == after);
  }
}

TEST_CASE("A memory plan of forward passes and of texts", "[memory_plan]") {
  const auto config = test::small_config();
  const auto host_weights = test::tiny_weights<float>(config);
  const CountedDevice device;
  const auto weights = upload(*host_weights, device);
  Decoder<float, CountedDevice> model(weights, {.lora = {.max_rank = 8}}, device);
  const auto batch = test::random_batch(config.vocab, {21, 30}, 5);
  MemoryOptions options;
  options.training = false;
  options.max_rank = 8;
  options.forward_tokens = batch.tokens();
  options.forward_scored = batch.scored();
  options.longest = 29;
  options.device = true;
  auto plan = memory_plan<float>(config, options);
  CHECK(plan.moments == 0);
  const std::size_t before = counted_bytes().live;
  counted_bytes().peak = before;
  for (int pass = 0; pass < 2; ++pass) model.losses(batch);  // the second has the head's buffers beside what the blocks give back
  CHECK(counted_bytes().peak - before == plan.checkpoints + plan.activations + plan.workspace + plan.logits);

  options.sequences = 3;
  options.cache_rows = 40;
  plan = memory_plan<float>(config, options);
  std::vector<KVCache<float, CountedMemory>> caches;
  const auto logits = static_cast<std::size_t>(3 * config.vocab) * sizeof(float);
  CHECK(grown([&] {
          for (int i = 0; i < 3; ++i) caches.emplace_back(config, 40);
        }) == plan.caches - logits);
  std::size_t sum = 0;
  for (const auto& part : plan.parts()) sum += part.bytes;
  CHECK(plan.total() <= sum);

  // Generating holds caches and a pass over the prompts at once.
  caches.clear();
  const std::vector<std::vector<std::int32_t>> prompts(3, std::vector<std::int32_t>(12, 1));
  options.forward_tokens = std::max<Index>(options.forward_tokens, 36);
  options.longest = std::max<Index>(options.longest, 40);
  plan = memory_plan<float>(config, options);
  counted_bytes().peak = before;
  generate(model, std::span(prompts), RankPlan::uniform(model.options().lora.max_rank), {.max_tokens = 28});
  CHECK(counted_bytes().peak - before <= plan.phases() + plan.workspace + plan.logits);
  CHECK(counted_bytes().peak - before > plan.caches);
}

TEST_CASE("A memory plan of a recipe: second moments while they are gathered, a snapshot while it measures", "[memory_plan]") {
  const auto config = test::tiny_config();
  const auto host_weights = test::tiny_weights<float>(config);
  const CountedDevice device;
  const auto weights = upload(*host_weights, device);
  Decoder<float, CountedDevice> model(weights, {.lora = {.max_rank = 4}}, device);
  TrainerOptions trainer_options;
  trainer_options.ranks = RankSet{1, 2, 4};
  trainer_options.steps = 8;
  Trainer<float, CountedDevice> trainer(model, trainer_options);
  const auto batch = test::counting_batch(config.vocab, 4, 12, 3);
  trainer.hold_back(test::counting_batch(config.vocab, 4, 12, 4));

  MemoryOptions options;
  options.base.format = BaseFormat::float32;
  options.max_rank = 4;
  options.tokens = options.forward_tokens = batch.tokens();
  options.scored = options.forward_scored = batch.scored();
  options.longest = 11;
  options.device = true;
  options.follow(trainer_options.recipe);
  CHECK((options.second_moments && options.snapshot));
  const auto plan = memory_plan<float>(config, options);
  counted_bytes().peak = 0;
  while (!trainer.done()) trainer.step(batch);
  CHECK(counted_bytes().peak <= plan.total());
  // Snapshot and second moments live at the same time, beside a training step's activations, but not beside what a pass gives back.
  const auto passing = static_cast<std::size_t>(batch.tokens() * 2 * 4) * sizeof(float) +
                       static_cast<std::size_t>(batch.scored() * config.width) * sizeof(float);
  CHECK(counted_bytes().peak + passing >= plan.total());

  options.follow(recipe("qlora"));
  CHECK(memory_plan<float>(config, options).reordering == 0);
}

TEST_CASE("A memory plan of one of several workers", "[memory_plan]") {
  const auto config = test::tiny_config();
  const auto host_weights = test::tiny_weights<float>(config);
  const auto batch = test::counting_batch(config.vocab, 4, 12, 3);
  const CountedDevice device;
  const auto weights = upload(*host_weights, device);
  for (const char* name : {"qlora", "order-then-nest"}) {  // the second re-orders by second moments, which are more than gradients here
    CAPTURE(name);
    TrainerOptions trained{.recipe = recipe(name), .ranks = RankSet{48}, .steps = 4};
    trained.recipe.collect_steps = 1;
    std::size_t live[2];
    for (const bool together : {false, true}) {
      Decoder<float, CountedDevice> model(weights, {.lora = {.max_rank = 48}}, device);
      Trainer<float, CountedDevice> trainer(model, trained);
      if (together) trainer.join(Workers<float, CountedMemory>(0, 2, [](std::span<float>) {}));
      while (!trainer.done()) trainer.step(batch);
      live[together] = counted_bytes().live;
    }
    MemoryOptions options;
    options.base.format = BaseFormat::float32;
    options.max_rank = 48;
    options.tokens = batch.tokens();
    options.scored = batch.scored();
    options.workers = true;
    options.follow(trained.recipe);
    const auto plan = memory_plan<float>(config, options);
    CHECK(live[1] - live[0] == plan.sums);
    CHECK((plan.sums > 2 * plan.gradients) == options.second_moments);
    options.workers = false;
    CHECK(memory_plan<float>(config, options).total() == plan.total() - plan.sums);
  }
}

TEST_CASE("A memory plan with magnitudes", "[memory_plan]") {
  auto config = test::small_config();
  config.mlp_width = 4200;  // magnitudes of the perceptron have moments in 8 bits
  const auto weights = test::tiny_weights<float>(config);
  const auto batch = test::random_batch(config.vocab, {21, 40, 3}, 5, 7);
  MemoryOptions options;
  options.base.format = BaseFormat::float32;
  options.max_rank = 4;
  options.moments_in_8_bits = true;
  options.tokens = batch.tokens();
  options.scored = batch.scored();
  options.longest = 39;
  std::size_t measured[2], planned[2], workspace[2];
  for (const bool dora : {false, true}) {
    CAPTURE(dora);
    options.dora_ranks = dora ? 3 : 0;
    const auto plan = memory_plan<float>(config, options);
    Decoder<float> model(weights, {.lora = {.max_rank = 4, .dora = dora}});
    std::size_t values = 0;
    for (const auto& p : model.parameters()) values += p->value.capacity_bytes();
    CHECK(plan.adapters == values);
    CHECK(plan.gradients == values);
    CHECK(plan.moments == AdamW8bit<float>(model.parameters()).bytes());
    model.loss_and_gradient(batch, 1.0);
    measured[dora] = model.activation_bytes();
    planned[dora] = plan.checkpoints + plan.activations;
    workspace[dora] = plan.workspace;
  }
  CHECK(planned[1] - planned[0] == measured[1] - measured[0]);
  // Norms of three ranks in training and beside it, the base's, and a gradient scaled at the widest layer.
  const auto outputs = static_cast<std::size_t>(config.layers * model_shape(config).outputs());
  CHECK(workspace[1] - workspace[0] >= outputs * 7 * sizeof(float));
  CHECK(workspace[1] - workspace[0] <= (outputs * 7 + static_cast<std::size_t>(batch.tokens() * config.mlp_width)) * sizeof(float));
}

TEST_CASE("A memory plan with biases that train, and one with checkpoints in files", "[memory_plan]") {
  auto config = test::small_config();
  config.layers = 6;
  const auto weights = test::tiny_weights<float>(config, true);
  const auto batch = test::random_batch(config.vocab, {21, 40, 3}, 5, 7);
  auto shape = model_shape(config);
  for (const auto& linear : shape.linears) shape.biases += linear.out;
  MemoryOptions options;
  options.base.format = BaseFormat::float32;
  options.max_rank = 4;
  options.tokens = batch.tokens();
  options.scored = batch.scored();
  options.longest = 39;
  options.checkpoint = true;
  for (const bool eight_bits : {false, true}) {
    options.trained_biases = true;
    options.moments_in_8_bits = eight_bits;
    const auto plan = memory_plan<float>(shape, options);
    Decoder<float> model(weights, {.lora = {.max_rank = 4, .train_bias = true}, .checkpoint = true});
    std::size_t values = 0;
    for (const auto& p : model.parameters()) values += p->value.capacity_bytes();
    CHECK(plan.adapters == values);
    CHECK(plan.gradients == values);
    CHECK(plan.moments == (eight_bits ? AdamW8bit<float>(model.parameters()).bytes() : AdamW<float>(model.parameters()).bytes()));
    options.trained_biases = false;
    CHECK(memory_plan<float>(shape, options).adapters == values - static_cast<std::size_t>(config.layers * shape.biases) * sizeof(float));
  }

  const auto plan = memory_plan<float>(shape, options);
  options.checkpoints_in_file = true;
  const auto paged = memory_plan<float>(shape, options);
  const auto stream = static_cast<std::size_t>(batch.tokens() * config.width) * sizeof(float);
  CHECK(plan.checkpoints == 7 * stream);
  CHECK(plan.checkpoint_file == 0);
  CHECK(paged.checkpoint_file == plan.checkpoints);
  CHECK(paged.checkpoints == 2 * stream);
  CHECK(paged.total() == plan.total() - 5 * stream);
  CHECK(paged.to_text().find("checkpoint files") != std::string::npos);
  options.checkpoints_in_file = false;
  options.offload_checkpoints = options.device = true;
  const auto offloaded = memory_plan<float>(shape, options);
  options.offload_checkpoints = false;
  const auto on_device = memory_plan<float>(shape, options);
  options.device = false;
  CHECK(offloaded.checkpoints == 3 * stream);
  CHECK(offloaded.offloaded == 4 * stream);
  CHECK(offloaded.total() == on_device.total() - 4 * stream);
  CHECK(on_device.offloaded == 0);
  CHECK(offloaded.to_text().find("offloaded") != std::string::npos);
  // A device has no files.
  const test::TemporaryFolder folder;
  const CountedDevice device;
  const auto there = upload(*weights, device);
  const DecoderOptions in_files{.checkpoint = true, .checkpoint_memory = PagedMemory(folder.path())};
  CHECK(test::code_of([&] { Decoder<float, CountedDevice>(there, in_files, device); }) == Errc::unsupported);
}

TEST_CASE("Paged moments are the host's", "[memory_plan]") {
  const auto config = test::tiny_config();
  MemoryOptions options;
  options.device = true;
  const auto plan = memory_plan<float>(config, options);
  options.paged_moments = true;
  const auto paged = memory_plan<float>(config, options);
  CHECK(paged.total() == plan.total() - plan.moments);
  CHECK(paged.host_total() == std::max(paged.staging, paged.moments));
}

TEST_CASE("Moments in a file are the disk's, but for one parameter's", "[memory_plan]") {
  const Decoder<float> model(test::tiny_weights<float>(test::small_config()), {.lora = {.max_rank = 48}});
  MemoryOptions options;
  options.max_rank = 48;
  const auto expect = [&](std::size_t all, std::size_t largest) {
    options.moments_in_file = false;
    const auto plan = memory_plan<float>(model.config(), options);
    options.moments_in_file = true;
    const auto paged = memory_plan<float>(model.config(), options);
    CHECK(plan.moments == all);
    CHECK(plan.file == 0);
    CHECK(paged.file == all);
    CHECK(paged.moments == largest);
    CHECK(paged.total() == plan.total() - all + largest);
    CHECK(paged.to_text().find("moments in a file") != std::string::npos);
  };
  const auto expect_of = [&](const auto& optimizer) {
    std::size_t largest = 0;
    for (const auto& s : optimizer.states()) largest = std::max(largest, s.bytes());
    expect(optimizer.bytes(), largest);
  };
  expect_of(AdamW<float>(model.parameters()));
  options.moments_in_8_bits = true;
  expect_of(AdamW8bit<float>(model.parameters()));
  options.moments_in_8_bits = false;
  options.one_moment = true;
  expect_of(Lion<float>(model.parameters()));
}

// Falcon-40b (Almazrouei et al. 2023) on one card of 32 GiB: 60 layers of width 8192 with 128 heads of 64 that share 8 key-value heads, two
// layer norms a block, adapters of rank 64 on all four linear layers. The reference is arithmetic on the published shapes, which counts no
// stream after the last block.
TEST_CASE("A training step of Falcon-40b by its shapes", "[memory_plan]") {
  const auto falcon = model_shape(published_shape("falcon-40b"));
  CHECK(falcon.linear_weights() == 40'768'634'880);
  CHECK(falcon.adapter_numbers(64) == 444'334'080);

  MemoryOptions options;
  options.max_rank = 64;
  options.checkpoint = options.moments_in_8_bits = options.coded_tables = options.device = true;
  options.backend_bytes = 600'000'000 + 64'000'000;  // context and cuBLASLt, workspace
  const auto gigabytes = [](std::size_t bytes) { return static_cast<double>(bytes) / 1e9; };
  struct Row {
    Index batch;
    double checkpoints, total;  // GB; the total with an embedding of 1.065 GB in 16 bits
  };
  for (const Row row : {Row{1, 0.503, 28.13}, {2, 1.007, 28.87}, {4, 2.013, 30.35}, {8, 4.027, 33.32}}) {
    options.tokens = row.batch * 512;
    options.scored = options.tokens;
    options.longest = 512;
    const auto plan = memory_plan<bfloat16>(falcon, options);
    CAPTURE(row.batch, plan.to_text());
    CHECK(gigabytes(plan.base_codes + plan.block_scales + plan.nested_scales) == Approx(21.03).epsilon(0.001));
    CHECK(gigabytes(plan.adapters) == Approx(1.777).epsilon(0.001));
    CHECK(plan.gradients == plan.adapters);
    CHECK(gigabytes(plan.moments) == Approx(0.903).epsilon(0.001));
    CHECK(gigabytes(plan.checkpoints) == Approx(row.checkpoints).epsilon(0.02));
    // The table's embedding has 16 bits, the plan's 8; it has one temporary of the width more than the block uses.
    CHECK(gigabytes(plan.total()) + 1.065 - gigabytes(plan.tables) == Approx(row.total).epsilon(0.012));
    // Room is left for the slabs that are wide enough for 4h -> h (cuda/product_plan.hpp), in a workspace of 256 MiB.
    if (row.batch <= 4) CHECK(plan.total() - 64'000'000 + (std::size_t{256} << 20) < std::size_t{32} << 30);
  }
  options.moments_in_8_bits = false;
  CHECK(gigabytes(memory_plan<bfloat16>(falcon, options).moments) == Approx(3.555).epsilon(0.001));
  options.base.double_quant = false;
  const auto plain = memory_plan<bfloat16>(falcon, options);
  CHECK(gigabytes(plain.base_codes + plain.block_scales) == Approx(22.93).epsilon(0.001));
}

TEST_CASE("A memory plan as text", "[memory_plan]") {
  MemoryOptions options;
  options.tokens = options.scored = 10;
  options.process_bytes = 12'300'000;
  const auto text = memory_plan<float>(test::small_config(), options).to_text();
  CHECK(text.find("  process                  12.3 MB\n") != std::string::npos);
  CHECK(text.find("caches") == std::string::npos);  // there are none
  CHECK(text.find("on the host") == std::string::npos);
}

}  // namespace memory_plan_test
