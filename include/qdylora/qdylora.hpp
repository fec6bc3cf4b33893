// qdylora: fine-tune large models from C++ with quantized weights and adapters that work at every rank.
// This front door needs Eigen only. Others: <qdylora/io.hpp> file formats, <qdylora/model.hpp> the transformer.
#pragma once

#include <qdylora/version.hpp>

// core: Index, bfloat16, half; MatrixView, Matrix; memory resources, one of them on disk; Philox random numbers; typed errors; DLPack's
// tensors as views
#include <qdylora/core/dlpack.hpp>
#include <qdylora/core/matrix.hpp>
#include <qdylora/core/paged_memory.hpp>
#include <qdylora/core/random.hpp>

// quant: NF4, FP4, INT4, INT8, FP8; double-quantized block scales; QuantizedTensor and streaming Quantizer; binary codes
#include <qdylora/quant/binary_quantize.hpp>
#include <qdylora/quant/quantize.hpp>

// the Backend concept and the CPU
#include <qdylora/cpu/cpu.hpp>

// nn: ranks, the adapter, DynamicLoRALinear, several adapters mixed in a batch or summed, DoRA's magnitudes, bottleneck adapters,
// AlphaTuning's layer, a layer whose weight trains itself, initial values by PiSSA, LoftQ and QERA, re-ordering by singular values
#include <qdylora/nn/activation.hpp>
#include <qdylora/nn/adapter_plan.hpp>
#include <qdylora/nn/alpha_linear.hpp>
#include <qdylora/nn/bottleneck_adapter.hpp>
#include <qdylora/nn/dense_linear.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>
#include <qdylora/nn/initialize.hpp>
#include <qdylora/nn/magnitude.hpp>
#include <qdylora/nn/multi_lora_linear.hpp>
#include <qdylora/nn/ranks.hpp>
#include <qdylora/nn/reorder.hpp>
#include <qdylora/nn/weighted_sum.hpp>

// optim: AdamW with moments in full or in 8 bits, Lion, learning-rate schedules, a loss scale for half, gradients summed over workers
#include <qdylora/optim/adamw.hpp>
#include <qdylora/optim/lion.hpp>
#include <qdylora/optim/loss_scale.hpp>
#include <qdylora/optim/schedule.hpp>
#include <qdylora/optim/workers.hpp>
