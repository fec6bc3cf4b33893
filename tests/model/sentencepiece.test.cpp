// SentencePiece's BPE: tokenizer.json and GGUF against the `tokenizers` package, sentencepiece and llama.cpp's rule
// (golden/make_tokenizers.py).
#include <bit>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <optional>
#include <string>
#include <vector>

#include <qdylora/io/gguf.hpp>
#include <qdylora/io/json.hpp>
#include <qdylora/model/chat_templates.hpp>
#include <qdylora/model/tokenizer_gguf.hpp>
#include <qdylora/model/tokenizer_json.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/tokenizer_folder.hpp"

namespace sentencepiece_test {

namespace qd = qdylora;

namespace {

using qd::Errc;
using Ids = std::vector<std::int32_t>;
using namespace test::tokenizers;

/// <unk>, <s>, </s>, the 256 bytes (so that id = byte + 3), a space, letters, and unions by score.
qd::TokenizerData tiny_data() {
  qd::TokenizerData data;
  data.model = qd::TokenizerModel::sentencepiece;
  data.pre_tokenizer = "default";
  const auto add = [&](const std::string& token, std::int32_t type, float score) {
    data.tokens.push_back(token);
    data.token_types.push_back(type);
    data.scores.push_back(score);
  };
  add("<unk>", 2, 0);
  add("<s>", 3, 0);
  add("</s>", 3, 0);
  for (int byte = 0; byte < 256; ++byte) add(qd::detail::byte_token_name(static_cast<unsigned char>(byte)), 6, 0);
  for (const char* letter : {"\u2581", "a", "b", "c", "é"}) add(letter, 1, -100);  // 259 to 263
  add("ab", 1, -5);                                                                // 264
  add("bc", 1, -4);                                                                // 265
  add("aa", 1, -6);                                                                // 266
  add("aaaa", 1, -6);                                                              // 267
  add("\u2581a", 1, -7);                                                           // 268
  data.bos = 1;
  data.eos = 2;
  return data;
}

template <class Change>
std::optional<Errc> code_of_data(Change&& change) {
  qd::TokenizerData data = tiny_data();
  change(data);
  return test::code_of([&] { qd::Tokenizer tokenizer(std::move(data)); });
}

test::Bytes gguf_bytes(const qd::TokenizerData& data, bool with_scores = true, const std::string& model = "llama",
                       const std::string& flag = "") {
  test::Bytes file;
  file.raw("GGUF").u32(3).u64(0).u64(3 + (with_scores ? 1 : 0) + (flag.empty() ? 0 : 1));
  file.text("tokenizer.ggml.model").u32(8).text(model);
  file.text("tokenizer.ggml.tokens").u32(9).u32(8).u64(data.tokens.size());
  for (const auto& token : data.tokens) file.text(token);
  file.text("tokenizer.ggml.token_type").u32(9).u32(5).u64(data.token_types.size());
  for (const auto type : data.token_types) file.u32(static_cast<std::uint32_t>(type));
  if (with_scores) {
    file.text("tokenizer.ggml.scores").u32(9).u32(6).u64(data.scores.size());
    for (const float score : data.scores) file.u32(std::bit_cast<std::uint32_t>(score));
  }
  if (!flag.empty()) file.text(flag).u32(7).raw("\x01");
  return file.pad(32);
}

}  // namespace

TEST_CASE("SentencePiece's BPE of tokenizer.json gives ids and texts of the tokenizers package", "[tokenizer][golden]") {
  const qd::Json cases = read(golden / "cases.json");
  const auto texts = cases["texts"].get<std::vector<std::string>>();
  REQUIRE(cases["sentencepiece"].size() == 4);
  for (const auto& [name, expected] : cases["sentencepiece"].items()) {
    CAPTURE(name);
    const qd::Tokenizer tokenizer = qd::load_tokenizer_json(golden / name);
    for (std::size_t i = 0; i < texts.size(); ++i) {
      CAPTURE(i, texts[i]);
      const Ids found = tokenizer.encode(texts[i]);
      CHECK(found == expected["ids"][i].get<Ids>());
      const auto& decoded = expected["decoded"][i];  // null: as the text
      CHECK(tokenizer.decode(found) == (decoded.is_null() ? texts[i] : decoded.get<std::string>()));
    }
    CHECK(tokenizer.model() == qd::TokenizerModel::sentencepiece);
    CHECK(tokenizer.bos() == 1);
    CHECK(tokenizer.eos() == 2);
    CHECK(tokenizer.adds_bos());
    CHECK(tokenizer.is_control(0));
    CHECK_FALSE(tokenizer.is_control(*tokenizer.id("<tool>")));
  }
}

TEST_CASE("SentencePiece's BPE of GGUF, by scores, gives the ids of llama.cpp's rule", "[tokenizer][golden]") {
  const qd::Json cases = read(golden / "cases.json");
  const auto texts = cases["texts"].get<std::vector<std::string>>();
  const auto& expected = cases["sentencepiece"]["llama2"];
  const qd::Tokenizer tokenizer = qd::load_tokenizer(qd::GgufFile(golden / "llama2" / "tokenizer.gguf"));
  for (std::size_t i = 0; i < texts.size(); ++i) {
    CAPTURE(i, texts[i]);
    CHECK(tokenizer.encode(texts[i]) == expected["ids"][i].get<Ids>());
  }
  CHECK(tokenizer.bos() == 1);
  CHECK(tokenizer.eos() == 2);
  CHECK(tokenizer.adds_bos());
}

TEST_CASE("the best-scored union is made first, the leftmost of equals, and bytes spell the rest", "[tokenizer]") {
  const qd::Tokenizer tokenizer(tiny_data());
  CHECK(tokenizer.encode("") == Ids{});
  CHECK(tokenizer.encode("abc") == Ids{260, 265});         // bc before ab
  CHECK(tokenizer.encode("aaa") == Ids{266, 260});         // the left pair first
  CHECK(tokenizer.encode("aaaab") == Ids{266, 260, 264});  // ab before aa
  CHECK(tokenizer.encode("aaaaa") == Ids{267, 260});       // unions of one score from the left
  CHECK(tokenizer.encode("\u00E9\u00FC\xFF") == Ids{263, 0xC3 + 3, 0xBC + 3, 0xFF + 3});
  CHECK(tokenizer.encode("\xE2\x96") == Ids{0xE2 + 3, 0x96 + 3});  // a mark of a space that is cut short
  CHECK(tokenizer.encode("<unk><s>", {.parse_special = true}) == Ids{0, 1});
  CHECK(tokenizer.encode("<s>", {.parse_special = false}) == Ids{'<' + 3, 's' + 3, '>' + 3});
  CHECK(tokenizer.encode("<0x41>") == Ids{'<' + 3, '0' + 3, 'x' + 3, '4' + 3, '1' + 3, '>' + 3});
  CHECK(tokenizer.decode(Ids{1, 268, 0xC3 + 3, 0xBC + 3, 2}) == "<s> a\u00FC</s>");
  CHECK(tokenizer.decode(Ids{1, 268, 2}, {.skip_special = true}) == " a");
}

TEST_CASE("a space goes in front of the texts that the model puts it before", "[tokenizer]") {
  const auto encode = [](qd::SpacePrefix prefix, const std::string& text, qd::Follows follows = qd::Follows::nothing) {
    auto data = tiny_data();
    data.space_prefix = prefix;
    return qd::Tokenizer(data).encode(text, {.follows = follows});
  };
  using enum qd::SpacePrefix;
  CHECK(encode(none, "a</s>a") == Ids{260, 2, 260});
  CHECK(encode(all, "a</s> a") == Ids{268, 2, 259, 268});
  CHECK(encode(all, " a") == Ids{259, 268});
  CHECK(encode(all, "") == Ids{});
  CHECK(encode(all_without_space, "a</s> a</s>a") == Ids{268, 2, 268, 2, 268});
  CHECK(encode(beginning_without_space, "a</s>a") == Ids{268, 2, 260});
  CHECK(encode(beginning_without_space, "</s>a") == Ids{2, 260});
  CHECK(encode(beginning_without_space, " a") == Ids{268});
  CHECK(encode(beginning_without_space, "a", qd::Follows::special) == Ids{260});
  CHECK(encode(all_without_space, "a", qd::Follows::special) == Ids{268});
  CHECK(encode(all, "a", qd::Follows::special) == Ids{268});
  CHECK(encode(all, "a</s>a", qd::Follows::text) == Ids{260, 2, 268});

  auto data = tiny_data();
  data.strips_space = true;
  const qd::Tokenizer tokenizer(data);
  CHECK(tokenizer.decode(Ids{268, 268}) == "a a");
  CHECK(tokenizer.decode(Ids{1, 268}, {.skip_special = true}) == "a");
  CHECK(tokenizer.decode(Ids{259, 259}) == " ");
}

TEST_CASE("a conversation's ids are those of its text, whatever spaces go in front", "[chat]") {
  const std::vector<qd::ChatMessage> chat{{"user", "abc"}, {"assistant", " a b"}, {"user", "b"}};
  for (const auto prefix :
       {qd::SpacePrefix::none, qd::SpacePrefix::all, qd::SpacePrefix::all_without_space, qd::SpacePrefix::beginning_without_space}) {
    auto data = tiny_data();
    data.space_prefix = prefix;
    data.tokens[1] = "<|im_start|>";
    data.tokens[2] = "<|im_end|>";
    const qd::Tokenizer tokenizer(data);
    for (const char* name : {"chatml", "smollm2"}) {
      const auto chatml = qd::chat_template(name);
      CHECK(qd::encode_chat(tokenizer, chatml, chat) == tokenizer.encode(qd::chat_text(chatml, chat)));
    }
  }
}

TEST_CASE("any bytes survive SentencePiece, and a megabyte takes no search", "[tokenizer]") {
  const qd::Tokenizer tokenizer(tiny_data());
  std::string bytes;
  for (int i = 0; i < 4096; ++i) bytes += static_cast<char>(static_cast<unsigned char>(i * 37 + i / 256));
  CHECK(tokenizer.decode(tokenizer.encode(bytes)) == bytes);
  constexpr std::size_t size = 1 << 20;
  CHECK(tokenizer.encode(std::string(size, 'a')).size() == size / 4);
  CHECK(tokenizer.encode(std::string(size, ' ')).size() == size);
  CHECK(tokenizer.encode(std::string(size, '\xE2')).size() == size);
}

TEST_CASE("SentencePiece data that contradicts itself is refused", "[tokenizer]") {
  using Data = qd::TokenizerData;
  CHECK_FALSE(code_of_data([](Data&) {}));
  CHECK_FALSE(code_of_data([](Data& d) { d.token_types.clear(); }));
  CHECK(code_of_data([](Data& d) { d.scores.pop_back(); }) == Errc::bad_config);
  CHECK(code_of_data([](Data& d) { d.scores[3] = std::numeric_limits<float>::quiet_NaN(); }) == Errc::non_finite);
  CHECK(code_of_data([](Data& d) { d.scores[3] = -std::numeric_limits<float>::infinity(); }) == Errc::non_finite);
  CHECK(code_of_data([](Data& d) { d.tokens[3 + 17] = "x", d.token_types[3 + 17] = 1; }) == Errc::bad_config);  // no token for a byte
  CHECK(code_of_data([](Data& d) { d.token_types[3 + 17] = 3; }) == Errc::bad_config);  // it steers, and stands for no byte
  CHECK(code_of_data([](Data& d) { d.tokens[3 + 17] = "<0x-1>"; }) == Errc::bad_config);
  CHECK(code_of_data([](Data& d) { d.tokens[3 + 0xAB] = "<0xab>"; }) == Errc::bad_config);
  CHECK(code_of_data([](Data& d) { d.tokens[260] = d.tokens[261]; }) == Errc::duplicate);
  CHECK(code_of_data([](Data& d) { d.tokens[264] = std::string(257, 'a'); }) == Errc::limit);
  CHECK(code_of_data([](Data& d) { d.pre_tokenizer = "gpt-2"; }) == Errc::unsupported);
  CHECK(code_of_data([](Data& d) { d.merges = {"a b"}; }) == Errc::bad_argument);
  CHECK(code_of_data([](Data& d) { d.nfc = true; }) == Errc::bad_argument);
  CHECK(code_of_data([](Data& d) { d.marked_specials = {static_cast<std::int32_t>(d.tokens.size())}; }) == Errc::bad_argument);
  CHECK(code_of_data([](Data& d) { d.model = qd::TokenizerModel::byte_level, d.pre_tokenizer = "gpt-2"; }) == Errc::bad_argument);
}

TEST_CASE("a GGUF file of a SentencePiece model is read, or refused by the key", "[tokenizer]") {
  const test::TemporaryFolder folder;
  const auto path = folder / "tokenizer.gguf";
  const auto refused = [&](const std::string& bytes, Errc code, const std::string& part) {
    test::write_file(path, bytes);
    const auto error = test::error_of([&] { (void)qd::load_tokenizer(qd::GgufFile(path)); });
    CAPTURE(part);
    REQUIRE(error);
    CHECK(error->code() == code);
    CHECK(error->file() == path.string());
    CHECK(std::string(error->what()).find(part) != std::string::npos);
  };
  test::write_file(path, gguf_bytes(tiny_data()));
  CHECK(qd::load_tokenizer(qd::GgufFile(path)).encode("a</s>a") == Ids{268, 2, 268});
  refused(gguf_bytes(tiny_data(), false), Errc::bad_config, "tokenizer.ggml.scores");
  refused(gguf_bytes(tiny_data(), true, "t5"), Errc::unsupported, "'t5'");
  refused(gguf_bytes(tiny_data(), true, "llama", "tokenizer.ggml.add_eos_token"), Errc::unsupported, "add_eos_token");
  auto data = tiny_data();
  data.scores.clear();
  refused(gguf_bytes(data), Errc::bad_config, "tokenizer.ggml.scores");
  data.scores.assign(7, 0.0f);
  refused(gguf_bytes(data), Errc::bad_config, "7 scores");
}

TEST_CASE("what tokenizer.json asks of SentencePiece and is not done here is refused by its key", "[tokenizer]") {
  using qd::Json;
  const auto metaspace = [](Json& j) -> Json& { return j["pre_tokenizer"]; };
  check_refused("llama2", Errc::unsupported, "'normalizer'", [](Json& j) { j["normalizer"]["normalizers"][0] = {{"type", "NFKC"}}; });
  check_refused("llama2", Errc::unsupported, "'normalizer'",
                [](Json& j) { j["normalizer"]["normalizers"].push_back(j["normalizer"]["normalizers"][0]); });
  check_refused("llama2", Errc::unsupported, "'normalizer'", [](Json& j) { j["normalizer"]["normalizers"][1]["content"] = "_"; });
  check_refused("llama2", Errc::unsupported, "neither", [](Json& j) { j["normalizer"]["normalizers"].erase(1); });
  check_refused("llama2", Errc::unsupported, "neither", [](Json& j) { j["normalizer"] = nullptr; });
  check_refused("llama2", Errc::unsupported, "pre_tokenizer", [](Json& j) {
    j["pre_tokenizer"] = {{"type", "Metaspace"}, {"replacement", "\u2581"}};
  });
  check_refused("llama2", Errc::unsupported, "'decoder'", [](Json& j) { j["decoder"] = {{"type", "Metaspace"}}; });
  check_refused("llama2", Errc::unsupported, "'decoder'", [](Json& j) { j["decoder"] = nullptr; });
  check_refused("llama2", Errc::unsupported, "'decoder'", [](Json& j) { j["decoder"]["decoders"][3]["stop"] = 1; });
  check_refused("llama2", Errc::unsupported, "'decoder'", [](Json& j) { j["decoder"]["decoders"].push_back({{"type", "Fuse"}}); });
  check_refused("mistral", Errc::unsupported, "prepend_scheme", [&](Json& j) { metaspace(j)["prepend_scheme"] = "last"; });
  check_refused("mistral", Errc::unsupported, "add_prefix_space", [&](Json& j) { metaspace(j)["add_prefix_space"] = false; });
  check_refused("mistral", Errc::unsupported, "replacement", [&](Json& j) { metaspace(j)["replacement"] = "_"; });
  check_refused("mistral", Errc::unsupported, "pre_tokenizer", [&](Json& j) { metaspace(j)["type"] = "Whitespace"; });
  check_refused("mistral", Errc::bad_config, "'<0x07>'", [](Json& j) {
    const auto id = j["model"]["vocab"]["<0x07>"];
    j["model"]["vocab"].erase("<0x07>");
    j["model"]["vocab"]["seven"] = id;
  });
}

}  // namespace sentencepiece_test
