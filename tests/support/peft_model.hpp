// A model with an adapter of PEFT's, and a text to see its logits on.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include <qdylora/io/peft.hpp>
#include <qdylora/model/batch.hpp>

#include "support/catch.hpp"

namespace test {

/// Gives the linear layers of a model the modules of an adapter, each of which must be one's.
template <class Model>
void put_adapter(const qdylora::PeftAdapter& adapter, Model& model) {
  std::size_t used = 0;
  model.for_each_linear([&](auto& linear) {
    const auto* module = adapter.find(linear.adapter().options().name);
    if (module == nullptr) return;
    qdylora::assign(*module, linear.adapter());
    ++used;
  });
  REQUIRE(used == adapter.modules.size());
}

/// One text of which no position is scored.
inline qdylora::Batch unscored_batch(std::vector<std::int32_t> ids) {
  qdylora::Batch batch;
  batch.ids = std::move(ids);
  batch.targets.assign(batch.ids.size(), -1);
  batch.offsets.push_back(batch.tokens());
  return batch;
}

}  // namespace test
