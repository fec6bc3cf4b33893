// GGUF files that are written, read back; adapters in them compute what they computed as layers.
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include <qdylora/io/gguf.hpp>
#include <qdylora/io/gguf_adapter.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/random_data.hpp"

namespace gguf_adapter_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;

namespace {

qd::LoRAAdapter<float> trained(Index in, Index out, qd::LoRAOptions options, std::uint64_t seed) {
  qd::LoRAAdapter<float> adapter(in, out, std::move(options));
  qd::Rng rng(seed);
  test::fill_normal(adapter.a().value.view(), rng, 0.2);
  test::fill_normal(adapter.b().value.view(), rng, 0.2);
  if (adapter.gated())
    for (float& g : adapter.gates().value.span()) g = rng.uniform(0.5f, 1.5f);
  return adapter;
}

/// (alpha / r) B A of a file, as llama.cpp computes it.
qd::Matrix<double> update_of(const qd::GgufFile& file, const std::string& tensor) {
  const auto a = file.matrix(tensor + ".lora_a"), b = file.matrix(tensor + ".lora_b");
  const double scale = static_cast<double>(file.metadata().get<float>("adapter.lora.alpha")) / static_cast<double>(b.cols());
  REQUIRE(a.rows() == b.cols());
  qd::Matrix<double> update(b.rows(), a.cols());
  for (Index o = 0; o < b.rows(); ++o)
    for (Index i = 0; i < a.rows(); ++i)
      for (Index k = 0; k < a.cols(); ++k) update(o, k) += scale * static_cast<double>(b(o, i)) * static_cast<double>(a(i, k));
  return update;
}

qd::Matrix<double> update_of(const qd::LoRAAdapter<float>& adapter, Index rank) {
  const auto factors = adapter.coefficients(rank, rank);
  qd::Matrix<double> update(adapter.out(), adapter.in());
  for (Index o = 0; o < adapter.out(); ++o)
    for (Index i = 0; i < rank; ++i)
      for (Index k = 0; k < adapter.in(); ++k)
        update(o, k) += static_cast<double>(factors[static_cast<std::size_t>(i)]) * static_cast<double>(adapter.b().value(i, o)) *
                        static_cast<double>(adapter.a().value(i, k));
  return update;
}

}  // namespace

TEST_CASE("what a GGUF writer wrote is what a reader reads", "[gguf]") {
  const test::TemporaryFolder folder;
  const auto first = test::normal_matrix<float>(5, 7, 1), second = test::normal_matrix<float>(3, 64, 2);
  qd::GgufWriter writer;
  writer.metadata("general.architecture", "llama");
  writer.metadata("a.number", std::uint32_t{7});
  writer.metadata("a.real", 0.25f);
  writer.metadata("a.flag", true);
  writer.metadata("an.integer", std::int64_t{-9});
  writer.add("first", first.view());
  writer.add("part", second.view().left_cols(33));  // rows with a stride
  writer.add("second", second.view());
  CHECK(test::code_of([&] { writer.metadata("a.real", 1.0f); }) == Errc::duplicate);
  CHECK(test::code_of([&] { writer.add("first", first.view()); }) == Errc::duplicate);
  CHECK(test::code_of([&] { writer.metadata("general.alignment", std::uint32_t{64}); }) == Errc::bad_argument);
  writer.write(folder / "file.gguf");
  const qd::GgufFile file(folder / "file.gguf");
  CHECK(file.metadata().get<std::string>("general.architecture") == "llama");
  CHECK(file.metadata().get<std::uint32_t>("a.number") == 7);
  CHECK(file.metadata().get<float>("a.real") == 0.25f);
  CHECK(file.metadata().get<bool>("a.flag"));
  CHECK(file.metadata().get<std::int64_t>("an.integer") == -9);
  const auto same = [](const qd::Matrix<float>& read, qd::MatrixView<const float> written) {
    REQUIRE(read.rows() == written.rows);
    REQUIRE(read.cols() == written.cols);
    for (Index i = 0; i < written.rows; ++i)
      CHECK(std::memcmp(read.view().row(i), written.row(i), static_cast<std::size_t>(written.cols) * sizeof(float)) == 0);
  };
  same(file.matrix("first"), first.view());
  same(file.matrix("second"), second.view());
  same(file.matrix("part"), second.view().left_cols(33));
}

TEST_CASE("an adapter in a GGUF file is the layer's function at the rank it was saved at", "[gguf][adapter]") {
  const test::TemporaryFolder folder;
  const auto plain = trained(12, 16, {.max_rank = 8, .alpha = 4.0f, .name = "plain"}, 1);
  const auto over = trained(12, 20, {.max_rank = 8, .alpha = 6.0f, .scale = qd::ScalePolicy::over_rank, .name = "over"}, 2);
  const auto narrow = trained(24, 16, {.max_rank = 3, .alpha = 5.0f, .name = "narrow"}, 3);
  const auto gated = trained(12, 16, {.max_rank = 8, .alpha = 4.0f, .name = "gated", .gated_ranks = {2, 4, 8}}, 4);
  const std::vector<qd::GgufAdapterTensor> tensors = {
      {"blk.0.attn_v.weight", &plain}, {"blk.0.ffn_up.weight", &over}, {"blk.0.ffn_down.weight", &narrow}, {"blk.1.attn_v.weight", &gated}};
  for (const Index rank : {1, 2, 4, 8, 0}) {
    CAPTURE(rank);
    const auto path = folder / ("rank" + std::to_string(rank) + ".gguf");
    qd::save_gguf_adapter(path, tensors, {.rank = rank, .name = "test"});
    const qd::GgufFile file(path);
    CHECK(file.metadata().get<std::string>("general.type") == "adapter");
    CHECK(file.metadata().get<std::string>("general.architecture") == "llama");
    CHECK(file.metadata().get<std::string>("adapter.type") == "lora");
    CHECK(file.tensors().size() == 8);
    for (const auto& [tensor, adapter, heads] : tensors) {
      const Index r = std::min(rank == 0 ? Index{8} : rank, adapter->max_rank());
      CHECK(file.info(tensor + ".lora_a").shape == std::vector<Index>{r, adapter->in()});
      CHECK(file.info(tensor + ".lora_b").shape == std::vector<Index>{adapter->out(), r});
      CHECK(test::largest_difference(update_of(file, tensor).view(), update_of(*adapter, r).view()) < 1e-6);
    }
  }
}

TEST_CASE("query and key adapters leave Hugging Face's rotary layout for GGUF's", "[gguf][adapter]") {
  const test::TemporaryFolder folder;
  const auto adapter = trained(6, 16, {.max_rank = 2, .alpha = 2.0f}, 7);  // two heads of 8
  const std::vector<qd::GgufAdapterTensor> tensors = {{"blk.0.attn_q.weight", &adapter, 2}};
  qd::save_gguf_adapter(folder / "q.gguf", tensors);
  const auto b = qd::GgufFile(folder / "q.gguf").matrix("blk.0.attn_q.weight.lora_b");
  for (Index head = 0; head < 2; ++head)
    for (Index pair = 0; pair < 4; ++pair)
      for (Index i = 0; i < 2; ++i) {  // (j, j + 4) of a head becomes (2j, 2j + 1)
        CHECK(b(head * 8 + 2 * pair, i) == adapter.b().value(i, head * 8 + pair));
        CHECK(b(head * 8 + 2 * pair + 1, i) == adapter.b().value(i, head * 8 + 4 + pair));
      }
}

TEST_CASE("an adapter with magnitudes is refused: the format has no place for them", "[gguf][adapter]") {
  const auto plain = trained(6, 8, {.max_rank = 2}, 1), dora = trained(6, 8, {.max_rank = 2, .dora = true}, 2);
  test::TemporaryFolder folder;
  const std::vector<qd::GgufAdapterTensor> tensors{{"blk.0.attn_v.weight", &plain, 0}, {"blk.1.attn_v.weight", &dora, 0}};
  const auto error = test::error_of([&] { qd::save_gguf_adapter(folder / "a.gguf", tensors); });
  REQUIRE(error);
  CHECK(error->code() == Errc::unsupported);
  CHECK(std::string(error->what()).find("blk.1.attn_v.weight") != std::string::npos);
  CHECK_FALSE(std::filesystem::exists(folder / "a.gguf"));
}

TEST_CASE("modules have the tensor names of Llama-shaped files", "[gguf][adapter]") {
  CHECK(qd::gguf_tensor_of("model.layers.3.self_attn.q_proj") == "blk.3.attn_q.weight");
  CHECK(qd::gguf_tensor_of("model.layers.29.self_attn.o_proj") == "blk.29.attn_output.weight");
  CHECK(qd::gguf_tensor_of("model.layers.0.mlp.down_proj") == "blk.0.ffn_down.weight");
  for (const char* module : {"", "lm_head", "model.layers.", "model.layers.x.mlp.up_proj", "model.layers..mlp.up_proj",
                             "model.layers.1.mlp.up", "transformer.h.0.self_attention.dense"}) {
    CAPTURE(module);
    CHECK(test::code_of([&] { (void)qd::gguf_tensor_of(module); }) == Errc::unsupported);
  }
}

TEST_CASE("adapters that no file should hold are refused, and no file is left", "[gguf][adapter]") {
  const test::TemporaryFolder folder;
  auto adapter = trained(6, 16, {.max_rank = 4, .alpha = 2.0f}, 7);
  const auto save = [&](std::vector<qd::GgufAdapterTensor> tensors, Index rank) {
    return test::code_of([&] { qd::save_gguf_adapter(folder / "a.gguf", tensors, {.rank = rank}); });
  };
  CHECK(save({}, 0) == Errc::bad_argument);
  CHECK(save({{"blk.0.attn_q.weight", nullptr}}, 0) == Errc::bad_argument);
  CHECK(save({{"blk.0.attn_q.weight", &adapter}}, 5) == Errc::rank_range);
  CHECK(save({{"blk.0.attn_q.weight", &adapter, 3}}, 0) == Errc::shape_mismatch);
  CHECK(save({{"blk.0.attn_q.weight", &adapter}, {"blk.0.attn_q.weight", &adapter}}, 0) == Errc::duplicate);
  adapter.b().value(1, 2) = std::numeric_limits<float>::quiet_NaN();
  CHECK(save({{"blk.0.attn_q.weight", &adapter}}, 0) == Errc::non_finite);
  CHECK(folder.count() == 0);
}

}  // namespace gguf_adapter_test
