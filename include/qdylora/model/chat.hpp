// The ChatML template (SmolLM2, Qwen2): every message is "<|im_start|>role\ncontent<|im_end|>\n"; where the first is no system message, a
// default one may go before it.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <qdylora/core/error.hpp>
#include <qdylora/model/tokenizer.hpp>

namespace qdylora {

struct ChatMessage {
  std::string role;  // "system", "user" or "assistant"
  std::string content;
};

/// What SmolLM2's own template says first.
inline constexpr std::string_view smollm_system_message = "You are a helpful AI assistant named SmolLM, trained by Hugging Face";

struct ChatOptions {
  bool generation_prompt = true;                    // end with the opening of the assistant's turn, for the model to go on
  std::string_view system = smollm_system_message;  // where a conversation brings none; "": none
};

namespace detail {

/// Calls start(), text(string), end() for the parts of a conversation, in order.
template <class Start, class Text, class End>
void walk_chat(std::span<const ChatMessage> messages, ChatOptions options, Start&& start, Text&& text, End&& end) {
  const auto message = [&](std::string_view role, std::string_view content) {
    start();
    text(std::string(role).append("\n").append(content));
    end();
    text("\n");
  };
  if (!messages.empty() && messages.front().role != "system" && !options.system.empty()) message("system", options.system);
  for (const ChatMessage& each : messages) message(each.role, each.content);
  if (options.generation_prompt) {
    start();
    text("assistant\n");
  }
}

}  // namespace detail

/// The text of a conversation. Contents are inserted as they are: a mark inside of one acts like any other mark.
inline std::string chat_text(std::span<const ChatMessage> messages, ChatOptions options = {}) {
  std::string chat;
  detail::walk_chat(
      messages, options, [&] { chat += "<|im_start|>"; }, [&](std::string_view part) { chat += part; }, [&] { chat += "<|im_end|>"; });
  return chat;
}

/// The token ids of a conversation: those of chat_text, except that a mark inside of a content is ordinary text and ends no turn.
/// Errors: unsupported where the vocabulary lacks the marks, or a byte of a content.
inline std::vector<std::int32_t> encode_chat(const Tokenizer& tokenizer, std::span<const ChatMessage> messages, ChatOptions options = {}) {
  const auto mark = [&](std::string_view name) {
    const auto id = tokenizer.id(name);
    QDYLORA_EXPECTS(id && tokenizer.is_control(*id), unsupported,
                    "chat template: expected control token '" + std::string(name) + "' in the vocabulary, found none");
    return *id;
  };
  const std::int32_t start = mark("<|im_start|>");
  const std::int32_t end = mark("<|im_end|>");
  std::vector<std::int32_t> ids;
  detail::walk_chat(
      messages, options, [&] { ids.push_back(start); },
      [&](std::string_view part) {
        const auto part_ids = tokenizer.encode(part, {.parse_special = false, .follows = Follows::special});
        ids.insert(ids.end(), part_ids.begin(), part_ids.end());
      },
      [&] { ids.push_back(end); });
  return ids;
}

}  // namespace qdylora
