// An example to learn from, and the comparison of answers by their final number, as GSM8K is scored.
#pragma once

#include <algorithm>
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include <qdylora/model/chat.hpp>

namespace qdylora::examples {

struct Example {
  std::string prompt;                          // empty: `response` is running text, not an answer
  std::string response;                        // what the model learns to write
  std::vector<ChatMessage> earlier = {};       // turns of the conversation before the prompt
  std::vector<std::string> alternatives = {};  // other responses that are as right

  /// All right responses, the one that is learned first.
  std::vector<std::string> references() const {
    std::vector<std::string> all{response};
    all.insert(all.end(), alternatives.begin(), alternatives.end());
    return all;
  }
};

namespace detail {

inline bool is_digit(char c) noexcept { return c >= '0' && c <= '9'; }

/// A number written out: digits with commas between them, an optional sign and decimals. `begin` is its first digit; moves past it.
inline std::string read_number(std::string_view text, std::size_t& begin) {
  std::string number;
  const bool negative = begin > 0 && text[begin - 1] == '-' && (begin == 1 || !is_digit(text[begin - 2]));  // "5-3" is no -3
  const auto digit_at = [&](std::size_t i) { return i < text.size() && is_digit(text[i]); };
  const auto more = [&](char mark) { return begin < text.size() && text[begin] == mark && digit_at(begin + 1); };
  const auto digits = [&] {
    while (digit_at(begin)) number += text[begin++];
  };
  for (digits(); more(',');) ++begin, digits();
  if (more('.')) {
    number += text[begin++];
    digits();
    while (number.back() == '0') number.pop_back();
    if (number.back() == '.') number.pop_back();
  }
  return negative ? "-" + number : number;
}

inline std::string_view trim(std::string_view text) noexcept {
  constexpr std::string_view blank = " \t\r\n";
  const std::size_t begin = text.find_first_not_of(blank);
  return begin == text.npos ? std::string_view{} : text.substr(begin, text.find_last_not_of(blank) - begin + 1);
}

}  // namespace detail

/// The final number of a worked answer: the one on the line of the first "####", else the last of the text; "" if there is none.
/// Commas and zeros at the end of decimals are dropped: "#### 1,200.50" gives "1200.5".
inline std::string final_answer(std::string_view text) {
  if (const std::size_t mark = text.find("####"); mark != text.npos) {
    const std::string_view line = text.substr(0, text.find('\n', mark));
    if (std::size_t digit = line.find_first_of("0123456789", mark); digit != line.npos) return detail::read_number(line, digit);
  }
  std::string last;
  for (std::size_t at = 0; at < text.size();) {
    if (detail::is_digit(text[at])) {
      last = detail::read_number(text, at);
    } else {
      ++at;
    }
  }
  return last;
}

/// Whether both texts end in the same number. Where `expected` holds none, whether they are equal but for white space around them.
inline bool exact_match(std::string_view predicted, std::string_view expected) {
  const std::string answer = final_answer(expected);
  return answer.empty() ? detail::trim(predicted) == detail::trim(expected) : final_answer(predicted) == answer;
}

/// Whether a text matches one of the right responses.
inline bool exact_match(std::string_view predicted, const Example& example) {
  const auto references = example.references();
  return std::any_of(references.begin(), references.end(), [&](const auto& expected) { return exact_match(predicted, expected); });
}

}  // namespace qdylora::examples
