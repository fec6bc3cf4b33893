// Copies of pageable memory, which a GPU may still read when the call returns: what gives that memory back has waited before.
#include <qdylora/cuda.hpp>
#include <qdylora/model/decoder.hpp>
#include <qdylora/model/upload.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>

#include "support/catch.hpp"
#include "support/random_data.hpp"
#include "support/tiny_model.hpp"

namespace uploads_test {

namespace qd = qdylora;
using qd::Cuda, qd::Index;

namespace {

/// Copies that nothing has waited for when f has returned, beside those of before.
template <class F>
int unawaited_after(F&& f) {
  auto& count = test::emulator::machine().unawaited_copies;
  count = 0;
  f();
  return count;
}

}  // namespace

TEST_CASE("what the library copies out of memory of its own has been copied when that is given back", "[cuda]") {
  const qd::CudaContext context({.workspace_bytes = std::size_t{4} << 20});
  const Cuda cuda(context);
  const auto host = test::normal_matrix<float>(40, 128, 1);
  qd::Matrix<float, qd::DeviceMemory> weight(40, 128);
  CHECK(unawaited_after([&] { cuda.upload(host.view(), weight.view()); }) == 1);  // host's owner waits
  CHECK(unawaited_after([&] { cuda.quantize(weight.view()); }) == 0);
  CHECK(unawaited_after([&] { cuda.upload(qd::quantize(host.view())); }) == 0);
  qd::DynamicLoRALinear<float, Cuda> layer(weight.view(), {.max_rank = 4}, {}, cuda);
  CHECK(unawaited_after([&] { layer.merged_weight(3); }) == 0);

  const auto config = test::tiny_config();
  const auto weights = test::tiny_weights<float>(config, true, {.format = qd::BaseFormat::float32});
  qd::Decoder<float, Cuda> model(qd::upload(*weights, cuda), {.lora = {.max_rank = 4}}, cuda);
  const auto batch = test::random_batch(config.vocab, {5, 2}, 5, 1);
  CHECK(unawaited_after([&] { model.queue_loss_and_gradient(batch, 1.0); }) == 0);  // a table of rotary positions
}

}  // namespace uploads_test
