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
  all,                      // every text, whatever it starts with (the normalizer Prepend, llama.cpp)
  all_without_space,        // every text that does not start with one (Metaspace, "always")
  beginning_without_space,  // the one a sequence begins with, unless it starts with a space (Metaspace, "first")
};

/// What goes before a text.
enum class Follows {
  nothing,
  special,  // a special token
  text,     // text, encoded on its own: there is no space in front
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

/// A text as the vocabulary writes it.
inline std::string mark_spaces(std::string_view text, SpacePrefix prefix, Follows follows) {
  std::string marked = replaced(text, " ", space_mark);
  if (marked.empty() || prefix == SpacePrefix::none || follows == Follows::text) return marked;
  if (prefix == SpacePrefix::beginning_without_space && follows != Follows::nothing) return marked;
  if (prefix == SpacePrefix::all || !marked.starts_with(space_mark)) marked.insert(0, space_mark);
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
