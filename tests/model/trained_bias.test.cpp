// An adapter that PEFT saved with the biases of its layers, in a whole model: logits, and what is saved of it again.
#include <memory>
#include <string>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/io/peft.hpp>
#include <qdylora/model/decoder.hpp>
#include <qdylora/model/load_hugging_face.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"
#include "support/peft_model.hpp"

namespace trained_bias_test {

namespace qd = qdylora;
using qd::Index;
using Model = qd::Decoder<float>;

namespace {

Model model_of(const qd::PeftAdapter& adapter) {
  Model model(qd::load_hugging_face(test::golden("qwen2"), {.format = qd::BaseFormat::float32}), {.lora = qd::lora_options(adapter)});
  test::put_adapter(adapter, model);
  return model;
}

qd::Matrix<float> logits_of(Model& model) {
  return model.logits(test::unscored_batch(test::load<std::int32_t>("trained_bias/io.safetensors", "input_ids")));
}

double difference(const qd::Matrix<float>& found, const std::string& golden) {
  const auto expected = qd::SafetensorsFile(test::golden("trained_bias/io.safetensors")).matrix(golden);
  return test::relative_difference(found.view(), expected.view());
}

}  // namespace

TEST_CASE("PEFT's adapter with trained biases has PEFT's logits, and without it the model has its own", "[peft]") {
  const auto adapter = qd::load_peft_adapter(test::golden("trained_bias"));
  CHECK(adapter.config.trains_bias);
  for (const auto& module : adapter.modules) {
    CAPTURE(module.name);
    CHECK(module.biased() == !module.name.ends_with("down_proj"));
  }
  Model model = model_of(adapter);
  CHECK(difference(logits_of(model), "logits") < 1e-5);
  model.set_ranks(qd::RankPlan::uniform(0));
  CHECK(difference(logits_of(model), "base_logits") < 1e-5);
  CHECK(difference(logits_of(model), "logits") > 0.1);
}

TEST_CASE("Adapters with trained biases come back to the bit", "[peft]") {
  const test::TemporaryFolder folder;
  const auto adapter = qd::load_peft_adapter(test::golden("trained_bias"));
  Model model = model_of(adapter);
  std::vector<qd::NamedAdapter> named;
  model.for_each_linear([&](const auto& linear) {
    if (adapter.find(linear.adapter().options().name) != nullptr)
      named.push_back({linear.adapter().options().name, &linear.adapter()});
  });
  qd::save_peft_adapter(folder / "again", named, {.ranks = {1, 3}});
  const auto loaded = qd::load_peft_adapter(folder / "again");
  Model again = model_of(loaded);
  for (const Index rank : {0, 1, 3}) {
    CAPTURE(rank);
    for (Model* m : {&model, &again}) m->set_ranks(qd::RankPlan::uniform(rank));
    CHECK(test::same_bits(logits_of(model).view(), logits_of(again).view()));
  }
}

}  // namespace trained_bias_test
