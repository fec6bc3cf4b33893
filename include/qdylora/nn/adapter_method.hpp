// AdapterMethod: what of a model trains.
//
//   lora       low-rank updates of the linear layers (Hu et al. 2021): DynamicLoRALinear
//   houlsby    a bottleneck after attention's output projection and one after the perceptron, each before its residual sum (Houlsby et al.
//              2019, arXiv 1902.00751)
//   parallel   a bottleneck beside the perceptron, on its normed input (the Parallel Adapter: He et al. 2022, arXiv 2110.04366)
//   alpha      scales of the linear layers, whose weights are planes of signs (AlphaTuning: Kwon et al. 2022): AlphaLinear
//   full       all weights, without an adapter: linear layers and their biases (DenseLinear), norms, embedding and head. What adapters are
//              compared with
// By houlsby and parallel the linear layers stay frozen, and what is cut is the bottlenecks' width: nn/bottleneck_adapter.hpp. Of alpha
// nothing is cut: its ranks are 0, the base, and 1, the trained scales. By full there is no base beside what trained: its one rank is 1.
#pragma once

#include <array>
#include <string>
#include <string_view>

#include <qdylora/core/error.hpp>

namespace qdylora {

enum class AdapterMethod { lora, houlsby, parallel, alpha, full };

inline constexpr std::array adapter_methods = {AdapterMethod::lora, AdapterMethod::houlsby, AdapterMethod::parallel, AdapterMethod::alpha,
                                               AdapterMethod::full};

constexpr std::string_view name(AdapterMethod method) noexcept {
  switch (method) {
    case AdapterMethod::lora: return "lora";
    case AdapterMethod::houlsby: return "houlsby";
    case AdapterMethod::parallel: return "parallel";
    case AdapterMethod::alpha: return "alpha";
    case AdapterMethod::full: return "full";
  }
  return "unknown";
}

/// The method of a name; Errc::bad_argument lists them if there is none such.
inline AdapterMethod adapter_method(std::string_view text) {
  std::string known;
  for (const auto method : adapter_methods) {
    if (text == name(method)) return method;
    known += (known.empty() ? "" : ", ") + std::string(name(method));
  }
  throw Error(Errc::bad_argument, "no adapter method '" + printable(text) + "'; there are " + known);
}

/// Whether what trains has ranks, or widths, to be cut to.
constexpr bool has_ranks(AdapterMethod method) noexcept { return method != AdapterMethod::alpha && method != AdapterMethod::full; }

/// Whether a method has bottlenecks, beside which the linear layers are frozen.
constexpr bool has_bottlenecks(AdapterMethod method) noexcept {
  return method == AdapterMethod::houlsby || method == AdapterMethod::parallel;
}

}  // namespace qdylora
