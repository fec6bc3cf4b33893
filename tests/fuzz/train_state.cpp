// libFuzzer harness: any bytes as a training checkpoint. See README.md.
#include <cstddef>
#include <cstdint>
#include <span>

#include <qdylora/io/collect.hpp>

#include "fuzz/memory_file.hpp"

namespace qd = qdylora;

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static test::MemoryFile memory;
  memory.set(std::as_bytes(std::span(data, size)));
  try {
    auto state = qd::load_train_state(memory.path());
    qd::LoRAAdapter<float> adapter(2, 3, {.max_rank = 2, .name = "a", .gated_ranks = {1, 2}});
    qd::Rng rng;
    qd::RankSampler ranks(qd::RankSet{1, 2}, rng);
    restore(state, "adapter", adapter);
    restore(state, "rng", rng);
    restore(state, "ranks", ranks);
    state.expect_all_used();
  } catch (const qd::Error&) {
  }
  return 0;
}
