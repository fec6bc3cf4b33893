// Conversations as text and as token ids. A model was tuned on one way to write them, its chat template; <qdylora/model/chat_templates.hpp>
// has those that the library knows, and recognizes a model's own.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/core/error.hpp>
#include <qdylora/model/tokenizer.hpp>
#include <qdylora/model/unicode.hpp>

namespace qdylora {

struct ChatMessage {
  std::string role;  // "system", "user" or "assistant"
  std::string content;
  bool operator==(const ChatMessage&) const = default;
};

/// Where a conversation's system message goes: a turn of its own; into the first or the last turn of the user; nowhere.
enum class SystemPlace { turn, first_user, last_user, none };

/// How conversations are written. In `start`, `before`, `after`, `ask` and `lead` a name in braces is a control token: {bos} and {eos} are
/// the tokenizer's, {?NAME} is the control token NAME where the vocabulary has it and this text where it has not.
struct ChatTemplate {
  struct Turn {
    std::string before, after;
    bool trims = false;  // white space around the content is left out
  };

  std::string name;
  std::string start;  // before the first turn
  Turn system, user;
  std::string ask;     // after a turn of the user: the model is to answer; a turn of the assistant begins with it
  std::string lead;    // then, before what the assistant says
  std::string after;   // and after it
  bool trims = false;  // of the assistant
  SystemPlace system_place = SystemPlace::turn;
  bool alternates = false;                                         // user and assistant take turns, after one system message at most
  std::vector<std::pair<std::string, std::string>> replaces = {};  // in the contents of user and assistant, one after the other
  std::string preamble = {};        // what a system turn at the beginning says first; such a turn is there in any case then
  std::string system_message = {};  // where a conversation brings none; "": none
};

struct ChatOptions {
  bool generation_prompt = true;               // end with `ask`, for the model to go on
  std::string_view bos = "<s>", eos = "</s>";  // as chat_text writes them
};

namespace detail {

/// Python's str.strip, which templates call by that name or as trim.
inline std::string_view stripped(std::string_view text) {
  std::size_t begin = text.size(), end = 0;
  for (std::size_t at = 0; at < text.size();) {
    const auto [value, length] = decode_utf8(text, at);
    if (!is_python_space(value)) {
      if (end == 0) begin = at;
      end = at + length;
    }
    at += length;
  }
  return end == 0 ? std::string_view() : text.substr(begin, end - begin);
}

/// Calls text(string) and mark(name) for the parts of one of a template's strings, in order. Errors: bad_argument (a brace without an end).
template <class Text, class Mark>
void walk_pattern(std::string_view pattern, Text&& text, Mark&& mark) {
  while (!pattern.empty()) {
    const std::size_t open = pattern.find('{');
    if (open > 0) text(pattern.substr(0, open));
    if (open == pattern.npos) return;
    const std::size_t close = pattern.find('}', open);
    QDYLORA_EXPECTS(close != pattern.npos, bad_argument,
                    "chat template: expected '}' after '" + printable(pattern.substr(open), 40) + "', found none");
    mark(pattern.substr(open + 1, close - open - 1));
    pattern.remove_prefix(close + 1);
  }
}

inline std::string chat_content(const ChatTemplate& chat, std::string_view content, bool trims) {
  if (trims) content = stripped(content);
  std::string result(content);
  for (const auto& [from, to] : chat.replaces) result = replaced(result, from, to);
  return result;
}

/// Calls text(string) and mark(name) for the parts of a conversation, in order. Errors: bad_argument.
template <class Text, class Mark>
void walk_chat(const ChatTemplate& chat, std::span<const ChatMessage> messages, bool generation_prompt, Text&& text, Mark&& mark) {
  const auto pattern = [&](std::string_view part) { walk_pattern(part, text, mark); };
  const auto fail = [&](const std::string& problem) { throw Error(Errc::bad_argument, "chat template " + chat.name + ": " + problem); };
  pattern(chat.start);
  const bool own = !messages.empty() && messages.front().role == "system";
  std::string system(own ? std::string_view(messages.front().content) : messages.empty() ? "" : std::string_view(chat.system_message));
  if (chat.system.trims) system = std::string(stripped(system));
  if (own && chat.system_place == SystemPlace::none) fail("has no place for a system message");
  const bool given = own || !system.empty();
  if (chat.system_place == SystemPlace::turn && (given || !chat.preamble.empty())) {
    pattern(chat.system.before);
    text(chat.preamble + system);
    pattern(chat.system.after);
  }
  const auto turns = messages.subspan(own ? 1 : 0);
  std::size_t holds_system = turns.size();  // the user's turn that does
  for (std::size_t i = 0; i < turns.size() && given; ++i) {
    if (turns[i].role != "user") continue;
    if (chat.system_place == SystemPlace::last_user || (chat.system_place == SystemPlace::first_user && holds_system == turns.size()))
      holds_system = i;
  }
  for (std::size_t i = 0; i < turns.size(); ++i) {
    const auto& [role, content] = turns[i];
    if (chat.alternates && role != (i % 2 == 0 ? "user" : "assistant"))
      fail("expected turns of user and assistant by turns, after one system message at most; found '" + printable(role, 32) + "' as turn " +
           std::to_string(i + 1));
    if (role == "assistant") {
      pattern(chat.ask);
      pattern(chat.lead);
      text(chat_content(chat, content, chat.trims));
      pattern(chat.after);
    } else if (role == "user") {
      pattern(chat.user.before);
      std::string whole = content;
      if (i == holds_system) {
        whole = chat.system.before;
        whole += system + chat.system.after + content;
      }
      text(chat_content(chat, whole, chat.user.trims));
      pattern(chat.user.after);
    } else if (role == "system" && chat.system_place == SystemPlace::turn) {
      pattern(chat.system.before);
      text(chat.system.trims ? stripped(content) : std::string_view(content));
      pattern(chat.system.after);
    } else {
      fail("expected role user or assistant, found '" + printable(role, 32) + "' as turn " + std::to_string(i + 1));
    }
  }
  if (generation_prompt) pattern(chat.ask);
}

/// The name of a mark without the sign that it may be text.
inline std::string_view mark_name(std::string_view mark) { return mark.starts_with('?') ? mark.substr(1) : mark; }

/// The token of a mark; -1: it is text. Errors: unsupported.
inline std::int32_t mark_id(const Tokenizer& tokenizer, std::string_view mark) {
  if (mark == "bos" || mark == "eos") {
    const std::int32_t id = mark == "bos" ? tokenizer.bos() : tokenizer.eos();
    QDYLORA_EXPECTS(id >= 0, unsupported, "chat template: expected a token '" + std::string(mark) + "' of the tokenizer, found none");
    return id;
  }
  const auto id = tokenizer.id(mark_name(mark));
  if (id && tokenizer.is_control(*id)) return *id;
  QDYLORA_EXPECTS(mark.starts_with('?'), unsupported,
                  "chat template: expected control token '" + std::string(mark) + "' in the vocabulary, found none");
  return -1;
}

/// Puts marks and what lies between them together to token ids. Text is never read as a control token.
class ChatIds {
 public:
  ChatIds(const Tokenizer& tokenizer, Follows follows) : tokenizer_(&tokenizer), follows_(follows) {}

  void text(std::string_view part) { text_ += part; }
  void mark(std::string_view name) {
    const std::int32_t id = mark_id(*tokenizer_, name);
    if (id < 0) return text(mark_name(name));
    special(id);
  }
  void special(std::int32_t id) {
    flush();
    ids_.push_back(id);
    follows_ = Follows::special;
  }
  std::vector<std::int32_t> finish() {
    flush();
    return std::move(ids_);
  }

 private:
  void flush() {
    if (text_.empty()) return;
    const auto ids = tokenizer_->encode(text_, {.parse_special = false, .follows = follows_});
    ids_.insert(ids_.end(), ids.begin(), ids.end());
    text_.clear();
    follows_ = Follows::text;
  }

  const Tokenizer* tokenizer_;
  Follows follows_;
  std::string text_;
  std::vector<std::int32_t> ids_;
};

}  // namespace detail

/// The text of a conversation, as the model's own template writes it. Contents are inserted as they are: a mark inside of one acts like any
/// other mark. Errors: bad_argument (a role, or an order of roles, that the template has no place for).
inline std::string chat_text(const ChatTemplate& chat, std::span<const ChatMessage> messages, ChatOptions options = {}) {
  std::string result;
  detail::walk_chat(
      chat, messages, options.generation_prompt, [&](std::string_view part) { result += part; },
      [&](std::string_view mark) { result += mark == "bos"   ? options.bos
                                             : mark == "eos" ? options.eos
                                                             : detail::mark_name(mark); });
  return result;
}

/// The token ids of a conversation: those of chat_text, except that a control token's name inside of a content is ordinary text, and ends no
/// turn. (Where a template's marks are text themselves, as Llama 2's [INST] and Falcon's "User:", a content can say the same.) A tokenizer
/// that adds bos gets it in front where the template does not have it.
/// Errors: as chat_text; unsupported where the vocabulary lacks the marks, or a byte of a content.
inline std::vector<std::int32_t> encode_chat(const Tokenizer& tokenizer, const ChatTemplate& chat, std::span<const ChatMessage> messages,
                                             bool generation_prompt = true) {
  detail::ChatIds ids(tokenizer, Follows::nothing);
  if (tokenizer.adds_bos() && (chat.start + chat.user.before).find("{bos}") == std::string::npos) ids.special(tokenizer.bos());
  detail::walk_chat(
      chat, messages, generation_prompt, [&](std::string_view part) { ids.text(part); }, [&](std::string_view mark) { ids.mark(mark); });
  return ids.finish();
}

/// What ends an answer: the first control token after it, or the tokenizer's end where the template has none. Errors: unsupported.
inline std::int32_t chat_end(const Tokenizer& tokenizer, const ChatTemplate& chat) {
  std::int32_t end = -1;
  detail::walk_pattern(
      chat.after, [](std::string_view) {},
      [&](std::string_view mark) {
        if (end < 0) end = detail::mark_id(tokenizer, mark);
      });
  return end >= 0 ? end : detail::mark_id(tokenizer, "eos");
}

namespace detail {

/// What an answer is from the template's `lead` to its last letter.
inline ChatIds open_answer(const Tokenizer& tokenizer, const ChatTemplate& chat, std::span<const std::int32_t> prompt,
                           std::string_view content) {
  const Follows follows = prompt.empty() ? Follows::nothing : tokenizer.is_control(prompt.back()) ? Follows::special : Follows::text;
  ChatIds ids(tokenizer, follows);
  walk_pattern(
      chat.lead, [&](std::string_view part) { ids.text(part); }, [&](std::string_view mark) { ids.mark(mark); });
  ids.text(chat_content(chat, content, chat.trims));
  return ids;
}

}  // namespace detail

/// The ids of an answer to a conversation whose ids, with the generation prompt, are `prompt`; with the token that ends it.
/// Errors: unsupported.
inline std::vector<std::int32_t> encode_answer(const Tokenizer& tokenizer, const ChatTemplate& chat, std::span<const std::int32_t> prompt,
                                               std::string_view content) {
  auto ids = detail::open_answer(tokenizer, chat, prompt, content);
  ids.text(std::string_view(chat.after).substr(0, chat.after.find('{')));
  ids.special(chat_end(tokenizer, chat));
  return ids.finish();
}

/// The same of an answer that may go on: without what ends it.
inline std::vector<std::int32_t> encode_answer_start(const Tokenizer& tokenizer, const ChatTemplate& chat,
                                                     std::span<const std::int32_t> prompt, std::string_view content) {
  return detail::open_answer(tokenizer, chat, prompt, content).finish();
}

}  // namespace qdylora
