// Falcons: what transformers and PEFT compute of four kinds of them, their configs, and that they train and decode as Llamas do.
// Gradients by central differences are in decoder.test.cpp.
#include <cmath>
#include <functional>
#include <string>
#include <vector>

#include <qdylora/io/peft.hpp>
#include <qdylora/model/load_hugging_face.hpp>
#include <qdylora/model/trainer.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"
#include "support/golden_batch.hpp"
#include "support/tiny_model.hpp"

namespace falcon_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using test::error_of;

namespace {

const qd::BaseOptions float32{.format = qd::BaseFormat::float32, .double_quant = true, .block_size = 64};
const std::string golden_models[] = {"falcon_7b", "falcon_40b", "falcon_11b", "falcon_biased"};

qd::Decoder<float> golden_model(const std::string& name, bool checkpoint = false) {
  qd::Decoder<float> model(qd::load_hugging_face(test::golden(name), float32), {.lora = {.max_rank = 4}, .checkpoint = checkpoint});
  const auto adapter = qd::load_peft_adapter(test::golden(name) / "adapter");
  std::size_t found = 0;
  model.for_each_linear([&](auto& linear) {
    const auto* module = adapter.find(linear.adapter().options().name);
    REQUIRE(module != nullptr);
    qd::assign(*module, linear.adapter());
    ++found;
  });
  REQUIRE(found == adapter.modules.size());
  return model;
}

// Grouped queries and two norms, or one group and one norm; wide enough that work is shared out among threads.
qd::DecoderConfig small_falcon(Index kv_heads) {
  auto config = test::small_config();
  config.architecture = qd::Architecture::falcon;
  config.heads.kv_heads = kv_heads;
  config.shared_norm = kv_heads == 1;
  return config;
}

}  // namespace

TEST_CASE("logits of golden Falcons of every kind agree with transformers' and PEFT's, whole and cut to two rows") {
  for (const auto& name : golden_models) {
    const qd::SafetensorsFile io(test::golden(name) / "io.safetensors");
    auto model = golden_model(name);
    for (const auto& [rank, tensor] : {std::pair(4, "logits"), std::pair(2, "logits_rank2")}) {
      CAPTURE(name, rank);
      const auto expected = test::load<float>(io, tensor);
      model.set_ranks(qd::RankPlan::uniform(rank));
      const auto logits = model.logits(test::golden_batch(io, 10));
      REQUIRE(expected.size() == static_cast<std::size_t>(logits.size()));
      float largest = 0.0f;
      for (std::size_t i = 0; i < expected.size(); ++i) largest = std::max(largest, std::fabs(expected[i] - logits.span()[i]));
      CHECK(largest <= 1e-4f);
    }
  }
}

TEST_CASE("the losses of golden Falcons and every gradient of them agree, with checkpointing and without") {
  for (const auto& name : golden_models)
    for (const bool checkpoint : {false, true}) {
      const qd::SafetensorsFile io(test::golden(name) / "io.safetensors");
      auto model = golden_model(name, checkpoint);
      const auto batch = test::golden_batch(io, 10);
      const auto expected = static_cast<double>(test::load<float>(io, "loss")[0]);
      const auto scored = static_cast<double>(batch.scored());
      CHECK(model.loss_and_gradient(batch, 1.0 / scored) / scored == Approx(expected).margin(1e-5));
      model.for_each_linear([&](auto& linear) {
        const std::string module = "grad/base_model.model." + linear.adapter().options().name;
        CAPTURE(name, module);
        const auto a = io.matrix(module + ".lora_A.weight"), b = io.matrix(module + ".lora_B.weight");
        qd::Matrix<float> b_rows(b.cols(), b.rows());
        for (Index i = 0; i < b.rows(); ++i)
          for (Index j = 0; j < b.cols(); ++j) b_rows(j, i) = b(i, j);
        CHECK(std::sqrt(test::normalised_squared_error(std::as_const(linear.adapter().a().gradient).view(), a.view())) <= 1e-5);
        CHECK(std::sqrt(test::normalised_squared_error(std::as_const(linear.adapter().b().gradient).view(), b_rows.view())) <= 1e-5);
      });
    }
}

TEST_CASE("an adapter of a Falcon is saved with the tensors PEFT saved, bit for bit") {
  const test::TemporaryFolder folder;
  for (const auto& name : golden_models) {
    const auto model = golden_model(name);
    std::vector<qd::NamedAdapter> adapters;
    model.for_each_linear([&](const auto& linear) { adapters.push_back({linear.adapter().options().name, &linear.adapter()}); });
    qd::save_peft_adapter(folder.path(), adapters);
    const qd::SafetensorsFile found(folder / "adapter_model.safetensors");
    const qd::SafetensorsFile expected(test::golden(name) / "adapter" / "adapter_model.safetensors");
    REQUIRE(found.tensors().size() == expected.tensors().size());
    for (const auto& tensor : expected.tensors()) {
      CAPTURE(name, tensor.name);
      CHECK(test::same_bits(found.matrix(tensor.name).view(), expected.matrix(tensor.name).view()));
    }
  }
}

TEST_CASE("a Falcon's config.json is read, also in the words of the first releases") {
  const test::TemporaryFolder folder;
  const auto read = [&](const qd::Json& json) {
    test::write_file(folder / "config.json", json.dump());
    return qd::hugging_face_config(folder / "config.json");
  };
  const auto expect = [](const qd::DecoderConfig& c, Index layers, Index kv_heads, Index head_dim, bool shared_norm) {
    CHECK(c.architecture == qd::Architecture::falcon);
    CHECK(c.layers == layers);
    CHECK(c.heads.kv_heads == kv_heads);
    CHECK(c.heads.head_dim == head_dim);
    CHECK(c.shared_norm == shared_norm);
    CHECK(c.mlp_width == 4 * c.width);
    CHECK(c.context == 2048);
    CHECK(c.vocab == 65024);
    CHECK(c.norm_epsilon == 1e-5f);
    CHECK(c.rope_base == 10000.0);
    CHECK(c.rope_layout == qd::RopeLayout::half_split);
    CHECK(c.tied_head);
  };
  const qd::Json small = {{"model_type", "falcon"},
                          {"vocab_size", 65024},
                          {"hidden_size", 4544},
                          {"num_hidden_layers", 32},
                          {"num_attention_heads", 71},
                          {"num_kv_heads", 71},
                          {"alibi", false},
                          {"bias", false},
                          {"multi_query", true},
                          {"parallel_attn", true},
                          {"new_decoder_architecture", false}};
  expect(read(small), 32, 1, 64, true);
  const qd::Json large = {{"model_type", "falcon"},          {"vocab_size", 65024},        {"hidden_size", 8192},
                          {"num_hidden_layers", 60},         {"num_attention_heads", 128}, {"num_kv_heads", 8},
                          {"new_decoder_architecture", true}};
  expect(read(large), 60, 8, 64, false);
  expect(read({{"model_type", "RefinedWebModel"},
               {"vocab_size", 65024},
               {"hidden_size", 4544},
               {"n_layer", 32},
               {"n_head", 71},
               {"multi_query", true},
               {"parallel_attn", true},
               {"alibi", false},
               {"layer_norm_epsilon", 1e-5}}),
         32, 1, 64, true);
  expect(read({{"model_type", "RefinedWeb"},
               {"vocab_size", 65024},
               {"hidden_size", 8192},
               {"n_layer", 60},
               {"n_head", 128},
               {"n_head_kv", 8},
               {"parallel_attn", true},
               {"alibi", false}}),
         60, 8, 64, false);
  auto changed = large;
  changed["num_ln_in_parallel_attn"] = 1;
  changed["ffn_hidden_size"] = 100;
  changed["rope_theta"] = 500042;
  changed["tie_word_embeddings"] = false;
  const auto other = read(changed);
  CHECK(other.shared_norm);
  CHECK(other.mlp_width == 100);
  CHECK(other.rope_base == 500042.0);
  CHECK_FALSE(other.tied_head);
  changed = small;
  changed["multi_query"] = false;
  CHECK(read(changed).heads.kv_heads == 71);
  // 7B: 7.2e9 weights, of which 6.9e9 are in the blocks' linear layers.
  CHECK(read(small).linear_weights() == 32 * Index{4544} * (4672 + 4544 + 2 * 18176));
}

TEST_CASE("a Falcon's config.json that makes no model is refused, and the key and the file are named") {
  const test::TemporaryFolder folder;
  const auto whole = qd::read_json(test::golden("falcon_40b") / "config.json");
  const auto bad = [&](const std::function<void(qd::Json&)>& change, const std::string& word, Errc code = Errc::bad_config) {
    auto json = whole;
    change(json);
    test::write_file(folder / "config.json", json.dump());
    const auto error = error_of([&] { qd::hugging_face_config(folder / "config.json"); });
    CAPTURE(word);
    REQUIRE(error);
    CAPTURE(std::string(error->what()));
    CHECK(error->code() == code);
    CHECK(error->file() == (folder / "config.json").native());
    CHECK(std::string(error->what()).find(word) != std::string::npos);
  };
  for (const char* key : {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"})
    bad([&](auto& j) { j.erase(key); }, key);
  for (const char* key : {"vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_kv_heads", "ffn_hidden_size",
                          "num_ln_in_parallel_attn", "max_position_embeddings"})
    for (const qd::Json& value : {qd::Json(0), qd::Json(-4), qd::Json(4.5), qd::Json("4")}) bad([&](auto& j) { j[key] = value; }, key);
  for (const char* key : {"alibi", "parallel_attn", "new_decoder_architecture", "multi_query", "tie_word_embeddings"})
    bad([&](auto& j) { j[key] = "yes"; }, key);
  bad([](auto& j) { j["alibi"] = true; }, "alibi: expected false, found true", Errc::unsupported);
  bad([](auto& j) { j["parallel_attn"] = false; }, "parallel_attn: expected true, found false", Errc::unsupported);
  bad([](auto& j) { j["activation"] = "gelu_new"; }, "activation: expected 'gelu', found 'gelu_new'", Errc::unsupported);
  bad([](auto& j) { j["num_ln_in_parallel_attn"] = 3; }, "num_ln_in_parallel_attn", Errc::unsupported);
  bad([](auto& j) { j["rope_parameters"]["rope_type"] = "yarn"; }, "rope_type", Errc::unsupported);
  bad([](auto& j) { j["apply_residual_connection_post_layernorm"] = true; }, "apply_residual", Errc::unsupported);
  bad([](auto& j) { j["hidden_size"] = 34; }, "hidden_size: expected a multiple of num_attention_heads = 4, found 34");
  bad([](auto& j) { j["num_kv_heads"] = 3; }, "key-value heads");
  bad([](auto& j) { j["hidden_size"] = 12; }, "head dimension");
  bad([](auto& j) { j["layer_norm_epsilon"] = 1.5; }, "norm epsilon");
  bad([](auto& j) { j["model_type"] = "RefinedWeb"; }, "n_layer");
  const auto first_kind = [](auto& j) { j["new_decoder_architecture"] = false; };
  bad([&](auto& j) { first_kind(j), j["multi_query"] = false; }, "num_kv_heads: expected 4, one for each head, found 2");
  bad([&](auto& j) { first_kind(j), j["num_ln_in_parallel_attn"] = 2; }, "num_ln_in_parallel_attn", Errc::unsupported);
}

TEST_CASE("a Falcon's folder that lacks a tensor, or has one too many or of another shape, is refused by its name") {
  const test::TemporaryFolder folder;
  const auto refused = [&](const std::string& name, const std::function<void(qd::Json&)>& change) {
    std::filesystem::copy(test::golden(name) / "model.safetensors", folder.path(), std::filesystem::copy_options::overwrite_existing);
    auto json = qd::read_json(test::golden(name) / "config.json");
    change(json);
    test::write_file(folder / "config.json", json.dump());
    const auto error = error_of([&] { qd::load_hugging_face(folder.path()); });
    REQUIRE(error);
    CHECK(error->file() == (folder / "model.safetensors").native());
    return std::pair(error->code(), error->tensor());
  };
  using Refusal = std::pair<Errc, std::string>;
  CHECK(refused("falcon_40b", [](auto& j) { j["num_ln_in_parallel_attn"] = 1; }) ==
        Refusal(Errc::missing_tensor, "transformer.h.0.input_layernorm.weight"));
  CHECK(refused("falcon_11b", [](auto& j) { j["num_ln_in_parallel_attn"] = 2; }) ==
        Refusal(Errc::missing_tensor, "transformer.h.0.ln_attn.weight"));
  CHECK(refused("falcon_40b", [](auto& j) { j["num_kv_heads"] = 4; }) ==
        Refusal(Errc::shape_mismatch, "transformer.h.0.self_attention.query_key_value.weight"));
  CHECK(refused("falcon_7b", [](auto& j) { j["tie_word_embeddings"] = false; }) == Refusal(Errc::missing_tensor, "lm_head.weight"));
  const auto [code, tensor] = refused("falcon_7b", [](auto& j) { j["num_hidden_layers"] = 1; });
  CHECK(code == Errc::unexpected_tensor);
  CHECK(tensor.starts_with("transformer.h.1."));
}

TEST_CASE("tokens fed to a Falcon one by one give the logits of the whole text") {
  for (const Index kv_heads : {1, 2, 4}) {
    qd::Decoder<double> model(test::tiny_weights<double>(test::tiny_falcon_config(kv_heads), true), {.lora = {.max_rank = 4}});
    test::randomize_adapters(model);
    model.set_ranks(qd::RankPlan::per_row(std::vector<Index>{4, 2}));
    const auto texts = test::random_batch(17, {10, 10}, 1);  // of nine tokens each
    const auto whole = model.logits(texts);
    std::vector<qd::Decoder<double>::Cache> caches;
    for (int s = 0; s < 2; ++s) caches.emplace_back(model.config(), 9);
    const auto feed = [&](std::size_t begin, std::size_t end) {
      qd::Batch batch;
      for (const std::size_t s : {0, 1}) {
        for (std::size_t t = begin; t < end; ++t) batch.ids.push_back(texts.ids[9 * s + t]);
        batch.offsets.push_back(batch.tokens());
      }
      batch.targets.assign(batch.ids.size(), -1);
      return model.infer(batch, caches);
    };
    for (std::size_t end = 4; end <= 9; ++end) {
      const auto logits = feed(end == 4 ? 0 : end - 1, end);
      for (Index s = 0; s < 2; ++s)
        CHECK(test::normalised_squared_error(logits.view().middle_rows(s, 1),
                                             whole.view().middle_rows(9 * s + static_cast<Index>(end) - 1, 1)) < 1e-24);
    }
  }
}

TEST_CASE("a quantized Falcon trains to the same bytes on 1, 2 and 3 threads, and lowers the loss at every rank") {
  const qd::RankSet ranks{1, 3, 8};
  for (const Index kv_heads : {1, 3}) {
    const auto weights = test::tiny_weights<float>(small_falcon(kv_heads), false, {});
    const auto recipe = qd::recipe("order-then-nest");
    std::vector<float> one_thread;
    for (const int threads : {1, 2, 3}) {
      qd::Decoder<float> model(weights, {.lora = qd::adapter_options(recipe, ranks, 8.0f, 2)}, qd::Cpu(threads));
      qd::Trainer<float> trainer(model, {.recipe = recipe, .ranks = ranks, .steps = 12, .lr = 5e-3, .warmup_steps = 2});
      const auto held_back = test::counting_batch(257, 4, 16, 900);
      const auto before = trainer.losses_by_rank(held_back);
      while (!trainer.done()) trainer.step(test::counting_batch(257, 5, 16, 50 + static_cast<std::uint64_t>(trainer.step_count())));
      const auto after = trainer.losses_by_rank(held_back);
      for (std::size_t i = 0; i < 3; ++i) CHECK(after[i] < before[i]);
      CHECK(after[3] == before[3]);  // the base, without adapter
      if (threads == 1) one_thread = test::values(model);
      else CHECK(test::values(model) == one_thread);
    }
  }
}

TEST_CASE("a Falcon quantized while it is read is the model of its quantized weights") {
  auto dense = qd::load_hugging_face(test::golden("falcon_40b"), float32), nf4 = qd::load_hugging_face(test::golden("falcon_40b"));
  for (std::size_t i = 0; i < dense->blocks.size(); ++i)
    for (std::size_t p = 0; p < 4; ++p) {
      const auto& weight = std::get<qd::Matrix<float>>(dense->blocks[i]->linear[p]->storage());
      const auto& stored = std::get<qd::NF4Tensor>(nf4->blocks[i]->linear[p]->storage());
      qd::Matrix<float> expected(weight.rows(), weight.cols()), found(weight.rows(), weight.cols());
      qd::Cpu{}.dequantize(qd::Cpu{}.quantize<qd::NF4, qd::DoubleQuant<>>(weight.view(), {}).view(), expected.view());
      qd::Cpu{}.dequantize(stored.view(), found.view());
      CHECK(test::same_bits(found.view(), expected.view()));
    }
}

namespace {

// A backend of one's own that stops short of layer norms.
class WithoutLayerNorm : public qd::Cpu {
 public:
  void layer_norm() const = delete;
  void layer_norm_backward() const = delete;
};
static_assert(qd::TransformerBackend<WithoutLayerNorm, float> && !qd::FalconBackend<WithoutLayerNorm, float>);
static_assert(qd::FalconBackend<qd::Cpu, float> && qd::FalconBackend<qd::Cpu, qd::bfloat16>);

}  // namespace

TEST_CASE("a backend without layer norms runs Llamas and refuses Falcons") {
  const auto llama = test::tiny_weights<float>(test::tiny_config());
  const auto batch = test::random_batch(17, {8, 5}, 3);
  CHECK(qd::Decoder<float, WithoutLayerNorm>(llama).losses(batch) == qd::Decoder<float>(llama).losses(batch));
  const auto falcon = test::tiny_weights<float>(test::tiny_falcon_config());
  const auto error = error_of([&] { qd::Decoder<float, WithoutLayerNorm> model(falcon); });
  REQUIRE(error);
  CHECK(error->code() == Errc::unsupported);
}

TEST_CASE("a Falcon of weights that do not fit its shape is refused") {
  const auto refused = [](auto change, const std::string& word) {
    const auto weights = test::tiny_weights<float>(test::tiny_falcon_config());
    change(*weights);
    const auto error = error_of([&] { qd::Decoder<float> model(weights); });
    REQUIRE(error);
    CAPTURE(std::string(error->what()));
    CHECK(error->code() == Errc::shape_mismatch);
    CHECK(std::string(error->what()).find(word) != std::string::npos);
  };
  using Weights = qd::DecoderWeights<float>;
  refused([](Weights& w) { w.final_norm.bias.resize(0, 0); }, "final norm's bias");
  refused([](Weights& w) { w.config.heads.kv_heads = 4; }, "transformer.h.0.self_attention.query_key_value");
  refused([](Weights& w) { w.config.mlp_width = 14; }, "transformer.h.0.mlp.dense_h_to_4h");
  refused([](Weights& w) { w.config.architecture = qd::Architecture::llama; }, "final norm's bias");
  refused(
      [](Weights& w) {
        auto block = std::make_shared<qd::BlockWeights<float>>(w.config);
        block->linear = w.blocks[1]->linear;
        block->attention_norm = test::tiny_norm<float>(w.config, 1);
        w.blocks[1] = block;
      },
      "mlp norm");
  refused(
      [](Weights& w) {
        auto block = std::make_shared<qd::BlockWeights<float>>(w.config);
        block->linear = {w.blocks[1]->linear[0]};
        w.blocks[1] = block;
      },
      "expected 4 linear weights, found 1");
}

}  // namespace falcon_test
