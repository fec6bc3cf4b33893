// How SentencePiece vocabularies (Kudo and Richardson 2018; those of Llama 2 and Mistral) write text: a space is U+2581, a byte of a
// character that has no token is a token "<0xE2>", and a text may get a space in front.
#pragma once

#include <charconv>
#include <optional>
#include <string>
#include <string_view>

namespace qdylora {

/// Which texts get a space in front. Special tokens cut a sequence into texts.
enum class SpacePrefix {
  none,
  all,                       // every text, whatever it starts with (the normalizer Prepend, llama.cpp)
  all_without_space,         // every text that does not start with one (Metaspace, "always")
  beginning_without_space,   // the one a sequence begins with, unless it starts with a space (Metaspace, "first")
};

namespace detail {

inline constexpr std::string_view space_mark = "\u2581";

/// `text` with each `from` replaced.
inline std::string replaced(std::string_view text, std::string_view from, std::string_view to) {
  std::string result;
  for (std::size_t at = 0;;) {
    const std::size_t found = text.find(from, at);
    result += text.substr(at, found - at);
    if (found == text.npos) return result;
    result += to;
    at = found + from.size();
  }
}

/// A text as the vocabulary writes it; `begins`: nothing goes before it.
inline std::string mark_spaces(std::string_view text, SpacePrefix prefix, bool begins) {
  std::string marked = replaced(text, " ", space_mark);
  const bool wants = prefix == SpacePrefix::all || (!marked.starts_with(space_mark) && (prefix == SpacePrefix::all_without_space ||
                                                                                        (prefix == SpacePrefix::beginning_without_space && begins)));
  if (wants && !text.empty()) marked.insert(0, space_mark);
  return marked;
}

/// The name of a byte's token: "<0x00>" to "<0xFF>".
inline std::string byte_token_name(unsigned char byte) {
  constexpr std::string_view digits = "0123456789ABCDEF";
  return {'<', '0', 'x', digits[byte >> 4], digits[byte & 15], '>'};
}

/// The byte of a token so named.
inline std::optional<unsigned char> byte_of_token(std::string_view name) {
  if (name.size() != 6 || !name.starts_with("<0x")) return std::nullopt;
  unsigned byte = 0;
  std::from_chars(name.data() + 3, name.data() + 5, byte, 16);
  return byte_token_name(static_cast<unsigned char>(byte)) == name ? std::optional(static_cast<unsigned char>(byte)) : std::nullopt;
}

}  // namespace detail
}  // namespace qdylora
