// ggml's product with a 4-bit weight, which it stores repacked where the type has such a layout for this processor. It quantizes the
// activations to 8 bits itself, inside the product. There is no backward product.
#include "cells.hpp"

#include <memory>

#include <ggml-alloc.h>
#include <ggml-backend.h>
#include <ggml-cpu.h>
#include <ggml.h>

namespace {

using cells::Index;
using cells::size;

struct Free {
  void operator()(ggml_context* p) const { ggml_free(p); }
  void operator()(ggml_backend_buffer* p) const { ggml_backend_buffer_free(p); }
  void operator()(ggml_backend* p) const { ggml_backend_free(p); }
};
using Context = std::unique_ptr<ggml_context, Free>;
using Buffer = std::unique_ptr<ggml_backend_buffer, Free>;
using Backend = std::unique_ptr<ggml_backend, Free>;

Context context(std::size_t tensors, std::size_t graphs, std::size_t nodes) {
  return Context(ggml_init({ggml_tensor_overhead() * tensors + ggml_graph_overhead_custom(nodes, false) * graphs + 4096, nullptr, true}));
}

// The buffer types that only this processor's backend has; the repacking one is among them. The list ends in null.
ggml_backend_buffer_type_t repacking() {
  auto* const device = ggml_backend_dev_by_type(GGML_BACKEND_DEVICE_TYPE_CPU);
  auto* const registry = ggml_backend_dev_backend_reg(device);
  const auto list =
      reinterpret_cast<ggml_backend_dev_get_extra_bufts_t>(ggml_backend_reg_get_proc_address(registry, "ggml_backend_dev_get_extra_bufts"));
  if (list != nullptr)
    for (auto* type = list(device); type != nullptr && *type != nullptr; ++type)
      if (std::string(ggml_backend_buft_name(*type)).find("REPACK") != std::string::npos) return *type;
  return nullptr;
}

void run(const cells::Task& task, ggml_backend_t backend, ggml_type type, const char* kernel, const std::vector<float>& w,
         const std::vector<float>& x) {
  if (task.in % ggml_blck_size(type) != 0) return;
  const auto row_bytes = ggml_row_size(type, task.in);
  std::vector<char> codes(row_bytes * size(task.out));
  const Index fresh = std::min<Index>(task.out, 512);  // rows repeat after these
  ggml_quantize_chunk(type, w.data(), codes.data(), 0, fresh, task.in, nullptr);
  for (auto i = row_bytes * size(fresh); i < codes.size(); ++i) codes[i] = codes[i - row_bytes * size(fresh)];
  std::vector<float> decoded(w.size());
  for (Index n = 0; n < task.out; ++n)
    ggml_get_type_traits(type)->to_float(codes.data() + size(n) * row_bytes, decoded.data() + n * task.in, task.in);
  const cells::Reference reference(task, false, x, decoded);

  const Index count = (task.copies(static_cast<double>(codes.size())) + 15) / 16 * 16;  // whole groups
  const auto weight_context = context(size(count), 0, 0);
  std::vector<ggml_tensor*> weights;
  for (Index i = 0; i < count; ++i) weights.push_back(ggml_new_tensor_2d(weight_context.get(), type, task.in, task.out));
  auto* const buffer_type = repacking();
  if (buffer_type == nullptr) return;
  const Buffer weight_buffer(ggml_backend_alloc_ctx_tensors_from_buft(weight_context.get(), buffer_type));
  ggml_backend_buffer_set_usage(weight_buffer.get(), GGML_BACKEND_BUFFER_USAGE_WEIGHTS);
  for (auto* weight : weights) ggml_backend_tensor_set(weight, codes.data(), 0, codes.size());

  for (const Index tokens : task.tokens) {
    const Index group = task.group(tokens), graph_count = count / group;
    const auto graph_context = context(size(count) + 1, size(graph_count), size(group) + 2);
    const auto input_bytes = 4 * size(tokens * task.in), result_bytes = (4 * size(tokens * task.out) + 127) / 64 * 64;
    // All graphs share one input and one set of results: the products of a group are written side by side.
    const Buffer memory(ggml_backend_alloc_buffer(backend, input_bytes + 64 + size(group) * result_bytes));
    auto* const base = static_cast<char*>(ggml_backend_buffer_get_base(memory.get()));
    auto* const input = ggml_new_tensor_2d(graph_context.get(), GGML_TYPE_F32, task.in, tokens);
    ggml_backend_tensor_alloc(memory.get(), input, base);
    ggml_backend_tensor_set(input, x.data(), 0, input_bytes);
    char* const results = base + (input_bytes + 63) / 64 * 64;
    std::vector<ggml_cgraph*> graphs;
    ggml_tensor* first = nullptr;
    for (Index g = 0; g < graph_count; ++g) {
      graphs.push_back(ggml_new_graph_custom(graph_context.get(), size(group) + 2, false));
      for (Index i = 0; i < group; ++i) {
        auto* const product = ggml_mul_mat(graph_context.get(), weights[size(g * group + i)], input);
        if (first == nullptr) first = product;
        ggml_backend_tensor_alloc(memory.get(), product, results + size(i) * result_bytes);
        ggml_build_forward_expand(graphs.back(), product);
      }
    }
    if (!ggml_backend_supports_op(backend, first)) {
      std::fprintf(stderr, "%s: this ggml has no repacked product for %ld x %ld\n", kernel, static_cast<long>(task.out),
                   static_cast<long>(task.in));
      return;
    }
    const auto time =
        cells::measure(task.seconds, group, [&](Index i) { ggml_backend_graph_compute(backend, graphs[size(i) % graphs.size()]); });
    std::vector<float> y(size(tokens * task.out));
    ggml_backend_tensor_get(first, y.data(), 0, 4 * y.size());
    cells::print_cell(task, kernel, "int8", "forward", tokens, time, reference.error(y.data(), tokens));
  }
}

}  // namespace

int main(int argc, char** argv) {
  const cells::Task task(argc, argv);
  const cells::Others others;
  ggml_log_set(
      [](ggml_log_level level, const char* text, void*) {  // not a line for every weight it repacks
        if (level >= GGML_LOG_LEVEL_WARN && level != GGML_LOG_LEVEL_CONT) std::fputs(text, stderr);
      },
      nullptr);
  cells::print_version("ggml", std::string(ggml_version()) + ", compiled for this processor, g++ " __VERSION__);
  const Backend backend(ggml_backend_cpu_init());
  ggml_backend_cpu_set_n_threads(backend.get(), task.threads);
  const auto w = cells::random_matrix(task.out, task.in, 0.02f, 1), x = cells::random_matrix(task.most_tokens(), task.in, 1.0f, 2);
  run(task, backend.get(), GGML_TYPE_IQ4_NL, "ggml IQ4_NL", w, x);
  run(task, backend.get(), GGML_TYPE_Q4_0, "ggml Q4_0", w, x);
  run(task, backend.get(), GGML_TYPE_Q4_K, "ggml Q4_K", w, x);
  cells::print_others(others);
}
