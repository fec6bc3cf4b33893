// Looks at PEFT adapters, cuts them, adds them up, and makes them into files for llama.cpp.
//
//   adapter info DIR
//   adapter truncate DIR --rank b OUT    keeps the first b rows: for adapters trained to be cut; bottlenecks too
//   adapter resize DIR --rank b OUT      re-orders B.A by singular values, then cuts: for any adapter
//   adapter sum DIR DIR ... --weights w,w,... OUT    their weighted sum, of all their ranks together: resize cuts it
//   adapter gguf DIR --rank b --model MODEL.gguf OUT.gguf    for llama.cpp (--lora OUT.gguf), on the same base model
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <deque>
#include <filesystem>
#include <map>
#include <string>
#include <vector>

#include <qdylora/io.hpp>
#include <qdylora/model/load_gguf.hpp>
#include <qdylora/nn/reorder.hpp>
#include <qdylora/nn/weighted_sum.hpp>

#include "common/program.hpp"

namespace {

using namespace qdylora;
using namespace qdylora::examples;

int info(const std::string& folder) {
  const auto adapter = load_peft_adapter(folder, {.force = true, .changed_base = true, .saved_modules = true});
  Index parameters = 0;
  for (const auto& m : adapter.modules) parameters += m.a.size() + m.b.size() + m.magnitude.size() + m.bias.size();
  for (const auto& whole : adapter.saved.tensors) parameters += whole.value.size();
  std::printf("%s: %zu modules, rank %lld, %.2f M parameters%s%s\n", folder.c_str(), adapter.modules.size(),
              static_cast<long long>(adapter.max_rank()), static_cast<double>(parameters) / 1e6,
              adapter.config.use_dora ? ", DoRA: a magnitude for each output" : "",
              adapter.config.trains_bias ? ", biases that trained" : "");
  if (!adapter.config.base_model.empty()) std::printf("base model %s\n", printable(adapter.config.base_model).c_str());
  if (!adapter.init.standard())
    std::printf("began as %s at rank %lld of a base in %s, which it belongs to\n", name(adapter.init).c_str(),
                static_cast<long long>(adapter.init.rank), printable(adapter.base_format).c_str());
  if (!adapter.ranks.empty()) {
    std::printf("trained for ranks");
    for (const Index rank : adapter.ranks) std::printf(" %lld", static_cast<long long>(rank));
    std::printf("\n");
  }
  std::printf("%-44s %6s %6s %5s %8s  %s\n", "module", "in", "out", "rank", "alpha/r", "share of |B.A| in the first 1, 2, 4 ... rows");
  std::size_t broken = 0;
  for (const auto& m : adapter.modules) {
    std::printf("%-44s %6lld %6lld %5lld %8.4g ", printable(m.name, 44).c_str(), static_cast<long long>(m.in()),
                static_cast<long long>(m.out()), static_cast<long long>(m.rank()), m.alpha / static_cast<double>(m.rank()));
    // |sum_{i < b} B_i^T A_i|^2 = sum_{i, j < b} (A_i . A_j)(B_i . B_j)
    const auto a = as_eigen(m.a.view()).cast<double>().eval();
    const auto b = as_eigen(m.b.view()).cast<double>().eval();
    const auto gram = ((a * a.transpose()).array() * (b * b.transpose()).array()).eval();
    const double whole = gram.sum();
    if (!std::isfinite(whole)) {
      std::printf(" NOT FINITE: NaN or infinity in A or B\n");
      ++broken;
      continue;
    }
    for (Index rank = 1; rank <= m.rank(); rank *= 2)
      std::printf(" %.2f", whole > 0.0 ? std::sqrt(std::max(0.0, gram.topLeftCorner(rank, rank).sum() / whole)) : 0.0);
    std::printf("\n");
  }
  for (const auto& whole : adapter.saved.tensors)
    std::printf("%-44s %6lld %6lld whole\n", printable(whole.name, 44).c_str(), static_cast<long long>(whole.value.cols()),
                static_cast<long long>(whole.value.rows()));
  if (broken > 0) std::printf("%zu of %zu modules are not finite; no program can use this adapter\n", broken, adapter.modules.size());
  return 0;
}

int cut(const std::string& folder, Index rank, const std::string& out, bool reordered) {
  expect_no_overwrite(folder, out);
  const bool bottleneck = !reordered && is_bottleneck_adapter(folder);
  const auto source =
      bottleneck ? load_bottleneck_adapter(folder) : load_peft_adapter(folder, {.changed_base = true, .saved_modules = true});
  QDYLORA_EXPECTS(rank >= 1 && rank <= source.max_rank(), rank_range,
                  "--rank " + std::to_string(rank) + ": the adapter has ranks 1 ... " + std::to_string(source.max_rank()));
  std::vector<LoRAAdapter<float>> adapters;
  std::vector<NamedAdapter> named;
  adapters.reserve(source.modules.size());
  for (const auto& module : source.modules) {
    adapters.push_back(to_adapter(module));
    if (reordered) {
      // The product at full rank is what is cut, so its scale must not change with the rank.
      auto& options = adapters.back().options();
      options.alpha = adapters.back().scale(module.rank()) * static_cast<float>(module.rank());
      options.scale = ScalePolicy::constant;
      reorder(adapters.back(), Reordering::svd);
    }
    named.push_back({module.name, &adapters.back(), 0});
  }
  const PeftOptions options{.rank = rank,
                            .base_model = source.config.base_model,
                            .task_type = source.config.task_type,
                            .ranks = source.ranks,
                            .init = source.init,
                            .base_format = source.base_format,
                            .saved = &source.saved,
                            .fan_in_fan_out = source.config.fan_in_fan_out};
  if (bottleneck) save_bottleneck_adapter(out, source.method, named, options);
  else save_peft_adapter(out, named, options);
  std::printf("wrote %s: %zu modules at rank %lld\n", out.c_str(), named.size(), static_cast<long long>(rank));
  return 0;
}

int sum(std::vector<std::string> folders, const std::string& weights_text, Index rank) {
  const auto weights = parse_numbers<float>("--weights", weights_text, true);
  QDYLORA_EXPECTS(folders.size() >= 2, bad_argument, "sum: expected adapter folders and one to write, found one folder");
  const std::string out = folders.back();
  folders.pop_back();
  QDYLORA_EXPECTS(weights.size() == folders.size(), bad_argument,
                  "--weights: " + std::to_string(weights.size()) + " weights for " + std::to_string(folders.size()) + " adapters");
  struct Terms {
    std::deque<LoRAAdapter<float>> adapters;
    std::vector<WeightedAdapter<float>> weighted;
  };
  std::map<std::string, Terms> modules;  // a module counts in those adapters that have it
  PeftConfig config;
  for (std::size_t i = 0; i < folders.size(); ++i) {
    expect_no_overwrite(folders[i], out);
    const auto source = load_peft_adapter(folders[i]);
    QDYLORA_EXPECTS(rank <= source.max_rank(), rank_range,
                    "--rank " + std::to_string(rank) + ": " + folders[i] + " has ranks 1 ... " + std::to_string(source.max_rank()));
    if (i == 0) config = source.config;
    if (config.base_model.empty()) config.base_model = source.config.base_model;
    QDYLORA_EXPECTS(source.config.base_model.empty() || source.config.base_model == config.base_model, bad_argument,
                    folders[i] + ": is of another base model (" + printable(source.config.base_model) + ") than those before it (" +
                        printable(config.base_model) + ")");
    QDYLORA_EXPECTS(source.config.fan_in_fan_out == config.fan_in_fan_out, bad_argument,
                    folders[i] + ": fan_in_fan_out is not that of " + folders[0]);
    for (const auto& module : source.modules) {
      auto& terms = modules[module.name];
      terms.adapters.push_back(to_adapter(module));
      terms.weighted.push_back({&terms.adapters.back(), weights[i], std::min(rank, module.rank())});
    }
  }
  std::deque<LoRAAdapter<float>> sums;
  std::vector<NamedAdapter> named;
  for (const auto& [name, terms] : modules) {
    sums.push_back(weighted_sum<float>(terms.weighted, name));
    named.push_back({name, &sums.back(), 0});
  }
  save_peft_adapter(out, named,
                    {.base_model = config.base_model, .task_type = config.task_type, .fan_in_fan_out = config.fan_in_fan_out});
  std::printf("wrote %s: %zu modules, the sum of %zu adapters\n", out.c_str(), named.size(), folders.size());
  return 0;
}

int to_gguf(const std::string& folder, Index rank, const std::string& model, const std::string& out) {
  for (const auto& in : {folder, model}) expect_no_overwrite(in, out);
  const auto source = load_peft_adapter(folder);
  QDYLORA_EXPECTS(rank >= 0 && rank <= source.max_rank(), rank_range,
                  "--rank " + std::to_string(rank) + ": the adapter has ranks 1 ... " + std::to_string(source.max_rank()));
  QDYLORA_EXPECTS(!source.config.use_dora, unsupported, folder + ": llama.cpp's adapters have no magnitudes (DoRA); merge it instead");
  QDYLORA_EXPECTS(!source.config.trains_bias, unsupported, folder + ": llama.cpp's adapters have no biases; merge it instead");
  const GgufFile base(model);
  const auto config = gguf_config(base);
  std::vector<LoRAAdapter<float>> adapters;
  std::vector<GgufAdapterTensor> tensors;
  adapters.reserve(source.modules.size());
  for (const auto& module : source.modules) {
    const auto tensor = gguf_tensor_of(module.name);
    qdylora::detail::expect_matrix(base, tensor, module.out(), module.in());
    adapters.push_back(to_adapter(module));
    // PEFT's rows are in Hugging Face's rotary layout.
    const bool q = tensor.ends_with("attn_q.weight"), k = tensor.ends_with("attn_k.weight");
    tensors.push_back({tensor, &adapters.back(), q ? config.heads.heads : k ? config.heads.kv_heads : 0});
  }
  save_gguf_adapter(out, tensors, {.rank = rank, .name = std::filesystem::path(folder).filename().string()});
  std::printf("wrote %s: %zu tensors' adapters at rank %lld\n", out.c_str(), tensors.size(),
              static_cast<long long>(rank == 0 ? source.max_rank() : rank));
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Looks at PEFT adapters, cuts them, adds them up, and makes them into files for llama.cpp.", "adapter"};
  app.require_subcommand(1);
  std::string folder, model, weights, out;
  std::vector<std::string> folders;
  Index rank = 0;
  auto* info_command = app.add_subcommand("info", "what a folder holds, and how much of each module its first rows carry");
  info_command->add_option("DIR", folder, "adapter folder")->required()->check(not_empty());
  auto* truncate_command = app.add_subcommand("truncate", "keep the first rows");
  auto* resize_command = app.add_subcommand("resize", "re-order by singular values, then keep the first rows");
  for (auto* command : {truncate_command, resize_command}) {
    command->add_option("DIR", folder, "adapter folder")->required()->check(not_empty());
    command->add_option("--rank", rank, "rows to keep")->required()->check(in_range<Index>(1, most_rank));
    command->add_option("OUT", out, "folder to write")->required()->check(not_empty());
  }
  auto* sum_command = app.add_subcommand("sum", "add up several, each times its weight, as one of all their ranks together");
  sum_command->add_option("DIRS", folders, "adapter folders, and after them the folder to write")->required()->check(not_empty());
  sum_command->add_option("--weights", weights, "of each adapter, separated by commas")->required()->check(not_empty());
  sum_command->add_option("--rank", rank, "rows of each adapter to take; all by default")->check(in_range<Index>(1, most_rank));
  auto* gguf_command = app.add_subcommand("gguf", "write a file for llama.cpp");
  gguf_command->add_option("DIR", folder, "adapter folder")->required()->check(not_empty());
  gguf_command->add_option("--rank", rank, "rows to keep; all by default")->check(in_range<Index>(1, most_rank));
  gguf_command->add_option("--model", model, "the base model, a .gguf file")->required()->check(not_empty());
  gguf_command->add_option("OUT", out, "file to write")->required()->check(not_empty());
  return run_program(app, argc, argv, [&] {
    if (info_command->parsed()) return info(folder);
    if (sum_command->parsed()) return sum(folders, weights, rank);
    if (gguf_command->parsed()) return to_gguf(folder, rank, model, out);
    return cut(folder, rank, out, resize_command->parsed());
  });
}
