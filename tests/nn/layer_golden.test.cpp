// The layer against PyTorch, PEFT and bitsandbytes: outputs and gradients of LoRA, rsLoRA, dropout and DyLoRA, prefix and frozen;
// merged weights; Linear4bit with and without an adapter.
// The golden B is [out, r], as PEFT writes it; the layer's is [r, out].
#include <string>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/golden.hpp"

namespace layer_golden_test {

namespace qd = qdylora;
using qd::GradientRows;
using qd::Index;
using qd::ScalePolicy;
using Float = qd::Matrix<float>;

namespace {

constexpr Index tokens = 21, in = 40, out = 24, max_rank = 8;

Float matrix(const qd::SafetensorsFile& file, const std::string& tensor, Index rows, Index cols) {
  const auto values = test::load<float>(file, tensor);
  REQUIRE(static_cast<Index>(values.size()) == rows * cols);
  Float result(rows, cols);
  std::copy(values.begin(), values.end(), result.data());
  return result;
}

Float golden(const std::string& tensor, Index rows, Index cols) {
  static const qd::SafetensorsFile file(test::golden("lora.safetensors"));
  return matrix(file, tensor, rows, cols);
}

Float linear4bit(const std::string& tensor, Index rows, Index cols) {
  static const qd::SafetensorsFile file(test::golden("linear4bit_io.safetensors"));
  return matrix(file, tensor, rows, cols);
}

Float transposed(const Float& x) {
  Float result(x.cols(), x.rows());
  for (Index i = 0; i < x.rows(); ++i)
    for (Index j = 0; j < x.cols(); ++j) result(j, i) = x(i, j);
  return result;
}

double difference(qd::MatrixView<const float> found, const Float& expected) {
  return test::relative_difference(found, expected.view(), 1.0);
}

// The CPU with the golden file's dropout mask, which holds 0 and 1 / (1 - p), in place of its own.
struct GoldenMask : qd::Cpu {
  template <class T>
  void dropout(qd::In<T> x, float, qd::DropoutKey, qd::MatrixView<T> y, qd::Update update = qd::Update::overwrite) const {
    const Float mask = golden("dropout_mask_p0.1", tokens, in);
    for (Index i = 0; i < y.rows; ++i)
      for (Index j = 0; j < y.cols; ++j)
        y(i, j) = static_cast<T>((update == qd::Update::accumulate ? y(i, j) : T{}) + x(i, j) * static_cast<T>(mask(i, j)));
  }
};

template <class Backend>
using LayerOn = qd::DynamicLoRALinear<float, Backend, qd::Dense<float>>;

template <class Backend = qd::Cpu>
LayerOn<Backend> golden_layer(ScalePolicy scale, GradientRows rows = GradientRows::prefix, float dropout = 0.0f) {
  LayerOn<Backend> layer(golden("W", out, in),
                         {.max_rank = max_rank, .alpha = 16.0f, .scale = scale, .gradient_rows = rows, .dropout = dropout});
  layer.set_bias(golden("bias", 1, out).view());
  qd::copy<float>(golden("A", max_rank, in), layer.adapter().a().value.view());
  qd::copy<float>(transposed(golden("B", out, max_rank)), layer.adapter().b().value.view());
  return layer;
}

template <class Backend>
void check(LayerOn<Backend>& layer, Index rank, const std::string& name) {
  CAPTURE(name);
  const Float x = golden("X", tokens, in), dy = golden("dY", tokens, out);
  layer.set_rank(rank);
  CHECK(difference(layer.forward(x), golden(name + "/Y", tokens, out)) < 1e-5);
  CHECK(difference(layer.backward(dy.view()), golden(name + "/dX", tokens, in)) < 1e-5);
  CHECK(difference(layer.adapter().a().gradient.view(), golden(name + "/dA", max_rank, in)) < 1e-5);
  CHECK(difference(layer.adapter().b().gradient.view(), transposed(golden(name + "/dB", out, max_rank))) < 1e-5);
}

}  // namespace

TEST_CASE("LoRA is the full rank at scale alpha / r") {
  auto layer = golden_layer(ScalePolicy::constant);
  check(layer, max_rank, "lora");
}

TEST_CASE("rsLoRA is the full rank at scale alpha / sqrt(r)") {
  auto layer = golden_layer(ScalePolicy::over_sqrt_rank);
  check(layer, max_rank, "rslora");
}

TEST_CASE("dropout acts on the adapter's input alone, forward and backward") {
  auto layer = golden_layer<GoldenMask>(ScalePolicy::constant, GradientRows::prefix, 0.1f);
  check(layer, max_rank, "lora_dropout");
}

TEST_CASE("DyLoRA is a prefix of the rows at scale alpha / b") {
  for (const Index rank : {1, 2, 4, 8}) {
    auto layer = golden_layer(ScalePolicy::over_rank);
    check(layer, rank, "dylora_b" + std::to_string(rank) + "_all");
  }
}

TEST_CASE("frozen DyLoRA trains the last row of the rank") {
  for (const Index rank : {1, 2, 4, 8}) {
    auto layer = golden_layer(ScalePolicy::over_rank, GradientRows::last_row);
    check(layer, rank, "dylora_b" + std::to_string(rank) + "_frozen");
  }
}

TEST_CASE("merged weights are the base plus the update of the rank") {
  const auto dylora = golden_layer(ScalePolicy::over_rank);
  for (const Index rank : {1, 2, 4})
    CHECK(difference(dylora.merged_weight(rank).view(), golden("merged_W_b" + std::to_string(rank), out, in)) < 1e-6);
  const auto lora = golden_layer(ScalePolicy::constant);
  CHECK(difference(lora.merged_weight(max_rank).view(), golden("merged_W_r8", out, in)) < 1e-6);
  CHECK(difference(lora.merged_weight(0).view(), golden("W", out, in)) == 0.0);
}

TEST_CASE("a layer without its adapter is bitsandbytes' Linear4bit") {
  const auto check_format = [](auto format, const std::string& name) {
    CAPTURE(name);
    qd::DynamicLoRALinear<float, qd::Cpu, decltype(format)> layer(linear4bit("W", 96, 128), {});
    layer.set_bias(linear4bit("bias", 1, 96).view());
    layer.set_rank(0);
    const Float x = linear4bit("X", 10, 128), dy = linear4bit("dY", 10, 96);
    CHECK(difference(layer.merged_weight(0).view(), linear4bit(name + "/W_dequant", 96, 128)) < 1e-7);
    CHECK(difference(layer.forward(x), linear4bit(name + "/Y", 10, 96)) < 1e-5);
    CHECK(difference(layer.backward(dy.view()), linear4bit(name + "/dX", 10, 128)) < 1e-5);
  };
  check_format(qd::NF4{}, "nf4_dq");
  check_format(qd::FP4{}, "fp4_dq");
}

TEST_CASE("a PEFT adapter on a Linear4bit computes the same in a layer") {
  const qd::SafetensorsFile io(test::golden("peft_linear/io.safetensors"));
  const qd::SafetensorsFile adapter(test::golden("peft_linear/adapter_model.safetensors"));
  qd::DynamicLoRALinear<float> layer(linear4bit("W", 96, 128), {.max_rank = 8, .alpha = 16.0f});
  layer.set_bias(linear4bit("bias", 1, 96).view());
  qd::copy<float>(matrix(adapter, "base_model.model.lin.lora_A.weight", 8, 128), layer.adapter().a().value.view());
  qd::copy<float>(transposed(matrix(adapter, "base_model.model.lin.lora_B.weight", 96, 8)), layer.adapter().b().value.view());
  const Float x = matrix(io, "X", 10, 128), dy = matrix(io, "dY", 10, 96);
  CHECK(difference(layer.forward(x), matrix(io, "Y", 10, 96)) < 1e-5);
  CHECK(difference(layer.backward(dy.view()), matrix(io, "dX", 10, 128)) < 1e-5);
  CHECK(difference(layer.adapter().a().gradient.view(), matrix(io, "dA", 8, 128)) < 1e-5);
  CHECK(difference(layer.adapter().b().gradient.view(), transposed(matrix(io, "dB", 96, 8))) < 1e-5);
}

}  // namespace layer_golden_test
