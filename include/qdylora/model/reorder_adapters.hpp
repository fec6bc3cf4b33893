// Re-ordering of all of a model's adapters: nn/reorder.hpp, on the host's threads.
#pragma once

#include <vector>

#include <qdylora/nn/reorder.hpp>

namespace qdylora {

/// Of a Decoder, or what has its for_each_trained and backend. Throws what reorder throws.
template <class Model>
void reorder_adapters(Model& model, Reordering kind) {
  using Acc = typename Model::Acc;
  using Memory = typename Model::Memory;
  std::vector<LoRAAdapter<Acc, Memory>*> adapters;
  model.for_each_trained([&](auto& linear) { adapters.push_back(&linear.adapter()); });
  const auto& backend = model.backend();
  const auto count = static_cast<Index>(adapters.size());
  if constexpr (Memory::host) {
    backend.parallel_for(count, [&](Index i) { reorder(*adapters[static_cast<std::size_t>(i)], kind); });
  } else {  // the device is one thread's
    std::vector<LoRAAdapter<Acc>> on_host;
    for (const auto* adapter : adapters) on_host.push_back(to_host(*adapter, backend));
    backend.parallel_for(count, [&](Index i) { reorder(on_host[static_cast<std::size_t>(i)], kind); });
    for (std::size_t i = 0; i < adapters.size(); ++i) assign(*adapters[i], on_host[i], backend);
  }
}

/// What Reordering::gram looks at: moment_a and moment_b of each adapter that has gathered them.
template <class Model>
std::vector<MatrixView<typename Model::Acc>> collected_moments(Model& model) {
  std::vector<MatrixView<typename Model::Acc>> moments;
  model.for_each_trained([&](auto& linear) {
    if (auto& adapter = linear.adapter(); adapter.moment_a.size() > 0)
      for (auto* moment : {&adapter.moment_a, &adapter.moment_b}) moments.push_back(moment->view());
  });
  return moments;
}

}  // namespace qdylora
