// DoRA (Liu et al. 2024): W + delta W_b gives a row its direction alone; how long it is, is a parameter m [out] of its own.
//
//   y[:, o] = m_o / n_o * x (W_o + D_o)^T,   n_o = |W_o + D_o|,   D = delta W_b       (b = the row's rank)
//
// n is a constant to the gradients (the paper's section 4.3; PEFT does the same):  with e = dy * m / n in place of dy, those of x, A and B
// are a plain adapter's, and dm_o = sum_t dy[t, o] v[t, o] / n_o of the product v = x (W + D)^T. One m serves all ranks, and each rank has
// norms of its own:
//
//   n_o^2 = |W_o|^2 + 2 <D_o, W_o + D_o / 2> = |W_o|^2 + 2 sum_i C[i, o] (A_b W^T + A_b A_b^T C / 2)[i, o],   C = s_b g_b * B_b
//
// so that a pass of training multiplies W with the b rows of A as with b tokens more, and W is never decoded as a whole. m begins as |W_o|:
// at B = 0 the factor is 1 and the output the base's, to the bit. At rank 0 there is no adapter, and no magnitude either. A row of zeros has
// no direction: its factor is 1.
//
// With dropout on the adapter's input, what a factor changes sees the dropped input too, as in PEFT: with x' = dropout(x), f = m / n and
// v = x' (W + D)^T,
//
//   y = x W^T + (f - 1) * x' W^T + f * x' D^T = x W^T + x' D^T + (f - 1) * v
//   dx = dy W + mask(((f - 1) * dy) W + e D),   dm_o = sum_t dy[t, o] v[t, o] / n_o,   A's and B's of e = f * dy and x'
//
// which takes one product with W more, each way. In evaluation x' is x, and both are the same function.
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include <qdylora/backend.hpp>
#include <qdylora/nn/kept.hpp>
#include <qdylora/nn/lora_adapter.hpp>
#include <qdylora/quant/quantize.hpp>

namespace qdylora {

namespace detail::magnitude {

// What a device has operations for (HasMagnitude), on rows [1, out]: those, or loops in the host's memory.

template <class Backend, class S>
void row_norms(const Backend& backend, In<S> squares, In<S> sums, S scale, MatrixView<S> norms) {
  if constexpr (Backend::Memory::host) {
    for (Index o = 0; o < norms.cols; ++o) norms(0, o) = std::sqrt(std::max(squares(0, o) + scale * sums(0, o), S{}));
  } else {
    backend.row_norms(squares, sums, scale, norms);
  }
}
template <class Backend, class S>
void magnitude_factors(const Backend& backend, In<S> m, In<S> norms, S less, MatrixView<S> factors) {
  if constexpr (Backend::Memory::host) {
    for (Index o = 0; o < factors.cols; ++o) factors(0, o) = (norms(0, o) != 0 ? m(0, o) / norms(0, o) : S{1}) - less;
  } else {
    backend.magnitude_factors(m, norms, less, factors);
  }
}
template <class Backend, class S>
void add_over_norms(const Backend& backend, In<S> sums, In<S> norms, MatrixView<S> gradient) {
  if constexpr (Backend::Memory::host) {
    for (Index o = 0; o < gradient.cols; ++o)
      if (norms(0, o) != 0) gradient(0, o) += sums(0, o) / norms(0, o);
  } else {
    backend.add_over_norms(sums, norms, gradient);
  }
}
template <class Backend, class T>
void scale_columns_by(const Backend& backend, In<T> x, In<Accumulator<T>> row, MatrixView<T> y) {
  if constexpr (Backend::Memory::host) backend.scale_columns(x, std::span(row.data, static_cast<std::size_t>(row.cols)), y);
  else backend.scale_columns(x, row, y);
}
template <class Backend, class W, class S>
void row_squares(const Backend& backend, const W& w, MatrixView<S> squares) {
  if constexpr (Backend::Memory::host) {
    Matrix<S> row(1, w.cols);
    for (Index o = 0; o < w.rows; ++o) {
      if constexpr (requires { w.codes; }) dequantize(w, row.view(), o, 0);
      else std::transform(w.row(o), w.row(o) + w.cols, row.data(), [](const auto& value) { return static_cast<S>(value); });
      double sum = 0.0;
      for (const S value : row.span()) sum += static_cast<double>(value) * static_cast<double>(value);
      squares(0, o) = static_cast<S>(sum);
    }
  } else {
    backend.row_squares(w, squares);
  }
}

}  // namespace detail::magnitude

/// The norms of an adapted weight's rows, [1, out], at the ranks of a pass.
template <class S, MemoryResource Memory>
struct RowNormsAt {
  std::map<Index, std::shared_ptr<const Matrix<S, Memory>>> kept;  // the layer's, if it does not train
  std::map<Index, Matrix<S, Memory>> own;                          // the pass's, whose memory stays: a recorded one may write to it

  MatrixView<const S> at(Index rank) const {
    const auto found = kept.find(rank);
    return found != kept.end() ? found->second->view() : own.at(rank).view();
  }
};

/// What a backward pass needs of its forward pass. Empty without magnitude.
template <class T, MemoryResource Memory>
struct MagnitudeContext {
  Matrix<T, Memory> product;                      // v [tokens, out]
  RowNormsAt<Accumulator<T>, Memory> norms = {};  // at each of the plan's ranks

  /// Of one of the plan's ranks: m / n - less, and 1 - less where a row has no direction.
  template <class Adapter, class Backend>
  auto factors(Index rank, const Adapter& adapter, Accumulator<T> less, const Backend& backend) const {
    const auto n = norms.at(rank);
    auto result = temporary<Accumulator<T>>(backend, 1, n.cols);
    detail::magnitude::magnitude_factors(backend, adapter.magnitude().value.view(), n, less, result.view());
    return result;
  }
};

/// The norms of an adapted weight's rows at any rank.
template <class S, MemoryResource Memory>
class RowNorms {
 public:
  /// Of a base [out, in], a Weight.
  template <class Base, class Backend>
  RowNorms(const Base& base, const Backend& backend) : squares_(temporary<S>(backend, 1, base.rows())) {
    base.visit([&](const auto& w) { detail::magnitude::row_squares(backend, w, squares_.view()); });
  }

  /// Where magnitudes begin.
  template <class Adapter, class Backend>
  void begin(Adapter& adapter, const Backend& backend) const {
    detail::magnitude::row_norms(backend, squares_.view(), squares_.view(), S{}, adapter.magnitude().value.view());
  }

  /// `norms` are those of a plan's ranks from now on. With `keep` they are made once since the last forget(), for all passes; several threads
  /// may ask at a time.
  template <class Adapter, class Base, class Backend>
  void find(RowNormsAt<S, Memory>& norms, const RankPlan& plan, Index rows, const Adapter& adapter, const Base& base,
            const Backend& backend, bool keep) const {
    norms.kept.clear();
    std::vector<Index> done;
    plan.for_each_run(rows, [&](Index, Index, Index rank) {
      if (rank == 0 || std::ranges::find(done, rank) != done.end()) return;
      done.push_back(rank);
      const auto into = [&](Matrix<S, Memory>& at_rank) { make(at_rank, rank, adapter, base, backend); };
      if (keep)
        if (auto kept = kept_at(rank).find(backend, into)) {
          norms.kept[rank] = std::move(kept);
          return;
        }
      into(norms.own[rank]);
    });
  }
  void forget() noexcept {
    const std::scoped_lock lock(mutex_);
    for (auto& [rank, kept] : kept_) kept.forget();
  }

 private:
  Kept<Matrix<S, Memory>>& kept_at(Index rank) const {
    const std::scoped_lock lock(mutex_);
    return kept_[rank];
  }

  template <class Adapter, class Base, class Backend>
  void make(Matrix<S, Memory>& norms, Index rank, const Adapter& adapter, const Base& base, const Backend& backend) const {
    const Index out = squares_.cols();
    if (norms.size() == 0) norms = temporary<S>(backend, 1, out);
    const MatrixView<const S> a = adapter.a().value.view().top_rows(rank), b = adapter.b().value.view().top_rows(rank);
    auto coefficients = adapter.coefficients(rank, rank);
    auto gram = temporary<S>(backend, rank, rank), half_gram = temporary<S>(backend, rank, rank);
    auto through = temporary<S>(backend, rank, out), sums = temporary<S>(backend, 1, out);
    base.visit([&](const auto& w) { backend.matmul(a, w, through.view(), Update::overwrite); });
    backend.matmul(a, a, gram.view(), Update::overwrite);
    std::vector<S> halves = coefficients;
    for (S& c : halves) c /= S{2};
    backend.scale_columns(MatrixView<const S>(gram.view()), std::span<const S>(halves), half_gram.view());
    backend.matmul_transposed(MatrixView<const S>(half_gram.view()), b, through.view(), Update::accumulate);
    S scale = adapter.scale(rank);
    if constexpr (Memory::host)
      if (adapter.gated()) {  // else all coefficients are the scale
        scale = S{1};
        for (Index i = 0; i < rank; ++i)
          for (Index o = 0; o < out; ++o) through(i, o) *= coefficients[static_cast<std::size_t>(i)];
      }
    backend.fill(sums.view(), S{});
    backend.column_products(b, MatrixView<const S>(through.view()), sums.view());
    detail::magnitude::row_norms(backend, squares_.view(), sums.view(), S{2} * scale, norms.view());
  }

  Matrix<S, Memory> squares_;  // |W_o|^2, [1, out]
  mutable std::mutex mutex_;
  mutable std::map<Index, Kept<Matrix<S, Memory>>> kept_;
};

/// target [tokens, out] = source * (f - less) of each row's rank, less 0 or 1: f = m / n, and 1 at rank 0.
template <class T, class Memory, class Adapter, class Backend>
void scale_by_factors(In<T> source, const RankPlan& plan, const MagnitudeContext<T, Memory>& context, const Adapter& adapter, int less,
                      MatrixView<T> target, const Backend& backend) {
  plan.for_each_run(source.rows, [&](Index first, Index count, Index rank) {
    const auto from = source.middle_rows(first, count);
    const auto to = target.middle_rows(first, count);
    if (rank == 0) return less == 0 ? backend.copy(from, to) : backend.fill(to, T{});
    const auto factors = context.factors(rank, adapter, static_cast<Accumulator<T>>(less), backend);
    detail::magnitude::scale_columns_by(backend, from, factors.view(), to);
  });
}

/// Each row of w [out, in] times its factor, of [1, out].
template <class S, class Backend>
void scale_weight_rows(In<S> factors, MatrixView<S> w, const Backend& backend) {
  Matrix<S> on_host(1, w.rows);
  backend.download(factors, on_host.view());
  const auto scale = [&](MatrixView<S> rows) {
    for (Index o = 0; o < rows.rows; ++o)
      for (Index k = 0; k < rows.cols; ++k) rows(o, k) *= on_host(0, o);
  };
  if constexpr (Backend::Memory::host) {
    scale(w);
  } else {
    Matrix<S> rows(w.rows, w.cols);
    backend.download(w, rows.view());
    scale(rows.view());
    backend.upload(MatrixView<const S>(rows.view()), w);
    backend.synchronize();  // the host's memory is given back
  }
}

/// dm += sum_t dy[t] v[t] / n.
template <class T, class Memory, class Adapter, class Backend>
void magnitude_gradient(MatrixView<const T> dy, const RankPlan& plan, const MagnitudeContext<T, Memory>& context, Adapter& adapter,
                        const Backend& backend) {
  using S = Accumulator<T>;
  plan.for_each_run(dy.rows, [&](Index first, Index count, Index rank) {
    if (rank == 0) return;
    auto sums = temporary<S>(backend, 1, dy.cols);
    backend.fill(sums.view(), S{});
    backend.column_products(dy.middle_rows(first, count), context.product.view().middle_rows(first, count), sums.view());
    detail::magnitude::add_over_norms(backend, sums.view(), context.norms.at(rank), adapter.magnitude().gradient.view());
    adapter.magnitude().touch(0, 1);
  });
}

}  // namespace qdylora
