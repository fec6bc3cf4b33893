// A whole model and its trainer on a GPU, in a file of its own: what it takes is that both compile and link.
#include <qdylora/cuda.hpp>
#include <qdylora/model/trainer.hpp>
#include <qdylora/model/upload.hpp>

namespace qd = qdylora;

double train(const qd::DecoderWeights<float>& weights, const qd::Batch& batch) {
  const qd::CudaContext context;
  const qd::Cuda cuda(context);
  qd::Decoder<qd::bfloat16, qd::Cuda> model(qd::upload(weights, cuda), {.lora = {.max_rank = 8}}, cuda);
  qd::Trainer<qd::bfloat16, qd::Cuda> trainer(model, {.ranks = qd::RankSet{1, 8}});
  double loss = 0.0;
  while (!trainer.done()) loss = trainer.step(batch).loss;
  return loss;
}
