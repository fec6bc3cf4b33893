// One update of a parameter by AdamW or Lion: the numbers that an optimizer gives a backend, and what every backend reads of them alike.
#pragma once

#include <cmath>
#include <cstdint>
#include <span>
#include <string>
#include <type_traits>

#include <qdylora/core/view.hpp>
#include <qdylora/quant/moments8.hpp>

namespace qdylora {

/// One AdamW update of a parameter, Loshchilov & Hutter 2019 in torch.optim.AdamW's order of operations:
///   p *= 1 - lr * weight_decay;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
///   p -= lr / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + epsilon),   g = gradient * gradient_scale.
/// Row i's learning rate is lr * row_lr[i] (1 where row_lr is empty); t is its own step count where row_steps is given.
struct AdamWUpdate {
  double lr = 0.0;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double epsilon = 1e-8;
  double weight_decay = 0.0;
  double gradient_scale = 1.0;
  std::int64_t step = 1;
  std::span<const float> row_lr = {};
  std::span<const std::int64_t> row_steps = {};
};

/// One Lion update of a parameter (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", algorithm 2):
///   c = b1 m + (1 - b1) g;  p = p (1 - lr * weight_decay) - lr sign(c);  m = b2 m + (1 - b2) g,   g = gradient * gradient_scale,
/// sign(0) = 0. Row i's learning rate is lr * row_lr[i] (1 where row_lr is empty).
struct LionUpdate {
  double lr = 0.0;
  double beta1 = 0.9;
  double beta2 = 0.99;
  double weight_decay = 0.0;
  double gradient_scale = 1.0;
  std::span<const float> row_lr = {};
};

namespace detail {

/// What an update means for one row.
template <class S>
struct UpdateRow {
  S gradient_scale, decay, keep1, take1, keep2, take2, step_size;
  S correction2 = 0, epsilon = 0;  // AdamW's
};

template <class Update>
double row_lr(const Update& update, Index i) {
  return update.lr * (update.row_lr.empty() ? 1.0 : static_cast<double>(update.row_lr[static_cast<std::size_t>(i)]));
}

template <class S, class Update>
UpdateRow<S> update_row(const Update& update, Index i) {
  const double lr = row_lr(update, i);
  UpdateRow<S> row{.gradient_scale = static_cast<S>(update.gradient_scale),
                   .decay = static_cast<S>(1.0 - lr * update.weight_decay),
                   .keep1 = static_cast<S>(update.beta1),
                   .take1 = static_cast<S>(1.0 - update.beta1),
                   .keep2 = static_cast<S>(update.beta2),
                   .take2 = static_cast<S>(1.0 - update.beta2),
                   .step_size = static_cast<S>(lr)};
  if constexpr (std::is_same_v<Update, AdamWUpdate>) {
    const auto step = static_cast<double>(update.row_steps.empty() ? update.step : update.row_steps[static_cast<std::size_t>(i)]);
    row.step_size = static_cast<S>(lr / (1.0 - std::pow(update.beta1, step)));
    row.correction2 = static_cast<S>(std::sqrt(1.0 - std::pow(update.beta2, step)));
    row.epsilon = static_cast<S>(update.epsilon);
  }
  return row;
}

/// Whether all rows have the same numbers.
inline bool rows_alike(const AdamWUpdate& update) noexcept { return update.row_lr.empty() && update.row_steps.empty(); }
inline bool rows_alike(const LionUpdate& update) noexcept { return update.row_lr.empty(); }

/// The part of an update that is for rows [begin, begin + count).
template <class Update>
Update middle_rows(Update update, Index begin, Index count) {
  const auto cut = [&](auto& rows) {
    if (!rows.empty()) rows = rows.subspan(static_cast<std::size_t>(begin), static_cast<std::size_t>(count));
  };
  cut(update.row_lr);
  if constexpr (requires { update.row_steps; }) cut(update.row_steps);
  return update;
}

inline void expect_adamw_rows(Index rows, const AdamWUpdate& update) {
  const auto count = static_cast<std::size_t>(rows);
  QDYLORA_EXPECTS(update.row_lr.empty() || update.row_lr.size() == count, shape_mismatch, "adamw: row_lr must have one entry a row");
  QDYLORA_EXPECTS(update.row_steps.empty() || update.row_steps.size() == count, shape_mismatch,
                  "adamw: row_steps must have one entry a row");
}
template <class S>
void expect_adamw(MatrixView<S> p, MatrixView<const S> g, MatrixView<S> m, MatrixView<S> v, const AdamWUpdate& update) {
  expect_shape("adamw: gradient", g, p.rows, p.cols);
  expect_shape("adamw: first moment", m, p.rows, p.cols);
  expect_shape("adamw: second moment", v, p.rows, p.cols);
  expect_adamw_rows(p.rows, update);
}
inline void expect_adamw(MatrixView<float> p, MatrixView<const float> g, const Moments8View& moments, const AdamWUpdate& update) {
  expect_shape("adamw: gradient", g, p.rows, p.cols);
  expect_shape("adamw: codes of the first moment", moments.m, p.rows, p.cols);
  expect_shape("adamw: codes of the second moment", moments.v, p.rows, p.cols);
  expect_shape("adamw: absmax of the first moment", moments.m_absmax, p.rows, Moments8View::blocks(p.cols));
  expect_shape("adamw: absmax of the second moment", moments.v_absmax, p.rows, Moments8View::blocks(p.cols));
  expect_adamw_rows(p.rows, update);
}
template <class S>
void expect_lion(MatrixView<S> p, MatrixView<const S> g, MatrixView<S> m, const LionUpdate& update) {
  expect_shape("lion: gradient", g, p.rows, p.cols);
  expect_shape("lion: moment", m, p.rows, p.cols);
  QDYLORA_EXPECTS(update.row_lr.empty() || update.row_lr.size() == static_cast<std::size_t>(p.rows), shape_mismatch,
                  "lion: row_lr must have one entry a row");
}

}  // namespace detail
}  // namespace qdylora
