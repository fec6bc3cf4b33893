// A base whose precision is drawn for each step, as ranks are: adapters that are to work on any of several bases, which are one model in
// several formats. DyQDyLoRA, the future work that QDyLoRA (Rajabzadeh et al. 2024) names among its limitations.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/core/random.hpp>
#include <qdylora/model/decoder.hpp>

namespace qdylora {

/// Which of `count` bases a step trains on, each as likely as the others: a function of the seed and the step, so that a resumed run, and
/// every worker of a run, takes the one that any other takes.
inline std::size_t drawn_base(std::uint64_t seed, std::int64_t step, std::size_t count) {
  QDYLORA_EXPECTS(count > 0, bad_argument, "drawn_base: there is no base to draw");
  Rng rng(seed, Purpose::base, 0, static_cast<std::uint32_t>(step));
  return static_cast<std::size_t>(rng.below(count));
}

/// Puts the adapters of a model on the linear weights of `base`, the same model in another format, from the next pass on. All else of the
/// model stays as it is. Errc::bad_config for another number of weights, shape_mismatch naming the layer whose weight has another shape or
/// is missing; then nothing has changed.
template <Scalar T, class Backend>
void set_base(Decoder<T, Backend>& model, const typename Decoder<T, Backend>::Weights& base) {
  std::vector<std::shared_ptr<const typename Decoder<T, Backend>::Linear::WeightType>> weights;
  for (const auto& block : base.blocks) weights.insert(weights.end(), block->linear.begin(), block->linear.end());
  std::size_t count = 0;
  std::as_const(model).for_each_linear([&](const auto&) { ++count; });
  QDYLORA_EXPECTS(weights.size() == count, bad_config,
                  "set_base: expected " + std::to_string(count) + " linear weights, found " + std::to_string(weights.size()));
  std::size_t next = 0;
  std::as_const(model).for_each_linear([&](const auto& linear) {
    const auto& weight = weights[next++];
    QDYLORA_EXPECTS(weight && weight->rows() == linear.out() && weight->cols() == linear.in(), shape_mismatch,
                    linear.adapter().options().name + ": expected a base of " + detail::shape_text(linear.out(), linear.in()) + ", found " +
                        (weight ? detail::shape_text(weight->rows(), weight->cols()) : "none"));
  });
  next = 0;
  model.for_each_linear([&](auto& linear) { linear.set_base(weights[next++]); });
}

}  // namespace qdylora
