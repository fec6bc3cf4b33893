// The decoder: gradients through the whole model, checkpointing, and what a program in another language computed.
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include <qdylora/model/load_hugging_face.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"
#include "support/golden_batch.hpp"
#include "support/gradcheck.hpp"
#include "support/tiny_model.hpp"

namespace decoder_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using test::code_of;
using test::error_of;
using Model = qd::Decoder<double>;

namespace {

struct Case {
  qd::DecoderConfig config = test::tiny_config();
  bool biases = false;
  qd::LoRAOptions lora = {.max_rank = 3, .alpha = 2.0f, .seed = 5};
  std::vector<Index> ranks = {3};  // one for all, or one for each of the two sequences
};

Model make_model(const Case& c, bool checkpoint) {
  Model model(test::tiny_weights<double>(c.config, c.biases), {.lora = c.lora, .checkpoint = checkpoint}, qd::Cpu(1));
  test::randomize_adapters(model);
  model.set_training(true, 9);
  model.set_ranks(c.ranks.size() == 1 ? qd::RankPlan::uniform(c.ranks[0]) : qd::RankPlan::per_row(c.ranks));
  return model;
}

void check_gradients(const Case& c) {
  const auto batch = test::random_batch(c.config.vocab, {8, 5}, 3, 2);
  constexpr double scale = 0.25;
  Model model = make_model(c, false);
  const double sum = model.loss_and_gradient(batch, scale);
  const auto loss = [&] {
    double total = 0.0;
    for (const double l : model.losses(batch)) total += l;
    return total;
  };
  CHECK(sum == Approx(loss()).epsilon(1e-12));
  const Index largest = *std::max_element(c.ranks.begin(), c.ranks.end());
  bool any = false;
  for (const auto& p : test::all_parameters(model)) {
    CAPTURE(p->name);
    const auto gradient = qd::clone(std::as_const(p->gradient).view());
    const auto report = test::check_gradient([&] { return scale * loss(); }, p->value.span(), gradient.span(),
                                             {.epsilon = 1e-5, .absolute = 1e-9, .relative = 1e-6});
    CAPTURE(report.element, report.analytic, report.numeric, report.excess);
    CHECK(report.ok());
    if (p->name.ends_with("lora_gates")) continue;
    for (Index i = 0; i < gradient.rows(); ++i) {
      bool zero = true;
      for (Index j = 0; j < gradient.cols(); ++j) zero = zero && gradient(i, j) == 0.0;
      CHECK(zero == (i >= largest));
      CHECK(p->touched[static_cast<std::size_t>(i)] == (i < largest));
      any = any || !zero;
    }
  }
  CHECK(any == (largest > 0));

  Model checkpointed = make_model(c, true);
  CHECK(checkpointed.loss_and_gradient(batch, scale) == sum);
  CHECK(test::gradients(checkpointed) == test::gradients(model));
}

}  // namespace

TEST_CASE("gradients through the whole decoder agree with central differences at every rank") {
  for (const Index rank : {0, 1, 2, 3})
    for (const bool tied : {true, false}) {
      CAPTURE(rank, tied);
      Case c;
      c.config.tied_head = tied;
      c.ranks = {rank};
      check_gradients(c);
    }
}

TEST_CASE("so do those of sequences with ranks of their own") {
  for (const auto scale : {qd::ScalePolicy::constant, qd::ScalePolicy::over_rank, qd::ScalePolicy::over_sqrt_rank}) {
    Case c;
    c.lora.scale = scale;
    c.ranks = {3, 1};
    check_gradients(c);
    c.ranks = {0, 2};
    check_gradients(c);
  }
}

TEST_CASE("so do those with dropout, whose mask belongs to the step") {
  Case c;
  c.lora.dropout = 0.3f;
  check_gradients(c);
  c.ranks = {1, 3};
  check_gradients(c);

  const auto batch = test::random_batch(17, {8, 5}, 3);
  Model model = make_model(c, false);
  const auto first = model.losses(batch);
  CHECK(model.losses(batch) == first);
  model.set_training(true, 10);
  CHECK(model.losses(batch) != first);
  model.set_training(true, 9);
  CHECK(model.losses(batch) == first);
  model.set_training(false);
  const auto without = model.losses(batch);
  CHECK(without != first);
  model.set_training(false, 10);
  CHECK(model.losses(batch) == without);
}

TEST_CASE("so do those of both rotary layouts, with biases") {
  for (const auto layout : {qd::RopeLayout::half_split, qd::RopeLayout::interleaved}) {
    Case c;
    c.config.rope_layout = layout;
    c.biases = true;
    c.ranks = {2};
    check_gradients(c);
  }
}

TEST_CASE("so do those of gates") {
  Case c;
  c.lora.gated_ranks = {1, 3};
  for (const std::vector<Index>& ranks : std::vector<std::vector<Index>>{{3}, {1}, {2}, {3, 1}}) {
    c.ranks = ranks;
    check_gradients(c);
  }
}

TEST_CASE("so do those of a decoder with as many key-value heads as heads, or one, and of one block") {
  for (const Index kv_heads : {1, 4}) {
    Case c;
    c.config.heads.kv_heads = kv_heads;
    c.config.layers = kv_heads == 1 ? 1 : 3;
    c.ranks = {2};
    check_gradients(c);
  }
}

TEST_CASE("so do those of Falcons, at every rank, per row, with dropout, gates and biases") {
  for (const Index kv_heads : {1, 2, 4})
    for (const bool shared_norm : {true, false}) {
      CAPTURE(kv_heads, shared_norm);
      Case c;
      c.config = test::tiny_falcon_config(kv_heads);
      c.config.shared_norm = shared_norm;
      for (const std::vector<Index>& ranks : std::vector<std::vector<Index>>{{0}, {1}, {2}, {3}, {3, 1}, {0, 2}}) {
        c.ranks = ranks;
        check_gradients(c);
      }
      c.config.tied_head = false;
      c.biases = true;
      c.lora.dropout = 0.3f;
      c.lora.gated_ranks = {1, 3};
      c.ranks = {3, 1};
      check_gradients(c);
    }
}

TEST_CASE("checkpointing changes no bit in float32 and keeps less") {
  auto falcon = test::small_config();
  falcon.architecture = qd::Architecture::falcon;
  for (const auto& config : {test::small_config(), falcon}) {
    const auto weights = test::tiny_weights<float>(config, true, {});
    const auto batch = test::random_batch(257, {40, 20}, 1);
    const qd::LoRAOptions lora{.max_rank = 8, .dropout = 0.1f};
    qd::Decoder<float> plain(weights, {.lora = lora}), checkpointed(weights, {.lora = lora, .checkpoint = true});
    for (auto* model : {&plain, &checkpointed}) test::randomize_adapters(*model, 0.1);
    for (std::uint32_t step = 0; step < 2; ++step) {
      for (auto* model : {&plain, &checkpointed}) {
        model->set_training(true, step);
        model->set_ranks(qd::RankPlan::per_row(std::vector<Index>{8, 3}));
      }
      CHECK(plain.loss_and_gradient(batch, 0.1) == checkpointed.loss_and_gradient(batch, 0.1));
      CHECK(test::gradients(plain) == test::gradients(checkpointed));
    }
    CHECK(checkpointed.activation_bytes() < plain.activation_bytes());
  }
}

TEST_CASE("gradients of two passes add up") {
  Case c;
  Model model = make_model(c, false);
  const auto batch = test::random_batch(17, {8, 5}, 3);
  model.loss_and_gradient(batch, 1.0);
  const auto once = test::gradients(model);
  model.loss_and_gradient(batch, 1.0);
  const auto twice = test::gradients(model);
  double error = 0.0;
  for (std::size_t i = 0; i < once.size(); ++i) error = std::max(error, std::fabs(twice[i] - 2.0 * once[i]));
  CHECK(error < 1e-12);
}

TEST_CASE("logits, losses and streams of a batch belong together") {
  Case c;
  c.config.tied_head = false;
  Model model = make_model(c, false);
  const auto batch = test::random_batch(17, {8, 5}, 3, 4);
  const auto logits = model.logits(batch);
  REQUIRE(logits.rows() == batch.tokens());
  REQUIRE(logits.cols() == 17);
  const auto losses = model.losses(batch);
  std::size_t next = 0;
  for (Index t = 0; t < batch.tokens(); ++t) {
    const auto target = batch.targets[static_cast<std::size_t>(t)];
    if (target < 0) continue;
    double sum = 0.0;
    for (Index j = 0; j < 17; ++j) sum += std::exp(logits(t, j));
    CHECK(losses.at(next++) == Approx(std::log(sum) - logits(t, target)).epsilon(1e-12));
  }
  CHECK(next == losses.size());

  model.loss_and_gradient(batch, 1.0);
  for (Index t = 0; t < batch.tokens(); ++t)
    for (Index j = 0; j < 12; ++j)
      CHECK(model.stream(0)(t, j) == model.weights()->embedding.template get<qd::Matrix<double>>()(batch.ids[static_cast<std::size_t>(t)], j));
  // The head's input is the last stream, normalized.
  for (Index t = 0; t < batch.tokens(); ++t) {
    double squares = 0.0;
    for (Index j = 0; j < 12; ++j) squares += model.stream(2)(t, j) * model.stream(2)(t, j);
    double logit = 0.0;
    for (Index j = 0; j < 12; ++j)
      logit +=
          model.stream(2)(t, j) / std::sqrt(squares / 12 + 1e-5) * model.weights()->final_norm.weight(0, j) * model.weights()->head.get<qd::Matrix<double>>()(4, j);
    CHECK(logit == Approx(logits(t, 4)).epsilon(1e-6).margin(1e-8));
  }
}

TEST_CASE("losses of more scored tokens than logits are held at a time equal those of the logits") {
  auto config = test::tiny_config();
  config.context = 400;
  Model model(test::tiny_weights<double>(config), {.lora = {.max_rank = 2}}, qd::Cpu(1));
  const auto batch = test::random_batch(17, {300}, 1);
  const auto logits = model.logits(batch);
  const auto losses = model.losses(batch);
  REQUIRE(losses.size() == 299);
  for (const Index t : {0, 127, 128, 129, 255, 256, 298}) {
    double sum = 0.0;
    for (Index j = 0; j < 17; ++j) sum += std::exp(logits(t, j));
    CHECK(losses[static_cast<std::size_t>(t)] ==
          Approx(std::log(sum) - logits(t, batch.targets[static_cast<std::size_t>(t)])).epsilon(1e-10));
  }
}

TEST_CASE("the two rotary layouts are one model with the rows of q and k in another order") {
  auto config = test::tiny_config();
  config.rope_layout = qd::RopeLayout::half_split;
  const auto half_split = test::tiny_weights<double>(config);
  config.rope_layout = qd::RopeLayout::interleaved;
  const auto interleaved = test::tiny_weights<double>(config);
  const Index head_dim = config.heads.head_dim;
  for (Index layer = 0; layer < config.layers; ++layer) {
    auto block = std::make_shared<qd::BlockWeights<double>>(config);
    block->attention_norm = test::tiny_norm<double>(config, 4 + 10 * static_cast<std::uint64_t>(layer));
    block->mlp_norm = test::tiny_norm<double>(config, 5 + 10 * static_cast<std::uint64_t>(layer));
    block->linear = half_split->blocks[static_cast<std::size_t>(layer)]->linear;
    for (std::size_t p = 0; p < 2; ++p) {  // q and k
      const auto rows = test::tiny_linear(config, layer, p);
      qd::Matrix<float> permuted(rows.rows(), rows.cols());
      for (Index i = 0; i < rows.rows(); ++i) {
        const Index head = i / head_dim, pair = i % head_dim / 2, second = i % 2;
        qd::copy(rows.view().middle_rows(head * head_dim + pair + second * head_dim / 2, 1), permuted.view().middle_rows(i, 1));
      }
      block->linear[p] = std::make_shared<const qd::WeightFor<qd::AnyFormat>>(std::move(permuted));
    }
    interleaved->blocks[static_cast<std::size_t>(layer)] = std::move(block);
  }
  Model first(half_split, {.lora = {.max_rank = 1}}), second(interleaved, {.lora = {.max_rank = 1}});
  const auto batch = test::random_batch(17, {20}, 1);
  CHECK(test::normalised_squared_error(first.logits(batch).view(), second.logits(batch).view()) < 1e-24);
}

TEST_CASE("a fresh adapter, and rank 0, leave the base's logits bit for bit") {
  const auto weights = test::tiny_weights<float>(test::small_config(), true, {});
  const auto batch = test::random_batch(257, {30, 9}, 1);
  qd::Decoder<float> model(weights, {.lora = {.max_rank = 8}}), other(weights, {.lora = {.max_rank = 3, .seed = 9}});
  const auto base = model.logits(batch);
  test::randomize_adapters(model, 0.1);
  CHECK_FALSE(test::same_bits(base.view(), model.logits(batch).view()));
  model.set_ranks(qd::RankPlan::uniform(0));
  CHECK(test::same_bits(base.view(), model.logits(batch).view()));
  CHECK(test::same_bits(base.view(), other.logits(batch).view()));
}

TEST_CASE("several decoders share one base, and adapters of a seed start equal") {
  const auto weights = test::tiny_weights<double>(test::tiny_config());
  Model a(weights, {.lora = {.max_rank = 3, .seed = 1}}), b(weights, {.lora = {.max_rank = 3, .seed = 1}}),
      c(weights, {.lora = {.max_rank = 3, .seed = 2}});
  CHECK(a.weights() == b.weights());
  CHECK(test::values(a) == test::values(b));
  CHECK(test::values(a) != test::values(c));
  std::vector<std::string> names;
  a.for_each_linear([&](const auto& linear) { names.push_back(linear.adapter().options().name); });
  REQUIRE(names.size() == 14);
  CHECK(names[0] == "model.layers.0.self_attn.q_proj");
  CHECK(names[13] == "model.layers.1.mlp.down_proj");
  CHECK(a.parameters().size() == 28);
  // Layers of one seed and shape differ.
  CHECK_FALSE(test::same_bits(std::as_const(a.parameters()[0]->value).view(), std::as_const(a.parameters()[14]->value).view()));
}

TEST_CASE("a decoder of weights that do not fit its shape is refused") {
  const auto refused = [](auto change, Errc code, const std::string& word) {
    const auto weights = test::tiny_weights<float>(test::tiny_config());
    change(*weights);
    const auto error = error_of([&] { qd::Decoder<float> model(weights); });
    REQUIRE(error);
    CHECK(error->code() == code);
    CAPTURE(std::string(error->what()));
    CHECK(std::string(error->what()).find(word) != std::string::npos);
  };
  using Weights = qd::DecoderWeights<float>;
  refused([](Weights& w) { w.embedding = qd::Matrix<float>(16, 12); }, Errc::shape_mismatch, "embedding");
  refused([](Weights& w) { w.final_norm.weight.resize(1, 11); }, Errc::shape_mismatch, "final norm");
  refused([](Weights& w) { w.config.tied_head = false; }, Errc::shape_mismatch, "head");
  refused([](Weights& w) { w.blocks.pop_back(); }, Errc::bad_config, "blocks");
  refused([](Weights& w) { w.config.mlp_width = 14; }, Errc::shape_mismatch, "model.layers.0.mlp.gate_proj");
  refused([](Weights& w) { w.config.heads.heads = 3; }, Errc::bad_config, "heads");
  refused([](Weights& w) { w.config.heads.head_dim = 5; }, Errc::bad_config, "head dimension");
  refused([](Weights& w) { w.config.heads.head_dim = 6; }, Errc::shape_mismatch, "self_attn.q_proj");
  refused([](Weights& w) { w.config.layers = 0; }, Errc::bad_config, "layers");
  refused([](Weights& w) { w.config.context = 0; }, Errc::bad_config, "context");
  refused([](Weights& w) { w.config.rope_base = 0.0; }, Errc::bad_config, "rope base");
  refused([](Weights& w) { w.config.norm_epsilon = std::nanf(""); }, Errc::bad_config, "norm epsilon");
  refused([](Weights& w) { w.config.vocab = -1; }, Errc::bad_config, "vocabulary");
  refused(
      [](Weights& w) {
        auto block = std::make_shared<qd::BlockWeights<float>>(w.config);
        block->linear = w.blocks[1]->linear;
        block->linear[3] = nullptr;
        w.blocks[1] = block;
      },
      Errc::shape_mismatch, "model.layers.1.self_attn.o_proj");
  refused(
      [](Weights& w) {
        auto block = std::make_shared<qd::BlockWeights<float>>(w.config);
        block->linear = w.blocks[1]->linear;
        w.blocks[1] = block;
      },
      Errc::shape_mismatch, "norm");
}

TEST_CASE("ranks that the adapters do not have are refused and change nothing") {
  Model model(test::tiny_weights<double>(test::tiny_config()), {.lora = {.max_rank = 3}});
  test::randomize_adapters(model);
  const auto batch = test::random_batch(17, {8, 5}, 3);
  model.set_ranks(qd::RankPlan::uniform(2));
  const auto losses = model.losses(batch);
  CHECK(code_of([&] { model.set_ranks(qd::RankPlan::uniform(4)); }) == Errc::rank_range);
  CHECK(code_of([&] { model.set_ranks(qd::RankPlan::per_row(std::vector<Index>{1, 4})); }) == Errc::rank_range);
  CHECK(code_of([&] { model.set_ranks(qd::RankPlan::uniform(-1)); }) == Errc::rank_range);
  CHECK(model.losses(batch) == losses);
}

// A Llama of two layers, its base quantized by bitsandbytes and its adapters by PEFT, with logits, loss and gradients of PyTorch.
namespace {

qd::Decoder<float> golden_model() {
  qd::Decoder<float> model(qd::load_hugging_face(test::golden("llama_tiny_bnb4")),
                           {.lora = {.max_rank = 8, .alpha = 16.0f, .scale = qd::ScalePolicy::over_rank}});
  const qd::SafetensorsFile adapter(test::golden("llama_tiny_adapter/adapter_model.safetensors"));
  model.for_each_linear([&](auto& linear) {
    const std::string name = "base_model.model." + linear.adapter().options().name;
    qd::copy(adapter.matrix(name + ".lora_A.weight").view(), linear.adapter().a().value.view());
    const auto b = adapter.matrix(name + ".lora_B.weight");  // [out, r] there
    REQUIRE(b.rows() == linear.out());
    for (Index i = 0; i < b.rows(); ++i)
      for (Index j = 0; j < 8; ++j) linear.adapter().b().value(j, i) = b(i, j);
  });
  return model;
}

}  // namespace

TEST_CASE("logits of a golden model agree at ranks 8, 4, 1 and 0") {
  const qd::SafetensorsFile io(test::golden("llama_tiny_io.safetensors"));
  auto model = golden_model();
  const auto batch = test::golden_batch(io, 12);
  const std::pair<Index, const char*> expected[] = {
      {8, "logits"}, {4, "logits_dylora_b4"}, {1, "logits_dylora_b1"}, {0, "logits_base_only"}};
  for (const auto& [rank, tensor] : expected) {
    CAPTURE(rank);
    const auto reference = test::load<float>(io, tensor);
    model.set_ranks(qd::RankPlan::uniform(rank));
    const auto logits = model.logits(batch);
    REQUIRE(reference.size() == static_cast<std::size_t>(logits.size()));
    float largest = 0.0f;
    for (std::size_t i = 0; i < reference.size(); ++i) largest = std::max(largest, std::fabs(reference[i] - logits.span()[i]));
    CHECK(largest <= 1e-4f);
  }
}

TEST_CASE("the loss of a golden model and every gradient of it agree, with checkpointing and without") {
  const qd::SafetensorsFile io(test::golden("llama_tiny_io.safetensors"));
  auto model = golden_model();
  const auto batch = test::golden_batch(io, 12);
  const auto expected = static_cast<double>(test::load<float>(io, "loss")[0]);
  const auto scored = static_cast<double>(batch.scored());
  model.set_ranks(qd::RankPlan::uniform(8));
  CHECK(model.loss_and_gradient(batch, 1.0 / scored) / scored == Approx(expected).margin(1e-5));
  model.for_each_linear([&](auto& linear) {
    const std::string name = "grad/base_model.model." + linear.adapter().options().name;
    CAPTURE(name);
    const auto a = io.matrix(name + ".lora_A.weight"), b = io.matrix(name + ".lora_B.weight");
    qd::Matrix<float> b_rows(b.cols(), b.rows());
    for (Index i = 0; i < b.rows(); ++i)
      for (Index j = 0; j < b.cols(); ++j) b_rows(j, i) = b(i, j);
    CHECK(std::sqrt(test::normalised_squared_error(std::as_const(linear.adapter().a().gradient).view(), a.view())) <= 1e-5);
    CHECK(std::sqrt(test::normalised_squared_error(std::as_const(linear.adapter().b().gradient).view(), b_rows.view())) <= 1e-5);
  });
}

}  // namespace decoder_test
