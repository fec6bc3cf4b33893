// The layer in a trainer made of Eigen matrices. as_view sees an Eigen matrix in place and as_eigen a view: nothing is copied.
//   * Views are row-major, [tokens, features]. An Eigen::MatrixXf [features, tokens], column-major, is one by as_view(m.transpose()); blocks
//     and Refs are views with a stride. An expression has to be evaluated first; a temporary matrix does not compile.
//   * x is borrowed from forward to backward: it must neither change nor be resized, which moves it.
//   * The trainer may have its own optimizer: parameters() are values with gradients that backward adds to.
//   * Eigen's own products use OpenMP where a program is compiled with it, the layer a pool with a thread for each processor. They take
//     turns, so neither is in the other's way; a trainer that calls layers from threads of its own gives each layer Cpu{1}.
#include <cmath>

#include <qdylora/core/eigen.hpp>

#include "common/toy_task.hpp"

namespace qd = qdylora;
using Task = qd::examples::ToyTask;
using Layer = qd::DynamicLoRALinear<float>;
using RowMatrix = qd::EigenMatrix<float>;

float gelu(float x) { return 0.5f * x * (1.0f + std::erf(x * 0.70710678f)); }
float gelu_slope(float x) { return 0.5f * (1.0f + std::erf(x * 0.70710678f)) + 0.39894228f * x * std::exp(-0.5f * x * x); }

// Adam as its paper has it, on Eigen maps of A and B.
class Adam {
 public:
  explicit Adam(qd::Parameters<float> parameters) : parameters_(std::move(parameters)) {
    for (const auto& p : parameters_) moments_.emplace_back(RowMatrix::Zero(p->value.rows(), 2 * p->value.cols()));
  }
  void zero_grad() {
    for (const auto& p : parameters_) qd::as_eigen(p->gradient.view()).setZero();
  }
  void step(float lr) {
    ++steps_;
    const float bias1 = 1.0f - std::pow(0.9f, steps_), bias2 = 1.0f - std::pow(0.999f, steps_);
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      const auto gradient = qd::as_eigen(parameters_[i]->gradient.view()).array();
      auto first = moments_[i].leftCols(gradient.cols()).array(), second = moments_[i].rightCols(gradient.cols()).array();
      first = 0.9f * first + 0.1f * gradient;
      second = 0.999f * second + 0.001f * gradient.square();
      qd::as_eigen(parameters_[i]->value.view()).array() -= lr / bias1 * first / ((second / bias2).sqrt() + 1e-8f);
    }
  }

 private:
  qd::Parameters<float> parameters_;
  std::vector<RowMatrix> moments_;  // first | second
  float steps_ = 0.0f;
};

int main() {
  Task task;
  const RowMatrix w_up = qd::as_eigen(task.up.view());
  const Eigen::MatrixXf w_down = qd::as_eigen(task.down.view()).transpose();  // column-major, [in, out]
  Layer up{qd::as_view(w_up), {.max_rank = 8, .alpha = 8, .name = "up"}};
  Layer down{qd::as_view(w_down.transpose()), {.max_rank = 8, .alpha = 8, .layer = 1, .name = "down"}};
  Layer::Context saved_up, saved_down;

  RowMatrix batch(Task::tokens, Task::in + Task::out);  // x | target
  Eigen::Ref<RowMatrix> x = batch.leftCols(Task::in), target = batch.rightCols(Task::out);
  RowMatrix h(Task::tokens, Task::hidden), a, da(Task::tokens, Task::hidden), dh, y(Task::tokens, Task::out), dy;

  const auto forward = [&] {
    up.forward(qd::as_view(x), qd::as_view(h), saved_up);
    a = h.unaryExpr(&gelu);
    down.forward(qd::as_view(a), qd::as_view(y), saved_down);
    dy = (y - target) * (2.0f / static_cast<float>(y.size()));
    return (y - target).squaredNorm() / static_cast<float>(y.size());
  };
  qd::RankSampler ranks{qd::RankSet{1, 2, 4, 8}, qd::Rng{3}};
  Adam optimizer(qd::parameters(up, down));
  for (int step = 0; step < 600; ++step) {
    task.next(qd::as_view(x), qd::as_view(target));
    qd::set_ranks(ranks.next(Task::tokens), up, down);
    forward();
    optimizer.zero_grad();
    down.backward(qd::as_view(dy), qd::as_view(da), saved_down);
    dh = da.cwiseProduct(h.unaryExpr(&gelu_slope));
    up.backward(qd::as_view(dh), {}, saved_up);
    optimizer.step(1e-2f);
  }

  task.next(qd::as_view(x), qd::as_view(target));  // a batch that was not trained on
  return Task::verdict(ranks.set(), [&](qd::Index rank) {
    qd::set_ranks(qd::RankPlan::uniform(rank), up, down);
    return forward();
  });
}
