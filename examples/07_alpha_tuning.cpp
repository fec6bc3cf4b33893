// AlphaTuning beside QDyLoRA on one task: what is trained, what the frozen weights cost, and what is left of the loss.
//   * AlphaTuning (Kwon et al. 2022) writes a weight as planes of signs with scales and trains scales: one a row of the first plane, as
//     published, or of smaller groups or all planes. A task keeps nothing else, and what is trained is the quantized model itself.
//   * QDyLoRA leaves the quantized weight alone and adds a low-rank change.
// The task here is a low-rank change, which scales of rows can follow only a little: they are few, and that is what they are for.
#include <cstdio>

#include "common/toy_task.hpp"

namespace qd = qdylora;
using Task = qd::examples::ToyTask;
using Alpha = qd::AlphaLinear<float>;
using LoRA = qd::DynamicLoRALinear<float>;

// The mean of squares of a net's answers to a new batch. With `train`, the gradients of its layers too.
template <class Layer>
double loss(Task& task, Layer& up, Layer& down, bool train) {
  qd::Matrix<float> x(Task::tokens, Task::in), target(Task::tokens, Task::out), dy(Task::tokens, Task::out);
  task.next(x, target);
  const auto h = up.forward(x);
  const auto a = qd::gelu(h);
  const auto y = down.forward(a);
  double sum = 0.0;
  for (qd::Index i = 0; i < dy.size(); ++i) {
    const float error = y.data[i] - target.data()[i];
    sum += static_cast<double>(error * error) / static_cast<double>(dy.size());
    dy.data()[i] = 2.0f * error / static_cast<float>(dy.size());
  }
  if (train) up.backward(qd::gelu_backward(h, down.backward(dy.view())).view());
  return sum;
}

template <class Layer>
double mean_loss(Task& task, Layer& up, Layer& down) {
  double sum = 0.0;
  for (int batch = 0; batch < 16; ++batch) sum += loss(task, up, down, false) / 16.0;
  return sum;
}

// choose(): what differs from step to step
template <class Layer, class Choose>
void train(Task& task, Layer& up, Layer& down, double lr, Choose&& choose) {
  qd::AdamW<float> optimizer{qd::parameters(up, down), {.lr = lr}};
  for (int step = 0; step < 800; ++step) {
    if (step == 600) optimizer.set_lr(lr / 10);
    choose();
    optimizer.zero_grad();
    loss(task, up, down, true);
    optimizer.step();
  }
}

void show(const char* method, qd::Index planes_or_rank, double bits, qd::Index trained, double before, double after) {
  std::printf("  %-34s %2d  %6.2f  %8d  %8.4f  %8.4f\n", method, static_cast<int>(planes_or_rank), bits, static_cast<int>(trained), before,
              after);
}

// Trains scales and shows their row of the table; the part of the loss that is left.
double alpha_tuning(const char* method, qd::Index group_size, qd::Index trained_planes) {
  constexpr qd::Index planes = 4;
  Task task;
  const qd::BinaryCodeOptions code{.planes = planes, .group_size = group_size};
  Alpha up{task.up, {.trained_planes = trained_planes, .name = "up"}, code};
  Alpha down{task.down, {.trained_planes = trained_planes, .name = "down"}, code};
  const double before = mean_loss(task, up, down);
  train(task, up, down, 1e-2, [] {});
  const double after = mean_loss(task, up, down);
  const double bits = 8.0 * static_cast<double>(up.codes()->bytes() + down.codes()->bytes());
  show(method, planes, bits / static_cast<double>(task.up.size() + task.down.size()), up.alpha().value.size() + down.alpha().value.size(),
       before, after);
  return after / before;
}

int main() {
  std::printf("A net of %d weights, quantized and then trained for 800 steps:\n\n",
              static_cast<int>(Task::hidden * (Task::in + Task::out)));
  std::printf("  method                    planes/rank    bits   trained    before     after\n");
  const double rows = alpha_tuning("AlphaTuning, a scale a row", 0, 1);
  const double groups = alpha_tuning("AlphaTuning, groups of 8", 8, 1);
  const double all = alpha_tuning("AlphaTuning, all planes", 8, 4);

  Task task;
  LoRA up{task.up, {.max_rank = 8, .alpha = 8, .name = "up"}};
  LoRA down{task.down, {.max_rank = 8, .alpha = 8, .layer = 1, .name = "down"}};
  qd::RankSampler ranks{qd::RankSet{1, 2, 4, 8}, qd::Rng{3}};
  qd::set_ranks(qd::RankPlan::uniform(0), up, down);
  const double before = mean_loss(task, up, down);
  train(task, up, down, 1e-2, [&] { qd::set_ranks(ranks.next(Task::tokens), up, down); });
  const double bits =
      8.0 * static_cast<double>(up.base()->bytes() + down.base()->bytes()) / static_cast<double>(task.up.size() + task.down.size());
  double left[4] = {}, *next = left;
  for (const qd::Index rank : ranks.set()) {
    qd::set_ranks(qd::RankPlan::uniform(rank), up, down);
    const double after = mean_loss(task, up, down);
    show("QDyLoRA on NF4, one run", rank, bits, rank * (up.in() + up.out() + down.in() + down.out()), before, after);
    *next++ = after / before;
  }
  std::printf("\nRows of 32 and 64 weights pay for their scales; of rows of 4096, 4 planes with a scale a row take %.2f bits.\n",
              4 * (1 + 32.0 / 4096));

  const bool learned = rows < 0.97 && groups < 0.75 && all < 0.25 && left[3] < 0.05;
  const bool compared = left[1] < groups && left[3] < all;  // no more is trained, and less is left
  if (!learned) std::printf("NOT LEARNED\n");
  else if (!compared) std::printf("UNEXPECTED ORDER\n");
  else std::printf("Every method has learned; for as many trained numbers, a low-rank change has learned more of this task.\n");
  return learned && compared ? 0 : 1;
}
