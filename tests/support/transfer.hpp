#pragma once

#include <utility>

#include <qdylora/core/matrix.hpp>
#include <qdylora/model/reorder_adapters.hpp>

#include "support/catch.hpp"
#include "support/tiny_model.hpp"

namespace test {

/// What a checkpoint keeps, from one run to a new one.
template <class Run>
void transfer(Run& from, Run& to) {
  auto source = all_parameters(from.model), target = all_parameters(to.model);
  REQUIRE(source.size() == target.size());
  for (std::size_t i = 0; i < source.size(); ++i) qdylora::copy(std::as_const(source[i]->value).view(), target[i]->value.view());
  const auto optimizer = [](auto& a, auto& b) {
    for (std::size_t i = 0; i < a.states().size(); ++i) {
      qdylora::copy(std::as_const(a.states()[i].m).view(), b.states()[i].m.view());
      qdylora::copy(std::as_const(a.states()[i].v).view(), b.states()[i].v.view());
      b.states()[i].steps = a.states()[i].steps;
    }
    b.restore_counts(a.step_count(), a.skipped_steps());
  };
  optimizer(from.trainer.optimizer(), to.trainer.optimizer());
  optimizer(from.trainer.gate_optimizer(), to.trainer.gate_optimizer());
  if (from.trainer.collecting()) {
    to.model.for_each_linear([](auto& linear) { linear.adapter().start_collecting(); });
    const auto moments = qdylora::collected_moments(from.model), copies = qdylora::collected_moments(to.model);
    REQUIRE(moments.size() == copies.size());
    for (std::size_t i = 0; i < moments.size(); ++i) qdylora::copy(moments[i], copies[i]);
  }
  to.trainer.restore(from.trainer.state());
}

}  // namespace test
