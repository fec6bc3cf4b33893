// DecoderOptions: what trains in a decoder, and how it keeps its activations.
#pragma once

#include <qdylora/nn/adapter_method.hpp>
#include <qdylora/nn/alpha_linear.hpp>
#include <qdylora/nn/lora_adapter.hpp>

namespace qdylora {

struct DecoderOptions {
  LoRAOptions lora = {};    // of every adapter; names and layer numbers are filled in
  bool checkpoint = false;  // keep only each block's input and run blocks again in the backward pass: a third more work, far less memory
  AdapterMethod method = AdapterMethod::lora;  // by alpha, max_rank is 1, whatever lora says
  AlphaOptions alpha = {};                     // of every layer by that method; names are filled in
};

}  // namespace qdylora
