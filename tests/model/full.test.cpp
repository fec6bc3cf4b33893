// A decoder whose weights all train: gradients of every kind of parameter, the model it begins as, training and resuming, workers, refusals,
// and memory.
#include <algorithm>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/io/collect.hpp>
#include <qdylora/io/train_state.hpp>
#include <qdylora/io/safetensors.hpp>
#include <qdylora/model/load_hugging_face.hpp>
#include <qdylora/model/memory_plan.hpp>
#include <qdylora/model/trainer.hpp>
#include <qdylora/model/upload.hpp>
#include <qdylora/optim/lion.hpp>

#include "support/catch.hpp"
#include "support/counted_memory.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"
#include "support/generated_text.hpp"
#include "support/gradcheck.hpp"
#include "support/tiny_model.hpp"

namespace full_test {

namespace qd = qdylora;
using qd::AdapterMethod;
using qd::BaseFormat;
using qd::Errc;
using qd::Index;
using test::code_of;
using test::same_bits;
using test::sum_of;

namespace {

qd::DecoderOptions options(bool checkpoint = false) { return {.checkpoint = checkpoint, .method = AdapterMethod::full}; }

template <class T>
auto weights_of(const qd::DecoderConfig& config, BaseFormat format = BaseFormat::float32, bool biases = true) {
  return test::tiny_weights<T>(config, biases, {.format = format});
}

qd::DecoderConfig untied(qd::DecoderConfig config) {
  config.tied_head = false;
  return config;
}

// Away from what the model began as.
template <class Model>
void shift(Model& model, double deviation = 0.05) {
  qd::Rng rng(21);
  for (const auto& p : model.parameters())
    for (auto& x : p->value.span()) x += static_cast<typename Model::Acc>(static_cast<float>(deviation) * rng.normal());
  model.set_training(false);
}

template <class Model>
auto find(const Model& model, const std::string& name) {
  for (const auto& p : model.parameters())
    if (p->name == name) return p;
  throw std::runtime_error("no parameter " + name);
}

std::vector<qd::DecoderConfig> configs() {
  auto all = test::tiny_configs();
  for (const auto& config : test::tiny_configs()) all.push_back(untied(config));
  return all;
}

class NoEmbeddingGradient : public qd::Cpu {
 public:
  void embed_backward() const = delete;
};
static_assert(qd::TransformerBackend<NoEmbeddingGradient, float> && !qd::FullBackend<NoEmbeddingGradient, float>);

}  // namespace

TEST_CASE("gradients of all weights through the whole decoder agree with central differences") {
  for (const auto& config : configs())
    for (const bool biases : {true, false}) {
      if (!biases && (config.architecture == qd::Architecture::falcon || !config.tied_head)) continue;  // one without is enough
      CAPTURE(static_cast<int>(config.architecture), config.shared_norm, config.tied_head, biases);
      const auto weights = weights_of<double>(config, BaseFormat::float32, biases);
      qd::Decoder<double> model(weights, options(), qd::Cpu(1)), checkpointed(weights, options(true), qd::Cpu(1));
      const auto batch = test::random_batch(config.vocab, {8, 5}, 3, 2);
      constexpr double scale = 0.25;
      for (auto* m : {&model, &checkpointed}) {
        test::zero_gradients(*m);
        m->set_training(true, 9);
      }
      const double sum = model.loss_and_gradient(batch, scale);
      CHECK(sum == Approx(sum_of(model.losses(batch))).epsilon(1e-12));
      const auto linears = config.linears().size();
      const std::size_t norms = (config.shared_norm ? 1u : 2u) * (config.architecture == qd::Architecture::falcon ? 2u : 1u);
      const std::size_t ends = (config.tied_head ? 1u : 2u) + (config.architecture == qd::Architecture::falcon ? 2u : 1u);
      REQUIRE(model.parameters().size() == ends + static_cast<std::size_t>(config.layers) * (norms + linears * (biases ? 2 : 1)));
      std::set<std::string> names;
      for (const auto& p : model.parameters()) {
        CHECK(names.insert(p->name).second);
        const auto gradient = qd::clone(std::as_const(p->gradient).view());
        const auto report = test::check_gradient([&] { return scale * sum_of(model.losses(batch)); }, p->value.span(), gradient.span(),
                                                 {.epsilon = 1e-5, .absolute = 1e-9, .relative = 1e-6});
        CAPTURE(p->name, report.element, report.analytic, report.numeric, report.excess);
        CHECK(report.ok());
        CHECK(std::any_of(gradient.span().begin(), gradient.span().end(), [](double g) { return std::fabs(g) > 1e-6; }));
      }
      CHECK(checkpointed.loss_and_gradient(batch, scale) == sum);
      CHECK(test::gradients(checkpointed) == test::gradients(model));

      // Two micro-batches add up, and rows of an embedding that is no head are touched where their token occurs.
      const auto once = test::gradients(model);
      model.loss_and_gradient(batch, scale);
      const auto twice = test::gradients(model);
      for (std::size_t i = 0; i < once.size(); ++i) REQUIRE(twice[i] == Approx(2.0 * once[i]).margin(1e-14));
      const auto names_of = config.module_names();
      const auto embedding = find(model, names_of.embedding + ".weight");
      for (Index id = 0; id < config.vocab; ++id) {
        const bool occurs = std::find(batch.ids.begin(), batch.ids.end(), id) != batch.ids.end();
        CHECK(embedding->touched[static_cast<std::size_t>(id)] == (occurs || config.tied_head));
      }
    }
}

TEST_CASE("gradients of all weights are PyTorch's") {
  for (const std::string name : {"qwen2", "falcon_40b"}) {
    const auto folder = test::golden(name);
    const qd::SafetensorsFile io(folder / "io.safetensors"), gradients(folder / "gradients.safetensors");
    auto ids = test::load<std::int32_t>(io, "input_ids");
    ids.resize(static_cast<std::size_t>(io.info("input_ids").shape.back()));  // the first sequence
    qd::Batch batch;
    batch.add(ids, 0);
    qd::Decoder<float> model(qd::load_hugging_face(folder, {.format = BaseFormat::float32}), options());
    const double sum = model.loss_and_gradient(batch, 1.0 / static_cast<double>(batch.scored()));
    CHECK(sum / static_cast<double>(batch.scored()) == Approx(test::load<float>(gradients, "loss").front()).epsilon(1e-5));
    REQUIRE(gradients.tensors().size() == 1 + model.parameters().size());
    for (const auto& p : model.parameters()) {
      CAPTURE(name, p->name);
      const auto expected = gradients.matrix(p->name);
      CHECK(test::relative_difference(std::as_const(p->gradient).view(), expected.view()) < 2e-5);
    }
  }
}

TEST_CASE("a head's gradient is the same in one chunk of logits or several") {
  const auto config = test::small_config();
  qd::Decoder<double> model(weights_of<double>(config), options());
  const auto long_batch = test::random_batch(config.vocab, {60, 60, 60}, 3);
  REQUIRE(long_batch.scored() > qd::head_chunk(false));
  test::zero_gradients(model);
  model.loss_and_gradient(long_batch, 0.5);
  const auto whole = test::gradients(model);
  test::zero_gradients(model);
  for (Index s = 0; s < 3; ++s) model.loss_and_gradient(long_batch.select(std::vector<Index>{s}), 0.5);  // each of one chunk
  const auto parts = test::gradients(model);
  for (std::size_t i = 0; i < whole.size(); ++i) REQUIRE(parts[i] == Approx(whole[i]).margin(1e-11));
}

TEST_CASE("before it trains the model is the one it was read as, whose weights it leaves alone") {
  for (const auto& config : configs())
    for (const auto format : {BaseFormat::float32, BaseFormat::bfloat16}) {
      CAPTURE(static_cast<int>(config.architecture), config.shared_norm, config.tied_head, std::string(name(format)));
      auto weights = weights_of<float>(config, format);
      qd::Decoder<float> frozen(weights);
      frozen.set_ranks(qd::RankPlan::uniform(0));
      const auto batch = test::random_batch(config.vocab, {8, 5}, 3);
      const auto before = frozen.logits(batch);
      qd::Decoder<float> model(weights, options());
      CHECK(same_bits(model.logits(batch).view(), before.view()));
      shift(model);
      const auto after = model.logits(batch);
      CHECK(test::largest_difference(after.view(), before.view()) > 0.1);
      CHECK(same_bits(frozen.logits(batch).view(), before.view()));

      test::check_generated(model);

      // Nothing is kept of what was read.
      const std::weak_ptr<const qd::DecoderWeights<float>> read = weights;
      const std::weak_ptr<const qd::BlockWeights<float>> block = weights->blocks.front();
      qd::Decoder<float> alone(std::move(weights), options());
      frozen = qd::Decoder<float>(weights_of<float>(config), {});
      CHECK(read.expired());
      CHECK(block.expired());
      CHECK(alone.config().layers == config.layers);
      CHECK(same_bits(alone.logits(batch).view(), before.view()));
    }
}

TEST_CASE("an embedding in 8 bits is decoded to begin with") {
  const auto config = untied(test::tiny_config());
  const auto table = [&](std::uint64_t seed) {
    const auto dense = test::normal_matrix<float>(config.vocab, config.width, seed);
    return qd::quantize<qd::INT8, qd::Float32Scales>(dense.view(), {.block_size = 32});
  };
  auto weights = weights_of<float>(config);
  weights->embedding = table(1);
  weights->head = table(2);
  qd::Decoder<float> frozen(weights), model(weights, options());
  frozen.set_ranks(qd::RankPlan::uniform(0));
  const auto batch = test::random_batch(config.vocab, {8, 5}, 3);
  CHECK(test::largest_difference(model.logits(batch).view(), frozen.logits(batch).view()) < 1e-4);
}

namespace {

struct Run {
  qd::Decoder<float> model;
  qd::Trainer<float, qd::Cpu, qd::AdamW8bit<float>> trainer;

  static constexpr std::int64_t steps = 12;
  Run(int threads, bool checkpoint, BaseFormat format = BaseFormat::bfloat16)
      : model(weights_of<float>(test::tiny_config(), format), options(checkpoint), qd::Cpu(threads)),
        trainer(model, {.recipe = qd::recipe("auto", AdapterMethod::full),
                        .ranks = qd::RankSet{1},
                        .steps = steps,
                        .lr = 1e-2,
                        .warmup_steps = 2,
                        .seed = 11}) {}
  Run(const Run&) = delete;  // the trainer refers to the model
  void run_to(std::int64_t end, std::vector<double>& losses) {
    while (trainer.step_count() < end)
      losses.push_back(trainer.step(test::counting_batch(17, 5, 16, 50 + static_cast<std::uint64_t>(trainer.step_count()))).loss);
  }
};

}  // namespace

TEST_CASE("all weights train to the same bytes on any number of threads, with checkpointing, and resumed from a saved state") {
  for (const auto format : {BaseFormat::bfloat16, BaseFormat::float32}) {
    Run whole(1, false, format), other(2, true, format), first(1, false, format), second(1, false, format);
    std::vector<double> losses, same, resumed;
    const auto held_out = test::counting_batch(17, 5, 16, 900);
    const auto mean = [&](Run& run) { return run.trainer.losses_by_rank(held_out).front(); };
    const double before = mean(whole);
    whole.run_to(Run::steps, losses);
    other.run_to(Run::steps, same);
    CHECK(same == losses);
    CHECK(test::values(other.model) == test::values(whole.model));
    first.run_to(5, resumed);
    const test::TemporaryFolder folder;
    {
      qd::TrainState state;
      qd::collect(state, "full", first.model.parameters());
      qd::collect(state, "adamw", first.trainer.optimizer());
      qd::save_train_state(folder / "state", state);
    }
    auto state = qd::load_train_state(folder / "state");
    qd::restore(state, "full", second.model.parameters());
    qd::restore(state, "adamw", second.trainer.optimizer());
    state.expect_all_used();
    second.trainer.restore(first.trainer.state());
    second.run_to(Run::steps, resumed);
    CHECK(resumed == losses);
    CHECK(test::values(second.model) == test::values(whole.model));
    CHECK(whole.trainer.losses_by_rank(held_out).size() == 1);  // there is no base beside the model
    CHECK(mean(whole) < before - 0.5);
    CHECK(mean(whole) == mean(second));
  }
}

TEST_CASE("two workers take the step that one takes with all weights, and clipping is of all gradients together") {
  const auto batch = test::counting_batch(17, 4, 12, 3);
  std::vector<float> results[2];
  for (const bool two : {false, true}) {
    qd::Decoder<float> model(weights_of<float>(test::tiny_config()), options());
    qd::Trainer<float> trainer(model, {.recipe = qd::recipe("qlora", AdapterMethod::full),
                                       .ranks = qd::RankSet{1},
                                       .steps = 3,
                                       .lr = 1e-2,
                                       .warmup_steps = 0,
                                       .max_gradient_norm = 0.1});
    // The other worker does nothing of its own: an engine that adds zeros.
    std::size_t travelled = 0;
    if (two) trainer.join({0, 2, [&](std::span<float> numbers) { travelled += numbers.size(); }});
    const auto report = trainer.step(batch);
    std::size_t all = 0;
    double squares = 0.0;
    for (const auto& p : model.parameters()) {
      all += static_cast<std::size_t>(p->value.size());
      for (const float g : p->gradient.span()) squares += static_cast<double>(g) * static_cast<double>(g);
    }
    if (two) CHECK(travelled >= all);
    CHECK(report.gradient_norm == Approx(std::sqrt(squares)).epsilon(1e-6));
    CHECK(report.gradient_norm > 0.1);
    results[two] = test::values(model);
  }
  CHECK(results[0] == results[1]);
}

TEST_CASE("an optimizer that is strict leaves rows of an embedding alone whose tokens do not occur") {
  const auto config = untied(test::tiny_config());
  qd::Decoder<float> model(weights_of<float>(config), options());
  qd::Lion<float> optimizer(model.parameters(), {.lr = 1e-2});
  const auto embedding = find(model, "model.embed_tokens.weight");
  const auto before = qd::clone(std::as_const(embedding->value).view());
  const auto batch = test::random_batch(5, {6, 6}, 3);
  for (int step = 0; step < 3; ++step) {
    optimizer.zero_grad();
    model.set_training(true);
    model.loss_and_gradient(batch, 0.1);
    optimizer.step();
  }
  for (Index id = 0; id < config.vocab; ++id) {
    const bool occurs = std::find(batch.ids.begin(), batch.ids.end(), id) != batch.ids.end();
    CHECK(same_bits(std::as_const(embedding->value).view().middle_rows(id, 1), before.view().middle_rows(id, 1)) == !occurs);
  }
}

TEST_CASE("what does not go with all weights is refused by name") {
  const auto config = test::tiny_config();
  const auto says = [](const std::optional<qd::Error>& error, Errc code, const std::string& word) {
    REQUIRE(error);
    CAPTURE(std::string(error->what()));
    CHECK(error->code() == code);
    CHECK(std::string(error->what()).find(word) != std::string::npos);
  };
  for (const auto format : {BaseFormat::nf4, BaseFormat::fp8})
    says(test::error_of([&] { qd::Decoder<float>(weights_of<float>(config, format), options()); }), Errc::unsupported,
         "model.layers.0.self_attn.q_proj: full fine-tuning");
  const auto on_other = [&] { (qd::Decoder<float, NoEmbeddingGradient>(weights_of<float>(config), options())); };
  says(test::error_of(on_other), Errc::unsupported, "backend");
  qd::Decoder<float> model(weights_of<float>(config), options());
  says(test::error_of([&] { model.set_ranks(qd::RankPlan::uniform(0)); }), Errc::unsupported, "no base");
  says(test::error_of([&] { model.set_ranks(qd::RankPlan::uniform(2)); }), Errc::rank_range, "rank 2");
  for (const char* recipe : {"order-then-nest", "qdylora", "per-row", "qlora-svd"})
    says(test::error_of([&] { qd::recipe(recipe, AdapterMethod::full); }), Errc::unsupported, "full");
  CHECK(qd::recipe("auto", AdapterMethod::full).name == "qlora");
  auto patterned = options();
  patterned.patterns.rank.add("q_proj", 1);
  says(test::error_of([&] { qd::Decoder<float>(weights_of<float>(config), patterned); }), Errc::unsupported, "patterns");
  CHECK(qd::adapter_method("full") == AdapterMethod::full);
  auto missing = weights_of<float>(config);
  auto block = std::make_shared<qd::BlockWeights<float>>(config);
  block->attention_norm = test::tiny_norm<float>(config, 1);
  block->mlp_norm = test::tiny_norm<float>(config, 1);
  missing->blocks.back() = block;
  says(test::error_of([&] { qd::Decoder<float>(missing, options()); }), Errc::shape_mismatch, "nothing");
}

TEST_CASE("a memory plan of all weights is what memory is asked for, byte by byte") {
  using test::counted_bytes;
  struct Case {
    BaseFormat format = BaseFormat::float32;
    bool tied = true, biases = false, checkpoint = false, eight_bits = false;
    qd::Architecture architecture = qd::Architecture::llama;
    bool shared_norm = false;
  };
  const Case cases[] = {{},
                        {.format = BaseFormat::bfloat16, .tied = false, .biases = true},
                        {.format = BaseFormat::bfloat16, .checkpoint = true, .eight_bits = true},
                        {.biases = true, .architecture = qd::Architecture::falcon},
                        {.checkpoint = true, .architecture = qd::Architecture::falcon, .shared_norm = true}};
  const auto grown = [](auto f) {
    const std::size_t before = counted_bytes().live;
    f();
    return counted_bytes().live - before;
  };
  for (const Case& c : cases) {
    auto config = test::small_config();
    config.tied_head = c.tied;
    config.architecture = c.architecture;
    config.shared_norm = c.shared_norm;
    CAPTURE(static_cast<int>(c.architecture), c.shared_norm, std::string(name(c.format)), c.tied, c.biases, c.checkpoint);
    const auto host_weights = weights_of<float>(config, c.format, c.biases);
    const auto batch = test::random_batch(config.vocab, {33, 40, 40, 40}, 5, 7);
    auto shape = qd::model_shape(config, AdapterMethod::full);
    if (c.biases)
      for (const auto& linear : shape.linears) shape.biases += linear.out;
    qd::MemoryOptions planned;
    planned.base.format = c.format;
    planned.checkpoint = c.checkpoint;
    planned.moments_in_8_bits = c.eight_bits;
    planned.tokens = batch.tokens();
    planned.scored = batch.scored();
    planned.longest = 39;  // inputs of the longest text
    planned.device = true;
    const auto plan = qd::memory_plan<float>(shape, planned);

    const test::CountedDevice device;
    std::shared_ptr<const qd::DecoderWeights<float, test::CountedMemory>> read;
    CHECK(grown([&] { read = qd::upload(*host_weights, device); }) == plan.read);
    CHECK(plan.staging == plan.read);
    std::optional<qd::Decoder<float, test::CountedDevice>> model;
    CHECK(grown([&] { model.emplace(read, options(c.checkpoint), device); }) == plan.adapters + plan.gradients + plan.base_codes);
    CHECK((plan.base_codes > 0) == (c.format == BaseFormat::bfloat16));
    read.reset();
    const std::size_t resident = counted_bytes().live;
    CHECK(resident == plan.adapters + plan.gradients + plan.base_codes);
    const auto expect_moments = [&]<class Optimizer>(std::type_identity<Optimizer>) {
      std::optional<Optimizer> optimizer;
      CHECK(grown([&] { optimizer.emplace(model->parameters(), typename Optimizer::Options{}, device); }) == plan.moments);
    };
    if (c.eight_bits) expect_moments(std::type_identity<qd::AdamW8bit<float, test::CountedDevice>>{});
    else expect_moments(std::type_identity<qd::AdamW<float, test::CountedDevice>>{});

    model->set_training(true);
    counted_bytes().peak = resident;
    for (int pass = 0; pass < 2; ++pass) model->loss_and_gradient(batch, 1.0);  // the second has the blocks' temporaries in the head's
    CHECK(counted_bytes().peak - resident == plan.checkpoints + plan.activations + plan.workspace + plan.logits);
    CHECK(plan.total() == resident + std::max(plan.read, plan.moments + counted_bytes().peak - resident));
  }
  for (const auto format : {BaseFormat::nf4, BaseFormat::fp8}) {
    qd::MemoryOptions planned;
    planned.base.format = format;
    CHECK(code_of([&] { qd::memory_plan<float>(test::small_config(), planned, AdapterMethod::full); }) == Errc::bad_argument);
  }
}

}  // namespace full_test
