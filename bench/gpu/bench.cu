// Products, layers and ceilings of one GPU (cells.cuh), a line of JSON a cell on stdout.
//
//   gpu_bench [--bitsandbytes LIBRARY] [--quick] [--rounds N] [--only ceilings|products|kernels|adapters|layers]
#include <algorithm>
#include <array>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include "cells.cuh"

namespace {

namespace qd = qdylora;
using bench::Options;
using qd::Index;

constexpr std::array<const char*, 5> parts = {"ceilings", "products", "kernels", "adapters", "layers"};

struct Arguments {
  Options options;
  std::string only;  // empty: all

  bool has(const char* part) const { return only.empty() || only == part; }
};

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  Options& options = arguments.options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto value = [&] {
      if (i + 1 >= argc) throw qd::Error(qd::Errc::bad_argument, argument + ": expected a value");
      return std::string(argv[++i]);
    };
    if (argument == "--bitsandbytes") options.bitsandbytes = value();
    else if (argument == "--rounds") options.rounds = std::max(1, std::stoi(value()));
    else if (argument == "--quick") options.quick = true;
    else if (argument == "--only") arguments.only = value();
    else throw qd::Error(qd::Errc::bad_argument, "unknown option " + argument);
  }
  if (!arguments.only.empty() && std::find(parts.begin(), parts.end(), arguments.only) == parts.end())
    throw qd::Error(qd::Errc::bad_argument, "--only " + arguments.only + ": expected ceilings, products, kernels, adapters or layers");
  return arguments;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Arguments arguments = parse(argc, argv);
    const Options& options = arguments.options;
    if (!bench::device_there()) return 77;
    const qd::CudaContext context;
    const bench::Cells cells(context, options);
    cells.machine();
    if (arguments.has("ceilings")) cells.ceilings();
    // Linear layers of LLaMA 7B, 13B and 65B, alone and fused, and of Falcon-40b.
    std::vector<std::pair<Index, Index>> shapes = {{4096, 4096},  {11008, 4096}, {4096, 11008}, {12288, 4096}, {22016, 4096},
                                                   {5120, 5120},  {13824, 5120}, {5120, 13824}, {8192, 8192},  {22016, 8192},
                                                   {8192, 22016}, {9216, 8192},  {32768, 8192}, {8192, 32768}};
    std::vector<Index> tokens = {1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096};
    if (options.quick) {
      shapes = {{4096, 4096}, {11008, 4096}};
      tokens = {1, 16, 128};
    }
    for (const auto& [out, in] : shapes) {  // what is cut off has whole shapes
      if (arguments.has("adapters")) cells.adapters(out, in, {1, 16, 128});
      if (arguments.has("layers")) cells.layers(out, in, options.quick ? 256 : 2048);
      if (arguments.has("products")) cells.products(out, in, tokens);
    }
    if (arguments.has("kernels")) {
      const qd::CudaContext in_turns({.overlap_slabs = false});
      Options alone = options;
      alone.bitsandbytes.clear();
      const bench::Cells slabs_in_turns(in_turns, alone);
      if (!options.quick) tokens = {16, 32, 64, 128, 256, 512, 1024, 4096};
      for (const auto& [out, in] : shapes)
        if (out == in)
          for (const auto* each : {&cells, &slabs_in_turns}) each->kernels(out, in, tokens);
      for (const auto& [out, in] : shapes) cells.terms(out, in, options.quick ? std::vector<Index>{128} : std::vector<Index>{512, 2048});
    }
    return cells.has_peer() || options.bitsandbytes.empty() ? 0 : 3;
  } catch (const qd::Error& error) {
    std::fprintf(stderr, "gpu_bench: %s\n", error.what());
    return 2;
  }
}
