// A model's frozen weights from host memory to a device's.
#pragma once

#include <memory>
#include <utility>
#include <variant>

#include <qdylora/model/decoder.hpp>

namespace qdylora {
namespace detail {

template <class S, class Backend>
Matrix<S, typename Backend::Memory> uploaded(const Matrix<S>& matrix, const Backend& backend) {
  Matrix<S, typename Backend::Memory> there(matrix.rows(), matrix.cols());
  backend.upload(matrix.view(), there.view());
  return there;
}
template <CodeFormat Format, class Scales, class Backend>
auto uploaded(const QuantizedTensor<Format, Scales>& tensor, const Backend& backend) {
  return backend.upload(tensor);
}
template <class S, class Backend>
NormWeights<S, typename Backend::Memory> uploaded(const NormWeights<S>& norm, const Backend& backend) {
  return {uploaded(norm.weight, backend), uploaded(norm.bias, backend)};
}
template <class There, class... Storages, class Backend>
There uploaded_weight(const Weight<Storages...>& weight, const Backend& backend) {
  return std::visit([&](const auto& storage) -> There { return uploaded(storage, backend); }, weight.storage());
}
template <class Backend>
std::shared_ptr<const BinaryCodedTensor<typename Backend::Memory>> uploaded_codes(const BinaryCodedTensor<>& codes, const Backend& backend) {
  if constexpr (requires { backend.upload(codes); })
    return std::make_shared<const BinaryCodedTensor<typename Backend::Memory>>(backend.upload(codes));
  else throw Error(Errc::unsupported, "upload: planes of signs need a backend that computes with them");
}

}  // namespace detail

/// The weights in the memory of a device, as Decoder<T, Backend> takes them. Those of the host may be let go at once. Errc::unsupported
/// for planes of signs where the backend has no products with them.
template <class Acc, class Backend>
  requires(!Backend::Memory::host)
std::shared_ptr<const DecoderWeights<Acc, typename Backend::Memory>> upload(const DecoderWeights<Acc>& weights, const Backend& backend) {
  using Memory = typename Backend::Memory;
  using Table = TableWeight<Acc, Memory>;
  using Base = WeightFor<AnyFormat, Memory>;
  auto there = std::make_shared<DecoderWeights<Acc, Memory>>();
  there->config = weights.config;
  there->embedding = detail::uploaded_weight<Table>(weights.embedding, backend);
  there->head = detail::uploaded_weight<Table>(weights.head, backend);
  there->final_norm = detail::uploaded(weights.final_norm, backend);
  for (const auto& block : weights.blocks) {
    auto copy = std::make_shared<BlockWeights<Acc, Memory>>(weights.config);
    for (std::size_t i = 0; i < block->linear.size(); ++i) {
      if (block->linear[i]) copy->linear[i] = std::make_shared<const Base>(detail::uploaded_weight<Base>(*block->linear[i], backend));
      if (block->codes[i]) copy->codes[i] = detail::uploaded_codes(*block->codes[i], backend);
      copy->bias[i] = detail::uploaded(block->bias[i], backend);
      copy->initial[i] = {detail::uploaded(block->initial[i].a, backend), detail::uploaded(block->initial[i].b, backend)};
    }
    copy->attention_norm = detail::uploaded(block->attention_norm, backend);
    copy->mlp_norm = detail::uploaded(block->mlp_norm, backend);
    there->blocks.push_back(std::move(copy));
  }
  backend.synchronize();
  return there;
}

}  // namespace qdylora
