// Regular expressions of module names, as PEFT's rank_pattern and alpha_pattern have them: Python's re for literals, '.', classes, groups,
// '|', '*', '+', '?', '^' and '$'. They come from files that are not trusted, so all ways through one are followed at once (Thompson 1968):
// time is at most the lengths' product, whatever the expression.
#pragma once

#include <bitset>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/core/error.hpp>
#include <qdylora/core/scalar.hpp>

namespace qdylora {

class Pattern {
 public:
  static constexpr std::size_t longest = 1000;

  /// Errc::unsupported for what is no such expression, or longer.
  explicit Pattern(std::string_view text) : text_(text), rest_(text) {
    QDYLORA_EXPECTS(text.size() <= longest, unsupported, "a regular expression of " + std::to_string(text.size()) + " characters");
    const auto expression = alternatives();
    if (!rest_.empty()) fail();
    start_ = link(expression, add({Step::Kind::accept}));
    text_ = rest_ = {};
  }

  /// Whether the expression stands for all of `name`.
  bool matches(std::string_view name) const {
    std::vector<std::size_t> now, next;
    std::vector<std::size_t> seen(steps_.size(), name.size() + 1);  // the place at which a step was last reached
    const auto reach = [&](std::size_t first, std::size_t at, std::vector<std::size_t>& reached) {
      for (std::vector<std::size_t> open = {first}; !open.empty();) {
        const auto i = open.back();
        open.pop_back();
        if (std::exchange(seen[i], at) == at) continue;
        const Step& step = steps_[i];
        switch (step.kind) {
          case Step::Kind::fork: open.push_back(step.other); [[fallthrough]];
          case Step::Kind::empty: open.push_back(step.next); break;
          case Step::Kind::begin:
            if (at == 0) open.push_back(step.next);
            break;
          case Step::Kind::end:
            if (at == name.size()) open.push_back(step.next);
            break;
          case Step::Kind::character:
          case Step::Kind::accept: reached.push_back(i); break;
        }
      }
    };
    reach(start_, 0, now);
    for (std::size_t at = 0; at < name.size(); ++at) {
      next.clear();
      for (const auto i : now)
        if (const Step& step = steps_[i]; step.kind == Step::Kind::character && step.set[static_cast<unsigned char>(name[at])])
          reach(step.next, at + 1, next);
      now.swap(next);
    }
    for (const auto i : now)
      if (steps_[i].kind == Step::Kind::accept) return true;
    return false;
  }

 private:
  using Set = std::bitset<256>;
  struct Step {
    enum class Kind { empty, character, fork, begin, end, accept } kind = Kind::empty;
    Set set = {};  // of a character
    std::size_t next = 0, other = 0;
  };
  struct Part {
    std::size_t first, last;  // last's next is what follows
  };

  [[noreturn]] void fail() const {
    throw Error(Errc::unsupported, "'" + printable(text_) + "' is not a regular expression known here, at character " +
                                       std::to_string(text_.size() - rest_.size() + 1));
  }
  bool take(char c) {
    if (!rest_.starts_with(c)) return false;
    rest_.remove_prefix(1);
    return true;
  }
  char take() {
    if (rest_.empty()) fail();
    const char c = rest_.front();
    rest_.remove_prefix(1);
    return c;
  }

  std::size_t add(Step step) {
    steps_.push_back(step);
    return steps_.size() - 1;
  }
  Part single(Step step) {
    const auto i = add(step);
    return {i, i};
  }
  // The first step of a part that is followed by a step.
  std::size_t link(Part part, std::size_t next) {
    steps_[part.last].next = next;
    return part.first;
  }

  Part alternatives() {
    Part part = sequence();
    while (take('|')) {
      const Part other = sequence();
      const auto end = add({});
      Step fork{Step::Kind::fork};
      fork.next = link(part, end);
      fork.other = link(other, end);
      part = {add(fork), end};
    }
    return part;
  }

  Part sequence() {
    Part part = single({});
    while (!rest_.empty() && rest_.front() != '|' && rest_.front() != ')') {
      const Part next = repeated(atom());
      link(part, next.first);
      part.last = next.last;
    }
    return part;
  }

  Part repeated(Part part) {
    const bool star = take('*'), plus = !star && take('+'), optional = !star && !plus && take('?');
    if (!star && !plus && !optional) return part;
    take('?');  // the shortest way first: the same names
    if (!rest_.empty() && std::string_view("*+?{").find(rest_.front()) != std::string_view::npos) fail();
    const auto end = add({});
    Step choice{Step::Kind::fork};
    choice.next = part.first;
    choice.other = end;
    const auto fork = add(choice);
    link(part, optional ? end : fork);
    return {plus ? part.first : fork, end};
  }

  Part atom() {
    const char c = take();
    if (c == '(') {
      if (take('?') && !take(':')) fail();
      const Part part = alternatives();
      if (!take(')')) fail();
      return part;
    }
    if (c == '^') return single({Step::Kind::begin});
    if (c == '$') return single({Step::Kind::end});
    Step step{Step::Kind::character};
    if (c == '[') step.set = one_of();
    else if (c == '.') step.set = ~Set().set('\n');
    else step.set = character(c);
    return single(step);
  }

  // What one character, or an escape that begins with it, stands for.
  Set character(char c) {
    if (std::string_view("*+?{}[])").find(c) != std::string_view::npos) fail();
    if (c != '\\') return Set().set(static_cast<unsigned char>(c));
    const char escaped = take();
    const auto digits = span('0', '9');
    if (escaped == 'd') return digits;
    if (escaped == 'w') return digits | span('a', 'z') | span('A', 'Z') | span('_', '_');
    if ((digits | span('a', 'z') | span('A', 'Z'))[static_cast<unsigned char>(escaped)]) fail();
    return Set().set(static_cast<unsigned char>(escaped));
  }

  Set one_of() {
    const bool other = take('^');
    Set set;
    do {
      const char c = take();
      if (rest_.size() >= 2 && rest_[0] == '-' && rest_[1] != ']' && c != '\\') {
        take();
        const char last = take();
        if (last < c || last == '\\') fail();
        set |= span(c, last);
      } else {
        set |= c == '\\' ? character(c) : Set().set(static_cast<unsigned char>(c));
      }
    } while (!take(']'));
    return other ? ~set : set;
  }

  static Set span(char first, char last) {
    Set set;
    for (unsigned c = static_cast<unsigned char>(first); c <= static_cast<unsigned char>(last); ++c) set.set(c);
    return set;
  }

  std::vector<Step> steps_;
  std::size_t start_ = 0;
  std::string_view text_, rest_;  // while it is read
};

}  // namespace qdylora
