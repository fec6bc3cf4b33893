// Where the memory of fine-tuning goes, part by part and per parameter of the model (QLoRA's claim of a 65B model on one card of 48 GB):
// planned for models that are published, or planned and measured for one at hand.
//
//   memory                              plans for the shapes of --shapes, on a device of its own
//   memory --model FILE                 plans, then reads the model here, trains two steps on random tokens, and counts
//
// What is measured is what operator new is asked for, as counted below, and the process's largest resident memory. The tables are printed
// in Markdown.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>
#include <vector>

#include <qdylora/io.hpp>
#include <qdylora/model.hpp>

#include "common/cpu_device.hpp"
#include "common/model.hpp"
#include "common/program.hpp"

namespace {

std::atomic<std::size_t> live_bytes{0}, peak_bytes{0};

// A block is preceded by its size and where it begins.
void* counted_new(std::size_t bytes, std::size_t alignment) {
  const std::size_t before = std::max<std::size_t>(alignment, 2 * sizeof(std::size_t));
  const std::size_t whole = (bytes + 2 * before - 1) / before * before;
  auto* block = static_cast<std::byte*>(std::aligned_alloc(before, whole));
  if (block == nullptr) throw std::bad_alloc();
  const std::size_t header[] = {bytes, before};
  std::memcpy(block + before - sizeof(header), header, sizeof(header));
  const std::size_t live = live_bytes += bytes;
  for (std::size_t peak = peak_bytes; peak < live && !peak_bytes.compare_exchange_weak(peak, live);) {
  }
  return block + before;
}

void counted_delete(void* pointer) noexcept {
  if (pointer == nullptr) return;
  std::size_t header[2];
  std::memcpy(header, static_cast<std::byte*>(pointer) - sizeof(header), sizeof(header));
  live_bytes -= header[0];
  std::free(static_cast<std::byte*>(pointer) - header[1]);
}

}  // namespace

void* operator new(std::size_t bytes) { return counted_new(bytes, __STDCPP_DEFAULT_NEW_ALIGNMENT__); }
void* operator new(std::size_t bytes, std::align_val_t alignment) { return counted_new(bytes, static_cast<std::size_t>(alignment)); }
void operator delete(void* pointer) noexcept { counted_delete(pointer); }
void operator delete(void* pointer, std::size_t) noexcept { counted_delete(pointer); }
void operator delete(void* pointer, std::align_val_t) noexcept { counted_delete(pointer); }
void operator delete(void* pointer, std::size_t, std::align_val_t) noexcept { counted_delete(pointer); }

namespace {

using namespace qdylora;
using namespace qdylora::examples;

struct Options {
  std::string model, tokenizer, shapes, base = "nf4", optimizer = "adamw", dtype = "float32";
  Index block_size = 64, rank = 64, batch = 1, seq_len = 512;
  bool plain_scales = false, coded_tables = false, checkpoint = false, paged = false, offload = false;
  int threads = 0;
};

void declare(CLI::App& app, Options& o) {
  auto* model = app.add_option("--model", o.model, "a .gguf file, a Hugging Face folder, or a llama2.c .bin file: plan and measure it")
                    ->check(not_empty());
  app.add_option("--tokenizer", o.tokenizer, "of a .bin model, which is opened with it: llama2.c's")->check(not_empty())->needs(model);
  app.add_option("--shapes", o.shapes, "plan for these, separated by commas; default: all that are known")
      ->check(not_empty())
      ->excludes(model);
  app.add_option("--base-format", o.base, "base weights: nf4, fp4, int4, fp8, bfloat16 or float32")->capture_default_str();
  add_number(app, "--block-size", o.block_size, "weights that share a scale", 32, 4096);
  app.add_flag("--no-double-quant", o.plain_scales, "scales in float32 (nf4 and fp4)");
  auto* coded = app.add_flag("--coded-tables", o.coded_tables,
                             "embedding and head in 8 bits, as GGUF's Q8_0 leaves them; of a model, its file decides");
  add_number(app, "--rank", o.rank, "of adapters on all linear layers", 1, most_rank);
  app.add_option("--optimizer", o.optimizer, "adamw, or adamw8bit: moments in 8 bits")
      ->check(CLI::IsMember({"adamw", "adamw8bit"}))
      ->capture_default_str();
  auto* paged = app.add_flag("--paged", o.paged, "moments in the host's memory, beside the device's");
  auto* checkpoint = app.add_flag("--gradient-checkpointing", o.checkpoint, "keep each block's input alone, and run blocks again");
  auto* offload = app.add_flag("--offload", o.offload, "these inputs in the host's memory, but three")->needs(checkpoint);
  add_number(app, "--batch", o.batch, "sequences in a step", 1, most_batch);
  add_number(app, "--seq-len", o.seq_len, "tokens of a sequence", 2, most_tokens);
  add_number(app, "--threads", o.threads, "0: one for each processor", 0, most_threads);
  add_dtype(app, o.dtype);
  model->excludes(coded)->excludes(paged)->excludes(offload);
}

MemoryOptions memory_options(const Options& o) {
  QDYLORA_EXPECTS(is_block_size(o.block_size), block_size,
                  "--block-size: expected a power of two in 32 ... 4096, found " + std::to_string(o.block_size));
  MemoryOptions m{.base = {.format = base_format(o.base), .double_quant = !o.plain_scales, .block_size = o.block_size},
                  .coded_tables = o.coded_tables,
                  .max_rank = o.rank,
                  .checkpoint = o.checkpoint,
                  .offload_checkpoints = o.offload,
                  .moments_in_8_bits = o.optimizer == "adamw8bit",
                  .paged_moments = o.paged};
  m.tokens = m.scored = o.batch * o.seq_len;
  m.longest = o.seq_len;
  return m;
}

double parameters(const ModelShape& s) {
  return static_cast<double>(s.linear_weights() + s.tables * s.vocab * s.width + s.layers * (s.norms + s.biases) + s.final_norms);
}

// A row of a table: a name, then GB and bytes a parameter of each shape.
void print_row(const std::string& name, const std::vector<double>& bytes, const std::vector<ModelShape>& shapes) {
  std::printf("| %s |", name.c_str());
  for (std::size_t i = 0; i < bytes.size(); ++i) {
    const double own = parameters(shapes[i]);
    std::printf(own < 1e9 ? " %.4f GB, %.3f |" : " %.2f GB, %.3f |", bytes[i] / 1e9, bytes[i] / own);
  }
  std::printf("\n");
}

template <class T>
int plan_shapes(const Options& o) {
  std::vector<std::string> names(std::begin(published_shapes), std::end(published_shapes));
  if (!o.shapes.empty()) names = parse_list("--shapes", o.shapes);
  auto options = memory_options(o);
  options.device = true;
  std::vector<ModelShape> shapes;
  for (const auto& name : names) {
    const auto config = published_shape(name);
    expect_seq_len(o.seq_len, config);
    QDYLORA_EXPECTS(o.rank <= config.width, rank_range, "--rank: " + std::to_string(o.rank) + " is above the width of " + name);
    shapes.push_back(model_shape(config));
  }
  const auto plans = [&](const MemoryOptions& with) {
    std::vector<MemoryPlan> all;
    for (const auto& shape : shapes) all.push_back(memory_plan<T>(shape, with));
    return all;
  };
  const auto totals = [&](const std::string& name, const std::vector<MemoryPlan>& all) {
    std::vector<double> bytes;
    for (const auto& plan : all) bytes.push_back(static_cast<double>(plan.total()));
    print_row(name, bytes, shapes);
  };
  std::printf("| part: GB, bytes a parameter |");
  for (const auto& name : names) std::printf(" %s |", name.c_str());
  std::printf("\n|---|");
  for (std::size_t i = 0; i < names.size(); ++i) std::printf("---|");
  std::printf("\n| parameters, 10^9 |");
  for (const auto& shape : shapes) std::printf(" %.3f |", parameters(shape) / 1e9);
  std::printf("\n");
  const auto own = plans(options);
  for (std::size_t part = 0; part < own.front().parts().size(); ++part) {
    std::vector<double> bytes;
    for (const auto& plan : own) bytes.push_back(static_cast<double>(plan.parts()[part].bytes));
    const auto [name, first, on_device, before] = own.front().parts()[part];
    if (std::any_of(bytes.begin(), bytes.end(), [](double b) { return b > 0.0; }) && !before)
      print_row(std::string(name) + (on_device ? "" : ", on the host"), bytes, shapes);
  }
  totals("**the device's in all**", own);
  auto other = options;
  if (!o.plain_scales) {
    other.base.double_quant = false;
    totals("without double quantization", plans(other));
    other = options;
  }
  other.paged_moments = !o.paged;
  totals(o.paged ? "without paging" : "with paged moments", plans(other));
  other = options;
  other.checkpoint = !o.checkpoint;
  other.offload_checkpoints = false;
  totals(o.checkpoint ? "without checkpointing" : "with checkpointing", plans(other));
  std::vector<double> lora, full;
  for (std::size_t i = 0; i < shapes.size(); ++i) {
    const auto& p = own[i];
    const auto base = static_cast<double>(p.base_codes + p.block_scales + p.nested_scales + p.tables + p.norms);
    lora.push_back(static_cast<double>(p.total()) - base + 2.0 * parameters(shapes[i]));
    full.push_back(12.0 * parameters(shapes[i]));
  }
  print_row("the same with weights in 16 bits (LoRA)", lora, shapes);
  print_row("full fine-tuning: weights and gradients in 16 bits, moments in 32", full, shapes);
  return 0;
}

template <class T, class Optimizer>
int measure(const Options& o, OpenModel& model, const CpuDevice& cpu) {
  const auto base = memory_options(o).base;
  auto options = memory_options(o);
  options.coded_tables = model.coded_tables;
  auto shape = model_shape(model.config);
  shape.biases = model.biases;
  cpu.complete<T>(options, shape);
  const auto plan = memory_plan<T>(shape, options);

  const std::size_t at_first = live_bytes;
  const auto weights = std::exchange(model.read, nullptr)(model.base);
  peak_bytes = live_bytes.load();
  Decoder<T> decoder(weights, {.lora = {.max_rank = o.rank}, .checkpoint = o.checkpoint}, cpu.backend());
  std::size_t values = 0, gradients = 0;
  for (const auto& p : decoder.parameters()) {
    values += p->value.capacity_bytes();
    gradients += p->gradient.capacity_bytes();
  }
  Optimizer optimizer(decoder.parameters(), {}, cpu.backend());
  Rng rng(0, Purpose::data);
  Batch batch;
  for (Index s = 0; s < o.batch; ++s) {
    std::vector<std::int32_t> ids(static_cast<std::size_t>(o.seq_len) + 1);
    for (auto& id : ids) id = static_cast<std::int32_t>(rng.below(static_cast<std::uint64_t>(model.config.vocab)));
    batch.add(ids, 1);
  }
  decoder.set_training(true);
  const std::size_t resident = live_bytes;
  for (int step = 0; step < 2; ++step) {
    optimizer.zero_grad();
    decoder.loss_and_gradient(batch, 1.0 / static_cast<double>(batch.scored()));
    optimizer.step();
  }
  const std::size_t passes = peak_bytes - resident;

  const double own = parameters(shape);
  const auto row = [&](const char* part, std::size_t planned, std::size_t measured) {
    std::printf("| %s | %.3f | %.3f | %.4f |\n", part, static_cast<double>(planned) / 1e6, static_cast<double>(measured) / 1e6,
                static_cast<double>(measured) / own);
  };
  std::printf("%s: %.1f M parameters; linear weights in %s, blocks of %lld; adapters of rank %lld; %lld x %lld tokens, %s, %s%s\n\n",
              model.name.c_str(), own / 1e6, o.base.c_str(), static_cast<long long>(base.block_size), static_cast<long long>(o.rank),
              static_cast<long long>(o.batch), static_cast<long long>(o.seq_len), o.dtype.c_str(), o.optimizer.c_str(),
              o.checkpoint ? ", checkpointing" : "");
  std::printf("| part | planned, MB | measured, MB | measured, bytes a parameter |\n|---|---|---|---|\n");
  row("linear weights: codes, scales, scales of scales", plan.base_codes + plan.block_scales + plan.nested_scales, weights->linear_bytes());
  row("embedding, head", plan.tables, weights->table_bytes());
  row("adapters", plan.adapters, values);
  row("their gradients", plan.gradients, gradients);
  row("moments", plan.moments, optimizer.bytes());
  row("a step: checkpoints, activations, workspace, logits, threads' scratch",
      plan.checkpoints + plan.activations + plan.workspace + plan.logits + plan.backend, passes);
  row("all that is asked for, with norms and biases", plan.total() - plan.process, peak_bytes - at_first);
  row("resident, with the process before the model", plan.total(), cpu.peak());
  std::printf("\nPlanned of a step: checkpoints %.3f MB, activations %.3f, workspace %.3f, logits %.3f, threads' scratch %.3f.\n",
              static_cast<double>(plan.checkpoints) / 1e6, static_cast<double>(plan.activations) / 1e6,
              static_cast<double>(plan.workspace) / 1e6, static_cast<double>(plan.logits) / 1e6, static_cast<double>(plan.backend) / 1e6);
  return 0;
}

template <class T>
int run(const Options& o) {
  if (o.model.empty()) return plan_shapes<T>(o);
  const CpuDevice cpu(o.threads);
  auto model = open_model(o.model, o.tokenizer, memory_options(o).base, cpu.backend());
  expect_seq_len(o.seq_len, model.config);
  QDYLORA_EXPECTS(o.rank <= model.config.width, rank_range,
                  "--rank: " + std::to_string(o.rank) + " is above the model's width of " + std::to_string(model.config.width));
  if (o.optimizer == "adamw8bit") return measure<T, AdamW8bit<T>>(o, model, cpu);
  return measure<T, AdamW<T>>(o, model, cpu);
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app{"Where the memory of fine-tuning goes: planned for published shapes, measured for a model at hand.", "memory"};
  Options options;
  declare(app, options);
  return run_program(app, argc, argv, [&] { return with_dtype(options.dtype, [&]<class T>(std::type_identity<T>) { return run<T>(options); }); });
}
