// The programs' other device. Built with CUDA (-D QDYLORA_CUDA=ON), finetune.cu and evaluate.cu define these; else without.cpp does, and
// says so. A model's weights are read on the host and go up from there.
#pragma once

#include "../common/evaluate.hpp"
#include "../common/finetune.hpp"

namespace qdylora::examples {

int finetune_on_cuda(const FinetuneOptions& options, OpenModel& model, const FinetuneData& data);
int evaluate_on_cuda(const EvaluateOptions& options, const OpenAdapter& adapter, OpenModel& model);

}  // namespace qdylora::examples
