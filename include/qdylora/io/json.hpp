// JSON (RFC 8259) from files that are not trusted: nlohmann/json behind bounds on size and depth, with duplicate keys an error, and
// accessors that name the key which is absent or of another type.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include <qdylora/core/scalar.hpp>
#include <qdylora/io/checked.hpp>
#include <qdylora/io/file.hpp>

namespace qdylora {

using Json = nlohmann::json;

namespace detail {

[[noreturn]] inline void raise_json(const nlohmann::json::exception& exception, ErrorPlace place) {
  // "[json.exception.parse_error.101] parse error at line 1, column 2: syntax error ...": the place says where, in bytes of the file.
  std::string_view text = exception.what();
  if (const auto tag = text.find("] "); tag != text.npos) text.remove_prefix(tag + 2);
  if (const auto at = text.find(": "); text.starts_with("parse error at ") && at != text.npos) text.remove_prefix(at + 2);
  throw Error(Errc::json, printable(text, 200), std::move(place));
}

inline ErrorPlace shifted(const ErrorPlace& place, std::uint64_t bytes) {
  ErrorPlace result = place;
  result.offset = checked_add(place.offset.value_or(0), bytes, place);
  return result;
}

/// What the JSON library does not refuse by itself: text that is not UTF-8 (Errc::utf8), and NUL, at which it would stop reading.
inline void expect_json_text(std::string_view text, const ErrorPlace& place) {
  if (const auto at = utf8_error(text)) throw Error(Errc::utf8, "is not UTF-8", shifted(place, *at));
  if (const auto at = text.find('\0'); at != text.npos) throw Error(Errc::json, "contains a NUL byte", shifted(place, at));
}

}  // namespace detail

/// The document in `text`. `place` is where the text is from; its offset, if any, is that of the first byte.
/// Errc::utf8, Errc::json (syntax), Errc::duplicate (a key twice in one object), Errc::limit (bytes, values, depth).
inline Json parse_json(std::string_view text, const ErrorPlace& place, const Limits& limits = {}) {
  QDYLORA_EXPECTS(limits.json_depth <= Limits::json_depth_most, bad_argument,
                  "Limits::json_depth is at most " + std::to_string(Limits::json_depth_most));
  if (text.size() > limits.json_bytes) {
    throw Error(Errc::limit, "JSON of " + std::to_string(text.size()) + " bytes, at most " + std::to_string(limits.json_bytes),
                place);
  }
  detail::expect_json_text(text, place);

  std::vector<std::set<std::string>> keys;  // of each object that is open
  std::uint64_t values = 0;
  const auto watch = [&](int depth, Json::parse_event_t event, Json& parsed) {
    using Event = Json::parse_event_t;
    if (event == Event::object_start || event == Event::array_start) {
      if (static_cast<std::uint64_t>(depth) >= limits.json_depth) {
        throw Error(Errc::limit, "JSON nested deeper than " + std::to_string(limits.json_depth), place);
      }
      if (event == Event::object_start) keys.emplace_back();
    } else if (event == Event::object_end) {
      keys.pop_back();
    } else if (event == Event::key) {
      if (!keys.back().insert(parsed.get_ref<const std::string&>()).second) {
        throw Error(Errc::duplicate, "key '" + printable(parsed.get_ref<const std::string&>()) + "' twice in one object", place);
      }
    }
    if (event != Event::object_end && event != Event::array_end && ++values > limits.json_values) {
      throw Error(Errc::limit, "JSON with more than " + std::to_string(limits.json_values) + " values", place);
    }
    return true;
  };
  try {
    return Json::parse(text.begin(), text.end(), watch);
  } catch (const Json::parse_error& exception) {
    detail::raise_json(exception, detail::shifted(place, exception.byte == 0 ? 0 : exception.byte - 1));
  } catch (const Json::exception& exception) {
    detail::raise_json(exception, place);
  }
}

/// The document in a file.
inline Json read_json(const std::filesystem::path& path, const Limits& limits = {}) {
  return parse_json(read_text(path, limits.json_bytes), {.file = path.native()}, limits);
}

namespace detail {

/// The value of `key`; null when the key is absent, or there with the value null, which writers use for "not set".
inline const Json* find_key(const Json& object, std::string_view key, const ErrorPlace& place) {
  if (!object.is_object()) {
    throw Error(Errc::bad_config, "key '" + printable(key) + "': expected an object around it, found " + object.type_name(),
                place);
  }
  const auto at = object.find(key);
  return at == object.end() || at->is_null() ? nullptr : &*at;
}

inline const Json& expect_key(const Json& object, std::string_view key, const ErrorPlace& place) {
  if (const Json* value = find_key(object, key, place)) return *value;
  throw Error(Errc::bad_config, "key '" + printable(key) + "' is absent", place);
}

[[noreturn]] inline void raise_json_type(std::string_view key, const std::string& expected, const Json& found,
                                         const ErrorPlace& place) {
  const std::string text = found.is_structured() ? std::string(found.type_name())
                                                 : printable(found.dump(-1, ' ', true, Json::error_handler_t::replace), 60);
  throw Error(Errc::bad_config, "key '" + printable(key) + "': expected " + expected + ", found " + text, place);
}

inline std::string json_string(const Json& value, std::string_view key, const ErrorPlace& place) {
  if (!value.is_string()) raise_json_type(key, "a string", value, place);
  return value.get_ref<const std::string&>();
}

// 1.0 is not an integer, and a number beyond 64 bits is one the parser could keep only as a double.
inline std::int64_t json_integer(const Json& value, std::string_view key, std::int64_t least, std::int64_t most,
                                 const ErrorPlace& place) {
  constexpr auto top = static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max());
  if (value.is_number_integer() && !(value.is_number_unsigned() && value.get<std::uint64_t>() > top)) {
    if (const auto number = value.get<std::int64_t>(); number >= least && number <= most) return number;
  }
  raise_json_type(key, "an integer in [" + std::to_string(least) + ", " + std::to_string(most) + "]", value, place);
}

inline double json_number(const Json& value, std::string_view key, const ErrorPlace& place) {
  if (!value.is_number()) raise_json_type(key, "a number", value, place);
  return value.get<double>();
}

inline bool json_bool(const Json& value, std::string_view key, const ErrorPlace& place) {
  if (!value.is_boolean()) raise_json_type(key, "true or false", value, place);
  return value.get<bool>();
}

}  // namespace detail

// Accessors. All throw Errc::bad_config at `place`, naming the key. The forms with `_or` give `fallback` where the key is absent or
// null, and still refuse a value of another type or out of range.

inline std::string get_string(const Json& object, std::string_view key, const ErrorPlace& place = {}) {
  return detail::json_string(detail::expect_key(object, key, place), key, place);
}
inline std::string get_string_or(const Json& object, std::string_view key, std::string fallback, const ErrorPlace& place = {}) {
  const Json* value = detail::find_key(object, key, place);
  return value ? detail::json_string(*value, key, place) : std::move(fallback);
}

/// An exact integer in [least, most].
inline std::int64_t get_integer(const Json& object, std::string_view key, std::int64_t least, std::int64_t most,
                                const ErrorPlace& place = {}) {
  return detail::json_integer(detail::expect_key(object, key, place), key, least, most, place);
}
inline std::int64_t get_integer_or(const Json& object, std::string_view key, std::int64_t fallback, std::int64_t least,
                                   std::int64_t most, const ErrorPlace& place = {}) {
  const Json* value = detail::find_key(object, key, place);
  return value ? detail::json_integer(*value, key, least, most, place) : fallback;
}

/// Any number, which in JSON is finite.
inline double get_number(const Json& object, std::string_view key, const ErrorPlace& place = {}) {
  return detail::json_number(detail::expect_key(object, key, place), key, place);
}
inline double get_number_or(const Json& object, std::string_view key, double fallback, const ErrorPlace& place = {}) {
  const Json* value = detail::find_key(object, key, place);
  return value ? detail::json_number(*value, key, place) : fallback;
}

inline bool get_bool(const Json& object, std::string_view key, const ErrorPlace& place = {}) {
  return detail::json_bool(detail::expect_key(object, key, place), key, place);
}
inline bool get_bool_or(const Json& object, std::string_view key, bool fallback, const ErrorPlace& place = {}) {
  const Json* value = detail::find_key(object, key, place);
  return value ? detail::json_bool(*value, key, place) : fallback;
}

/// An array of exact integers in [least, most], e.g. a shape.
inline std::vector<std::int64_t> get_integers(const Json& object, std::string_view key, std::int64_t least, std::int64_t most,
                                              const ErrorPlace& place = {}) {
  const Json& value = detail::expect_key(object, key, place);
  if (!value.is_array()) detail::raise_json_type(key, "an array of integers", value, place);
  std::vector<std::int64_t> result;
  for (const Json& item : value) result.push_back(detail::json_integer(item, key, least, most, place));
  return result;
}
inline std::vector<std::string> get_strings(const Json& object, std::string_view key, const ErrorPlace& place = {}) {
  const Json& value = detail::expect_key(object, key, place);
  if (!value.is_array()) detail::raise_json_type(key, "an array of strings", value, place);
  std::vector<std::string> result;
  for (const Json& item : value) result.push_back(detail::json_string(item, key, place));
  return result;
}
inline const Json& get_object(const Json& object, std::string_view key, const ErrorPlace& place = {}) {
  const Json& value = detail::expect_key(object, key, place);
  if (!value.is_object()) detail::raise_json_type(key, "an object", value, place);
  return value;
}

}  // namespace qdylora
