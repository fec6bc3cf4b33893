// Modules of a model that an adapter brings whole (modules_to_save of PEFT), in place of the model's own.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include <qdylora/core/error.hpp>
#include <qdylora/core/matrix.hpp>
#include <qdylora/io/peft_format.hpp>
#include <qdylora/model/decoder_weights.hpp>
#include <qdylora/model/load_hugging_face.hpp>

namespace qdylora {

namespace detail {

/// A block with the same linear weights, and norms of its own.
inline std::shared_ptr<BlockWeights<float>> with_own_norms(const BlockWeights<float>& block, const DecoderConfig& config) {
  auto own = std::make_shared<BlockWeights<float>>(config);
  own->linear = block.linear;
  own->codes = block.codes;
  for (std::size_t i = 0; i < block.linear.size(); ++i) {
    own->bias[i] = clone(block.bias[i].view());
    own->initial[i] = {clone(block.initial[i].a.view()), clone(block.initial[i].b.view())};
  }
  own->attention_norm = {clone(block.attention_norm.weight.view()), clone(block.attention_norm.bias.view())};
  own->mlp_norm = {clone(block.mlp_norm.weight.view()), clone(block.mlp_norm.bias.view())};
  return own;
}

/// The norm's part that a tensor's name ends in; null if it is neither ".weight" nor a bias that the norm has.
inline Matrix<float>* norm_part(NormWeights<float>& norm, std::string_view part) {
  if (part == ".weight" && norm.weight.size() > 0) return &norm.weight;
  if (part == ".bias" && norm.bias.size() > 0) return &norm.bias;
  return nullptr;
}

}  // namespace detail

/// Puts an adapter's whole modules in place of the model's, by Hugging Face's names: the embedding, the head and the norms. As in PEFT, of an
/// embedding and a head that are one, that which the adapter does not bring stays as it was, unless PeftSaved::ties_weights.
/// Errc::unsupported (a linear layer of a block, whose weights are kept in few bits), missing_tensor (what the model has not),
/// shape_mismatch; all name the tensor. After an error the weights may be changed in part.
inline void replace_modules(DecoderWeights<float>& weights, const PeftSaved& saved) {
  auto& config = weights.config;
  const auto names = config.module_names();
  for (const PeftTensor& tensor : saved.tensors) {
    const ErrorPlace place{.tensor = tensor.name};
    const auto expect = [&](Index rows, Index cols) {
      if (tensor.value.rows() != rows || tensor.value.cols() != cols || tensor.vector != (rows == 1))
        throw Error(Errc::shape_mismatch,
                    "expected " + (rows == 1 ? "[" + std::to_string(cols) + "]" : detail::shape_text(rows, cols)) + ", found " +
                        (tensor.vector ? "[" + std::to_string(tensor.value.cols()) + "]"
                                       : detail::shape_text(tensor.value.rows(), tensor.value.cols())),
                    place);
    };
    const auto table = [&] {
      expect(config.vocab, config.width);
      return clone(tensor.value.view());
    };
    if (tensor.name == names.embedding + ".weight") {
      auto value = table();
      if (config.tied_head && !saved.ties_weights) {
        weights.head = std::move(weights.embedding);
        config.tied_head = false;
      }
      weights.embedding = std::move(value);
      continue;
    }
    if (tensor.name == names.head + ".weight") {
      auto value = table();
      if (config.tied_head && saved.ties_weights) weights.embedding = std::move(value);
      else weights.head = std::move(value);
      config.tied_head = config.tied_head && saved.ties_weights;
      continue;
    }
    const std::string_view name = tensor.name, module = tensor.module(), part = name.substr(module.size());
    Matrix<float>* target = module == names.final_norm ? detail::norm_part(weights.final_norm, part) : nullptr;
    bool linear = false;
    for (Index i = 0; i < config.layers && target == nullptr; ++i) {
      const std::string prefix = config.block_name(i);
      if (!module.starts_with(prefix)) continue;
      const std::string_view inner = module.substr(prefix.size());
      for (const auto& each : config.linears()) linear = linear || inner == each.name;
      const bool attention = inner == names.attention_norm;
      if (!attention && (names.mlp_norm.empty() || inner != names.mlp_norm)) continue;
      auto& block = weights.blocks[static_cast<std::size_t>(i)];
      auto own = detail::with_own_norms(*block, config);
      target = detail::norm_part(attention ? own->attention_norm : own->mlp_norm, part);
      block = std::move(own);
    }
    if (linear)
      throw Error(Errc::unsupported, "is a linear layer of a block, which the model keeps in few bits, not as the adapter has it", place);
    if (target == nullptr) throw Error(Errc::missing_tensor, "the model has no such embedding, head or norm", place);
    expect(1, config.width);
    *target = clone(tensor.value.view());
  }
}

}  // namespace qdylora
