// A model whose weights have trained (AdapterMethod::full) to a Hugging Face folder: config.json and model.safetensors, which
// load_hugging_face and transformers read.
//
// A tensor has the type that the model computes with, so that the one that is read computes the same: linear layers of a bfloat16 base are
// BF16, of which load_hugging_face makes a bfloat16 base again, all else is F32. transformers casts all to config.json's dtype. The masters
// of weights in bfloat16 are in the state of a run (io/collect.hpp), not here. q and k of a model in GGUF's rotary layout are turned to
// Hugging Face's.
#pragma once

#include <algorithm>
#include <cmath>
#include <deque>
#include <filesystem>
#include <span>
#include <string>
#include <utility>
#include <variant>

#include <qdylora/io/json.hpp>
#include <qdylora/io/peft_format.hpp>
#include <qdylora/io/safetensors.hpp>
#include <qdylora/model/base_weight.hpp>
#include <qdylora/model/decoder.hpp>

namespace qdylora {

/// Whether the linear layers of a model that trains whole are computed with in bfloat16.
template <class T, class Backend>
bool computes_in_bfloat16(const Decoder<T, Backend>& model) {
  bool narrow = false;
  model.for_each_dense([&](const auto& layer) { narrow = narrow || layer.options().bfloat16; });
  return narrow;
}

/// config.json of a Llama that was not read from a Hugging Face folder. Errc::unsupported for a Falcon, or biases: such come from a folder,
/// whose config.json is theirs.
template <class T, class Backend>
Json hugging_face_json(const Decoder<T, Backend>& model) {
  const DecoderConfig& c = model.config();
  QDYLORA_EXPECTS(c.architecture == Architecture::llama, unsupported, "hugging_face_json: a Falcon's config.json is that of its folder");
  model.for_each_dense([&](const auto& layer) {
    QDYLORA_EXPECTS(layer.parameters().size() == 1, unsupported,
                    "hugging_face_json: " + layer.options().name + " has a bias, of which a Llama's config.json knows not");
  });
  return {{"architectures", {"LlamaForCausalLM"}},
          {"model_type", "llama"},
          {"vocab_size", c.vocab},
          {"hidden_size", c.width},
          {"intermediate_size", c.mlp_width},
          {"num_hidden_layers", c.layers},
          {"num_attention_heads", c.heads.heads},
          {"num_key_value_heads", c.heads.kv_heads},
          {"head_dim", c.heads.head_dim},
          {"max_position_embeddings", c.context},
          {"rope_theta", c.rope_base},
          {"rms_norm_eps", c.norm_epsilon},
          {"hidden_act", "silu"},
          {"attention_bias", false},
          {"mlp_bias", false},
          {"tie_word_embeddings", c.tied_head},
          {"torch_dtype", computes_in_bfloat16(model) ? "bfloat16" : "float32"}};
}

/// Writes a decoder's tensors, as they are computed with, to a safetensors file, all or nothing. Errors: bad_argument for a decoder by
/// another method than full; non_finite, naming the tensor; those of SafetensorsWriter.
template <class T, class Backend>
  requires(std::is_same_v<Accumulator<T>, float>)
void save_hugging_face_weights(const std::filesystem::path& file, Decoder<T, Backend>& model) {
  QDYLORA_EXPECTS(model.options().method == AdapterMethod::full, bad_argument,
                  "save_hugging_face_weights: the model trains by " + std::string(name(model.options().method)) + ", not its own weights");
  const DecoderConfig& c = model.config();
  model.for_each_dense([](auto& layer) { layer.round(); });  // an optimizer may have stepped since the last pass
  SafetensorsWriter writer;
  writer.metadata("format", "pt");  // transformers asks for it
  std::deque<std::variant<Matrix<float>, Matrix<bfloat16>>> held;  // what the writer borrows of no model
  const auto on_host = [&]<class S>(MatrixView<const S> rows) -> MatrixView<const S> {
    if constexpr (Backend::Memory::host) {
      return rows;
    } else {
      Matrix<S> copy(rows.rows, rows.cols);
      model.backend().download(rows, copy.view());
      return std::get<Matrix<S>>(held.emplace_back(std::move(copy))).view();
    }
  };
  const auto add = [&]<class S>(const std::string& tensor, MatrixView<const S> there, bool vector, Index heads) {
    MatrixView<const S> rows = on_host(there);
    at_tensor(file.string(), tensor, [&] {
      for (Index i = 0; i < rows.rows; ++i)
        for (Index j = 0; j < rows.cols; ++j)
          if (!std::isfinite(static_cast<float>(rows(i, j)))) detail::raise_non_finite(i, j);
    });
    if (heads > 0) {
      Matrix<S> turned(rows.rows, rows.cols);
      for (Index o = 0; o < rows.rows; ++o)
        std::copy_n(rows.row(o), rows.cols, turned.view().row(detail::half_split_position(o, heads, rows.rows)));
      rows = std::get<Matrix<S>>(held.emplace_back(std::move(turned))).view();
    }
    const std::span<const S> numbers(rows.data, static_cast<std::size_t>(rows.size()));
    if (vector) writer.add(tensor, dtype_of<S>(), {rows.size()}, std::as_bytes(numbers));
    else writer.add(tensor, rows);
  };
  const ModuleNames names = c.module_names();
  for (const auto& p : model.other_parameters()) {
    const bool table = p->name == names.embedding + ".weight" || p->name == names.head + ".weight";
    add(p->name, std::as_const(p->value).view(), !table, 0);
  }
  const std::size_t linears = c.linears().size();
  std::size_t at = 0;
  model.for_each_dense([&](const auto& layer) {
    const Index heads = rope_heads(c, at++ % linears);
    const auto parameters = layer.parameters();
    layer.visit([&](const auto& w) { add(parameters.front()->name, w, false, heads); });
    if (parameters.size() > 1)
      add(parameters.back()->name, MatrixView<const float>(parameters.back()->value.data(), layer.out(), 1), true, heads);
  });
  writer.write(file);
}

}  // namespace qdylora
