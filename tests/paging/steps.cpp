// Steps of AdamW with moments in memory, or in files of a folder:  steps memory|FOLDER.  Prints a checksum of the parameters.
// `steps bytes` prints what parameters with their gradients take, and what their moments take.
#include <cstdio>
#include <exception>
#include <memory>
#include <span>
#include <string>

#include <qdylora/core/paged_memory.hpp>
#include <qdylora/cpu/cpu.hpp>
#include <qdylora/io/checksum.hpp>
#include <qdylora/optim/adamw.hpp>

namespace qd = qdylora;

int main(int argc, char** argv) {
  const std::string where = argc == 2 ? argv[1] : "";
  if (where.empty()) {
    std::fprintf(stderr, "usage: steps bytes | memory | FOLDER\n");
    return 2;
  }
  constexpr qd::Index rows = 64, cols = 32768, parameters = 8;
  constexpr qd::Index bytes = parameters * rows * cols * qd::Index{sizeof(float)};
  if (where == "bytes") {
    std::printf("%lld %lld\n", static_cast<long long>(2 * bytes), static_cast<long long>(2 * bytes));
    return 0;
  }
  try {
    qd::Parameters<float> all;
    for (qd::Index i = 0; i < parameters; ++i) all.push_back(std::make_shared<qd::Parameter<float>>("p" + std::to_string(i), rows, cols));
    qd::AdamW<float, qd::Cpu, qd::PagedMemory> optimizer{all, {.lr = 0.01}, qd::Cpu(1), where == "memory" ? qd::PagedMemory{} : qd::PagedMemory(where)};
    for (int step = 0; step < 3; ++step) {
      for (const auto& p : all) {
        qd::Rng rng(static_cast<std::uint64_t>(step));
        for (float& g : p->gradient.span()) g = rng.uniform(-1.0f, 1.0f);
        p->touch(0, rows);
      }
      optimizer.step();
    }
    qd::Xxh64 checksum;
    for (const auto& p : all) checksum.update(std::as_bytes(p->value.span()));
    std::printf("%s\n", checksum.hex().c_str());
  } catch (const std::exception& problem) {
    std::fprintf(stderr, "%s\n", problem.what());
    return 1;
  }
  return 0;
}
