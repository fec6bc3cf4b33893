// The cells of the GPU's benchmark on the emulated device: all of them run, as graphs, and compute what they say.
#include "../../bench/gpu/cells.cuh"

#include <cmath>
#include <cstdio>
#include <fstream>
#include <map>
#include <memory>
#include <string>

#include <nlohmann/json.hpp>

#include "support/catch.hpp"
#include "support/files.hpp"

namespace bench_test {

namespace qd = qdylora;

TEST_CASE("every cell of the GPU's benchmark runs and is right", "[cuda]") {
  const test::TemporaryFolder folder;
  const auto file = folder / "cells.jsonl";
  {
    const std::unique_ptr<std::FILE, int (*)(std::FILE*)> lines(std::fopen(file.string().c_str(), "w"), std::fclose);
    const qd::CudaContext context({.workspace_bytes = std::size_t{4} << 20});
    const bench::Cells cells(context, {.rounds = 1, .weight_bytes = 1}, lines.get());
    cells.machine();
    cells.ceilings(1 << 16, 64);
    cells.products(256, 256, {1, 20, 300});  // a kernel each
    cells.kernels(256, 256, {20, 40});
    cells.terms(128, 256, {40});
    cells.adapters(256, 256, {1, 20, 300});  // of which the first takes the adapter along
    cells.layers(64, 128, 40);
  }
  std::map<std::string, int> count;
  std::ifstream lines(file);
  for (std::string line; std::getline(lines, line);) {
    CAPTURE(line);
    const auto cell = nlohmann::json::parse(line);
    ++count[cell.contains("op") ? cell.at("op").get<std::string>() : cell.begin().key()];
    for (const char* time : {"us", "appended_us", "added_us"})
      if (cell.contains(time)) CHECK(cell.at(time).get<double>() > 0.0);
    if (cell.contains("error")) {
      const double error = cell.at("error").is_number() ? cell.at("error").get<double>() : std::nan("");
      CHECK(error > 1e-4);
      CHECK(error < 5e-3);
    }
  }
  CHECK(count == std::map<std::string, int>{
                     {"machine", 1}, {"ceiling", 3}, {"forward", 6}, {"backward", 6}, {"kernel", 7}, {"term", 2}, {"adapter", 9}, {"layer", 2}});
}

}  // namespace bench_test
