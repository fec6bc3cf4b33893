// Decoders from GGUF files: small ones made here, whole and broken.
#include <functional>
#include <limits>
#include <map>
#include <string>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/model/load_gguf.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/tiny_model.hpp"

namespace load_gguf_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using test::Bytes;
using test::error_of;
using Float = qd::Matrix<float>;

namespace {

const qd::BaseOptions float32{.format = qd::BaseFormat::float32, .double_quant = true, .block_size = 64};
constexpr std::uint32_t f32 = 0, f16 = 1, q8_0 = 8, bf16 = 30;  // ggml's numbers of types

struct Tensor {
  std::vector<Index> shape;  // slowest first
  std::vector<float> values;
  std::uint32_t type = f32;
};

// A GGUF file of a decoder, to be changed before it is written.
struct Fixture {
  std::map<std::string, std::uint32_t> numbers;
  std::map<std::string, float> reals;
  std::map<std::string, std::string> texts;
  std::map<std::string, Tensor> tensors;

  explicit Fixture(const qd::DecoderWeights<float>& w) {
    const auto& c = w.config;
    const auto u32 = [](Index value) { return static_cast<std::uint32_t>(value); };
    numbers = {{"llama.embedding_length", u32(c.width)},         {"llama.feed_forward_length", u32(c.mlp_width)},
               {"llama.block_count", u32(c.layers)},             {"llama.context_length", u32(c.context)},
               {"llama.attention.head_count", u32(c.heads.heads)}, {"llama.attention.head_count_kv", u32(c.heads.kv_heads)},
               {"llama.rope.dimension_count", u32(c.heads.head_dim)}};
    reals = {{"llama.rope.freq_base", static_cast<float>(c.rope_base)}, {"llama.attention.layer_norm_rms_epsilon", c.norm_epsilon}};
    texts = {{"general.architecture", "llama"}};
    vector_or_matrix("token_embd.weight", w.embedding.get<Float>());
    if (!c.tied_head) vector_or_matrix("output.weight", w.head.get<Float>());
    vector_or_matrix("output_norm.weight", w.final_norm.weight);
    constexpr const char* names[] = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"};
    for (std::size_t i = 0; i < w.blocks.size(); ++i) {
      const std::string prefix = "blk." + std::to_string(i) + ".";
      vector_or_matrix(prefix + "attn_norm.weight", w.blocks[i]->attention_norm.weight);
      vector_or_matrix(prefix + "ffn_norm.weight", w.blocks[i]->mlp_norm.weight);
      for (std::size_t p = 0; p < 7; ++p) {
        vector_or_matrix(prefix + names[p] + ".weight", std::get<Float>(w.blocks[i]->linear[p]->storage()));
        if (w.blocks[i]->bias[p].size() > 0) vector_or_matrix(prefix + names[p] + ".bias", w.blocks[i]->bias[p]);
      }
    }
  }

  void vector_or_matrix(const std::string& name, const Float& m) {
    const bool vector = name.find("norm") != std::string::npos || name.ends_with(".bias");
    tensors[name] = {vector ? std::vector<Index>{m.cols()} : std::vector<Index>{m.rows(), m.cols()},
                     {m.span().begin(), m.span().end()}};
  }

  void write(const std::filesystem::path& path) const {
    Bytes bytes, data;
    bytes.raw("GGUF").u32(3).u64(tensors.size()).u64(numbers.size() + reals.size() + texts.size());
    for (const auto& [key, value] : numbers) bytes.text(key).u32(4).u32(value);
    for (const auto& [key, value] : reals) bytes.text(key).u32(6).number(value);
    for (const auto& [key, value] : texts) bytes.text(key).u32(8).text(value);
    for (const auto& [name, tensor] : tensors) {
      bytes.text(name).u32(static_cast<std::uint32_t>(tensor.shape.size()));
      for (std::size_t d = tensor.shape.size(); d-- > 0;) bytes.u64(static_cast<std::uint64_t>(tensor.shape[d]));
      bytes.u32(tensor.type).u64(data.size());
      for (std::size_t i = 0; i < tensor.values.size(); ++i) {
        const float x = tensor.values[i];
        if (tensor.type == q8_0) {  // values are a scale, then 32 codes
          if (i % 33 == 0) data.number(qd::half(x).bits);
          else data.number(static_cast<std::int8_t>(x));
        } else if (tensor.type == f32) data.number(x);
        else data.number(tensor.type == f16 ? qd::half(x).bits : qd::bfloat16(x).bits);
      }
      data.pad(32);
    }
    test::write_file(path, std::string(bytes.pad(32)) + std::string(data));
  }
};

qd::DecoderConfig config_of(bool tied) {
  auto config = test::tiny_config();
  config.rope_layout = qd::RopeLayout::interleaved;
  config.tied_head = tied;
  return config;
}

Float logits_of(std::shared_ptr<const qd::DecoderWeights<float>> weights) {
  qd::Decoder<float> model(std::move(weights), {.lora = {.max_rank = 1}});
  return model.logits(test::random_batch(17, {20, 5}, 1));
}

// The error of loading a fixture after a change, which names the file always.
qd::Error refused(const std::function<void(Fixture&)>& change, qd::BaseOptions options = {}) {
  const test::TemporaryFolder folder;
  Fixture fixture(*test::tiny_weights<float>(config_of(false), true));
  change(fixture);
  fixture.write(folder / "model.gguf");
  const auto error = error_of([&] { qd::load_gguf(qd::GgufFile(folder / "model.gguf"), options); });
  REQUIRE(error);
  CAPTURE(std::string(error->what()));
  CHECK(error->file() == (folder / "model.gguf").native());
  return *error;
}

}  // namespace

TEST_CASE("a GGUF file is the model that was written, bit for bit") {
  const test::TemporaryFolder folder;
  for (const bool tied : {true, false})
    for (const bool biases : {true, false}) {
      const auto weights = test::tiny_weights<float>(config_of(tied), biases);
      Fixture(*weights).write(folder / "model.gguf");
      const auto read = qd::load_gguf(qd::GgufFile(folder / "model.gguf"), float32);
      CHECK(read->config.tied_head == tied);
      CHECK(read->config.rope_layout == qd::RopeLayout::interleaved);
      CHECK(read->config.heads.kv_heads == 2);
      CHECK(read->config.heads.head_dim == 4);
      CHECK(read->config.vocab == 17);
      CHECK(read->config.context == 32);
      CHECK(test::same_bits(logits_of(read).view(), logits_of(weights).view()));
    }
}

TEST_CASE("a GGUF file in half precision is the model of its rounded weights") {
  const test::TemporaryFolder folder;
  for (const std::uint32_t type : {f16, bf16}) {
    const auto weights = test::tiny_weights<float>(config_of(false));
    Fixture fixture(*weights);
    for (auto& [name, tensor] : fixture.tensors)
      if (tensor.shape.size() == 2) tensor.type = type;
    fixture.write(folder / "model.gguf");
    const auto found = logits_of(qd::load_gguf(qd::GgufFile(folder / "model.gguf"), float32));
    for (auto& [name, tensor] : fixture.tensors) {
      if (tensor.shape.size() == 2)
        for (float& x : tensor.values) x = type == f16 ? static_cast<float>(qd::half(x)) : static_cast<float>(qd::bfloat16(x));
      tensor.type = f32;
    }
    fixture.write(folder / "rounded.gguf");
    const auto expected = logits_of(qd::load_gguf(qd::GgufFile(folder / "rounded.gguf"), float32));
    CHECK(test::same_bits(found.view(), expected.view()));
    CHECK_FALSE(test::same_bits(found.view(), logits_of(weights).view()));
  }
}

TEST_CASE("tables in Q8_0 stay in 8 bits and keep their values") {
  const test::TemporaryFolder folder;
  auto config = config_of(false);
  config.width = 32;
  config.heads = {4, 2, 8};
  Fixture coded(*test::tiny_weights<float>(config)), decoded = coded;
  qd::Rng rng(5);
  for (const char* name : {"token_embd.weight", "output.weight"}) {
    auto& q = coded.tensors[name];
    auto& x = decoded.tensors[name].values;
    q.type = q8_0;
    q.values.clear();
    for (std::size_t row = 0; row < 17; ++row) {
      const auto d = static_cast<float>(qd::half(row == 3 ? 0.0f : 0.01f * rng.uniform()));
      q.values.push_back(d);
      for (std::size_t j = 0; j < 32; ++j) {
        q.values.push_back(static_cast<float>(rng.below(256)) - 128.0f);
        x[32 * row + j] = d * q.values.back();
      }
    }
  }
  coded.write(folder / "coded.gguf");
  decoded.write(folder / "decoded.gguf");
  const auto weights = qd::load_gguf(qd::GgufFile(folder / "coded.gguf"), float32);
  const auto expected = qd::load_gguf(qd::GgufFile(folder / "decoded.gguf"), float32);
  using Coded = qd::QuantizedTensor<qd::INT8, qd::Float32Scales>;
  double worst = 0.0;
  for (const auto table : {&qd::DecoderWeights<float>::embedding, &qd::DecoderWeights<float>::head}) {
    const auto& found = ((*weights).*table).get<Coded>();
    const auto& dense = ((*expected).*table).get<Float>();
    for (Index i = 0; i < 17; ++i)
      for (Index j = 0; j < 32; ++j)
        worst = std::max(worst, std::fabs(static_cast<double>(found.view()(i, j)) - static_cast<double>(dense(i, j))) /
                                    std::max(1e-30, std::fabs(static_cast<double>(dense(i, j)))));
  }
  CHECK(worst < 2.5e-7);
  CHECK(weights->table_bytes() == 2 * (17 * 32 + 17 * 4));
  const auto a = logits_of(weights), b = logits_of(expected);
  double distance = 0.0;
  for (Index i = 0; i < a.size(); ++i) distance = std::max(distance, static_cast<double>(std::fabs(a.data()[i] - b.data()[i])));
  CHECK(distance < 1e-5);

  coded.tensors["output.weight"].values[33] = std::numeric_limits<float>::infinity();
  coded.write(folder / "coded.gguf");
  const auto error = error_of([&] { qd::load_gguf(qd::GgufFile(folder / "coded.gguf"), float32); });
  REQUIRE(error);
  CHECK(error->code() == Errc::non_finite);
  CHECK(error->tensor() == "output.weight");
  CHECK(std::string(error->what()).find("block 1") != std::string::npos);
}

TEST_CASE("a GGUF file is quantized while it is read, as its weights would be") {
  const test::TemporaryFolder folder;
  Fixture(*test::tiny_weights<float>(config_of(true))).write(folder / "model.gguf");
  const qd::GgufFile file(folder / "model.gguf");
  for (const auto format : {qd::BaseFormat::nf4, qd::BaseFormat::fp4, qd::BaseFormat::int4, qd::BaseFormat::fp8}) {
    const qd::BaseOptions options{.format = format, .double_quant = true, .block_size = 32};
    const auto read = qd::load_gguf(file, options, qd::Cpu(2));
    const auto direct = test::tiny_weights<float>(config_of(true), false, options);
    CHECK(read->linear_bytes() == direct->linear_bytes());
    CHECK(test::same_bits(logits_of(read).view(), logits_of(direct).view()));
  }
}

TEST_CASE("keys that a GGUF file may lack have the format's defaults") {
  const test::TemporaryFolder folder;
  auto config = config_of(true);
  config.heads = {.heads = 2, .kv_heads = 2, .head_dim = 6};
  Fixture fixture(*test::tiny_weights<float>(config));
  fixture.numbers.erase("llama.attention.head_count_kv");
  fixture.numbers.erase("llama.rope.dimension_count");
  fixture.reals.erase("llama.rope.freq_base");
  fixture.write(folder / "model.gguf");
  const auto read = qd::gguf_config(qd::GgufFile(folder / "model.gguf"));
  CHECK(read.heads.kv_heads == 2);
  CHECK(read.heads.head_dim == 6);
  CHECK(read.rope_base == 10000.0);
}

TEST_CASE("a GGUF file of another kind of model is refused") {
  const auto architecture = refused([](Fixture& f) { f.texts["general.architecture"] = "falcon"; });
  CHECK(architecture.code() == Errc::unsupported);
  CHECK(std::string(architecture.what()).find("falcon") != std::string::npos);
  CHECK(refused([](Fixture& f) { f.texts.erase("general.architecture"); }).code() == Errc::bad_config);
  const auto scaled = refused([](Fixture& f) { f.texts["llama.rope.scaling.type"] = "yarn"; });
  CHECK(scaled.code() == Errc::unsupported);
  CHECK(std::string(scaled.what()).find("yarn") != std::string::npos);
}

TEST_CASE("a GGUF file whose numbers make no model is refused, and the key or field is named") {
  const auto bad = [](const std::function<void(Fixture&)>& change, const std::string& word, Errc code = Errc::bad_config) {
    const auto error = refused(change);
    CHECK(error.code() == code);
    CAPTURE(std::string(error.what()), word);
    CHECK(std::string(error.what()).find(word) != std::string::npos);
  };
  for (const char* key : {"llama.embedding_length", "llama.feed_forward_length", "llama.block_count", "llama.context_length",
                          "llama.attention.head_count"}) {
    bad([&](Fixture& f) { f.numbers.erase(key); }, key);
    bad(
        [&](Fixture& f) {
          f.numbers.erase(key);
          f.reals[key] = 4.0f;  // another type
        },
        key);
  }
  bad([](Fixture& f) { f.numbers["llama.embedding_length"] = 0; }, "width");
  bad([](Fixture& f) { f.numbers["llama.feed_forward_length"] = 0; }, "mlp width");
  bad([](Fixture& f) { f.numbers["llama.block_count"] = 4000000000u; }, "layers");
  bad([](Fixture& f) { f.numbers["llama.context_length"] = 0; }, "context");
  bad([](Fixture& f) { f.numbers["llama.attention.head_count"] = 0; }, "heads");
  bad([](Fixture& f) { f.numbers["llama.attention.head_count_kv"] = 3; }, "key-value heads");
  bad([](Fixture& f) { f.numbers["llama.attention.head_count_kv"] = 0; }, "key-value heads");
  bad([](Fixture& f) { f.numbers["llama.rope.dimension_count"] = 3; }, "head dimension");
  bad([](Fixture& f) { f.reals["llama.rope.freq_base"] = 0.0f; }, "rope base");
  bad([](Fixture& f) { f.reals["llama.rope.freq_base"] = std::numeric_limits<float>::quiet_NaN(); }, "rope base");
  bad([](Fixture& f) { f.reals["llama.attention.layer_norm_rms_epsilon"] = -1.0f; }, "norm epsilon");
  bad([](Fixture& f) { f.reals.erase("llama.attention.layer_norm_rms_epsilon"); }, "llama.attention.layer_norm_rms_epsilon");
  bad([](Fixture& f) { f.numbers["llama.block_count"] = 3; }, "blk.2.", Errc::missing_tensor);
  bad([](Fixture& f) { f.numbers["llama.feed_forward_length"] = 14; }, "[14, 12]", Errc::shape_mismatch);
}

TEST_CASE("a GGUF file that lacks a tensor, or has one of another shape, is refused by its name") {
  const Fixture whole(*test::tiny_weights<float>(config_of(false), true));
  for (const auto& item : whole.tensors) {
    const std::string& name = item.first;
    CAPTURE(name);
    const bool optional = name == "output.weight" || name.ends_with(".bias");
    if (!optional) {
      const auto missing = refused([&](Fixture& f) { f.tensors.erase(name); });
      CHECK(missing.code() == Errc::missing_tensor);
      CHECK(missing.tensor() == name);
    }
    if (name == "token_embd.weight") continue;  // it says the vocabulary
    const auto longer = refused([&](Fixture& f) {
      auto& t = f.tensors[name];
      ++t.shape.front();
      t.values.resize(t.shape.size() == 1 ? t.values.size() + 1 : t.values.size() + static_cast<std::size_t>(t.shape[1]));
    });
    CHECK(longer.code() == Errc::shape_mismatch);
    CHECK(longer.tensor() == name);
    CHECK(std::string(longer.what()).find("expected [") != std::string::npos);
  }
  const auto transposed =
      refused([](Fixture& f) { std::swap(f.tensors["blk.0.ffn_up.weight"].shape[0], f.tensors["blk.0.ffn_up.weight"].shape[1]); });
  CHECK(transposed.code() == Errc::shape_mismatch);
  CHECK(transposed.tensor() == "blk.0.ffn_up.weight");
  const auto cube = refused([](Fixture& f) { f.tensors["blk.0.ffn_up.weight"].shape = {13, 12, 1}; });
  CHECK(cube.code() == Errc::shape_mismatch);
  const auto flat = refused([](Fixture& f) { f.tensors["blk.0.ffn_up.weight"].shape = {13 * 12}; });
  CHECK(flat.code() == Errc::shape_mismatch);
  const auto embedding = refused([](Fixture& f) { f.tensors["token_embd.weight"].shape = {12, 17}; });
  CHECK(embedding.code() == Errc::shape_mismatch);
  CHECK(embedding.tensor() == "token_embd.weight");
}

TEST_CASE("a GGUF file with blocks beyond its count is refused; what is no block may be there") {
  for (const std::uint32_t count : {1u, 2u}) {
    const std::string beyond = count == 1 ? "blk.1.attn_k.bias" : "blk.18446744073709551616.attn_k.bias";
    const auto error = refused([&](Fixture& f) {
      f.numbers["llama.block_count"] = count;
      f.tensors[beyond] = f.tensors["blk.0.attn_k.bias"];
    });
    CHECK(error.code() == Errc::unexpected_tensor);
    CHECK(error.tensor() == beyond);
    CHECK(std::string(error.what()).find("the " + std::to_string(count) + " layers of llama.block_count") != std::string::npos);
  }
  const test::TemporaryFolder folder;
  Fixture fixture(*test::tiny_weights<float>(config_of(false)));
  for (const char* other : {"blk.scale", "rope_long", "block.7", "blk"}) fixture.tensors[other] = {{1}, {1.0f}};
  fixture.write(folder / "model.gguf");
  CHECK_FALSE(error_of([&] { qd::load_gguf(qd::GgufFile(folder / "model.gguf")); }));
}

TEST_CASE("a GGUF file with a linear weight that is not finite is refused by its name") {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    const auto error = refused([&](Fixture& f) { f.tensors["blk.1.attn_k.weight"].values[7] = bad; });
    CHECK(error.code() == Errc::non_finite);
    CHECK(error.tensor() == "blk.1.attn_k.weight");
    CHECK(std::string(error.what()).find("[0, 7]") != std::string::npos);
  }
}

TEST_CASE("a GGUF file with any weight that is not finite is refused by its name, in every format") {
  const Fixture whole(*test::tiny_weights<float>(config_of(false), true));
  for (const auto& item : whole.tensors)
    for (const auto& options : {qd::BaseOptions{}, float32}) {
      const auto error =
          refused([&](Fixture& f) { f.tensors[item.first].values[5] = std::numeric_limits<float>::quiet_NaN(); }, options);
      CAPTURE(item.first);
      CHECK(error.code() == Errc::non_finite);
      CHECK(error.tensor() == item.first);
    }
}

TEST_CASE("a GGUF tensor of a type that cannot be decoded is refused by its name") {
  const auto error = refused([](Fixture& f) {
    auto& t = f.tensors["blk.0.attn_q.weight"];
    t.type = 24;  // I8, one byte an element, where two are written
    t.values.resize(t.values.size() / 2);
  });
  CHECK(error.code() == Errc::unsupported);
  CHECK(error.tensor() == "blk.0.attn_q.weight");
}

}  // namespace load_gguf_test
