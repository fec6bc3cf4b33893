// Data to fine-tune on: reads examples from a file and turns them into token ids.
//   JSON lines (.jsonl, .ndjson, .json; a .json file may also be one array), each object with one of these sets of fields:
//     prompt, response  |  question, answer (GSM8K)  |  instruction, output and optionally input (Alpaca)
//     messages (or conversation): [{"role": ..., "content": ...}, ...], whose last assistant turn is the response
//   anything else is plain text, read as chunks of running text.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <initializer_list>
#include <iterator>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/core/error.hpp>
#include <qdylora/core/scalar.hpp>
#include <qdylora/io/json.hpp>
#include <qdylora/model/chat.hpp>
#include <qdylora/model/tokenizer.hpp>

#include "example.hpp"

namespace qdylora::examples {

struct LoadOptions {
  std::size_t chunk_bytes = 1024;  // of plain text: the largest chunk. A chunk has at most as many tokens as bytes.
};

/// f(), with file and line added to its Error.
template <class F>
auto at_line(const std::string& file, const std::string& where, F&& f) {
  try {
    return f();
  } catch (const Error& error) {
    throw Error(error.code(), where + ": " + error.what(), {.file = file});
  }
}

namespace detail {

/// Makes examples of JSON objects; `where` names the line in errors.
class ExampleReader {
 public:
  explicit ExampleReader(std::string file) : file_(std::move(file)) {}

  Example read(const Json& object, const std::string& where) const {
    if (!object.is_object()) fail(where, "expected an object, found " + std::string(object.type_name()));
    if (has(object, {"prompt", "response"})) return pair(object, "prompt", "response", where);
    if (has(object, {"question", "answer"})) return pair(object, "question", "answer", where);
    if (has(object, {"instruction", "output"})) {
      Example example = pair(object, "instruction", "output", where);
      if (object.contains("input")) {
        if (const std::string& input = text(object, "input", where); !input.empty()) example.prompt += "\n\n" + input;
      }
      return example;
    }
    for (const char* key : {"messages", "conversation"}) {
      if (object.contains(key)) return conversation(object[key], where + ", '" + key + "'");
    }
    std::string found;
    for (const auto& item : object.items()) found += (found.empty() ? "" : ", ") + printable(item.key(), 40);
    fail(where, "expected the fields prompt and response, question and answer, instruction and output, or messages; found " +
                    (found.empty() ? "none" : printable(found, 400)));
  }

  /// The library's parser, with the line in its errors; the text begins at byte `offset` of the file.
  Json parse(std::string_view text, const std::string& where, std::uint64_t offset) const {
    return at_line(file_, where, [&] { return parse_json(text, {.offset = offset}); });
  }

  [[noreturn]] void fail(const std::string& where, const std::string& message) const {
    throw Error(Errc::json, where + ": " + message, {.file = file_});
  }

 private:
  static bool has(const Json& object, std::initializer_list<const char*> keys) {
    return std::all_of(keys.begin(), keys.end(), [&](const char* key) { return object.contains(key); });
  }

  const std::string& text(const Json& object, const char* key, const std::string& where) const {
    const auto found = object.find(key);
    if (found == object.end()) fail(where, "expected a field '" + std::string(key) + "', found none");
    if (!found->is_string()) fail(where, "expected field '" + std::string(key) + "' to be a string, found " + found->type_name());
    return found->get_ref<const std::string&>();
  }

  Example pair(const Json& object, const char* prompt, const char* response, const std::string& where) const {
    Example example{text(object, prompt, where), text(object, response, where)};
    if (example.prompt.empty()) fail(where, "expected text in field '" + std::string(prompt) + "', found none");
    return example;
  }

  Example conversation(const Json& list, const std::string& where) const {
    if (!list.is_array()) fail(where, "expected a list of messages, found " + std::string(list.type_name()));
    std::vector<ChatMessage> turns;
    std::size_t end = 0;  // one past the last assistant turn
    for (const auto& item : list) {
      const std::string place = where + ", message " + std::to_string(turns.size() + 1);
      if (!item.is_object()) fail(place, "expected an object, found " + std::string(item.type_name()));
      turns.push_back({text(item, "role", place), text(item, "content", place)});
      const std::string& role = turns.back().role;
      if (role != "system" && role != "user" && role != "assistant") {
        fail(place, "expected role system, user or assistant, found '" + printable(role) + "'");
      }
      if (role == "assistant") end = turns.size();
    }
    if (end < 2 || turns[end - 2].role != "user") fail(where, "expected a turn of the user and the assistant's answer, found none");
    Example example{std::move(turns[end - 2].content), std::move(turns[end - 1].content)};
    if (example.prompt.empty()) fail(where, "expected text in the user's last turn, found none");
    turns.resize(end - 2);
    example.earlier = std::move(turns);
    return example;
  }

  std::string file_;
};

/// The end of the chunk that starts at `begin`: of the last paragraph, else line, else word, that ends in its second half, else of
/// the last code point that fits.
inline std::size_t chunk_end(std::string_view text, std::size_t begin, std::size_t chunk_bytes) {
  if (text.size() - begin <= chunk_bytes) return text.size();
  const std::string_view window = text.substr(begin, chunk_bytes);
  for (const std::string_view separator : {"\n\n", "\n", " "}) {
    if (const std::size_t found = window.rfind(separator); found != window.npos && found >= chunk_bytes / 2) {
      return begin + std::min(found + separator.size(), chunk_bytes);
    }
  }
  std::size_t end = begin + chunk_bytes;
  while (end > begin + 1 && (static_cast<unsigned char>(text[end]) & 0xC0u) == 0x80u) --end;
  return end;
}

}  // namespace detail

/// The examples of a file, in its order. Errors, with file and line: open, read, json (other fields than those above) and those of
/// parse_json, bad_config (no examples at all), bad_argument (chunk_bytes < 16).
inline std::vector<Example> load_examples(const std::filesystem::path& path, LoadOptions options = {}) {
  QDYLORA_EXPECTS(options.chunk_bytes >= 16, bad_argument,
                  "load_examples: expected chunks of at least 16 bytes, found " + std::to_string(options.chunk_bytes));
  const detail::ExampleReader reader(path.string());
  std::ifstream file(path, std::ios::binary);
  if (!file || std::filesystem::is_directory(path)) throw Error(Errc::open, "cannot open the data", {.file = path.string()});
  const std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file.bad()) throw Error(Errc::read, "cannot read the data", {.file = path.string()});
  const std::size_t first = text.find_first_not_of(" \t\r\n");

  std::vector<Example> examples;
  const std::string extension = path.extension().string();
  if (extension == ".json" && first != text.npos && text[first] == '[') {
    const Json list = reader.parse(text, "array", 0);
    for (const auto& item : list) examples.push_back(reader.read(item, "element " + std::to_string(examples.size() + 1)));
  } else if (extension == ".json" || extension == ".jsonl" || extension == ".ndjson") {
    Index number = 0;
    for (std::size_t begin = 0; begin < text.size();) {
      const std::size_t end = std::min(text.find('\n', begin), text.size());
      const std::string_view line = detail::trim(std::string_view(text).substr(begin, end - begin));
      const std::string where = "line " + std::to_string(++number);
      if (!line.empty()) {
        const auto offset = static_cast<std::uint64_t>(line.data() - text.data());
        examples.push_back(reader.read(reader.parse(line, where, offset), where));
      }
      begin = end + 1;
    }
  } else {
    for (std::size_t begin = 0; begin < text.size();) {
      const std::size_t end = detail::chunk_end(text, begin, options.chunk_bytes);
      examples.push_back({"", text.substr(begin, end - begin)});
      begin = end;
    }
  }
  if (examples.empty()) throw Error(Errc::bad_config, "expected examples, found an empty file", {.file = path.string()});
  return examples;
}

/// ids[i] for i >= prompt_length is scored, predicted from the ids before it; prompt_length >= 1.
struct Sample {
  std::vector<std::int32_t> ids;
  Index prompt_length = 0;
  bool truncated = false;  // the end of the response did not fit
};

struct TokenizeOptions {
  const ChatTemplate* chat = nullptr;  // null: the prompt, a line feed, the response
  Index max_length = 512;              // tokens, of prompt and response together
  bool drop_long = false;              // a sample that is too long: true leaves it out, false cuts the response on the right
};

/// The ids that ask for an answer: what a sample starts with, and what generation starts from.
inline std::vector<std::int32_t> prompt_ids(const Example& example, const Tokenizer& tokenizer, const ChatTemplate* chat) {
  std::vector<ChatMessage> turns = example.earlier;
  turns.push_back({"user", example.prompt});
  if (chat != nullptr) return encode_chat(tokenizer, *chat, turns);
  std::vector<std::int32_t> ids;
  if (tokenizer.adds_bos()) ids.push_back(tokenizer.bos());
  std::string text;
  for (const ChatMessage& turn : turns) text += turn.content + "\n";
  const auto asked = tokenizer.encode(text, {.parse_special = false});
  ids.insert(ids.end(), asked.begin(), asked.end());
  return ids;
}

/// The token that ends an answer. Errors: unsupported.
inline std::int32_t end_of_answer(const Tokenizer& tokenizer, const ChatTemplate* chat) {
  if (chat != nullptr) return chat_end(tokenizer, *chat);
  QDYLORA_EXPECTS(tokenizer.eos() >= 0, unsupported, "the tokenizer has no end token");
  return tokenizer.eos();
}

/// The sample of an example: prompt, response, and the token that ends it, which is scored too. Running text (an empty prompt) has
/// no template and no end, and all its tokens but the first are scored. No value: nothing to score fits in max_length, or it is too
/// long and drop_long is set. Errors: bad_argument, unsupported (the tokenizer lacks the marks, an end or a byte of the text).
inline std::optional<Sample> tokenize(const Example& example, const Tokenizer& tokenizer, TokenizeOptions options = {}) {
  QDYLORA_EXPECTS(options.max_length >= 2, bad_argument,
                  "tokenize: expected a length of 2 or more, found " + std::to_string(options.max_length));
  Sample sample;
  const auto append = [&](const std::vector<std::int32_t>& ids) { sample.ids.insert(sample.ids.end(), ids.begin(), ids.end()); };
  if (example.prompt.empty()) {
    if (tokenizer.adds_bos()) sample.ids.push_back(tokenizer.bos());
    append(tokenizer.encode(example.response, {.parse_special = false}));
    sample.prompt_length = 1;
  } else {
    sample.ids = prompt_ids(example, tokenizer, options.chat);
    sample.prompt_length = static_cast<Index>(sample.ids.size());
    if (options.chat != nullptr) {
      append(encode_answer(tokenizer, *options.chat, sample.ids, example.response));
    } else {
      append(tokenizer.encode(example.response, {.parse_special = false, .follows = Follows::text}));
      sample.ids.push_back(end_of_answer(tokenizer, nullptr));
    }
  }
  sample.truncated = static_cast<Index>(sample.ids.size()) > options.max_length;
  if (sample.truncated) {
    if (options.drop_long) return std::nullopt;
    sample.ids.resize(static_cast<std::size_t>(options.max_length));
  }
  if (sample.prompt_length >= static_cast<Index>(sample.ids.size())) return std::nullopt;
  return sample;
}

struct TokenCounts {
  Index tokens = 0, scored = 0;

  double percent_scored() const noexcept { return tokens > 0 ? 100.0 * static_cast<double>(scored) / static_cast<double>(tokens) : 0.0; }
};

inline TokenCounts count_tokens(std::span<const Sample> samples) {
  TokenCounts counts;
  for (const auto& sample : samples) {
    counts.tokens += static_cast<Index>(sample.ids.size());
    counts.scored += static_cast<Index>(sample.ids.size()) - sample.prompt_length;
  }
  return counts;
}

struct Samples {
  std::vector<Sample> samples;
  Index truncated = 0;  // samples whose response was cut
  Index dropped = 0;    // examples left out
};

/// Every example in order, and how many of them were cut or left out.
inline Samples tokenize(std::span<const Example> examples, const Tokenizer& tokenizer, TokenizeOptions options = {}) {
  Samples result;
  for (const Example& example : examples) {
    if (auto sample = tokenize(example, tokenizer, options)) {
      result.truncated += sample->truncated ? 1 : 0;
      result.samples.push_back(*std::move(sample));
    } else {
      ++result.dropped;
    }
  }
  return result;
}

}  // namespace qdylora::examples
