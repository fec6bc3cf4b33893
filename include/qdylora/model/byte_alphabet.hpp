// The alphabet in which byte-level vocabularies write bytes, one printable code point each: 33..126, 161..172 and 174..255 as themselves,
// the other 68 in their order as 256, 257, ... (so a space is U+0120). As GPT-2 defined it (Radford et al. 2019).
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include <qdylora/model/unicode.hpp>

namespace qdylora::detail {

inline constexpr std::size_t byte_alphabet_end = 256 + 68;

/// The code point that stands for each byte.
inline constexpr std::array<char32_t, 256> byte_alphabet = [] {
  std::array<char32_t, 256> letters{};
  char32_t next = 256;
  for (char32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
    letters[byte] = printable ? byte : next++;
  }
  return letters;
}();

/// The inverse: byte of a code point < byte_alphabet_end, -1 where there is none.
inline constexpr std::array<std::int16_t, byte_alphabet_end> alphabet_byte = [] {
  std::array<std::int16_t, byte_alphabet_end> bytes{};
  bytes.fill(-1);
  for (std::size_t byte = 0; byte < 256; ++byte) bytes[byte_alphabet[byte]] = static_cast<std::int16_t>(byte);
  return bytes;
}();

/// Bytes in the alphabet's letters.
inline std::string to_alphabet(std::string_view bytes) {
  std::string letters;
  for (const char byte : bytes) append_utf8(letters, byte_alphabet[static_cast<unsigned char>(byte)]);
  return letters;
}

/// The bytes that letters stand for; no value where one is not of the alphabet.
inline std::optional<std::string> from_alphabet(std::string_view letters) {
  std::string bytes;
  for (std::size_t at = 0; at < letters.size();) {
    const DecodedCodePoint step = decode_utf8(letters, at);
    const int byte = step.value < byte_alphabet_end ? alphabet_byte[step.value] : -1;
    if (byte < 0) return std::nullopt;
    bytes += static_cast<char>(static_cast<unsigned char>(byte));
    at += step.length;
  }
  return bytes;
}

}  // namespace qdylora::detail
