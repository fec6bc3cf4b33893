// Both ends of a decoder, frozen or trained: the embedding, and the head behind the final norm, which may be one table.
//
//   x[t] = E[ids[t]],   logits = norm(x) H^T,   loss[t] = -ln softmax(logits[t])[target[t]]
//   trained, backward adds   dE[ids[t]] += dx[t],   dH += dlogits^T norm(x);   both to one gradient where E is H
//   E, H [vocab, width], x [tokens, width]
//
// Logits exist for head_chunk rows at a time, with their part of dH, since [tokens, vocab] would be the largest matrix of all.
#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/model/batch.hpp>
#include <qdylora/model/decoder_weights.hpp>
#include <qdylora/model/norm.hpp>

namespace qdylora {

template <Scalar T, class Backend>
class EmbeddingAndHead {
 public:
  using Acc = Accumulator<T>;
  using Memory = typename Backend::Memory;
  using Weights = DecoderWeights<Acc, Memory>;
  using Param = Parameter<Acc, Memory>;

  /// Frozen, of weights that outlive it; or trained, beginning with copies of them, tables in 8 bits decoded. Errc::unsupported where
  /// the backend is no FullBackend.
  EmbeddingAndHead(const Weights& weights, bool trained, Backend backend)
      : config_(weights.config),
        backend_(backend),
        frozen_(trained ? nullptr : &weights),
        norm_(weights.final_norm, config_.module_names().final_norm, trained, config_.norm_epsilon, backend) {
    if constexpr (FullBackend<Backend, T>) {
      if (!trained) return;
      const auto names = config_.module_names();
      embedding_ = parameter_of(weights.embedding, names.embedding + ".weight");
      head_ = config_.tied_head ? embedding_ : parameter_of(weights.head, names.head + ".weight");
    } else {
      QDYLORA_EXPECTS(!trained, unsupported, "full fine-tuning takes gradients of embedding and norms, which this backend lacks");
    }
  }

  /// Trained: embedding, final norm, head unless it is the embedding. Frozen: none.
  Parameters<Acc, Memory> parameters() const {
    auto all = norm_.parameters();
    if (embedding_) all.insert(all.begin(), embedding_);
    if (head_ != embedding_) all.push_back(head_);
    return all;
  }

  void embed(std::span<const std::int32_t> ids, MatrixView<T> x) const {
    with_table(embedding_, &Weights::embedding, [&](const auto& table) { backend_.embed(ids, table, x); });
  }
  /// The gradient of the embedding, where it is trained, from that of what embed gave.
  void embed_backward(std::span<const std::int32_t> ids, MatrixView<const T> dx) {
    if constexpr (FullBackend<Backend, T>) {
      if (!embedding_) return;
      backend_.embed_backward(ids, dx, embedding_->gradient.view());
      for (const Index id : ids) embedding_->touch(id, id + 1);
    }
  }

  /// Logits [rows, vocab] of some rows of x.
  Matrix<Acc, Memory> logits(MatrixView<const T> x, std::span<const Index> rows) {
    selected_.resize(static_cast<Index>(rows.size()), config_.width);
    backend_.gather_rows(x, rows, selected_.view());
    return logits(as_const(selected_));
  }
  /// Of all.
  Matrix<Acc, Memory> logits(MatrixView<const T> x) {
    normed_.resize(x.rows, x.cols);
    norm_.forward(x, normed_.view(), statistics_);
    Matrix<Acc, Memory> result;
    result.resize(x.rows, config_.vocab);
    with_head([&](const auto& w) { backend_.matmul(as_const(normed_), w, result.view(), Update::overwrite); });
    return result;
  }

  /// losses() become those of the scored rows; with dx, the gradient of scale * their sum with respect to x as well, and to what is trained.
  void run(const Batch& batch, MatrixView<const T> x, double scale, MatrixView<T> dx) {
    std::vector<Index> rows;
    std::vector<std::int32_t> targets;
    for (Index t = 0; t < batch.tokens(); ++t)
      if (batch.targets[static_cast<std::size_t>(t)] >= 0) {
        rows.push_back(t);
        targets.push_back(batch.targets[static_cast<std::size_t>(t)]);
      }
    const auto scored = static_cast<Index>(rows.size());
    losses_.resize(scored, 1);
    if (scored == 0) {
      if (dx.data != nullptr) backend_.fill(dx, T{});
      return;
    }
    const Index width = config_.width;
    selected_.resize(scored, width);
    normed_.resize(scored, width);
    backend_.gather_rows(x, std::span<const Index>(rows), selected_.view());
    norm_.forward(as_const(selected_), normed_.view(), statistics_);
    constexpr Index most = head_chunk(!Memory::host);
    const Index chunks = detail::div_up(scored, most), chunk = detail::div_up(scored, chunks);
    for (Index first = 0; first < scored; first += chunk) {
      const Index count = std::min(chunk, scored - first);
      logits_.resize(count, logits_stride(config_.vocab));
      const auto logits = logits_.view().left_cols(config_.vocab);
      const auto normed = normed_.view().middle_rows(first, count);
      with_head([&](const auto& w) { backend_.matmul(normed, w, logits, Update::overwrite); });
      backend_.cross_entropy(
          logits, std::span<const std::int32_t>(targets).subspan(static_cast<std::size_t>(first), static_cast<std::size_t>(count)), scale,
          losses_.view().middle_rows(first, count));
      if (dx.data == nullptr) continue;
      const MatrixView<const Acc> d_logits = logits;
      if (head_) backend_.weight_gradient(d_logits, MatrixView<const T>(normed), head_->gradient.view(), Update::accumulate);
      with_head([&](const auto& w) { backend_.matmul_transposed(d_logits, w, normed, Update::overwrite); });
    }
    if (dx.data == nullptr) return;
    if (head_) head_->touch(0, config_.vocab);
    auto d_selected = temporary<T>(backend_, scored, width);
    norm_.backward(as_const(normed_), as_const(selected_), statistics_, d_selected.view(), Update::overwrite);
    backend_.scatter_rows(as_const(d_selected), std::span<const Index>(rows), dx);
  }
  /// Cross-entropy in nats of each row that run scored, in order.
  MatrixView<const Acc> losses() const { return losses_.view(); }

  std::size_t bytes() const noexcept { return selected_.capacity_bytes() + normed_.capacity_bytes() + logits_.capacity_bytes(); }

 private:
  template <class S>
  static MatrixView<const S> as_const(const Matrix<S, Memory>& matrix) {
    return matrix.view();
  }

  std::shared_ptr<Param> parameter_of(const TableWeight<Acc, Memory>& begin, const std::string& name) const {
    auto parameter = std::make_shared<Param>(name, begin.rows(), begin.cols());
    backend_.fill(parameter->gradient.view(), Acc{});
    decode(begin, parameter->value.view(), backend_);
    return parameter;
  }

  template <class F>
  void with_table(const std::shared_ptr<Param>& trained, TableWeight<Acc, Memory> Weights::*frozen, F&& f) const {
    if (trained) f(as_const(trained->value));
    else (frozen_->*frozen).visit(f);
  }
  template <class F>
  void with_head(F&& f) const {
    with_table(head_, config_.tied_head ? &Weights::embedding : &Weights::head, f);
  }

  DecoderConfig config_;
  Backend backend_;
  const Weights* frozen_;
  std::shared_ptr<Param> embedding_, head_;  // trained; one where they are tied
  Norm<T, Backend> norm_;
  Matrix<T, Memory> selected_, normed_;
  Matrix<Acc, Memory> statistics_, logits_, losses_;
};

}  // namespace qdylora
