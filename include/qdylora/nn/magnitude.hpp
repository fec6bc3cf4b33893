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
#pragma once

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <mutex>
#include <span>
#include <vector>

#include <qdylora/backend.hpp>
#include <qdylora/nn/lora_adapter.hpp>
#include <qdylora/quant/quantize.hpp>

namespace qdylora {

/// What magnitudes take on top of Backend, in the host's memory: products in the accumulator's type, and columns of activations.
template <class B, class T>
concept HasMagnitude = B::Memory::host && HasQuantizedMatmul<B, Accumulator<T>> && HasGemm<B, Accumulator<T>> &&
    requires(const B b, MatrixView<const T> x, MatrixView<T> y, MatrixView<Accumulator<T>> h, std::span<const Accumulator<T>> factors) {
  b.scale_columns(x, factors, y);  // y[i, j] = x[i, j] * factors[j], which are the host's
  b.column_products(x, x, h);      // h[0, j] += sum_i first[i, j] * second[i, j]
};

/// What a backward pass needs of its forward pass. Empty without magnitude.
template <class T, MemoryResource Memory>
struct MagnitudeContext {
  using Norms = std::shared_ptr<const std::vector<Accumulator<T>>>;  // [out]

  Matrix<T, Memory> product;     // x (W + delta W_b)^T [tokens, out]
  std::map<Index, Norms> norms;  // at each of the plan's ranks

  /// Of one of the plan's ranks: m / n, and 1 where a row has no direction.
  template <class Adapter>
  auto factors(Index rank, const Adapter& adapter) const {
    std::vector<Accumulator<T>> result = *norms.at(rank);
    for (std::size_t o = 0; o < result.size(); ++o) result[o] = result[o] == 0 ? 1 : adapter.magnitude().value.data()[o] / result[o];
    return result;
  }
};

/// The norms of an adapted weight's rows at any rank. In host memory.
template <class S>
class RowNorms {
 public:
  using Norms = std::shared_ptr<const std::vector<S>>;  // [out]

  /// Of a base [out, in], a Weight.
  template <class Base>
  explicit RowNorms(const Base& base) : squares_(static_cast<std::size_t>(base.rows())) {
    Matrix<S> row(1, base.cols());
    base.visit([&](const auto& w) {
      for (Index o = 0; o < base.rows(); ++o) {
        if constexpr (requires { w.codes; }) dequantize(w, row.view(), o, 0);
        else std::transform(w.row(o), w.row(o) + w.cols, row.data(), [](const auto& value) { return static_cast<S>(value); });
        double sum = 0.0;
        for (const S value : row.span()) sum += static_cast<double>(value) * static_cast<double>(value);
        squares_[static_cast<std::size_t>(o)] = static_cast<S>(sum);
      }
    });
  }

  /// Where magnitudes begin.
  template <class Adapter>
  void begin(Adapter& adapter) const {
    std::transform(squares_.begin(), squares_.end(), adapter.magnitude().value.data(), [](S square) { return std::sqrt(square); });
  }

  /// Of each of a plan's ranks. With `keep`, those made since the last forget() are taken again; several threads may ask at a time.
  template <class Adapter, class Base, class Backend>
  std::map<Index, Norms> of(const RankPlan& plan, Index rows, const Adapter& adapter, const Base& base, const Backend& backend,
                            bool keep) const {
    std::map<Index, Norms> result;
    plan.for_each_run(rows, [&](Index, Index, Index rank) {
      if (rank == 0 || result.contains(rank)) return;
      if (!keep) {
        result[rank] = make(rank, adapter, base, backend);
        return;
      }
      const std::scoped_lock lock(mutex_);
      Norms& kept = kept_[rank];
      if (!kept) kept = make(rank, adapter, base, backend);
      result[rank] = kept;
    });
    return result;
  }
  void forget() noexcept { kept_.clear(); }

 private:
  template <class Adapter, class Base, class Backend>
  Norms make(Index rank, const Adapter& adapter, const Base& base, const Backend& backend) const {
    const auto a = adapter.a().value.view().top_rows(rank), b = adapter.b().value.view().top_rows(rank);
    const auto coefficients = adapter.coefficients(rank, rank);
    Matrix<S> c(rank, b.cols), gram(rank, rank), through(rank, b.cols), sums(1, b.cols);
    backend.matmul(a, a, gram.view(), Update::overwrite);
    for (Index i = 0; i < rank; ++i) {
      for (Index o = 0; o < b.cols; ++o) c(i, o) = coefficients[static_cast<std::size_t>(i)] * b(i, o);
      for (Index j = 0; j < rank; ++j) gram(i, j) /= S{2};
    }
    const MatrixView<const S> scaled = c.view(), half_gram = gram.view();
    base.visit([&](const auto& w) { backend.matmul(a, w, through.view(), Update::overwrite); });
    backend.matmul_transposed(half_gram, scaled, through.view(), Update::accumulate);
    backend.column_products(scaled, MatrixView<const S>(through.view()), sums.view());
    auto norms = std::make_shared<std::vector<S>>(squares_);
    for (std::size_t o = 0; o < norms->size(); ++o) (*norms)[o] = std::sqrt(std::max((*norms)[o] + S{2} * sums.span()[o], S{}));
    return norms;
  }

  std::vector<S> squares_;  // |W_o|^2
  mutable std::mutex mutex_;
  mutable std::map<Index, Norms> kept_;
};

/// target [tokens, out] = source * m / n of each row's rank; rows of rank 0 as they are.
template <class T, class Memory, class Adapter, class Backend>
void scale_outputs(In<T> source, const RankPlan& plan, const MagnitudeContext<T, Memory>& context, const Adapter& adapter,
                   MatrixView<T> target, const Backend& backend) {
  plan.for_each_run(source.rows, [&](Index first, Index count, Index rank) {
    const auto from = source.middle_rows(first, count);
    const auto to = target.middle_rows(first, count);
    if (rank == 0) return backend.copy(from, to);
    const auto factors = context.factors(rank, adapter);
    backend.scale_columns(from, std::span(factors), to);
  });
}

/// dm += sum_t dy[t] v[t] / n.
template <class T, class Memory, class Adapter, class Backend>
void magnitude_gradient(MatrixView<const T> dy, const RankPlan& plan, const MagnitudeContext<T, Memory>& context, Adapter& adapter,
                        const Backend& backend) {
  using S = Accumulator<T>;
  plan.for_each_run(dy.rows, [&](Index first, Index count, Index rank) {
    if (rank == 0) return;
    Matrix<S> sums(1, dy.cols);
    backend.column_products(dy.middle_rows(first, count), context.product.view().middle_rows(first, count), sums.view());
    const std::vector<S>& norms = *context.norms.at(rank);
    for (Index o = 0; o < dy.cols; ++o)
      if (const S n = norms[static_cast<std::size_t>(o)]; n != 0) adapter.magnitude().gradient(0, o) += sums(0, o) / n;
    adapter.magnitude().touch(0, 1);
  });
}

}  // namespace qdylora
