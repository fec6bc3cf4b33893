// The tokens that a tokenizer looks for in a text, literally, before it cuts what lies between them into words.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace qdylora::detail {

class SpecialTokens {
 public:
  /// `pattern` is not empty.
  void add(std::string pattern, std::int32_t id, bool control) {
    auto& list = lists_[static_cast<unsigned char>(pattern.front())];
    list.push_back({std::move(pattern), id, control});
  }
  /// Once all are added: of those that start at one place the longest is found.
  void sort() {
    for (auto& list : lists_) {
      std::sort(list.begin(), list.end(), [](const Token& a, const Token& b) { return a.pattern.size() > b.pattern.size(); });
    }
  }

  /// Cuts a text at its special tokens, from the left: calls text(begin, end) for what lies before, between and after them, empty or not,
  /// and special(id), in order. parse_control: false passes control tokens over.
  template <class Text, class Special>
  void split(std::string_view whole, bool parse_control, Text&& text, Special&& special) const {
    std::size_t plain = 0;  // start of the text that was not passed on yet
    for (std::size_t at = 0; at < whole.size();) {
      const Token* token = find(whole, at, parse_control);
      if (token == nullptr) {
        ++at;
        continue;
      }
      text(plain, at);
      special(token->id);
      plain = at += token->pattern.size();
    }
    text(plain, whole.size());
  }

 private:
  struct Token {
    std::string pattern;
    std::int32_t id;
    bool control;
  };

  const Token* find(std::string_view text, std::size_t at, bool parse_control) const noexcept {
    for (const Token& token : lists_[static_cast<unsigned char>(text[at])])
      if ((parse_control || !token.control) && text.substr(at).starts_with(token.pattern)) return &token;
    return nullptr;
  }

  std::array<std::vector<Token>, 256> lists_;  // by first byte
};

}  // namespace qdylora::detail
