// What the programs say to --device cuda where they were built without it.
#include "programs.hpp"

namespace qdylora::examples {
namespace {

[[noreturn]] void fail() {
  throw Error(Errc::unsupported, "--device cuda: this program was built without CUDA; configure with -D QDYLORA_CUDA=ON");
}

}  // namespace

int finetune_on_cuda(const FinetuneOptions&, OpenModel&, const FinetuneData&) { fail(); }
int evaluate_on_cuda(const EvaluateOptions&, const OpenAdapter&, OpenModel&) { fail(); }

}  // namespace qdylora::examples
