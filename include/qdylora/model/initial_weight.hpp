// A frozen linear weight and what its adapter begins with, made together of rows that a file hands out.
#pragma once

#include <memory>
#include <tuple>
#include <utility>

#include <qdylora/model/base_weight.hpp>
#include <qdylora/model/block.hpp>
#include <qdylora/nn/initialize.hpp>

namespace qdylora {

/// make_base_weight, and beside it the product that BaseOptions::init asks for; none for a standard one. With pissa and loftq, this one
/// weight exists in float while it is read, and as much again.
template <class ReadRows, class Backend>
std::pair<std::shared_ptr<const WeightFor<AnyFormat>>, LowRank<float>> make_initial_weight(Index rows, Index cols, BaseOptions options,
                                                                                           ReadRows&& read_rows, const Backend& backend) {
  const AdapterInit& init = options.init;
  if (init.standard()) return {make_base_weight(rows, cols, options, read_rows, backend), LowRank<float>{}};
  const auto whole = make_base_weight(rows, cols, {.format = BaseFormat::float32}, read_rows, backend);
  const MatrixView<const float> w = whole->template get<Matrix<float>>().view();
  const auto quantize = [&](MatrixView<const float> dense) {
    return make_base_weight(
        rows, cols, options, [&](Index first, MatrixView<float> out) { copy(dense.middle_rows(first, out.rows), out); }, backend);
  };
  auto made = init.kind == AdapterInit::Kind::pissa ? pissa(w, init.rank, quantize, backend)
                                                    : loftq(w, init.rank, init.iterations, quantize, backend);
  return {std::move(made.base), std::move(made.adapter)};
}

/// The linear weight at place i of a block, [rows, cols], as the options say: a base with its initial product, or planes of signs. Errors:
/// those of make_initial_weight and make_binary_weight; Errc::unsupported for planes of signs with an initial product.
template <class ReadRows, class Backend>
void read_linear(BlockWeights<float>& block, std::size_t i, Index rows, Index cols, const BaseOptions& options, ReadRows&& read_rows,
                 const Backend& backend) {
  if (!options.binary) {
    std::tie(block.linear[i], block.initial[i]) = make_initial_weight(rows, cols, options, read_rows, backend);
    return;
  }
  QDYLORA_EXPECTS(options.init.standard(), unsupported,
                  name(options.init) + " begins low-rank adapters, which do not stand on planes of signs");
  block.codes[i] = make_binary_weight(rows, cols, *options.binary, read_rows, backend);
}

}  // namespace qdylora
