// What adapters begin with where it is not A random and B zero: a product B^T A made from the weight itself (<qdylora/nn/initialize.hpp>).
#pragma once

#include <algorithm>
#include <charconv>
#include <cmath>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include <qdylora/nn/lora_adapter.hpp>

namespace qdylora {

/// B^T A, an [out, in] matrix of rank k, in an adapter's orientation. Empty: nothing.
template <class S = float, MemoryResource Memory = HostMemory>
struct LowRank {
  Matrix<S, Memory> a;  // [k, in]
  Matrix<S, Memory> b;  // [k, out]

  Index rank() const noexcept { return a.rows(); }
};

/// How an adapter begins, and what its base is then.
struct AdapterInit {
  /// standard: A random, B zero; the base is the quantized weight. The others: <qdylora/nn/initialize.hpp>.
  enum class Kind { standard, pissa, loftq, qera } kind = Kind::standard;
  Index rank = 0;        // of the product that the adapter begins with
  Index iterations = 1;  // loftq's

  bool standard() const noexcept { return kind == Kind::standard; }
  /// Whether it looks at what passes through the model (<qdylora/model/calibrate.hpp>).
  bool calibrated() const noexcept { return kind == Kind::qera; }
  /// Whether the base is another one than the weight's own quantization, so that the adapter fits no other.
  bool changes_base() const noexcept { return kind == Kind::pissa || (kind == Kind::loftq && iterations > 1); }
  bool operator==(const AdapterInit&) const = default;
};

/// standard, pissa, loftq, loftq:ITERATIONS or qera.
inline std::string name(const AdapterInit& init) {
  if (init.standard()) return "standard";
  if (init.kind == AdapterInit::Kind::pissa) return "pissa";
  if (init.kind == AdapterInit::Kind::qera) return "qera";
  return init.iterations == 1 ? "loftq" : "loftq:" + std::to_string(init.iterations);
}

/// What a name stands for, at a rank. Errc::bad_argument for any other text, and beyond 100 iterations.
inline AdapterInit adapter_init(std::string_view text, Index rank) {
  if (text == "standard") return {};
  if (text == "pissa") return {AdapterInit::Kind::pissa, rank, 1};
  if (text == "qera") return {AdapterInit::Kind::qera, rank, 1};
  AdapterInit init{AdapterInit::Kind::loftq, rank, 1};
  constexpr std::string_view counted = "loftq:";
  bool known = text == "loftq";
  if (text.starts_with(counted)) {
    const char* end = text.data() + text.size();
    const auto read = std::from_chars(text.data() + counted.size(), end, init.iterations);
    known = read.ec == std::errc{} && read.ptr == end && init.iterations >= 1 && init.iterations <= 100;
  }
  QDYLORA_EXPECTS(known, bad_argument,
                  "no initial values '" + printable(text) + "'; there are standard, pissa, loftq, loftq:ITERATIONS (1 ... 100) and qera");
  return init;
}

/// Gives an adapter the rows of `initial`, as many as both have: sum_{i < b} of its product becomes delta W_b at every rank b they reach.
/// Both sides take the root of the scale. Rows beyond keep a random A, and B = 0. Errors: shape_mismatch, and unsupported where the scale
/// differs from rank to rank, so that no rows are right at two of them, and with a magnitude, which begins as the base's.
template <class S, MemoryResource Memory, class Backend>
void begin_with(LoRAAdapter<S, Memory>& adapter, const LowRank<S, Memory>& initial, const Backend& backend) {
  const std::string& name = adapter.options().name;
  QDYLORA_EXPECTS(adapter.options().scale == ScalePolicy::constant, unsupported,
                  name + ": initial values need the scale " + std::string(qdylora::name(ScalePolicy::constant)) + ", found " +
                      std::string(qdylora::name(adapter.options().scale)));
  QDYLORA_EXPECTS(!adapter.dora(), unsupported, name + ": initial values do not go with a magnitude");
  expect_shape((name + ": initial A").c_str(), initial.a.view(), initial.rank(), adapter.in());
  expect_shape((name + ": initial B").c_str(), initial.b.view(), initial.rank(), adapter.out());
  const Index rows = std::min(initial.rank(), adapter.max_rank());
  const S factor = S{1} / std::sqrt(adapter.scale(adapter.max_rank()));
  const auto put = [&](MatrixView<const S> from, MatrixView<S> to) {
    const std::vector<S> factors(static_cast<std::size_t>(from.cols), factor);
    backend.scale_columns(from.top_rows(rows), std::span<const S>(factors), to.top_rows(rows));
  };
  put(initial.a.view(), adapter.a().value.view());
  put(initial.b.view(), adapter.b().value.view());
  backend.synchronize();  // the factors are given back
}

namespace detail {

/// Makes rows from `first` on of an adapter of scale 1 the terms factors[i] * b[i, :]^T a[i, :] of its update.
template <class S>
void put_terms(LoRAAdapter<S>& adapter, Index first, MatrixView<const S> a, MatrixView<const S> b, std::span<const S> factors) {
  const MatrixView<S> to_a = adapter.a().value.view(), to_b = adapter.b().value.view();
  for (Index i = 0; i < a.rows; ++i) {
    for (Index j = 0; j < a.cols; ++j) to_a(first + i, j) = a(i, j);
    for (Index j = 0; j < b.cols; ++j) to_b(first + i, j) = factors[static_cast<std::size_t>(i)] * b(i, j);
  }
}

}  // namespace detail

/// What an adapter that began with `initial`, on a base that is the weight without it, is to the weight itself: an adapter of rank
/// rank + initial.rank(), and scale 1, whose update at full rank is delta W_b - B0^T A0 (PEFT's path_initial_model_for_weight_conversion).
/// At rank 0 it only takes `initial` away. Errors: rank_range, shape_mismatch, unsupported with a magnitude or a bias; bad_argument where both ranks
/// are 0.
template <class S>
LoRAAdapter<S> update_of_weight(const LoRAAdapter<S>& adapter, Index rank, const LowRank<S>& initial) {
  const auto& options = adapter.options();
  adapter.check_rank(rank);
  QDYLORA_EXPECTS(!adapter.dora() && !adapter.biased(), unsupported, options.name + ": a magnitude or a bias is no part of an update");
  const Index both = rank + initial.rank();
  QDYLORA_EXPECTS(both > 0, bad_argument, options.name + ": rank 0, and no initial values");
  if (initial.rank() > 0) {
    expect_shape((options.name + ": initial A").c_str(), initial.a.view(), initial.rank(), adapter.in());
    expect_shape((options.name + ": initial B").c_str(), initial.b.view(), initial.rank(), adapter.out());
  }
  LoRAAdapter<S> result(adapter.in(), adapter.out(), {.max_rank = both, .alpha = static_cast<float>(both), .name = options.name});
  const auto rows_of = [](const auto& matrix, Index count) { return MatrixView<const S>(matrix.view()).top_rows(count); };
  detail::put_terms<S>(result, 0, rows_of(adapter.a().value, rank), rows_of(adapter.b().value, rank), adapter.coefficients(rank, rank));
  const std::vector<S> taken_away(static_cast<std::size_t>(initial.rank()), S{-1});
  detail::put_terms<S>(result, rank, rows_of(initial.a, initial.rank()), rows_of(initial.b, initial.rank()), taken_away);
  return result;
}

}  // namespace qdylora
