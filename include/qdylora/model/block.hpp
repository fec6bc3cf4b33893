// What the blocks of all architectures share: what a forward pass keeps, linear layers by number, attention with and without a
// cache, and where bottlenecks stand.
#pragma once

#include <algorithm>
#include <array>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/model/decoder_options.hpp>
#include <qdylora/model/decoder_weights.hpp>
#include <qdylora/nn/alpha_linear.hpp>
#include <qdylora/nn/bottleneck_adapter.hpp>
#include <qdylora/nn/dense_linear.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>

namespace qdylora {

/// The tokens of a pass: whole sequences, or, where there are caches, one token of each.
template <class T, MemoryResource Memory>
struct BlockTokens {
  std::span<const Index> offsets;                                         // cut the tokens into sequences
  std::span<const std::int32_t> positions;                                // of each token in its sequence
  MatrixView<const Accumulator<T>> rope_table;                            // [positions, head_dim]
  std::span<Matrix<T, Memory>* const> key_caches = {}, value_caches = {};  // of each sequence [capacity, kv_width]: tokens join them
};

/// What the backward pass of a block needs of its forward pass. Normalized inputs and the perceptron's activation are cheap to make again
/// and are not kept.
template <class T, class Backend>
struct BlockContext {
  using Acc = Accumulator<T>;
  using Memory = typename Backend::Memory;
  using Linear = DynamicLoRALinear<T, Backend, AnyFormat>;
  using Bottleneck = BottleneckAdapter<T, Backend>;

  Matrix<Acc, Memory> attention_norm, mlp_norm, lse;   // statistics, a few numbers a token
  Matrix<T, Memory> q, k, v, attended, mid, gate, up;  // mid and gate are Llama's alone
  std::vector<typename Linear::Context> linear;
  std::vector<AlphaContext<T>> alpha;          // in its place by AdapterMethod::alpha
  std::vector<DenseContext<T>> dense;          // and by AdapterMethod::full
  std::array<Matrix<T, Memory>, 2> projected;  // by Houlsby, of each sublayer what its bottleneck reads; else empty
  std::vector<typename Bottleneck::Context> bottleneck;
  std::function<void(std::size_t, MatrixView<const T>)> observe;  // where there is one: the number of each linear layer, and its input

  std::size_t bytes() const noexcept {
    std::size_t sum = attention_norm.capacity_bytes() + mlp_norm.capacity_bytes() + lse.capacity_bytes();
    for (const auto* m : {&q, &k, &v, &attended, &mid, &gate, &up}) sum += m->capacity_bytes();
    for (const auto& l : linear) sum += l.z.capacity_bytes() + l.dropped.capacity_bytes() + l.magnitude.product.capacity_bytes();
    for (const auto& p : projected) sum += p.capacity_bytes();
    for (const auto& b : bottleneck) sum += b.z.capacity_bytes() + b.dropped.capacity_bytes();
    return sum;
  }
};

/// Temporaries that all blocks share.
template <class T, class Backend>
struct BlockWorkspace {
  Matrix<T, typename Backend::Memory> normed, fused, activated, part, d_wide, d_normed, dq, dk, dv;

  std::size_t bytes() const noexcept {
    std::size_t sum = 0;
    for (const auto* m : {&normed, &fused, &activated, &part, &d_wide, &d_normed, &dq, &dk, &dv}) sum += m->capacity_bytes();
    return sum;
  }
};

namespace detail {

struct NoAlphaLinear {};  // on a backend without planes of signs
template <class T, class Backend>
struct AlphaLinearOf {
  using type = NoAlphaLinear;
};
template <class T, class Backend>
requires AlphaBackend<Backend, T>
struct AlphaLinearOf<T, Backend> {
  using type = AlphaLinear<T, Backend>;
};

}  // namespace detail

/// The two halves of a block, in the order of Houlsby's bottlenecks.
enum class Sublayer : int { attention, mlp };

/// The base of LlamaBlock and FalconBlock, which are chains of its steps.
template <Scalar T, class Backend>
class BlockSteps {
 public:
  using Acc = Accumulator<T>;
  using Memory = typename Backend::Memory;
  using Linear = DynamicLoRALinear<T, Backend, AnyFormat>;
  using Bottleneck = BottleneckAdapter<T, Backend>;
  using Tokens = BlockTokens<T, Memory>;
  using Context = BlockContext<T, Backend>;
  using Workspace = BlockWorkspace<T, Backend>;

  /// By AdapterMethod::full the block keeps copies of the weights, which train; else the weights, which it shares.
  /// Throws Errc::unsupported for another method than lora on weights that come with what low-rank adapters are to begin with, for alpha on
  /// a backend that is no AlphaBackend, and for full on weights in codes or a backend that is no FullBackend; shape_mismatch where a weight
  /// has another shape, or is not there; rank_range of a pattern.
  BlockSteps(const DecoderConfig& config, std::shared_ptr<const BlockWeights<Acc, Memory>> weights, Index index,
             const DecoderOptions& all, Backend backend)
      : config_(config),
        weights_(std::move(weights)),
        backend_(backend),
        attention_norm_(norm_of(weights_->attention_norm, index, &ModuleNames::attention_norm, all.method)),
        mlp_norm_(norm_of(weights_->mlp_norm, index, &ModuleNames::mlp_norm, all.method)),
        method_(all.method) {
    const auto shapes = config.linears();
    const std::string prefix = config.block_name(index);
    QDYLORA_EXPECTS(
        weights_->linear.size() == shapes.size() && weights_->codes.size() == shapes.size() && weights_->bias.size() == shapes.size() &&
            weights_->initial.size() == shapes.size(),
        shape_mismatch,
        prefix + ": expected " + std::to_string(shapes.size()) + " linear weights, found " + std::to_string(weights_->linear.size()));
    if (method_ == AdapterMethod::full) dense_.reserve(shapes.size());
    else linear_.reserve(shapes.size());
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      auto options = all.lora;
      options.name = prefix + std::string(shapes[i].name);
      options.max_rank = all.patterns.rank_of(options.name, all.lora.max_rank);
      options.alpha = all.patterns.alpha_of(options.name, all.lora.alpha);
      options.layer = static_cast<std::uint32_t>(static_cast<std::size_t>(index) * shapes.size() + i);
      const auto expect = [&](const auto& weight, const char* kind) {
        QDYLORA_EXPECTS(weight && weight->rows() == shapes[i].out && weight->cols() == shapes[i].in, shape_mismatch,
                        options.name + ".weight: expected " + kind + detail::shape_text(shapes[i].out, shapes[i].in) + ", found " +
                            (weight ? detail::shape_text(weight->rows(), weight->cols()) : "nothing"));
      };
      QDYLORA_EXPECTS(method_ == AdapterMethod::lora || weights_->initial[i].rank() == 0, unsupported,
                      options.name + ": initial values of low-rank adapters are none of the method " + std::string(name(method_)));
      if (method_ == AdapterMethod::alpha) {
        expect(weights_->codes[i], "planes of signs ");
        add_alpha(i, options.name, all.alpha);
        continue;
      }
      const auto& base = weights_->linear[i];
      expect(base, "");
      if (method_ == AdapterMethod::full) {
        add_dense(i, options.name);
        continue;
      }
      if (linears_frozen()) linear_.push_back(Linear::frozen(base, options.name, backend));
      else linear_.emplace_back(base, std::move(options), backend);
      if (weights_->bias[i].size() > 0) linear_.back().set_bias(weights_->bias[i].view());
      if (weights_->initial[i].rank() > 0) begin_with(linear_.back().adapter(), weights_->initial[i], backend);
    }
    expect_norm("attention norm", weights_->attention_norm, config);
    if (!config.shared_norm) expect_norm("mlp norm", weights_->mlp_norm, config);
    if (linears_frozen()) add_bottlenecks(prefix, index, all.lora);
    if (method_ == AdapterMethod::full) weights_.reset();
  }

  std::vector<Linear>& linears() noexcept { return linear_; }
  const std::vector<Linear>& linears() const noexcept { return linear_; }
  /// f(layer) for each AlphaLinear, in the order of DecoderConfig::linears; by another method there is none.
  template <class F>
  void for_each_alpha(F&& f) {
    if constexpr (AlphaBackend<Backend, T>) std::for_each(alpha_.begin(), alpha_.end(), f);
  }
  template <class F>
  void for_each_alpha(F&& f) const {
    if constexpr (AlphaBackend<Backend, T>) std::for_each(alpha_.begin(), alpha_.end(), f);
  }
  /// f(layer) for each DenseLinear, in the order of DecoderConfig::linears; by another method than full there is none.
  template <class F>
  void for_each_dense(F&& f) {
    std::for_each(dense_.begin(), dense_.end(), f);
  }
  template <class F>
  void for_each_dense(F&& f) const {
    std::for_each(dense_.begin(), dense_.end(), f);
  }
  /// By AdapterMethod::full, of the norms; else none.
  Parameters<Acc, Memory> norm_parameters() const { return parameters(attention_norm_, mlp_norm_); }
  /// f(layer) for each layer with an adapter that trains, in the order of DecoderConfig::adapted: a Linear or a Bottleneck.
  template <class F>
  void for_each_trained(F&& f) {
    if (!linears_frozen()) std::for_each(linear_.begin(), linear_.end(), f);
    std::for_each(bottleneck_.begin(), bottleneck_.end(), f);
  }
  template <class F>
  void for_each_trained(F&& f) const {
    if (!linears_frozen()) std::for_each(linear_.begin(), linear_.end(), f);
    std::for_each(bottleneck_.begin(), bottleneck_.end(), f);
  }

 protected:
  template <class M>
  static auto as_const(const M& matrix) {
    return MatrixView<const typename M::value_type>(matrix.view());
  }

  // y = a linear layer of x. P is an architecture's enumeration of them.
  template <class P>
  void apply(P p, MatrixView<const T> x, MatrixView<T> y, Context& context) const {
    const auto i = static_cast<std::size_t>(p);
    if (context.observe) context.observe(i, x);
    if constexpr (AlphaBackend<Backend, T>)
      if (method_ == AdapterMethod::alpha) {
        context.alpha.resize(alpha_.size());
        return alpha_[i].forward(x, y, context.alpha[i]);
      }
    if constexpr (FullBackend<Backend, T>)
      if (method_ == AdapterMethod::full) {
        context.dense.resize(dense_.size());
        return dense_[i].forward(x, y, context.dense[i]);
      }
    context.linear.resize(linear_.size());
    linear_[i].forward(x, y, context.linear[i]);
  }
  template <class P>
  void apply(P p, MatrixView<const T> x, Matrix<T, Memory>& y, Context& context) const {
    const auto i = static_cast<std::size_t>(p);
    y.resize(x.rows, method_ == AdapterMethod::alpha  ? weights_->codes[i]->rows()
                     : method_ == AdapterMethod::full ? dense_[i].out()
                                                      : linear_[i].out());
    apply(p, x, y.view(), context);
  }
  // The input of a layer may have been made anew since its forward pass, in other memory. An empty dx is not computed.
  template <class P>
  void back(P p, MatrixView<const T> dy, MatrixView<const T> input, MatrixView<T> dx, Context& context) {
    const auto i = static_cast<std::size_t>(p);
    if constexpr (AlphaBackend<Backend, T>)
      if (method_ == AdapterMethod::alpha) {
        context.alpha[i].x = input;
        return alpha_[i].backward(dy, dx, context.alpha[i]);
      }
    if constexpr (FullBackend<Backend, T>)
      if (method_ == AdapterMethod::full) {
        context.dense[i].x = input;
        return dense_[i].backward(dy, dx, context.dense[i]);
      }
    context.linear[i].x = input;
    linear_[i].backward(dy, dx, context.linear[i]);
  }

  bool linears_frozen() const noexcept { return has_bottlenecks(method_); }

  // y = what a sublayer adds to the residual stream: p(x), by Houlsby through the sublayer's bottleneck.
  template <class P>
  void project(P p, Sublayer sublayer, MatrixView<const T> x, MatrixView<T> y, Context& context) const {
    if (method_ != AdapterMethod::houlsby) return apply(p, x, y, context);
    const auto i = static_cast<std::size_t>(sublayer);
    context.bottleneck.resize(bottleneck_.size());
    apply(p, x, context.projected[i], context);
    bottleneck_[i].forward(as_const(context.projected[i]), y, context.bottleneck[i]);
  }
  // dx = the gradient of p's input. Overwrites work.part. An empty dx is not computed.
  template <class P>
  void project_backward(P p, Sublayer sublayer, MatrixView<const T> dy, MatrixView<const T> input, MatrixView<T> dx, Context& context,
                        Workspace& work) {
    if (method_ == AdapterMethod::houlsby) {
      const auto i = static_cast<std::size_t>(sublayer);
      const bool further = dx.data != nullptr;
      work.part.resize(dy.rows, dy.cols);
      bottleneck_[i].backward(dy, further ? work.part.view() : MatrixView<T>{}, context.bottleneck[i]);
      if (!further) return;  // p has nothing that trains
      dy = as_const(work.part);
    }
    back(p, dy, input, dx, context);
  }

  // y += the parallel bottleneck of the perceptron's input x, where there is one.
  void add_parallel(MatrixView<const T> x, MatrixView<T> y, Context& context) const {
    if (method_ != AdapterMethod::parallel) return;
    context.bottleneck.resize(bottleneck_.size());
    bottleneck_.front().forward(x, y, context.bottleneck.front());
  }
  // dx += its gradient, of an x that may have been made anew. An empty dx is not computed.
  void add_parallel_backward(MatrixView<const T> dy, MatrixView<const T> x, MatrixView<T> dx, Context& context) {
    if (method_ != AdapterMethod::parallel) return;
    context.bottleneck.front().x = x;
    bottleneck_.front().backward(dy, dx, context.bottleneck.front());
  }

  // work.normed = norm(x)
  void normalize(MatrixView<const T> x, const Norm<T, Backend>& norm, Matrix<Acc, Memory>& statistics, Workspace& work) const {
    work.normed.resize(x.rows, x.cols);
    norm.forward(x, work.normed.view(), statistics);
  }

  // context.attended = attention of context.q, k and v, which are turned to their positions.
  void attend(const Tokens& tokens, Context& context) const {
    backend_.rope(context.q.view(), tokens.positions, tokens.rope_table, config_.rope_layout, 1);
    backend_.rope(context.k.view(), tokens.positions, tokens.rope_table, config_.rope_layout, 1);
    context.attended.resize(context.q.rows(), config_.query_width());
    if (!tokens.key_caches.empty()) {
      attend_to_caches(tokens, context);
      return;
    }
    context.lse.resize(context.q.rows(), config_.heads.heads);
    backend_.attention(as_const(context.q), as_const(context.k), as_const(context.v), tokens.offsets, config_.heads,
                       context.attended.view(), context.lse.view());
  }

  // work.dq, dk and dv: the gradients of q, k and v before they were turned.
  void attend_backward(const Tokens& tokens, MatrixView<const T> d_attended, Context& context, Workspace& work) const {
    work.dq.resize(d_attended.rows, config_.query_width());
    work.dk.resize(d_attended.rows, config_.kv_width());
    work.dv.resize(d_attended.rows, config_.kv_width());
    backend_.attention_backward(d_attended, as_const(context.q), as_const(context.k), as_const(context.v), as_const(context.attended),
                                as_const(context.lse), tokens.offsets, config_.heads, work.dq.view(), work.dk.view(), work.dv.view());
    backend_.rope(work.dq.view(), tokens.positions, tokens.rope_table, config_.rope_layout, -1);
    backend_.rope(work.dk.view(), tokens.positions, tokens.rope_table, config_.rope_layout, -1);
  }

  DecoderConfig config_;
  std::shared_ptr<const BlockWeights<Acc, Memory>> weights_;  // none by AdapterMethod::full
  Backend backend_;
  Norm<T, Backend> attention_norm_, mlp_norm_;

 private:
  Norm<T, Backend> norm_of(const NormWeights<Acc, Memory>& weights, Index index, std::string ModuleNames::*name,
                           AdapterMethod method) const {
    const std::string full_name = config_.block_name(index) + config_.module_names().*name;
    return {weights, full_name, method == AdapterMethod::full, config_.norm_epsilon, backend_};
  }

  // The layer that begins with linear weight [i]; one in bfloat16 stays what is computed with.
  void add_dense(std::size_t i, const std::string& name) {
    if constexpr (FullBackend<Backend, T>) {
      weights_->linear[i]->visit([&](const auto& w) {
        if constexpr (requires { w.codes; }) {
          throw Error(Errc::unsupported, name + ": full fine-tuning takes weights in float32 or bfloat16, these are in codes");
        } else {
          constexpr bool narrow = std::is_same_v<std::remove_cvref_t<decltype(*w.data)>, bfloat16>;
          dense_.emplace_back(w, DenseOptions{.bfloat16 = narrow, .name = name}, backend_);
        }
      });
      if (weights_->bias[i].size() > 0) dense_.back().set_bias(weights_->bias[i].view());
    } else {
      throw Error(Errc::unsupported, name + ": full fine-tuning takes gradients of embedding and norms, which this backend lacks");
    }
  }

  // The layer on codes [i].
  void add_alpha(std::size_t i, const std::string& name, AlphaOptions options) {
    if constexpr (AlphaBackend<Backend, T>) {
      options.name = name;
      alpha_.emplace_back(weights_->codes[i], std::move(options), backend_);
      if (weights_->bias[i].size() > 0) alpha_.back().set_bias(weights_->bias[i].view());
    } else {
      throw Error(Errc::unsupported, name + ": planes of signs need a backend that computes with them");
    }
  }

  void add_bottlenecks(const std::string& prefix, Index index, const LoRAOptions& lora) {
    const auto adapted = config_.adapted(method_);
    const auto placement =
        method_ == AdapterMethod::houlsby ? BottleneckPlacement::sequential : BottleneckPlacement::parallel;
    bottleneck_.reserve(adapted.size());
    for (std::size_t i = 0; i < adapted.size(); ++i) {
      auto options = lora;
      options.name = prefix + std::string(adapted[i].name);
      options.layer = static_cast<std::uint32_t>(static_cast<std::size_t>(index) * adapted.size() + i);
      bottleneck_.emplace_back(adapted[i].in, std::move(options), placement, backend_);
    }
  }

  void attend_to_caches(const Tokens& tokens, Context& context) const {
    std::vector<MatrixView<const T>> keys, values;
    std::vector<MatrixView<T>> new_keys, new_values;
    for (Index s = 0; s < context.q.rows(); ++s) {
      const Index at = tokens.positions[static_cast<std::size_t>(s)];
      auto& key_cache = *tokens.key_caches[static_cast<std::size_t>(s)];
      auto& value_cache = *tokens.value_caches[static_cast<std::size_t>(s)];
      QDYLORA_EXPECTS(at < key_cache.rows(), bad_argument, "decode: the cache of sequence " + std::to_string(s) + " is full");
      new_keys.push_back(key_cache.view().middle_rows(at, 1));
      new_values.push_back(value_cache.view().middle_rows(at, 1));
      keys.push_back(as_const(key_cache).top_rows(at + 1));
      values.push_back(as_const(value_cache).top_rows(at + 1));
    }
    backend_.copy_rows(as_const(context.k), std::span<const MatrixView<T>>(new_keys));
    backend_.copy_rows(as_const(context.v), std::span<const MatrixView<T>>(new_values));
    backend_.attention_decode(as_const(context.q), std::span<const MatrixView<const T>>(keys), std::span<const MatrixView<const T>>(values),
                              config_.heads, context.attended.view());
  }

  AdapterMethod method_;
  std::vector<Linear> linear_;
  std::vector<DenseLinear<T, Backend>> dense_;
  std::vector<Bottleneck> bottleneck_;
  std::vector<typename detail::AlphaLinearOf<T, Backend>::type> alpha_;
};

}  // namespace qdylora
