// SmolLM2-135M-Instruct against a float32 reference in another program. Skipped where the model or the reference data is absent.
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/io/json.hpp>
#include <qdylora/model/generate.hpp>
#include <qdylora/model/load_gguf.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"
#include "support/smollm2.hpp"

namespace smollm2_test {

namespace qd = qdylora;
using qd::Index;
using Ids = std::vector<std::int32_t>;
using Model = qd::Decoder<float>;

namespace {

const qd::BaseOptions float32{.format = qd::BaseFormat::float32, .double_quant = true, .block_size = 64};

struct Files {
  std::filesystem::path model;
  qd::Json reference;
  std::filesystem::path logits, hidden;
};

std::optional<Files> find_files() {
  const auto model = test::smollm2(), reference = test::shared("data/ref_smollm2.json"),
             logits = test::shared("data/ref_plain_logits_pos.f32"),
             hidden = test::shared("data/ref_plain_hidden_first4tok_first8dim.f32");
  if (!model || !reference || !logits || !hidden) return std::nullopt;
  return Files{*model, qd::read_json(*reference), *logits, *hidden};
}

constexpr const char* absent = "SmolLM2 (set QDYLORA_MODEL) or its reference data (set QDYLORA_REFERENCE) is absent";

Model load(const Files& files, qd::BaseOptions options) {
  return Model(qd::load_gguf(qd::GgufFile(files.model), options), {.lora = {.max_rank = 1}, .checkpoint = true});
}

qd::Batch whole(const Ids& ids) {
  qd::Batch batch;
  batch.ids = ids;
  batch.targets.assign(ids.begin() + 1, ids.end());
  batch.targets.push_back(-1);
  batch.offsets = {0, batch.tokens()};
  return batch;
}

std::vector<float> read_floats(const std::filesystem::path& path) {
  const auto bytes = test::read_file(path);
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(float));
  return values;
}

// Mean loss of a text in windows of 512 tokens, the first token of each not scored; at most `most` tokens of it.
double mean_loss(Model& model, const Ids& ids, std::size_t most = static_cast<std::size_t>(-1)) {
  double sum = 0.0;
  Index scored = 0;
  for (std::size_t first = 0; first < std::min(ids.size(), most); first += 512) {
    qd::Batch batch;
    batch.add(std::span(ids).subspan(first, std::min<std::size_t>(512, ids.size() - first)));
    for (const double loss : model.losses(batch)) sum += loss;
    scored += batch.scored();
  }
  return sum / static_cast<double>(scored);
}

}  // namespace

TEST_CASE("SmolLM2 in float32: logits of two prompts agree with the reference") {
  const auto files = find_files();
  if (!files) SKIP(absent);
  auto model = load(*files, float32);
  CHECK(model.config().layers == 30);
  CHECK(model.config().linear_weights() == 106'168'320);
  CHECK(model.config().tied_head);
  const auto expected = read_floats(files->logits);
  for (const char* name : {"plain", "chat"}) {
    CAPTURE(name);
    const auto& prompt = files->reference["prompts"][name];
    const auto batch = whole(prompt["ids"].get<Ids>());
    const auto logits = model.logits(batch);
    double worst_top = 0.0, worst_mean = 0.0, worst_deviation = 0.0, sum_loss = 0.0;
    for (Index t = 0; t < batch.tokens(); ++t) {
      const auto at = static_cast<std::size_t>(t);
      const float* row = logits.view().row(t);
      double sum = 0.0, squares = 0.0, normalizer = 0.0;
      for (Index j = 0; j < logits.cols(); ++j) sum += static_cast<double>(row[j]);
      const double mean = sum / static_cast<double>(logits.cols());
      for (Index j = 0; j < logits.cols(); ++j) {
        squares += (static_cast<double>(row[j]) - mean) * (static_cast<double>(row[j]) - mean);
        normalizer += std::exp(static_cast<double>(row[j]));
      }
      if (batch.targets[at] >= 0) sum_loss += std::log(normalizer) - static_cast<double>(row[batch.targets[at]]);
      // torch's deviation divides by n - 1, which 49152 elements cannot tell.
      worst_deviation = std::max(worst_deviation, std::fabs(std::sqrt(squares / static_cast<double>(logits.cols())) -
                                                            prompt["logit_std"][at].get<double>()));
      worst_mean = std::max(worst_mean, std::fabs(mean - prompt["logit_mean"][at].get<double>()));
      std::vector<std::int32_t> order(static_cast<std::size_t>(logits.cols()));
      for (std::size_t j = 0; j < order.size(); ++j) order[j] = static_cast<std::int32_t>(j);
      std::partial_sort(order.begin(), order.begin() + 5, order.end(), [&](auto a, auto b) { return row[a] > row[b]; });
      for (std::size_t k = 0; k < 5; ++k) {
        const auto id = prompt["top5"][at][k][0].get<std::int32_t>();
        CHECK(order[k] == id);
        worst_top = std::max(worst_top, std::fabs(static_cast<double>(row[id]) - prompt["top5"][at][k][1].get<double>()));
      }
    }
    CHECK(worst_top <= 2e-3);
    CHECK(worst_mean <= 1e-3);
    CHECK(worst_deviation <= 1e-3);
    CHECK(sum_loss / static_cast<double>(batch.scored()) == Approx(prompt["mean_nll"].get<double>()).epsilon(1e-4));
    if (std::string(name) != "plain") continue;
    REQUIRE(expected.size() == static_cast<std::size_t>(4 * logits.cols()));
    for (std::size_t k = 0; k < 4; ++k) {
      const auto position = prompt["full_logits_positions"][k].get<Index>();
      const float* reference = expected.data() + k * static_cast<std::size_t>(logits.cols());
      float largest = 0.0f;
      for (Index j = 0; j < logits.cols(); ++j)
        largest = std::max(largest, std::fabs(logits(position, j) - reference[j]));
      CAPTURE(position);
      CHECK(largest <= 2e-3f);
    }
  }
}

TEST_CASE("SmolLM2 in float32: hidden states after the embedding and every layer agree with the reference") {
  const auto files = find_files();
  if (!files) SKIP(absent);
  auto model = load(*files, float32);
  const auto expected = read_floats(files->hidden);  // [31, 4, 8]
  REQUIRE(expected.size() == 31 * 4 * 8);
  auto ids = files->reference["prompts"]["plain"]["ids"].get<Ids>();
  ids.resize(4);  // what follows does not change them
  model.loss_and_gradient(whole(ids), 0.0);
  for (Index layer = 0; layer <= 30; ++layer) {
    CAPTURE(layer);
    double worst = 0.0;
    for (Index t = 0; t < 4; ++t) {
      const float* row = model.stream(layer).row(t);
      // The reference's last state is after the final norm.
      double inverse = 1.0;
      if (layer == 30) {
        double squares = 0.0;
        for (Index j = 0; j < 576; ++j) squares += static_cast<double>(row[j]) * static_cast<double>(row[j]);
        inverse = 1.0 / std::sqrt(squares / 576.0 + 1e-5);
      }
      for (Index j = 0; j < 8; ++j) {
        const double weight = layer == 30 ? inverse * static_cast<double>(model.weights()->final_norm.weight(0, j)) : 1.0;
        const auto reference = static_cast<double>(expected[static_cast<std::size_t>((layer * 4 + t) * 8 + j)]);
        worst = std::max(worst, std::fabs(static_cast<double>(row[j]) * weight - reference) / (1.0 + std::fabs(reference)));
      }
    }
    CHECK(worst <= 1e-4);
  }
}

TEST_CASE("SmolLM2 in float32: the perplexity of three texts agrees with the reference to four digits") {
  const auto files = find_files();
  if (!files) SKIP(absent);
  auto model = load(*files, float32);
  for (const char* name : {"gsm8k_qa", "shakespeare", "alpaca"}) {
    CAPTURE(name);
    const auto& text = files->reference["perplexity"][name];
    CHECK(std::exp(mean_loss(model, text["ids"].get<Ids>())) == Approx(text["ppl"].get<double>()).epsilon(5e-5));
    if (std::string(name) != "alpaca") continue;
    qd::Batch batch;
    batch.add(std::span<const std::int32_t>(text["ids"].get<Ids>()).first(17));
    const auto losses = model.losses(batch);
    for (std::size_t t = 0; t < 16; ++t) CHECK(losses[t] == Approx(text["first16_nll"][t].get<double>()).margin(2e-3));
  }
}

TEST_CASE("SmolLM2 in float32: greedy continuations with the cache equal the reference's, and those of running all again") {
  const auto files = find_files();
  if (!files) SKIP(absent);
  auto model = load(*files, float32);
  const auto& prompts = files->reference["prompts"];
  const std::vector<Ids> ids{prompts["plain"]["ids"].get<Ids>(), prompts["chat"]["ids"].get<Ids>()};
  const auto expected = prompts["plain"]["greedy"].get<Ids>();
  auto chat = prompts["chat"]["greedy"].get<Ids>();
  REQUIRE(chat.back() == 2);
  chat.pop_back();
  const auto found = qd::generate(model, std::span(ids), qd::RankPlan::uniform(0), {.max_tokens = 24, .stop_token = 2});
  CHECK(found[0] == expected);
  CHECK(found[1] == chat);

  // All 24 steps at once: the token that each position predicts, given the ones before.
  Ids text = ids[0];
  text.insert(text.end(), found[0].begin(), found[0].end());
  model.set_ranks(qd::RankPlan::uniform(0));
  const auto logits = model.logits(whole(text));
  for (std::size_t i = 0; i < 24; ++i) {
    const float* row = logits.view().row(static_cast<Index>(ids[0].size() + i) - 1);
    CHECK(std::max_element(row, row + logits.cols()) - row == found[0][i]);
  }
}

TEST_CASE("SmolLM2 in double-quantized NF4: the losses of three texts are near the reference's") {
  const auto files = find_files();
  if (!files) SKIP(absent);
  auto model = load(*files, {});
  const double bits = 8.0 * static_cast<double>(model.weights()->linear_bytes()) / 106'168'320.0;
  CHECK(bits == Approx(4.127).margin(0.001));
  const std::pair<const char*, double> expected[] = {{"gsm8k_qa", 2.230}, {"shakespeare", 4.102}, {"alpaca", 2.011}};
  for (const auto& [name, loss] : expected) {
    CAPTURE(name);
    CHECK(mean_loss(model, files->reference["perplexity"][name]["ids"].get<Ids>()) == Approx(loss).margin(0.01));
  }
}

}  // namespace smollm2_test
