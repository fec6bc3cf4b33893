// What an adapter's pair A [r, in], B [r, out] does with a batch whose rows have ranks: products in which a row costs what its own rank
// costs, coefficients, gradients of gates, second moments, and which rows have learned. Shared by the layers that hold a LoRAAdapter.
//   x [tokens, features], u [tokens, b], W [r, features]; b = the plan's largest rank
#pragma once

#include <algorithm>
#include <span>

#include <qdylora/backend.hpp>
#include <qdylora/nn/add_if_finite.hpp>
#include <qdylora/nn/lora_adapter.hpp>

namespace qdylora::detail {

/// Whether the runs of a plan are all long enough to be worth products of their own, so that a row costs what its own rank costs. Else
/// they are computed together at the largest rank.
inline bool by_run(const RankPlan& plan) {
  return !plan.is_uniform() &&
         std::all_of(plan.runs().begin(), plan.runs().end(), [](const auto& run) { return run.rank == 0 || run.rows >= 16; });
}

/// f(first row, rows, rank) for each part of a batch to be computed at one rank. Rows of rank 0 are in none: adding the adapter's zeros
/// would turn -0 into +0.
template <class F>
void for_each_part(const RankPlan& plan, Index rows, F&& f) {
  const bool apart = by_run(plan);
  Index begin = 0, end = 0;
  const auto flush = [&] {
    if (begin < end) f(begin, end - begin, plan.max_rank());
  };
  plan.for_each_run(rows, [&](Index first, Index count, Index rank) {
    if (rank == 0) flush();
    else if (apart) f(first, count, rank);
    if (rank == 0 || apart) begin = first + count;
    end = first + count;
  });
  flush();
}

/// out [tokens, b] = x W^T, in each row up to its rank at least.
template <class Backend, class T, class S>
void through_ranks(const Backend& backend, MatrixView<const T> x, MatrixView<const S> w, const RankPlan& plan, MatrixView<S> out) {
  if (!by_run(plan)) {
    backend.matmul(x, w.top_rows(plan.max_rank()), out, Update::overwrite);
    return;
  }
  backend.fill(out, S{});
  for_each_part(plan, x.rows, [&](Index first, Index count, Index rank) {
    backend.matmul(x.middle_rows(first, count), w.top_rows(rank), out.middle_rows(first, count).left_cols(rank), Update::overwrite);
  });
}

/// y [tokens, features] += u W; u is zero in each row from its rank on.
template <class Backend, class S, class T>
void add_from_ranks(const Backend& backend, MatrixView<const S> u, MatrixView<const S> w, const RankPlan& plan, MatrixView<T> y) {
  for_each_part(plan, u.rows, [&](Index first, Index count, Index rank) {
    backend.matmul_transposed(u.middle_rows(first, count).left_cols(rank), w.top_rows(rank), y.middle_rows(first, count),
                              Update::accumulate);
  });
}

/// gradient [r, features] += u^T x
template <class Backend, class S, class T>
void add_rank_gradient(const Backend& backend, MatrixView<const S> u, MatrixView<const T> x, const RankPlan& plan, MatrixView<S> gradient) {
  for_each_part(plan, x.rows, [&](Index first, Index count, Index rank) {
    backend.weight_gradient(u.middle_rows(first, count).left_cols(rank), x.middle_rows(first, count), gradient.top_rows(rank),
                            Update::accumulate);
  });
}

/// target = source * coefficients of each row's rank. For gradients under GradientRows::last_row only column b - 1 stays.
template <class Backend, class S, class Memory>
void scale_by_rank(const Backend& backend, const LoRAAdapter<S, Memory>& adapter, MatrixView<const S> source, const RankPlan& plan,
                   MatrixView<S> target, bool for_gradient) {
  plan.for_each_run(source.rows, [&](Index first, Index count, Index rank) {
    auto coefficients = adapter.coefficients(rank, source.cols);
    if (for_gradient && adapter.options().gradient_rows == GradientRows::last_row)
      for (Index i = 0; i + 1 < rank; ++i) coefficients[static_cast<std::size_t>(i)] = S{};
    backend.scale_columns(source.middle_rows(first, count), std::span<const S>(coefficients), target.middle_rows(first, count));
  });
}

/// Gradients of an adapter's gates, of z = x A^T and t = dy B^T.
template <class Backend, class S, class Memory>
void add_gate_gradients(const Backend& backend, LoRAAdapter<S, Memory>& adapter, const RankPlan& plan, MatrixView<const S> z,
                        MatrixView<const S> t) {
  plan.for_each_run(t.rows, [&](Index first, Index count, Index rank) {
    const Index row = adapter.gate_row(rank);
    if (row < 0) return;
    Matrix<S, Memory> sums(1, t.cols);
    backend.column_products(z.middle_rows(first, count), t.middle_rows(first, count), sums.view());
    const S s = adapter.scale(rank);
    for (Index i = 0; i < rank; ++i) adapter.gates().gradient(row, i) += s * sums(0, i);
    adapter.gates().touch(row, row + 1);
  });
}

/// Adds to an adapter's second moments those of z and t. The optimizer skips a step that is not finite; the moments must not keep it either.
template <class Backend, class S, class Memory>
void collect_moments(const Backend& backend, LoRAAdapter<S, Memory>& adapter, MatrixView<const S> z, MatrixView<const S> t) {
  const Index width = t.cols;
  const auto part = [width](Matrix<S, Memory>& moment) { return moment.view().top_rows(width).left_cols(width); };
  auto more_a = temporary<S>(backend, width, width), more_b = temporary<S>(backend, width, width);
  exact(backend).weight_gradient(z, z, more_a.view(), Update::overwrite);
  exact(backend).weight_gradient(t, t, more_b.view(), Update::overwrite);
  add_if_finite(backend, MatrixView<const S>(more_a.view()), part(adapter.moment_a), MatrixView<const S>(more_b.view()), part(adapter.moment_b));
}

/// Marks the rows of A and B that a pass by this plan gave gradients to.
template <class S, class Memory>
void touch_ranks(LoRAAdapter<S, Memory>& adapter, const RankPlan& plan) {
  plan.for_each_run(plan.is_uniform() ? 1 : plan.rows(), [&](Index, Index count, Index rank) {
    if (rank == 0 || count == 0) return;
    const Index first = adapter.options().gradient_rows == GradientRows::last_row ? rank - 1 : 0;
    adapter.a().touch(first, rank);
    adapter.b().touch(first, rank);
  });
}

}  // namespace qdylora::detail
