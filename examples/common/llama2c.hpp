// Models of llama2.c (github.com/karpathy/llama2.c), version 0 of its checkpoints, and its tokenizer files. Little-endian:
//
//   checkpoint   7 x int32: width, mlp width, layers, heads, key-value heads, vocabulary, context
//                (a negative vocabulary: the head is a matrix of its own, at the end)
//                float32, layer by layer within each group: embedding [vocab, width] | attention norms [width] | q [width, width]
//                | k, v [kv, width] | o [width, width] | mlp norms [width] | gate [mlp, width] | down [width, mlp]
//                | up [mlp, width] | final norm [width] | two tables [context, head_dim / 2] of rotary positions, which are
//                computed instead | head
//   tokenizer    int32 longest token | { float32 score | int32 length | bytes } for each token
//                0 is unknown, 1 begins and 2 ends a text, 3 ... 258 stand for the bytes 0 ... 255
//
// Rotary positions are interleaved, of base 10000; norms have epsilon 1e-5.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <queue>
#include <span>
#include <string>
#include <string_view>
#include <tuple>
#include <unordered_map>
#include <utility>
#include <vector>

#include <qdylora/io/file.hpp>
#include <qdylora/model/decoder.hpp>
#include <qdylora/model/initial_weight.hpp>

namespace qdylora::examples {

namespace detail {

/// A checkpoint whose header was read and whose size fits it. Tensors are taken in the order of the file.
class Llama2cFile {
 public:
  explicit Llama2cFile(const std::filesystem::path& path) : file_(path) {
    std::int32_t header[7];
    file_.pread_exact(0, std::as_writable_bytes(std::span(header)));
    config_.width = header[0];
    config_.mlp_width = header[1];
    config_.layers = header[2];
    config_.heads.heads = header[3];
    config_.heads.kv_heads = header[4];
    config_.vocab = std::abs(Index{header[5]});
    config_.tied_head = header[5] > 0;
    config_.context = header[6];
    config_.heads.head_dim = config_.heads.heads > 0 ? config_.width / config_.heads.heads : 0;
    config_.rope_layout = RopeLayout::interleaved;
    try {
      config_.validate();
    } catch (const Error& error) {
      throw Error(error.code(), error.what(), file_.place(0));
    }
    if (config_.query_width() != config_.width)
      throw Error(Errc::bad_config,
                  "width " + std::to_string(config_.width) + " is no multiple of " + std::to_string(config_.heads.heads) + " heads",
                  file_.place(0));
    expect_size();
  }

  const DecoderConfig& config() const noexcept { return config_; }
  const InputFile& file() const noexcept { return file_; }

  /// The offset of the next rows x cols floats, and past them.
  std::uint64_t take(Index rows, Index cols) noexcept {
    return std::exchange(next_, next_ + 4 * static_cast<std::uint64_t>(rows) * static_cast<std::uint64_t>(cols));
  }
  /// Rows at `offset`. Errc::non_finite.
  void read(std::uint64_t offset, MatrixView<float> out, const std::string& tensor) const {
    for (Index i = 0; i < out.rows; ++i) {
      const std::span row(out.row(i), static_cast<std::size_t>(out.cols));
      file_.pread_exact(offset, std::as_writable_bytes(row));
      for (const float& x : row)
        if (!std::isfinite(x))
          throw Error(Errc::non_finite, "a weight is not finite",
                      {.file = file_.name(), .tensor = tensor, .offset = offset + 4 * static_cast<std::uint64_t>(&x - row.data())});
      offset += row.size_bytes();
    }
  }

 private:
  // The limits of validate() keep the sum below 2^60.
  void expect_size() const {
    const auto& c = config_;
    const Index embeddings = c.vocab * c.width * (c.tied_head ? 1 : 2);
    const Index floats = embeddings + c.linear_weights() + (2 * c.layers + 1) * c.width + c.context * c.heads.head_dim;
    const auto expected = 28 + 4 * static_cast<std::uint64_t>(floats);
    if (expected == file_.size()) return;
    throw Error(expected > file_.size() ? Errc::truncated : Errc::trailing,
                "the header describes " + std::to_string(expected) + " bytes, the file has " + std::to_string(file_.size()),
                file_.place(file_.size()));
  }

  InputFile file_;
  DecoderConfig config_;
  std::uint64_t next_ = 28;
};

}  // namespace detail

/// Reads a checkpoint; linear weights are stored as `options` says while they are read.
/// Errors: open, read, truncated, trailing, bad_config, non_finite; they name the file and, from the weights on, the tensor.
template <class Backend = Cpu>
std::shared_ptr<const DecoderWeights<float>> load_llama2c(const std::filesystem::path& path, BaseOptions options = {},
                                                          Backend backend = {}) {
  detail::Llama2cFile file(path);
  const DecoderConfig& c = file.config();
  auto weights = std::make_shared<DecoderWeights<float>>();
  weights->config = c;
  const auto dense = [&](const std::string& tensor, Index rows, Index cols) {
    Matrix<float> matrix(rows, cols);
    file.read(file.take(rows, cols), matrix.view(), tensor);
    return matrix;
  };
  std::vector<std::shared_ptr<BlockWeights<float>>> blocks;
  for (Index i = 0; i < c.layers; ++i) blocks.push_back(std::make_shared<BlockWeights<float>>(c));
  const auto shapes = c.linears();
  const auto name = [](Index layer, std::string_view part) { return "layers." + std::to_string(layer) + "." + std::string(part); };
  const auto norms = [&](NormWeights<float> BlockWeights<float>::*norm, const char* part) {
    for (Index i = 0; i < c.layers; ++i) (*blocks[static_cast<std::size_t>(i)]).*norm = dense(name(i, part), 1, c.width);
  };
  const auto linears = [&](Projection projection) {
    const auto p = static_cast<std::size_t>(projection);
    const Index rows = shapes[p].out, cols = shapes[p].in;
    for (Index i = 0; i < c.layers; ++i) {
      const std::uint64_t begin = file.take(rows, cols);
      const std::string tensor = name(i, shapes[p].name);
      auto& block = *blocks[static_cast<std::size_t>(i)];
      std::tie(block.linear[p], block.initial[p]) = make_initial_weight(
          rows, cols, options,
          [&](Index first, MatrixView<float> out) {
            file.read(begin + 4 * static_cast<std::uint64_t>(first) * static_cast<std::uint64_t>(cols), out, tensor);
          },
          backend);
    }
  };
  weights->embedding = dense("embedding", c.vocab, c.width);
  norms(&BlockWeights<float>::attention_norm, "attention_norm");
  linears(Projection::q);
  linears(Projection::k);
  linears(Projection::v);
  linears(Projection::o);
  norms(&BlockWeights<float>::mlp_norm, "mlp_norm");
  linears(Projection::gate);
  linears(Projection::down);
  linears(Projection::up);
  weights->final_norm = dense("final_norm", 1, c.width);
  file.take(c.context, c.heads.head_dim);
  if (!c.tied_head) weights->head = dense("head", c.vocab, c.width);
  weights->blocks.assign(blocks.begin(), blocks.end());
  return weights;
}

/// The tokenizer of a llama2.c model: byte-pair merges in the order of scores, with single bytes for what the vocabulary lacks.
class Llama2cTokenizer {
 public:
  static constexpr std::int32_t begin_of_text = 1;
  static constexpr std::int32_t end_of_text = 2;

  /// Errors: open, read, truncated, limit (a token longer than the file says, too many tokens), non_finite, bad_config.
  explicit Llama2cTokenizer(const std::filesystem::path& path, const Limits& limits = {}) {
    const InputFile file(path);
    FileCursor cursor(file);
    const auto longest = cursor.read<std::int32_t>();
    while (cursor.remaining() > 0) {
      const ErrorPlace place = cursor.place();
      if (tokens_.size() == limits.vocabulary)
        throw Error(Errc::limit, "more than " + std::to_string(limits.vocabulary) + " tokens", place);
      const auto score = cursor.read<float>();
      const auto length = cursor.read<std::int32_t>();
      if (!std::isfinite(score))
        throw Error(Errc::non_finite, "the score of token " + std::to_string(tokens_.size()) + " is not finite", place);
      if (length < 0 || length > longest)
        throw Error(Errc::limit,
                    "token " + std::to_string(tokens_.size()) + " has " + std::to_string(length) + " bytes, the longest " +
                        std::to_string(longest),
                    place);
      tokens_.push_back({cursor.text(static_cast<std::uint64_t>(length)), score});
    }
    if (tokens_.size() < first_byte + 256)
      throw Error(Errc::bad_config,
                  "expected at least " + std::to_string(first_byte + 256) + " tokens, found " + std::to_string(tokens_.size()),
                  file.place(file.size()));
    for (std::size_t id = 0; id < tokens_.size(); ++id) ids_.try_emplace(tokens_[id].text, static_cast<std::int32_t>(id));
  }

  Index size() const noexcept { return static_cast<Index>(tokens_.size()); }

  /// The ids of a text, which is given a space in front as the models were trained with; `bos` puts token 1 first. The pair of
  /// neighbours whose union scores highest is merged, the leftmost on ties, until no union is a token.
  std::vector<std::int32_t> encode(std::string_view text, bool bos = false) const {
    std::vector<Piece> pieces;
    const auto push = [&](std::int32_t id) {
      const auto at = static_cast<std::int32_t>(pieces.size());
      pieces.push_back({id, at - 1, at + 1});
    };
    if (bos) push(begin_of_text);
    const std::string spaced = text.empty() ? std::string{} : " " + std::string(text);
    for (std::size_t i = 0, end = 0; i < spaced.size(); i = end) {
      end = i + 1;  // past the continuation bytes of a UTF-8 character
      while (end < spaced.size() && end < i + 4 && (static_cast<unsigned char>(spaced[end]) & 0xC0) == 0x80) ++end;
      if (const auto known = ids_.find(spaced.substr(i, end - i)); known != ids_.end()) {
        push(known->second);
      } else {
        for (std::size_t b = i; b < end; ++b) push(static_cast<std::int32_t>(first_byte) + static_cast<unsigned char>(spaced[b]));
      }
    }
    if (!pieces.empty()) pieces.back().next = -1;
    merge(pieces);
    std::vector<std::int32_t> ids;
    for (const Piece& piece : pieces)
      if (piece.id >= 0) ids.push_back(piece.id);
    return ids;
  }

  /// The text of ids, without tokens 1 and 2 and the space that follows token 1. Errc::bad_argument for an id that is no token.
  std::string decode(std::span<const std::int32_t> ids) const {
    std::string text;
    std::int32_t previous = -1;
    for (const std::int32_t id : ids) {
      QDYLORA_EXPECTS(id >= 0 && id < size(), bad_argument, "decode: " + std::to_string(id) + " is not a token");
      const auto i = static_cast<std::size_t>(id);
      if (i >= first_byte && i < first_byte + 256) {
        text += static_cast<char>(i - first_byte);
      } else if (id != begin_of_text && id != end_of_text) {
        const std::string& piece = tokens_[i].text;
        text += previous == begin_of_text && piece.starts_with(' ') ? std::string_view(piece).substr(1) : std::string_view(piece);
      }
      previous = id;
    }
    return text;
  }

 private:
  static constexpr std::size_t first_byte = 3;

  struct Token {
    std::string text;
    float score = 0.0f;
  };
  struct Piece {
    std::int32_t id = -1;  // -1: merged into the one before
    std::int32_t previous = -1;
    std::int32_t next = -1;
  };
  struct Merge {
    float score;
    std::int32_t left, left_id, right_id, id;
    bool operator<(const Merge& other) const noexcept { return score != other.score ? score < other.score : left > other.left; }
  };

  // A heap of unions and a chain of pieces: n log n for a text of n characters. A union is stale once either side has changed.
  void merge(std::vector<Piece>& pieces) const {
    std::priority_queue<Merge> heap;
    const auto piece = [&](std::int32_t at) -> Piece& { return pieces[static_cast<std::size_t>(at)]; };
    const auto consider = [&](std::int32_t left) {
      if (left < 0 || piece(left).next < 0) return;
      const std::int32_t a = piece(left).id, b = piece(piece(left).next).id;
      const auto both = ids_.find(tokens_[static_cast<std::size_t>(a)].text + tokens_[static_cast<std::size_t>(b)].text);
      if (both != ids_.end()) heap.push({tokens_[static_cast<std::size_t>(both->second)].score, left, a, b, both->second});
    };
    for (std::int32_t i = 0; i < static_cast<std::int32_t>(pieces.size()); ++i) consider(i);
    while (!heap.empty()) {
      const Merge best = heap.top();
      heap.pop();
      Piece& left = piece(best.left);
      if (left.id != best.left_id || left.next < 0 || piece(left.next).id != best.right_id) continue;
      Piece& right = piece(left.next);
      left.id = best.id;
      left.next = right.next;
      right.id = -1;
      if (left.next >= 0) piece(left.next).previous = best.left;
      consider(left.previous);
      consider(best.left);
    }
  }

  std::vector<Token> tokens_;
  std::unordered_map<std::string, std::int32_t> ids_;
};

}  // namespace qdylora::examples
