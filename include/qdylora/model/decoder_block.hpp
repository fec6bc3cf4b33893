// One block of the decoder: forward, backward and one-token decoding.
//
//   mid = x + o(attention(rope(q(n1)), rope(k(n1)), v(n1))),   n1 = rms_norm(x)
//   y   = mid + down(silu(gate(n2)) * up(n2)),                 n2 = rms_norm(mid)
#pragma once

#include <array>
#include <memory>
#include <string>
#include <vector>

#include <qdylora/model/config.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>

namespace qdylora {

/// The linear layers of a block, in the order of arrays over them, with the names Hugging Face's checkpoints use.
enum class Projection : int { q, k, v, o, gate, up, down };
inline constexpr std::array<const char*, 7> projection_names = {"self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj",
                                                                "self_attn.o_proj", "mlp.gate_proj",    "mlp.up_proj",
                                                                "mlp.down_proj"};

/// Frozen weights of a block: linears [out, in], norms [1, width], biases [1, out] or empty.
template <class Acc, MemoryResource Memory = HostMemory>
struct BlockWeights {
  std::array<std::shared_ptr<const WeightFor<AnyFormat, Memory>>, 7> linear;
  std::array<Matrix<Acc, Memory>, 7> bias;
  Matrix<Acc, Memory> attention_norm, mlp_norm;
};

template <Scalar T, class Backend>
class DecoderBlock {
 public:
  using Acc = Accumulator<T>;
  using Memory = typename Backend::Memory;
  using Linear = DynamicLoRALinear<T, Backend, AnyFormat>;

  /// What the backward pass needs: 5 * width + 2 * kv_width + 2 * mlp_width numbers a token (and 7 ranks). Normalized inputs and the
  /// activation are cheap to make again and are not kept.
  struct Context {
    Matrix<Acc, Memory> inverse_rms1, inverse_rms2, lse;
    Matrix<T, Memory> q, k, v, attended, mid, gate, up;
    std::array<typename Linear::Context, 7> linear;
    std::vector<std::int32_t> positions;
    std::vector<Index> offsets;
  };

  /// Temporaries that all blocks share.
  struct Workspace {
    Matrix<T, Memory> normed, activated, d_wide, d_normed, d_part, dq, dk, dv;
  };

  DecoderBlock(const DecoderConfig& config, std::shared_ptr<const BlockWeights<Acc, Memory>> weights, Index index, LoRAOptions lora,
               Backend backend)
      : config_(config), weights_(std::move(weights)), backend_(backend) {
    const auto shapes = config.linear_shapes();
    linear_.reserve(7);
    for (std::size_t i = 0; i < 7; ++i) {
      auto options = lora;
      options.name = "model.layers." + std::to_string(index) + "." + projection_names[i];
      options.layer = static_cast<std::uint32_t>(index * 7 + static_cast<Index>(i));
      const auto& base = weights_->linear[i];
      QDYLORA_EXPECTS(base && base->rows() == shapes[i].first && base->cols() == shapes[i].second, shape_mismatch,
                      options.name + ".weight: expected " + detail::shape_text(shapes[i].first, shapes[i].second) + ", found " +
                          (base ? detail::shape_text(base->rows(), base->cols()) : "nothing"));
      linear_.emplace_back(base, std::move(options), backend);
      if (weights_->bias[i].size() > 0) linear_.back().set_bias(weights_->bias[i].view());
    }
    expect_shape("attention norm", weights_->attention_norm.view(), 1, config.width);
    expect_shape("mlp norm", weights_->mlp_norm.view(), 1, config.width);
  }

  std::vector<Linear>& linears() noexcept { return linear_; }
  const std::vector<Linear>& linears() const noexcept { return linear_; }

  /// y = block(x), both [tokens, width]; y may not be x. `offsets` cut the tokens into sequences.
  void forward(MatrixView<const T> x, std::span<const Index> offsets, std::span<const std::int32_t> positions,
               MatrixView<const Acc> rope_table, MatrixView<T> y, Context& context, Workspace& work) const {
    project(x, positions, rope_table, context, work);
    context.offsets.assign(offsets.begin(), offsets.end());
    context.attended.resize(x.rows, config_.query_width());
    context.lse.resize(x.rows, config_.heads.heads);
    backend_.attention(as_const(context.q), as_const(context.k), as_const(context.v), offsets, config_.heads, context.attended.view(),
                       context.lse.view());
    finish(x, y, context, work);
  }

  /// One token of each sequence: its key and value join the caches, whose views then cover all positions so far.
  void decode(MatrixView<const T> x, std::span<const std::int32_t> positions, MatrixView<const Acc> rope_table,
              std::span<Matrix<T, Memory>*> key_caches, std::span<Matrix<T, Memory>*> value_caches, MatrixView<T> y, Context& context,
              Workspace& work) const {
    project(x, positions, rope_table, context, work);
    std::vector<MatrixView<const T>> keys, values;
    for (Index s = 0; s < x.rows; ++s) {
      const Index at = positions[static_cast<std::size_t>(s)];
      auto& key_cache = *key_caches[static_cast<std::size_t>(s)];
      auto& value_cache = *value_caches[static_cast<std::size_t>(s)];
      QDYLORA_EXPECTS(at < key_cache.rows(), bad_argument, "decode: the cache of sequence " + std::to_string(s) + " is full");
      backend_.copy(as_const(context.k).middle_rows(s, 1), key_cache.view().middle_rows(at, 1));
      backend_.copy(as_const(context.v).middle_rows(s, 1), value_cache.view().middle_rows(at, 1));
      keys.push_back(as_const(key_cache).top_rows(at + 1));
      values.push_back(as_const(value_cache).top_rows(at + 1));
    }
    context.attended.resize(x.rows, config_.query_width());
    backend_.attention_decode(as_const(context.q), std::span<const MatrixView<const T>>(keys), std::span<const MatrixView<const T>>(values),
                              config_.heads, context.attended.view());
    finish(x, y, context, work);
  }

  /// d [tokens, width]: in, the gradient of y; out, the gradient of x (left undefined unless want_dx). Overwrites gate and up of the
  /// context.
  void backward(MatrixView<const T> x, MatrixView<const Acc> rope_table, MatrixView<T> d, Context& context, Workspace& work, bool want_dx) {
    const Index tokens = x.rows;
    // y = mid + down(activated)
    activate(context, work);
    work.d_wide.resize(tokens, config_.mlp_width);
    back(Projection::down, d, as_const(work.activated), work.d_wide.view(), context);
    backend_.swiglu_backward(as_const(work.d_wide), as_const(context.gate), as_const(context.up), context.gate.view(), context.up.view());
    normalize(as_const(context.mid), weights_->mlp_norm, context.inverse_rms2, work);
    work.d_normed.resize(tokens, config_.width);
    work.d_part.resize(tokens, config_.width);
    back(Projection::gate, as_const(context.gate), as_const(work.normed), work.d_normed.view(), context);
    back(Projection::up, as_const(context.up), as_const(work.normed), work.d_part.view(), context);
    backend_.add(as_const(work.d_part), work.d_normed.view());
    backend_.rms_norm_backward(as_const(work.d_normed), as_const(context.mid), weights_->mlp_norm.view(), as_const(context.inverse_rms2), d,
                               Update::accumulate);
    // mid = x + o(attended)
    work.d_wide.resize(tokens, config_.query_width());
    back(Projection::o, d, as_const(context.attended), work.d_wide.view(), context);
    work.dq.resize(tokens, config_.query_width());
    work.dk.resize(tokens, config_.kv_width());
    work.dv.resize(tokens, config_.kv_width());
    backend_.attention_backward(as_const(work.d_wide), as_const(context.q), as_const(context.k), as_const(context.v),
                                as_const(context.attended), as_const(context.lse), std::span<const Index>(context.offsets), config_.heads,
                                work.dq.view(), work.dk.view(), work.dv.view());
    backend_.rope(work.dq.view(), context.positions, rope_table, config_.rope_layout, -1);
    backend_.rope(work.dk.view(), context.positions, rope_table, config_.rope_layout, -1);
    normalize(x, weights_->attention_norm, context.inverse_rms1, work);
    const auto normed = as_const(work.normed);
    const MatrixView<T> none{};
    back(Projection::q, as_const(work.dq), normed, want_dx ? work.d_normed.view() : none, context);
    back(Projection::k, as_const(work.dk), normed, want_dx ? work.d_part.view() : none, context);
    if (want_dx) backend_.add(as_const(work.d_part), work.d_normed.view());
    back(Projection::v, as_const(work.dv), normed, want_dx ? work.d_part.view() : none, context);
    if (!want_dx) return;
    backend_.add(as_const(work.d_part), work.d_normed.view());
    backend_.rms_norm_backward(as_const(work.d_normed), x, weights_->attention_norm.view(), as_const(context.inverse_rms1), d,
                               Update::accumulate);
  }

 private:
  template <class M>
  static auto as_const(const M& matrix) {
    return MatrixView<const typename M::value_type>(matrix.view());
  }
  static constexpr std::size_t index(Projection p) noexcept { return static_cast<std::size_t>(p); }

  void apply(Projection p, MatrixView<const T> x, Matrix<T, Memory>& y, Context& context) const {
    y.resize(x.rows, linear_[index(p)].out());
    linear_[index(p)].forward(x, y.view(), context.linear[index(p)]);
  }

  // The input of a layer may have been made anew since its forward pass, in other memory.
  void back(Projection p, MatrixView<const T> dy, MatrixView<const T> input, MatrixView<T> dx, Context& context) {
    auto& c = context.linear[index(p)];
    c.x = input;
    linear_[index(p)].backward(dy, dx, c);
  }

  void normalize(MatrixView<const T> x, const Matrix<Acc, Memory>& weight, Matrix<Acc, Memory>& inverse, Workspace& work) const {
    work.normed.resize(x.rows, x.cols);
    inverse.resize(x.rows, 1);
    backend_.rms_norm(x, weight.view(), config_.norm_epsilon, work.normed.view(), inverse.view());
  }

  void project(MatrixView<const T> x, std::span<const std::int32_t> positions, MatrixView<const Acc> rope_table, Context& context,
               Workspace& work) const {
    context.positions.assign(positions.begin(), positions.end());
    normalize(x, weights_->attention_norm, context.inverse_rms1, work);
    apply(Projection::q, as_const(work.normed), context.q, context);
    apply(Projection::k, as_const(work.normed), context.k, context);
    apply(Projection::v, as_const(work.normed), context.v, context);
    backend_.rope(context.q.view(), positions, rope_table, config_.rope_layout, 1);
    backend_.rope(context.k.view(), positions, rope_table, config_.rope_layout, 1);
  }

  void activate(Context& context, Workspace& work) const {
    work.activated.resize(context.gate.rows(), config_.mlp_width);
    backend_.swiglu(as_const(context.gate), as_const(context.up), work.activated.view());
  }

  void finish(MatrixView<const T> x, MatrixView<T> y, Context& context, Workspace& work) const {
    apply(Projection::o, as_const(context.attended), context.mid, context);
    backend_.add(x, context.mid.view());
    normalize(as_const(context.mid), weights_->mlp_norm, context.inverse_rms2, work);
    apply(Projection::gate, as_const(work.normed), context.gate, context);
    apply(Projection::up, as_const(work.normed), context.up, context);
    activate(context, work);
    linear_[index(Projection::down)].forward(as_const(work.activated), y, context.linear[index(Projection::down)]);
    backend_.add(as_const(context.mid), y);
  }

  DecoderConfig config_;
  std::shared_ptr<const BlockWeights<Acc, Memory>> weights_;
  Backend backend_;
  std::vector<Linear> linear_;
};

}  // namespace qdylora
