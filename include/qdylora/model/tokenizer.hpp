// Byte-pair encoding over the fields that a GGUF file (tokenizer.ggml.*) and a Hugging Face folder (tokenizer.json) hold, of two kinds:
//   byte-level     GPT-2, SmolLM, Llama 3, Qwen2, Falcon: a text is cut into words by a fixed pattern, each word into bytes, and
//                  neighbours merge by rank until none can (Radford et al. 2019); tokens are written as in byte_alphabet.hpp
//   SentencePiece  Llama 2, TinyLlama, Mistral: a text is cut into characters, or bytes where the vocabulary has no such character,
//                  and neighbours merge by rank or by their union's score, across words; tokens are written as in sentencepiece.hpp
// Control and user-defined tokens are written literally.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <functional>
#include <limits>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <unordered_map>
#include <utility>
#include <vector>

#include <qdylora/core/error.hpp>
#include <qdylora/core/scalar.hpp>
#include <qdylora/model/bpe_merges.hpp>
#include <qdylora/model/byte_alphabet.hpp>
#include <qdylora/model/pre_tokenizer.hpp>
#include <qdylora/model/sentencepiece.hpp>
#include <qdylora/model/special_tokens.hpp>
#include <qdylora/model/unicode.hpp>
#include <qdylora/model/unicode_nfc.hpp>

namespace qdylora {

enum class TokenizerModel { byte_level, sentencepiece };

struct TokenizerData {
  TokenizerModel model = TokenizerModel::byte_level;
  std::vector<std::string> tokens;        // position = id
  std::vector<std::string> merges;        // "left right", position = rank
  std::vector<float> scores;              // SentencePiece may have these instead: of two unions, that of the higher score is made first
  std::vector<std::int32_t> token_types;  // 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte; empty = all normal
  std::string pre_tokenizer;              // as GGUF names it: "gpt-2", "smollm", "llama-bpe", "qwen2" or "falcon"; of SentencePiece
                                          // "default", or "metaspace" where words are encoded one by one
  std::int32_t bos = -1;                  // -1 = the model has none
  std::int32_t eos = -1;
  bool adds_bos = false;     // whether sequences start with bos
  bool whole_words = false;  // a word that is a token stays whole, whatever merges there are (`ignore_merges`)
  bool nfc = false;          // text is brought to normalization form C first (byte-level)
  SpacePrefix space_prefix = SpacePrefix::none;  // SentencePiece alone, as the next
  bool strips_space = false;                     // decoding leaves out a space that a text begins with
  std::vector<std::int32_t> marked_specials;     // special tokens that are looked for with their spaces marked, one in front of them too
};

struct EncodeOptions {
  bool parse_special = true;  // false: control tokens in the text are ordinary characters (user-defined tokens are always matched)
  bool skip_unknown = false;  // true: leave out bytes the vocabulary has no token for, instead of an error
  Follows follows = Follows::nothing;  // what was encoded before, which decides on a space in front (SpacePrefix)
};

struct DecodeOptions {
  bool skip_special = false;  // true: control tokens print nothing
};

namespace detail {

struct TextHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const noexcept { return std::hash<std::string_view>{}(text); }
};

}  // namespace detail

/// Text to token ids and back. Immutable: one object may serve any number of threads.
class Tokenizer {
 public:
  static constexpr std::size_t max_tokens = std::size_t{1} << 22;

  /// Errors: bad_config (empty vocabulary or token, wrong counts or types, ids out of range, malformed merges or such that name absent
  /// tokens, characters outside the byte alphabet, SentencePiece without a token for every byte), duplicate (tokens, merges), limit,
  /// non_finite (scores), unsupported (pre-tokenizer), bad_argument (what only the other model has; marked_specials that are no ids).
  explicit Tokenizer(TokenizerData data)
      : model_(data.model),
        pre_tokenizer_(parse_pre_tokenizer(data.model, data.pre_tokenizer)),
        tokens_(std::move(data.tokens)),
        types_(std::move(data.token_types)),
        bos_(data.bos),
        eos_(data.eos),
        adds_bos_(data.adds_bos),
        whole_words_(data.whole_words),
        nfc_(data.nfc),
        strips_space_(data.strips_space),
        space_prefix_(data.space_prefix) {
    const bool marks = strips_space_ || space_prefix_ != SpacePrefix::none || !data.marked_specials.empty();
    QDYLORA_EXPECTS(model_ == TokenizerModel::sentencepiece ? !nfc_ : !marks, bad_argument,
                    "tokenizer: form C is for byte-level models, marked spaces are for SentencePiece");
    QDYLORA_EXPECTS(data.scores.empty() || (model_ == TokenizerModel::sentencepiece && data.merges.empty()), bad_argument,
                    "tokenizer: scores are for SentencePiece without merges");
    index_tokens(data.marked_specials);
    if (data.scores.empty()) index_merges(data.merges);
    else index_scores(data.scores);
  }

  /// Token ids of `text`. Special tokens in it are matched first: leftmost, then longest. Time O(n log n) for n bytes, whatever
  /// they are; bytes that are no UTF-8 are encoded like any other. Without skip_unknown, decode(encode(text)) == text, but for what a
  /// tokenizer normalizes: to_nfc of what lies between special tokens; or U+2581 read as a space, and spaces put in front of texts of which
  /// decode takes one away at most. bos is not added: see adds_bos.
  /// Errors: unsupported, with the offset unless the text was normalized, for a byte that the vocabulary has no token for.
  std::vector<std::int32_t> encode(std::string_view text, EncodeOptions options = {}) const {
    Encoding run{options, {}, {}};
    specials_.split(
        text, options.parse_special, [&](std::size_t begin, std::size_t end) { encode_text(text, begin, end, run); },
        [&](std::int32_t special) { run.ids.push_back(special); });
    return std::move(run.ids);
  }

  /// The bytes of the tokens, joined, less the space in front where data.strips_space. A code point may be spread over tokens: a prefix of
  /// the ids can end inside of one.
  /// Errors: bad_argument for an id out of range.
  std::string decode(std::span<const std::int32_t> ids, DecodeOptions options = {}) const {
    std::string text;
    for (const std::int32_t id : ids) {
      check_id(id);
      if (!(options.skip_special && is_control(id))) text += bytes_[static_cast<std::size_t>(id)];
    }
    if (strips_space_ && text.starts_with(' ')) text.erase(0, 1);
    return text;
  }

  /// The vocabulary's entry, as the file writes it. Errors: bad_argument for an id out of range.
  std::string_view token(std::int32_t id) const {
    check_id(id);
    return tokens_[static_cast<std::size_t>(id)];
  }
  /// The id of an entry, written as above.
  std::optional<std::int32_t> id(std::string_view token) const {
    const auto found = ids_.find(token);
    return found == ids_.end() ? std::nullopt : std::optional(found->second);
  }
  /// Whether the token steers the model and is no text, as "<|im_end|>". Errors: bad_argument for an id out of range.
  bool is_control(std::int32_t id) const {
    check_id(id);
    return is_control_type(types_[static_cast<std::size_t>(id)]);
  }

  Index vocab_size() const noexcept { return static_cast<Index>(tokens_.size()); }
  /// -1 where the model has none.
  std::int32_t bos() const noexcept { return bos_; }
  std::int32_t eos() const noexcept { return eos_; }
  /// Whether the model expects bos before every sequence, which is for the caller to put there.
  bool adds_bos() const noexcept { return adds_bos_; }
  TokenizerModel model() const noexcept { return model_; }
  PreTokenizer pre_tokenizer() const noexcept { return pre_tokenizer_; }

 private:
  static constexpr std::int32_t normal = 1, unknown = 2, control = 3, user_defined = 4, byte_type = 6;
  static constexpr std::size_t longest_scored = 256;  // bytes; splits of a token cost the square of its length

  struct Encoding {
    EncodeOptions options;
    std::vector<std::int32_t> ids;
    detail::BpeMerges::Word word;
  };

  static PreTokenizer parse_pre_tokenizer(TokenizerModel model, std::string_view name) {
    std::string expected = "'default' or 'metaspace' (SentencePiece)";
    if (model == TokenizerModel::sentencepiece) {
      if (name == "default") return PreTokenizer::none;
      if (name == "metaspace") return PreTokenizer::metaspace;
    } else {
      if (name == "gpt-2") return PreTokenizer::gpt2;
      if (name == "smollm") return PreTokenizer::smollm;
      if (name == "llama-bpe") return PreTokenizer::llama3;
      if (name == "qwen2") return PreTokenizer::qwen2;
      if (name == "falcon") return PreTokenizer::falcon;
      expected = "'gpt-2', 'smollm', 'llama-bpe', 'qwen2' or 'falcon'";
    }
    throw Error(Errc::unsupported, "tokenizer: expected pre-tokenizer " + expected + ", found '" + printable(name) + "'");
  }

  static bool is_control_type(std::int32_t type) noexcept { return type == control || type == unknown; }

  void check_id(std::int32_t id) const {
    QDYLORA_EXPECTS(id >= 0 && id < vocab_size(), bad_argument,
                    "tokenizer: expected an id in [0, " + std::to_string(vocab_size()) + "), found " + std::to_string(id));
  }

  void index_tokens(std::span<const std::int32_t> marked) {
    QDYLORA_EXPECTS(!tokens_.empty(), bad_config, "tokenizer: the vocabulary is empty");
    QDYLORA_EXPECTS(tokens_.size() <= max_tokens, limit,
                    "tokenizer: " + std::to_string(tokens_.size()) + " tokens, more than " + std::to_string(max_tokens));
    QDYLORA_EXPECTS(types_.empty() || types_.size() == tokens_.size(), bad_config,
                    "tokenizer: " + std::to_string(tokens_.size()) + " tokens, but " + std::to_string(types_.size()) + " types");
    for (const auto& [name, id] : {std::pair{"bos", bos_}, std::pair{"eos", eos_}}) {
      QDYLORA_EXPECTS(
          id >= -1 && id < vocab_size(), bad_config,
          std::string("tokenizer: expected ") + name + " in [-1, " + std::to_string(vocab_size()) + "), found " + std::to_string(id));
    }
    QDYLORA_EXPECTS(!adds_bos_ || bos_ >= 0, bad_config, "tokenizer: sequences are to start with bos, of which there is none");
    std::vector<bool> is_marked(tokens_.size());
    for (const std::int32_t id : marked) {
      check_id(id);
      is_marked[static_cast<std::size_t>(id)] = true;
    }
    types_.resize(tokens_.size(), normal);
    bytes_.resize(tokens_.size());
    ids_.reserve(tokens_.size());
    for (std::size_t i = 0; i < tokens_.size(); ++i) {
      const std::string& token = tokens_[i];
      QDYLORA_EXPECTS(!token.empty(), bad_config, "tokenizer: token " + std::to_string(i) + " is empty");
      QDYLORA_EXPECTS(types_[i] >= normal && types_[i] <= byte_type, bad_config,
                      "tokenizer: expected a type in [1, 6] for token " + std::to_string(i) + ", found " + std::to_string(types_[i]));
      const auto [place, added] = ids_.emplace(token, static_cast<std::int32_t>(i));
      QDYLORA_EXPECTS(
          added, duplicate,
          "tokenizer: tokens " + std::to_string(place->second) + " and " + std::to_string(i) + " are both '" + printable(token) + "'");
      if (is_control_type(types_[i]) || types_[i] == user_defined) {
        const auto id = static_cast<std::int32_t>(i);
        const auto pattern = is_marked[i] ? detail::mark_spaces(token, space_prefix_, Follows::nothing) : token;
        bytes_[i] = is_marked[i] ? detail::replaced(pattern, detail::space_mark, " ") : token;
        (is_marked[i] ? marked_specials_ : specials_).add(pattern, id, is_control_type(types_[i]));
      } else {
        bytes_[i] = model_ == TokenizerModel::sentencepiece ? piece_bytes(i) : letters_bytes(i);
      }
    }
    specials_.sort();
    marked_specials_.sort();
    for (std::size_t i = 0; i < byte_tokens_.size(); ++i) {
      const auto byte = static_cast<unsigned char>(i);
      const auto name = model_ == TokenizerModel::sentencepiece ? detail::byte_token_name(byte)
                                                                : detail::to_alphabet(std::string(1, static_cast<char>(byte)));
      byte_tokens_[i] = id(name).value_or(-1);
      QDYLORA_EXPECTS(model_ != TokenizerModel::sentencepiece ||
                          (byte_tokens_[i] >= 0 && types_[static_cast<std::size_t>(byte_tokens_[i])] == byte_type),
                      bad_config, "tokenizer: expected a token '" + name + "' for the byte, found none");
    }
  }

  /// What token i of a byte-level vocabulary stands for.
  std::string letters_bytes(std::size_t i) const {
    const auto bytes = detail::from_alphabet(tokens_[i]);
    QDYLORA_EXPECTS(bytes, bad_config,
                    "tokenizer: token " + std::to_string(i) + " '" + printable(tokens_[i]) + "' has a character that stands for no byte");
    return *bytes;
  }

  /// What token i of a SentencePiece vocabulary stands for. Files without types, and tokenizer.json, tell bytes by their names.
  std::string piece_bytes(std::size_t i) {
    if (const auto byte = detail::byte_of_token(tokens_[i])) {
      types_[i] = byte_type;
      return std::string(1, static_cast<char>(*byte));
    }
    QDYLORA_EXPECTS(types_[i] != byte_type, bad_config,
                    "tokenizer: expected '<0x00>' to '<0xFF>' for the byte token " + std::to_string(i) + ", found '" +
                        printable(tokens_[i]) + "'");
    return detail::replaced(tokens_[i], detail::space_mark, " ");
  }

  void index_merges(const std::vector<std::string>& merges) {
    QDYLORA_EXPECTS(merges.size() <= max_tokens, limit,
                    "tokenizer: " + std::to_string(merges.size()) + " merges, more than " + std::to_string(max_tokens));
    merges_.reserve(merges.size());
    for (std::size_t rank = 0; rank < merges.size(); ++rank) {
      const std::string_view text = merges[rank];
      const auto label = [&] { return "tokenizer: merge " + std::to_string(rank) + " '" + printable(text) + "'"; };
      const std::size_t space = text.find(' ');
      QDYLORA_EXPECTS(space != text.npos && text.find(' ', space + 1) == text.npos, bad_config,
                      label() + ": expected two tokens with one space between them");
      const auto find = [&](std::string_view part) {
        const auto found = id(part);
        QDYLORA_EXPECTS(found, bad_config, label() + ": token '" + printable(part) + "' is not in the vocabulary");
        return *found;
      };
      const std::int32_t left = find(text.substr(0, space));
      const std::int32_t right = find(text.substr(space + 1));
      const std::int32_t product = find(std::string(text.substr(0, space)) + std::string(text.substr(space + 1)));
      const bool added = merges_.add(left, right, static_cast<std::int32_t>(rank), product);
      QDYLORA_EXPECTS(added, duplicate, label() + " stands there twice");
    }
  }

  /// Every way to split a token into two makes a merge, which ranks by the token's score.
  void index_scores(const std::vector<float>& scores) {
    QDYLORA_EXPECTS(scores.size() == tokens_.size(), bad_config,
                    "tokenizer: " + std::to_string(tokens_.size()) + " tokens, but " + std::to_string(scores.size()) + " scores");
    for (std::size_t i = 0; i < scores.size(); ++i)
      QDYLORA_EXPECTS(std::isfinite(scores[i]), non_finite, "tokenizer: the score of token " + std::to_string(i) + " is not finite");
    std::vector<float> order = scores;
    std::sort(order.begin(), order.end(), std::greater<>{});
    const auto piece = [&](std::string_view text) -> std::int32_t {
      const auto found = id(text);
      return found && is_piece(*found) ? *found : -1;
    };
    for (std::size_t i = 0; i < scores.size(); ++i) {
      const std::string_view token = tokens_[i];
      if (!is_piece(static_cast<std::int32_t>(i))) continue;
      QDYLORA_EXPECTS(token.size() <= longest_scored, limit,
                      "tokenizer: token " + std::to_string(i) + " has " + std::to_string(token.size()) + " bytes, more than " +
                          std::to_string(longest_scored));
      const auto rank = std::lower_bound(order.begin(), order.end(), scores[i], std::greater<>{}) - order.begin();
      for (std::size_t cut = 1; cut < token.size(); ++cut) {
        const std::int32_t left = piece(token.substr(0, cut));
        if (left < 0) continue;
        if (const std::int32_t right = piece(token.substr(cut)); right >= 0)
          merges_.add(left, right, static_cast<std::int32_t>(rank), static_cast<std::int32_t>(i));
      }
    }
  }

  /// Whether the token is what text is encoded in, neither special nor a byte of SentencePiece.
  bool is_piece(std::int32_t id) const noexcept {
    const std::int32_t type = types_[static_cast<std::size_t>(id)];
    return !is_control_type(type) && type != user_defined && type != byte_type;
  }

  /// Appends the ids of bytes [begin, end) of `text`, which hold no special token but such as are looked for in a marked text.
  void encode_text(std::string_view text, std::size_t begin, std::size_t end, Encoding& run) const {
    const std::string_view part = text.substr(begin, end - begin);
    if (model_ == TokenizerModel::byte_level) return nfc_ ? encode_plain(to_nfc(part), begin, run) : encode_plain(part, begin, run);
    const auto marked = detail::mark_spaces(part, space_prefix_, begin == 0 ? run.options.follows : Follows::special);
    marked_specials_.split(
        marked, run.options.parse_special,
        [&](std::size_t from, std::size_t to) { encode_plain(std::string_view(marked).substr(from, to - from), begin, run); },
        [&](std::int32_t special) { run.ids.push_back(special); });
  }

  /// Appends the ids of a text as the vocabulary writes it, without special tokens. `begin` is where it lies in the whole, unless that was
  /// normalized.
  void encode_plain(std::string_view plain, std::size_t begin, Encoding& run) const {
    detail::for_each_word(plain, pre_tokenizer_, [&](std::size_t word_begin, std::size_t word_end) {
      const std::string_view word = plain.substr(word_begin, word_end - word_begin);
      if (whole_words_) {
        const auto whole = model_ == TokenizerModel::sentencepiece ? id(word) : id(detail::to_alphabet(word));
        if (whole && is_piece(*whole)) {
          run.ids.push_back(*whole);
          return;
        }
      }
      run.word.clear();
      if (model_ == TokenizerModel::sentencepiece) spell_in_characters(word, run);
      else spell_in_bytes(word, begin + word_begin, run);
      merges_.merge(run.word, run.ids);
    });
  }

  /// `offset` is where the word lies in the text, unless that was normalized.
  void spell_in_bytes(std::string_view word, std::size_t offset, Encoding& run) const {
    for (std::size_t i = 0; i < word.size(); ++i) {
      const auto byte = static_cast<unsigned char>(word[i]);
      if (byte_tokens_[byte] >= 0) run.word.push(byte_tokens_[byte]);
      else if (!run.options.skip_unknown)
        throw Error(Errc::unsupported, "tokenizer: the vocabulary has no token for byte " + std::to_string(byte) + " of the text",
                    nfc_ ? ErrorPlace{} : ErrorPlace{.offset = offset + i});
    }
  }

  void spell_in_characters(std::string_view word, Encoding& run) const {
    for (std::size_t at = 0, length = 0; at < word.size(); at += length) {
      length = decode_utf8(word, at).length;
      const std::string_view character = word.substr(at, length);
      if (const auto known = id(character); known && is_piece(*known)) run.word.push(*known);
      else
        for (const char byte : character) run.word.push(byte_tokens_[static_cast<unsigned char>(byte)]);
    }
  }

  TokenizerModel model_;
  PreTokenizer pre_tokenizer_;
  std::vector<std::string> tokens_;
  std::vector<std::int32_t> types_;
  std::int32_t bos_;
  std::int32_t eos_;
  bool adds_bos_, whole_words_, nfc_, strips_space_;
  SpacePrefix space_prefix_;
  std::vector<std::string> bytes_;  // what each token decodes to
  std::unordered_map<std::string, std::int32_t, detail::TextHash, std::equal_to<>> ids_;
  detail::BpeMerges merges_;
  detail::SpecialTokens specials_, marked_specials_;  // looked for in the text as it is, and as mark_spaces writes it
  std::array<std::int32_t, 256> byte_tokens_{};       // -1: the vocabulary has none
};

}  // namespace qdylora
