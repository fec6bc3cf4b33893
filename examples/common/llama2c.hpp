// Models of llama2.c (github.com/karpathy/llama2.c), version 0 of its checkpoints, and its tokenizer files. Little-endian:
//
//   checkpoint   7 x int32: width, mlp width, layers, heads, key-value heads, vocabulary, context
//                (a negative vocabulary: the head is a matrix of its own, at the end)
//                float32, layer by layer within each group: embedding [vocab, width] | attention norms [width] | q [width, width]
//                | k, v [kv, width] | o [width, width] | mlp norms [width] | gate [mlp, width] | down [width, mlp]
//                | up [mlp, width] | final norm [width] | two tables [context, head_dim / 2] of rotary positions, which are
//                computed instead | head
//   tokenizer    int32 longest token | { float32 score | int32 length | bytes } for each token
//                0 is unknown, 1 begins and 2 ends a text, 3 ... 258 are "<0x00>" ... "<0xFF>"
//
// Rotary positions are interleaved, of base 10000; norms have epsilon 1e-5.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <filesystem>
#include <memory>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include <qdylora/io/file.hpp>
#include <qdylora/model/decoder.hpp>
#include <qdylora/model/initial_weight.hpp>
#include <qdylora/model/tokenizer.hpp>

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

/// The shape of a checkpoint's model. Errors: open, read, truncated, trailing, bad_config.
inline DecoderConfig llama2c_config(const std::filesystem::path& path) { return detail::Llama2cFile(path).config(); }

/// Reads a checkpoint; linear weights are stored as `options` says while they are read.
/// Errors: open, read, truncated, trailing, bad_config, non_finite; they name the file and, from the weights on, the tensor.
template <class Backend = Cpu>
std::shared_ptr<DecoderWeights<float>> load_llama2c(const std::filesystem::path& path, BaseOptions options = {},
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
      read_linear(
          block, i, p, rows, cols, options,
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

/// The tokenizer of a llama2.c model, which is SentencePiece's BPE with spaces written as such.
/// Errors: open, read, truncated, limit (a token longer than the file says, too many tokens), and those of Tokenizer's constructor.
inline Tokenizer load_llama2c_tokenizer(const std::filesystem::path& path, const Limits& limits = {}) {
  const InputFile file(path);
  FileCursor cursor(file);
  TokenizerData data;
  data.model = TokenizerModel::sentencepiece;
  data.pre_tokenizer = "default";
  data.bos = 1;
  data.eos = 2;
  data.space_prefix = SpacePrefix::all;
  data.strips_space = true;
  const auto longest = cursor.read<std::int32_t>();
  while (cursor.remaining() > 0) {
    const ErrorPlace place = cursor.place();
    const std::size_t id = data.tokens.size();
    if (id == limits.vocabulary) throw Error(Errc::limit, "more than " + std::to_string(limits.vocabulary) + " tokens", place);
    data.scores.push_back(cursor.read<float>());
    const auto length = cursor.read<std::int32_t>();
    if (length < 0 || length > longest)
      throw Error(Errc::limit,
                  "token " + std::to_string(id) + " has " + std::to_string(length) + " bytes, the longest " + std::to_string(longest), place);
    const std::string text = cursor.text(static_cast<std::uint64_t>(length));
    data.tokens.push_back(id < 3 ? text : qdylora::detail::replaced(text, " ", qdylora::detail::space_mark));
    data.token_types.push_back(id == 0 ? 2 : id < 3 ? 3 : 1);
  }
  try {
    return Tokenizer(std::move(data));
  } catch (const Error& error) {
    throw Error(error.code(), error.what(), {.file = file.name()});
  }
}

}  // namespace qdylora::examples
