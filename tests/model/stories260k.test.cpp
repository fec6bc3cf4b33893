// A real Llama of 260,000 parameters (llama2.c's stories260K) against an independent program, and the reader of its files.
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <common/llama2c.hpp>
#include <qdylora/io/json.hpp>
#include <qdylora/model/generate.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"
#include "support/llama2c_files.hpp"
#include "support/tiny_model.hpp"

namespace stories260k_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using qd::examples::load_llama2c;
using qd::examples::load_llama2c_tokenizer;
using test::Bytes;
using test::code_of;
using test::error_of;
using Ids = std::vector<std::int32_t>;

namespace {

const qd::BaseOptions float32{.format = qd::BaseFormat::float32, .double_quant = true, .block_size = 64};
constexpr const char* absent = "the reference data of stories260K is absent (set QDYLORA_REFERENCE)";

std::vector<float> read_floats(const std::filesystem::path& path) {
  const auto bytes = test::read_file(path);
  std::vector<float> values(bytes.size() / sizeof(float));
  std::memcpy(values.data(), bytes.data(), values.size() * sizeof(float));
  return values;
}

// A checkpoint of the tiny shape, whose heads are as wide as the model.
qd::DecoderConfig fixture_config(bool tied) {
  auto config = test::tiny_config();
  config.heads.head_dim = 6;
  config.heads.heads = 2;
  config.heads.kv_heads = 1;
  config.rope_layout = qd::RopeLayout::interleaved;
  config.tied_head = tied;
  return config;
}

}  // namespace

TEST_CASE("stories260K: logits and the loss of the prompt agree with the reference") {
  const auto model_file = test::shared("data/stories260K.bin"), reference = test::shared("data/ref_stories260K.json"),
             logits_file = test::shared("data/ref_stories260K_logits.f32");
  if (!model_file || !reference || !logits_file) SKIP(absent);
  qd::Decoder<float> model(load_llama2c(*model_file, float32), {.lora = {.max_rank = 1}});
  CHECK(model.config().vocab == 512);
  CHECK(model.config().mlp_width == 172);
  CHECK(model.config().heads.kv_heads == 4);
  CHECK(model.config().tied_head);
  const auto json = qd::read_json(*reference);
  qd::Batch batch;
  const auto ids = json["ids"].get<Ids>();
  batch.ids = ids;
  batch.targets.assign(ids.begin() + 1, ids.end());
  batch.targets.push_back(-1);
  batch.offsets = {0, batch.tokens()};
  const auto logits = model.logits(batch);
  const auto expected = read_floats(*logits_file);
  REQUIRE(expected.size() == static_cast<std::size_t>(logits.size()));
  float largest = 0.0f;
  for (std::size_t i = 0; i < expected.size(); ++i) largest = std::max(largest, std::fabs(expected[i] - logits.span()[i]));
  CHECK(largest <= 1e-4f);
  double sum = 0.0;
  for (const double loss : model.losses(batch)) sum += loss;
  CHECK(sum / static_cast<double>(batch.scored()) == Approx(json["mean_nll"].get<double>()).epsilon(1e-5));
}

TEST_CASE("stories260K: the prompt's tokens, 48 greedy ones and their text agree with the reference") {
  const auto model_file = test::shared("data/stories260K.bin"), tokenizer_path = test::shared("data/tok512.bin"),
             reference = test::shared("data/ref_stories260K.json");
  if (!model_file || !tokenizer_path || !reference) SKIP(absent);
  qd::Decoder<float> model(load_llama2c(*model_file, float32), {.lora = {.max_rank = 1}});
  const auto tokenizer = load_llama2c_tokenizer(*tokenizer_path);
  CHECK(tokenizer.vocab_size() == 512);
  const auto json = qd::read_json(*reference);
  Ids prompt = tokenizer.encode(json["prompt"].get<std::string>());
  prompt.insert(prompt.begin(), tokenizer.bos());
  CHECK(prompt == json["ids"].get<Ids>());
  const std::vector<Ids> prompts{prompt};
  const auto greedy = qd::generate(model, std::span(prompts), qd::RankPlan::uniform(0), {.max_tokens = 48}).at(0);
  CHECK(greedy == json["greedy48"].get<Ids>());
  Ids all = prompt;
  all.insert(all.end(), greedy.begin(), greedy.end());
  CHECK(tokenizer.decode(all, {.skip_special = true}) == json["greedy_text"].get<std::string>());
}

TEST_CASE("stories260K in NF4, whose blocks straddle rows of 172, is close to itself") {
  const auto model_file = test::shared("data/stories260K.bin"), reference = test::shared("data/ref_stories260K.json");
  if (!model_file || !reference) SKIP(absent);
  qd::Decoder<float> model(load_llama2c(*model_file), {.lora = {.max_rank = 1}});
  qd::Batch batch;
  batch.add(qd::read_json(*reference)["ids"].get<Ids>());
  double sum = 0.0;
  for (const double loss : model.losses(batch)) sum += loss;
  CHECK(sum / static_cast<double>(batch.scored()) == Approx(0.134).margin(0.08));
  CHECK(model.weights()->linear_bytes() * 8 < 5 * static_cast<std::size_t>(model.config().linear_weights()));
}

TEST_CASE("stories260K's tokenizer gives real text back") {
  const auto tokenizer_path = test::shared("data/tok512.bin"), text_file = test::shared("data/tinyshakespeare.txt");
  if (!tokenizer_path || !text_file) SKIP(absent);
  const auto tokenizer = load_llama2c_tokenizer(*tokenizer_path);
  const auto text = test::read_file(*text_file).substr(0, 200000);
  const auto ids = tokenizer.encode(text);
  CHECK(3 * ids.size() < 2 * text.size());
  CHECK(tokenizer.decode(ids) == text);
}

TEST_CASE("a llama2.c checkpoint is read tensor by tensor, with its own head or without") {
  const test::TemporaryFolder folder;
  for (const bool tied : {true, false}) {
    const auto weights = test::tiny_weights<float>(fixture_config(tied));
    test::write_file(folder / "model.bin", test::llama2c_checkpoint(*weights));
    const auto read = load_llama2c(folder / "model.bin", float32);
    CHECK(read->config.tied_head == tied);
    CHECK(read->config.context == 32);
    qd::Decoder<float> expected(weights, {.lora = {.max_rank = 1}}), found(read, {.lora = {.max_rank = 1}});
    const auto batch = test::random_batch(17, {20}, 1);
    CHECK(test::same_bits(expected.logits(batch).view(), found.logits(batch).view()));
  }
}

TEST_CASE("llama2.c checkpoints that lie are refused") {
  const test::TemporaryFolder folder;
  const auto path = folder / "model.bin";
  const auto weights = test::tiny_weights<float>(fixture_config(true));
  const Bytes good = test::llama2c_checkpoint(*weights);
  const auto refused = [&](const std::string& bytes, Errc code, const std::string& tensor = "") {
    test::write_file(path, bytes);
    const auto error = error_of([&] { load_llama2c(path, float32); });
    REQUIRE(error);
    CAPTURE(std::string(error->what()));
    CHECK(error->code() == code);
    CHECK(error->file() == path.native());
    CHECK(error->tensor() == tensor);
    CHECK(error->offset());
  };
  const auto with_field = [&](std::size_t field, std::int32_t value) {
    std::string bytes = good;
    std::memcpy(bytes.data() + 4 * field, &value, 4);
    return bytes;
  };
  const auto with_nan = [&](std::size_t at) {
    std::string bytes = good;
    const float nan = std::numeric_limits<float>::quiet_NaN();
    std::memcpy(bytes.data() + at, &nan, 4);
    return bytes;
  };
  CHECK(code_of([&] { load_llama2c(folder / "absent.bin"); }) == Errc::open);
  refused("", Errc::truncated);
  refused(good.substr(0, 27), Errc::truncated);
  refused(good.substr(0, 28), Errc::truncated);
  refused(good.substr(0, good.size() - 1), Errc::truncated);
  refused(good + "x", Errc::trailing);
  for (std::size_t field = 0; field < 7; ++field) {
    refused(with_field(field, 0), Errc::bad_config);
    if (field != 5) refused(with_field(field, -1), Errc::bad_config);
    refused(with_field(field, std::numeric_limits<std::int32_t>::max()), Errc::bad_config);
    refused(with_field(field, std::numeric_limits<std::int32_t>::min()), Errc::bad_config);
  }
  refused(with_field(0, 16), Errc::truncated);
  refused(with_field(1, 1 << 22), Errc::truncated);
  refused(with_field(3, 5), Errc::bad_config);  // 12 / 5
  refused(with_field(2, 1), Errc::trailing);
  refused(with_nan(28 + 4 * 5), Errc::non_finite, "embedding");
  refused(with_nan(28 + 4 * (17 * 12 + 12 + 3)), Errc::non_finite, "layers.1.attention_norm");
  refused(with_nan(28 + 4 * (17 * 12 + 24 + 144 + 2)), Errc::non_finite, "layers.1.self_attn.q_proj");
  test::write_file(path, good);
  CHECK_FALSE(code_of([&] { load_llama2c(path); }));
}

TEST_CASE("the best-scored union is merged first, the leftmost on ties") {
  const test::TemporaryFolder folder;
  const auto path = folder / "tokenizer.bin";
  // 259 " ", 260 "a", 261 "b", 262 "c", then unions.
  test::write_file(path, test::llama2c_tokenizer(
                             {{" ", -1}, {"a", -1}, {"b", -1}, {"c", -1}, {"ab", -5}, {"bc", -4}, {"abc", -9}, {"aa", -6}, {"é", -1}}));
  const auto tokenizer = load_llama2c_tokenizer(path);
  CHECK(tokenizer.vocab_size() == 268);
  CHECK(tokenizer.encode("") == Ids{});
  CHECK(tokenizer.encode("ab") == Ids{259, 263});
  CHECK(tokenizer.encode("abc") == Ids{259, 265});              // bc before ab, then a + bc
  CHECK(tokenizer.encode("aaa") == Ids{259, 266, 260});         // the left pair first
  CHECK(tokenizer.encode("aaaab") == Ids{259, 266, 260, 263});  // ab before aa
  CHECK(tokenizer.encode("é") == Ids{259, 267});
  CHECK(tokenizer.encode("ü\xFF") == Ids{259, 3 + 0xC3, 3 + 0xBC, 3 + 0xFF});
  CHECK(tokenizer.decode(Ids{259, 265}) == "abc");
  CHECK(tokenizer.decode(Ids{1, 260, 259, 3 + 0xC3, 3 + 0xBC}, {.skip_special = true}) == "a ü");
}

TEST_CASE("llama2.c tokenizers that lie are refused") {
  const test::TemporaryFolder folder;
  const auto path = folder / "tokenizer.bin";
  const auto code = [&](const std::string& bytes, const qd::Limits& limits = {}) {
    test::write_file(path, bytes);
    const auto error = error_of([&] { (void)load_llama2c_tokenizer(path, limits); });
    if (error) CHECK(error->file() == path.native());
    return error ? std::optional(error->code()) : std::nullopt;
  };
  const std::string good = test::llama2c_tokenizer({{"a", 0}});
  CHECK_FALSE(code(good));
  CHECK(code("") == Errc::truncated);
  CHECK(code(good.substr(0, 3)) == Errc::truncated);
  CHECK(code(good.substr(0, 4)) == Errc::bad_config);
  CHECK(code(good.substr(0, good.size() - 1)) == Errc::truncated);
  CHECK(code(good.substr(0, good.size() - 5)) == Errc::truncated);
  CHECK(code(good.substr(0, good.size() - 9 - 14)) == Errc::bad_config);  // without the byte 255
  CHECK(code(good + "x") == Errc::truncated);
  CHECK(code(test::llama2c_tokenizer({{"a", 0}}, 5)) == Errc::limit);
  CHECK(code(test::llama2c_tokenizer({{"a", 0}}, -1)) == Errc::limit);
  CHECK(code(test::llama2c_tokenizer({{"a", std::numeric_limits<float>::infinity()}})) == Errc::non_finite);
  CHECK(code(good, {.vocabulary = 100}) == Errc::limit);
  std::string negative = good;
  negative[good.size() - 2] = '\x80';  // the last length
  CHECK(code(negative) == Errc::limit);
}

}  // namespace stories260k_test
