// A frozen linear weight and what its adapter begins with, made together of rows that a file hands out.
#pragma once

#include <memory>
#include <span>
#include <string>
#include <tuple>
#include <utility>

#include <qdylora/model/base_weight.hpp>
#include <qdylora/model/block.hpp>
#include <qdylora/nn/initialize.hpp>

namespace qdylora {

/// make_base_weight, and beside it the product that BaseOptions::init asks for; none for a standard one. With pissa and loftq, this one
/// weight exists in float while it is read, and as much again; with qera, twice as much again. input_rms: of this weight's inputs, for an
/// init that is calibrated. Errors: those of make_base_weight, pissa, loftq and qera.
template <class ReadRows, class Backend>
std::pair<std::shared_ptr<const WeightFor<AnyFormat>>, LowRank<float>> make_initial_weight(Index rows, Index cols, BaseOptions options,
                                                                                           ReadRows&& read_rows, const Backend& backend,
                                                                                           std::span<const float> input_rms = {}) {
  const AdapterInit& init = options.init;
  if (init.standard()) return {make_base_weight(rows, cols, options, read_rows, backend), LowRank<float>{}};
  const auto whole = make_base_weight(rows, cols, {.format = BaseFormat::float32}, read_rows, backend);
  const MatrixView<const float> w = whole->template get<Matrix<float>>().view();
  const auto quantize = [&](MatrixView<const float> dense) {
    return make_base_weight(
        rows, cols, options, [&](Index first, MatrixView<float> out) { copy(dense.middle_rows(first, out.rows), out); }, backend);
  };
  auto made = init.kind == AdapterInit::Kind::pissa  ? pissa(w, init.rank, quantize, backend)
              : init.kind == AdapterInit::Kind::loftq ? loftq(w, init.rank, init.iterations, quantize, backend)
                                                      : qera(w, init.rank, input_rms, quantize, backend);
  return {std::move(made.base), std::move(made.adapter)};
}

/// The linear weight at place i of block `index`, [rows, cols], as the options say: a base with its initial product, or planes of signs.
/// Errors: those of make_initial_weight and make_binary_weight; Errc::bad_argument for a calibrated init without input_rms of this weight,
/// unsupported for planes of signs with an initial product.
template <class ReadRows, class Backend>
void read_linear(BlockWeights<float>& block, Index index, std::size_t i, Index rows, Index cols, const BaseOptions& options,
                 ReadRows&& read_rows, const Backend& backend) {
  if (!options.binary) {
    std::span<const float> input_rms;
    if (options.init.calibrated()) {
      const std::size_t at = static_cast<std::size_t>(index) * block.linear.size() + i;
      QDYLORA_EXPECTS(options.input_rms && at < options.input_rms->size(), bad_argument,
                      name(options.init) + " needs the root mean squares of what passes through the model: calibrate() finds them");
      input_rms = (*options.input_rms)[at];
    }
    std::tie(block.linear[i], block.initial[i]) = make_initial_weight(rows, cols, options, read_rows, backend, input_rms);
    return;
  }
  QDYLORA_EXPECTS(options.init.standard(), unsupported,
                  name(options.init) + " begins low-rank adapters, which do not stand on planes of signs");
  block.codes[i] = make_binary_weight(rows, cols, *options.binary, read_rows, backend);
}

}  // namespace qdylora
