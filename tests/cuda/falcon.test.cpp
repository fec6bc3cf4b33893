// A Falcon of 40B's kind on the emulated device: what transformers and PEFT compute of it.
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/cuda.hpp>
#include <qdylora/io/peft.hpp>
#include <qdylora/model/load_hugging_face.hpp>
#include <qdylora/model/upload.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/golden.hpp"
#include "support/golden_batch.hpp"

namespace falcon_test {

namespace qd = qdylora;
using qd::Cuda, qd::Index;

namespace {

template <class S>
qd::Matrix<S> downloaded(const Cuda& cuda, const qd::Matrix<S, qd::DeviceMemory>& there) {
  qd::Matrix<S> here(there.rows(), there.cols());
  cuda.download(there.view(), here.view());
  return here;
}

}  // namespace

TEST_CASE("a golden Falcon has transformers' logits, losses and gradients on the device", "[cuda]") {
  const qd::CudaContext context({.workspace_bytes = std::size_t{4} << 20});
  const Cuda cuda(context);
  const auto folder = test::golden("falcon_40b");
  const qd::SafetensorsFile io(folder / "io.safetensors");
  const auto weights = qd::load_hugging_face(folder, {.format = qd::BaseFormat::float32});
  const auto there = qd::upload(*weights, cuda);
  const auto adapter = qd::load_peft_adapter(folder / "adapter");
  for (const bool checkpoint : {false, true}) {
    qd::Decoder<float, Cuda> model(there, {.lora = {.max_rank = 4}, .checkpoint = checkpoint}, cuda);
    model.for_each_linear([&](auto& linear) {
      const auto& options = linear.adapter().options();
      const auto* module = adapter.find(options.name);
      REQUIRE(module != nullptr);
      qd::LoRAAdapter<float> host(linear.in(), linear.out(), options);
      qd::assign(*module, host);
      linear.adapter().options().scale = host.options().scale;
      linear.adapter().options().alpha = host.options().alpha;
      qd::assign(linear.adapter(), host, cuda);
    });
    const auto batch = test::golden_batch(io, 10);
    for (const auto& [rank, tensor] : {std::pair(2, "logits_rank2"), std::pair(4, "logits")}) {
      CAPTURE(checkpoint, rank);
      const auto expected = test::load<float>(io, tensor);
      model.set_ranks(qd::RankPlan::uniform(rank));
      const auto logits = downloaded(cuda, model.logits(batch));
      REQUIRE(expected.size() == static_cast<std::size_t>(logits.size()));
      float largest = 0.0f;
      for (std::size_t i = 0; i < expected.size(); ++i) largest = std::max(largest, std::fabs(expected[i] - logits.span()[i]));
      CHECK(largest <= 1e-4f);
    }
    for (const auto& p : model.parameters()) cuda.fill(p->gradient.view(), 0.0f);
    const auto loss = static_cast<double>(test::load<float>(io, "loss")[0]), scored = static_cast<double>(batch.scored());
    CHECK(model.loss_and_gradient(batch, 1.0 / scored) / scored == Approx(loss).margin(1e-5));
    model.for_each_linear([&](auto& linear) {
      const std::string module = "grad/base_model.model." + linear.adapter().options().name;
      CAPTURE(checkpoint, module);
      const auto a = io.matrix(module + ".lora_A.weight"), b = io.matrix(module + ".lora_B.weight");
      qd::Matrix<float> b_rows(b.cols(), b.rows());
      for (Index i = 0; i < b.rows(); ++i)
        for (Index j = 0; j < b.cols(); ++j) b_rows(j, i) = b(i, j);
      const auto& found = std::as_const(linear).adapter();
      CHECK(std::sqrt(test::normalised_squared_error(downloaded(cuda, found.a().gradient).view(), a.view())) <= 1e-5);
      CHECK(std::sqrt(test::normalised_squared_error(downloaded(cuda, found.b().gradient).view(), b_rows.view())) <= 1e-5);
    });
  }
}

}  // namespace falcon_test
