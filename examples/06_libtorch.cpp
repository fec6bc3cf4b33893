// The layer in a libtorch training loop, trained by torch::optim::AdamW. What it takes, and what to know about memory and threads, is
// common/libtorch.hpp, which any libtorch program may copy.
//   cmake -D QDYLORA_TORCH=$(python3 -c 'import torch; print(torch.__path__[0])')        (or the folder where libtorch was unpacked)
#include "common/libtorch.hpp"
#include "common/toy_task.hpp"

namespace qd = qdylora;
using qd::examples::Linear;
using qd::examples::view;
using Task = qd::examples::ToyTask;
using torch::Tensor;

// Whether y and all gradients at a rank are those that torch computes densely with the decoded weight; x [batch, time, features] is a slice,
// rows of a stride.
bool agrees_with_dense(Linear& linear, qd::Index rank) {
  auto decoded = linear.layer.merged_weight(0);
  const Tensor w = at::fromDLPack(qd::to_dlpack<DLManagedTensor>(decoded.view()).release());
  const Tensor wide = torch::randn({3, 5, 2 * linear.layer.in()}), dy = torch::randn({3, 5, linear.layer.out()});
  const Tensor ours = wide.clone().requires_grad_(), dense = wide.clone().requires_grad_();
  const Tensor a = linear.a.detach().clone().requires_grad_(), b = linear.b.detach().clone().requires_grad_();

  linear.zero_grad(/*set_to_none=*/false);
  linear.layer.set_rank(rank);
  const Tensor y = linear.forward(ours.narrow(-1, 0, linear.layer.in()));
  y.backward(dy);
  const Tensor x = dense.narrow(-1, 0, linear.layer.in()), z = x.matmul(a.narrow(0, 0, rank).t());
  const Tensor expected = x.matmul(w.t()) + linear.layer.adapter().scale(rank) * z.matmul(b.narrow(0, 0, rank));
  expected.backward(dy);
  const auto close = [](const Tensor& p, const Tensor& q) { return torch::allclose(p, q, 1e-4, 1e-5); };
  return close(y, expected) && close(ours.grad(), dense.grad()) && close(linear.a.grad(), a.grad()) && close(linear.b.grad(), b.grad());
}

int main() {
  torch::manual_seed(7);
  Task task;
  Linear up{task.up, {.max_rank = 8, .alpha = 8, .name = "up"}};
  Linear down{task.down, {.max_rank = 8, .alpha = 8, .layer = 1, .name = "down"}};
  auto parameters = up.parameters();
  for (const Tensor& p : down.parameters()) parameters.push_back(p);
  torch::optim::AdamW optimizer(parameters, torch::optim::AdamWOptions(1e-2).weight_decay(0.0));
  qd::RankSampler ranks{qd::RankSet{1, 2, 4, 8}, qd::Rng{3}};

  Tensor x = torch::empty({Task::tokens, Task::in}), target = torch::empty({Task::tokens, Task::out});
  const auto loss = [&] { return torch::mse_loss(down.forward(torch::gelu(up.forward(x))), target); };
  for (int step = 0; step < 600; ++step) {
    task.next(view(x), view(target));
    qd::set_ranks(ranks.next(Task::tokens), up.layer, down.layer);
    optimizer.zero_grad(/*set_to_none=*/false);
    loss().backward();
    optimizer.step();
  }

  task.next(view(x), view(target));  // a batch that was not trained on
  const int status = Task::verdict(ranks.set(), [&](qd::Index rank) {
    const torch::NoGradGuard no_gradients;
    qd::set_ranks(qd::RankPlan::uniform(rank), up.layer, down.layer);
    return loss().item<double>();
  });
  bool agrees = up.b.data_ptr<float>() == up.layer.adapter().b().value.data();
  for (const qd::Index rank : ranks.set()) agrees = agrees && agrees_with_dense(up, rank) && agrees_with_dense(down, rank);
  std::printf("%s\n", agrees ? "Outputs and gradients are those of dense layers." : "OUTPUTS OR GRADIENTS DIFFER from dense layers");
  return agrees ? status : 1;
}
