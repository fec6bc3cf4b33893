// Cuts a text into the words that byte-pair encoding works on, as GPT-2's and SmolLM's pre-tokenizers do. By hand, over code
// points: std::regex knows no Unicode classes and recurses once per character.
#pragma once

#include <cstddef>
#include <string_view>
#include <utility>

#include <qdylora/model/unicode.hpp>

namespace qdylora {

enum class PreTokenizer {
  gpt2,    // GPT-2's pattern
  smollm,  // every \p{N} is a word of its own; what lies between them is cut by GPT-2's pattern
};

namespace detail {

/// End of the run of code points of class `wanted` that starts at `at`.
inline std::size_t run_end(std::string_view text, std::size_t at, CodePointClass wanted) noexcept {
  while (at < text.size()) {
    const DecodedCodePoint step = decode_utf8(text, at);
    if (classify(step.value) != wanted) break;
    at += step.length;
  }
  return at;
}

/// End of the word at `at` by GPT-2's pattern: 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
inline std::size_t gpt2_word_end(std::string_view text, std::size_t at) noexcept {
  const std::string_view rest = text.substr(at);
  if (rest.front() == '\'') {
    for (const std::string_view ending : {"'s", "'t", "'re", "'ve", "'m", "'ll", "'d"}) {
      if (rest.starts_with(ending)) return at + ending.size();
    }
  }
  // One leading space belongs to the word after it.
  const std::size_t begin = rest.front() == ' ' && rest.size() > 1 ? at + 1 : at;
  const CodePointClass kind = classify(decode_utf8(text, begin).value);
  if (kind != CodePointClass::space) return run_end(text, begin, kind);
  // White space: all of it at the end of the text, else all but its last code point, unless that is the only one.
  std::size_t last = at;
  for (std::size_t end = at;;) {
    if (end == text.size()) return end;
    const DecodedCodePoint step = decode_utf8(text, end);
    if (classify(step.value) != CodePointClass::space) return last == at ? end : last;
    last = std::exchange(end, end + step.length);
  }
}

/// Calls visit(begin, end) for every word of `text`, in order; the words join to the text. Linear time.
template <class Visit>
void for_each_word(std::string_view text, PreTokenizer pre_tokenizer, Visit&& visit) {
  for (std::size_t at = 0; at < text.size();) {
    std::size_t piece_end = text.size();
    if (pre_tokenizer == PreTokenizer::smollm) {
      const DecodedCodePoint first = decode_utf8(text, at);
      if (classify(first.value) == CodePointClass::number) {
        visit(at, at + first.length);
        at += first.length;
        continue;
      }
      for (piece_end = at; piece_end < text.size();) {
        const DecodedCodePoint step = decode_utf8(text, piece_end);
        if (classify(step.value) == CodePointClass::number) break;
        piece_end += step.length;
      }
    }
    const std::string_view piece = text.substr(0, piece_end);
    while (at < piece_end) {
      const std::size_t end = gpt2_word_end(piece, at);
      visit(at, end);
      at = end;
    }
  }
}

}  // namespace detail
}  // namespace qdylora
