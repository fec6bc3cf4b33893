// Models whose adapters begin with what their quantization loses, or with the leading part of their weights.
#include <qdylora/model/initial_weight.hpp>

#include <cmath>
#include <limits>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/model/calibrate.hpp>
#include <qdylora/model/load_hugging_face.hpp>
#include <qdylora/model/memory_plan.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"
#include "support/random_data.hpp"
#include "support/tiny_model.hpp"

namespace initial_weight_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using test::code_of;
using test::error_of;

namespace {

constexpr Index rank = 8;

std::shared_ptr<const qd::DecoderWeights<float>> mistral(const std::string& init, qd::BaseFormat format = qd::BaseFormat::nf4) {
  qd::BaseOptions options{.format = format};
  options.init = qd::adapter_init(init, rank);
  return qd::load_hugging_face(test::golden("mistral"), options);
}

qd::Matrix<float> logits(const std::shared_ptr<const qd::DecoderWeights<float>>& weights, Index at, float alpha = 16.0f) {
  qd::Decoder<float> decoder(weights, {.lora = {.max_rank = rank, .alpha = alpha}});
  decoder.set_ranks(qd::RankPlan::uniform(at));
  return decoder.logits(test::random_batch(weights->config.vocab, {12, 9}, 1));
}

double distance(const qd::Matrix<float>& a, const qd::Matrix<float>& b) {
  double sum = 0.0;
  for (Index i = 0; i < a.size(); ++i) sum += std::pow(static_cast<double>(a.data()[i]) - static_cast<double>(b.data()[i]), 2);
  return std::sqrt(sum);
}

}  // namespace

TEST_CASE("a model that begins as LoftQ is the plain one at rank 0, and nearer to that in float at higher ranks") {
  const auto exact = logits(mistral("standard", qd::BaseFormat::float32), 0);
  const auto plain = mistral("standard"), loftq = mistral("loftq");
  CHECK(test::same_bits(logits(loftq, 0).view(), logits(plain, 0).view()));
  CHECK(test::same_bits(logits(plain, rank).view(), logits(plain, 0).view()));  // B = 0
  const double lost = distance(logits(loftq, 0), exact);
  CHECK(distance(logits(loftq, 4), exact) < lost);
  CHECK(distance(logits(loftq, rank), exact) < 0.8 * lost);
  CHECK(distance(logits(loftq, rank, 3.0f), logits(loftq, rank)) < 1e-4 * lost);  // whatever alpha is
}

TEST_CASE("a model that begins as PiSSA or further iterations of LoftQ has another base, and is near to that in float at full rank") {
  const auto exact = logits(mistral("standard", qd::BaseFormat::float32), 0);
  const double lost = distance(logits(mistral("standard"), 0), exact);
  const auto pissa = mistral("pissa"), again = mistral("loftq:4");
  CHECK(distance(logits(pissa, 0), exact) > lost);
  CHECK(distance(logits(pissa, rank), exact) < lost);
  CHECK(distance(logits(again, rank), exact) < lost);
  CHECK_FALSE(test::same_bits(logits(again, 0).view(), logits(mistral("loftq"), 0).view()));
  // Of a base in float, the sum is the weight itself; and LoftQ has nothing to begin with.
  CHECK(distance(logits(mistral("pissa", qd::BaseFormat::float32), rank), exact) < 1e-4 * distance(logits(pissa, 0), exact));
  const auto lossless = mistral("loftq", qd::BaseFormat::float32);
  for (const auto& block : lossless->blocks)
    for (const auto& initial : block->initial) CHECK(initial.rank() == 0);
}

TEST_CASE("calibration finds the root mean square of what enters each linear layer of every kind of block") {
  for (const auto& config : test::tiny_configs()) {
    CAPTURE(config.architecture == qd::Architecture::llama, config.shared_norm, config.heads.kv_heads);
    std::vector<qd::Batch> batches{test::random_batch(config.vocab, {7, 4}, 1), test::random_batch(config.vocab, {9}, 2)};
    const auto tokens = static_cast<float>(batches[0].tokens() + batches[1].tokens());
    // With the identity for A, the moments of A x that re-ordering gathers have sums of squares of x on their diagonal.
    constexpr Index wide = 32;
    qd::Decoder<float> model(test::tiny_weights<float>(config), {.lora = {.max_rank = wide}});
    model.for_each_linear([&](auto& linear) {
      REQUIRE(linear.in() <= wide);
      auto& a = linear.adapter().a().value;
      for (Index i = 0; i < wide; ++i)
        for (Index k = 0; k < linear.in(); ++k) a(i, k) = i == k ? 1.0f : 0.0f;
      linear.adapter().start_collecting();
    });
    for (const auto& batch : batches) model.loss_and_gradient(batch, 1.0);
    std::vector<std::vector<float>> expected;
    model.for_each_linear([&](auto& linear) {
      expected.emplace_back();
      for (Index k = 0; k < linear.in(); ++k) expected.back().push_back(std::sqrt(linear.adapter().moment_a(k, k) / tokens));
      linear.adapter().stop_collecting();
    });
    test::randomize_adapters(model);  // which have no part in it
    const auto found = qd::calibrate(model, std::span<const qd::Batch>(batches));
    REQUIRE(found.size() == expected.size());
    for (std::size_t l = 0; l < found.size(); ++l) {
      CAPTURE(l);
      REQUIRE(found[l].size() == expected[l].size());
      for (std::size_t k = 0; k < found[l].size(); ++k) CHECK(found[l][k] == Approx(expected[l][k]).epsilon(1e-5));
    }
    qd::Decoder<float> threaded(test::tiny_weights<float>(config), {}, qd::Cpu(3));
    CHECK(qd::calibrate(threaded, std::span<const qd::Batch>(batches)) == found);
    CHECK(code_of([&] { qd::calibrate(model, std::span<const qd::Batch>()); }) == Errc::bad_argument);
    batches.front().ids.front() = static_cast<std::int32_t>(config.vocab);
    CHECK(code_of([&] { qd::calibrate(model, std::span<const qd::Batch>(batches)); }) == Errc::bad_argument);
  }
}

TEST_CASE("a model that begins as QERA is the plain one at rank 0, and its layers' outputs are nearer to those in float than by LoftQ") {
  const auto plain = mistral("standard"), exact = mistral("standard", qd::BaseFormat::float32), loftq = mistral("loftq");
  const auto& config = plain->config;
  qd::Decoder<float> model(plain, {.lora = {.max_rank = 1}});
  const std::vector<qd::Batch> batches{test::random_batch(config.vocab, {12, 9, 12, 11, 12, 12}, 4)};
  qd::BaseOptions options;
  options.init = qd::adapter_init("qera", rank);
  CHECK(code_of([&] { qd::load_hugging_face(test::golden("mistral"), options); }) == Errc::bad_argument);
  options.input_rms = std::make_shared<const qd::InputScales>(qd::calibrate(model, std::span<const qd::Batch>(batches)));
  const auto qera = qd::load_hugging_face(test::golden("mistral"), options);
  CHECK(test::same_bits(logits(qera, 0).view(), logits(plain, 0).view()));
  CHECK_FALSE(test::same_bits(logits(qera, rank).view(), logits(loftq, rank).view()));

  // The squared error of each layer's outputs on the inputs that it was calibrated by, at a rank.
  const auto errors = [&](const auto& weights, Index at) {
    std::vector<double> sums;
    const std::size_t linears = config.linears().size();
    model.observe_inputs(batches.front(), [&](std::size_t l, qd::MatrixView<const float> x) {
      const auto& block = *weights->blocks[l / linears];
      qd::DynamicLoRALinear<float, qd::Cpu, qd::AnyFormat> layer(block.linear[l % linears], {.max_rank = rank});
      if (block.initial[l % linears].rank() > 0) qd::begin_with(layer.adapter(), block.initial[l % linears], qd::Cpu{});
      layer.set_rank(at);
      qd::Matrix<float> y(x.rows, layer.out()), reference(x.rows, layer.out());
      decltype(layer)::Context context;
      layer.forward(x, y.view(), context);
      exact->blocks[l / linears]->linear[l % linears]->visit([&](const auto& w) { qd::Cpu{}.matmul(x, w, reference.view()); });
      sums.push_back(std::pow(distance(y, reference), 2));
    });
    return sums;
  };
  model.set_ranks(qd::RankPlan::uniform(0));
  for (const Index at : {Index{1}, Index{4}, rank}) {
    const auto by_qera = errors(qera, at), by_loftq = errors(loftq, at), by_none = errors(plain, 0);
    double sum_qera = 0.0, sum_loftq = 0.0;
    for (std::size_t l = 0; l < by_qera.size(); ++l) {
      CAPTURE(at, l);
      CHECK(by_qera[l] < by_none[l]);
      sum_qera += by_qera[l];
      sum_loftq += by_loftq[l];
    }
    CAPTURE(at);
    CHECK(sum_qera < sum_loftq);
  }
}

TEST_CASE("initial values are in the memory plan") {
  const auto weights = mistral("loftq");
  std::size_t bytes = 0;
  for (const auto& block : weights->blocks)
    for (const auto& initial : block->initial) bytes += 4 * static_cast<std::size_t>(initial.a.size() + initial.b.size());
  qd::MemoryOptions options{.max_rank = rank};
  options.base.init = qd::adapter_init("loftq", rank);
  const auto plan = qd::memory_plan<float>(weights->config, options);
  CHECK(plan.initial == bytes);
  options.base.init = {};
  CHECK(plan.total() == bytes + qd::memory_plan<float>(weights->config, options).total());
}

TEST_CASE("initial values of what is no weight in float are refused") {
  qd::BaseOptions options;
  options.init = qd::adapter_init("loftq", rank);
  const auto error = error_of([&] { qd::load_hugging_face(test::golden("llama_tiny_bnb4"), options); });
  REQUIRE(error);
  CHECK(error->code() == Errc::unsupported);
  CHECK(error->tensor().ends_with("q_proj.weight"));
  CHECK(code_of([&] {
          qd::make_initial_weight(
              4, 64, options, [](Index, qd::MatrixView<float> out) { out(0, 3) = std::numeric_limits<float>::infinity(); }, qd::Cpu{});
        }) == Errc::non_finite);
  // The scale of QDyLoRA as published fits no two ranks.
  CHECK(code_of([&] {
          qd::Decoder<float>(mistral("pissa"), {.lora = {.max_rank = rank, .scale = qd::ScalePolicy::over_rank}});
        }) == Errc::unsupported);
}

}  // namespace initial_weight_test
