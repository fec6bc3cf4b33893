// DecoderWeights: the weights of a model, as it is read. They stay as they are: what AdapterMethod::full trains are copies.
#pragma once

#include <memory>
#include <vector>

#include <qdylora/model/config.hpp>
#include <qdylora/model/norm.hpp>
#include <qdylora/nn/low_rank.hpp>
#include <qdylora/nn/weight.hpp>
#include <qdylora/quant/binary_code.hpp>

namespace qdylora {

/// Weights of a block. Lists are in the order of DecoderConfig::linears.
template <class Acc, MemoryResource Memory = HostMemory>
struct BlockWeights {
  std::vector<std::shared_ptr<const WeightFor<AnyFormat, Memory>>> linear;  // [out, in]
  std::vector<std::shared_ptr<const BinaryCodedTensor<Memory>>> codes;      // [out, in] too, in their place for AdapterMethod::alpha
  std::vector<Matrix<Acc, Memory>> bias;                                    // [1, out], or empty
  std::vector<LowRank<Acc, Memory>> initial;                                // what adapters begin with, or empty
  NormWeights<Acc, Memory> attention_norm, mlp_norm;                        // mlp_norm is empty where the norm is shared

  explicit BlockWeights(const DecoderConfig& config)
      : linear(config.linears().size()), codes(linear.size()), bias(linear.size()), initial(linear.size()) {}

  /// Bytes of the linear weights.
  std::size_t linear_bytes() const noexcept {
    std::size_t sum = 0;
    for (const auto& w : linear) sum += w ? w->bytes() : 0;
    for (const auto& c : codes) sum += c ? c->bytes() : 0;
    return sum;
  }
};

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
