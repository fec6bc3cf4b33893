// Corpus BLEU (Papineni et al. 2002) as sacrebleu has it by default (Post 2018): words of mteval-v13a, case as it is, n-grams of up to four
// words, exponential smoothing, the brevity penalty of the closest reference.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdlib>
#include <map>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/core/error.hpp>
#include <qdylora/core/scalar.hpp>
#include <qdylora/model/sentencepiece.hpp>
#include <qdylora/model/unicode.hpp>

namespace qdylora {

/// What BLEU counts in a hypothesis; in a corpus, the sums.
struct BleuCounts {
  static constexpr std::size_t orders = 4;
  std::array<Index, orders> matched{};  // n-grams of n + 1 words that a reference has, each at most as often as one of them has it
  std::array<Index, orders> total{};    // n-grams of the hypothesis
  Index hypothesis_words = 0;
  Index reference_words = 0;  // of the reference whose length is closest to the hypothesis'; of two as close, the shorter

  BleuCounts& operator+=(const BleuCounts& other) noexcept {
    for (std::size_t n = 0; n < orders; ++n) {
      matched[n] += other.matched[n];
      total[n] += other.total[n];
    }
    hypothesis_words += other.hypothesis_words;
    reference_words += other.reference_words;
    return *this;
  }
  bool operator==(const BleuCounts&) const = default;
};

struct Bleu : BleuCounts {
  double score = 0.0;                       // 0 ... 100
  std::array<double, orders> precisions{};  // of n-grams of n + 1 words, smoothed, in percent
  double brevity_penalty = 0.0;
};

namespace detail {

/// f(begin, end) for each word, in bytes.
template <class F>
void for_each_word(std::string_view text, F&& f) {
  std::size_t begin = 0;
  for (std::size_t at = 0; at < text.size();) {
    const auto [value, length] = decode_utf8(text, at);
    if (is_python_space(value)) {
      if (at > begin) f(begin, at);
      begin = at + length;
    }
    at += length;
  }
  if (text.size() > begin) f(begin, text.size());
}

/// Walks a text from left to right. Where two(a, b) holds of neighbouring bytes, write(a, b) is put for both and the walk goes on behind
/// them.
template <class Two, class Write>
std::string rewrite_pairs(std::string_view text, Two&& two, Write&& write) {
  std::string result;
  for (std::size_t i = 0; i < text.size();) {
    if (i + 1 < text.size() && two(text[i], text[i + 1])) {
      result += write(text[i], text[i + 1]);
      i += 2;
    } else {
      result += text[i++];
    }
  }
  return result;
}

}  // namespace detail

/// The words of a text as mteval-v13a separates them: ASCII punctuation but ' and - stands alone, a period or comma where no digits are on
/// both sides, a dash after a digit; four entities of HTML are read. Bytes that are no UTF-8 belong to words.
inline std::vector<std::string> tokenize_13a(std::string_view input) {
  std::size_t end = 0;  // spaces at the end go first: a line feed behind a dash there is no break of a word
  detail::for_each_word(input, [&](std::size_t, std::size_t word_end) { end = word_end; });
  std::string text(input.substr(0, end));
  for (const auto& [from, to] : {std::pair<std::string_view, std::string_view>{"<skipped>", ""},
                                 {"-\n", ""},
                                 {"\n", " "},
                                 {"&quot;", "\""},
                                 {"&amp;", "&"},
                                 {"&lt;", "<"},
                                 {"&gt;", ">"}})
    text = detail::replaced(text, from, to);
  const auto digit = [](char c) { return c >= '0' && c <= '9'; };
  const auto point = [](char c) { return c == '.' || c == ','; };
  std::string separate = " ";
  for (const char c : text) {
    const bool alone =
        c > 0x20 && c < 0x7F && !digit(c) && !(c >= 'a' && c <= 'z') && !(c >= 'A' && c <= 'Z') && !point(c) && c != '\'' && c != '-';
    if (alone) separate += ' ';
    separate += c;
    if (alone) separate += ' ';
  }
  separate += ' ';
  separate = detail::rewrite_pairs(
      separate, [&](char a, char b) { return !digit(a) && point(b); },
      [](char a, char b) {
        return std::string{a, ' ', b, ' '};
      });
  separate = detail::rewrite_pairs(
      separate, [&](char a, char b) { return point(a) && !digit(b); },
      [](char a, char b) {
        return std::string{' ', a, ' ', b};
      });
  separate = detail::rewrite_pairs(
      separate, [&](char a, char b) { return digit(a) && b == '-'; },
      [](char a, char b) {
        return std::string{a, ' ', b, ' '};
      });
  std::vector<std::string> words;
  detail::for_each_word(separate, [&](std::size_t begin, std::size_t stop) { words.push_back(separate.substr(begin, stop - begin)); });
  return words;
}

/// What BLEU counts in a hypothesis beside its references, at least one. Errors: bad_argument.
inline BleuCounts bleu_counts(std::string_view hypothesis, std::span<const std::string> references) {
  QDYLORA_EXPECTS(!references.empty(), bad_argument, "bleu_counts: the hypothesis has no reference");
  using Grams = std::map<std::vector<std::string>, Index>;
  const auto count = [](const std::vector<std::string>& words, Grams& grams) {
    for (std::size_t n = 1; n <= BleuCounts::orders; ++n)
      for (std::size_t i = 0; i + n <= words.size(); ++i)
        ++grams[{words.begin() + static_cast<std::ptrdiff_t>(i), words.begin() + static_cast<std::ptrdiff_t>(i + n)}];
  };
  const auto words = tokenize_13a(hypothesis);
  const auto length = static_cast<Index>(words.size());
  Grams own, allowed;
  count(words, own);
  Index closest = -1;
  for (const auto& reference : references) {
    const auto reference_words = tokenize_13a(reference);
    const auto reference_length = static_cast<Index>(reference_words.size());
    const Index distance = std::abs(length - reference_length), least = std::abs(length - closest);
    if (closest < 0 || distance < least || (distance == least && reference_length < closest)) closest = reference_length;
    Grams grams;
    count(reference_words, grams);
    for (const auto& [gram, times] : grams) {
      auto& most = allowed[gram];
      most = std::max(most, times);
    }
  }
  BleuCounts counts;
  counts.hypothesis_words = length;
  counts.reference_words = closest;
  for (const auto& [gram, times] : own) {
    counts.total[gram.size() - 1] += times;
    if (const auto found = allowed.find(gram); found != allowed.end()) counts.matched[gram.size() - 1] += std::min(times, found->second);
  }
  return counts;
}

/// BLEU of the sums over a corpus. One without n-grams of some order that it has matches of lower orders for has score 0, as has one
/// without matches.
inline Bleu bleu_of(const BleuCounts& corpus) {
  Bleu bleu{corpus};
  bleu.brevity_penalty = 1.0;
  if (bleu.hypothesis_words < bleu.reference_words)
    bleu.brevity_penalty = bleu.hypothesis_words == 0
                               ? 0.0
                               : std::exp(1.0 - static_cast<double>(bleu.reference_words) / static_cast<double>(bleu.hypothesis_words));
  if (bleu.matched[0] == 0) return bleu;  // then no longer n-gram matches
  double logs = 0.0, smooth = 1.0;
  for (std::size_t n = 0; n < Bleu::orders; ++n) {
    if (bleu.total[n] == 0) return bleu;  // no precision, of which the logarithm is -infinity
    const auto total = static_cast<double>(bleu.total[n]);
    if (bleu.matched[n] == 0) smooth *= 2.0;
    bleu.precisions[n] = bleu.matched[n] == 0 ? 100.0 / (smooth * total) : 100.0 * static_cast<double>(bleu.matched[n]) / total;
    logs += std::log(bleu.precisions[n]);
  }
  bleu.score = bleu.brevity_penalty * std::exp(logs / static_cast<double>(Bleu::orders));
  return bleu;
}

/// What BLEU counts in each of a corpus' hypotheses: hypotheses[i] against references[i], one or more of each. Errors: bad_argument (sizes
/// that differ, nothing to score, no reference).
inline std::vector<BleuCounts> corpus_counts(std::span<const std::string> hypotheses,
                                             std::span<const std::vector<std::string>> references) {
  QDYLORA_EXPECTS(!hypotheses.empty() && hypotheses.size() == references.size(), bad_argument,
                  "BLEU: expected references for each hypothesis, found " + std::to_string(hypotheses.size()) + " hypotheses and " +
                      std::to_string(references.size()) + " lists of references");
  std::vector<BleuCounts> counts;
  for (std::size_t i = 0; i < hypotheses.size(); ++i) {
    QDYLORA_EXPECTS(!references[i].empty(), bad_argument, "BLEU: hypothesis " + std::to_string(i) + " has no reference");
    counts.push_back(bleu_counts(hypotheses[i], references[i]));
  }
  return counts;
}

/// BLEU of the sums of some counts.
inline Bleu corpus_bleu(std::span<const BleuCounts> counts) {
  BleuCounts sums;
  for (const auto& each : counts) sums += each;
  return bleu_of(sums);
}

/// BLEU of a corpus. Errors: those of corpus_counts.
inline Bleu corpus_bleu(std::span<const std::string> hypotheses, std::span<const std::vector<std::string>> references) {
  return corpus_bleu(corpus_counts(hypotheses, references));
}

}  // namespace qdylora
