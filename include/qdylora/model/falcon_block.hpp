// A block of a Falcon: attention and perceptron side by side.
//
//   y = x + dense(attention(rope(q), rope(k), v)) + dense_4h_to_h(gelu(dense_h_to_4h(n2))),
//   q, k, v = the heads of query_key_value(n1),   n1 = layer_norm(x),   n2 = n1 (Falcon-7B, Falcon2-11B) or a norm of its own (Falcon-40B)
//
// By Houlsby a bottleneck follows dense, and one dense_4h_to_h; a parallel one reads n2 and is added to y.
//
// query_key_value stays one layer, as in the checkpoints and as its adapters are trained. Its outputs are, for each key-value head in turn,
// the query heads that read it, then its key, then its value: multi-query attention is that with one group, multi-head with one query each.
#pragma once

#include <qdylora/model/block.hpp>

namespace qdylora {

template <class B, class T>
concept FalconBackend = TransformerBackend<B, T> && HasLayerNorm<B, T>;

/// The linear layers of a Falcon's block, in the order of DecoderConfig::linears.
enum class FalconProjection : int { query_key_value, dense, dense_h_to_4h, dense_4h_to_h };

/// Keeps 2 * width + 2 * kv_width + mlp_width numbers a token, and 4 ranks.
template <Scalar T, class Backend>
  requires FalconBackend<Backend, T>
class FalconBlock : public BlockSteps<T, Backend> {
  using Base = BlockSteps<T, Backend>;

 public:
  using Base::Base;
  using typename Base::Context, typename Base::Memory, typename Base::Tokens, typename Base::Workspace;

  /// y = block(x), both [tokens, width]; y may not be x.
  void forward(MatrixView<const T> x, const Tokens& tokens, MatrixView<T> y, Context& context, Workspace& work) const {
    normalize(x, attention_norm_, context.attention_norm, work);
    apply(query_key_value, as_const(work.normed), work.fused, context);
    context.q.resize(x.rows, config_.query_width());
    context.k.resize(x.rows, config_.kv_width());
    context.v.resize(x.rows, config_.kv_width());
    for_each_part(context.q, context.k, context.v, work.fused,
                  [&](MatrixView<T> part, MatrixView<const T> of_fused) { backend_.copy(of_fused, part); });
    attend(tokens, context);
    if (!config_.shared_norm) normalize(x, mlp_norm_, context.mlp_norm, work);
    apply(dense_h_to_4h, as_const(work.normed), context.up, context);
    activate(context, work);
    project(dense_4h_to_h, Sublayer::mlp, as_const(work.activated), y, context);
    add_parallel(as_const(work.normed), y, context);
    work.part.resize(x.rows, config_.width);
    project(dense, Sublayer::attention, as_const(context.attended), work.part.view(), context);
    backend_.add(as_const(work.part), y);
    backend_.add(x, y);
  }

  /// d [tokens, width]: in, the gradient of y; out, the gradient of x (left undefined unless want_dx). Overwrites up of the context.
  void backward(MatrixView<const T> x, const Tokens& tokens, MatrixView<T> d, Context& context, Workspace& work, bool want_dx) {
    const Index rows = x.rows;
    const MatrixView<T> none{};
    work.d_normed.resize(rows, config_.width);
    work.part.resize(rows, config_.width);
    // the perceptron
    activate(context, work);
    work.d_wide.resize(rows, config_.mlp_width);
    project_backward(dense_4h_to_h, Sublayer::mlp, d, as_const(work.activated), work.d_wide.view(), context, work);
    backend_.gelu_backward(as_const(work.d_wide), as_const(context.up), context.up.view());
    if (config_.shared_norm) normalize(x, attention_norm_, context.attention_norm, work);
    else normalize(x, mlp_norm_, context.mlp_norm, work);
    back(dense_h_to_4h, as_const(context.up), as_const(work.normed), want_dx ? work.d_normed.view() : none, context);
    add_parallel_backward(d, as_const(work.normed), want_dx ? work.d_normed.view() : none, context);
    // attention
    work.d_wide.resize(rows, config_.query_width());
    const bool further = want_dx || !linears_frozen();
    project_backward(dense, Sublayer::attention, d, as_const(context.attended), further ? work.d_wide.view() : none, context, work);
    if (!further) return;
    attend_backward(tokens, as_const(work.d_wide), context, work);
    work.fused.resize(rows, config_.query_width() + 2 * config_.kv_width());
    for_each_part(work.dq, work.dk, work.dv, work.fused,
                  [&](MatrixView<const T> part, MatrixView<T> of_fused) { backend_.copy(part, of_fused); });
    if (!config_.shared_norm) normalize(x, attention_norm_, context.attention_norm, work);
    back(query_key_value, as_const(work.fused), as_const(work.normed), want_dx ? work.part.view() : none, context);
    if (!want_dx) return;
    if (config_.shared_norm) {
      backend_.add(as_const(work.d_normed), work.part.view());
    } else {
      mlp_norm_.backward(as_const(work.d_normed), x, context.mlp_norm, d, Update::accumulate);
    }
    attention_norm_.backward(as_const(work.part), x, context.attention_norm, d, Update::accumulate);
  }

 private:
  using Base::add_parallel, Base::add_parallel_backward, Base::apply, Base::as_const, Base::attend, Base::attend_backward, Base::back;
  using Base::linears_frozen, Base::normalize, Base::project, Base::project_backward;
  using Base::attention_norm_, Base::backend_, Base::config_, Base::mlp_norm_;
  using enum FalconProjection;

  void activate(Context& context, Workspace& work) const {
    work.activated.resize(context.up.rows(), config_.mlp_width);
    backend_.gelu(as_const(context.up), work.activated.view());
  }

  // f(part, the same elements of `fused`) for q, k and v. With a row for each group of each token all are ranges of columns.
  template <class F>
  void for_each_part(Matrix<T, Memory>& q, Matrix<T, Memory>& k, Matrix<T, Memory>& v, Matrix<T, Memory>& fused, F&& f) const {
    const Index groups = q.rows() * config_.heads.kv_heads, head = config_.heads.head_dim;
    const Index queries = config_.heads.heads / config_.heads.kv_heads * head;
    const MatrixView<T> all(fused.data(), groups, queries + 2 * head);
    f(MatrixView<T>(q.data(), groups, queries), all.left_cols(queries));
    f(MatrixView<T>(k.data(), groups, head), all.middle_cols(queries, head));
    f(MatrixView<T>(v.data(), groups, head), all.middle_cols(queries + head, head));
  }
};

}  // namespace qdylora
