// DynamicLoRALinear: a frozen linear layer, quantized, with a low-rank adapter that can run at any rank (QDyLoRA, Rajabzadeh et al. 2024).
//
//   forward    y  = x W^T + bias + u B_b,         z = dropout(x) A_b^T,   u = z * s_b g_b          (b = the row's rank)
//   backward   dx = dy W + mask(dz A_b),          t = dy B_b^T,           dz = t * s_b g_b
//              dB += u^T dy,   dA += dz^T dropout(x),   dg_b[i] += s_b sum z[:, i] t[:, i]
//   x [tokens, in], y [tokens, out], W [out, in], A_b [b, in], B_b [b, out], z, u, t, dz [tokens, b]
//
// With LoRAOptions::dora each output is multiplied with a factor before the bias is added, and dropout has a part in it: nn/magnitude.hpp.
// With LoRAOptions::train_bias the bias is the adapter's at every rank but 0, and dbias += the sum of dy's rows of such ranks.
// The base output does not depend on the adapter: at rank 0 it is the whole output, bit for bit. W is decoded anew in each pass; nothing
// of it is kept in full precision. One layer serves any number of passes in flight: what backward needs lives in a Context of the
// caller's.
#pragma once

#include <memory>
#include <string>
#include <utility>

#include <qdylora/backend.hpp>
#include <qdylora/nn/adapter_layer.hpp>
#include <qdylora/nn/column_sums.hpp>
#include <qdylora/nn/kept.hpp>
#include <qdylora/nn/magnitude.hpp>
#include <qdylora/nn/own_pass.hpp>
#include <qdylora/nn/rounded_factors.hpp>
#include <qdylora/nn/weight.hpp>

namespace qdylora {

/// What the backward pass of one forward pass of a DynamicLoRALinear needs.
template <Scalar T, MemoryResource Memory>
struct DynamicLoRAContext : AdapterContext<T, Memory> {
  MagnitudeContext<T, Memory> magnitude;
};

template <Scalar T, class Backend = Cpu, class Format = NF4>
  requires BackendFor<Backend, T>
class DynamicLoRALinear : public AdapterLayer<T, Backend>,
                          public OwnPass<DynamicLoRALinear<T, Backend, Format>, T, typename Backend::Memory,
                                         DynamicLoRAContext<T, typename Backend::Memory>> {
  using Base = AdapterLayer<T, Backend>;
  using Own = OwnPass<DynamicLoRALinear, T, typename Backend::Memory, DynamicLoRAContext<T, typename Backend::Memory>>;

 public:
  using Own::forward, Own::backward;
  using typename Base::Acc, typename Base::Adapter, typename Base::Memory;
  using Base::in, Base::out;
  using WeightType = WeightFor<Format, Memory>;

  using Context = DynamicLoRAContext<T, Memory>;

  /// Quantizes `weight` [out, in] into the layer's format.
  template <class S>
  DynamicLoRALinear(MatrixView<S> weight, LoRAOptions options, QuantizeOptions quantize = {}, Backend backend = {})
      : DynamicLoRALinear(std::make_shared<const WeightType>(make_weight<Format>(weight, quantize, backend)), std::move(options), backend) {}
  template <class S, class M>
  DynamicLoRALinear(const Matrix<S, M>& weight, LoRAOptions options, QuantizeOptions quantize = {}, Backend backend = {})
      : DynamicLoRALinear(weight.view(), std::move(options), quantize, backend) {}
  /// On a base that exists, shared with other layers. Throws Errc::unsupported for a magnitude on a backend without HasMagnitude.
  DynamicLoRALinear(std::shared_ptr<const WeightType> base, LoRAOptions options, Backend backend = {})
      : Base(adapter_of(base, std::move(options)), backend), base_(std::move(base)) {
    if (!adapter_.dora()) return;
    if constexpr (HasMagnitude<Backend, T>) {
      norms_ = std::make_unique<RowNorms<Acc, Memory>>(*base_, backend_);
      norms_->begin(adapter_, backend_);
    } else {
      throw Error(Errc::unsupported, adapter_.options().name + ": the backend lacks what a magnitude takes");
    }
  }

  /// A layer that stays as it is: its one rank is 0, it has no parameters.
  static DynamicLoRALinear frozen(std::shared_ptr<const WeightType> base, const std::string& name, Backend backend = {}) {
    base = checked(std::move(base), name);
    auto none = Adapter::none(base->cols(), base->rows(), name);
    return DynamicLoRALinear(std::move(base), std::move(none), backend);
  }

  const std::shared_ptr<const WeightType>& base() const noexcept { return base_; }
  /// Another base [out, in], between one pass's backward and the next one's forward. Errc::bad_argument for none, shape_mismatch.
  void set_base(std::shared_ptr<const WeightType> base) {
    expect_unmerged();
    expect_shape((adapter_.options().name + ": base").c_str(), *checked(base, adapter_.options().name), out(), in());
    base_ = std::move(base);
    if constexpr (HasMagnitude<Backend, T>)
      if (norms_) norms_ = std::make_unique<RowNorms<Acc, Memory>>(*base_, backend_);
  }
  /// For writing, after which what passes keep of it is made anew; see set_training.
  Adapter& adapter() noexcept {
    forget_kept();
    return adapter_;
  }
  const Adapter& adapter() const noexcept { return adapter_; }

  /// A frozen bias [1, out] added to the base output; with LoRAOptions::train_bias what the adapter's, one of parameters(), begins with.
  void set_bias(MatrixView<const Acc> bias) {
    expect_shape((adapter_.options().name + ": bias").c_str(), bias, 1, out());
    bias_ = Matrix<Acc, Memory>(1, out());
    backend_.copy(bias, bias_.view());
    if (!adapter_.options().train_bias) return;
    adapter_.add_bias();
    backend_.fill(adapter_.bias().gradient.view(), Acc{});
    backend_.copy(bias, adapter_.bias().value.view());
  }
  /// The frozen one, empty where there is none.
  MatrixView<const Acc> bias() const noexcept { return bias_.view(); }

  /// As AdapterLayer has it. What is made of A and B for a pass (a magnitude's norms of rows, factors in T for HasAdapterTerm) is made in every
  /// pass while training. Else it is kept until this is called again, adapter() is, or a backward pass adds gradients: whoever changes A or B
  /// by other ways says so by calling this.
  void set_training(bool training, std::uint32_t step = 0, Index first_row = 0) noexcept {
    forget_kept();
    Base::set_training(training, step, first_row);
  }

  void forward(In<T> x, MatrixView<T> y, Context& context) const {
    begin(x, y, context);
    if (merged()) {
      backend_.matmul(x, as_const(merged_), y, Update::overwrite);
      return add_bias(y, RankPlan::uniform(merged_rank_));
    }
    const Index rank = plan_.max_rank();
    if (adapter_.dora() && rank > 0) {
      forward_magnitude(y, context, rank);
    } else {
      const bool adapted = base_->visit([&](const auto& w) { return multiply(w, y, context, rank); });
      add_bias(y, plan_);
      if (rank > 0 && !adapted) add_product(y, context, rank);
    }
    context.ready = true;
  }

  /// An empty dx is not computed. Throws Errc::state_order unless `context` comes from a forward pass.
  void backward(In<T> dy, MatrixView<T> dx, Context& context, GradientMode mode = GradientMode::accumulate) {
    expect_unmerged();
    expect_backward(dy, dx, context);
    const auto x = context.x;
    const bool want_dx = dx.data != nullptr;
    const Index rank = context.plan.max_rank();
    if (mode == GradientMode::accumulate) bias_gradient(dy, context.plan);
    Matrix<T, Memory> scaled_dy;
    const bool dropped = context.dropped.size() > 0;
    bool have_dx = !want_dx;
    if constexpr (HasMagnitude<Backend, T>)
      if (adapter_.dora() && rank > 0) {
        if (mode == GradientMode::accumulate) magnitude_gradient(dy, context.plan, context.magnitude, adapter_, backend_);
        if (want_dx && dropped) {  // dy W + mask(((m / n - 1) * dy) W)
          backward_base(dy, dx);
          have_dx = true;
          auto excess = temporary<T>(backend_, x.rows, out()), masked = temporary<T>(backend_, x.rows, in());
          scale_by_factors(dy, context.plan, context.magnitude, adapter_, 1, excess.view(), backend_);
          backward_base(as_const(excess), masked.view());
          backend_.dropout(as_const(masked), adapter_.options().dropout, context.dropout, dx, Update::accumulate);
        }
        scaled_dy = temporary<T>(backend_, x.rows, out());
        scale_by_factors(dy, context.plan, context.magnitude, adapter_, 0, scaled_dy.view(), backend_);
        dy = scaled_dy.view();
      }
    const bool together = !have_dx && base_->visit([&](const auto& w) { return takes_transposed(w, dy, context); });
    if (!have_dx && !together) backward_base(dy, dx);
    add_backward(dy, dx, context, mode, together);
  }

  /// The two parts of forward and backward, for adapters that share the base's: y = x W^T + bias, then y += u B; dx = dy W, then
  /// dx += mask(dz A) and the gradients. The bits are those of the whole, unless the backend has it in one product (HasAdapterTerm). An
  /// adapter's part throws as the whole does, and Errc::unsupported with a magnitude or a bias that trains, which have no parts.
  void forward_base(In<T> x, MatrixView<T> y) const {
    base_->visit([&](const auto& w) { backend_.matmul(x, w, y, Update::overwrite); });
    if (bias_.size() > 0) backend_.add_row(bias_.view(), y);
  }
  void backward_base(In<T> dy, MatrixView<T> dx) const {
    base_->visit([&](const auto& w) { backend_.matmul_transposed(dy, w, dx, Update::overwrite); });
  }
  void forward_adapter(In<T> x, MatrixView<T> y, Context& context) const {
    begin(x, y, context);
    expect_parts();
    if (const Index rank = plan_.max_rank(); rank > 0) add_product(y, context, rank);
    context.ready = true;
  }
  void backward_adapter(In<T> dy, MatrixView<T> dx, Context& context, GradientMode mode = GradientMode::accumulate) {
    expect_backward(dy, dx, context);
    expect_parts();
    add_backward(dy, dx, context, mode);
  }

  /// From now on, until unmerge(), forward passes multiply with W + delta W_b alone, whatever ranks are set: a faster model between steps,
  /// for out x in numbers more. Neither W nor the adapter changes, which makes unmerge() exact: a sum is rounded, and W' - delta W would not
  /// be W. Meanwhile backward, set_base and an adapter's parts of passes throw Errc::state_order; what A and B become is not in the sum.
  void merge(Index rank) {
    merged_ = merged_weight(rank);
    merged_rank_ = rank;
  }
  void unmerge() noexcept { merged_ = {}; }
  bool merged() const noexcept { return merged_.size() > 0; }

  /// W + delta W_b, dense; with a magnitude its rows have that length. (Quantizing the sum again would lose most of a small delta.)
  Matrix<Acc, Memory> merged_weight(Index rank) const {
    adapter_.check_rank(rank);
    Matrix<Acc, Memory> merged(out(), in());
    decode(*base_, merged.view(), backend_);
    if (rank == 0) return merged;
    // delta W = U^T A with U[i, :] = coefficient_i * B[i, :]
    const auto coefficients = adapter_.coefficients(rank, rank);
    Matrix<Acc> on_host(rank, out());
    backend_.download(rows_of(adapter_.b(), rank), on_host.view());
    for (Index i = 0; i < rank; ++i)
      for (Index j = 0; j < out(); ++j) on_host(i, j) *= coefficients[static_cast<std::size_t>(i)];
    Matrix<Acc, Memory> scaled(rank, out());
    backend_.upload(as_const(on_host), scaled.view());
    exact(backend_).weight_gradient(as_const(scaled), rows_of(adapter_.a(), rank), merged.view(), Update::accumulate);
    backend_.synchronize();  // on_host is given back
    if constexpr (HasMagnitude<Backend, T>)
      if (adapter_.dora()) {
        MagnitudeContext<T, Memory> context;
        norms_->find(context.norms, RankPlan::uniform(rank), 1, adapter_, *base_, exact(backend_), false);
        const auto there = context.factors(rank, adapter_, 0, backend_);
        scale_weight_rows<Acc>(as_const(there), merged.view(), backend_);
      }
    return merged;
  }

 private:
  DynamicLoRALinear(std::shared_ptr<const WeightType> base, Adapter adapter, Backend backend)
      : Base(std::move(adapter), backend), base_(std::move(base)) {}

  // product = x W^T. Where the backend takes the adapter along, u B is added; returns whether it was.
  template <class W>
  bool multiply(const W& w, MatrixView<T> product, Context& context, Index rank) const {
    const auto x = context.x;
    if constexpr (HasAdapterTerm<Backend, T, W>)
      if (rank > 0 && backend_.takes_adapter(x, w, rank)) {
        std::shared_ptr<const Factors> kept;
        Factors own;
        if (!training_ && x.rows <= most_rows_of_kept_factors)
          kept = kept_factors_->find(backend_, [&](Factors& all) { all.assign(adapter_, adapter_.max_rank(), backend_); });
        if (!kept) own.assign(adapter_, rank, backend_);
        const Factors& factors = kept ? *kept : own;
        AdapterTerm<T> term{.b = factors.b.view().top_rows(rank)};
        Matrix<Acc, Memory> u;
        const bool one_scale = plan_.is_uniform() && !adapter_.gated();
        begin_projection(context);
        if (one_scale && context.dropped.size() == 0) term.a = factors.a.view().top_rows(rank);
        else project(context);
        if (one_scale) term.scale = adapter_.scale(rank);
        else u = scaled_z(context, rank);
        term.u = one_scale ? context.z.view() : u.view();
        backend_.matmul(x, w, product, Update::overwrite, term);
        return true;
      }
    backend_.matmul(x, w, product, Update::overwrite);
    return false;
  }

  // y += u B
  void add_product(MatrixView<T> y, Context& context, Index rank) const {
    project_down(context);
    const auto u = scaled_z(context, rank);
    detail::add_from_ranks(backend_, as_const(u), rows_of(adapter_.b(), rank), context.plan, y);
  }

  // dx = dy W + dz A in one product, where takes_transposed.
  template <class W>
  bool takes_transposed(const W& w, MatrixView<const T> dy, const Context& context) const {
    const Index rank = context.plan.max_rank();
    if constexpr (HasAdapterTerm<Backend, T, W>)
      return rank > 0 && context.dropped.size() == 0 && backend_.takes_adapter_transposed(dy, w, rank);
    else return false;
  }
  template <class W>
  void multiply_transposed(const W& w, MatrixView<const T> dy, MatrixView<Acc> dz, MatrixView<T> dx) const {
    if constexpr (HasAdapterTerm<Backend, T, W>) {
      auto a = temporary<T>(backend_, dz.cols, in());
      backend_.copy(rows_of(adapter_.a(), dz.cols), a.view());
      backend_.matmul_transposed(dy, w, dx, Update::overwrite, AdapterTerm<T>{.u = dz, .b = as_const(a)});
    }
  }

  // Gradients, and dx += mask(dz A), or dx = dy W + dz A where the base's part is yet to come.
  void add_backward(MatrixView<const T> dy, MatrixView<T> dx, Context& context, GradientMode mode, bool with_base = false) {
    const bool want_dx = dx.data != nullptr;
    const Index rank = context.plan.max_rank();
    if (rank == 0 || (!want_dx && mode == GradientMode::ignore)) return;
    auto t = temporary<Acc>(backend_, dy.rows, rank), work = temporary<Acc>(backend_, dy.rows, rank);
    detail::through_ranks(backend_, dy, rows_of(adapter_.b(), rank), context.plan, t.view());
    if (mode == GradientMode::accumulate) {
      forget_kept();
      scale_rows(context.z.view(), context.plan, work.view(), true);
      detail::add_rank_gradient(backend_, as_const(work), dy, context.plan, adapter_.b().gradient.view());
      scale_rows(t.view(), context.plan, work.view(), true);
      detail::add_rank_gradient(backend_, as_const(work), adapter_input(context), context.plan, adapter_.a().gradient.view());
      if constexpr (Memory::host)
        if (adapter_.gated()) detail::add_gate_gradients(backend_, adapter_, context.plan, as_const(context.z), as_const(t));
      if (adapter_.collecting) detail::collect_moments(backend_, adapter_, as_const(context.z), as_const(t));
      detail::touch_ranks(adapter_, context.plan);
    }
    if (!want_dx) return;
    scale_rows(t.view(), context.plan, work.view(), false);
    if (with_base) base_->visit([&](const auto& w) { multiply_transposed(w, dy, work.view(), dx); });
    else add_input_gradient(as_const(work), context, dx);
  }

  void expect_unmerged() const {
    QDYLORA_EXPECTS(!merged(), state_order, name() + ": merged at rank " + std::to_string(merged_rank_) + "; unmerge() comes first");
  }
  void expect_parts() const {
    expect_unmerged();
    QDYLORA_EXPECTS(!adapter_.dora() && !adapter_.biased(), unsupported,
                    name() + ": with a magnitude, or a bias that trains, the adapter has no part of its own");
  }

  // y = what a magnitude makes of it, and what backward needs of that: nn/magnitude.hpp.
  void forward_magnitude(MatrixView<T> y, Context& context, Index rank) const {
    if constexpr (HasMagnitude<Backend, T>) {
      project_down(context);
      const bool dropped = context.dropped.size() > 0;
      auto& magnitude = context.magnitude;
      magnitude.product.resize(y.rows, out());
      const MatrixView<T> v = magnitude.product.view();
      const auto b = rows_of(adapter_.b(), rank);
      base_->visit([&](const auto& w) {
        backend_.matmul(adapter_input(context), w, v, Update::overwrite);
        if (dropped) backend_.matmul(context.x, w, y, Update::overwrite);
      });
      {
        const auto u = scaled_z(context, rank);
        detail::add_from_ranks(backend_, as_const(u), b, context.plan, v);
        if (dropped) detail::add_from_ranks(backend_, as_const(u), b, context.plan, y);
      }
      norms_->find(magnitude.norms, plan_, y.rows, adapter_, *base_, backend_, !training_);
      if (dropped) {
        auto excess = temporary<T>(backend_, y.rows, out());
        scale_by_factors(v, plan_, magnitude, adapter_, 1, excess.view(), backend_);
        backend_.add(as_const(excess), y);
      } else {
        scale_by_factors(v, plan_, magnitude, adapter_, 0, y, backend_);
      }
      add_bias(y, plan_);
    }
  }

  // y += the bias of each row's rank.
  void add_bias(MatrixView<T> y, const RankPlan& plan) const {
    if (bias_.size() == 0) return;
    if (!adapter_.biased()) return backend_.add_row(bias_.view(), y);
    plan.for_each_run(y.rows, [&](Index first, Index count, Index rank) {
      backend_.add_row(rank > 0 ? as_const(adapter_.bias().value) : bias_.view(), y.middle_rows(first, count));
    });
  }
  void bias_gradient(MatrixView<const T> dy, const RankPlan& plan) {
    if (!adapter_.biased()) return;
    plan.for_each_run(dy.rows, [&](Index first, Index count, Index rank) {
      if (rank == 0) return;
      detail::add_column_sums(backend_, dy.middle_rows(first, count), adapter_.bias().gradient.view());
      adapter_.bias().touch(0, 1);
    });
  }

  // u = z * s_b g_b
  Matrix<Acc, Memory> scaled_z(const Context& context, Index rank) const {
    auto u = temporary<Acc>(backend_, context.x.rows, rank);
    scale_rows(context.z.view(), context.plan, u.view(), false);
    return u;
  }

  static std::shared_ptr<const WeightType> checked(std::shared_ptr<const WeightType> base, const std::string& name) {
    QDYLORA_EXPECTS(base != nullptr, bad_argument, name + ": no base weight");
    return base;
  }

  static Adapter adapter_of(const std::shared_ptr<const WeightType>& base, LoRAOptions options) {
    checked(base, options.name);
    return Adapter(base->cols(), base->rows(), std::move(options));
  }

  void forget_kept() noexcept {
    if (norms_) norms_->forget();
    kept_factors_->forget();
  }

  using Base::adapter_input, Base::add_input_gradient, Base::as_const, Base::begin, Base::begin_projection, Base::expect_backward;
  using Base::name, Base::project, Base::project_down;
  using Base::adapter_, Base::backend_, Base::plan_, Base::rows_of, Base::scale_rows, Base::training_;

  std::shared_ptr<const WeightType> base_;
  Matrix<Acc, Memory> bias_, merged_;
  Index merged_rank_ = 0;
  std::unique_ptr<RowNorms<Acc, Memory>> norms_;  // with a magnitude
  using Factors = RoundedFactors<T, Memory>;
  std::unique_ptr<Kept<Factors>> kept_factors_ = std::make_unique<Kept<Factors>>();  // of all rows
};

}  // namespace qdylora
