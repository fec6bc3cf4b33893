// What a model writes token by token, against its own passes over whole texts.
#pragma once

#include <algorithm>
#include <span>
#include <vector>

#include <qdylora/model/generate.hpp>

#include "support/catch.hpp"
#include "support/peft_model.hpp"
#include "support/tiny_model.hpp"

namespace test {

/// A text written over caches at rank 1 is the one that whole passes write.
template <class Model>
void check_generated(Model& model) {
  auto text = random_ids(model.config().vocab, 6, 4);
  const std::vector<std::vector<std::int32_t>> prompts = {text};
  const auto written = qdylora::generate(model, std::span(prompts), qdylora::RankPlan::uniform(1), {.max_tokens = 5});
  for (const std::int32_t id : written.front()) {
    const auto logits = model.logits(unscored_batch(text));
    const auto* last = logits.view().row(logits.rows() - 1);
    CHECK(std::max_element(last, last + logits.cols()) - last == id);
    text.push_back(id);
  }
}

}  // namespace test
