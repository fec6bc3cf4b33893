// DecoderWeights: the frozen part of a model.
#pragma once

#include <memory>
#include <vector>

#include <qdylora/model/block.hpp>
#include <qdylora/model/config.hpp>

namespace qdylora {

/// Several decoders may share one.
template <class Acc, MemoryResource Memory = HostMemory>
struct DecoderWeights {
  DecoderConfig config;
  TableWeight<Acc, Memory> embedding;  // [vocab, width]
  TableWeight<Acc, Memory> head;       // [vocab, width]; empty when tied
  NormWeights<Acc, Memory> final_norm;
  std::vector<std::shared_ptr<const BlockWeights<Acc, Memory>>> blocks;

  /// Bytes of the blocks' linear weights.
  std::size_t linear_bytes() const noexcept {
    std::size_t sum = 0;
    for (const auto& block : blocks) sum += block->linear_bytes();
    return sum;
  }
  std::size_t table_bytes() const noexcept { return embedding.bytes() + head.bytes(); }
};

}  // namespace qdylora
