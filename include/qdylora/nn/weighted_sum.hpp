// One adapter that is the weighted sum of several: rows of all, one after another (PEFT's add_weighted_adapter, combination_type "cat").
#pragma once

#include <cmath>
#include <span>
#include <string>

#include <qdylora/nn/low_rank.hpp>

namespace qdylora {

/// One of the adapters of a sum.
template <class S = float>
struct WeightedAdapter {
  const LoRAAdapter<S>* adapter = nullptr;
  S weight = 1;
  Index rank = 0;  // at which it counts; 0: its largest
};

/// The adapter, of scale 1 and of all ranks together, whose update at full rank is sum_k weight_k * delta W_k, exact but for B's rounding.
/// Its first rows are the first adapter's: cut it only after reorder(). Errors: bad_argument for no adapters and a weight that is not
/// finite, rank_range, shape_mismatch, unsupported for a magnitude or a bias, which is no sum.
template <class S>
LoRAAdapter<S> weighted_sum(std::span<const WeightedAdapter<S>> terms, const std::string& name = "sum") {
  QDYLORA_EXPECTS(!terms.empty() && terms.front().adapter != nullptr, bad_argument, name + ": a sum of no adapters");
  const auto rank_of = [](const WeightedAdapter<S>& term) { return term.rank == 0 ? term.adapter->max_rank() : term.rank; };
  const Index in = terms.front().adapter->in(), out = terms.front().adapter->out();
  Index ranks = 0;
  for (const auto& term : terms) {
    QDYLORA_EXPECTS(term.adapter != nullptr, bad_argument, name + ": a term of a sum has no adapter");
    const auto& own_name = term.adapter->options().name;
    QDYLORA_EXPECTS(std::isfinite(term.weight), bad_argument, own_name + ": its weight in a sum is not finite");
    QDYLORA_EXPECTS(!term.adapter->dora(), unsupported, own_name + ": an adapter with a magnitude is no term of a sum");
    QDYLORA_EXPECTS(!term.adapter->biased(), unsupported, own_name + ": an adapter with a bias is no term of a sum");
    expect_shape((own_name + ": A").c_str(), term.adapter->a().value.view(), term.adapter->max_rank(), in);
    expect_shape((own_name + ": B").c_str(), term.adapter->b().value.view(), term.adapter->max_rank(), out);
    term.adapter->check_rank(rank_of(term));
    ranks += rank_of(term);
  }
  LoRAAdapter<S> sum(in, out, {.max_rank = ranks, .alpha = static_cast<float>(ranks), .name = name});
  Index first = 0;
  for (const auto& term : terms) {
    const Index rank = rank_of(term);
    auto factors = term.adapter->coefficients(rank, rank);
    for (S& factor : factors) factor *= term.weight;
    detail::put_terms<S>(sum, first, term.adapter->a().value.view().top_rows(rank), term.adapter->b().value.view().top_rows(rank), factors);
    first += rank;
  }
  return sum;
}

}  // namespace qdylora
