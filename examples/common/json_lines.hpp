// Data in JSON lines, whose errors name the file and the line.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/core/error.hpp>
#include <qdylora/core/scalar.hpp>
#include <qdylora/io/json.hpp>

#include "example.hpp"

namespace qdylora::examples {

/// f(), with file and line added to its Error.
template <class F>
auto at_line(const std::string& file, const std::string& where, F&& f) {
  try {
    return f();
  } catch (const Error& error) {
    throw Error(error.code(), where + ": " + error.what(), {.file = file});
  }
}

namespace detail {

/// Fields of JSON objects from a file; `where` names the line in errors.
class ObjectReader {
 public:
  explicit ObjectReader(std::string file) : file_(std::move(file)) {}

  [[noreturn]] void fail(const std::string& where, const std::string& message) const {
    throw Error(Errc::json, where + ": " + message, {.file = file_});
  }

  const Json& field(const Json& object, const char* key, const std::string& where) const {
    const auto found = object.find(key);
    if (found == object.end()) fail(where, "expected a field '" + std::string(key) + "', found none");
    return *found;
  }

  const std::string& text(const Json& object, const char* key, const std::string& where) const {
    return text_of(field(object, key, where), key, "a string", where);
  }

  /// Of a field that is a list of strings.
  std::vector<std::string> texts(const Json& object, const char* key, const std::string& where) const {
    const Json& list = field(object, key, where);
    if (!list.is_array()) fail(where, "expected field '" + std::string(key) + "' to be a list, found " + list.type_name());
    std::vector<std::string> all;
    for (const auto& item : list) all.push_back(text_of(item, key, "a list of strings", where));
    return all;
  }

 protected:
  std::string file_;

 private:
  const std::string& text_of(const Json& value, const char* key, const char* kind, const std::string& where) const {
    if (!value.is_string()) fail(where, "expected field '" + std::string(key) + "' to be " + kind + ", found " + value.type_name());
    return value.get_ref<const std::string&>();
  }
};

/// f(object, where) for each object of JSON lines (the library's parser, with the line in its errors), or of the one array that a .json file
/// may be.
template <class F>
void for_each_object(const std::string& file, std::string_view text, bool may_be_array, F&& f) {
  const auto read = [&](const Json& object, const std::string& where) {
    if (!object.is_object()) ObjectReader(file).fail(where, "expected an object, found " + std::string(object.type_name()));
    f(object, where);
  };
  const auto parse = [&](std::string_view part, const std::string& where, std::uint64_t offset) {
    return at_line(file, where, [&] { return parse_json(part, {.offset = offset}); });
  };
  const std::size_t first = text.find_first_not_of(" \t\r\n");
  if (may_be_array && first != text.npos && text[first] == '[') {
    const Json list = parse(text, "array", 0);
    Index number = 0;
    for (const auto& item : list) read(item, "element " + std::to_string(++number));
    return;
  }
  Index number = 0;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    const std::string_view line = trim(text.substr(begin, end - begin));
    const std::string where = "line " + std::to_string(++number);
    if (!line.empty()) read(parse(line, where, static_cast<std::uint64_t>(line.data() - text.data())), where);
    begin = end + 1;
  }
}

/// All of a data file. Errors: open, read.
inline std::string read_data(const std::filesystem::path& path) {
  std::ifstream file(path, std::ios::binary);
  if (!file || std::filesystem::is_directory(path)) throw Error(Errc::open, "cannot open the data", {.file = path.string()});
  std::string text{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file.bad()) throw Error(Errc::read, "cannot read the data", {.file = path.string()});
  return text;
}

}  // namespace detail
}  // namespace qdylora::examples
