// A PEFT adapter with DoRA, loaded into layers: outputs, gradients, merged weights and the output of a lower rank are PEFT's.
#include <string>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/io/peft.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/golden.hpp"

namespace dora_golden_test {

namespace qd = qdylora;
using qd::Index;
using Float = qd::Matrix<float>;
using Layer = qd::DynamicLoRALinear<float, qd::Cpu, qd::Dense<float>>;

namespace {

Float golden(const std::string& tensor) {
  static const qd::SafetensorsFile file(test::golden("dora/io.safetensors"));
  return file.matrix(tensor);
}

double difference(qd::MatrixView<const float> found, const Float& expected) {
  return test::relative_difference(found, expected.view());
}

Layer layer_of(const qd::PeftAdapter& adapter, const std::string& name) {
  const auto& module = *adapter.find(name);
  Layer layer(golden(name + ".weight"), {.max_rank = module.rank(), .name = name, .dora = true});
  CHECK(difference(layer.adapter().magnitude().value.view(), golden(name + ".magnitude0")) < 1e-6);
  qd::assign(module, layer.adapter());
  return layer;
}

}  // namespace

TEST_CASE("a PEFT adapter with DoRA computes in layers what it computes in PEFT") {
  const auto adapter = qd::load_peft_adapter(test::golden("dora/adapter"));
  CHECK(adapter.config.use_dora);
  REQUIRE(adapter.modules.size() == 2);
  Layer up = layer_of(adapter, "up"), down = layer_of(adapter, "down");
  down.set_bias(golden("down.bias").view());
  const Float x = golden("x"), dy = golden("dy");

  CHECK(difference(down.forward(up.forward(x)), golden("y")) < 1e-6);
  CHECK(difference(up.backward(down.backward(dy.view())), golden("dx")) < 1e-6);
  for (const auto& [layer, name] : {std::pair(&up, "up"), std::pair(&down, "down")}) {
    CAPTURE(name);
    const std::string stem = "grad/" + std::string(name);
    CHECK(difference(layer->adapter().a().gradient.view(), golden(stem + ".lora_A.weight")) < 1e-6);
    CHECK(difference(layer->adapter().b().gradient.view(), qd::detail::transposed(golden(stem + ".lora_B.weight"))) < 1e-6);
    CHECK(difference(layer->adapter().magnitude().gradient.view(), golden(stem + ".lora_magnitude_vector")) < 1e-6);
    CHECK(difference(layer->merged_weight(4).view(), golden("merged/" + std::string(name))) < 1e-6);
  }

  up.set_rank(2);
  down.set_rank(2);
  CHECK(difference(down.forward(up.forward(x)), golden("y_rank2")) < 1e-6);
}

}  // namespace dora_golden_test
