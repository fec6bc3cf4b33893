// A block of a Llama.
//
//   mid = x + o(attention(rope(q(n1)), rope(k(n1)), v(n1))),   n1 = rms_norm(x)
//   y   = mid + down(silu(gate(n2)) * up(n2)),                 n2 = rms_norm(mid)
//
// By Houlsby a bottleneck follows o, and one down; a parallel one reads n2 and is added to y.
#pragma once

#include <qdylora/model/block.hpp>

namespace qdylora {

/// The linear layers of a Llama's block, in the order of DecoderConfig::linears.
enum class Projection : int { q, k, v, o, gate, up, down };

/// What save_peft_adapter and assign take as rope_heads for the linear layer at a place in DecoderConfig::linears: 0 but for q and k in
/// GGUF's rotary layout, which only Llamas come in.
inline Index rope_heads(const DecoderConfig& config, std::size_t linear) {
  const auto p = static_cast<Projection>(linear);
  if (config.rope_layout != RopeLayout::interleaved || (p != Projection::q && p != Projection::k)) return 0;
  return p == Projection::q ? config.heads.heads : config.heads.kv_heads;
}

/// Keeps 3 * width + 2 * kv_width + 2 * mlp_width numbers a token, and 7 ranks; of bottlenecks their ranks instead, by Houlsby 2 * width more.
template <Scalar T, class Backend>
class LlamaBlock : public BlockSteps<T, Backend> {
  using Base = BlockSteps<T, Backend>;

 public:
  using Base::Base;
  using typename Base::Context, typename Base::Tokens, typename Base::Workspace;

  /// y = block(x), both [tokens, width]; y may not be x.
  void forward(MatrixView<const T> x, const Tokens& tokens, MatrixView<T> y, Context& context, Workspace& work) const {
    normalize(x, attention_norm_, context.attention_norm, work);
    apply(q, as_const(work.normed), context.q, context);
    apply(k, as_const(work.normed), context.k, context);
    apply(v, as_const(work.normed), context.v, context);
    attend(tokens, context);
    context.mid.resize(x.rows, config_.width);
    project(o, Sublayer::attention, as_const(context.attended), context.mid.view(), context);
    backend_.add(x, context.mid.view());
    normalize(as_const(context.mid), mlp_norm_, context.mlp_norm, work);
    apply(gate, as_const(work.normed), context.gate, context);
    apply(up, as_const(work.normed), context.up, context);
    activate(context, work);
    project(down, Sublayer::mlp, as_const(work.activated), y, context);
    add_parallel(as_const(work.normed), y, context);
    backend_.add(as_const(context.mid), y);
  }

  /// d [tokens, width]: in, the gradient of y; out, the gradient of x (left undefined unless want_dx). Overwrites gate and up of the
  /// context.
  void backward(MatrixView<const T> x, const Tokens& tokens, MatrixView<T> d, Context& context, Workspace& work, bool want_dx) {
    const Index rows = x.rows;
    const MatrixView<T> none{};
    // y = mid + down(activated)
    activate(context, work);
    work.d_wide.resize(rows, config_.mlp_width);
    project_backward(down, Sublayer::mlp, d, as_const(work.activated), work.d_wide.view(), context, work);
    backend_.swiglu_backward(as_const(work.d_wide), as_const(context.gate), as_const(context.up), context.gate.view(), context.up.view());
    normalize(as_const(context.mid), mlp_norm_, context.mlp_norm, work);
    work.d_normed.resize(rows, config_.width);
    work.part.resize(rows, config_.width);
    back(gate, as_const(context.gate), as_const(work.normed), work.d_normed.view(), context);
    back(up, as_const(context.up), as_const(work.normed), work.part.view(), context);
    backend_.add(as_const(work.part), work.d_normed.view());
    add_parallel_backward(d, as_const(work.normed), work.d_normed.view(), context);
    mlp_norm_.backward(as_const(work.d_normed), as_const(context.mid), context.mlp_norm, d, Update::accumulate);
    // mid = x + o(attended)
    work.d_wide.resize(rows, config_.query_width());
    const bool further = want_dx || !linears_frozen();
    project_backward(o, Sublayer::attention, d, as_const(context.attended), further ? work.d_wide.view() : none, context, work);
    if (!further) return;
    attend_backward(tokens, as_const(work.d_wide), context, work);
    normalize(x, attention_norm_, context.attention_norm, work);
    back(q, as_const(work.dq), as_const(work.normed), want_dx ? work.d_normed.view() : none, context);
    back(k, as_const(work.dk), as_const(work.normed), want_dx ? work.part.view() : none, context);
    if (want_dx) backend_.add(as_const(work.part), work.d_normed.view());
    back(v, as_const(work.dv), as_const(work.normed), want_dx ? work.part.view() : none, context);
    if (!want_dx) return;
    backend_.add(as_const(work.part), work.d_normed.view());
    attention_norm_.backward(as_const(work.d_normed), x, context.attention_norm, d, Update::accumulate);
  }

 private:
  using Base::add_parallel, Base::add_parallel_backward, Base::apply, Base::as_const, Base::attend, Base::attend_backward, Base::back;
  using Base::linears_frozen, Base::normalize, Base::project, Base::project_backward;
  using Base::attention_norm_, Base::backend_, Base::config_, Base::mlp_norm_;
  using enum Projection;

  void activate(Context& context, Workspace& work) const {
    work.activated.resize(context.gate.rows(), config_.mlp_width);
    backend_.swiglu(as_const(context.gate), as_const(context.up), work.activated.view());
  }
};

}  // namespace qdylora
