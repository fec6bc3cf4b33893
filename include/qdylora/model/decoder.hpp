// Decoder: a decoder-only transformer of DynamicLoRALinear layers. The base is frozen and shared; what trains are the adapters: those of the
// linear layers, or bottlenecks in the blocks; or the layers are AlphaLinear, whose scales train. By AdapterMethod::full all weights train,
// which are copies of the base's then: linear layers are DenseLinear, in bfloat16 where the base is, and norms, embedding and head are in
// Accumulator<T>; nothing is kept of the base, so that whoever lets it go has its memory back.
// Gradients between layers are of T. Where T is half, whose least number is 6e-8, the loss is scaled up for them (optim/loss_scale.hpp), as
// Trainer does.
#pragma once

#include <algorithm>
#include <cmath>
#include <memory>
#include <span>
#include <string>
#include <type_traits>
#include <utility>
#include <variant>
#include <vector>

#include <qdylora/model/batch.hpp>
#include <qdylora/model/config.hpp>
#include <qdylora/model/decoder_options.hpp>
#include <qdylora/model/embedding_and_head.hpp>
#include <qdylora/model/falcon_block.hpp>
#include <qdylora/model/kv_cache.hpp>
#include <qdylora/model/llama_block.hpp>
#include <qdylora/model/residual_streams.hpp>
#include <qdylora/nn/rope.hpp>

namespace qdylora {

namespace detail {

// The blocks that a backend can run.
template <class T, class Backend>
struct BlockOf {
  using type = std::variant<LlamaBlock<T, Backend>>;
};
template <class T, class Backend>
  requires FalconBackend<Backend, T>
struct BlockOf<T, Backend> {
  using type = std::variant<LlamaBlock<T, Backend>, FalconBlock<T, Backend>>;
};

}  // namespace detail

template <Scalar T, class Backend = Cpu>
  requires TransformerBackend<Backend, T>
class Decoder {
 public:
  using Acc = Accumulator<T>;
  using Memory = typename Backend::Memory;
  using Weights = DecoderWeights<Acc, Memory>;
  using Block = typename detail::BlockOf<T, Backend>::type;
  using Linear = DynamicLoRALinear<T, Backend, AnyFormat>;
  using Cache = KVCache<T, Memory>;

  explicit Decoder(std::shared_ptr<const Weights> weights, DecoderOptions options = {}, Backend backend = {})
      : weights_(std::move(weights)),
        options_(std::move(options)),
        backend_(backend),
        ends_(*weights_, options_.method == AdapterMethod::full, backend),
        streams_(options_, backend) {
    const auto& c = config();
    c.validate();
    expect_shape("embedding", weights_->embedding, c.vocab, c.width);
    expect_norm("final norm", weights_->final_norm, c);
    if (!c.tied_head) expect_shape("head", weights_->head, c.vocab, c.width);
    QDYLORA_EXPECTS(static_cast<Index>(weights_->blocks.size()) == c.layers, bad_config,
                    "expected " + std::to_string(c.layers) + " blocks, found " + std::to_string(weights_->blocks.size()));
    if (!has_ranks(options_.method)) options_.lora.max_rank = 1;
    expect_fits(options_, c);
    blocks_.reserve(weights_->blocks.size());
    for (Index i = 0; i < c.layers; ++i) {
      const auto& block = weights_->blocks[static_cast<std::size_t>(i)];
      if (c.architecture == Architecture::llama) add_block<LlamaBlock<T, Backend>>(block, i);
      else if constexpr (FalconBackend<Backend, T>) add_block<FalconBlock<T, Backend>>(block, i);
      else throw Error(Errc::unsupported, "a Falcon needs layer norms, which this backend lacks");
    }
    if (options_.method == AdapterMethod::full) {
      auto rest = std::make_shared<Weights>();
      rest->config = c;
      weights_ = std::move(rest);
    }
    set_ranks(RankPlan::uniform(options_.lora.max_rank));
    set_training(false);
  }

  const DecoderConfig& config() const noexcept { return weights_->config; }
  const DecoderOptions& options() const noexcept { return options_; }
  /// By AdapterMethod::full of its config alone.
  const std::shared_ptr<const Weights>& weights() const noexcept { return weights_; }
  const Backend& backend() const noexcept { return backend_; }

  /// f(layer) for every linear layer, block by block in the order of DecoderConfig::linears; by AdapterMethod::alpha and full for none.
  template <class F>
  void for_each_linear(F&& f) {
    for (auto& block : blocks_)
      for (auto& linear : std::visit([](auto& b) -> auto& { return b.linears(); }, block)) f(linear);
  }
  template <class F>
  void for_each_linear(F&& f) const {
    for (const auto& block : blocks_)
      for (const auto& linear : std::visit([](const auto& b) -> auto& { return b.linears(); }, block)) f(linear);
  }
  /// f(layer) for every layer with an adapter that trains, block by block in the order of DecoderConfig::adapted: DynamicLoRALinear, or
  /// BottleneckAdapter, as DecoderOptions::method has it.
  template <class F>
  void for_each_trained(F&& f) {
    for (auto& block : blocks_) std::visit([&](auto& b) { b.for_each_trained(f); }, block);
  }
  template <class F>
  void for_each_trained(F&& f) const {
    for (const auto& block : blocks_) std::visit([&](const auto& b) { b.for_each_trained(f); }, block);
  }
  /// f(layer) for every AlphaLinear, block by block in the order of DecoderConfig::linears; by another method for none.
  template <class F>
  void for_each_alpha(F&& f) {
    for (auto& block : blocks_) std::visit([&](auto& b) { b.for_each_alpha(f); }, block);
  }
  template <class F>
  void for_each_alpha(F&& f) const {
    for (const auto& block : blocks_) std::visit([&](const auto& b) { b.for_each_alpha(f); }, block);
  }
  /// f(layer) for every DenseLinear, block by block in the order of DecoderConfig::linears; by another method than full for none.
  template <class F>
  void for_each_dense(F&& f) {
    for (auto& block : blocks_) std::visit([&](auto& b) { b.for_each_dense(f); }, block);
  }
  template <class F>
  void for_each_dense(F&& f) const {
    for (const auto& block : blocks_) std::visit([&](const auto& b) { b.for_each_dense(f); }, block);
  }
  /// By AdapterMethod::full of norms, embedding and head, which are computed with as their values are; else none.
  Parameters<Acc, Memory> other_parameters() const {
    auto all = ends_.parameters();
    for (const auto& block : blocks_)
      for (auto& p : std::visit([](const auto& b) { return b.norm_parameters(); }, block)) all.push_back(std::move(p));
    return all;
  }
  /// All that train. By AdapterMethod::full they are named as tensors of a checkpoint.
  Parameters<Acc, Memory> parameters() const {
    auto all = other_parameters();
    const auto append = [&](const auto& layer) {
      for (auto& p : layer.parameters()) all.push_back(std::move(p));
    };
    for_each_trained(append);
    for_each_alpha(append);
    for_each_dense(append);
    return all;
  }

  /// The rank of each sequence of the coming batches, or one for all; by AdapterMethod::alpha one for all, 0 or 1, by full 1. A layer whose
  /// pattern gives it fewer rows uses them all. Errc::rank_range, unsupported.
  void set_ranks(const RankPlan& plan) {
    check_rank(plan.max_rank());
    QDYLORA_EXPECTS(options_.method != AdapterMethod::alpha || plan.runs().size() <= 1, unsupported,
                    "alpha: scales are of the layers, not of a text; set one rank for all");
    plan_ = plan;
  }
  /// Throws Errc::rank_range for a rank that no layer has.
  void check_rank(Index rank) const {
    QDYLORA_EXPECTS(rank >= 0 && rank <= options_.lora.max_rank, rank_range,
                    "rank " + std::to_string(rank) + " is not in 0 ... " + std::to_string(options_.lora.max_rank));
    QDYLORA_EXPECTS(rank > 0 || options_.method != AdapterMethod::full, unsupported, "rank 0: of a model that trains whole no base is kept");
  }
  /// Whether dropout acts (not until told so), the step its masks belong to, and the tokens of that step in earlier micro-batches. To be
  /// called too after parameters have changed, before the next pass: layers keep what they make of them (norms of rows, roundings).
  void set_training(bool training, std::uint32_t step = 0, Index first_row = 0) {
    for_each_trained([&](auto& layer) { layer.set_training(training, step, first_row); });
    changed_ = true;
  }

  /// Cross-entropy in nats of each scored position, in order; nothing is kept for a backward pass.
  std::vector<double> losses(const Batch& batch) {
    const auto x = run(batch, false);
    ends_.run(batch, x, 0.0, {});
    return scored_losses();
  }

  /// Sum over the scored positions, and gradients of `scale` times it added to the parameters': scale = 1 / scored gives the mean, and
  /// micro-batches with one scale for all add up to one big batch. A loss scale is part of it, and given to the optimizer's step too.
  double loss_and_gradient(const Batch& batch, double scale) {
    queue_loss_and_gradient(batch, scale);
    double sum = 0.0;
    for (const double loss : scored_losses()) sum += loss;
    return sum;
  }
  /// The same without waiting for a device: the losses stay there, for scored_losses.
  void queue_loss_and_gradient(const Batch& batch, double scale) {
    const auto x = run(batch, true);
    d_.resize(batch.tokens(), config().width);
    ends_.run(batch, x, scale, d_.view());
    streams_.release(blocks_.size());
    const auto tokens = tokens_of(batch);
    for (std::size_t i = blocks_.size(); i-- > 0;) {
      auto& context = contexts_[options_.checkpoint ? 0 : i];
      const MatrixView<const T> input = streams_[i];
      std::visit(
          [&](auto& block) {
            if (options_.checkpoint && i + 1 < blocks_.size())  // the last block's context is still the right one
              block.forward(input, tokens, spare_.view(), context, work_);
            block.backward(input, tokens, d_.view(), context, work_, i > 0 || options_.method == AdapterMethod::full);
          },
          blocks_[i]);
      streams_.release(i);
    }
    ends_.embed_backward(batch.ids, d_.view());
  }
  /// Cross-entropy in nats of each position that the last pass scored, in order. Waits.
  std::vector<double> scored_losses() const {
    Matrix<Acc> host(ends_.losses().rows, 1);
    backend_.download(ends_.losses(), host.view());
    return {host.span().begin(), host.span().end()};
  }

  /// observe(i, x) with what enters each linear layer, [tokens, in], numbered in the order of DecoderConfig::linears block by block.
  template <class F>
  void observe_inputs(const Batch& batch, F&& observe) {
    prepare(batch, {});
    const auto tokens = tokens_of(batch);
    Matrix<T, Memory> x(batch.tokens(), config().width), y(batch.tokens(), config().width);
    ends_.embed(batch.ids, x.view());
    BlockContext<T, Backend> context;
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      const std::size_t first = i * config().linears().size();
      context.observe = [&observe, first](std::size_t linear, MatrixView<const T> input) { observe(first + linear, input); };
      run_block(i, std::as_const(x).view(), tokens, y.view(), context);
      std::swap(x, y);
    }
  }

  /// Logits [tokens, vocab] of every position.
  Matrix<Acc, Memory> logits(const Batch& batch) {
    return ends_.logits(run(batch, false));
  }

  /// Feeds new tokens of several sequences and returns the logits of each one's last, [sequences, vocab]. Either all caches are empty
  /// (prompts of any length), or every sequence brings one token.
  Matrix<Acc, Memory> infer(const Batch& batch, std::span<Cache> caches) {
    batch.validate();
    QDYLORA_EXPECTS(static_cast<Index>(caches.size()) == batch.sequences(), shape_mismatch,
                    "infer: " + std::to_string(caches.size()) + " caches for " + std::to_string(batch.sequences()) + " sequences");
    const bool prompts = std::all_of(caches.begin(), caches.end(), [](const Cache& c) { return c.length == 0; });
    QDYLORA_EXPECTS(prompts || batch.tokens() == batch.sequences(), bad_argument,
                    "infer: caches are not empty, so every sequence brings one token");
    MatrixView<const T> x;
    std::vector<Index> last;
    for (Index s = 0; s < batch.sequences(); ++s) last.push_back(batch.offsets[static_cast<std::size_t>(s) + 1] - 1);
    if (prompts) {
      x = run(batch, false, caches);
    } else {
      x = run_decode(batch, caches);
    }
    for (Index s = 0; s < batch.sequences(); ++s)
      caches[static_cast<std::size_t>(s)].length +=
          batch.offsets[static_cast<std::size_t>(s) + 1] - batch.offsets[static_cast<std::size_t>(s)];
    return ends_.logits(x, std::span<const Index>(last));
  }

  /// Throws Errc::bad_argument unless the batch is one this model can run: valid, ids within the vocabulary, sequences within the context.
  void check(const Batch& batch) const { batch.validate(config().vocab, config().context); }

  /// The residual stream [tokens, width] after `layer` blocks of the last loss_and_gradient. Errc::unsupported where they are offloaded.
  MatrixView<const T> stream(Index layer) const { return streams_.kept(static_cast<std::size_t>(layer)); }

  /// Bytes of memory kept between passes: contexts, streams, unless they are in files, and workspaces.
  std::size_t activation_bytes() const noexcept {
    std::size_t sum = d_.capacity_bytes() + spare_.capacity_bytes() + ends_.bytes() + work_.bytes() + streams_.bytes();
    for (const auto& c : contexts_) sum += c.bytes();
    return sum;
  }

 private:
  template <class Kind>
  void add_block(const std::shared_ptr<const BlockWeights<Acc, Memory>>& weights, Index index) {
    blocks_.emplace_back(std::in_place_type<Kind>, config(), weights, index, options_, backend_);
  }

  // Of the batch that was prepared last.
  BlockTokens<T, Memory> tokens_of(const Batch& batch) const { return {batch.offsets, positions_, rope_.view()}; }
  void run_block(std::size_t i, MatrixView<const T> x, const BlockTokens<T, Memory>& tokens, MatrixView<T> y,
                 BlockContext<T, Backend>& context) {
    std::visit([&](const auto& block) { block.forward(x, tokens, y, context, work_); }, blocks_[i]);
  }

  void prepare(const Batch& batch, std::span<const Index> starts) {
    batch.validate();
    positions_.clear();
    for (Index s = 0; s < batch.sequences(); ++s) {
      const Index length = batch.offsets[static_cast<std::size_t>(s) + 1] - batch.offsets[static_cast<std::size_t>(s)];
      const Index start = starts.empty() ? 0 : starts[static_cast<std::size_t>(s)];
      QDYLORA_EXPECTS(start + length <= config().context, bad_argument,
                      "sequence " + std::to_string(s) + " has " + std::to_string(start + length) + " tokens, the model's context is " +
                          std::to_string(config().context));
      for (Index t = 0; t < length; ++t) positions_.push_back(static_cast<std::int32_t>(start + t));
    }
    const Index longest = positions_.empty() ? 0 : 1 + *std::max_element(positions_.begin(), positions_.end());
    if (rope_.rows() < longest) {
      // Doubling keeps the work of a growing sequence linear.
      const Index rows = std::min(config().context, std::max<Index>(longest, 2 * rope_.rows()));
      const auto table = rope_table<Acc>(rows, config().heads.head_dim, config().rope_base);
      rope_.resize(rows, config().heads.head_dim);
      backend_.upload(table.view(), rope_.view());
      backend_.synchronize();  // the host's table is given back
    }
    if (std::exchange(changed_, false)) for_each_dense([](auto& layer) { layer.round(); });
    const auto tokens = plan_.expand(batch.offsets);
    for_each_trained([&](auto& layer) { layer.set_ranks(tokens.limited(std::as_const(layer).adapter().max_rank())); });
    for_each_alpha([&](auto& layer) { layer.set_tuned(plan_.max_rank() > 0); });
  }

  // All blocks over whole sequences; returns the last residual stream. With keep, everything for a backward pass stays.
  MatrixView<const T> run(const Batch& batch, bool keep, std::span<Cache> caches = {}) {
    prepare(batch, {});
    const Index layers = config().layers;
    streams_.begin(static_cast<std::size_t>(keep ? layers + 1 : 2), batch.tokens(), config().width);
    contexts_.resize(keep && !options_.checkpoint ? static_cast<std::size_t>(layers) : 1);
    if (keep && options_.checkpoint) spare_.resize(batch.tokens(), config().width);
    ends_.embed(batch.ids, streams_[0]);
    const auto tokens = tokens_of(batch);
    std::size_t at = 0;
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      const std::size_t next = keep ? at + 1 : 1 - at;
      auto& context = contexts_[keep && !options_.checkpoint ? i : 0];
      run_block(i, streams_[at], tokens, streams_[next], context);
      for (std::size_t s = 0; s < caches.size(); ++s) {
        const Index first = batch.offsets[s], count = batch.offsets[s + 1] - first;
        auto& cache = caches[s];
        QDYLORA_EXPECTS(count <= cache.keys[i].rows(), bad_argument,
                        "the prompt of sequence " + std::to_string(s) + " is longer than its cache");
        backend_.copy(std::as_const(context.k).view().middle_rows(first, count), cache.keys[i].view().top_rows(count));
        backend_.copy(std::as_const(context.v).view().middle_rows(first, count), cache.values[i].view().top_rows(count));
      }
      if (keep) streams_.leave(at);
      at = next;
    }
    return streams_[at];
  }

  MatrixView<const T> run_decode(const Batch& batch, std::span<Cache> caches) {
    std::vector<Index> starts;
    for (const auto& cache : caches) starts.push_back(cache.length);
    prepare(batch, starts);
    streams_.begin(2, batch.tokens(), config().width);
    contexts_.resize(1);
    ends_.embed(batch.ids, streams_[0]);
    std::vector<Matrix<T, Memory>*> keys(caches.size()), values(caches.size());
    auto tokens = tokens_of(batch);
    tokens.key_caches = keys;
    tokens.value_caches = values;
    std::size_t at = 0;
    for (std::size_t i = 0; i < blocks_.size(); ++i) {
      for (std::size_t s = 0; s < caches.size(); ++s) {
        keys[s] = &caches[s].keys[i];
        values[s] = &caches[s].values[i];
      }
      run_block(i, streams_[at], tokens, streams_[1 - at], contexts_[0]);
      at = 1 - at;
    }
    return streams_[at];
  }

  std::shared_ptr<const Weights> weights_;
  DecoderOptions options_;
  Backend backend_;
  EmbeddingAndHead<T, Backend> ends_;
  std::vector<Block> blocks_;
  RankPlan plan_;
  bool changed_ = false;  // parameters may have, since layers rounded them
  Matrix<Acc, Memory> rope_;
  std::vector<std::int32_t> positions_;
  ResidualStreams<T, Backend> streams_;
  std::vector<BlockContext<T, Backend>> contexts_;
  BlockWorkspace<T, Backend> work_;
  Matrix<T, Memory> d_, spare_;
};

}  // namespace qdylora
