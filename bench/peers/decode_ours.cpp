// One-token greedy decoding with qdylora, the linear weights in NF4 with double-quantized scales: DECODE_OURS MODEL.gguf THREADS
#include "decode.hpp"

#include <qdylora/model.hpp>

int main(int argc, char** argv) {
  using namespace qdylora;
  if (argc < 3) return 2;
  const int threads = std::atoi(argv[2]);
  const Cpu cpu(threads);
  const GgufFile file(argv[1]);
  const auto weights = load_gguf(file, {}, cpu);
  const auto run = [&](const char* kernel, const Cpu& backend) {
    Decoder<float> model(weights, {.lora = {.max_rank = 1}}, backend);
    decode::report(kernel, threads, [&](int count) {
      const std::vector<std::vector<std::int32_t>> prompts = {{decode::first_token}};
      return generate(model, std::span<const std::vector<std::int32_t>>(prompts), RankPlan::uniform(0), {.max_tokens = count}).front();
    });
  };
  run("qdylora NF4 float32", cpu.with_compute(Compute::exact));
  run("qdylora NF4 16-bit", cpu.with_compute(Compute::bits16));
  run("qdylora NF4 int8", cpu.with_compute(Compute::int8));
}
