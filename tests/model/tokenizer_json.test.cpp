// tokenizer.json against the `tokenizers` package (golden/make_tokenizers.py), and normalization form C.
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include <qdylora/io/json.hpp>
#include <qdylora/model/tokenizer_json.hpp>
#include <qdylora/model/unicode_nfc.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/tokenizer_folder.hpp"

namespace tokenizer_json_test {

namespace qd = qdylora;

namespace {

using Ids = std::vector<std::int32_t>;
using namespace test::tokenizers;

std::string utf8(std::u32string_view text) {
  std::string bytes;
  for (const char32_t c : text) qd::append_utf8(bytes, c);
  return bytes;
}

}  // namespace

TEST_CASE("tokenizer.json gives the ids of the tokenizers package", "[tokenizer][golden]") {
  const qd::Json cases = read(golden / "cases.json");
  const auto texts = cases["texts"].get<std::vector<std::string>>();
  REQUIRE(texts.size() > 150);
  for (const auto& [name, ids] : cases["ids"].items()) {
    CAPTURE(name);
    const qd::Tokenizer tokenizer = qd::load_tokenizer_json(golden / name);
    for (std::size_t i = 0; i < texts.size(); ++i) {
      CAPTURE(i, texts[i]);
      const Ids found = tokenizer.encode(texts[i]);
      CHECK(found == ids[i].get<Ids>());
      // Special tokens are matched in the text as it is written, and what lies between them is normalized.
      const std::string back = tokenizer.decode(found);
      if (name != "qwen2") CHECK(back == texts[i]);
      else CHECK(qd::to_nfc(back) == qd::to_nfc(texts[i]));
    }
    CHECK(tokenizer.bos() == tokenizer.id("<|begin|>"));
    CHECK(tokenizer.eos() == tokenizer.id("<|im_end|>"));
    CHECK(tokenizer.adds_bos() == (name == "llama3"));
    CHECK(tokenizer.is_control(*tokenizer.id("<|im_start|>")));
    CHECK_FALSE(tokenizer.is_control(*tokenizer.id("<tool>")));
  }
}

TEST_CASE("the begin and end tokens come from config.json where there is no tokenizer_config.json", "[tokenizer]") {
  const test::TemporaryFolder folder;
  test::write_file(folder / "tokenizer.json", test::read_file(golden / "smollm" / "tokenizer.json"));
  CHECK(qd::load_tokenizer_json(folder.path()).eos() == -1);
  test::write_file(folder / "config.json", R"({"bos_token_id": 0, "eos_token_id": [1, 7]})");
  const auto tokenizer = qd::load_tokenizer_json(folder.path());
  CHECK(tokenizer.bos() == 0);
  CHECK(tokenizer.eos() == 1);
  test::write_file(folder / "tokenizer_config.json", R"({"eos_token": "<|nobody|>"})");
  const auto error = test::error_of([&] { (void)qd::load_tokenizer_json(folder.path()); });
  REQUIRE(error);
  CHECK(error->code() == qd::Errc::bad_config);
  CHECK(error->file() == (folder / "tokenizer_config.json").string());
}

TEST_CASE("what tokenizer.json asks for and is not done here is refused by its key", "[tokenizer]") {
  using qd::Errc;
  using qd::Json;
  check_refused("gpt2", Errc::unsupported, "model.type", [](Json& j) { j["model"]["type"] = "Unigram"; });
  check_refused("gpt2", Errc::unsupported, "'Metaspace'", [](Json& j) { j["model"]["byte_fallback"] = true; });
  check_refused("gpt2", Errc::unsupported, "end_of_word_suffix", [](Json& j) { j["model"]["end_of_word_suffix"] = "</w>"; });
  check_refused("gpt2", Errc::unsupported, "normalizer", [](Json& j) { j["normalizer"] = {{"type", "Lowercase"}}; });
  check_refused("gpt2", Errc::unsupported, "add_prefix_space", [](Json& j) { j["pre_tokenizer"]["add_prefix_space"] = true; });
  check_refused("gpt2", Errc::unsupported, "Metaspace", [](Json& j) { j["pre_tokenizer"] = {{"type", "Metaspace"}}; });
  check_refused("gpt2", Errc::unsupported, "'pre_tokenizer'", [](Json& j) { j["pre_tokenizer"] = nullptr; });
  check_refused("gpt2", Errc::unsupported, "lstrip", [](Json& j) { j["added_tokens"][0]["lstrip"] = true; });
  check_refused("gpt2", Errc::unsupported, "truncation", [](Json& j) { j["truncation"] = {{"max_length", 4}}; });
  check_refused("gpt2", Errc::unsupported, "dropout", [](Json& j) { j["model"]["dropout"] = 0.1; });
  check_refused("smollm", Errc::unsupported, "pre_tokenizer", [](Json& j) {  // digits once more, after the bytes
    j["pre_tokenizer"]["pretokenizers"].push_back(j["pre_tokenizer"]["pretokenizers"][0]);
  });
  check_refused("smollm", Errc::unsupported, "Digits",
                [](Json& j) { j["pre_tokenizer"]["pretokenizers"][0]["individual_digits"] = false; });
  check_refused("smollm", Errc::unsupported, "pre_tokenizer", [](Json& j) {  // bytes once more
    j["pre_tokenizer"]["pretokenizers"].push_back(j["pre_tokenizer"]["pretokenizers"][1]);
  });
  check_refused("falcon", Errc::unsupported, "Punctuation", [](Json& j) { j["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Isolated"; });
  check_refused("falcon", Errc::unsupported, "Digits",
                [](Json& j) { j["pre_tokenizer"]["pretokenizers"][2]["individual_digits"] = true; });
  check_refused("falcon", Errc::unsupported, "pattern",
                [](Json& j) { j["pre_tokenizer"]["pretokenizers"][3]["pattern"]["Regex"] = "[0-9]+"; });
  check_refused("falcon", Errc::unsupported, "pre_tokenizer", [](Json& j) { j["pre_tokenizer"]["pretokenizers"].erase(3); });
  check_refused("qwen2", Errc::unsupported, "pattern",
                [](Json& j) { j["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = "\\s+"; });
  check_refused("qwen2", Errc::unsupported, "behavior", [](Json& j) { j["pre_tokenizer"]["pretokenizers"][0]["behavior"] = "Removed"; });
  check_refused("llama3", Errc::unsupported, "post_processor", [](Json& j) {
    j["post_processor"]["processors"][1]["single"].push_back({{"SpecialToken", {{"id", "<|end|>"}, {"type_id", 0}}}});
  });
  check_refused("gpt2", Errc::bad_config, "'model'", [](Json& j) { j.erase("model"); });
  check_refused("gpt2", Errc::bad_config, "'vocab'", [](Json& j) { j["model"].erase("vocab"); });
  check_refused("gpt2", Errc::bad_config, "integer", [](Json& j) { j["model"]["vocab"]["a"] = "first"; });
  check_refused("gpt2", Errc::bad_config, "integer", [](Json& j) { j["model"]["vocab"]["a"] = std::int64_t{1} << 40; });
  check_refused("gpt2", Errc::bad_config, "no token has the id", [](Json& j) { j["model"]["vocab"].erase("a"); });
  check_refused("gpt2", Errc::duplicate, "have the id", [](Json& j) { j["model"]["vocab"]["a"] = j["model"]["vocab"]["b"]; });
  check_refused("gpt2", Errc::bad_config, "merge 0", [](Json& j) { j["model"]["merges"][0] = "nowhere to_be_found"; });
  const test::TemporaryFolder empty;
  CHECK(test::code_of([&] { (void)qd::load_tokenizer_json(empty.path()); }) == qd::Errc::open);
}

TEST_CASE("normalization form C composes, orders and passes what it must", "[unicode]") {
  // Unicode Standard Annex 15, figures 3 to 6, and Hangul.
  CHECK(qd::to_nfc(utf8(U"e\u0301")) == utf8(U"\u00E9"));
  CHECK(qd::to_nfc(utf8(U"\u212B")) == utf8(U"\u00C5"));
  CHECK(qd::to_nfc(utf8(U"s\u0307\u0323")) == utf8(U"\u1E69"));
  CHECK(qd::to_nfc(utf8(U"\u1E0B\u0323")) == utf8(U"\u1E0D\u0307"));
  CHECK(qd::to_nfc(utf8(U"q\u0307\u0323")) == utf8(U"q\u0323\u0307"));
  CHECK(qd::to_nfc(utf8(U"\u0958")) == utf8(U"\u0915\u093C"));  // excluded from composition
  CHECK(qd::to_nfc(utf8(U"\u1112\u1161\u11AB")) == utf8(U"\uD55C"));
  CHECK(qd::to_nfc(utf8(U"\uD558\u11AB")) == utf8(U"\uD55C"));
  CHECK(qd::to_nfc(utf8(U"\u0301e")) == utf8(U"\u0301e"));
  CHECK(qd::to_nfc("e\xCC\xFF\x80" + utf8(U"\u0301")) == "e\xCC\xFF\x80" + utf8(U"\u0301"));  // bytes that are no UTF-8
  for (const auto& d : qd::detail::decompositions) {
    std::string whole, parts;
    qd::append_utf8(whole, static_cast<char32_t>(d.whole));
    qd::append_utf8(parts, static_cast<char32_t>(d.first));
    if (d.second != 0) qd::append_utf8(parts, static_cast<char32_t>(d.second));
    const auto normal = qd::to_nfc(whole);
    REQUIRE(normal == qd::to_nfc(parts));
    REQUIRE(normal == qd::to_nfc(normal));
  }
}

}  // namespace tokenizer_json_test
