// Values of modules by patterns of their names: the rank_pattern and alpha_pattern of PEFT.
#pragma once

#include <algorithm>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/io/pattern.hpp>

namespace qdylora {

/// Pattern -> value. PEFT takes a pattern for a regular expression that a module's name must end in, after a dot or from its start on:
/// re.match(rf"(.*\.)?({pattern})$", name). Of several that match it takes the first, but JSON's objects have no order: here they must
/// agree. Most patterns are names or ends of names, with or without '^' and escaped dots, and are looked up.
class ModulePatterns {
 public:
  /// key and place are what errors name.
  explicit ModulePatterns(std::string_view key = "pattern", ErrorPlace place = {}) : key_(key), place_(std::move(place)) {}

  /// Errc::unsupported for what is no Pattern, duplicate for one that stands there already.
  void add(const std::string& pattern, double value) {
    std::string plain;
    bool is_name = true;
    for (std::size_t i = 0; i < pattern.size(); ++i) {
      const bool escaped_dot = pattern[i] == '\\' && i + 1 < pattern.size() && pattern[i + 1] == '.';
      if (escaped_dot) ++i;
      if (!escaped_dot && std::string_view("\\*+?()[]{}|$").find(pattern[i]) != std::string_view::npos) is_name = false;
      plain += pattern[i];
    }
    if (!is_name || plain.find('^', 1) != std::string::npos) {
      try {
        expressions_.emplace_back(Pattern("(.*\\.)?(" + pattern + ")$"), value);
      } catch (const Error& error) {
        throw Error(error.code(), key_ + ": " + error.what(), place_);
      }
    } else if (!values_.emplace(plain, value).second) {
      throw Error(Errc::duplicate, key_ + ": '" + printable(pattern) + "' stands there twice", place_);
    }
    patterns_.push_back(pattern);
  }

  bool empty() const noexcept { return patterns_.empty(); }

  /// The value of a module, if a pattern matches its name. Errc::unsupported where two do that have different values.
  std::optional<double> find(const std::string& module) const {
    std::optional<double> found;
    const auto take = [&](double value) {
      if (found && *found != value) {
        throw Error(Errc::unsupported, key_ + ": two entries with different values match '" + printable(module) + "'", place_);
      }
      found = value;
    };
    const auto look = [&](std::string_view pattern) {
      if (const auto at = values_.find(pattern); at != values_.end()) take(at->second);
    };
    look("^" + module);
    for_each_ending(module, [&](std::string_view ending) {
      look(ending);
      return false;
    });
    for (const auto& [expression, value] : expressions_)
      if (expression.matches(module)) take(value);
    return found;
  }
  double value_or(const std::string& module, double fallback) const { return find(module).value_or(fallback); }

  /// Throws Errc::bad_argument naming a pattern that matches none of the modules.
  void expect_matches(const std::vector<std::string>& modules) const {
    for (const std::string& pattern : patterns_) {
      ModulePatterns alone(key_, place_);
      alone.add(pattern, 0.0);
      if (std::none_of(modules.begin(), modules.end(), [&](const std::string& module) { return alone.find(module).has_value(); }))
        throw Error(Errc::bad_argument, key_ + ": '" + printable(pattern) + "' matches no module", place_);
    }
  }

  /// f(the name, the name without its first component, ...) until it returns true; whether it did.
  template <class F>
  static bool for_each_ending(std::string_view name, F&& f) {
    for (;;) {
      if (f(name)) return true;
      const auto dot = name.find('.');
      if (dot == std::string_view::npos) return false;
      name.remove_prefix(dot + 1);
    }
  }

 private:
  std::string key_;
  ErrorPlace place_;
  std::vector<std::string> patterns_;
  std::map<std::string, double, std::less<>> values_;
  std::vector<std::pair<Pattern, double>> expressions_;
};

}  // namespace qdylora
