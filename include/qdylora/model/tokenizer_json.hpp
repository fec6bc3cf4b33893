// The tokenizer of a Hugging Face folder: tokenizer.json as the `tokenizers` package writes it (byte-level BPE of GPT-2, SmolLM, Llama 3,
// Qwen2 and Falcon; SentencePiece's BPE of Llama 2 and Mistral), and the begin and end tokens from tokenizer_config.json or config.json
// beside it.
#pragma once

#include <algorithm>
#include <cstdint>
#include <filesystem>
#include <limits>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/core/error.hpp>
#include <qdylora/io/json.hpp>
#include <qdylora/model/tokenizer.hpp>

namespace qdylora {

namespace detail {

/// The parts of tokenizer.json that decide ids. A part that is not understood is an error: with it ignored, ids would differ.
class TokenizerJson {
 public:
  explicit TokenizerJson(const std::filesystem::path& file) : place_{.file = file.string()}, json_(parse(file)) {}

  TokenizerData read() const {
    TokenizerData data;
    for (const char* key : {"truncation", "padding"})
      if (find_key(json_, key, place_) != nullptr) fail(key, "null", "an object");
    read_model(data);
    read_tokens(data);
    if (data.model == TokenizerModel::sentencepiece) {
      read_spaces(data);
      data.strips_space = strips_space();
    } else {
      read_normalizer(data);
      data.pre_tokenizer = pre_tokenizer();
    }
    return data;
  }

  /// The token that the post-processor puts before a sequence, "" for none.
  std::string first_token() const {
    std::string first;
    for (const Json* step : steps("post_processor", "processors")) {
      const auto type = get_string(*step, "type", place_);
      if (type == "ByteLevel") continue;  // trims offsets alone
      if (type != "TemplateProcessing") fail("post_processor", "'ByteLevel' or 'TemplateProcessing'", type);
      const Json& parts = expect_key(*step, "single", place_);
      if (!parts.is_array()) raise_json_type("single", "an array", parts, place_);
      bool in_text = false;
      for (const Json& part : parts) {
        if (find_key(part, "Sequence", place_) != nullptr) {
          in_text = true;
          continue;
        }
        const auto token = get_string(get_object(part, "SpecialToken", place_), "id", place_);
        if (in_text || !first.empty()) fail("post_processor", "one token before the text at most", "also " + token);
        first = token;
      }
    }
    return first;
  }

  const ErrorPlace& place() const noexcept { return place_; }

 private:
  static Json parse(const std::filesystem::path& file) { return parse_json(read_text(file), {.file = file.string()}, {.json_depth = 16}); }

  [[noreturn]] void fail(std::string_view key, const std::string& expected, std::string_view found) const {
    throw Error(Errc::unsupported, "key '" + std::string(key) + "': expected " + expected + ", found '" + printable(found) + "'", place_);
  }

  /// The steps of a part: none, one, or those of a Sequence.
  std::vector<const Json*> steps(std::string_view part, std::string_view list) const {
    const Json* outer = find_key(json_, part, place_);
    if (outer == nullptr) return {};
    if (get_string(*outer, "type", place_) != "Sequence") return {outer};
    const Json& inner = expect_key(*outer, list, place_);
    if (!inner.is_array()) raise_json_type(list, "an array", inner, place_);
    std::vector<const Json*> result;
    for (const Json& step : inner) result.push_back(&step);
    return result;
  }

  void read_model(TokenizerData& data) const {
    const Json& model = get_object(json_, "model", place_);
    if (const auto type = get_string_or(model, "type", "BPE", place_); type != "BPE") fail("model.type", "'BPE'", type);
    if (get_bool_or(model, "byte_fallback", false, place_)) data.model = TokenizerModel::sentencepiece;
    for (const char* key : {"continuing_subword_prefix", "end_of_word_suffix"})
      if (const auto affix = get_string_or(model, key, "", place_); !affix.empty()) fail(std::string("model.") + key, "none", affix);
    if (get_number_or(model, "dropout", 0.0, place_) != 0.0) fail("model.dropout", "none", "a probability");
    data.whole_words = get_bool_or(model, "ignore_merges", false, place_);
    const Json& merges = expect_key(model, "merges", place_);
    if (!merges.is_array()) raise_json_type("merges", "an array", merges, place_);
    data.merges.reserve(merges.size());
    for (const Json& merge : merges) {
      if (merge.is_array() && merge.size() == 2)  // as releases from 2024 on write them
        data.merges.push_back(json_string(merge[0], "merges", place_) + " " + json_string(merge[1], "merges", place_));
      else data.merges.push_back(json_string(merge, "merges", place_));
    }
  }

  void read_tokens(TokenizerData& data) const {
    const Json& vocab = get_object(get_object(json_, "model", place_), "vocab", place_);
    const Json none = Json::array(), *found = find_key(json_, "added_tokens", place_);
    const Json& added = found != nullptr ? *found : none;
    if (!added.is_array()) raise_json_type("added_tokens", "an array", added, place_);
    // Ids are dense.
    const auto most_id = static_cast<std::int64_t>(std::min(vocab.size() + added.size(), Tokenizer::max_tokens)) - 1;
    for (const auto& [token, id] : vocab.items()) put(data, token, json_integer(id, token, 0, most_id, place_), normal);
    for (const Json& token : added) {
      const auto content = get_string(token, "content", place_);
      for (const char* key : {"single_word", "lstrip", "rstrip"})
        if (get_bool_or(token, key, false, place_)) fail(std::string("added_tokens.") + key, "false", content);
      const auto id = get_integer(token, "id", 0, most_id, place_);
      put(data, content, id, get_bool_or(token, "special", false, place_) ? control : user_defined);
      // As the first conversions of Llama have it.
      if (data.model == TokenizerModel::sentencepiece && find_key(json_, "normalizer", place_) != nullptr &&
          get_bool_or(token, "normalized", false, place_))
        data.marked_specials.push_back(static_cast<std::int32_t>(id));
    }
    for (std::size_t id = 0; id < data.tokens.size(); ++id)
      if (data.token_types[id] == 0) throw Error(Errc::bad_config, "no token has the id " + std::to_string(id), place_);
  }

  /// A token may stand in the vocabulary and among the added ones: the same, then.
  void put(TokenizerData& data, const std::string& token, std::int64_t id, std::int32_t type) const {
    const auto at = static_cast<std::size_t>(id);
    if (at >= data.tokens.size()) {
      data.tokens.resize(at + 1);
      data.token_types.resize(at + 1, 0);
    }
    if (data.token_types[at] != 0 && data.tokens[at] != token)
      throw Error(Errc::duplicate,
                  "tokens '" + printable(data.tokens[at]) + "' and '" + printable(token) + "' have the id " + std::to_string(id), place_);
    data.tokens[at] = token;
    data.token_types[at] = type;
  }

  void read_normalizer(TokenizerData& data) const {
    for (const Json* step : steps("normalizer", "normalizers")) {
      if (const auto type = get_string(*step, "type", place_); type != "NFC") fail("normalizer", "'NFC' or none", type);
      data.nfc = true;
    }
  }

  bool is_replace(const Json& step, std::string_view from, std::string_view to) const {
    return get_string(step, "type", place_) == "Replace" && get_string(step, "content", place_) == to &&
           get_string_or(get_object(step, "pattern", place_), "String", "", place_) == from;
  }

  /// How SentencePiece's spaces are marked: by the normalizer, or by the pre-tokenizer.
  void read_spaces(TokenizerData& data) const {
    bool marks = false;
    for (const Json* step : steps("normalizer", "normalizers")) {
      const auto type = get_string(*step, "type", place_);
      if (is_replace(*step, " ", space_mark)) marks = true;
      else if (type == "Prepend" && get_string(*step, "prepend", place_) == space_mark && data.space_prefix == SpacePrefix::none)
        data.space_prefix = SpacePrefix::all;
      else fail("normalizer", "'Replace' of a space by U+2581 and one 'Prepend' of it at most", type);
    }
    data.pre_tokenizer = "default";
    const bool prepends = data.space_prefix != SpacePrefix::none;
    for (const Json* step : steps("pre_tokenizer", "pretokenizers")) {
      const auto type = get_string(*step, "type", place_);
      if (type != "Metaspace" || marks || prepends)
        fail("pre_tokenizer", marks || prepends ? "none beside a normalizer and once 'Metaspace'" : "'Metaspace'", type);
      marks = true;
      if (const auto mark = get_string(*step, "replacement", place_); mark != space_mark) fail("pre_tokenizer.replacement", "U+2581", mark);
      const auto scheme = get_string_or(*step, "prepend_scheme", "always", place_);
      if (scheme == "always") data.space_prefix = SpacePrefix::all_without_space;
      else if (scheme == "first") data.space_prefix = SpacePrefix::beginning_without_space;
      else if (scheme != "never") fail("pre_tokenizer.prepend_scheme", "'always', 'first' or 'never'", scheme);
      if (scheme != "never" && !get_bool_or(*step, "add_prefix_space", true, place_))
        fail("pre_tokenizer.add_prefix_space", "true", "false");
      if (get_bool_or(*step, "split", true, place_)) data.pre_tokenizer = "metaspace";
    }
    if (!marks) fail("pre_tokenizer", "'Metaspace', or a normalizer that marks spaces", "neither");
  }

  /// Whether SentencePiece's decoder takes a space away from the beginning. The rest of it is always the same.
  bool strips_space() const {
    const auto parts = steps("decoder", "decoders");
    std::string types;
    for (const Json* part : parts) types += (types.empty() ? "" : ", ") + get_string(*part, "type", place_);
    if (!types.starts_with("Replace, ByteFallback, Fuse") || parts.size() > 4 || !is_replace(*parts[0], space_mark, " "))
      fail("decoder", "'Replace' of U+2581 by a space, 'ByteFallback', 'Fuse' and at most a 'Strip'", types);
    if (parts.size() == 3) return false;
    const Json& strip = *parts[3];
    if (get_string(strip, "type", place_) != "Strip" || get_string(strip, "content", place_) != " " ||
        get_integer(strip, "start", 0, 1 << 20, place_) != 1 || get_integer(strip, "stop", 0, 1 << 20, place_) != 0)
      fail("decoder", "a 'Strip' of one space from the beginning", strip.dump());
    return true;
  }

  std::string pre_tokenizer() const {
    // Regular expressions of the `tokenizers` package, as models' files spell them, by how many numerals they take together.
    const auto llama3 = [](const std::string& digits) {
      return R"((?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N})" + digits +
             R"(| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+)";
    };
    std::string name, whole, found;
    for (const Json* step : steps("pre_tokenizer", "pretokenizers")) {
      const auto type = get_string(*step, "type", place_);
      found += (found.empty() ? "" : ", ") + type;
      if (type == "ByteLevel" && name != "bytes") {
        if (get_bool_or(*step, "add_prefix_space", true, place_)) fail("pre_tokenizer.add_prefix_space", "false", "true");
        const bool cuts = get_bool_or(*step, "use_regex", true, place_);
        if (name.empty() && cuts) whole = "gpt-2";
        else if (name == "digits" && cuts) whole = "smollm";
        else if ((name == "llama-bpe" || name == "qwen2") && !cuts) whole = name;
        // After which nothing may follow, but for Falcon.
        name = name == "falcon" && cuts ? "falcon-bytes" : "bytes";
      } else if (type == "Digits" && name.empty() && get_bool_or(*step, "individual_digits", false, place_)) {
        name = "digits";
      } else if (type == "Punctuation" && name.empty() && get_string_or(*step, "behavior", "Isolated", place_) == "Contiguous") {
        name = "falcon";
      } else if (type == "Digits" && name == "falcon-bytes" && !get_bool_or(*step, "individual_digits", false, place_)) {
        name = "falcon-digits";
      } else if (type == "Split" && (name.empty() || name == "falcon-digits")) {
        const auto pattern = get_string(get_object(*step, "pattern", place_), "Regex", place_);
        if (const auto behavior = get_string(*step, "behavior", place_);
            behavior != "Isolated" || get_bool_or(*step, "invert", false, place_))
          fail("pre_tokenizer.behavior", "'Isolated', not inverted", behavior);
        if (name == "falcon-digits" && pattern == "[0-9][0-9][0-9]") whole = "falcon", name = "bytes";
        else if (name.empty() && pattern == llama3("{1,3}")) name = "llama-bpe";
        else if (name.empty() && pattern == llama3("")) name = "qwen2";
        else fail("pre_tokenizer.pattern", "Llama 3's, Qwen2's or Falcon's", pattern);
      } else {
        whole.clear();
        break;
      }
    }
    if (!whole.empty()) return whole;
    fail("pre_tokenizer", "that of GPT-2, SmolLM, Llama 3, Qwen2 or Falcon", found);
  }

  static constexpr std::int32_t normal = 1, control = 3, user_defined = 4;

  ErrorPlace place_;
  Json json_;
};

/// The token that a folder names as `key` ("bos_token", "eos_token"): a string, or an object with its content; "" for none.
inline std::string named_token(const Json& config, std::string_view key, const ErrorPlace& place) {
  const Json* token = find_key(config, key, place);
  if (token == nullptr) return {};
  return token->is_object() ? get_string(*token, "content", place) : json_string(*token, key, place);
}

}  // namespace detail

/// The tokenizer of a Hugging Face folder. Errors: unsupported (anything but byte-level BPE with one of the pre-tokenizers above and
/// SentencePiece's with a token for every byte; a token after the text; tokens that strip spaces), bad_config, duplicate, and those of
/// Tokenizer's constructor, with the file's name.
inline Tokenizer load_tokenizer_json(const std::filesystem::path& folder) {
  const detail::TokenizerJson file(folder / "tokenizer.json");
  TokenizerData data = file.read();
  const auto id_of = [&](const std::string& token, std::string_view what, const ErrorPlace& place) -> std::int32_t {
    if (token.empty()) return -1;
    const auto at = std::find(data.tokens.begin(), data.tokens.end(), token);
    if (at == data.tokens.end())
      throw Error(Errc::bad_config, std::string(what) + " '" + printable(token) + "' is not in the vocabulary", place);
    return static_cast<std::int32_t>(at - data.tokens.begin());
  };
  if (const auto path = folder / "tokenizer_config.json"; std::filesystem::exists(path)) {
    const ErrorPlace place{.file = path.string()};
    const Json config = parse_json(read_text(path), place, {.json_depth = 16});
    data.bos = id_of(detail::named_token(config, "bos_token", place), "bos_token", place);
    data.eos = id_of(detail::named_token(config, "eos_token", place), "eos_token", place);
  } else if (const auto shape = folder / "config.json"; std::filesystem::exists(shape)) {
    const ErrorPlace place{.file = shape.string()};
    const Json config = read_json(shape);
    const auto id = [&](const char* key) -> std::int32_t {
      const Json* value = detail::find_key(config, key, place);
      if (value != nullptr && value->is_array() && !value->empty()) value = &value->front();  // several ends: the first
      return value == nullptr
                 ? -1
                 : static_cast<std::int32_t>(detail::json_integer(*value, key, -1, std::numeric_limits<std::int32_t>::max(), place));
    };
    data.bos = id("bos_token_id");
    data.eos = id("eos_token_id");
  }
  if (const auto first = file.first_token(); !first.empty()) {
    data.bos = id_of(first, "the first token", file.place());
    data.adds_bos = true;
  }
  try {
    return Tokenizer(std::move(data));
  } catch (const Error& error) {
    throw Error(error.code(), error.what(), file.place());
  }
}

}  // namespace qdylora
