// KVCache: what a text that is being generated keeps of attention.
#pragma once

#include <vector>

#include <qdylora/core/matrix.hpp>
#include <qdylora/model/config.hpp>

namespace qdylora {

/// Keys and values of one sequence, all layers; room for `capacity` tokens.
template <class T, MemoryResource Memory = HostMemory>
struct KVCache {
  KVCache(const DecoderConfig& config, Index capacity) {
    for (Index i = 0; i < config.layers; ++i) {
      keys.emplace_back(capacity, config.kv_width());
      values.emplace_back(capacity, config.kv_width());
    }
  }
  std::vector<Matrix<T, Memory>> keys, values;
  Index length = 0;
};

}  // namespace qdylora
