// Cuts a text into the words that byte-pair encoding works on, as the pre-tokenizers of GPT-2, SmolLM, Llama 3, Qwen2, Falcon and
// SentencePiece do. By hand, over code points: std::regex knows no Unicode classes and recurses once per character.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string_view>
#include <utility>

#include <qdylora/model/byte_alphabet.hpp>
#include <qdylora/model/sentencepiece.hpp>
#include <qdylora/model/unicode.hpp>

namespace qdylora {

enum class PreTokenizer {
  gpt2,    // GPT-2's pattern
  smollm,  // every \p{N} is a word of its own; what lies between them is cut by GPT-2's pattern
  llama3,  // Llama 3's pattern: a word takes one mark before it, digits go by three
  qwen2,   // the same, but every \p{N} is a word of its own
  falcon,  // punctuation apart, then GPT-2's pattern, then digits by three
  none,       // the text is one word (SentencePiece)
  metaspace,  // a word begins at every mark of a space (SentencePiece)
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

/// Bytes of the ending of a contraction that `rest`, which follows an apostrophe, starts with, in any case; 0: none. By Unicode's case
/// folding the long s is an s.
inline std::size_t contraction(std::string_view rest) noexcept {
  const auto is = [&](std::size_t i, char lower) { return i < rest.size() && (rest[i] | 0x20) == lower; };
  for (const char letter : {'s', 't', 'm', 'd'})
    if (is(0, letter)) return 1;
  if (rest.starts_with("\u017F")) return 2;
  return (is(0, 'r') && is(1, 'e')) || (is(0, 'v') && is(1, 'e')) || (is(0, 'l') && is(1, 'l')) ? 2 : 0;
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

/// End of the word at `at` by Llama 3's pattern, of `digits` numerals at most:
///   (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,digits}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
inline std::size_t llama3_word_end(std::string_view text, std::size_t at, int digits) noexcept {
  const auto is_break = [&](std::size_t i) { return i < text.size() && (text[i] == '\r' || text[i] == '\n'); };
  const DecodedCodePoint first = decode_utf8(text, at);
  if (first.value == U'\'') {
    if (const std::size_t length = contraction(text.substr(at + 1)); length > 0) return at + 1 + length;
  }
  CodePointClass kind = classify(first.value);
  if (kind == CodePointClass::letter) return run_end(text, at, kind);
  if (kind == CodePointClass::number) {
    std::size_t end = at;
    for (int count = 0; count < digits && end < text.size(); ++count) {
      const DecodedCodePoint step = decode_utf8(text, end);
      if (classify(step.value) != CodePointClass::number) break;
      end += step.length;
    }
    return end;
  }
  std::size_t begin = at;  // of what follows a mark or a space that it takes along
  if (at + first.length < text.size()) {
    const CodePointClass next = classify(decode_utf8(text, at + first.length).value);
    if (next == CodePointClass::letter && !is_break(at)) return run_end(text, at + first.length, next);
    if (next == CodePointClass::other && first.value == U' ') begin = at + first.length, kind = next;
  }
  if (kind == CodePointClass::other) {
    std::size_t end = run_end(text, begin, kind);
    while (is_break(end)) ++end;
    return end;
  }
  // White space: up to its last line break; without one, all of it at the end of the text, else all but its last code point.
  std::size_t last = at, past_break = at, end = at;
  while (end < text.size()) {
    const DecodedCodePoint step = decode_utf8(text, end);
    if (classify(step.value) != CodePointClass::space) break;
    last = std::exchange(end, end + step.length);
    if (is_break(last)) past_break = end;
  }
  if (past_break > at) return past_break;
  return end == text.size() || last == at ? end : last;
}

/// End of the run, of punctuation or of none, that starts at `at`.
inline std::size_t punctuation_run_end(std::string_view text, std::size_t at) noexcept {
  DecodedCodePoint step = decode_utf8(text, at);
  const bool kind = is_punctuation(step.value);
  do at += step.length;
  while (at < text.size() && is_punctuation((step = decode_utf8(text, at)).value) == kind);
  return at;
}

/// End of the word at `at` by the last two steps of Falcon's: runs of \p{N} are apart, and of those [0-9][0-9][0-9]. Bytes are letters of
/// the byte alphabet by then, six of which are numerals wherever they stand: those of U+00B2, B3, B9, BC, BD and BE.
inline std::size_t falcon_digits_end(std::string_view text, std::size_t at) noexcept {
  const auto is_digit = [&](std::size_t i) { return i < text.size() && text[i] >= '0' && text[i] <= '9'; };
  const auto is_number = [&](std::size_t i) {
    return classify(byte_alphabet[static_cast<unsigned char>(text[i])]) == CodePointClass::number;
  };
  const auto three = [&](std::size_t i) { return is_digit(i) && is_digit(i + 1) && is_digit(i + 2); };
  if (three(at)) return at + 3;
  const bool kind = is_number(at);
  do ++at;
  while (at < text.size() && is_number(at) == kind && !three(at));
  return at;
}

/// Calls visit(begin, end) for every word of `text`, in order; the words join to the text. Linear time.
template <class Visit>
void for_each_word(std::string_view text, PreTokenizer pre_tokenizer, Visit&& visit) {
  if (pre_tokenizer == PreTokenizer::none || pre_tokenizer == PreTokenizer::metaspace) {
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t next = pre_tokenizer == PreTokenizer::metaspace ? text.find(space_mark, at + 1) : text.npos;
      const std::size_t end = std::min(next, text.size());
      visit(at, end);
      at = end;
    }
    return;
  }
  if (pre_tokenizer == PreTokenizer::falcon) {
    for (std::size_t at = 0; at < text.size();) {
      const std::string_view piece = text.substr(0, punctuation_run_end(text, at));
      while (at < piece.size()) {
        const std::string_view word = piece.substr(0, gpt2_word_end(piece, at));
        while (at < word.size()) {
          const std::size_t end = falcon_digits_end(word, at);
          visit(at, end);
          at = end;
        }
      }
    }
    return;
  }
  if (pre_tokenizer == PreTokenizer::llama3 || pre_tokenizer == PreTokenizer::qwen2) {
    const int digits = pre_tokenizer == PreTokenizer::llama3 ? 3 : 1;
    for (std::size_t at = 0; at < text.size();) {
      const std::size_t end = llama3_word_end(text, at, digits);
      visit(at, end);
      at = end;
    }
    return;
  }
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
