// Byte-level byte-pair encoding as GPT-2 defined it (Radford et al. 2019; Sennrich et al. 2016), over the fields that a GGUF file
// (tokenizer.ggml.*) and a Hugging Face folder (tokenizer.json) hold. A text is cut into words by a fixed pattern, each word into bytes,
// and neighbours merge by rank until none can. In vocabulary and merges every byte is written as one printable code point: 33..126,
// 161..172 and 174..255 as themselves, the other 68 in their order as 256, 257, ... (so a space is U+0120). Control and user-defined
// tokens are written literally.
#pragma once

#include <algorithm>
#include <array>
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
#include <qdylora/model/pre_tokenizer.hpp>
#include <qdylora/model/unicode.hpp>
#include <qdylora/model/unicode_nfc.hpp>

namespace qdylora {

struct TokenizerData {
  std::vector<std::string> tokens;        // position = id
  std::vector<std::string> merges;        // "left right", position = rank
  std::vector<std::int32_t> token_types;  // 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte; empty = all normal
  std::string pre_tokenizer;              // as GGUF names it: "gpt-2", "smollm", "llama-bpe" or "qwen2"
  std::int32_t bos = -1;                  // -1 = the model has none
  std::int32_t eos = -1;
  bool adds_bos = false;     // whether sequences start with bos
  bool whole_words = false;  // a word that is a token stays whole, whatever merges there are (`ignore_merges`)
  bool nfc = false;          // text is brought to normalization form C first
};

struct EncodeOptions {
  bool parse_special = true;  // false: control tokens in the text are ordinary characters (user-defined tokens are always matched)
  bool skip_unknown = false;  // true: leave out bytes the vocabulary has no token for, instead of an error
};

struct DecodeOptions {
  bool skip_special = false;  // true: control tokens print nothing
};

namespace detail {

inline constexpr std::size_t byte_alphabet_end = 256 + 68;

/// The code point that stands for each byte.
inline constexpr std::array<char32_t, 256> byte_alphabet = [] {
  std::array<char32_t, 256> letters{};
  char32_t next = 256;
  for (char32_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte > 32 && byte < 127) || (byte > 160 && byte != 173);
    letters[byte] = printable ? byte : next++;
  }
  return letters;
}();

/// The inverse: byte of a code point < byte_alphabet_end, -1 where there is none.
inline constexpr std::array<std::int16_t, byte_alphabet_end> alphabet_byte = [] {
  std::array<std::int16_t, byte_alphabet_end> bytes{};
  bytes.fill(-1);
  for (std::size_t byte = 0; byte < 256; ++byte) bytes[byte_alphabet[byte]] = static_cast<std::int16_t>(byte);
  return bytes;
}();

struct TextHash {
  using is_transparent = void;
  std::size_t operator()(std::string_view text) const noexcept { return std::hash<std::string_view>{}(text); }
};

// Keys are pairs of small integers: mixed (the finalizer of splitmix64), so that they spread whatever the map's modulus is.
struct PairHash {
  std::size_t operator()(std::uint64_t key) const noexcept {
    key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9ull;
    key = (key ^ (key >> 27)) * 0x94D049BB133111EBull;
    return static_cast<std::size_t>(key ^ (key >> 31));
  }
};

}  // namespace detail

/// Text to token ids and back. Immutable: one object may serve any number of threads.
class Tokenizer {
 public:
  static constexpr std::size_t max_tokens = std::size_t{1} << 22;

  /// Errors: bad_config (empty vocabulary or token, wrong counts or types, ids out of range, malformed merges or such that name
  /// absent tokens, characters outside the byte alphabet), duplicate (tokens, merges), limit, unsupported (pre-tokenizer).
  explicit Tokenizer(TokenizerData data)
      : pre_tokenizer_(parse_pre_tokenizer(data.pre_tokenizer)),
        tokens_(std::move(data.tokens)),
        types_(std::move(data.token_types)),
        bos_(data.bos),
        eos_(data.eos),
        adds_bos_(data.adds_bos),
        whole_words_(data.whole_words),
        nfc_(data.nfc) {
    index_tokens();
    index_merges(data.merges);
  }

  /// Token ids of `text`. Special tokens in it are matched first: leftmost, then longest. Time O(n log n) for n bytes, whatever
  /// they are; bytes that are no UTF-8 are encoded like any other. Without skip_unknown, decode(encode(text)) == text (or to_nfc of what
  /// lies between special tokens, for a tokenizer that normalizes). bos is not added: see adds_bos.
  /// Errors: unsupported, with the offset unless the text was normalized, for a byte that the vocabulary has no token for.
  std::vector<std::int32_t> encode(std::string_view text, EncodeOptions options = {}) const {
    Encoding run{options, {}, {}, {}};
    std::size_t plain = 0;  // start of the text that is not encoded yet
    for (std::size_t at = 0; at < text.size();) {
      const std::int32_t special = special_at(text, at, options.parse_special);
      if (special < 0) {
        ++at;
        continue;
      }
      encode_plain(text, plain, at, run);
      run.ids.push_back(special);
      plain = at += token(special).size();
    }
    encode_plain(text, plain, text.size(), run);
    return std::move(run.ids);
  }

  /// The bytes of the tokens, joined. A code point may be spread over tokens: a prefix of the ids can end inside of one.
  /// Errors: bad_argument for an id out of range.
  std::string decode(std::span<const std::int32_t> ids, DecodeOptions options = {}) const {
    std::string text;
    for (const std::int32_t id : ids) {
      check_id(id);
      if (!(options.skip_special && is_control(id))) text += bytes_[static_cast<std::size_t>(id)];
    }
    return text;
  }

  /// The vocabulary's entry, as the file writes it (in the byte alphabet). Errors: bad_argument for an id out of range.
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
    return type(static_cast<std::size_t>(id)) == control;
  }

  Index vocab_size() const noexcept { return static_cast<Index>(tokens_.size()); }
  /// -1 where the model has none.
  std::int32_t bos() const noexcept { return bos_; }
  std::int32_t eos() const noexcept { return eos_; }
  /// Whether the model expects bos before every sequence, which is for the caller to put there.
  bool adds_bos() const noexcept { return adds_bos_; }
  PreTokenizer pre_tokenizer() const noexcept { return pre_tokenizer_; }

 private:
  static constexpr std::int32_t normal = 1, control = 3, user_defined = 4, last_type = 6;

  struct Merge {
    std::int32_t rank;
    std::int32_t product;
  };
  // A word is a doubly linked list of symbols; a symbol merged into its left neighbour has token -1.
  struct Symbol {
    std::int32_t token;
    Index previous;
    Index next;
  };
  // A merge that was possible when it was found: valid while both tokens still stand at their places.
  struct Candidate {
    Merge merge;
    Index left;
    Index right;
    std::int32_t left_token;
    std::int32_t right_token;
    // The heap's top is its largest: the lowest rank, then the leftmost.
    bool operator<(const Candidate& other) const noexcept {
      return merge.rank != other.merge.rank ? merge.rank > other.merge.rank : left > other.left;
    }
  };
  struct Encoding {
    EncodeOptions options;
    std::vector<std::int32_t> ids;
    std::vector<Symbol> symbols;  // of one word; kept for their capacity
    std::vector<Candidate> heap;
  };

  static PreTokenizer parse_pre_tokenizer(std::string_view name) {
    if (name == "gpt-2") return PreTokenizer::gpt2;
    if (name == "smollm") return PreTokenizer::smollm;
    if (name == "llama-bpe") return PreTokenizer::llama3;
    if (name == "qwen2") return PreTokenizer::qwen2;
    throw Error(Errc::unsupported,
                "tokenizer: expected pre-tokenizer 'gpt-2', 'smollm', 'llama-bpe' or 'qwen2', found '" + printable(name) + "'");
  }

  static std::uint64_t pair_key(std::int32_t left, std::int32_t right) noexcept {
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 | static_cast<std::uint32_t>(right);
  }

  std::int32_t type(std::size_t id) const noexcept { return types_.empty() ? normal : types_[id]; }

  void check_id(std::int32_t id) const {
    QDYLORA_EXPECTS(id >= 0 && id < vocab_size(), bad_argument,
                    "tokenizer: expected an id in [0, " + std::to_string(vocab_size()) + "), found " + std::to_string(id));
  }

  void index_tokens() {
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
    bytes_.resize(tokens_.size());
    ids_.reserve(tokens_.size());
    for (std::size_t i = 0; i < tokens_.size(); ++i) {
      const std::string& token = tokens_[i];
      QDYLORA_EXPECTS(!token.empty(), bad_config, "tokenizer: token " + std::to_string(i) + " is empty");
      QDYLORA_EXPECTS(type(i) >= normal && type(i) <= last_type, bad_config,
                      "tokenizer: expected a type in [1, 6] for token " + std::to_string(i) + ", found " + std::to_string(type(i)));
      const auto [place, added] = ids_.emplace(token, static_cast<std::int32_t>(i));
      QDYLORA_EXPECTS(
          added, duplicate,
          "tokenizer: tokens " + std::to_string(place->second) + " and " + std::to_string(i) + " are both '" + printable(token) + "'");
      if (type(i) == control || type(i) == user_defined) {
        bytes_[i] = token;
        specials_[static_cast<unsigned char>(token.front())].push_back(static_cast<std::int32_t>(i));
      } else {
        bytes_[i] = bytes_of(i);
      }
    }
    for (auto& list : specials_) {
      std::sort(list.begin(), list.end(), [&](std::int32_t a, std::int32_t b) {
        return tokens_[static_cast<std::size_t>(a)].size() > tokens_[static_cast<std::size_t>(b)].size();
      });
    }
    for (std::size_t byte = 0; byte < byte_tokens_.size(); ++byte) {
      std::string letter;
      append_utf8(letter, detail::byte_alphabet[byte]);
      byte_tokens_[byte] = id(letter).value_or(-1);
    }
  }

  std::string bytes_of(std::size_t i) const {
    std::string bytes;
    for (std::size_t at = 0; at < tokens_[i].size();) {
      const DecodedCodePoint step = decode_utf8(tokens_[i], at);
      const int byte = step.value < detail::byte_alphabet_end ? detail::alphabet_byte[step.value] : -1;
      QDYLORA_EXPECTS(byte >= 0, bad_config,
                      "tokenizer: token " + std::to_string(i) + " '" + printable(tokens_[i]) + "' has a character that stands for no byte");
      bytes += static_cast<char>(static_cast<unsigned char>(byte));
      at += step.length;
    }
    return bytes;
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
      const bool added = merges_.emplace(pair_key(left, right), Merge{static_cast<std::int32_t>(rank), product}).second;
      QDYLORA_EXPECTS(added, duplicate, label() + " stands there twice");
    }
  }

  /// The longest special token that starts at `at`, or -1.
  std::int32_t special_at(std::string_view text, std::size_t at, bool parse_control) const noexcept {
    for (const std::int32_t special : specials_[static_cast<unsigned char>(text[at])]) {
      const auto index = static_cast<std::size_t>(special);
      if ((parse_control || types_[index] != control) && text.substr(at).starts_with(tokens_[index])) return special;
    }
    return -1;
  }

  /// Appends the ids of bytes [begin, end) of `text`, which hold no special token.
  void encode_plain(std::string_view text, std::size_t begin, std::size_t end, Encoding& run) const {
    std::string normalized;
    if (nfc_) {
      normalized = to_nfc(text.substr(begin, end - begin));
      text = normalized;
      begin = 0;
      end = text.size();
    }
    std::string letters;
    detail::for_each_word(text.substr(begin, end - begin), pre_tokenizer_, [&](std::size_t word_begin, std::size_t word_end) {
      if (whole_words_) {
        letters.clear();
        for (std::size_t i = begin + word_begin; i < begin + word_end; ++i)
          append_utf8(letters, detail::byte_alphabet[static_cast<unsigned char>(text[i])]);
        if (const auto whole = id(letters); whole && type(static_cast<std::size_t>(*whole)) == normal) {
          run.ids.push_back(*whole);
          return;
        }
      }
      run.symbols.clear();
      for (std::size_t i = begin + word_begin; i < begin + word_end; ++i) {
        const auto byte = static_cast<unsigned char>(text[i]);
        if (byte_tokens_[byte] >= 0) {
          const auto place = static_cast<Index>(run.symbols.size());
          run.symbols.push_back({byte_tokens_[byte], place - 1, place + 1});
        } else if (!run.options.skip_unknown) {
          throw Error(Errc::unsupported, "tokenizer: the vocabulary has no token for byte " + std::to_string(byte) + " of the text",
                      nfc_ ? ErrorPlace{} : ErrorPlace{.offset = i});
        }
      }
      merge_word(run);
      for (const Symbol& symbol : run.symbols) {
        if (symbol.token >= 0) run.ids.push_back(symbol.token);
      }
    });
  }

  /// Merges the pair of lowest rank, the leftmost first, until no pair is left. A heap of candidates instead of a search per merge
  /// keeps a megabyte without a space at O(n log n).
  void merge_word(Encoding& run) const {
    auto& symbols = run.symbols;
    auto& heap = run.heap;
    const auto at = [&](Index place) -> Symbol& { return symbols[static_cast<std::size_t>(place)]; };
    const auto size = static_cast<Index>(symbols.size());
    const auto offer = [&](Index left, Index right) {
      if (left < 0 || right >= size) return;
      const auto found = merges_.find(pair_key(at(left).token, at(right).token));
      if (found == merges_.end()) return;
      heap.push_back({found->second, left, right, at(left).token, at(right).token});
      std::push_heap(heap.begin(), heap.end());
    };
    for (Index place = 1; place < size; ++place) offer(place - 1, place);
    while (!heap.empty()) {
      std::pop_heap(heap.begin(), heap.end());
      const Candidate best = heap.back();
      heap.pop_back();
      Symbol& left = at(best.left);
      Symbol& right = at(best.right);
      // Tokens only grow, so equal tokens at both places mean that nothing between or inside of them has changed.
      if (left.token != best.left_token || right.token != best.right_token) continue;
      left.token = best.merge.product;
      left.next = right.next;
      right.token = -1;
      if (right.next < size) at(right.next).previous = best.left;
      offer(left.previous, best.left);
      offer(best.left, left.next);
    }
  }

  PreTokenizer pre_tokenizer_;
  std::vector<std::string> tokens_;
  std::vector<std::int32_t> types_;
  std::int32_t bos_;
  std::int32_t eos_;
  bool adds_bos_, whole_words_, nfc_;
  std::vector<std::string> bytes_;  // what each token decodes to
  std::unordered_map<std::string, std::int32_t, detail::TextHash, std::equal_to<>> ids_;
  std::unordered_map<std::uint64_t, Merge, detail::PairHash> merges_;  // by pair_key
  std::array<std::vector<std::int32_t>, 256> specials_;                // by first byte, longest first
  std::array<std::int32_t, 256> byte_tokens_{};                        // -1: the vocabulary has none
};

}  // namespace qdylora
