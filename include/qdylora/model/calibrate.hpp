// Calibration: how large the inputs of a model's linear layers are, by which AdapterInit::Kind::qera weighs them.
#pragma once

#include <cmath>
#include <span>
#include <string>
#include <vector>

#include <qdylora/model/base_weight.hpp>
#include <qdylora/model/decoder.hpp>

namespace qdylora {

/// The root mean square of each input of every linear layer over all tokens of the batches, at rank 0: of the base as it stands. Sums are
/// double and in the order of the tokens. Errors: those of Decoder::check; Errc::bad_argument without a token, non_finite.
template <Scalar T, class Backend>
InputScales calibrate(Decoder<T, Backend>& model, std::span<const Batch> batches) {
  std::vector<std::vector<double>> sums;
  for (Index block = 0; block < model.config().layers; ++block)
    for (const auto& linear : model.config().linears()) sums.emplace_back(static_cast<std::size_t>(linear.in));
  Index tokens = 0;
  Matrix<T> host;
  model.set_training(false);
  model.set_ranks(RankPlan::uniform(0));
  for (const Batch& batch : batches) {
    model.check(batch);
    tokens += batch.tokens();
    model.observe_inputs(batch, [&](std::size_t linear, MatrixView<const T> x) {
      host.resize(x.rows, x.cols);
      model.backend().download(x, host.view());
      for (Index i = 0; i < x.rows; ++i)
        for (Index k = 0; k < x.cols; ++k) {
          const auto value = static_cast<double>(host(i, k));
          sums[linear][static_cast<std::size_t>(k)] += value * value;
        }
    });
  }
  QDYLORA_EXPECTS(tokens > 0, bad_argument, "calibrate: no tokens");
  InputScales result;
  for (const auto& squares : sums) {
    result.emplace_back();
    for (const double sum : squares) {
      QDYLORA_EXPECTS(std::isfinite(sum), non_finite,
                      "calibrate: an input of linear layer " + std::to_string(result.size() - 1) + " is not finite");
      result.back().push_back(static_cast<float>(std::sqrt(sum / static_cast<double>(tokens))));
    }
  }
  return result;
}

}  // namespace qdylora
