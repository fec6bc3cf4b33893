// What AdamW and Lion have in common: parameters with rows of their own learning rate, clipping, rows without gradient, steps that are
// skipped, and what a checkpoint needs.
#pragma once

#include <cmath>
#include <functional>
#include <limits>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/backend.hpp>
#include <qdylora/nn/parameter.hpp>
#include <qdylora/optim/moments.hpp>

namespace qdylora {

/// Rows that got no gradient since zero_grad. dense: updated with a zero gradient, so momentum and decay still move them (torch's
/// behaviour). strict: untouched, moments and step count too; no part of the norm either, so that a step and zero_grad go through the rows
/// of the rank that was drawn alone.
enum class UntouchedRows { dense, strict };

/// Options_ are those of an algorithm (optim/adamw.hpp, optim/lion.hpp), Moments what a parameter's moments are kept in (optim/moments.hpp),
/// which know how to take a step.
template <class Options_, Scalar T, class Backend, MemoryResource StateMemory, class Moments>
class RowOptimizer {
 public:
  using Options = Options_;
  using Acc = Accumulator<T>;
  using Params = Parameters<Acc, typename Backend::Memory>;
  using Memory = StateMemory;

  explicit RowOptimizer(Params parameters, Options options = {}, Backend backend = {}, StateMemory memory = {})
      : parameters_(std::move(parameters)), options_(options), backend_(backend), memory_(memory) {
    const std::string name = Options::name;
    QDYLORA_EXPECTS(options.lr >= 0.0 && std::isfinite(options.lr), bad_argument, name + ": lr must be finite and not negative");
    QDYLORA_EXPECTS(options.beta1 >= 0.0 && options.beta1 < 1.0 && options.beta2 >= 0.0 && options.beta2 < 1.0, bad_argument,
                    name + ": betas must be in [0, 1)");
    QDYLORA_EXPECTS(options.weight_decay >= 0.0 && std::isfinite(options.weight_decay) && options.max_gradient_norm >= 0.0 &&
                        std::isfinite(options.max_gradient_norm),
                    bad_argument, name + ": weight_decay and max_gradient_norm must be finite and not negative");
    options.check();
    for (const auto& p : parameters_) {
      const Index rows = p->value.rows();
      states_.push_back({Moments(rows, p->value.cols(), memory), std::vector<std::int64_t>(static_cast<std::size_t>(rows))});
    }
    if constexpr (!StateMemory::host) reset_state();  // the host's memory begins as zeros
  }

  struct Report {
    double gradient_norm = 0.0;  // before clipping, without the loss scale
    bool skipped = false;        // the gradient, or its square, was not finite: nothing changed
  };

  /// One update. A gradient with NaN or infinity changes nothing, is counted in skipped_steps() and reported; so is one whose norm, clipped, has
  /// an infinite square (from 1.8e19 on in float), which would stay in second moments for good. Gradients are those of `loss_scale` times the
  /// loss (optim/loss_scale.hpp), and divided by it.
  Report step(double loss_scale = 1.0) {
    QDYLORA_EXPECTS(loss_scale > 0.0 && std::isfinite(loss_scale), bad_argument, std::string(Options::name) + ": loss_scale must be positive");
    for (const auto& p : parameters_)
      QDYLORA_EXPECTS(p->row_lr.empty() || p->row_lr.size() == p->touched.size(), shape_mismatch,
                      p->name + ": row_lr has " + std::to_string(p->row_lr.size()) + " entries for " +
                          std::to_string(p->touched.size()) + " rows");
    const double squares = gradient_squares();
    Report report{std::sqrt(squares) / loss_scale, false};
    auto update = options_.update();
    double clip = 1.0;
    if (options_.max_gradient_norm > 0.0) clip = std::min(1.0, options_.max_gradient_norm / (report.gradient_norm + 1e-6));
    update.gradient_scale = clip / loss_scale;
    const double clipped = report.gradient_norm * clip;
    if (!std::isfinite(squares) || clipped * clipped > static_cast<double>(std::numeric_limits<Acc>::max())) {
      ++skipped_;
      report.skipped = true;
      return report;
    }
    ++step_;
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      auto& p = *parameters_[i];
      auto& s = states_[i];
      update.row_lr = p.row_lr;
      if constexpr (requires { update.row_steps; }) update.row_steps = s.steps;
      for_each_run(p, [&](Index first, Index count) {
        for (Index row = first; row < first + count; ++row) ++s.steps[static_cast<std::size_t>(row)];
        s.update(backend_, p.value.view().middle_rows(first, count), std::as_const(p.gradient).view().middle_rows(first, count), first,
                 detail::middle_rows(update, first, count));
      });
      page_out(s);
    }
    return report;
  }

  /// Of a strict optimizer's parameters the first rows, up to the last that was touched: all others are zero since the first call.
  void zero_grad() {
    const bool all = options_.untouched_rows == UntouchedRows::dense || !std::exchange(zeroed_, true);
    for (const auto& p : parameters_) {
      Index rows = p->value.rows();
      while (!all && rows > 0 && !p->touched[static_cast<std::size_t>(rows - 1)]) --rows;
      if (rows > 0) backend_.fill(p->gradient.view().top_rows(rows), Acc{});
      p->touched.assign(p->touched.size(), false);
    }
  }

  /// Moments and step counts back to zero, as for a fresh optimizer; values stay.
  void reset_state() {
    for (auto& s : states_) {
      s.clear(backend_);
      page_out(s);
      s.steps.assign(s.steps.size(), 0);
    }
  }

  void set_lr(double lr) noexcept { options_.lr = lr; }
  const Options& options() const noexcept { return options_; }
  std::int64_t step_count() const noexcept { return step_; }
  std::int64_t skipped_steps() const noexcept { return skipped_; }
  const Params& parameters() const noexcept { return parameters_; }
  const Backend& backend() const noexcept { return backend_; }

  struct State : Moments {
    std::vector<std::int64_t> steps;  // of each row
  };
  /// What takes a matrix of states() out of memory until it is touched again; nothing where its memory cannot.
  template <class M>
  std::function<void()> paging_out(const M& matrix) const {
    if constexpr (requires { memory_.page_out(nullptr, std::size_t{}); })  // which leaves what is there as it is
      return [memory = memory_, block = const_cast<void*>(static_cast<const void*>(matrix.data())), bytes = matrix.capacity_bytes()] {
        memory.page_out(block, bytes);
      };
    else return {};
  }
  std::vector<State>& states() noexcept { return states_; }
  const std::vector<State>& states() const noexcept { return states_; }
  /// For checkpoints.
  void restore_counts(std::int64_t steps, std::int64_t skipped) noexcept {
    step_ = steps;
    skipped_ = skipped;
  }
  std::size_t bytes() const noexcept {
    std::size_t sum = 0;
    for (const auto& s : states_) sum += s.bytes();
    return sum;
  }

 private:
  /// Of all parameters at once where the backend can: each sum is a wait for a device.
  double gradient_squares() const {
    using View = MatrixView<const Acc>;
    std::vector<View> all;
    for (const auto& p : parameters_)
      for_each_run(*p, [&](Index first, Index count) { all.push_back(std::as_const(p->gradient).view().middle_rows(first, count)); });
    if constexpr (requires { backend_.sum_squares(std::span<const View>(all)); }) {
      return backend_.sum_squares(std::span<const View>(all));
    } else {
      double squares = 0.0;
      for (const View& rows : all) squares += backend_.sum_squares(rows);
      return squares;
    }
  }
  /// f(first, count) for the runs of rows that a step updates.
  template <class F>
  void for_each_run(const Parameter<Acc, typename Backend::Memory>& p, F&& f) const {
    const Index rows = p.value.rows();
    for (Index first = 0, last = 0; first < rows; first = last + 1) {
      for (last = first; last < rows && updates(p, last);) ++last;
      if (last > first) f(first, last - first);
    }
  }
  /// Moments whose turn is over leave memory that can be without them (PagedMemory), so that it has one parameter's at a time.
  void page_out(State& s) const {
    Moments::for_each_part(s, [this](const char*, auto& matrix) {
      if (const auto out = paging_out(matrix)) out();
    });
  }
  bool updates(const Parameter<Acc, typename Backend::Memory>& p, Index row) const {
    return options_.untouched_rows == UntouchedRows::dense || p.touched[static_cast<std::size_t>(row)];
  }

  Params parameters_;
  Options options_;
  Backend backend_;
  StateMemory memory_;
  std::vector<State> states_;
  bool zeroed_ = false;  // all gradients, once
  std::int64_t step_ = 0;
  std::int64_t skipped_ = 0;
};

}  // namespace qdylora
