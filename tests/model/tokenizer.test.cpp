// The tokenizer on a vocabulary made here, and on SmolLM2's where its GGUF file is at hand (QDYLORA_MODEL, or the examples' cache).
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

#include <qdylora/core/random.hpp>
#include <qdylora/model/chat_templates.hpp>
#include <qdylora/model/pre_tokenizer.hpp>
#include <qdylora/model/tokenizer.hpp>
#include <qdylora/model/tokenizer_gguf.hpp>
#include <qdylora/model/unicode.hpp>

#include "support/catch.hpp"
#include "support/golden.hpp"
#include "support/smollm2.hpp"

namespace tokenizer_test {

namespace qd = qdylora;

namespace {

using Ids = std::vector<std::int32_t>;
using Words = std::vector<std::string>;

std::string utf8(char32_t code_point) {
  std::string text;
  qd::append_utf8(text, code_point);
  return text;
}

std::string utf8(std::u32string_view code_points) {
  std::string text;
  for (const char32_t c : code_points) qd::append_utf8(text, c);
  return text;
}

Words split(std::string_view text, qd::PreTokenizer pre_tokenizer = qd::PreTokenizer::gpt2) {
  Words words;
  qd::detail::for_each_word(text, pre_tokenizer, [&](std::size_t begin, std::size_t end) {
    words.emplace_back(text.substr(begin, end - begin));
  });
  return words;
}

/// The 256 bytes, in order (so that id = byte), then `more`; merges that make "hello", " he", and runs of "a".
qd::TokenizerData tiny_data() {
  qd::TokenizerData data;
  for (const char32_t letter : qd::detail::byte_alphabet) data.tokens.push_back(utf8(letter));
  const std::string space = utf8(U'\u0120');
  data.merges = {"h e", "l l", "he ll", "hell o", space + " he", "a a", "aa aa", "aaaa aaaa"};
  for (const std::string& merge : data.merges) {
    std::string product = merge;
    product.erase(product.find(' '), 1);
    data.tokens.push_back(product);  // 256 + rank
  }
  data.token_types.assign(data.tokens.size(), 1);
  const auto add = [&](const char* token, std::int32_t type) {
    data.tokens.emplace_back(token);
    data.token_types.push_back(type);
  };
  add("<|im_start|>", 3);  // 264
  add("<|im_end|>", 3);    // 265
  add("<x>", 3);           // 266
  add("<x><y>", 3);        // 267
  add("[tab]", 4);         // 268
  data.pre_tokenizer = "gpt-2";
  data.eos = 265;
  return data;
}

template <class Change>
qd::Errc error_of_data(Change&& change) {
  qd::TokenizerData data = tiny_data();
  change(data);
  try {
    qd::Tokenizer tokenizer(std::move(data));
  } catch (const qd::Error& error) {
    return error.code();
  }
  return qd::Errc::memory;  // which the constructor never throws
}

template <class Call>
qd::Errc error_of(Call&& call) {
  try {
    call();
  } catch (const qd::Error& error) {
    return error.code();
  }
  return qd::Errc::memory;
}

std::string read_file(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
}

}  // namespace

TEST_CASE("UTF-8 decodes to its code points and writes them back", "[unicode]") {
  for (char32_t c = 0; c <= 0x10FFFF; c += c < 0x3000 ? 1 : 61) {
    if (c >= 0xD800 && c <= 0xDFFF) continue;
    const std::string text = utf8(c);
    const qd::DecodedCodePoint step = qd::decode_utf8(text, 0);
    if (step.value != c || step.length != text.size()) FAIL("code point " << static_cast<std::uint32_t>(c));
  }
  CHECK(utf8(U'\u00E9') == "\xC3\xA9");
  CHECK(utf8(U'\u20AC') == "\xE2\x82\xAC");
  CHECK(utf8(U'\U0001F600') == "\xF0\x9F\x98\x80");
  CHECK(utf8(static_cast<char32_t>(0xD800)) == "\xEF\xBF\xBD");
  CHECK(utf8(static_cast<char32_t>(0x110000)) == "\xEF\xBF\xBD");
}

TEST_CASE("bytes that are no UTF-8 are taken one by one", "[unicode]") {
  // Lone continuation, overlong forms of '/', a surrogate, above U+10FFFF, bytes that never occur, and sequences cut short.
  for (const std::string_view text : {"\x80", "\xC0\xAF", "\xE0\x80\xAF", "\xF0\x80\x80\xAF", "\xED\xA0\x80", "\xF4\x90\x80\x80",
                                      "\xF5\x80\x80\x80", "\xFF", "\xC3", "\xE2\x82", "\xF0\x9F\x98", "\xC3(", "\xE2\x82("}) {
    const qd::DecodedCodePoint step = qd::decode_utf8(text, 0);
    CHECK(step.length == 1);
    CHECK(step.value == qd::replacement_code_point);
  }
}

TEST_CASE("code points have the classes of Unicode 16", "[unicode]") {
  using enum qd::CodePointClass;
  qd::Index counts[4] = {};
  for (char32_t c = 0; c <= 0x10FFFF; ++c) ++counts[static_cast<std::size_t>(qd::classify(c))];
  CHECK(counts[static_cast<std::size_t>(letter)] == 141028);
  CHECK(counts[static_cast<std::size_t>(number)] == 1911);
  CHECK(counts[static_cast<std::size_t>(space)] == 25);
  for (const char32_t c : std::u32string_view(U"azAZ\u00AA\u00E9\u03A9\u0416\u05D0\u4E2D\u3042\uD55C\U00020000")) {
    CHECK(qd::classify(c) == letter);
  }
  for (const char32_t c : std::u32string_view(U"09\u00BD\u00B2\u2167\u0665\u3007\U0001D7D8")) CHECK(qd::classify(c) == number);
  for (const char32_t c : std::u32string_view(U" \t\n\v\f\r\u0085\u00A0\u2003\u2028\u3000")) CHECK(qd::classify(c) == space);
  // A combining mark, a quote, a zero-width space, an emoji, an information separator (space to isspace in Python), U+FFFD.
  for (const char32_t c : std::u32string_view(U"_'\u0301\u2019\u200B\U0001F600\u001F\uFFFD")) CHECK(qd::classify(c) == other);
}

TEST_CASE("GPT-2's pattern cuts words as the regular expression does", "[tokenizer]") {
  CHECK(split("") == Words{});
  CHECK(split("Hello world") == Words{"Hello", " world"});
  CHECK(split("it's we'll don't I'd you've they're I'm") ==
        Words{"it", "'s", " we", "'ll", " don", "'t", " I", "'d", " you", "'ve", " they", "'re", " I", "'m"});
  CHECK(split("IT'S '''s 'x 's") == Words{"IT", "'", "S", " '''", "s", " '", "x", " '", "s"});
  CHECK(split("a1 23b") == Words{"a", "1", " 23", "b"});
  CHECK(split("x  y   ") == Words{"x", " ", " y", "   "});
  CHECK(split("x\n\ny \n z") == Words{"x", "\n", "\n", "y", " \n", " z"});
  CHECK(split("\ty \xC2\xA0z") == Words{"\t", "y", " ", "\xC2\xA0", "z"});
  CHECK(split(" ...!? (ok)") == Words{" ...!?", " (", "ok", ")"});
  CHECK(split("\xE2\x80\x9Chi\xE2\x80\x9D") == Words{"\xE2\x80\x9C", "hi", "\xE2\x80\x9D"});
  CHECK(split("\xFF\xFE z\x80") == Words{"\xFF\xFE", " z", "\x80"});
}

TEST_CASE("SmolLM's pre-tokenizer makes every number character a word and cuts the rest on its own", "[tokenizer]") {
  const auto smollm = qd::PreTokenizer::smollm;
  CHECK(split("a12 345", smollm) == Words{"a", "1", "2", " ", "3", "4", "5"});
  CHECK(split("x  7\n\n8", smollm) == Words{"x", "  ", "7", "\n\n", "8"});  // the white space does not see the digit after it
  CHECK(split("1\xC2\xBD" "2", smollm) == Words{"1", "\xC2\xBD", "2"});
}

TEST_CASE("Falcon's pre-tokenizer parts punctuation, and digits by three, after bytes were letters", "[tokenizer]") {
  const auto falcon = qd::PreTokenizer::falcon;
  CHECK(split("don't (x) ...!?", falcon) == Words{"don", "'", "t", " ", "(", "x", ")", " ", "...!?"});
  CHECK(split("ab 12345", falcon) == Words{"ab", " ", "123", "45"});
  CHECK(split("x\u00B2 1\u00BD23", falcon) == Words{"x", "\xC2", "\xB2", " ", "1", "\xC2", "\xBD" "23"});
}

TEST_CASE("words join to the text they were cut from", "[tokenizer]") {
  qd::Rng rng(5);
  constexpr std::string_view letters[] = {"a", "Z", "7", " ", "\n", "'", "s", "ll", ".", "\xC2\xA0", "\xC3\xA9",
                                          "\xF0\x9F\x98\x80", "\x80", "\xE2"};
  for (int round = 0; round < 2000; ++round) {
    std::string text;
    for (std::uint32_t n = rng.below(24); n > 0; --n) text += letters[rng.below(std::size(letters))];
    for (const auto pre_tokenizer : {qd::PreTokenizer::gpt2, qd::PreTokenizer::smollm, qd::PreTokenizer::falcon}) {
      std::string joined;
      for (const std::string& word : split(text, pre_tokenizer)) {
        REQUIRE(!word.empty());
        joined += word;
      }
      REQUIRE(joined == text);
    }
  }
}

TEST_CASE("pairs merge by rank, then from the left", "[tokenizer]") {
  const qd::Tokenizer tokenizer(tiny_data());
  CHECK(tokenizer.encode("") == Ids{});
  CHECK(tokenizer.encode("hello") == Ids{259});
  CHECK(tokenizer.encode(" hello") == Ids{' ', 259});  // "hello" ranks before " he"
  CHECK(tokenizer.encode(" hex") == Ids{260, 'x'});
  CHECK(tokenizer.encode("hel") == Ids{256, 'l'});
  CHECK(tokenizer.encode("lll") == Ids{257, 'l'});
  CHECK(tokenizer.encode("aaaaaaa") == Ids{262, 261, 'a'});
  CHECK(tokenizer.encode("aaaaaaaaa") == Ids{263, 'a'});
  CHECK(tokenizer.decode(Ids{260, 257, 'o'}) == " hello");  // which need not be how it is encoded
}

TEST_CASE("special tokens are found in the text, the longest first, unless they are to be text", "[tokenizer]") {
  const qd::Tokenizer tokenizer(tiny_data());
  CHECK(tokenizer.encode("<|im_start|>hello<|im_end|>") == Ids{264, 259, 265});
  CHECK(tokenizer.encode("<x><x><y><x>") == Ids{266, 267, 266});
  CHECK(tokenizer.encode("<<x>>") == Ids{'<', 266, '>'});
  CHECK(tokenizer.encode("he<x>llo") == Ids{256, 266, 257, 'o'});  // no merge crosses a special token
  CHECK(tokenizer.encode("<x>", {.parse_special = false}) == Ids{'<', 'x', '>'});
  CHECK(tokenizer.encode("[tab]", {.parse_special = false}) == Ids{268});
  CHECK(tokenizer.decode(Ids{264, 259, 265, 268}) == "<|im_start|>hello<|im_end|>[tab]");
  CHECK(tokenizer.decode(Ids{264, 259, 265, 268}, {.skip_special = true}) == "hello[tab]");
  CHECK(tokenizer.is_control(265));
  CHECK(!tokenizer.is_control(268));
}

TEST_CASE("any bytes survive encoding and decoding", "[tokenizer]") {
  const qd::Tokenizer tokenizer(tiny_data());
  qd::Rng rng(11);
  for (int round = 0; round < 500; ++round) {
    std::string text;
    for (std::uint32_t n = rng.below(64); n > 0; --n) text += static_cast<char>(static_cast<unsigned char>(rng.below(256)));
    REQUIRE(tokenizer.decode(tokenizer.encode(text)) == text);
  }
}

TEST_CASE("a vocabulary is looked up both ways", "[tokenizer]") {
  const qd::Tokenizer tokenizer(tiny_data());
  CHECK(tokenizer.vocab_size() == 269);
  CHECK(tokenizer.eos() == 265);
  CHECK(tokenizer.bos() == -1);
  CHECK(tokenizer.token(259) == "hello");
  CHECK(tokenizer.id("hello") == 259);
  CHECK(!tokenizer.id("world"));
  const qd::Tokenizer copy = tokenizer;  // owns all it needs
  CHECK(copy.encode("<x>hello") == Ids{266, 259});
}

TEST_CASE("a byte without a token is an error that names its place, or is left out where that is asked for", "[tokenizer]") {
  qd::TokenizerData data = tiny_data();
  data.tokens['#'] = "unused";
  const qd::Tokenizer tokenizer(data);
  try {
    (void)tokenizer.encode("<x>he #");
    FAIL("no error");
  } catch (const qd::Error& error) {
    CHECK(error.code() == qd::Errc::unsupported);
    CHECK(error.offset() == 6);
    CHECK(std::string(error.what()).find("35") != std::string::npos);
  }
  CHECK(tokenizer.encode("a#a", {.skip_unknown = true}) == Ids{'a', 'a'});
  CHECK(tokenizer.encode("#", {.skip_unknown = true}) == Ids{});
}

TEST_CASE("ids outside of the vocabulary are refused", "[tokenizer]") {
  const qd::Tokenizer tokenizer(tiny_data());
  for (const std::int32_t id : {-1, 269, INT32_MAX, INT32_MIN}) {
    CHECK(error_of([&] { (void)tokenizer.decode(Ids{id}); }) == qd::Errc::bad_argument);
    CHECK(error_of([&] { (void)tokenizer.token(id); }) == qd::Errc::bad_argument);
    CHECK(error_of([&] { (void)tokenizer.is_control(id); }) == qd::Errc::bad_argument);
  }
}

TEST_CASE("tokenizer data that contradicts itself is refused", "[tokenizer]") {
  using qd::Errc;
  using Data = qd::TokenizerData;
  CHECK(error_of_data([](Data&) {}) == Errc::memory);  // the data as they are do load
  CHECK(error_of_data([](Data& d) { d.tokens.clear(), d.merges.clear(), d.token_types.clear(), d.eos = -1; }) == Errc::bad_config);
  CHECK(error_of_data([](Data& d) { d.tokens[7] = d.tokens[9]; }) == Errc::duplicate);
  CHECK(error_of_data([](Data& d) { d.tokens[7] = ""; }) == Errc::bad_config);
  CHECK(error_of_data([](Data& d) { d.tokens[7] = "two words"; }) == Errc::bad_config);        // a space is U+0120 in the alphabet
  CHECK(error_of_data([](Data& d) { d.tokens[7] = "\xE4\xB8\xAD"; }) == Errc::bad_config);     // no byte
  CHECK(error_of_data([](Data& d) { d.tokens[7] = "\xFF"; }) == Errc::bad_config);             // no UTF-8
  CHECK(error_of_data([](Data& d) { d.token_types.pop_back(); }) == Errc::bad_config);
  CHECK(error_of_data([](Data& d) { d.token_types[3] = 7; }) == Errc::bad_config);
  CHECK(error_of_data([](Data& d) { d.token_types[3] = 0; }) == Errc::bad_config);
  CHECK(error_of_data([](Data& d) { d.eos = 269; }) == Errc::bad_config);
  CHECK(error_of_data([](Data& d) { d.bos = -2; }) == Errc::bad_config);
  CHECK(error_of_data([](Data& d) { d.merges.push_back("h"); }) == Errc::bad_config);
  CHECK(error_of_data([](Data& d) { d.merges.push_back("h e l"); }) == Errc::bad_config);
  CHECK(error_of_data([](Data& d) { d.merges.push_back(" h"); }) == Errc::bad_config);
  CHECK(error_of_data([](Data& d) { d.merges.push_back("h "); }) == Errc::bad_config);
  CHECK(error_of_data([](Data& d) { d.merges.push_back("zz h"); }) == Errc::bad_config);       // left is absent
  CHECK(error_of_data([](Data& d) { d.merges.push_back("h zz"); }) == Errc::bad_config);       // right is absent
  CHECK(error_of_data([](Data& d) { d.merges.push_back("o h"); }) == Errc::bad_config);        // the product is absent
  CHECK(error_of_data([](Data& d) { d.merges.push_back("h e"); }) == Errc::duplicate);
  CHECK(error_of_data([](Data& d) { d.pre_tokenizer = ""; }) == Errc::unsupported);
  CHECK(error_of_data([](Data& d) { d.pre_tokenizer = "default"; }) == Errc::unsupported);
  try {
    qd::TokenizerData data = tiny_data();
    data.pre_tokenizer = "bert";
    qd::Tokenizer tokenizer(data);
    FAIL("no error");
  } catch (const qd::Error& error) {
    CHECK(std::string(error.what()).find("'bert'") != std::string::npos);
  }
}

TEST_CASE("a megabyte without a space is encoded, not searched for ever", "[tokenizer]") {
  // With a search over the word for every merge these would take 10^11 steps and more.
  const qd::Tokenizer tokenizer(tiny_data());
  constexpr std::size_t size = 1 << 20;
  CHECK(tokenizer.encode(std::string(size, 'a')).size() == size / 8);
  CHECK(tokenizer.encode(std::string(size, ' ')).size() == size);
  CHECK(tokenizer.encode(std::string(size, '<')).size() == size);
  CHECK(tokenizer.encode(std::string(size, '\xE2')).size() == size);
  std::string mixed;
  while (mixed.size() < size) mixed += "hellolla";
  CHECK(tokenizer.decode(tokenizer.encode(mixed)) == mixed);
}

TEST_CASE("SmolLM2's ids equal the reference's, and decode to the same bytes", "[tokenizer][model]") {
  const auto model = test::smollm2();
  if (!model) SKIP(test::no_smollm2);
  const auto reference_file = test::shared("data/ref_smollm2.json"), shakespeare_file = test::shared("data/tinyshakespeare.txt");
  if (!reference_file || !shakespeare_file) SKIP("no ref_smollm2.json or tinyshakespeare.txt: set QDYLORA_REFERENCE");
  const qd::Tokenizer tokenizer = qd::load_tokenizer(qd::GgufFile(*model));
  const auto reference = nlohmann::json::parse(read_file(*reference_file));
  for (const char* prompt : {"plain", "chat"}) {
    const auto& entry = reference.at("prompts").at(prompt);
    CHECK(tokenizer.encode(entry.at("text").get<std::string>()) == entry.at("ids").get<Ids>());
    CHECK(tokenizer.decode(entry.at("ids").get<Ids>()) == entry.at("text").get<std::string>());
    CHECK(tokenizer.decode(entry.at("greedy").get<Ids>()) == entry.at("greedy_text").get<std::string>());
  }
  const std::vector<qd::ChatMessage> chat{{"user", "What is the capital of France?"}};
  const auto smollm2 = qd::recognize_chat_template(qd::chat_template_text(qd::GgufFile(*model)));
  REQUIRE(smollm2);
  CHECK(smollm2->name == "smollm2");
  CHECK(qd::encode_chat(tokenizer, *smollm2, chat) == reference["prompts"]["chat"]["ids"].get<Ids>());
  // Of these texts the file has the ids and the number of bytes.
  for (const auto& [name, entry] : reference.at("perplexity").items()) {
    const auto ids = entry.at("ids").get<Ids>();
    const std::string text = tokenizer.decode(ids);
    CHECK(text.size() == entry.at("bytes").get<std::size_t>());
    CHECK(tokenizer.encode(text) == ids);
  }
  const std::string shakespeare = read_file(*shakespeare_file);
  CHECK(tokenizer.encode(shakespeare.substr(0, 5000)) == reference["perplexity"]["shakespeare"]["ids"].get<Ids>());
  CHECK(tokenizer.decode(tokenizer.encode(shakespeare)) == shakespeare);
}

TEST_CASE("SmolLM2's vocabulary encodes random Unicode without loss", "[tokenizer][model]") {
  const auto model = test::smollm2();
  if (!model) SKIP(test::no_smollm2);
  const qd::Tokenizer tokenizer = qd::load_tokenizer(qd::GgufFile(*model));
  CHECK(tokenizer.vocab_size() == 49152);
  CHECK(tokenizer.eos() == tokenizer.id("<|im_end|>"));
  // Typographic quotes, a fraction, CJK, an emoji with joiners, a run of white space: ids of the `tokenizers` package.
  const std::string sample =
      utf8(U"\u201CIt\u2019s \u00BE full\u201D,  he said:\n\n\t\u4E2D\u6587 \u2014 na\u00EFve \u00BDx\u00B2 "
           U"\U0001F469\u200D\U0001F680 10:45  ");
  CHECK(tokenizer.encode(sample) == Ids{1585,  1589,  417,   99,  216,   43124, 2073,  5023,  216, 384, 1137,  42, 1116,
                                        197,   28589, 29184, 1841, 15486, 46494, 216,   16738, 104, 19133, 15107, 235, 119,
                                        321,   231,   10813, 244, 218,   216,   33,    32,    42,  36,  37,    256});
  qd::Rng rng(3);
  for (int round = 0; round < 2000; ++round) {
    std::string text;
    for (std::uint32_t n = rng.below(40); n > 0; --n) {
      const std::uint32_t kind = rng.below(4);
      char32_t c = static_cast<char32_t>(kind == 0 ? 0x20 + rng.below(0x60) : kind == 1 ? rng.below(0x3000) : rng.below(0x30000));
      if (c < 0x20 || (c >= 0xD800 && c < 0xE000)) c = kind == 1 ? U'\n' : U' ';  // the vocabulary lacks six control characters
      qd::append_utf8(text, c);
    }
    REQUIRE(tokenizer.decode(tokenizer.encode(text)) == text);
  }
}

TEST_CASE("a GGUF file without a tokenizer is refused by its name and the absent key", "[tokenizer]") {
  const auto path = std::filesystem::path(QDYLORA_GOLDEN_DIR) / "tiny.gguf";
  try {
    (void)qd::load_tokenizer(qd::GgufFile(path));
    FAIL("no error");
  } catch (const qd::Error& error) {
    CHECK(error.code() == qd::Errc::bad_config);
    CHECK(error.file() == path.string());
    CHECK(std::string(error.what()).find("tokenizer.ggml.model") != std::string::npos);
  }
}

}  // namespace tokenizer_test
