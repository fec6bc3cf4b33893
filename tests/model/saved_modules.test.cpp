// Modules that an adapter brings whole: a model with them computes what one that was made of them does.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include <qdylora/io/peft_load.hpp>
#include <qdylora/model/saved_modules.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"
#include "support/peft_model.hpp"
#include "support/random_data.hpp"
#include "support/tiny_model.hpp"

namespace saved_modules_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using test::error_of;

namespace {

qd::PeftTensor random_tensor(std::string name, Index rows, Index cols, std::uint64_t seed) {
  return {std::move(name), qd::clone(test::normal_matrix<float>(rows, cols, seed, 0.5).view()), rows == 1};
}

qd::PeftSaved saved(std::vector<qd::PeftTensor> tensors, bool ties = false) { return {{}, std::move(tensors), ties}; }

template <class... Tensors>
qd::PeftSaved saved_of(bool ties, Tensors&&... tensors) {
  std::vector<qd::PeftTensor> list;
  (list.push_back(std::move(tensors)), ...);
  return saved(std::move(list), ties);
}

std::vector<float> logits(std::shared_ptr<const qd::DecoderWeights<float>> weights) {
  qd::Decoder<float> model(std::move(weights), {.lora = {.max_rank = 1}});
  model.set_ranks(qd::RankPlan::uniform(0));
  qd::Batch batch;
  batch.add(std::vector<std::int32_t>{1, 5, 3, 2, 9, 16});
  const auto result = model.logits(batch);
  return {result.span().begin(), result.span().end()};
}

qd::DecoderConfig config_of(bool tied) {
  auto config = test::tiny_config();
  config.tied_head = tied;
  return config;
}

}  // namespace

TEST_CASE("an adapter's embedding, head and norms take the place of the model's", "[peft]") {
  const auto config = config_of(false);
  auto weights = test::tiny_weights<float>(config), expected = test::tiny_weights<float>(config);
  const Index width = config.width;
  const auto before = logits(test::tiny_weights<float>(config));
  const auto embedding = random_tensor("model.embed_tokens.weight", config.vocab, width, 1);
  const auto head = random_tensor("lm_head.weight", config.vocab, width, 2);
  const auto norm = random_tensor("model.norm.weight", 1, width, 3),
             first = random_tensor("model.layers.1.input_layernorm.weight", 1, width, 4),
             second = random_tensor("model.layers.0.post_attention_layernorm.weight", 1, width, 5);
  const auto copy_of = [](const qd::PeftTensor& t) { return qd::PeftTensor{t.name, qd::clone(t.value.view()), t.vector}; };
  const auto shared = weights->blocks[1];
  qd::replace_modules(*weights, saved_of(false, copy_of(embedding), copy_of(head), copy_of(norm), copy_of(first), copy_of(second)));
  expected->embedding = qd::clone(embedding.value.view());
  expected->head = qd::clone(head.value.view());
  expected->final_norm = qd::clone(norm.value.view());
  const auto put = [&](std::size_t block, bool attention, const qd::Matrix<float>& value) {
    auto own = qd::detail::with_own_norms(*expected->blocks[block], config);
    (attention ? own->attention_norm : own->mlp_norm) = qd::clone(value.view());
    expected->blocks[block] = own;
  };
  put(1, true, first.value);
  put(0, false, second.value);
  CHECK(shared->attention_norm.weight(0, 0) != weights->blocks[1]->attention_norm.weight(0, 0));  // another model may share the block
  CHECK(shared->linear[0] == weights->blocks[1]->linear[0]);
  const auto found = logits(weights);
  CHECK(found == logits(expected));
  CHECK(found != before);
}

TEST_CASE("PEFT's adapters with whole modules have PEFT's logits", "[peft]") {
  for (const std::string kind : {"tied", "untied"}) {
    const auto folder = test::golden("saved_modules/" + kind);
    const auto io = "saved_modules/" + kind + "/io.safetensors";
    const auto ids = test::load<std::int32_t>(io, "input_ids");
    for (const std::string name : {"head", "embedding", "both", "norms"}) {
      CAPTURE(kind, name);
      const auto adapter = qd::load_peft_adapter(folder / name, {.saved_modules = true});
      auto weights = qd::load_hugging_face(folder, {.format = qd::BaseFormat::float32});
      qd::replace_modules(*weights, adapter.saved);
      qd::Decoder<float> model(weights, {.lora = {.max_rank = 2}});
      test::put_adapter(adapter, model);
      const auto found = model.logits(test::unscored_batch(ids));
      const auto expected = test::load<float>(io, name);
      REQUIRE(static_cast<std::size_t>(found.size()) == expected.size());
      float largest = 0.0f, difference = 0.0f;
      for (std::size_t i = 0; i < expected.size(); ++i) {
        largest = std::max(largest, std::fabs(expected[i]));
        difference = std::max(difference, std::fabs(expected[i] - found.span()[i]));
      }
      CAPTURE(largest, difference);
      CHECK(difference < 2e-5f * largest);
    }
  }
}

TEST_CASE("where embedding and head are one, what the adapter does not bring stays as it was, unless it ties them", "[peft]") {
  const auto tied = config_of(true), untied = config_of(false);
  const auto embedding = [&] { return random_tensor("model.embed_tokens.weight", tied.vocab, tied.width, 1); };
  const auto head = [&] { return random_tensor("lm_head.weight", tied.vocab, tied.width, 2); };
  // The model made of these two.
  const auto made = [&](const qd::Matrix<float>& first, const qd::Matrix<float>& second) {
    auto weights = test::tiny_weights<float>(untied);
    weights->embedding = qd::clone(first.view());
    weights->head = qd::clone(second.view());
    return logits(weights);
  };
  const auto with = [&](const qd::PeftSaved& saved) {
    auto weights = test::tiny_weights<float>(tied);
    qd::replace_modules(*weights, saved);
    return logits(weights);
  };
  const auto own_weights = test::tiny_weights<float>(tied);
  const auto& own = own_weights->embedding.get<qd::Matrix<float>>();
  CHECK(with(saved_of(false, embedding())) == made(embedding().value, own));
  CHECK(with(saved_of(false, head())) == made(own, head().value));
  CHECK(with(saved_of(false, head(), embedding())) == made(embedding().value, head().value));
  CHECK(with(saved_of(false, embedding(), head())) == made(embedding().value, head().value));
  CHECK(with(saved_of(true, embedding())) == made(embedding().value, embedding().value));
  CHECK(with(saved_of(true, head())) == made(head().value, head().value));
}

TEST_CASE("a Falcon's layer norms are replaced with their biases", "[peft]") {
  const auto config = test::tiny_falcon_config();
  auto weights = test::tiny_weights<float>(config);
  qd::replace_modules(*weights, saved_of(false, random_tensor("transformer.ln_f.bias", 1, config.width, 1),
                                         random_tensor("transformer.h.1.ln_mlp.weight", 1, config.width, 2)));
  CHECK(weights->final_norm.bias(0, 3) == random_tensor("", 1, config.width, 1).value(0, 3));
  CHECK(weights->final_norm.weight(0, 3) == test::tiny_weights<float>(config)->final_norm.weight(0, 3));
  CHECK(weights->blocks[1]->mlp_norm.weight(0, 3) == random_tensor("", 1, config.width, 2).value(0, 3));
  CHECK(weights->blocks[1]->mlp_norm.bias(0, 3) == test::tiny_weights<float>(config)->blocks[1]->mlp_norm.bias(0, 3));
  const auto shared = test::tiny_falcon_config(1);  // one norm serves both
  auto one = test::tiny_weights<float>(shared);
  const auto error =
      error_of([&] { qd::replace_modules(*one, saved_of(false, random_tensor("transformer.h.0.ln_mlp.weight", 1, shared.width, 2))); });
  REQUIRE(error);
  CHECK(error->code() == Errc::missing_tensor);
}

TEST_CASE("a module that the model cannot hold is an error that names it", "[peft]") {
  const auto config = config_of(true);
  const Index width = config.width;
  const struct {
    std::string name;
    Index rows, cols;
    Errc code;
  } cases[] = {{"model.layers.0.self_attn.q_proj.weight", 16, width, Errc::unsupported},
               {"model.layers.1.mlp.down_proj.bias", 1, width, Errc::unsupported},
               {"score.weight", 2, width, Errc::missing_tensor},
               {"model.norm.bias", 1, width, Errc::missing_tensor},
               {"lm_head.bias", 1, config.vocab, Errc::missing_tensor},
               {"model.layers.2.input_layernorm.weight", 1, width, Errc::missing_tensor},
               {"model.layers.0.input_layernorm.weight", 1, width + 1, Errc::shape_mismatch},
               {"model.norm.weight", width, 1, Errc::shape_mismatch},
               {"model.embed_tokens.weight", config.vocab + 1, width, Errc::shape_mismatch},
               {"lm_head.weight", config.vocab, width - 1, Errc::shape_mismatch}};
  for (const auto& c : cases) {
    CAPTURE(c.name);
    auto weights = test::tiny_weights<float>(config);
    const auto error = error_of([&] { qd::replace_modules(*weights, saved_of(false, random_tensor(c.name, c.rows, c.cols, 1))); });
    REQUIRE(error);
    CHECK(error->code() == c.code);
    CHECK(std::string(error->what()).find(c.name) != std::string::npos);
  }
}

}  // namespace saved_modules_test
