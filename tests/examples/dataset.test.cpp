#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/model/chat_templates.hpp>

#include "../../examples/common/dataset.hpp"
#include "support/catch.hpp"
#include "support/tokenizer_folder.hpp"

namespace dataset_test {

namespace qd = qdylora;
namespace ex = qdylora::examples;

namespace {

/// A file that lives as long as the object.
class TemporaryFile {
 public:
  TemporaryFile(const std::string& name, std::string_view content)
      : path_(std::filesystem::temp_directory_path() / ("qdylora-dataset-" + std::to_string(::getpid()) + "-" + name)) {
    std::ofstream(path_, std::ios::binary) << content;
  }
  TemporaryFile(const TemporaryFile&) = delete;
  TemporaryFile& operator=(const TemporaryFile&) = delete;
  ~TemporaryFile() { std::filesystem::remove(path_); }
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

std::vector<ex::Example> load(const std::string& name, std::string_view content, ex::LoadOptions options = {}) {
  const TemporaryFile file(name, content);
  return ex::load_examples(file.path(), options);
}

/// The error of loading `content`: its code and text.
std::pair<qd::Errc, std::string> load_error(const std::string& name, std::string_view content) {
  try {
    load(name, content);
  } catch (const qd::Error& error) {
    CHECK(error.file().find(name) != std::string::npos);
    return {error.code(), error.what()};
  }
  FAIL("no error for " << content);
  return {};
}

bool holds(const std::string& text, std::string_view part) { return text.find(part) != std::string::npos; }

/// Bytes as tokens and the marks of the chat template.
qd::Tokenizer byte_tokenizer(std::int32_t eos = 257, const std::string& pre_tokenizer = "smollm", bool adds_bos = false) {
  auto data = test::tokenizers::byte_data({"<|im_start|>", "<|im_end|>"});
  data.pre_tokenizer = pre_tokenizer;
  data.eos = eos;
  data.adds_bos = adds_bos;
  return qd::Tokenizer(data);
}

std::string prompt_text(const qd::Tokenizer& tokenizer, const ex::Sample& sample) {
  return tokenizer.decode(std::span(sample.ids).first(static_cast<std::size_t>(sample.prompt_length)));
}
std::string scored_text(const qd::Tokenizer& tokenizer, const ex::Sample& sample) {
  return tokenizer.decode(std::span(sample.ids).subspan(static_cast<std::size_t>(sample.prompt_length)));
}

}  // namespace

TEST_CASE("JSON lines of all known shapes become examples", "[dataset]") {
  const auto examples = load("all.jsonl",
                             "{\"prompt\": \"p\", \"response\": \"r\"}\n"
                             "{\"question\": \"q\\n?\", \"answer\": \"a\\n#### 1\", \"extra\": 5}\r\n"
                             "\n"
                             "{\"instruction\": \"i\", \"input\": \"\", \"output\": \"o\"}\n"
                             "{\"instruction\": \"i\", \"input\": \"x\", \"output\": \"o\"}\n"
                             "{\"instruction\": \"i\", \"output\": \"\"}\n"
                             "{\"messages\": [{\"role\": \"system\", \"content\": \"s\"}, "
                             "{\"role\": \"user\", \"content\": \"u1\"}, {\"role\": \"assistant\", \"content\": \"a1\"},"
                             " {\"role\": \"user\", \"content\": \"u2\"},"
                             " {\"role\": \"assistant\", \"content\": \"a2\"}, {\"role\": \"user\", \"content\": \"u3\"}]}");
  REQUIRE(examples.size() == 6);
  CHECK(examples[0].prompt == "p");
  CHECK(examples[0].response == "r");
  CHECK(examples[1].prompt == "q\n?");
  CHECK(examples[1].response == "a\n#### 1");
  CHECK(examples[2].prompt == "i");
  CHECK(examples[3].prompt == "i\n\nx");
  CHECK(examples[4].response.empty());
  CHECK(examples[5].prompt == "u2");
  CHECK(examples[5].response == "a2");
  REQUIRE(examples[5].earlier.size() == 3);
  CHECK(examples[5].earlier[0].role == "system");
  CHECK(examples[5].earlier[2].content == "a1");
}

TEST_CASE("completions, ShareGPT's conversations and texts are read too", "[dataset]") {
  const auto examples =
      load("more.jsonl",
           "{\"prompt\": \"p\", \"completion\": \"c\"}\n"
           "{\"prompt\": \"p\", \"completion\": \"c\", \"response\": \"r\"}\n"
           "{\"id\": 7, \"conversations\": [{\"from\": \"system\", \"value\": \"s\"}, {\"from\": \"human\", \"value\": \"u1\"}, "
           "{\"from\": \"gpt\", \"value\": \"a1\"}, {\"from\": \"human\", \"value\": \"u2\"}, {\"from\": \"gpt\", \"value\": \"a2\"}]}\n"
           "{\"conversations\": [{\"role\": \"user\", \"content\": \"u\"}, {\"role\": \"assistant\", \"content\": \"a\"}]}\n"
           "{\"text\": \"all of it\", \"source\": \"web\"}\n"
           "{\"instruction\": \"i\", \"output\": \"o\", \"text\": \"both as a prompt\"}\n");
  REQUIRE(examples.size() == 6);
  CHECK(examples[0].prompt == "p");
  CHECK(examples[0].response == "c");
  CHECK(examples[1].response == "r");
  CHECK(examples[2].prompt == "u2");
  CHECK(examples[2].response == "a2");
  CHECK(examples[2].earlier == std::vector<qd::ChatMessage>{{"system", "s"}, {"user", "u1"}, {"assistant", "a1"}});
  CHECK(examples[3].prompt == "u");
  CHECK(examples[3].response == "a");
  CHECK(examples[4].prompt.empty());
  CHECK(examples[4].response == "all of it");
  CHECK(examples[5].prompt == "i");
  // A text is scored as running text is: all but what it begins with.
  const auto sample = ex::tokenize(examples[4], byte_tokenizer());
  REQUIRE(sample);
  CHECK(scored_text(byte_tokenizer(), *sample) == "ll of it");
}

TEST_CASE("every answer of a conversation is an example with what was said before it", "[dataset]") {
  const std::vector<ex::Example> examples{
      {"q", "r"},
      {"u3", "a3", {{"system", "s"}, {"user", "u1"}, {"assistant", "a1"}, {"user", "u2"}, {"assistant", "a2"}}},
      {"u2", "a2", {{"assistant", "hello"}, {"user", "u1"}, {"assistant", "a1"}, {"assistant", "and"}}},
      {"", "running text"}};
  const auto all = ex::with_every_answer(examples);
  REQUIRE(all.size() == 7);
  CHECK(all[0].response == "r");
  CHECK(all[1].prompt == "u1");
  CHECK(all[1].response == "a1");
  CHECK(all[1].earlier == std::vector<qd::ChatMessage>{{"system", "s"}});
  CHECK(all[2].prompt == "u2");
  CHECK(all[2].response == "a2");
  CHECK(all[2].earlier == std::vector<qd::ChatMessage>{{"system", "s"}, {"user", "u1"}, {"assistant", "a1"}});
  CHECK(all[3].response == "a3");
  CHECK(all[3].earlier.size() == 5);
  CHECK(all[4].response == "a1");  // a greeting and what is added to an answer answer nobody
  CHECK(all[5].response == "a2");
  CHECK(all[6].response == "running text");
  // Each is tokenized to what the conversation has up to there.
  const qd::Tokenizer tokenizer = byte_tokenizer();
  const auto smollm2 = qd::chat_template("smollm2");
  const auto first = ex::tokenize(all[1], tokenizer, {.chat = &smollm2}), last = ex::tokenize(all[3], tokenizer, {.chat = &smollm2});
  REQUIRE((first && last));
  CHECK(scored_text(tokenizer, *first) == "a1<|im_end|>");
  CHECK(std::equal(first->ids.begin(), first->ids.end(), last->ids.begin()));
}

TEST_CASE("of several right answers the first is learned, and each of them matches", "[dataset]") {
  const auto examples = load("several.jsonl", "{\"question\": \"q\", \"answer\": [\"five\", \"5 seasons\", \"Five\"]}\n"
                                              "{\"question\": \"q\", \"answer\": [\"one\"]}");
  REQUIRE(examples.size() == 2);
  CHECK(examples[0].response == "five");
  CHECK(examples[0].alternatives == std::vector<std::string>{"5 seasons", "Five"});
  CHECK(examples[0].references() == std::vector<std::string>{"five", "5 seasons", "Five"});
  CHECK(examples[1].references() == std::vector<std::string>{"one"});
  for (const char* right : {"five", " Five\n", "it has 5"}) CHECK(ex::exact_match(right, examples[0]));
  for (const char* wrong : {"six", "FIVE", "it has 6"}) CHECK_FALSE(ex::exact_match(wrong, examples[0]));
  CHECK_FALSE(ex::exact_match("five", examples[1]));
}

TEST_CASE("a .json file may be one array", "[dataset]") {
  const auto examples = load("array.json", " [{\"prompt\": \"p\",\n\"response\": \"r\"}, {\"question\": \"q\", \"answer\": \"a\"}]");
  REQUIRE(examples.size() == 2);
  CHECK(examples[1].prompt == "q");
  const auto [code, text] = load_error("array.json", "[{\"prompt\": \"p\", \"response\": \"r\"}, {\"prompt\": \"p\"}]");
  CHECK(code == qd::Errc::json);
  CHECK(holds(text, "element 2"));
}

TEST_CASE("a bad line is an error with its number, what is expected and what is there", "[dataset]") {
  const std::string good = "{\"prompt\": \"p\", \"response\": \"r\"}\n";
  const auto bad = [&](const std::string& line) { return load_error("bad.jsonl", good + "\n" + line + "\n" + good); };
  {
    const auto [code, text] = bad("{\"prompt\": \"p\", \"continuation\": \"r\"}");
    CHECK(code == qd::Errc::json);
    CHECK(holds(text, "line 3"));
    CHECK(holds(text, "prompt and response"));
    CHECK(holds(text, "conversations, or text"));
    CHECK(holds(text, "found continuation, prompt"));
  }
  {
    const auto [code, text] = bad("{\"prompt\": \"q\", \"response\": [\"a\", \"b\"]}");
    CHECK(code == qd::Errc::json);
    CHECK(holds(text, "'response' to be a string, found array"));
  }
  CHECK(holds(bad("{\"question\": \"q\", \"answer\": 7}").second, "'answer' to be a string, found number"));
  CHECK(holds(bad("{\"question\": \"q\", \"answer\": []}").second, "answers in field 'answer', found an empty list"));
  CHECK(holds(bad("{\"question\": \"q\", \"answer\": [\"a\", 7]}").second, "'answer' to be a list of strings, found number"));
  CHECK(holds(bad("{\"prompt\": \"p\", ").second, "line 3"));
  CHECK(bad("{\"prompt\": \"p\", ").first == qd::Errc::json);
  {  // no line and column of the parser's, which saw one line; the byte is of the file
    const auto text = bad("{\"prompt\": p}").second;
    CHECK(holds(text, "line 3: syntax error"));
    CHECK_FALSE(holds(text, "line 1"));
    CHECK(holds(text, "(at byte " + std::to_string(good.size() + 1 + 11) + ")"));
  }
  CHECK(bad("{\"prompt\": \"\xFF\", \"response\": \"r\"}").first == qd::Errc::utf8);
  CHECK(bad("{\"prompt\": \"a\", \"prompt\": \"b\", \"response\": \"r\"}").first == qd::Errc::duplicate);
  CHECK(bad(std::string(100000, '[')).first == qd::Errc::limit);
  CHECK(holds(bad("[1, 2]").second, "expected an object, found array"));
  CHECK(holds(bad("{}").second, "found none"));
  CHECK(holds(bad("{\"prompt\": \"\", \"response\": \"r\"}").second, "expected text in field 'prompt'"));
  CHECK(holds(bad("{\"messages\": {}}").second, "expected a list"));
  CHECK(holds(bad("{\"messages\": []}").second, "assistant's answer"));
  CHECK(holds(bad("{\"messages\": [{\"role\": \"user\", \"content\": \"u\"}]}").second, "assistant's answer"));
  CHECK(holds(bad("{\"messages\": [{\"role\": \"assistant\", \"content\": \"u\"}]}").second, "assistant's answer"));
  CHECK(holds(bad("{\"messages\": [{\"role\": \"tool\", \"content\": \"u\"}]}").second, "message 1: expected role"));
  CHECK(holds(bad("{\"messages\": [{\"role\": \"user\"}]}").second, "expected a field 'content'"));
  CHECK(holds(bad("{\"conversations\": [{\"from\": \"bot\", \"value\": \"u\"}]}").second, "message 1: expected from system, human or gpt"));
  CHECK(holds(bad("{\"conversations\": [{\"from\": \"human\", \"content\": \"u\"}]}").second, "expected a field 'value'"));
  CHECK(holds(bad("{\"conversations\": [{\"from\": \"human\", \"value\": \"u\"}]}").second, "assistant's answer"));
  CHECK(holds(bad("{\"conversations\": [{\"from\": \"human\", \"value\": 7}]}").second, "'value' to be a string"));
  CHECK(holds(bad("{\"prompt\": \"\", \"completion\": \"r\"}").second, "expected text in field 'prompt'"));
  CHECK(holds(bad("{\"text\": \"\"}").second, "line 3: expected text in field 'text'"));
  CHECK(holds(bad("{\"text\": [\"a\"]}").second, "'text' to be a string"));
  CHECK(holds(bad("{\"messages\": [7]}").second, "message 1: expected an object, found number"));
  CHECK(!holds(bad("{\"\\u001b[31m\": 1}").second, "\x1b"));  // nothing from the file reaches the terminal unescaped
}

TEST_CASE("a file that is absent, empty or a folder is an error", "[dataset]") {
  CHECK(load_error("empty.jsonl", "\n \n").first == qd::Errc::bad_config);
  CHECK(load_error("empty.txt", "").first == qd::Errc::bad_config);
  const auto folder = std::filesystem::temp_directory_path();
  for (const auto& path : {folder / "qdylora-no-such-file.txt", folder}) {
    try {
      (void)ex::load_examples(path);
      FAIL("no error");
    } catch (const qd::Error& error) {
      CHECK(error.code() == qd::Errc::open);
    }
  }
}

TEST_CASE("plain text is cut at paragraphs, lines or words, and nothing is lost", "[dataset]") {
  std::string text;
  for (int i = 0; i < 200; ++i) text += "word" + std::to_string(i) + (i % 17 == 0 ? "\n\n" : i % 5 == 0 ? "\n" : " ");
  text += std::string(300, 'x');                             // nowhere to cut
  for (int i = 0; i < 100; ++i) text += "\xF0\x9F\x98\x80";  // only between code points
  for (const std::size_t chunk : {16u, 17u, 66u, 101u, 5000u}) {
    std::string joined;
    for (const ex::Example& example : load("text.txt", text, {.chunk_bytes = chunk})) {
      CHECK(example.prompt.empty());
      REQUIRE(!example.response.empty());
      CHECK(example.response.size() <= chunk);
      CHECK((static_cast<unsigned char>(example.response.front()) & 0xC0u) != 0x80u);
      joined += example.response;
    }
    CHECK(joined == text);
  }
  const auto paragraphs = load("text.txt", "aaaa aaaa\n\nbbbb bbbb\ncccc", {.chunk_bytes = 16});
  REQUIRE(paragraphs.size() == 2);
  CHECK(paragraphs[0].response == "aaaa aaaa\n\n");
  CHECK_THROWS_AS(load("text.txt", text, {.chunk_bytes = 0}), qd::Error);
}

TEST_CASE("the final answer is the number after ####, else the last one", "[dataset]") {
  CHECK(ex::final_answer("48/2 = 24.\n#### 72") == "72");
  CHECK(ex::final_answer("#### 1,234,567 dollars 8") == "1234567");
  CHECK(ex::final_answer("#### $12") == "12");
  CHECK(ex::final_answer("#### -12") == "-12");
  CHECK(ex::final_answer("#### 3\n#### 4 5") == "3");
  CHECK(ex::final_answer("12 apples\n#### none") == "12");
  CHECK(ex::final_answer("it is 5, then 7.") == "7");
  CHECK(ex::final_answer("costs 10.50 dollars") == "10.5");
  CHECK(ex::final_answer("#### 10.00") == "10");
  CHECK(ex::final_answer("9-4") == "4");
  CHECK(ex::final_answer("1,2") == "12");
  CHECK(ex::final_answer("5,") == "5");
  CHECK(ex::final_answer("no number") == "");
  CHECK(ex::final_answer("") == "");
  CHECK(ex::final_answer("####") == "");
}

TEST_CASE("answers match by their final number, or as texts where there is none", "[dataset]") {
  CHECK(ex::exact_match("so it is\n#### 72", "#### 72"));
  CHECK(ex::exact_match("the answer is 1,000.", "#### 1000"));
  CHECK(!ex::exact_match("#### 73", "#### 72"));
  CHECK(!ex::exact_match("", "#### 72"));
  CHECK(ex::exact_match(" Paris\n", "Paris"));
  CHECK(!ex::exact_match("Rome", "Paris"));
}

TEST_CASE("a sample is the prompt by the chat template, then the scored response and its end", "[dataset]") {
  const qd::Tokenizer tokenizer = byte_tokenizer();
  const ex::Example example{"How many?", "1 + 1 = 2.\n#### 2"};
  const auto smollm2 = qd::chat_template("smollm2");
  const auto sample = ex::tokenize(example, tokenizer, {.chat = &smollm2});
  REQUIRE(sample);
  CHECK(prompt_text(tokenizer, *sample) == qd::chat_text(smollm2, std::vector<qd::ChatMessage>{{"user", "How many?"}}));
  CHECK(scored_text(tokenizer, *sample) == "1 + 1 = 2.\n#### 2<|im_end|>");
  CHECK(sample->ids.back() == tokenizer.eos());
  CHECK(!sample->truncated);
  const auto prompt = ex::prompt_ids(example, tokenizer, &smollm2);
  CHECK(std::equal(prompt.begin(), prompt.end(), sample->ids.begin()));

  const auto plain = ex::tokenize(example, tokenizer);
  REQUIRE(plain);
  CHECK(prompt_text(tokenizer, *plain) == "How many?\n");
  CHECK(scored_text(tokenizer, *plain) == "1 + 1 = 2.\n#### 2<|im_end|>");

  const ex::Example turns{"u2", "a2", {{"system", "s"}, {"user", "u1"}, {"assistant", "a1"}}};
  const auto later = ex::tokenize(turns, tokenizer, {.chat = &smollm2});
  REQUIRE(later);
  CHECK(tokenizer.decode(later->ids) ==
        "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nu1<|im_end|>\n<|im_start|>assistant\na1<|im_end|>\n"
        "<|im_start|>user\nu2<|im_end|>\n<|im_start|>assistant\na2<|im_end|>");
  CHECK(scored_text(tokenizer, *later) == "a2<|im_end|>");
}

TEST_CASE("running text is scored from its second token and has no end", "[dataset]") {
  const qd::Tokenizer tokenizer = byte_tokenizer();
  const auto sample = ex::tokenize({"", "some text"}, tokenizer);
  REQUIRE(sample);
  CHECK(sample->prompt_length == 1);
  CHECK(tokenizer.decode(sample->ids) == "some text");
  CHECK(!ex::tokenize({"", "s"}, tokenizer));  // nothing to predict
  CHECK(!ex::tokenize({"", ""}, tokenizer));
}

TEST_CASE("sequences start with the begin token of a tokenizer that adds it", "[dataset]") {
  const qd::Tokenizer tokenizer = byte_tokenizer(257, "llama-bpe", true);
  const auto sample = ex::tokenize({"", "some text"}, tokenizer);
  REQUIRE(sample);
  CHECK(sample->prompt_length == 1);
  CHECK(tokenizer.decode(sample->ids) == "<|im_start|>some text");
  const auto answer = ex::tokenize({"Q", "A"}, tokenizer);
  REQUIRE(answer);
  CHECK(prompt_text(tokenizer, *answer) == "<|im_start|>Q\n");
}

TEST_CASE("an answer ends in the token that ends a turn of its template, whatever the tokenizer's end is", "[dataset]") {
  const qd::Tokenizer tokenizer = byte_tokenizer(256);
  const auto qwen2 = qd::chat_template("qwen2"), llama2 = qd::chat_template("llama2");
  const auto sample = ex::tokenize({"Q", "A"}, tokenizer, {.chat = &qwen2});
  REQUIRE(sample);
  CHECK(scored_text(tokenizer, *sample) == "A<|im_end|>");
  CHECK(ex::end_of_answer(tokenizer, &qwen2) == 257);
  CHECK(ex::end_of_answer(tokenizer, nullptr) == 256);
  // Where the template begins an answer with a space, and ends it so, both are the answer's. (This tokenizer's bos is its eos.)
  const auto spaced = ex::tokenize({"Q", " A\n"}, tokenizer, {.chat = &llama2});
  REQUIRE(spaced);
  CHECK(prompt_text(tokenizer, *spaced) == "<|im_start|>[INST] Q [/INST]");
  CHECK(scored_text(tokenizer, *spaced) == " A <|im_start|>");
}

TEST_CASE("marks inside of data are text", "[dataset]") {
  const qd::Tokenizer tokenizer = byte_tokenizer();
  const auto smollm2 = qd::chat_template("smollm2");
  const auto sample = ex::tokenize({"a<|im_end|>b", "c<|im_end|>d"}, tokenizer, {.chat = &smollm2});
  REQUIRE(sample);
  CHECK(std::count(sample->ids.begin(), sample->ids.end(), tokenizer.eos()) == 3);  // of system, user and assistant
}

TEST_CASE("a sample that is too long loses the right of its response, or is left out and counted", "[dataset]") {
  const qd::Tokenizer tokenizer = byte_tokenizer();
  const std::vector<ex::Example> examples{{"p", "response"}, {"p", "r"}, {std::string(400, 'p'), "r"}};
  const auto whole = ex::tokenize(examples[0], tokenizer);
  REQUIRE(whole);
  const qd::Index length = whole->prompt_length + 4;
  const auto cut = ex::tokenize(examples, tokenizer, {.max_length = length});
  REQUIRE(cut.samples.size() == 2);
  CHECK(cut.truncated == 1);
  CHECK(cut.dropped == 1);  // its prompt alone is too long
  CHECK(cut.samples[0].truncated);
  CHECK(scored_text(tokenizer, cut.samples[0]) == "resp");
  CHECK(scored_text(tokenizer, cut.samples[1]) == "r<|im_end|>");
  const auto kept = ex::tokenize(examples, tokenizer, {.max_length = length, .drop_long = true});
  CHECK(kept.samples.size() == 1);
  CHECK(kept.truncated == 0);
  CHECK(kept.dropped == 2);
  CHECK(!ex::tokenize(examples[0], tokenizer, {.max_length = whole->prompt_length}));
  CHECK_THROWS_AS(ex::tokenize(examples[0], tokenizer, {.max_length = 1}), qd::Error);
}

TEST_CASE("a tokenizer without an end token cannot make samples of answers", "[dataset]") {
  CHECK_THROWS_AS(ex::tokenize({"p", "r"}, byte_tokenizer(-1)), qd::Error);
}

}  // namespace dataset_test
