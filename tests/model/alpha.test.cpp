// Planes of signs in the decoder, whose scales train (AlphaTuning): gradients through the whole model, the base, training and resuming,
// workers, refusals, and memory.
#include <algorithm>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/io/alpha_adapter.hpp>
#include <qdylora/io/collect.hpp>
#include <qdylora/io/peft.hpp>
#include <qdylora/io/train_state.hpp>
#include <qdylora/model/initial_weight.hpp>
#include <qdylora/model/memory_plan.hpp>
#include <qdylora/model/trainer.hpp>
#include <qdylora/model/upload.hpp>

#include "support/catch.hpp"
#include "support/counted_memory.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/generated_text.hpp"
#include "support/gradcheck.hpp"
#include "support/tiny_model.hpp"

namespace alpha_test {

namespace qd = qdylora;
using qd::AdapterMethod;
using qd::Errc;
using qd::Index;
using test::code_of;
using test::same_bits;
using test::sum_of;

namespace {

template <class T>
std::shared_ptr<qd::DecoderWeights<T>> coded(const qd::DecoderConfig& config, qd::BinaryCodeOptions code = {.planes = 3, .group_size = 8},
                                             bool biases = false) {
  return test::tiny_weights<T>(config, biases, {.binary = code});
}

qd::DecoderOptions options(Index trained_planes = 1, bool checkpoint = false) {
  return {.checkpoint = checkpoint, .method = AdapterMethod::alpha, .alpha = {.trained_planes = trained_planes}};
}

// Away from the base's scales.
template <class Model>
void shift(Model& model) {
  qd::Rng rng(21);
  for (const auto& p : model.parameters())
    for (auto& a : p->value.span()) a += static_cast<typename Model::Acc>(0.05f * rng.normal());
}

template <class Model>
auto layers_of(Model& model) {
  std::vector<qd::AlphaLinear<float>*> layers;
  model.for_each_alpha([&](auto& layer) { layers.push_back(&layer); });
  return layers;
}

}  // namespace

TEST_CASE("gradients of all scales through the whole decoder agree with central differences") {
  for (const auto& config : test::tiny_configs())
    for (const Index trained : {Index{1}, Index{3}}) {
      CAPTURE(static_cast<int>(config.architecture), config.shared_norm, trained);
      const auto weights = coded<double>(config, {.planes = 3, .group_size = 8}, true);
      qd::Decoder<double> model(weights, options(trained), qd::Cpu(1)), checkpointed(weights, options(trained, true), qd::Cpu(1));
      const auto batch = test::random_batch(config.vocab, {8, 5}, 3, 2);
      constexpr double scale = 0.25;
      for (auto* m : {&model, &checkpointed}) {
        shift(*m);
        test::zero_gradients(*m);
        m->set_training(true, 9);
      }
      const double sum = model.loss_and_gradient(batch, scale);
      CHECK(sum == Approx(sum_of(model.losses(batch))).epsilon(1e-12));
      REQUIRE(model.parameters().size() == static_cast<std::size_t>(config.layers) * config.linears().size());
      for (const auto& p : model.parameters()) {
        const auto gradient = qd::clone(std::as_const(p->gradient).view());
        const auto report = test::check_gradient([&] { return scale * sum_of(model.losses(batch)); }, p->value.span(), gradient.span(),
                                                 {.epsilon = 1e-5, .absolute = 1e-9, .relative = 1e-6});
        CAPTURE(p->name, report.element, report.analytic, report.numeric, report.excess);
        CHECK(report.ok());
        CHECK(std::any_of(gradient.span().begin(), gradient.span().end(), [](double g) { return g != 0.0; }));
      }
      CHECK(checkpointed.loss_and_gradient(batch, scale) == sum);
      CHECK(test::gradients(checkpointed) == test::gradients(model));

      // At rank 0, the base's scales, nothing trains.
      test::zero_gradients(model);
      model.set_ranks(qd::RankPlan::uniform(0));
      model.loss_and_gradient(batch, scale);
      for (const auto& p : model.parameters()) {
        CHECK(std::all_of(p->gradient.span().begin(), p->gradient.span().end(), [](double g) { return g == 0.0; }));
        CHECK(std::none_of(p->touched.begin(), p->touched.end(), [](bool t) { return t; }));
      }
    }
}

TEST_CASE("a decoder on planes of signs computes what one on their decoded weights does, and at rank 0 stays the base") {
  for (const auto& config : test::tiny_configs()) {
    CAPTURE(static_cast<int>(config.architecture), config.shared_norm);
    const auto weights = coded<double>(config, {.planes = 4}, true);
    qd::Decoder<double> model(weights, options(2));
    // The same model with its linear weights dense, as model's layers have them now.
    const auto dense_logits = [&](const qd::Batch& batch) {
      auto dense = test::tiny_weights<double>(config, true);
      std::vector<std::shared_ptr<const qd::WeightFor<qd::AnyFormat>>> linears;
      model.for_each_alpha([&](const auto& layer) {
        const auto w = layer.weight(4);
        qd::Matrix<float> rounded(w.rows(), w.cols());
        for (Index i = 0; i < w.size(); ++i) rounded.data()[i] = static_cast<float>(w.data()[i]);
        linears.push_back(std::make_shared<const qd::WeightFor<qd::AnyFormat>>(std::move(rounded)));
      });
      const auto norm = [](const qd::NormWeights<double>& n) {
        return qd::NormWeights<double>{qd::clone(n.weight.view()), qd::clone(n.bias.view())};
      };
      std::size_t next = 0;
      for (auto& block : dense->blocks) {
        auto own = std::make_shared<qd::BlockWeights<double>>(config);
        for (std::size_t p = 0; p < own->linear.size(); ++p) {
          own->linear[p] = linears[next++];
          own->bias[p] = qd::clone(block->bias[p].view());
        }
        own->attention_norm = norm(block->attention_norm);
        own->mlp_norm = norm(block->mlp_norm);
        block = own;
      }
      qd::Decoder<double> same(dense);
      same.set_ranks(qd::RankPlan::uniform(0));
      return same.logits(batch);
    };
    const auto batch = test::random_batch(config.vocab, {8, 5}, 3);
    const auto base = model.logits(batch);
    CHECK(test::largest_difference(base.view(), dense_logits(batch).view()) < 1e-5);
    shift(model);
    const auto tuned = model.logits(batch);
    CHECK(test::largest_difference(tuned.view(), dense_logits(batch).view()) < 1e-5);
    CHECK(test::largest_difference(tuned.view(), base.view()) > 0.01);
    model.set_ranks(qd::RankPlan::uniform(0));
    CHECK(same_bits(model.logits(batch).view(), base.view()));
    model.set_ranks(qd::RankPlan::uniform(1));
    CHECK(same_bits(model.logits(batch).view(), tuned.view()));

    test::check_generated(model);
  }
}

TEST_CASE("scales train to the same bytes on any number of threads, with checkpointing, and resumed from a saved state") {
  constexpr std::int64_t steps = 12;
  struct Run {
    qd::Decoder<float> model;
    qd::Trainer<float> trainer;
    Run(int threads, bool checkpoint)
        : model(coded<float>(test::tiny_config()), options(2, checkpoint), qd::Cpu(threads)),
          trainer(model, {.recipe = qd::recipe("auto", AdapterMethod::alpha),
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
  Run whole(1, false), other(2, true), first(1, false), second(1, false);
  std::vector<double> losses, same, resumed;
  whole.run_to(steps, losses);
  other.run_to(steps, same);
  CHECK(same == losses);
  CHECK(test::values(other.model) == test::values(whole.model));
  first.run_to(5, resumed);
  const test::TemporaryFolder folder;
  {
    qd::TrainState state;
    first.model.for_each_alpha([&](const auto& layer) { qd::collect(state, layer.options().name, layer.parameters()); });
    qd::collect(state, "adamw", first.trainer.optimizer());
    qd::save_train_state(folder / "state", state);
  }
  auto state = qd::load_train_state(folder / "state");
  second.model.for_each_alpha([&](auto& layer) { qd::restore(state, layer.options().name, layer.parameters()); });
  qd::restore(state, "adamw", second.trainer.optimizer());
  state.expect_all_used();
  second.trainer.restore(first.trainer.state());
  second.run_to(steps, resumed);
  CHECK(resumed == losses);
  CHECK(test::values(second.model) == test::values(whole.model));
  const auto after = whole.trainer.losses_by_rank(test::counting_batch(17, 5, 16, 900));
  REQUIRE(after.size() == 2);
  CHECK(after[0] < after[1] - 0.1);  // learned: the trained scales, beside the base's
}

TEST_CASE("two workers take the step that one takes with all scales") {
  const auto batch = test::counting_batch(17, 4, 12, 3);
  std::vector<float> results[2];
  for (const bool two : {false, true}) {
    qd::Decoder<float> model(coded<float>(test::tiny_config()), options(3));
    qd::Trainer<float> trainer(
        model, {.recipe = qd::recipe("auto", AdapterMethod::alpha), .ranks = qd::RankSet{1}, .steps = 3, .lr = 1e-2, .warmup_steps = 0});
    // The other worker does nothing of its own: an engine that adds zeros.
    std::size_t longest = 0;
    if (two) trainer.join({0, 2, [&](std::span<float> numbers) { longest = std::max(longest, numbers.size()); }});
    trainer.step(batch);
    std::size_t scales = 0;
    for (const auto& p : model.parameters()) scales += static_cast<std::size_t>(p->value.size());
    if (two) CHECK(longest >= scales);  // the gradients of all rows of all planes travel
    results[two] = test::values(model);
  }
  CHECK(results[0] == results[1]);
}

TEST_CASE("trained scales come back from their folder beside the base they belong to, and beside no other") {
  const auto config = test::tiny_config();
  const qd::BinaryCodeOptions code{.planes = 3, .group_size = 8, .iterations = 5};
  const test::TemporaryFolder folder;
  const auto batch = test::random_batch(config.vocab, {8, 5}, 3);
  qd::Decoder<float> model(coded<float>(config, code), options(2));
  shift(model);
  qd::save_alpha_adapter(folder / "a", layers_of(model), code, "tiny");
  REQUIRE(qd::is_alpha_adapter(folder / "a"));
  const auto found = qd::read_alpha_config(folder / "a");
  CHECK(found.code.planes == 3);
  CHECK(found.code.group_size == 8);
  CHECK(found.code.iterations == 5);
  CHECK(found.trained_planes == 2);
  CHECK(found.base_model == "tiny");
  qd::Decoder<float> same(coded<float>(config, found.code), options(found.trained_planes));
  qd::load_alphas(folder / "a", layers_of(same));
  CHECK(test::values(same) == test::values(model));
  CHECK(same_bits(same.logits(batch).view(), model.logits(batch).view()));

  const auto refused = [&](qd::BinaryCodeOptions other, Index trained) {
    qd::Decoder<float> stranger(coded<float>(config, other), options(trained));
    return code_of([&] { qd::load_alphas(folder / "a", layers_of(stranger)); });
  };
  CHECK(refused({.planes = 2, .group_size = 8, .iterations = 5}, 2) == Errc::bad_config);   // other planes
  CHECK(refused({.planes = 3, .group_size = 16, .iterations = 5}, 2) == Errc::bad_config);  // other groups
  CHECK(refused({.planes = 3, .group_size = 8, .iterations = 0}, 2) == Errc::bad_config);   // other signs
  CHECK(refused(code, 1) == Errc::shape_mismatch);                                          // other scales train
  auto deeper = config;
  deeper.layers = 3;
  qd::Decoder<float> stranger(coded<float>(deeper, code), options(2));
  CHECK(code_of([&] { qd::load_alphas(folder / "a", layers_of(stranger)); }) == Errc::bad_config);

  CHECK(code_of([&] { qd::save_alpha_adapter(folder / "b", layers_of(model), {.planes = 2, .group_size = 8}); }) == Errc::bad_argument);
  CHECK(code_of([&] { qd::save_alpha_adapter<qd::AlphaLinear<float>>(folder / "b", {}, code); }) == Errc::bad_argument);
  model.parameters()[3]->value(0, 0) = std::numeric_limits<float>::infinity();
  CHECK(code_of([&] { qd::save_alpha_adapter(folder / "b", layers_of(model), code); }) == Errc::non_finite);
  CHECK_FALSE(qd::is_alpha_adapter(folder / "b"));
}

TEST_CASE("a folder of scales is no PEFT adapter, either replaces the other, and a config that is not understood is refused") {
  const qd::BinaryCodeOptions code{.planes = 3, .group_size = 8};
  qd::Decoder<float> model(coded<float>(test::tiny_config(), code), options(1));
  const test::TemporaryFolder folder;
  qd::save_alpha_adapter(folder.path(), layers_of(model), code);
  const auto error = test::error_of([&] { qd::load_peft_adapter(folder.path()); });
  REQUIRE(error);
  CHECK(error->code() == Errc::unsupported);
  CHECK(std::string(error->what()).find("planes of signs") != std::string::npos);
  const qd::LoRAAdapter<float> lora(12, 12, {.max_rank = 2, .name = "up"});
  qd::save_peft_adapter(folder.path(), {{"up", &lora}}, qd::PeftOptions{});
  CHECK_FALSE(qd::is_alpha_adapter(folder.path()));
  qd::save_alpha_adapter(folder.path(), layers_of(model), code);
  CHECK(code_of([&] { qd::load_peft_adapter(folder.path()); }) == Errc::unsupported);

  const auto path = folder / "alpha_config.json";
  const auto good = qd::read_json(path);
  const auto refused = [&](const char* key, const qd::Json& value) {
    auto changed = good;
    changed[key] = value;
    test::write_file(path, changed.dump());
    return code_of([&] { qd::read_alpha_config(folder.path()); });
  };
  CHECK(refused("format", "other") == Errc::bad_config);
  CHECK(refused("version", 2) == Errc::version);
  CHECK(refused("planes", 9) == Errc::bad_config);
  CHECK(refused("planes", 0) == Errc::bad_config);
  CHECK(refused("group_size", 12) == Errc::bad_config);
  CHECK(refused("trained_planes", 4) == Errc::bad_config);
  CHECK(refused("codes", 7) == Errc::bad_config);
  CHECK(refused("planes", 3) == std::nullopt);
}

TEST_CASE("what does not go with scales is refused by name") {
  const auto config = test::tiny_config();
  const auto weights = coded<float>(config);
  const auto says = [](const std::optional<qd::Error>& error, Errc code, const std::string& word) {
    REQUIRE(error);
    CAPTURE(std::string(error->what()));
    CHECK(error->code() == code);
    CHECK(std::string(error->what()).find(word) != std::string::npos);
  };
  says(test::error_of([&] { qd::Decoder<float>(weights, options(4)); }), Errc::bad_argument, "trained_planes 4 is not in 1 ... 3");
  says(test::error_of([&] { qd::Decoder<float>(test::tiny_weights<float>(config), options()); }), Errc::shape_mismatch, "planes of signs");
  says(test::error_of([&] { qd::Decoder<float>{weights}; }), Errc::shape_mismatch, "found nothing");
  auto wrong = std::make_shared<qd::BlockWeights<float>>(config);
  wrong->codes = weights->blocks[0]->codes;
  wrong->attention_norm = test::tiny_norm<float>(config, 4);
  wrong->mlp_norm = test::tiny_norm<float>(config, 5);
  wrong->codes[6] = wrong->codes[5];
  const auto other = coded<float>(config);
  other->blocks[1] = wrong;
  says(test::error_of([&] { qd::Decoder<float>(other, options()); }), Errc::shape_mismatch,
       "layers.1.mlp.down_proj.weight: expected planes of signs [12, 13]");

  qd::Decoder<float> model(weights, options());
  CHECK(model.options().lora.max_rank == 1);
  CHECK(code_of([&] { model.set_ranks(qd::RankPlan::uniform(2)); }) == Errc::rank_range);
  CHECK(code_of([&] { model.set_ranks(qd::RankPlan::per_row(std::vector<Index>{0, 1})); }) == Errc::unsupported);
  CHECK(qd::recipe("auto", AdapterMethod::alpha).name == "qlora");
  for (const char* name : {"order-then-nest", "qdylora", "per-row", "qlora-svd"}) {
    says(test::error_of([&] { qd::recipe(name, AdapterMethod::alpha); }), Errc::unsupported, "alpha");
    CHECK(code_of([&] { qd::Trainer<float>(model, {.recipe = qd::recipe(name), .ranks = qd::RankSet{1}}); }) == Errc::unsupported);
  }
  CHECK(code_of([&] { qd::Trainer<float>(model, {.recipe = qd::recipe("qlora"), .ranks = qd::RankSet{1, 2}}); }) == Errc::rank_range);

  qd::BlockWeights<float> block(config);
  const auto none = [](Index, qd::MatrixView<float> out) { std::fill_n(out.data, out.size(), 0.0f); };
  CHECK(code_of([&] {
          qd::read_linear(block, 0, 0, 16, 12, {.init = qd::adapter_init("loftq", 2), .binary = qd::BinaryCodeOptions{}}, none, qd::Cpu{});
        }) == Errc::unsupported);
  CHECK(code_of([&] { qd::make_base_weight(16, 12, {.binary = qd::BinaryCodeOptions{}}, none, qd::Cpu{}); }) == Errc::bad_argument);
  CHECK(code_of([&] { qd::upload(*weights, test::CountedDevice{}); }) == Errc::unsupported);
}

// A host whose bytes are counted.
namespace {

struct CountedHost : test::CountedMemory {
  static constexpr bool host = true;
};
class CountedCpu : public qd::Cpu {
 public:
  using Memory = CountedHost;
  CountedCpu() : Cpu(2) {}
};

template <class S>
qd::Matrix<S, CountedHost> there(const qd::Matrix<S>& here) {
  qd::Matrix<S, CountedHost> copy(here.rows(), here.cols());
  qd::copy(here.view(), copy.view());
  return copy;
}

std::shared_ptr<const qd::BinaryCodedTensor<CountedHost>> there(const qd::BinaryCodedTensor<>& here) {
  qd::Buffer<std::uint8_t, CountedHost> bits(here.bits().size());
  std::ranges::copy(here.bits().span(), bits.data());
  return std::make_shared<const qd::BinaryCodedTensor<CountedHost>>(here.shape(), std::move(bits), there(qd::clone(here.scales())));
}

std::shared_ptr<const qd::DecoderWeights<float, CountedHost>> there(const qd::DecoderWeights<float>& here) {
  const auto norm = [](const qd::NormWeights<float>& n) { return qd::NormWeights<float, CountedHost>{there(n.weight), there(n.bias)}; };
  auto weights = std::make_shared<qd::DecoderWeights<float, CountedHost>>();
  weights->config = here.config;
  weights->embedding = there(here.embedding.get<qd::Matrix<float>>());
  weights->final_norm = norm(here.final_norm);
  for (const auto& from : here.blocks) {
    auto block = std::make_shared<qd::BlockWeights<float, CountedHost>>(here.config);
    std::ranges::transform(from->codes, block->codes.begin(), [](const auto& codes) { return there(*codes); });
    block->attention_norm = norm(from->attention_norm);
    block->mlp_norm = norm(from->mlp_norm);
    weights->blocks.push_back(std::move(block));
  }
  return weights;
}

}  // namespace

TEST_CASE("A memory plan of planes of signs is what memory is asked for", "[memory_plan]") {
  struct Case {
    qd::BinaryCodeOptions code;
    Index trained;
    bool falcon, checkpoint, eight_bits;
  };
  for (const Case& c : {Case{{.planes = 3}, 1, false, false, false}, Case{{.planes = 2, .group_size = 8}, 2, false, true, true},
                        Case{{.planes = 4, .group_size = 64}, 3, true, false, false}}) {
    auto config = test::small_config();
    config.architecture = c.falcon ? qd::Architecture::falcon : qd::Architecture::llama;
    config.mlp_width = 600;  // more than one panel
    config.layers = 3;       // in the middle one, all that blocks share is there, and dx is wanted
    CAPTURE(c.code.planes, c.trained, c.falcon);
    const auto host_weights = coded<float>(config, c.code);
    const auto batch = test::random_batch(config.vocab, {21, 40, 3}, 5, 7);
    qd::MemoryOptions planned;
    planned.base.binary = c.code;
    planned.trained_planes = c.trained;
    planned.checkpoint = c.checkpoint;
    planned.moments_in_8_bits = c.eight_bits;
    planned.tokens = batch.tokens();
    planned.scored = batch.scored();
    planned.longest = 39;
    const auto plan = qd::memory_plan<float>(config, planned, AdapterMethod::alpha);
    CHECK(plan.base_codes + plan.block_scales == host_weights->linear_bytes());
    CHECK(plan.nested_scales == 0);

    const CountedCpu cpu;
    const auto weights = there(*host_weights);
    const auto live = [] { return test::counted_bytes().live; };
    std::size_t before = live();
    qd::Decoder<float, CountedCpu> model(weights, options(c.trained, c.checkpoint), cpu);
    CHECK(live() - before == plan.adapters + plan.gradients);
    if (c.eight_bits) CHECK(qd::AdamW8bit<float, CountedCpu>(model.parameters(), {}, cpu).bytes() == plan.moments);
    else CHECK(qd::AdamW<float, CountedCpu>(model.parameters(), {}, cpu).bytes() == plan.moments);
    before = live();
    test::counted_bytes().peak = before;
    model.loss_and_gradient(batch, 1.0);
    const auto measured = test::counted_bytes().peak - before;
    CHECK(measured == plan.checkpoints + plan.activations + plan.workspace + plan.logits);
  }
}

}  // namespace alpha_test
