// Text from users and for them: lists on the command line, and foreign text made safe to show.
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <string>
#include <string_view>
#include <vector>

#include <qdylora/core/error.hpp>
#include <qdylora/io/module_patterns.hpp>
#include <qdylora/model/unicode.hpp>
#include <qdylora/nn/ranks.hpp>

namespace qdylora::examples {

/// Text made safe to show on a terminal and readable in any language: control characters, marks that turn the direction of writing, line
/// separators, and bytes that are no UTF-8 become \xNN.
inline std::string printable_utf8(std::string_view text) {
  const auto harmless = [](char32_t c) {
    return c >= 0x20 && !(c >= 0x7F && c < 0xA0) && !(c >= 0x2028 && c <= 0x202E) && !(c >= 0x2066 && c <= 0x2069);
  };
  std::string out;
  for (std::size_t at = 0; at < text.size();) {
    const auto [value, length] = decode_utf8(text, at);
    const auto bytes = text.substr(at, length);
    const bool invalid = value == replacement_code_point && length == 1;
    out += !invalid && harmless(value) ? std::string(bytes) : printable(bytes);
    at += length;
  }
  return out;
}

/// The parts of "a,b,c"; there is at least one, and an empty one is Errc::bad_argument. `option` is named in errors.
inline std::vector<std::string> parse_list(const std::string& option, const std::string& text) {
  std::vector<std::string> items;
  for (std::size_t begin = 0; begin <= text.size();) {
    const auto end = std::min(text.find(',', begin), text.size());
    items.push_back(text.substr(begin, end - begin));
    QDYLORA_EXPECTS(!items.back().empty(), bad_argument, option + ": expected a list like a,b,c, found '" + printable(text) + "'");
    begin = end + 1;
  }
  return items;
}

/// "1,2,4" as numbers, by default none of them negative. Errc::bad_argument.
template <class T>
std::vector<T> parse_numbers(const std::string& option, const std::string& text, bool negative = false) {
  std::vector<T> numbers;
  for (const auto& item : parse_list(option, text)) {
    T number{};
    const auto [end, status] = std::from_chars(item.data(), item.data() + item.size(), number);
    QDYLORA_EXPECTS((negative || item.front() != '-') && status == std::errc{} && end == item.data() + item.size(), bad_argument,
                    option + ": expected numbers like 1,2,4, found '" + printable(text) + "'");
    numbers.push_back(number);
  }
  return numbers;
}

/// "q_proj=8,down_proj=32" as values of modules by patterns of their names; "": none. Errc::bad_argument, and those of ModulePatterns.
inline ModulePatterns parse_patterns(const std::string& option, const std::string& text) {
  ModulePatterns patterns(option);
  if (text.empty()) return patterns;
  for (const auto& item : parse_list(option, text)) {
    const auto equals = std::min(item.rfind('='), item.size());
    const auto begin = std::min(equals + 1, item.size());
    double value = 0.0;
    const auto [end, status] = std::from_chars(item.data() + begin, item.data() + item.size(), value);
    QDYLORA_EXPECTS(equals > 0 && status == std::errc{} && end == item.data() + item.size() && std::isfinite(value) && value > 0.0,
                    bad_argument, option + ": expected a list like q_proj=8,down_proj=32, found '" + printable(text) + "'");
    patterns.add(item.substr(0, equals), value);
  }
  return patterns;
}

/// "1,2,4" as a rank set.
inline RankSet parse_ranks(const std::string& text) { return RankSet(parse_numbers<Index>("--ranks", text)); }

}  // namespace qdylora::examples
