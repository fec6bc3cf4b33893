// Models whose adapters begin with what their quantization loses, or with the leading part of their weights.
#include <qdylora/model/initial_weight.hpp>

#include <cmath>
#include <limits>
#include <memory>
#include <string>

#include <qdylora/cpu/cpu.hpp>
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
