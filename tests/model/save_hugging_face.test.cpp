// Models whose weights trained, in Hugging Face folders: types, names and layouts of tensors, what reads back, and what is refused.
#include <algorithm>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include <qdylora/model/load_hugging_face.hpp>
#include <qdylora/model/save_hugging_face.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/tiny_model.hpp"

namespace save_hugging_face_test {

namespace qd = qdylora;
using qd::BaseFormat;
using qd::Errc;
using qd::Index;
using test::code_of;
using test::same_bits;

namespace {

qd::DecoderConfig untied(qd::DecoderConfig config) {
  config.tied_head = false;
  return config;
}

qd::Decoder<float> model_of(const qd::DecoderConfig& config, BaseFormat format, bool biases) {
  return qd::Decoder<float>(test::tiny_weights<float>(config, biases, {.format = format}), {.method = qd::AdapterMethod::full});
}

// As training leaves it: the last step's values are in no pass yet.
void shift(qd::Decoder<float>& model) {
  qd::Rng rng(21);
  for (const auto& p : model.parameters())
    for (float& x : p->value.span()) x += 0.05f * rng.normal();
}

}  // namespace

TEST_CASE("a model's folder holds what it computes with, and reads as the same model") {
  struct Case {
    qd::DecoderConfig config;
    BaseFormat format;
    bool exact;  // else q and k turn to another layout, whose sums have another order
  };
  auto turned = test::tiny_config();
  turned.rope_layout = qd::RopeLayout::interleaved;
  const test::TemporaryFolder folder;
  const auto batch = test::random_batch(17, {8, 5}, 3);
  for (const auto& c : {Case{test::tiny_config(), BaseFormat::float32, true}, {test::tiny_config(), BaseFormat::bfloat16, true},
                        {untied(test::tiny_config()), BaseFormat::bfloat16, true}, {turned, BaseFormat::bfloat16, false}}) {
    CAPTURE(std::string(name(c.format)), c.config.tied_head, c.exact);
    auto model = model_of(c.config, c.format, false);
    shift(model);
    qd::replace_file(folder / "config.json", qd::hugging_face_json(model).dump());
    qd::save_hugging_face_weights(folder / "model.safetensors", model);
    const qd::SafetensorsFile file(folder / "model.safetensors");
    CHECK(file.metadata().at("format") == "pt");
    CHECK(file.tensors().size() == model.parameters().size());
    CHECK(file.contains("lm_head.weight") == !c.config.tied_head);
    CHECK(file.info("model.norm.weight").shape == std::vector<Index>{12});
    CHECK(file.info("model.norm.weight").dtype == qd::DType::F32);
    const bool narrow = c.format == BaseFormat::bfloat16;
    CHECK(file.info("model.layers.1.mlp.down_proj.weight").dtype == (narrow ? qd::DType::BF16 : qd::DType::F32));
    CHECK(qd::read_json(folder / "config.json").at("torch_dtype") == name(c.format));
    model.set_training(false);
    qd::Decoder<float> read(qd::load_hugging_face(folder.path(), {.format = c.format}));
    read.set_ranks(qd::RankPlan::uniform(0));
    const auto expected = model.logits(batch), found = read.logits(batch);
    if (c.exact) CHECK(same_bits(found.view(), expected.view()));
    else CHECK(test::relative_difference(found.view(), expected.view()) < 1e-5);
  }
}

TEST_CASE("a Falcon and a model with biases go to a file under their own names") {
  const test::TemporaryFolder folder;
  for (auto config : test::tiny_configs()) {
    CAPTURE(static_cast<int>(config.architecture), config.shared_norm);
    auto model = model_of(config, BaseFormat::float32, true);
    shift(model);
    qd::save_hugging_face_weights(folder / "m", model);
    const qd::SafetensorsFile file(folder / "m");
    REQUIRE(file.tensors().size() == model.parameters().size());
    for (const auto& p : model.parameters()) {
      CAPTURE(p->name);
      const auto stored = file.matrix(p->name);
      REQUIRE(stored.size() == p->value.size());
      CHECK(std::equal(stored.span().begin(), stored.span().end(), p->value.span().begin()));
    }
    for (const auto& linear : config.linear_names()) CHECK(file.info(linear + ".bias").shape.size() == 1);
    CHECK(code_of([&] { qd::hugging_face_json(model); }) == Errc::unsupported);
  }
}

TEST_CASE("what cannot be saved as a model is refused, and nothing is written") {
  const test::TemporaryFolder folder;
  qd::Decoder<float> lora(test::tiny_weights<float>(test::tiny_config()));
  CHECK(code_of([&] { qd::save_hugging_face_weights(folder / "m", lora); }) == Errc::bad_argument);
  for (const char* tensor : {"model.norm.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"})
    for (const auto format : {BaseFormat::float32, BaseFormat::bfloat16}) {
      auto model = model_of(test::tiny_config(), format, false);
      for (const auto& p : model.parameters())
        if (p->name == tensor) p->value(0, 1) = std::numeric_limits<float>::infinity();
      const auto error = test::error_of([&] { qd::save_hugging_face_weights(folder / "m", model); });
      REQUIRE(error);
      CHECK(error->code() == Errc::non_finite);
      CHECK(error->tensor() == tensor);
    }
  CHECK(folder.count() == 0);
}

}  // namespace save_hugging_face_test
