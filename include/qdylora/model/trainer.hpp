// Trainer: runs a recipe on a decoder, one optimizer step at a time.
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <concepts>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/model/decoder.hpp>
#include <qdylora/model/recipe.hpp>
#include <qdylora/model/reorder_adapters.hpp>
#include <qdylora/optim/adamw.hpp>
#include <qdylora/optim/loss_scale.hpp>
#include <qdylora/optim/schedule.hpp>
#include <qdylora/optim/workers.hpp>

namespace qdylora {

struct TrainerOptions {
  Recipe recipe = qdylora::recipe("auto");
  RankSet ranks = RankSet::powers_of_two(64);
  std::int64_t steps = 100;
  double lr = 1e-3;
  std::int64_t warmup_steps = 20;
  double lr_floor = 0.1;  // the cosine ends at this share of lr
  double max_gradient_norm = 1.0;
  double weight_decay = 0.0;
  double gate_lr = 5.0;     // of gates, relative to lr
  double b_lr_ratio = 1.0;  // of B, relative to A: LoRA+ (Hayou et al. 2024), which finds about 16 good for fine-tuning
  std::uint64_t seed = 0;
  LossScaleOptions loss_scale = {};  // for T = half
};

/// Optimizer is AdamW, AdamW8bit or Lion, of what the model trains; gates are few and have AdamW.
template <Scalar T, class Backend = Cpu, class Optimizer = AdamW<T, Backend>>
class Trainer {
 public:
  using Acc = Accumulator<T>;
  using Model = Decoder<T, Backend>;

  /// `moments` is where the optimizer keeps its state.
  Trainer(Model& model, TrainerOptions options, typename Optimizer::Memory moments = {})
      : model_(model),
        options_(std::move(options)),
        optimizer_(model.parameters(), optimizer_options(options_), model.backend(), moments),
        gate_optimizer_(gate_parameters(model), gate_adamw_options(options_), model.backend()),
        sampler_(options_.ranks, Rng(options_.seed), sampler_options()),
        schedule_{Schedule::Shape::cosine, options_.steps, options_.warmup_steps, options_.lr_floor},
        loss_scale_(std::same_as<T, half> ? LossScale(options_.loss_scale) : LossScale()),
        order_step_(static_cast<std::int64_t>(std::llround(options_.recipe.order_at * static_cast<double>(options_.steps)))) {
    QDYLORA_EXPECTS(options_.steps >= 1, bad_argument, "Trainer: steps must be positive");
    QDYLORA_EXPECTS(options_.recipe.order_at >= 0.0 && options_.recipe.order_at <= 1.0, bad_argument,
                    "Trainer: the recipe's order_at is a share of the steps, 0 ... 1");
    QDYLORA_EXPECTS(options_.b_lr_ratio > 0.0 && std::isfinite(options_.b_lr_ratio), bad_argument,
                    "Trainer: b_lr_ratio must be positive");
    expect_fits(options_.recipe, model.options().method);
    QDYLORA_EXPECTS(options_.ranks.max() == model.options().lora.max_rank, rank_range,
                    "Trainer: the largest rank is " + std::to_string(options_.ranks.max()) + ", the model's adapters have " +
                        std::to_string(model.options().lora.max_rank));
  }

  struct Report {
    double loss = 0.0;           // mean over the scored tokens
    double gradient_norm = 0.0;  // before clipping
    double lr = 0.0;
    Index rank = 0;  // the largest of the step
    Index tokens = 0;
    bool skipped = false;  // the gradient was not finite
    int repeats = 0;       // of the pass, as a gradient left the range of half: at half the loss scale, each time
  };

  /// Sequences that measure what each rank loses, for recipes that measure; they should not be trained on. Without any, such a recipe
  /// spends what order-then-nest does.
  void hold_back(std::vector<Batch> batches) {
    for (const auto& batch : batches) model_.check(batch);
    held_back_ = std::move(batches);
  }
  void hold_back(Batch batch) {
    std::vector<Batch> one;
    one.push_back(std::move(batch));
    hold_back(std::move(one));
  }

  /// Makes this one of several workers. Each gives step() its part of a batch, possibly none; together they take the step that one trainer
  /// takes on all parts in the workers' order, but for the rounding of sums, and all report it. Either all hold batches back or none does.
  /// A worker whose step throws leaves the others waiting for as long as their engine has patience.
  void join(Workers<Acc, typename Backend::Memory> workers) { workers_ = std::move(workers); }

  std::int64_t steps() const noexcept { return options_.steps; }
  std::int64_t step_count() const noexcept { return step_; }
  bool done() const noexcept { return step_ >= options_.steps; }
  const TrainerOptions& options() const noexcept { return options_; }

  /// One optimizer step on micro-batches that count as one batch: the loss is the mean over all their scored tokens. Re-orders the adapters
  /// when the recipe says so; after the last step too. Throws Errc::state_order when the run is done, bad_argument if nothing is scored.
  Report step(std::span<const Batch> batches) {
    QDYLORA_EXPECTS(!done(), state_order, "Trainer: all " + std::to_string(options_.steps) + " steps are done");
    BatchCounts own;
    for (const auto& batch : batches) {
      model_.check(batch);  // before anything changes
      own += batch.counts();
    }
    auto [first, all] = exchange(own);  // by now no worker can fail alone but by its memory
    QDYLORA_EXPECTS(all.scored > 0, bad_argument, "Trainer: no token of the batch is scored");
    if (step_ == order_step_ && !nesting_) begin_nesting();
    collect();
    const RankPlan plan = next_plan(all.sequences);
    Report report;
    report.tokens = all.tokens;
    report.rank = plan.max_rank();
    report.lr = set_learning_rates();

    const double scale = loss_scale_.value();
    const auto moments = scale > 1.0 ? copies_of(collected_moments(model_)) : Copies{};
    double sum = 0.0;
    typename Optimizer::Report result;
    while (true) {
      sum = gradients(batches, plan, first, all);
      result = optimizer_.step(loss_scale_.value());
      const bool overflowed = result.skipped && std::isfinite(sum) && !std::isfinite(result.gradient_norm);
      if (!overflowed || !loss_scale_.lower()) break;
      optimizer_.restore_counts(optimizer_.step_count(), optimizer_.skipped_steps() - 1);  // it is the same step still
      put(moments, collected_moments(model_));
      scale_moments(loss_scale_.value() / scale);
      ++report.repeats;
    }
    const double last_scale = loss_scale_.value();
    if (!result.skipped && nesting_) gate_optimizer_.step(last_scale);
    loss_scale_.end_step(result.skipped);
    scale_moments(loss_scale_.value() / last_scale);
    report.loss = sum / static_cast<double>(all.scored);
    report.gradient_norm = result.gradient_norm;
    report.skipped = result.skipped;
    ++step_;
    if (done()) finish();
    return report;
  }
  Report step(const Batch& batch) { return step(std::span<const Batch>(&batch, 1)); }

  /// Mean loss of the batches at each rank of the set, and without adapter at the end (by AdapterMethod::full there is no such); without
  /// dropout.
  std::vector<double> losses_by_rank(std::span<const Batch> batches) {
    std::vector<double> result;
    model_.set_training(false);
    const auto mean = [&](Index rank) {
      model_.set_ranks(RankPlan::uniform(rank));
      double sum = 0.0;
      std::size_t scored = 0;
      for (const auto& batch : batches) {
        const auto losses = model_.losses(batch);
        for (const double loss : losses) sum += loss;
        scored += losses.size();
      }
      result.push_back(sum / static_cast<double>(std::max<std::size_t>(scored, 1)));
    };
    for (const Index rank : options_.ranks) mean(rank);
    if (model_.options().method != AdapterMethod::full) mean(0);
    return result;
  }

  std::vector<double> losses_by_rank(const Batch& batch) { return losses_by_rank(std::span<const Batch>(&batch, 1)); }

  /// What `auto` decided; empty weights before it did.
  const NestedShare& nested() const noexcept { return nested_share_; }
  bool reordered_at_end() const noexcept { return reordered_at_end_; }
  std::int64_t skipped_steps() const noexcept { return optimizer_.skipped_steps(); }
  double loss_scale() const noexcept { return loss_scale_.value(); }

  Optimizer& optimizer() noexcept { return optimizer_; }
  AdamW<T, Backend>& gate_optimizer() noexcept { return gate_optimizer_; }

  /// Everything but parameters, optimizers and collected moments that a resumed run needs.
  struct State {
    std::int64_t step = 0;
    bool nesting = false;
    RankSampler::State sampler;
    NestedShare nested;
    bool reordered_at_end = false;
    LossScale::State loss_scale = {};
  };
  State state() const { return {step_, nesting_, sampler_.state(), nested_share_, reordered_at_end_, loss_scale_.state()}; }
  /// Throws Errc::bad_argument if the state cannot be of a run with these options, shape_mismatch if it is of other ranks.
  void restore(const State& state) {
    const bool chose_not_to = !state.nested.weights.empty() && state.nested.share == 0.0;
    QDYLORA_EXPECTS(state.step >= 0 && state.step <= options_.steps &&
                        state.nesting == (order_step_ < options_.steps && state.step > order_step_ && !chose_not_to),
                    bad_argument, "Trainer::restore: the state at step " + std::to_string(state.step) + " is of another run");
    loss_scale_.restore(state.loss_scale);
    step_ = state.step;
    nesting_ = state.nesting;
    nested_share_ = state.nested;
    reordered_at_end_ = state.reordered_at_end;
    sampler_ = RankSampler(options_.ranks, Rng(options_.seed), sampler_options());
    sampler_.restore(state.sampler);
  }
  /// Whether moments were gathered for a re-ordering that is still to come, so that a checkpoint keeps them.
  bool collecting() const noexcept {
    const auto& r = options_.recipe;
    return order_step_ < options_.steps && r.ordering == Reordering::gram && step_ > 0 && step_ <= order_step_ &&
           step_ > order_step_ - r.collect_steps;
  }

 private:
  static typename Optimizer::Options optimizer_options(const TrainerOptions& o) {
    typename Optimizer::Options options;
    options.lr = o.lr;
    options.weight_decay = o.weight_decay;
    options.max_gradient_norm = o.max_gradient_norm;
    return options;
  }
  static AdamWOptions gate_adamw_options(const TrainerOptions& o) {
    AdamWOptions options;
    options.lr = o.lr * o.gate_lr;
    options.beta2 = 0.99;
    return options;
  }
  static Parameters<Acc, typename Backend::Memory> gate_parameters(const Model& model) {
    Parameters<Acc, typename Backend::Memory> all;
    model.for_each_trained([&](const auto& linear) {
      for (auto& p : linear.adapter().gate_parameters()) all.push_back(std::move(p));
    });
    return all;
  }

  // Whether the gaps of the ranks are known (auto, from the re-ordering on); without held-back sequences they never are.
  bool measured() const noexcept { return !nested_share_.weights.empty(); }

  SamplerOptions sampler_options() const {
    SamplerOptions options;
    options.granularity = options_.recipe.granularity;
    options.full_share = options_.recipe.full_share;
    if (options_.recipe.geometric != 0.0) options.weights = geometric_weights(options_.ranks, options_.recipe.geometric);
    if (nested_share_.share > 0.0) {
      options.full_share = 1.0 - nested_share_.share;
      options.weights = nested_share_.weights;
    }
    return options;
  }

  // Of the workers before this one, and of all: ranks are dealt out over all sequences, dropout goes by a token's place among all, and the
  // loss is the mean over all that are scored.
  std::pair<BatchCounts, BatchCounts> exchange(const BatchCounts& own) {
    if (workers_.alone()) return {{}, own};
    Matrix<double> table(workers_.count(), 3);  // a row of each, which the others leave zero
    const std::array row{own.sequences, own.tokens, own.scored};
    std::copy(row.begin(), row.end(), table.view().row(workers_.index()));
    workers_.sum({}, table.span(), model_.backend());
    BatchCounts before, all;
    for (Index i = 0; i < table.rows(); ++i) {
      if (i == workers_.index()) before = all;
      all += {static_cast<Index>(table(i, 0)), static_cast<Index>(table(i, 1)), static_cast<Index>(table(i, 2))};
    }
    return {before, all};
  }

  // The loss, and gradients of loss_scale_ times it, of the batches and all workers.
  double gradients(std::span<const Batch> batches, const RankPlan& plan, BatchCounts first, const BatchCounts& all) {
    optimizer_.zero_grad();
    gate_optimizer_.zero_grad();
    double sum = 0.0;
    for (const auto& batch : batches) {
      model_.set_ranks(plan.middle_rows(first.sequences, batch.sequences()));
      model_.set_training(true, static_cast<std::uint32_t>(step_), first.tokens);
      sum += model_.loss_and_gradient(batch, loss_scale_.value() / static_cast<double>(all.scored));
      first += batch.counts();
    }
    model_.set_training(false);
    const Index rows = has_ranks(model_.options().method) ? plan.max_rank() : std::numeric_limits<Index>::max();
    workers_.sum_gradients(parameters(optimizer_, gate_optimizer_), rows, {&sum, 1}, model_.backend());
    return sum;
  }

  // Moments of gradients, every other one, are of the scale that gradients have.
  void scale_moments(double factor) {
    if (factor == 1.0) return;
    const auto moments = collected_moments(model_);
    for (std::size_t i = 1; i < moments.size(); i += 2) {
      const std::vector<Acc> squares(static_cast<std::size_t>(moments[i].cols), static_cast<Acc>(factor * factor));
      model_.backend().scale_columns(MatrixView<const Acc>(moments[i]), std::span<const Acc>(squares), moments[i]);
    }
  }

  RankPlan next_plan(Index sequences) {
    return nesting_ || options_.recipe.draw_ranks ? sampler_.next(sequences) : RankPlan::uniform(options_.ranks.max());
  }

  void collect() {
    const auto& r = options_.recipe;
    const bool want =
        order_step_ < options_.steps && r.ordering == Reordering::gram && step_ < order_step_ && step_ >= order_step_ - r.collect_steps;
    model_.for_each_trained([&](auto& linear) {
      auto& adapter = linear.adapter();
      if (want && !adapter.collecting) adapter.start_collecting(model_.backend());
      adapter.collecting = want;
    });
  }

  using Views = std::vector<MatrixView<Acc>>;
  using Copies = std::vector<Matrix<Acc, typename Backend::Memory>>;
  Views values() const {
    Views all;
    for (const auto& p : optimizer_.parameters()) all.push_back(p->value.view());
    return all;
  }
  Copies copies_of(const Views& views) const {
    Copies copies;
    const auto& backend = model_.backend();
    for (const auto& view : views) backend.copy(view, copies.emplace_back(temporary<Acc>(backend, view.rows, view.cols)).view());
    return copies;
  }
  void put(const Copies& copies, const Views& views) const {
    for (std::size_t i = 0; i < copies.size(); ++i) model_.backend().copy(copies[i].view(), views[i]);
  }

  // The adapters are re-ordered and ranks are dealt out from here on, unless measuring says that they need not be.
  void begin_nesting() {
    if (order_step_ == 0) {
      nesting_ = true;
      return;
    }
    const auto& r = options_.recipe;
    const bool measure = r.measure && !held_back_.empty();
    const auto before = measure ? copies_of(values()) : Copies{};
    workers_.sum(collected_moments(model_), {}, model_.backend());
    reorder_adapters(model_, r.ordering == Reordering::gram && r.collect_steps > 0 ? Reordering::gram : Reordering::svd);
    model_.for_each_trained([](auto& linear) { linear.adapter().stop_collecting(); });
    if (measure) {
      auto losses = losses_by_rank(held_back_);
      workers_.average(losses, model_.backend());  // so that all decide the same
      const double base = losses.back();
      losses.pop_back();
      nested_share_ = nested_share(losses, base);
      if (nested_share_.share == 0.0) {  // nothing has happened: the optimizer's moments still fit the rows
        put(before, values());
        return;
      }
    }
    optimizer_.reset_state();
    nesting_ = true;
    sampler_ = RankSampler(options_.ranks, Rng(options_.seed), sampler_options());
  }

  double set_learning_rates() {
    const auto& r = options_.recipe;
    double lr = options_.lr * schedule_(step_);
    if (nesting_ && order_step_ > 0)
      lr *= std::min(1.0, static_cast<double>(step_ - order_step_ + 1) / static_cast<double>(std::max<std::int64_t>(r.rewarm_steps, 1)));
    optimizer_.set_lr(lr);
    gate_optimizer_.set_lr(lr * options_.gate_lr);
    std::vector<float> multipliers;
    if (nesting_) {
      const double progress = static_cast<double>(step_ - order_step_) / static_cast<double>(options_.steps - order_step_);
      multipliers = r.row_rates(options_.ranks.max(), (measured() ? nested_share_.strength : 1.0) * (1.0 - progress));
    }
    auto of_b = multipliers;
    if (options_.b_lr_ratio != 1.0) {
      of_b.resize(static_cast<std::size_t>(options_.ranks.max()), 1.0f);
      for (float& x : of_b) x *= static_cast<float>(options_.b_lr_ratio);
    }
    model_.for_each_trained([&](auto& linear) {
      auto& adapter = linear.adapter();
      for (const auto& [parameter, all] : {std::pair(&adapter.a(), &multipliers), std::pair(&adapter.b(), &of_b)})
        parameter->row_lr.assign(all->begin(), all->begin() + std::min<Index>(adapter.max_rank(), std::ssize(*all)));
    });
    return lr;
  }

  void finish() {
    const auto& r = options_.recipe;
    // Where ranks were dealt out, their prefixes are better than those of any re-ordering.
    if (r.order_at_end || (measured() && !nesting_)) {
      reorder_adapters(model_, Reordering::svd);
      reordered_at_end_ = true;
    }
    model_.set_ranks(RankPlan::uniform(options_.ranks.max()));
  }

  Model& model_;
  TrainerOptions options_;
  Optimizer optimizer_;
  AdamW<T, Backend> gate_optimizer_;
  NestedShare nested_share_;  // before sampler_, whose options read it
  RankSampler sampler_;
  Schedule schedule_;
  LossScale loss_scale_;
  std::int64_t order_step_;
  std::int64_t step_ = 0;
  bool nesting_ = false;
  bool reordered_at_end_ = false;
  std::vector<Batch> held_back_;
  Workers<Acc, typename Backend::Memory> workers_;
};

}  // namespace qdylora
