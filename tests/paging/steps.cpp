// Steps of AdamW with moments, or passes of a decoder with checkpoints, in memory or in files of a folder:
//   steps moments|checkpoints memory|FOLDER      prints a checksum of the parameters, or of their gradients
//   steps moments|checkpoints bytes              what stays in memory in either case, and what goes to the files
#include <cstdio>
#include <exception>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include <qdylora/core/paged_memory.hpp>
#include <qdylora/cpu/cpu.hpp>
#include <qdylora/io/checksum.hpp>
#include <qdylora/model/decoder.hpp>
#include <qdylora/model/memory_plan.hpp>
#include <qdylora/optim/adamw.hpp>

#include "support/tiny_model.hpp"

namespace {

namespace qd = qdylora;
using qd::Index;

struct Bytes {
  std::size_t kept, moved;
};

struct Moments {
  static constexpr Index rows = 64, cols = 32768, parameters = 8;

  static Bytes bytes() {
    constexpr std::size_t values = parameters * rows * cols * sizeof(float);
    return {2 * values, 2 * values};  // and gradients; two moments
  }
  static void run(const qd::PagedMemory& memory, qd::Xxh64& checksum) {
    qd::Parameters<float> all;
    for (Index i = 0; i < parameters; ++i) all.push_back(std::make_shared<qd::Parameter<float>>("p" + std::to_string(i), rows, cols));
    qd::AdamW<float, qd::Cpu, qd::PagedMemory> optimizer{all, {.lr = 0.01}, qd::Cpu(1), memory};
    for (int step = 0; step < 3; ++step) {
      for (const auto& p : all) {
        qd::Rng rng(static_cast<std::uint64_t>(step));
        for (float& g : p->gradient.span()) g = rng.uniform(-1.0f, 1.0f);
        p->touch(0, rows);
      }
      optimizer.step();
    }
    for (const auto& p : all) checksum.update(std::as_bytes(p->value.span()));
  }
};

struct Checkpoints {
  static constexpr Index texts = 40, length = 101, layers = 40;

  static qd::DecoderConfig config() {
    qd::DecoderConfig c;
    c.vocab = 64;
    c.width = c.mlp_width = 128;
    c.layers = layers;
    c.heads = {.heads = 2, .kv_heads = 1, .head_dim = 64};
    c.context = length;
    return c;
  }
  static qd::Batch batch() { return test::random_batch(config().vocab, std::vector<Index>(texts, length), 3); }
  static Bytes bytes() {
    qd::MemoryOptions options;
    options.max_rank = 4;
    options.tokens = batch().tokens();
    options.scored = batch().scored();
    options.longest = length;
    options.checkpoint = options.checkpoints_in_file = true;
    const auto plan = qd::memory_plan<float>(config(), options);
    return {plan.total() - plan.moments, plan.checkpoint_file};
  }
  static void run(const qd::PagedMemory& memory, qd::Xxh64& checksum) {
    qd::Decoder<float> model(test::tiny_weights<float>(config(), false, {}),
                             {.lora = {.max_rank = 4}, .checkpoint = true, .checkpoint_memory = memory}, qd::Cpu(1));
    for (int pass = 0; pass < 2; ++pass) model.loss_and_gradient(batch(), 1.0);
    for (const auto& p : model.parameters()) checksum.update(std::as_bytes(p->gradient.span()));
  }
};

template <class What>
void run(const std::string& where) {
  if (where == "bytes") {
    std::printf("%zu %zu\n", What::bytes().kept, What::bytes().moved);
    return;
  }
  qd::Xxh64 checksum;
  What::run(where == "memory" ? qd::PagedMemory{} : qd::PagedMemory(where), checksum);
  std::printf("%s\n", checksum.hex().c_str());
}

}  // namespace

int main(int argc, char** argv) {
  const std::string what = argc == 3 ? argv[1] : "";
  if (what != "moments" && what != "checkpoints") {
    std::fprintf(stderr, "usage: steps moments|checkpoints bytes|memory|FOLDER\n");
    return 2;
  }
  try {
    what == "moments" ? run<Moments>(argv[2]) : run<Checkpoints>(argv[2]);
  } catch (const std::exception& problem) {
    std::fprintf(stderr, "%s\n", problem.what());
    return 1;
  }
  return 0;
}
