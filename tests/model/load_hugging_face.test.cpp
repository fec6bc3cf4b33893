// Decoders from Hugging Face folders: small ones made here, whole and broken, and the golden one of bitsandbytes.
#include <cmath>
#include <filesystem>
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/model/load_hugging_face.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"
#include "support/tiny_model.hpp"

namespace load_hugging_face_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using test::Bytes;
using test::error_of;
using Float = qd::Matrix<float>;

namespace {

const qd::BaseOptions float32{.format = qd::BaseFormat::float32, .double_quant = true, .block_size = 64};

struct Tensor {
  std::vector<Index> shape;
  std::vector<float> values;
  qd::DType dtype = qd::DType::F32;
};
using Tensors = std::map<std::string, Tensor>;

Tensors tensors_of(const qd::DecoderWeights<float>& w) {
  Tensors tensors;
  const auto add = [&](const std::string& name, const Float& m) {
    const bool vector = name.find("norm") != std::string::npos || name.ends_with(".bias");
    tensors[name] = {vector ? std::vector<Index>{m.cols()} : std::vector<Index>{m.rows(), m.cols()}, {m.span().begin(), m.span().end()}};
  };
  add("model.embed_tokens.weight", w.embedding.get<Float>());
  if (!w.config.tied_head) add("lm_head.weight", w.head.get<Float>());
  add("model.norm.weight", w.final_norm.weight);
  for (std::size_t i = 0; i < w.blocks.size(); ++i) {
    const std::string prefix = "model.layers." + std::to_string(i) + ".";
    add(prefix + "input_layernorm.weight", w.blocks[i]->attention_norm.weight);
    add(prefix + "post_attention_layernorm.weight", w.blocks[i]->mlp_norm.weight);
    for (std::size_t p = 0; p < 7; ++p) {
      const std::string name = prefix + std::string(w.config.linears()[p].name);
      add(name + ".weight", std::get<Float>(w.blocks[i]->linear[p]->storage()));
      if (w.blocks[i]->bias[p].size() > 0) add(name + ".bias", w.blocks[i]->bias[p]);
    }
  }
  return tensors;
}

void write_tensors(const std::filesystem::path& path, const Tensors& tensors) {
  std::vector<Bytes> bytes;
  bytes.reserve(tensors.size());  // the writer borrows them
  qd::SafetensorsWriter writer;
  for (const auto& [name, tensor] : tensors) {
    auto& data = bytes.emplace_back();
    for (const float x : tensor.values) {
      if (tensor.dtype == qd::DType::F32) data.number(x);
      else data.number(tensor.dtype == qd::DType::F16 ? qd::half(x).bits : qd::bfloat16(x).bits);
    }
    writer.add(name, tensor.dtype, tensor.shape, std::as_bytes(std::span(data.data(), data.size())));
  }
  writer.write(path);
}

qd::Json config_json(const qd::DecoderConfig& c) {
  return {{"model_type", "llama"},
          {"vocab_size", c.vocab},
          {"hidden_size", c.width},
          {"intermediate_size", c.mlp_width},
          {"num_hidden_layers", c.layers},
          {"num_attention_heads", c.heads.heads},
          {"num_key_value_heads", c.heads.kv_heads},
          {"head_dim", c.heads.head_dim},
          {"max_position_embeddings", c.context},
          {"rms_norm_eps", 1e-5},
          {"rope_theta", c.rope_base},
          {"hidden_act", "silu"},
          {"tie_word_embeddings", c.tied_head}};
}

qd::DecoderConfig config_of(bool tied) {
  auto config = test::tiny_config();
  config.tied_head = tied;
  return config;
}

struct Fixture {
  qd::Json config;
  Tensors tensors;

  explicit Fixture(const qd::DecoderWeights<float>& w) : config(config_json(w.config)), tensors(tensors_of(w)) {}
  void write(const std::filesystem::path& folder) const {
    test::write_file(folder / "config.json", config.dump());
    write_tensors(folder / "model.safetensors", tensors);
  }
};

Float logits_of(std::shared_ptr<const qd::DecoderWeights<float>> weights) {
  qd::Decoder<float> model(std::move(weights), {.lora = {.max_rank = 1}});
  return model.logits(test::random_batch(17, {20, 5}, 1));
}

qd::Error refused(const std::function<void(Fixture&)>& change, const char* file, qd::BaseOptions options = {}) {
  const test::TemporaryFolder folder;
  Fixture fixture(*test::tiny_weights<float>(config_of(false), true));
  change(fixture);
  fixture.write(folder.path());
  const auto error = error_of([&] { qd::load_hugging_face(folder.path(), options); });
  REQUIRE(error);
  CAPTURE(std::string(error->what()));
  CHECK(error->file() == (folder / file).native());
  return *error;
}

}  // namespace

TEST_CASE("a Hugging Face folder is the model that was written, bit for bit") {
  const test::TemporaryFolder folder;
  for (const bool tied : {true, false})
    for (const bool biases : {true, false}) {
      const auto weights = test::tiny_weights<float>(config_of(tied), biases);
      Fixture(*weights).write(folder.path());
      const auto read = qd::load_hugging_face(folder.path(), float32);
      CHECK(read->config.tied_head == tied);
      CHECK(read->config.rope_layout == qd::RopeLayout::half_split);
      CHECK(read->config.heads.kv_heads == 2);
      CHECK(read->config.context == 32);
      CHECK(test::same_bits(logits_of(read).view(), logits_of(weights).view()));
    }
}

TEST_CASE("a Hugging Face folder in half precision is the model of its rounded weights") {
  const test::TemporaryFolder folder;
  for (const auto dtype : {qd::DType::F16, qd::DType::BF16}) {
    const auto weights = test::tiny_weights<float>(config_of(false), true);
    Fixture fixture(*weights);
    for (auto& [name, tensor] : fixture.tensors) tensor.dtype = dtype;
    fixture.write(folder.path());
    const auto found = logits_of(qd::load_hugging_face(folder.path(), float32));
    for (auto& [name, tensor] : fixture.tensors) {
      for (float& x : tensor.values) x = dtype == qd::DType::F16 ? static_cast<float>(qd::half(x)) : static_cast<float>(qd::bfloat16(x));
      tensor.dtype = qd::DType::F32;
    }
    fixture.write(folder.path());
    CHECK(test::same_bits(found.view(), logits_of(qd::load_hugging_face(folder.path(), float32)).view()));
    CHECK_FALSE(test::same_bits(found.view(), logits_of(weights).view()));
  }
}

TEST_CASE("a Hugging Face folder is quantized while it is read, as its weights would be") {
  const test::TemporaryFolder folder;
  Fixture(*test::tiny_weights<float>(config_of(true))).write(folder.path());
  for (const auto format : {qd::BaseFormat::nf4, qd::BaseFormat::fp8}) {
    const qd::BaseOptions options{.format = format, .double_quant = true, .block_size = 32};
    const auto direct = test::tiny_weights<float>(config_of(true), false, options);
    CHECK(test::same_bits(logits_of(qd::load_hugging_face(folder.path(), options)).view(), logits_of(direct).view()));
  }
}

TEST_CASE("shards are one checkpoint") {
  const test::TemporaryFolder folder;
  const auto weights = test::tiny_weights<float>(config_of(false), true);
  const Fixture fixture(*weights);
  test::write_file(folder / "config.json", fixture.config.dump());
  Tensors shards[3];
  qd::Json map = qd::Json::object();
  std::size_t next = 0;
  for (const auto& [name, tensor] : fixture.tensors) {
    const std::size_t shard = next++ % 3;
    shards[shard][name] = tensor;
    map[name] = "model-0000" + std::to_string(shard + 1) + "-of-00003.safetensors";
  }
  for (std::size_t i = 0; i < 3; ++i) write_tensors(folder / ("model-0000" + std::to_string(i + 1) + "-of-00003.safetensors"), shards[i]);
  const auto index = folder / "model.safetensors.index.json";
  const auto write_index = [&](const qd::Json& weight_map) { test::write_file(index, qd::Json{{"weight_map", weight_map}}.dump()); };
  write_index(map);
  CHECK(test::same_bits(logits_of(qd::load_hugging_face(folder.path(), float32)).view(), logits_of(weights).view()));

  const auto refused_map = [&](const char* tensor, const qd::Json& file) {
    qd::Json changed = map;
    changed[tensor] = file;
    write_index(changed);
    const auto error = error_of([&] { qd::load_hugging_face(folder.path(), float32); });
    REQUIRE(error);
    return *error;
  };
  // A file outside the folder is not opened, whatever it holds.
  const test::TemporaryFolder outside;
  write_tensors(outside / "model.safetensors", fixture.tensors);
  const auto relative = std::filesystem::relative(outside / "model.safetensors", folder.path()).native();
  for (const std::string& path : {relative, (outside / "model.safetensors").native(), std::string("../x"), std::string("sub/x.safetensors"),
                                  std::string(".."), std::string("."), std::string(), std::string("./model-00001-of-00003.safetensors")}) {
    CAPTURE(path);
    const auto error = refused_map("model.norm.weight", path);
    CHECK(error.code() == Errc::bad_config);
    CHECK(error.file() == index.native());
  }
  CHECK(refused_map("model.norm.weight", 3).code() == Errc::bad_config);
  const auto absent = refused_map("model.norm.weight", "model-00004-of-00003.safetensors");
  CHECK(absent.code() == Errc::open);
  CHECK(absent.file() == (folder / "model-00004-of-00003.safetensors").native());
  // The shard that is named does not hold the tensor.
  const auto there = map["model.norm.weight"].get<std::string>();
  const auto wrong = refused_map("model.norm.weight", there == "model-00001-of-00003.safetensors" ? "model-00002-of-00003.safetensors"
                                                                                                  : "model-00001-of-00003.safetensors");
  CHECK(wrong.code() == Errc::missing_tensor);
  CHECK(wrong.tensor() == "model.norm.weight");

  test::write_file(index, "{}");
  const auto empty = error_of([&] { qd::load_hugging_face(folder.path(), float32); });
  REQUIRE(empty);
  CHECK(empty->code() == Errc::bad_config);
  test::write_file(index, "{\"weight_map\": ");
  const auto cut = error_of([&] { qd::load_hugging_face(folder.path(), float32); });
  REQUIRE(cut);
  CHECK(cut->code() == Errc::json);
}

TEST_CASE("both forms of rotary settings are read, and defaults are those of transformers") {
  const test::TemporaryFolder folder;
  const auto read = [&](const std::function<void(qd::Json&)>& change) {
    auto json = config_json(config_of(true));
    change(json);
    test::write_file(folder / "config.json", json.dump());
    return qd::hugging_face_config(folder / "config.json");
  };
  CHECK(read([](auto& j) { j["rope_theta"] = 500000.0; }).rope_base == 500000.0);
  CHECK(read([](auto& j) { j["rope_parameters"] = {{"rope_theta", 100000.0}, {"rope_type", "default"}}; }).rope_base == 100000.0);
  CHECK(read([](auto& j) { j.erase("rope_theta"); }).rope_base == 10000.0);
  CHECK(read([](auto& j) { j["rope_scaling"] = nullptr; }).rope_base == 10000.0);
  CHECK(read([](auto& j) { j["rope_scaling"] = {{"type", "default"}}; }).rope_base == 10000.0);
  CHECK(read([](auto& j) { j.erase("rms_norm_eps"); }).norm_epsilon == 1e-6f);
  CHECK_FALSE(read([](auto& j) { j.erase("tie_word_embeddings"); }).tied_head);
  CHECK(read([](auto& j) { j.erase("max_position_embeddings"); }).context == 2048);
  const auto plain = read([](auto& j) {
    j.erase("num_key_value_heads");
    j["head_dim"] = nullptr;
    j["hidden_size"] = 16;
  });
  CHECK(plain.heads.kv_heads == 4);
  CHECK(plain.heads.head_dim == 4);
}

TEST_CASE("Qwen2's and Mistral's logits agree with transformers'") {
  for (const std::string name : {"qwen2", "mistral"}) {
    CAPTURE(name);
    const auto folder = test::golden(name);
    const qd::SafetensorsFile io(folder / "io.safetensors");
    qd::Decoder<float> model(qd::load_hugging_face(folder, {.format = qd::BaseFormat::float32}), {.lora = {.max_rank = 1}});
    CHECK(model.config().context == (name == "mistral" ? 12 : 64));  // its window, and its positions
    qd::Batch batch;
    batch.ids = test::load<std::int32_t>(io, "input_ids");
    batch.targets.assign(batch.ids.size(), -1);
    batch.offsets = {0, batch.tokens()};
    const auto logits = model.logits(batch);
    const auto expected = test::load<float>(io, "logits");
    REQUIRE(expected.size() == logits.span().size());
    double worst = 0.0;
    for (std::size_t i = 0; i < expected.size(); ++i)
      worst = std::max(worst, std::fabs(static_cast<double>(logits.span()[i]) - static_cast<double>(expected[i])));
    CHECK(worst < 1e-4);
    // Both files are in bfloat16, whose weights a base of bfloat16 has as they are.
    const auto narrow = qd::load_hugging_face(folder, {.format = qd::BaseFormat::bfloat16});
    CHECK(2 * narrow->linear_bytes() == model.weights()->linear_bytes());
    const qd::SafetensorsFile file(folder / "model.safetensors");
    for (std::size_t b = 0; b < narrow->blocks.size(); ++b)
      for (std::size_t l = 0; l < narrow->blocks[b]->linear.size(); ++l) {
        const auto tensor = model.config().block_name(static_cast<Index>(b)) + std::string(model.config().linears()[l].name) + ".weight";
        const auto& weight = std::get<qd::Matrix<qd::bfloat16>>(narrow->blocks[b]->linear[l]->storage());
        const auto bytes = file.bytes(tensor);
        CAPTURE(tensor);
        CHECK(std::ranges::equal(std::as_bytes(weight.span()), bytes.span()));
      }
    qd::Decoder<float> sixteen(narrow, {.lora = {.max_rank = 1}});
    CHECK(test::same_bits(sixteen.logits(batch).view(), logits.view()));
  }
}

TEST_CASE("a Qwen2 without its biases, or with sliding attention, is refused; a Mistral may have no window") {
  const test::TemporaryFolder folder;
  std::filesystem::copy(test::golden("qwen2"), folder / "model");
  auto config = qd::read_json(folder / "model" / "config.json");
  config["use_sliding_window"] = true;
  test::write_file(folder / "model" / "config.json", config.dump());
  CHECK(test::code_of([&] { (void)qd::load_hugging_face(folder / "model"); }) == Errc::unsupported);
  config["use_sliding_window"] = false;
  test::write_file(folder / "model" / "config.json", config.dump());
  const qd::SafetensorsFile file(folder / "model" / "model.safetensors");
  qd::SafetensorsWriter writer;
  std::vector<qd::Buffer<std::byte>> bytes;
  for (const auto& t : file.tensors()) bytes.push_back(file.bytes(t.name));
  for (std::size_t i = 0; i < bytes.size(); ++i)
    if (const auto& t = file.tensors()[i]; t.name != "model.layers.1.self_attn.k_proj.bias")
      writer.add(t.name, t.dtype, t.shape, bytes[i].span());
  writer.write(folder / "model" / "model.safetensors");
  const auto error = test::error_of([&] { (void)qd::load_hugging_face(folder / "model"); });
  REQUIRE(error);
  CHECK(error->code() == Errc::missing_tensor);
  CHECK(error->tensor() == "model.layers.1.self_attn.k_proj.bias");

  auto mistral = qd::read_json(test::golden("mistral") / "config.json");
  mistral["sliding_window"] = nullptr;
  test::write_file(folder / "config.json", mistral.dump());
  CHECK(qd::hugging_face_config(folder / "config.json").context == 64);
  mistral["max_position_embeddings"] = 32768;
  mistral.erase("sliding_window");
  test::write_file(folder / "config.json", mistral.dump());
  CHECK(qd::hugging_face_config(folder / "config.json").context == 4096);
}

TEST_CASE("a config.json that makes no model is refused, and the key or field is named") {
  const auto bad = [](const std::function<void(qd::Json&)>& change, const std::string& word, Errc code = Errc::bad_config) {
    const auto error = refused([&](Fixture& f) { change(f.config); }, "config.json");
    CHECK(error.code() == code);
    CAPTURE(std::string(error.what()), word);
    CHECK(std::string(error.what()).find(word) != std::string::npos);
  };
  for (const char* key : {"model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"}) {
    bad([&](auto& j) { j.erase(key); }, key);
    bad([&](auto& j) { j[key] = nullptr; }, key);
    bad([&](auto& j) { j[key] = qd::Json::array({1}); }, key);
  }
  for (const char* key : {"vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                          "num_key_value_heads", "head_dim", "max_position_embeddings"})
    for (const qd::Json& value : {qd::Json(0), qd::Json(-4), qd::Json(4.5), qd::Json("4"), qd::Json(std::uint64_t{1} << 63)}) {
      CAPTURE(key, value.dump());
      bad([&](auto& j) { j[key] = value; }, key);
    }
  bad([](auto& j) { j["model_type"] = "mpt"; }, "mpt", Errc::unsupported);
  bad([](auto& j) { j["hidden_act"] = "gelu"; }, "gelu", Errc::unsupported);
  bad([](auto& j) { j["rope_scaling"] = {{"rope_type", "llama3"}}; }, "llama3", Errc::unsupported);
  bad([](auto& j) { j["rope_parameters"] = {{"rope_theta", 1e4}, {"rope_type", "yarn"}}; }, "yarn", Errc::unsupported);
  bad([](auto& j) { j["rope_theta"] = -1.0; }, "rope base");
  bad([](auto& j) { j["rms_norm_eps"] = 2.0; }, "norm epsilon");
  bad([](auto& j) { j["rms_norm_eps"] = "small"; }, "rms_norm_eps");
  bad([](auto& j) { j["tie_word_embeddings"] = 1; }, "tie_word_embeddings");
  bad([](auto& j) { j["num_key_value_heads"] = 3; }, "key-value heads");
  bad([](auto& j) { j["head_dim"] = 3; }, "head dimension");
  bad([](auto& j) { j["num_hidden_layers"] = 1 << 20; }, "layers");
  bad([](auto& j) { j = qd::Json::array(); }, "");
}

TEST_CASE("a Hugging Face folder that lacks a tensor, or has one of another shape, is refused by its name") {
  const Fixture whole(*test::tiny_weights<float>(config_of(false), true));
  for (const auto& item : whole.tensors) {
    const std::string& name = item.first;
    CAPTURE(name);
    if (!name.ends_with(".bias")) {
      const auto missing = refused([&](Fixture& f) { f.tensors.erase(name); }, "model.safetensors");
      CHECK(missing.code() == Errc::missing_tensor);
      CHECK(missing.tensor() == name);
    }
    const auto longer = refused(
        [&](Fixture& f) {
          auto& t = f.tensors[name];
          ++t.shape.front();
          t.values.resize(t.shape.size() == 1 ? t.values.size() + 1 : t.values.size() + static_cast<std::size_t>(t.shape[1]));
        },
        "model.safetensors");
    CHECK(longer.code() == Errc::shape_mismatch);
    CHECK(longer.tensor() == name);
  }
  const auto integers = refused(
      [](Fixture& f) {
        f.tensors["model.layers.0.mlp.up_proj.weight"].dtype = qd::DType::I16;  // two bytes each, as the bfloat16 that is written
      },
      "model.safetensors");
  CHECK(integers.code() == Errc::dtype);
  CHECK(integers.tensor() == "model.layers.0.mlp.up_proj.weight");
  const auto cube = refused([](Fixture& f) { f.tensors["model.layers.0.mlp.up_proj.weight"].shape = {13, 12, 1}; }, "model.safetensors");
  CHECK(cube.code() == Errc::shape_mismatch);
}

TEST_CASE("a Hugging Face folder with a linear weight that is not finite is refused by its name") {
  const auto error =
      refused([](Fixture& f) { f.tensors["model.layers.1.mlp.down_proj.weight"].values[20] = std::numeric_limits<float>::quiet_NaN(); },
              "model.safetensors");
  CHECK(error.code() == Errc::non_finite);
  CHECK(error.tensor() == "model.layers.1.mlp.down_proj.weight");
  CHECK(std::string(error.what()).find("[1, 7]") != std::string::npos);
}

TEST_CASE("a Hugging Face folder with any weight that is not finite is refused by its name, in every format") {
  const Fixture whole(*test::tiny_weights<float>(config_of(false), true));
  for (const auto& item : whole.tensors)
    for (const auto& options : {qd::BaseOptions{}, float32}) {
      const auto error = refused([&](Fixture& f) { f.tensors[item.first].values[5] = std::numeric_limits<float>::infinity(); },
                                 "model.safetensors", options);
      CAPTURE(item.first);
      CHECK(error.code() == Errc::non_finite);
      CHECK(error.tensor() == item.first);
    }
}

TEST_CASE("a Hugging Face folder with layers beyond its count is refused; rotary frequencies within it may be there") {
  const auto error = refused([](Fixture& f) { f.config["num_hidden_layers"] = 1; }, "model.safetensors");
  CHECK(error.code() == Errc::unexpected_tensor);
  CHECK(error.tensor().starts_with("model.layers.1."));
  CHECK(std::string(error.what()).find("the 1 layers of config.json's num_hidden_layers") != std::string::npos);

  const test::TemporaryFolder folder;
  Fixture fixture(*test::tiny_weights<float>(config_of(false)));
  fixture.tensors["model.layers.1.self_attn.rotary_emb.inv_freq"] = {{2}, {1.0f, 0.01f}};
  fixture.write(folder.path());
  CHECK_FALSE(error_of([&] { qd::load_hugging_face(folder.path()); }));
}

TEST_CASE("a folder without its files is refused") {
  const test::TemporaryFolder folder;
  const auto code = [&] { return test::code_of([&] { qd::load_hugging_face(folder.path()); }); };
  CHECK(code() == Errc::open);
  test::write_file(folder / "config.json", "{");
  CHECK(code() == Errc::json);
  test::write_file(folder / "config.json", config_json(config_of(true)).dump());
  CHECK(code() == Errc::open);
  test::write_file(folder / "model.safetensors", "x");
  CHECK(code() == Errc::truncated);
}

TEST_CASE("a folder that bitsandbytes quantized keeps its four bits, whatever format is asked for") {
  const qd::SafetensorsFile io(test::golden("llama_tiny_io.safetensors"));
  const auto expected = test::load<float>(io, "logits_base_only");
  qd::Batch batch;
  batch.ids = test::load<std::int32_t>(io, "input_ids");
  batch.targets.assign(24, -1);
  batch.offsets = {0, 12, 24};
  for (const auto& options : {qd::BaseOptions{}, float32}) {
    const auto weights = qd::load_hugging_face(test::golden("llama_tiny_bnb4"), options);
    CHECK(weights->config.context == 64);
    CHECK(weights->config.norm_epsilon == 1e-6f);
    CHECK_FALSE(weights->config.tied_head);
    for (const auto& block : weights->blocks)
      for (const auto& linear : block->linear) CHECK(std::holds_alternative<qd::NF4Tensor>(linear->storage()));
    qd::Decoder<float> model(weights, {.lora = {.max_rank = 1}});
    const auto logits = model.logits(batch);
    float largest = 0.0f;
    for (std::size_t i = 0; i < expected.size(); ++i) largest = std::max(largest, std::fabs(expected[i] - logits.span()[i]));
    CHECK(largest <= 1e-4f);
  }
}

TEST_CASE("folders in FP4, with scales in float32, and with codes stored as bfloat16 have transformers' logits") {
  const auto folder = test::golden("quantized");
  const qd::SafetensorsFile io(folder / "io.safetensors");
  qd::Batch batch;
  batch.ids = test::load<std::int32_t>(io, "input_ids");
  batch.targets.assign(batch.ids.size(), -1);
  batch.offsets = {0, batch.tokens()};
  const auto check = [&]<class Tensor>(const std::string& name, qd::DType stored) {
    CAPTURE(name);
    const auto weights = qd::load_hugging_face(folder / name, float32);
    for (const auto& linear : weights->blocks.front()->linear) CHECK(std::holds_alternative<Tensor>(linear->storage()));
    CHECK(qd::SafetensorsFile(folder / name / "model.safetensors").info("model.layers.0.mlp.up_proj.weight").dtype == stored);
    qd::Decoder<float> model(weights, {.lora = {.max_rank = 1}});
    const auto logits = model.logits(batch);
    const auto expected = test::load<float>(io, name);
    REQUIRE(expected.size() == logits.span().size());
    float worst = 0.0f, largest = 0.0f;
    for (std::size_t i = 0; i < expected.size(); ++i) {
      worst = std::max(worst, std::fabs(expected[i] - logits.span()[i]));
      largest = std::max(largest, std::fabs(expected[i]));
    }
    CHECK(largest > 1.0f);
    CHECK(worst <= 1e-5f * largest);
  };
  check.operator()<qd::QuantizedTensor<qd::FP4, qd::DoubleQuant<>>>("fp4", qd::DType::U8);
  check.operator()<qd::QuantizedTensor<qd::FP4, qd::Float32Scales>>("fp4_plain", qd::DType::U8);
  check.operator()<qd::QuantizedTensor<qd::NF4, qd::Float32Scales>>("nf4_plain", qd::DType::U8);
  check.operator()<qd::NF4Tensor>("nf4_storage", qd::DType::BF16);
}

TEST_CASE("a quantized folder of another shape is refused by the tensor's name") {
  const test::TemporaryFolder folder;
  std::filesystem::copy(test::golden("llama_tiny_bnb4"), folder.path(), std::filesystem::copy_options::recursive);
  auto json = qd::read_json(folder / "config.json");
  json["intermediate_size"] = 256;
  test::write_file(folder / "config.json", json.dump());
  const auto error = error_of([&] { qd::load_hugging_face(folder.path()); });
  REQUIRE(error);
  CHECK(error->code() == Errc::shape_mismatch);
  CHECK(error->tensor() == "model.layers.0.mlp.gate_proj.weight");
}

}  // namespace load_hugging_face_test
