// Shapes of published models, to plan memory for those that are not at hand.
#pragma once

#include <string>
#include <string_view>

#include <qdylora/model/config.hpp>

namespace qdylora {

inline constexpr std::string_view published_shapes[] = {"smollm2-135m", "llama-7b", "llama-13b", "llama-33b", "llama-65b", "falcon-40b"};

/// The shape of one of `published_shapes`. Errc::bad_argument lists them if there is none such.
///   SmolLM2-135M (Allal et al. 2025), as its checkpoint has it
///   LLaMA 7B to 65B (Touvron et al. 2023, Table 2); perceptrons of 8/3 the width, rounded up to a multiple of 256
///   Falcon-40b (Almazrouei et al. 2023)
inline DecoderConfig published_shape(std::string_view name) {
  DecoderConfig c;
  const auto llama = [&](Index width, Index mlp_width, Index layers, Index heads) {
    c.vocab = 32000;
    c.width = width;
    c.mlp_width = mlp_width;
    c.layers = layers;
    c.heads = {.heads = heads, .kv_heads = heads, .head_dim = 128};
    c.context = 2048;
    c.tied_head = false;
  };
  if (name == "smollm2-135m") {
    c.vocab = 49152;
    c.width = 576;
    c.mlp_width = 1536;
    c.layers = 30;
    c.heads = {.heads = 9, .kv_heads = 3, .head_dim = 64};
    c.context = 8192;
  } else if (name == "llama-7b") {
    llama(4096, 11008, 32, 32);
  } else if (name == "llama-13b") {
    llama(5120, 13824, 40, 40);
  } else if (name == "llama-33b") {
    llama(6656, 17920, 60, 52);
  } else if (name == "llama-65b") {
    llama(8192, 22016, 80, 64);
  } else if (name == "falcon-40b") {
    c.architecture = Architecture::falcon;
    c.vocab = 65024;
    c.width = 8192;
    c.mlp_width = 32768;
    c.layers = 60;
    c.heads = {.heads = 128, .kv_heads = 8, .head_dim = 64};
    c.context = 2048;
  } else {
    std::string known;
    for (const auto one : published_shapes) known += (known.empty() ? "" : ", ") + std::string(one);
    throw Error(Errc::bad_argument, "no shape '" + printable(name) + "'; there are " + known);
  }
  return c;
}

}  // namespace qdylora
