// What every backend refuses of an operation's arguments, and reads of them alike.
#pragma once

#include <cstdint>
#include <span>
#include <string>

#include <qdylora/backend.hpp>

namespace qdylora {
namespace detail {

template <class S>
void expect_factors(std::span<const S> factors, Index cols) {
  QDYLORA_EXPECTS(static_cast<Index>(factors.size()) == cols, shape_mismatch,
                  "scale_columns: " + std::to_string(factors.size()) + " factors for " + std::to_string(cols) + " columns");
}

inline void expect_dropout(float probability) {
  QDYLORA_EXPECTS(probability >= 0.0f && probability < 1.0f, bad_argument,
                  "dropout: probability " + std::to_string(probability) + " is not in [0, 1)");
}
/// Random words below it drop their element.
inline std::uint64_t dropout_threshold(float probability) noexcept {
  return static_cast<std::uint64_t>(static_cast<double>(probability) * 0x1p32);
}

template <class T, class S>
void expect_layer_norm(MatrixView<const T> x, MatrixView<const S> weight, MatrixView<const S> bias, MatrixView<T> y,
                       MatrixView<S> moments) {
  expect_shape("layer_norm: weight", weight, 1, x.cols);
  expect_shape("layer_norm: bias", bias, 1, x.cols);
  expect_shape("layer_norm: y", y, x.rows, x.cols);
  expect_shape("layer_norm: moments", moments, x.rows, 2);
}
template <class T, class S>
void expect_layer_norm_backward(MatrixView<const T> dy, MatrixView<const T> x, MatrixView<const S> weight, MatrixView<const S> moments,
                                MatrixView<T> dx) {
  expect_shape("layer_norm_backward: x", x, dy.rows, dy.cols);
  expect_shape("layer_norm_backward: weight", weight, 1, x.cols);
  expect_shape("layer_norm_backward: moments", moments, x.rows, 2);
  expect_shape("layer_norm_backward: dx", dx, x.rows, x.cols);
}

template <class T, class S>
void expect_rope(MatrixView<T> x, std::span<const std::int32_t> positions, MatrixView<const S> table) {
  const Index head_dim = table.cols;
  QDYLORA_EXPECTS(head_dim > 0 && head_dim % 2 == 0 && x.cols % head_dim == 0, shape_mismatch,
                  "rope: x " + shape_text(x) + " is not made of heads of " + std::to_string(head_dim));
  QDYLORA_EXPECTS(static_cast<Index>(positions.size()) == x.rows, shape_mismatch,
                  "rope: " + std::to_string(positions.size()) + " positions for " + std::to_string(x.rows) + " tokens");
  for (const auto position : positions)
    QDYLORA_EXPECTS(position >= 0 && position < table.rows, bad_argument,
                    "rope: position " + std::to_string(position) + " is outside the table of " + std::to_string(table.rows));
}

/// `y` is what a table of some shape gives for `ids`.
template <class Table, class T>
void expect_embed(std::span<const std::int32_t> ids, const Table& table, MatrixView<T> y) {
  expect_shape("embed: y", y, static_cast<Index>(ids.size()), table.cols);
  for (std::size_t i = 0; i < ids.size(); ++i)
    QDYLORA_EXPECTS(ids[i] >= 0 && ids[i] < table.rows, bad_argument,
                    "embed: token id " + std::to_string(ids[i]) + " at position " + std::to_string(i) + " is outside the table of " +
                        std::to_string(table.rows));
}

/// `some` [rows.size(), cols] are rows of `all` [any, cols].
template <class T, class U>
void expect_rows(const char* what, const char* name, MatrixView<T> some, std::span<const Index> rows, MatrixView<U> all) {
  expect_shape(name, some, static_cast<Index>(rows.size()), all.cols);
  for (const Index row : rows)
    QDYLORA_EXPECTS(row >= 0 && row < all.rows, bad_argument,
                    std::string(what) + ": row " + std::to_string(row) + " is outside " + shape_text(all));
}

inline void expect_heads(const char* what, HeadShape shape) {
  QDYLORA_EXPECTS(shape.heads > 0 && shape.kv_heads > 0 && shape.head_dim > 0 && shape.heads % shape.kv_heads == 0, bad_argument,
                  std::string(what) + ": " + std::to_string(shape.heads) + " heads cannot share " + std::to_string(shape.kv_heads) +
                      " key-value heads");
}
inline void expect_attention(std::span<const Index> offsets, HeadShape shape, Index tokens, Index q_cols, Index kv_cols) {
  expect_heads("attention", shape);
  QDYLORA_EXPECTS(q_cols == shape.heads * shape.head_dim && kv_cols == shape.kv_heads * shape.head_dim, shape_mismatch,
                  "attention: q has " + std::to_string(q_cols) + " and k, v " + std::to_string(kv_cols) + " columns; expected " +
                      std::to_string(shape.heads * shape.head_dim) + " and " + std::to_string(shape.kv_heads * shape.head_dim));
  bool ordered = !offsets.empty() && offsets.front() == 0 && offsets.back() == tokens;
  for (std::size_t s = 1; ordered && s < offsets.size(); ++s) ordered = offsets[s - 1] <= offsets[s];
  QDYLORA_EXPECTS(ordered, bad_argument, "attention: sequence offsets must ascend from 0 to the " + std::to_string(tokens) + " tokens");
}

template <class T, class S>
void expect_attention(MatrixView<const T> q, MatrixView<const T> k, MatrixView<const T> v, std::span<const Index> offsets,
                      HeadShape shape, MatrixView<T> y, MatrixView<S> lse) {
  expect_attention(offsets, shape, q.rows, q.cols, k.cols);
  expect_shape("attention: k", k, q.rows, shape.kv_heads * shape.head_dim);
  expect_shape("attention: v", v, q.rows, shape.kv_heads * shape.head_dim);
  expect_shape("attention: y", y, q.rows, q.cols);
  expect_shape("attention: lse", lse, q.rows, shape.heads);
}

template <class T, class S>
void expect_attention_backward(MatrixView<const T> dy, MatrixView<const T> q, MatrixView<const T> k, MatrixView<const T> v,
                               MatrixView<const T> y, MatrixView<const S> lse, std::span<const Index> offsets, HeadShape shape,
                               MatrixView<T> dq, MatrixView<T> dk, MatrixView<T> dv) {
  expect_attention(offsets, shape, q.rows, q.cols, k.cols);
  expect_shape("attention_backward: dy", dy, q.rows, q.cols);
  expect_shape("attention_backward: y", y, q.rows, q.cols);
  expect_shape("attention_backward: dq", dq, q.rows, q.cols);
  expect_shape("attention_backward: k", k, q.rows, shape.kv_heads * shape.head_dim);
  expect_shape("attention_backward: v", v, k.rows, k.cols);
  expect_shape("attention_backward: dk", dk, k.rows, k.cols);
  expect_shape("attention_backward: dv", dv, v.rows, v.cols);
  expect_shape("attention_backward: lse", lse, q.rows, shape.heads);
}

/// Where the rows of x go, one each.
template <class T>
void expect_copy_rows(MatrixView<const T> x, std::span<const MatrixView<T>> targets) {
  QDYLORA_EXPECTS(static_cast<Index>(targets.size()) == x.rows, shape_mismatch,
                  "copy_rows: " + std::to_string(targets.size()) + " targets for " + std::to_string(x.rows) + " rows");
  for (const auto& target : targets) expect_shape("copy_rows: target", target, 1, x.cols);
}

template <class T>
void expect_attention_decode(MatrixView<const T> q, std::span<const MatrixView<const T>> keys,
                             std::span<const MatrixView<const T>> values, HeadShape shape, MatrixView<T> y) {
  expect_heads("attention_decode", shape);
  expect_shape("attention_decode: q", q, static_cast<Index>(keys.size()), shape.heads * shape.head_dim);
  expect_shape("attention_decode: y", y, q.rows, q.cols);
  QDYLORA_EXPECTS(values.size() == keys.size(), shape_mismatch, "attention_decode: one cache of keys and one of values a sequence");
  for (std::size_t s = 0; s < keys.size(); ++s) {
    expect_shape("attention_decode: keys", keys[s], keys[s].rows, shape.kv_heads * shape.head_dim);
    expect_shape("attention_decode: values", values[s], keys[s].rows, shape.kv_heads * shape.head_dim);
    QDYLORA_EXPECTS(keys[s].rows > 0, bad_argument, "attention_decode: an empty cache has nothing to attend to");
  }
}

template <class S>
void expect_cross_entropy(MatrixView<S> logits, std::span<const std::int32_t> targets, MatrixView<S> losses) {
  QDYLORA_EXPECTS(static_cast<Index>(targets.size()) == logits.rows, shape_mismatch,
                  "cross_entropy: " + std::to_string(targets.size()) + " targets for " + std::to_string(logits.rows) + " rows");
  expect_shape("cross_entropy: losses", losses, logits.rows, 1);
  for (const auto target : targets)
    QDYLORA_EXPECTS(target >= -1 && target < logits.cols, bad_argument,
                    "cross_entropy: target " + std::to_string(target) + " is outside the vocabulary of " + std::to_string(logits.cols));
}

}  // namespace detail
}  // namespace qdylora
