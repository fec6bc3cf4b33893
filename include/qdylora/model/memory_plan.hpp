// The memory plan: what a model, its training and its texts will take, part by part, before anything of it is allocated. Every formula is
// the shape that some class asks memory for: QuantizedTensor, Parameter, moments, Decoder's buffers, KVCache. A test holds them to
// what a counting memory resource sees (tests/model/memory_plan.test.cpp).
#pragma once

#include <algorithm>
#include <cstdio>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/model/base_weight.hpp>
#include <qdylora/model/decoder.hpp>
#include <qdylora/model/model_shape.hpp>
#include <qdylora/model/recipe.hpp>
#include <qdylora/optim/moments.hpp>

namespace qdylora {

/// What memory depends on beside the model's shape.
struct MemoryOptions {
  BaseOptions base = {};
  std::vector<BaseFormat> more_formats = {};  // that the linear weights are kept in as well, where the base is drawn (drawn_base.hpp)
  bool coded_tables = false;  // embedding and head in 8 bits, as GGUF's Q8_0 leaves them

  Index trained_planes = 0;  // by AdapterMethod::alpha, of the planes of base.binary; else 0
  Index max_rank = 8;
  std::vector<Index> ranks = {};  // of each adapter, block by block, where they differ: LayerPatterns
  Index dora_ranks = 0;  // with DoRA, the ranks that it is used at, each of which has norms of its own; 0: plain LoRA
  bool trained_biases = false;  // LoRAOptions::train_bias
  bool dropout = false;
  bool training = true;     // false: forward passes alone, and no optimizer
  bool checkpoint = false;  // DecoderOptions::checkpoint
  bool checkpoints_in_file = false;  // DecoderOptions::checkpoint_memory has a folder: memory has a block's streams at a time
  bool offload_checkpoints = false;  // DecoderOptions has it: to the host's memory, while the arithmetic is a device's
  bool moments_in_8_bits = false;
  bool one_moment = false;       // Lion's, in full
  bool paged_moments = false;    // in the host's memory while the arithmetic is a device's
  bool moments_in_file = false;  // PagedMemory's: memory has those of one parameter at a time
  bool second_moments = false;   // the recipe re-orders by Reordering::gram, which gathers r x r numbers at each side of an adapter
  bool snapshot = false;         // the recipe measures, and keeps the adapters' values meanwhile
  bool resumes = false;          // a run goes on from a state, which is read whole
  bool workers = false;          // one of several (Trainer::join), which gather what they sum in one buffer

  // The largest batches: positions, and those that are scored. Of a training step's micro-batches, and of passes without gradients.
  Index tokens = 0, scored = 0;
  Index forward_tokens = 0, forward_scored = 0;
  Index longest = 0;                    // positions of the longest sequence
  Index sequences = 0, cache_rows = 0;  // generated at once, and the most positions that each has

  bool device = false;            // the backend's memory is not the host's
  std::size_t backend_bytes = 0;  // what the backend works in: a device's workspace, the threads' scratch
  // The most that one of its operations takes beside and gives back: attention, and a weight's gradient, which its layer has temporaries for.
  std::size_t backend_passing = 0, backend_beside_gradient = 0;
  std::size_t process_bytes = 0;  // of the process without a model, measured: code, libraries, tokenizer, data

  /// What a recipe's re-ordering takes.
  void follow(const Recipe& recipe) noexcept {
    const bool midway = recipe.order_at > 0.0 && recipe.order_at < 1.0;
    second_moments = midway && recipe.ordering == Reordering::gram && recipe.collect_steps > 0;
    snapshot = midway && recipe.measure;
  }
};

/// Bytes by part.
struct MemoryPlan {
  std::size_t base_codes = 0;     // linear weights of the blocks, in codes or dense
  std::size_t block_scales = 0;   // of their blocks: bytes under double quantization, else floats
  std::size_t nested_scales = 0;  // of the scales' blocks
  std::size_t tables = 0;         // embedding and head
  std::size_t norms = 0;          // and biases
  std::size_t initial = 0;        // what adapters begin with, where it is made from the weights
  std::size_t adapters = 0;       // or trained scales; by AdapterMethod::full masters of all weights, whose roundings are in base_codes
  std::size_t gradients = 0;
  std::size_t moments = 0;      // of the optimizer, as far as they are in memory
  std::size_t checkpoints = 0;  // the residual stream before each block, and after the last
  std::size_t offloaded = 0;    // those that are in the host's memory beside a device
  std::size_t activations = 0;  // what blocks keep for their backward passes; with checkpointing of one block at a time
  std::size_t reordering = 0;   // second moments and the snapshot
  std::size_t sums = 0;         // gradients, or second moments, on their way between workers
  std::size_t state = 0;        // what a run goes on from, before it trains
  std::size_t workspace = 0;    // temporaries of blocks and layers, positions
  std::size_t logits = 0;       // a chunk of them, and the rows they are made of
  std::size_t caches = 0;       // keys, values and logits of the texts that are generated at once
  std::size_t prompts = 0;      // what generating has of checkpoints and activations
  std::size_t backend = 0;
  std::size_t process = 0;
  std::size_t staging = 0;  // the host's copy of the weights until they have gone up to the device
  std::size_t read = 0;     // by AdapterMethod::full, the weights as they are read, until there are masters; moments come later
  std::size_t file = 0;     // moments on disk; no part of memory
  std::size_t checkpoint_file = 0;  // nor checkpoints there
  bool device = false, paged_moments = false, whole = false;

  struct Part {
    const char* name;
    std::size_t bytes;
    bool on_device;
    bool before = false;  // training begins; it takes that memory then
  };
  std::vector<Part> parts() const {
    return {{whole ? "bfloat16 weights" : "base codes", base_codes, device},
            {"block scales", block_scales, device},
            {"scales of scales", nested_scales, device},
            {"embedding, head", tables, device},
            {"norms, biases", norms, device},
            {"initial values", initial, device},
            {whole ? "master weights" : "adapters", adapters, device},
            {"their gradients", gradients, device},
            {"moments", moments, device && !paged_moments},
            {"checkpoints", checkpoints, device},
            {"offloaded", offloaded, false},
            {"activations", activations, device},
            {"re-ordering", reordering, device},
            {"workers' sums", sums, device},
            {"state as read", state, false, true},
            {"workspace", workspace, device},
            {"logits", logits, device},
            {"caches", caches, device},
            {device ? "device workspace" : "threads' scratch", backend, device},
            {"process", process, false},
            {"weights as read", read, device, true},
            {"upload staging", staging, false, true}};
  }

  /// Texts are generated in memory that the training step had; before it, the state had it.
  std::size_t phases() const noexcept {
    return std::max({checkpoints + activations + reordering, caches > 0 ? prompts + caches : 0, device ? 0 : state});
  }
  /// At most at any time, on the backend's side: the device's memory, or all there is on the host.
  std::size_t total() const noexcept {
    const std::size_t resident = base_codes + block_scales + nested_scales + tables + norms + initial + adapters + gradients + sums;
    const std::size_t training = (device && paged_moments ? 0 : moments) + phases() + workspace + logits;
    return resident + std::max(training, read) + backend + (device ? 0 : process);
  }
  /// The same on the host beside a device.
  std::size_t host_total() const noexcept {
    return device ? process + std::max(staging, (paged_moments ? moments : std::size_t{0}) + std::max(state, offloaded)) : total();
  }

  /// A table in MB (1e6 bytes), a part a line; parts that are zero are left out.
  std::string to_text() const {
    std::string text;
    const auto line = [&](const char* name, std::size_t bytes, const char* note) {
      char buffer[96];
      std::snprintf(buffer, sizeof buffer, "  %-18s %10.1f MB%s\n", name, static_cast<double>(bytes) / 1e6, note);
      text += buffer;
    };
    for (const auto& part : parts())
      if (part.bytes > 0) line(part.name, part.bytes, device && !part.on_device ? "  on the host" : part.before ? "  before training" : "");
    line("at most at once", total(), caches > 0 && checkpoints > 0 ? "  (caches in the place of most checkpoints and activations)" : "");
    if (device) line("and on the host", host_total(), "");
    if (file > 0) line("moments in a file", file, "  on disk");
    if (checkpoint_file > 0) line("checkpoint files", checkpoint_file, "  on disk");
    return text;
  }
};

/// Before anything of the plan is allocated, on a device whose workspace is there already. Throws Errc::memory, with the plan, where less
/// is free than the rest of it takes.
template <class Backend>
  requires requires(const Backend backend) { backend.free_memory(); }
void expect_room(const MemoryPlan& plan, const Backend& backend) {
  const std::size_t needed = plan.total() - plan.backend, free = backend.free_memory();
  const auto megabytes = [](std::size_t bytes) { return std::to_string((bytes + 999'999) / 1'000'000) + " MB"; };
  QDYLORA_EXPECTS(needed <= free, memory,
                  "too little memory on the device: " + megabytes(needed) + " are needed beside its workspace, " + megabytes(free) +
                      " are free. The plan:\n" + plan.to_text());
}

namespace detail {

struct CodedBytes {
  std::size_t codes = 0, scales = 0, nested = 0;
};

/// Of a weight [rows, cols] (quant/quantized_tensor.hpp, quant/binary_code.hpp).
constexpr CodedBytes coded_bytes(Index rows, Index cols, const BaseOptions& base) {
  const auto bytes = [](Index n) { return static_cast<std::size_t>(n); };
  const Index count = rows * cols;
  if (base.binary) {
    const BinaryCodeShape shape{rows, cols, base.binary->planes, base.binary->group_size};
    return {bytes(shape.planes * rows * shape.row_bytes()), bytes(4 * shape.planes * rows * shape.groups()), 0};
  }
  if (base.format == BaseFormat::float32) return {bytes(4 * count), 0, 0};
  if (base.format == BaseFormat::bfloat16) return {bytes(2 * count), 0, 0};
  const Index blocks = (count + base.block_size - 1) / base.block_size;
  const Index codes = base.format == BaseFormat::fp8 ? code_bytes<FP8E4M3>(count) : code_bytes<NF4>(count);
  const bool four_bit_float = base.format == BaseFormat::nf4 || base.format == BaseFormat::fp4;
  if (four_bit_float && !base.double_quant) return {bytes(codes), bytes(4 * blocks), 0};
  const Index nested = DoubleQuant<>::nested_block_size;
  return {bytes(codes), bytes(blocks), bytes(4 * div_up(blocks, nested))};
}

}  // namespace detail

/// T is the type of activations.
template <Scalar T>
MemoryPlan memory_plan(const ModelShape& s, const MemoryOptions& o) {
  constexpr auto t = static_cast<Index>(sizeof(T)), acc = static_cast<Index>(sizeof(Accumulator<T>));
  const auto bytes = [](Index n) { return static_cast<std::size_t>(n); };
  const Index adapters = static_cast<Index>(s.adapted.size());
  QDYLORA_EXPECTS(o.ranks.empty() || static_cast<Index>(o.ranks.size()) == s.layers * adapters, bad_argument,
                  "memory_plan: ranks of " + std::to_string(o.ranks.size()) + " adapters, the model has " +
                      std::to_string(s.layers * adapters));
  const Index rank = adapters == 0 ? 0 : o.ranks.empty() ? o.max_rank : *std::ranges::max_element(o.ranks);
  MemoryPlan plan;
  plan.device = o.device;
  plan.paged_moments = o.paged_moments;
  plan.whole = s.whole;
  const bool dora = o.dora_ranks > 0;
  std::vector<BaseOptions> bases(1 + o.more_formats.size(), o.base);
  for (std::size_t i = 0; i < o.more_formats.size(); ++i) bases[i + 1].format = o.more_formats[i];
  const bool in_four_bits = o.base.format == BaseFormat::nf4 || o.base.format == BaseFormat::fp4 || o.base.format == BaseFormat::int4;
  const bool rounds_factors = o.device && t < acc && in_four_bits && !dora;  // A and B to T, for products that take them along
  Index widest_out = 0, in_sum = 0;
  std::size_t largest = 0;  // moments of a parameter
  for (const auto& [name, out, in] : s.linears) {
    for (const BaseOptions& base : bases) {
      const auto weight = detail::coded_bytes(out, in, base);
      plan.base_codes += bytes(s.layers) * weight.codes;
      plan.block_scales += bytes(s.layers) * weight.scales;
      plan.nested_scales += bytes(s.layers) * weight.nested;
    }
  }
  const auto add_moments = [&](Index count, Index rows, Index cols) {  // of as many parameters
    if (!o.training) return;
    const bool coded = o.moments_in_8_bits && !o.one_moment && rows * cols >= BlockwiseMoments<HostMemory>::least_elements;
    const auto moments = bytes(rows * (o.one_moment ? 1 : 2) * (coded ? cols + 4 * Moments8View::blocks(cols) : acc * cols));
    plan.moments += bytes(count) * moments;
    largest = std::max(largest, moments);
  };
  // Numbers in A and B, their rows, and numbers in second moments. In z: of all blocks after the first; of the first, or of any that takes
  // its context in passes without gradients; of a context that all blocks share. Bytes of a token that a backward pass gives back.
  const Index tokens = o.training ? o.tokens : 0, most = std::max(tokens, o.forward_tokens);
  Index numbers = 0, adapter_rows = 0, squares = 0, later_z = 0, first_z = 0, shared_z = 0, given_back = 0;
  Index most_rounded = 0;  // numbers of a layer's A and B
  for (Index i = 0; i < adapters; ++i) {
    const auto& [name, out, in] = s.adapted[static_cast<std::size_t>(i)];
    const auto rank_of = [&, i](Index layer) { return o.ranks.empty() ? rank : o.ranks[static_cast<std::size_t>(layer * adapters + i)]; };
    widest_out = std::max(widest_out, out);
    in_sum += in;
    add_moments(s.layers, Index{dora}, out);  // m
    Index largest_rank = 0;
    for (Index layer = 0; layer < s.layers; ++layer) {
      const Index r = rank_of(layer);
      for (const Index cols : {in, out}) add_moments(1, r, cols);  // A, B
      numbers += r * (in + out);
      adapter_rows += 2 * r;
      squares += 2 * r * r;
      if (layer > 0) later_z += tokens * r;
      largest_rank = std::max(largest_rank, r);
    }
    first_z += std::max(tokens * rank_of(0), o.forward_tokens * largest_rank);
    shared_z += most * largest_rank;
    most_rounded = std::max(most_rounded, largest_rank * (in + out));
    given_back = std::max(given_back, 2 * largest_rank * acc + (o.dropout ? in * t : 0));
  }
  Index scales = 0, weight_gradient = 0;  // of AlphaLinear: a block's trained scales; numbers of a part of a weight's gradient, and of its dy
  if (o.trained_planes > 0) {
    QDYLORA_EXPECTS(o.base.binary, bad_argument, "memory_plan: trained planes of no planes of signs");
    for (const auto& [name, out, in] : s.linears) {
      const Index groups = BinaryCodeShape{out, in, o.base.binary->planes, o.base.binary->group_size}.groups();
      const Index rows = std::min(alpha_panel_size, out);
      add_moments(s.layers, o.trained_planes * out, groups);
      scales += o.trained_planes * out * groups;
      if (o.training) weight_gradient = std::max(weight_gradient, rows * (in + o.tokens));
    }
  }
  const Index table = s.vocab * s.width;
  plan.tables = bytes(s.tables * (o.coded_tables ? table + table / 32 * 4 : table * acc));
  plan.norms = bytes((s.layers * (s.norms + 2 * s.biases) + s.final_norms) * acc);  // layers have copies of their biases
  Index whole = 0, widest = 0;  // by AdapterMethod::full: numbers in all weights; the widest output
  if (s.whole) {
    const bool narrow = o.base.format == BaseFormat::bfloat16;
    QDYLORA_EXPECTS((narrow || o.base.format == BaseFormat::float32) && !o.base.binary, bad_argument,
                    "memory_plan: all weights train in float32 or bfloat16, not in " + std::string(name(o.base.format)));
    add_moments(s.tables, s.vocab, s.width);
    for (const auto& [name, out, in] : s.linears) {
      add_moments(s.layers, out, in);
      widest = std::max(widest, out);
    }
    add_moments((s.layers * s.norms + s.final_norms) / s.width, 1, s.width);
    add_moments(s.layers * s.biases, 1, 1);  // each so few that their moments are floats
    whole = s.linear_weights() + s.tables * table + s.layers * (s.norms + s.biases) + s.final_norms;
    plan.read = plan.base_codes + plan.tables + plan.norms - bytes(s.layers * s.biases * acc);
    if (!narrow) plan.base_codes = 0;
    plan.tables = plan.norms = 0;
  }
  const std::size_t all_moments = plan.moments;
  if (o.moments_in_file) plan.file = std::exchange(plan.moments, largest);
  const Index biases = o.trained_biases ? s.layers * s.biases : 0;
  add_moments(biases, 1, 1);
  if (!o.base.init.standard()) plan.initial = bytes(s.adapter_numbers(o.base.init.rank) * acc);
  plan.adapters = plan.gradients = bytes((numbers + whole + s.layers * scales + biases + (dora ? s.layers * s.outputs() : 0)) * acc);

  if (o.workers && o.training)  // beside the gradients a number for each row, whether it has one, and the loss
    plan.sums = std::max(plan.gradients + bytes((adapter_rows + (dora ? s.layers * adapters : 0) + 1) * acc),
                         o.second_moments ? bytes(squares * acc) : std::size_t{0});
  if (o.resumes && o.training) plan.state = plan.adapters + all_moments;

  // Decoder's buffers keep the size of the largest batch. Passes without gradients take two streams and one context.
  const Index streams = s.width * t;
  const Index context = s.kept * t + s.kept_accumulators * acc + (o.dropout && o.training ? in_sum * t : 0) +
                        (dora ? s.outputs() * t : 0);
  plan.checkpoints = bytes(o.training ? ((s.layers - 1) * tokens + 2 * most) * streams : 2 * most * streams);
  if (o.training && o.checkpoints_in_file) plan.checkpoint_file = std::exchange(plan.checkpoints, bytes(2 * most * streams));
  if (const auto held = static_cast<Index>(offloaded_streams); o.training && o.offload_checkpoints && s.layers + 1 > held) {
    plan.checkpoints = bytes((2 * most + (held - 2) * tokens) * streams);
    plan.offloaded = bytes((s.layers + 1 - held) * tokens * streams);
  }
  plan.prompts = bytes(2 * most * streams + most * context + shared_z * acc);
  plan.activations = o.training && !o.checkpoint ? bytes(((s.layers - 1) * tokens + most) * context + (later_z + first_z) * acc)
                                                 : bytes(most * context + shared_z * acc);
  const Index scored = std::max(o.training ? o.scored : 0, o.forward_scored);
  plan.workspace = bytes(most * s.forward_temporaries * t + o.longest * s.head_dim * acc);
  Index passing =
      most * s.forward_products * rank * acc;  // the largest of what is given back within a pass: u, or a bottleneck's gelu(z) and h; t,
                                               // work and dropout's dx; the scored rows' gradient
  if (dora) {  // the base's norms, those kept between passes, a training pass's; what making those of the largest rank takes
    plan.workspace += bytes(s.layers * s.outputs() * (1 + (o.training ? 2 : 1) * o.dora_ranks) * acc);
    passing = std::max(passing, (rank * widest_out + 2 * rank * rank + widest_out) * acc);
  }
  const auto beside_gradient = static_cast<Index>(o.backend_beside_gradient);
  if (o.training) {
    plan.workspace += bytes(tokens * (s.backward_temporaries + s.width + (o.checkpoint ? s.width : 0)) * t);  // d; a spare stream
    passing = std::max({passing, tokens * (given_back + (dora ? widest_out * t : 0)) + beside_gradient, o.scored * s.width * t});
  }
  if (rounds_factors) passing = std::max(passing, most_rounded * t + (o.training ? 2 : 1) * most * rank * acc);  // and u, or t and dz
  if (s.whole && o.training) {  // dy as numbers of masters; what makes the gradient of a norm, of the final one beside its dx
    const Index per_norm = s.width * s.statistics * acc, per_token = s.width * t + (2 * s.statistics - 1) * acc;
    passing = std::max({passing, (t == acc ? Index{0} : tokens * widest * acc) + beside_gradient, per_norm + tokens * per_token,
                        per_norm + o.scored * (per_token + s.width * t)});
  }
  if (weight_gradient > 0) passing = std::max(passing, weight_gradient * acc + beside_gradient);
  passing = std::max(passing, static_cast<Index>(o.backend_passing));
  plan.workspace += bytes(passing);
  plan.logits = bytes(std::min(scored, head_chunk(o.device)) * (logits_stride(s.vocab) + 1) * acc + scored * (2 * s.width * t + s.statistics * acc));
  if (o.second_moments && o.training)  // in half beside them what they were before a step, which may be taken again
    plan.reordering += bytes(squares * acc * (std::is_same_v<T, half> ? 2 : 1));
  if (o.snapshot && o.training) plan.reordering += plan.adapters;

  plan.caches = bytes(o.sequences * (o.cache_rows * s.layers * 2 * s.kv_width * t + s.vocab * acc * (o.device ? 1 : 2)));
  if (rounds_factors && o.sequences > 0) plan.caches += bytes(numbers * t);
  plan.backend = o.backend_bytes;
  plan.process = o.process_bytes;
  if (o.device && s.whole) plan.staging = plan.read;
  else if (o.device) plan.staging = plan.base_codes + plan.block_scales + plan.nested_scales + plan.tables + plan.norms + plan.initial;
  return plan;
}
template <Scalar T>
MemoryPlan memory_plan(const DecoderConfig& config, const MemoryOptions& options, AdapterMethod method = AdapterMethod::lora) {
  return memory_plan<T>(model_shape(config, method), options);
}

}  // namespace qdylora
