// MultiLoRALinear: several adapters on one frozen base, mixed in a batch. Each row takes the adapter and the rank that an AdapterPlan gives
// it, in training too (PEFT's mixed batches; Punica, Chen et al. 2023, and S-LoRA, Sheng et al. 2023, for inference).
//
// The kernel that multiplies with W, and with it the order of sums, is chosen by the number of rows. So by default
// (BaseProduct::by_adapter) the rows of each adapter, gathered in their order, are a pass of its own: outputs, dx and all gradients are bit
// for bit those of that adapter's DynamicLoRALinear on these rows alone, under the same ranks, seeds and step, with dropout, gates and
// magnitudes. (On Cuda where rows of x and y are whole multiples of 256 bytes: cuBLASLt chooses by alignment too.) The price is that W is
// decoded once for each adapter that has rows.
//
// With BaseProduct::shared x W^T + bias and dy W are one product each for the whole batch. Then bit for bit are each adapter's gradients,
// of the same x and dy; and y and dx too where a row of the base's product has the same bits in a batch of all rows as in one of the
// adapter's alone. The Cpu promises that in exact arithmetic (Compute::exact) from 32 rows an adapter on; else they agree to rounding. (On
// Cuda also gradients, of up to 32 tokens in 16 bits: a layer of its own makes x A^T in the launch of its product.)
#pragma once

#include <algorithm>
#include <memory>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/backend.hpp>
#include <qdylora/nn/adapter_plan.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>

namespace qdylora {

/// How a mixed batch is multiplied with the base: a product for the rows of each adapter, or one for all.
enum class BaseProduct { by_adapter, shared };

/// What the backward pass of one forward pass of a MultiLoRALinear needs. Borrows x where the rows of each adapter stand together, in the
/// adapters' order.
template <Scalar T, MemoryResource Memory>
struct MultiLoRAContext {
  struct Part {
    Index adapter = 0, first = 0, rows = 0;  // of the rows in their order
    DynamicLoRAContext<T, Memory> pass;
  };
  std::vector<Part> parts;
  std::vector<Index> order, places;  // row order[i] is the i-th, row r the places[r]-th; empty: as they are
  Matrix<T, Memory> x;               // in their order
  Index rows = 0;
  bool ready = false;
};

template <Scalar T, class Backend = Cpu, class Format = NF4>
  requires BackendFor<Backend, T> && HasRowSelection<Backend, T>
class MultiLoRALinear : public OwnPass<MultiLoRALinear<T, Backend, Format>, T, typename Backend::Memory,
                                       MultiLoRAContext<T, typename Backend::Memory>> {
  using Own = OwnPass<MultiLoRALinear, T, typename Backend::Memory, MultiLoRAContext<T, typename Backend::Memory>>;

 public:
  using Own::forward, Own::backward;
  using Layer = DynamicLoRALinear<T, Backend, Format>;
  using Acc = typename Layer::Acc;
  using Memory = typename Layer::Memory;
  using WeightType = typename Layer::WeightType;

  using Context = MultiLoRAContext<T, Memory>;

  /// Layers on one base, which become adapters 0, 1, ...; they have one bias, or none. Errc::bad_argument for none, or of several bases;
  /// unsupported for a magnitude or a trained bias where the base's product is shared.
  explicit MultiLoRALinear(std::vector<Layer> layers, BaseProduct product = BaseProduct::by_adapter)
      : layers_(std::move(layers)), product_(product) {
    QDYLORA_EXPECTS(!layers_.empty(), bad_argument, "MultiLoRALinear: no layers");
    for (const Layer& layer : layers_) {
      const auto& name = layer.adapter().options().name;
      QDYLORA_EXPECTS(layer.base() == layers_.front().base(), bad_argument,
                      name + ": its base is not that of " + layers_.front().adapter().options().name);
      QDYLORA_EXPECTS(product == BaseProduct::by_adapter || !(layer.adapter().dora() || layer.adapter().options().train_bias), unsupported,
                      name + ": a magnitude, or a bias that trains, changes the base's output, so its product cannot be shared");
    }
  }
  /// Adapters on a base that exists, made by their options.
  MultiLoRALinear(std::shared_ptr<const WeightType> base, std::vector<LoRAOptions> adapters,
                  BaseProduct product = BaseProduct::by_adapter, Backend backend = {})
      : MultiLoRALinear(layers_on(base, std::move(adapters), backend), product) {}

  Index in() const noexcept { return layers_.front().in(); }
  Index out() const noexcept { return layers_.front().out(); }
  Index adapters() const noexcept { return static_cast<Index>(layers_.size()); }
  const Backend& backend() const noexcept { return layers_.front().backend(); }

  /// The layer of one adapter, to save, to merge or to use alone. Errc::bad_argument for an adapter that is none.
  Layer& at(Index adapter) { return layers_[checked(adapter)]; }
  const Layer& at(Index adapter) const { return layers_[checked(adapter)]; }

  Parameters<Acc, Memory> parameters() const {
    Parameters<Acc, Memory> all;
    for (const Layer& layer : layers_)
      for (auto& parameter : layer.parameters()) all.push_back(std::move(parameter));
    return all;
  }

  void set_bias(MatrixView<const Acc> bias) {
    for (Layer& layer : layers_) layer.set_bias(bias);
  }
  /// The adapters and ranks of the next forward passes. Errc::bad_argument for an adapter that is none, rank_range above its max_rank.
  void set_plan(const AdapterPlan& plan) {
    for (const auto& run : plan.runs()) std::as_const(*this).at(run.adapter).adapter().check_rank(run.rank);
    plan_ = plan;
  }
  /// As DynamicLoRALinear has it, of every adapter. A row's place in the step is its place among the rows of its adapter.
  void set_training(bool training, std::uint32_t step = 0, Index first_row = 0) noexcept {
    for (Layer& layer : layers_) layer.set_training(training, step, first_row);
  }

  /// y [tokens, out] of x [tokens, in]; sets the ranks of the adapters that have rows. Errc::shape_mismatch, also of the plan's rows.
  void forward(In<T> x, MatrixView<T> y, Context& context) {
    context.ready = false;
    expect_shape("MultiLoRALinear: x", x, x.rows, in());
    expect_shape("MultiLoRALinear: y", y, x.rows, out());
    const auto shares = plan_.shares(x.rows);
    divide(shares, context);
    const auto input = in_order(x, context.order, context.x);
    Matrix<T, Memory> gathered;
    const auto output = place_for(y, context, gathered);
    if (product_ == BaseProduct::shared) layers_.front().forward_base(input, output);
    for (std::size_t i = 0; i < shares.size(); ++i) {
      auto& part = context.parts[i];
      Layer& layer = at(part.adapter);
      layer.set_ranks(shares[i].ranks);
      const auto part_x = input.middle_rows(part.first, part.rows);
      const auto part_y = output.middle_rows(part.first, part.rows);
      if (product_ == BaseProduct::shared) layer.forward_adapter(part_x, part_y, part.pass);
      else layer.forward(part_x, part_y, part.pass);
    }
    put_back(gathered, context, y);
    context.rows = x.rows;
    context.ready = true;
  }

  /// An empty dx is not computed. Adapters without rows get no gradients. Throws Errc::state_order unless `context` comes from a forward
  /// pass.
  void backward(In<T> dy, MatrixView<T> dx, Context& context, GradientMode mode = GradientMode::accumulate) {
    QDYLORA_EXPECTS(context.ready, state_order, "MultiLoRALinear: backward before forward");
    expect_shape("MultiLoRALinear: dy", dy, context.rows, out());
    const bool want_dx = dx.data != nullptr;
    if (want_dx) expect_shape("MultiLoRALinear: dx", dx, context.rows, in());
    Matrix<T, Memory> gathered_dy, gathered_dx;
    const auto input = in_order(dy, context.order, gathered_dy);
    const auto output = want_dx ? place_for(dx, context, gathered_dx) : dx;
    if (product_ == BaseProduct::shared && want_dx) layers_.front().backward_base(input, output);
    for (auto& part : context.parts) {
      const auto part_dy = input.middle_rows(part.first, part.rows);
      const auto part_dx = want_dx ? output.middle_rows(part.first, part.rows) : dx;
      if (product_ == BaseProduct::shared) at(part.adapter).backward_adapter(part_dy, part_dx, part.pass, mode);
      else at(part.adapter).backward(part_dy, part_dx, part.pass, mode);
    }
    if (want_dx) put_back(gathered_dx, context, dx);
  }

 private:
  static std::vector<Layer> layers_on(const std::shared_ptr<const WeightType>& base, std::vector<LoRAOptions> adapters, Backend backend) {
    std::vector<Layer> layers;
    layers.reserve(adapters.size());
    for (auto& options : adapters) layers.emplace_back(base, std::move(options), backend);
    return layers;
  }

  std::size_t checked(Index adapter) const {
    QDYLORA_EXPECTS(adapter >= 0 && adapter < adapters(), bad_argument,
                    "MultiLoRALinear: adapter " + std::to_string(adapter) + " is not in 0 ... " + std::to_string(adapters() - 1));
    return static_cast<std::size_t>(adapter);
  }

  // The parts and the order of a batch.
  static void divide(const std::vector<AdapterPlan::Share>& shares, Context& context) {
    context.parts.resize(shares.size());
    context.order.clear();
    for (std::size_t i = 0; i < shares.size(); ++i) {
      auto& part = context.parts[i];
      part.adapter = shares[i].adapter;
      part.first = static_cast<Index>(context.order.size());
      part.rows = static_cast<Index>(shares[i].rows.size());
      context.order.insert(context.order.end(), shares[i].rows.begin(), shares[i].rows.end());
    }
    if (std::ranges::is_sorted(context.order)) context.order.clear();
    context.places.resize(context.order.size());
    for (Index place = 0; const Index row : context.order) context.places[static_cast<std::size_t>(row)] = place++;
  }

  // Rows in the order of a pass: x itself, or gathered.
  MatrixView<const T> in_order(MatrixView<const T> x, const std::vector<Index>& order, Matrix<T, Memory>& gathered) const {
    if (order.empty()) return x;
    gathered.resize(x.rows, x.cols);
    backend().gather_rows(x, std::span<const Index>(order), gathered.view());
    return gathered.view();
  }
  // Where a pass writes rows in its order: to y itself, or to memory that put_back reads.
  MatrixView<T> place_for(MatrixView<T> y, const Context& context, Matrix<T, Memory>& gathered) const {
    if (context.order.empty()) return y;
    gathered = temporary<T>(backend(), y.rows, y.cols);
    return gathered.view();
  }
  void put_back(const Matrix<T, Memory>& gathered, const Context& context, MatrixView<T> y) const {
    if (!context.order.empty()) backend().gather_rows(gathered.view(), std::span<const Index>(context.places), y);
  }

  std::vector<Layer> layers_;
  BaseProduct product_;
  AdapterPlan plan_;
};

}  // namespace qdylora
