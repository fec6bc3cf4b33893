// The file formats, all of them. Adds nlohmann/json to what <qdylora/qdylora.hpp> needs; takes no Eigen itself.
#pragma once

// containers: safetensors, GGUF and .npy, read and write; files replaced as a whole, JSON behind bounds
#include <qdylora/io/file.hpp>
#include <qdylora/io/gguf.hpp>
#include <qdylora/io/gguf_write.hpp>
#include <qdylora/io/json.hpp>
#include <qdylora/io/npy.hpp>
#include <qdylora/io/safetensors.hpp>

// what is in them: 4-bit weights of bitsandbytes, binary codes, adapters of PEFT and llama.cpp, bottlenecks, trained scales, the state of a
// training run
#include <qdylora/io/alpha_adapter.hpp>
#include <qdylora/io/binary_code.hpp>
#include <qdylora/io/bitsandbytes.hpp>
#include <qdylora/io/bottleneck.hpp>
#include <qdylora/io/collect.hpp>
#include <qdylora/io/gguf_adapter.hpp>
#include <qdylora/io/peft.hpp>
#include <qdylora/io/train_state.hpp>
