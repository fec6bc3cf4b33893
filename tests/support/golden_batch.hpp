// Batches of golden models' vectors.
#pragma once

#include <cstdint>

#include <qdylora/model/batch.hpp>

#include "support/golden.hpp"

namespace test {

/// Two sequences of `length` tokens: input_ids, and as targets the labels of the tokens after them.
inline qdylora::Batch golden_batch(const qdylora::SafetensorsFile& io, qdylora::Index length) {
  qdylora::Batch batch;
  batch.ids = load<std::int32_t>(io, "input_ids");
  const auto labels = load<std::int32_t>(io, "labels");
  batch.offsets = {0, length, 2 * length};
  const auto tokens = static_cast<std::size_t>(length);
  for (std::size_t t = 0; t < 2 * tokens; ++t)
    batch.targets.push_back(t % tokens == tokens - 1 || labels[t + 1] < 0 ? -1 : labels[t + 1]);
  return batch;
}

}  // namespace test
