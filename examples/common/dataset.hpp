// Data to fine-tune on: reads examples from a file and turns them into token ids.
//   JSON lines (.jsonl, .ndjson, .json; a .json file may also be one array), each object with one of these sets of fields:
//     prompt, response or completion  |  question, answer (GSM8K)  |  instruction, output and optionally input (Alpaca)
//       an answer may be a list of right ones (Natural Questions), of which the first is learned
//     messages, conversation or conversations: [{"role": ..., "content": ...}, ...], or ShareGPT's [{"from": ..., "value": ...}, ...],
//       whose last assistant turn is the response
//     text: running text, all of it learned; marks of a chat template are text in it too
//   anything else is plain text, read as chunks of running text.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <initializer_list>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/core/error.hpp>
#include <qdylora/core/scalar.hpp>
#include <qdylora/model/chat.hpp>
#include <qdylora/model/tokenizer.hpp>

#include "example.hpp"
#include "json_lines.hpp"

namespace qdylora::examples {

struct LoadOptions {
  std::size_t chunk_bytes = 1024;  // of plain text: the largest chunk. A chunk has at most as many tokens as bytes.
};

namespace detail {

/// Makes examples of JSON objects.
class ExampleReader : public ObjectReader {
 public:
  using ObjectReader::ObjectReader;

  Example read(const Json& object, const std::string& where) const {
    for (const char* response : {"response", "completion"})
      if (has(object, {"prompt", response})) return pair(object, "prompt", response, where);
    if (has(object, {"question", "answer"})) return pair(object, "question", "answer", where);
    if (has(object, {"instruction", "output"})) {
      Example example = pair(object, "instruction", "output", where);
      if (object.contains("input")) {
        if (const std::string& input = text(object, "input", where); !input.empty()) example.prompt += "\n\n" + input;
      }
      return example;
    }
    for (const char* key : {"messages", "conversation", "conversations"}) {
      if (object.contains(key)) return conversation(object[key], where + ", '" + key + "'");
    }
    if (object.contains("text")) {  // last: some data has it beside the fields that it was made of
      if (text(object, "text", where).empty()) fail(where, "expected text in field 'text', found none");
      return {"", text(object, "text", where)};
    }
    std::string found;
    for (const auto& item : object.items()) found += (found.empty() ? "" : ", ") + printable(item.key(), 40);
    fail(where, "expected the fields prompt and response or completion, question and answer, instruction and output, messages, "
                "conversations, or text; found " +
                    (found.empty() ? "none" : printable(found, 400)));
  }

 private:
  static bool has(const Json& object, std::initializer_list<const char*> keys) {
    return std::all_of(keys.begin(), keys.end(), [&](const char* key) { return object.contains(key); });
  }

  Example pair(const Json& object, const char* prompt, const char* response, const std::string& where) const {
    Example example{text(object, prompt, where), ""};
    if (std::string_view(response) == "answer" && object[response].is_array()) {
      example.alternatives = texts(object, response, where);
      if (example.alternatives.empty()) fail(where, "expected answers in field 'answer', found an empty list");
      example.response = std::move(example.alternatives.front());
      example.alternatives.erase(example.alternatives.begin());
    } else {
      example.response = text(object, response, where);
    }
    if (example.prompt.empty()) fail(where, "expected text in field '" + std::string(prompt) + "', found none");
    return example;
  }

  ChatMessage turn(const Json& item, const std::string& place) const {
    const std::string& role = text(item, "role", place);
    if (role != "system" && role != "user" && role != "assistant")
      fail(place, "expected role system, user or assistant, found '" + printable(role) + "'");
    return {role, text(item, "content", place)};
  }

  ChatMessage share_gpt_turn(const Json& item, const std::string& place) const {
    const std::string& from = text(item, "from", place);
    if (from != "system" && from != "human" && from != "gpt")
      fail(place, "expected from system, human or gpt, found '" + printable(from) + "'");
    return {from == "human" ? "user" : from == "gpt" ? "assistant" : from, text(item, "value", place)};
  }

  Example conversation(const Json& list, const std::string& where) const {
    if (!list.is_array()) fail(where, "expected a list of messages, found " + std::string(list.type_name()));
    std::vector<ChatMessage> turns;
    std::size_t end = 0;  // one past the last assistant turn
    for (const auto& item : list) {
      const std::string place = where + ", message " + std::to_string(turns.size() + 1);
      if (!item.is_object()) fail(place, "expected an object, found " + std::string(item.type_name()));
      turns.push_back(item.contains("from") ? share_gpt_turn(item, place) : turn(item, place));
      if (turns.back().role == "assistant") end = turns.size();
    }
    if (end < 2 || turns[end - 2].role != "user") fail(where, "expected a turn of the user and the assistant's answer, found none");
    Example example{std::move(turns[end - 2].content), std::move(turns[end - 1].content)};
    if (example.prompt.empty()) fail(where, "expected text in the user's last turn, found none");
    turns.resize(end - 2);
    example.earlier = std::move(turns);
    return example;
  }
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
  const std::string text = detail::read_data(path);
  std::vector<Example> examples;
  const std::string extension = path.extension().string();
  if (extension == ".json" || extension == ".jsonl" || extension == ".ndjson") {
    detail::for_each_object(path.string(), text, extension == ".json",
                            [&](const Json& object, const std::string& where) { examples.push_back(reader.read(object, where)); });
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

/// The same with an example of its own, before that of the last, for each earlier answer to the user in a conversation: all that was said
/// before it is read again.
inline std::vector<Example> with_every_answer(const std::vector<Example>& examples) {
  std::vector<Example> all;
  for (const Example& example : examples) {
    const auto& turns = example.earlier;
    for (std::size_t i = 1; i < turns.size(); ++i)
      if (turns[i].role == "assistant" && turns[i - 1].role == "user" && !turns[i - 1].content.empty())
        all.push_back({turns[i - 1].content, turns[i].content, {turns.begin(), turns.begin() + static_cast<std::ptrdiff_t>(i) - 1}});
    all.push_back(example);
  }
  return all;
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
