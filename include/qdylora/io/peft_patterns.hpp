// The values that an adapter_config.json of PEFT gives to modules by patterns of their names.
#pragma once

#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/io/json.hpp>
#include <qdylora/io/pattern.hpp>

namespace qdylora::detail {

/// rank_pattern and alpha_pattern: module name -> value. PEFT takes a key for a regular expression that the name must end in, after a dot
/// or from its start on: re.match(rf"(.*\.)?({key})$", name). Of several keys that match it takes the first, but JSON's objects have no
/// order: such keys must agree. Most keys are names or ends of names, with or without '^' and escaped dots, and are looked up.
class PeftPatterns {
 public:
  PeftPatterns(const Json& config, std::string_view key, const ErrorPlace& place) : key_(key), place_(place) {
    const auto at = config.find(key);
    if (at == config.end() || at->is_null()) return;
    for (const auto& [pattern, value] : get_object(config, key, place).items()) {
      std::string plain;
      bool is_name = true;
      for (std::size_t i = 0; i < pattern.size(); ++i) {
        const bool escaped_dot = pattern[i] == '\\' && i + 1 < pattern.size() && pattern[i + 1] == '.';
        if (escaped_dot) ++i;
        if (!escaped_dot && std::string_view("\\*+?()[]{}|$").find(pattern[i]) != std::string_view::npos) is_name = false;
        plain += pattern[i];
      }
      const double number = json_number(value, key, place);
      if (!is_name || plain.find('^', 1) != std::string::npos) {
        try {
          expressions_.emplace_back(Pattern("(.*\\.)?(" + pattern + ")$"), number);
        } catch (const Error& error) {
          throw Error(error.code(), key_ + ": " + error.what(), place);
        }
      } else if (!values_.emplace(plain, number).second) {
        throw Error(Errc::duplicate, key_ + ": '" + printable(pattern) + "' stands there twice", place);
      }
    }
  }

  double value_or(const std::string& module, double fallback) const {
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
    return found.value_or(fallback);
  }

  /// f(the name, the name without its first component, ...) until it returns true; whether it did.
  template <class F>
  static bool for_each_ending(std::string_view module, F&& f) {
    for (;;) {
      if (f(module)) return true;
      const auto dot = module.find('.');
      if (dot == std::string_view::npos) return false;
      module.remove_prefix(dot + 1);
    }
  }

 private:
  std::string key_;
  ErrorPlace place_;
  std::map<std::string, double, std::less<>> values_;
  std::vector<std::pair<Pattern, double>> expressions_;
};

}  // namespace qdylora::detail
