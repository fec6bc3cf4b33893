// The layer in a trainer whose tensors come as DLPack's, as those of NumPy, PyTorch, JAX and TVM do. from_dlpack sees a tensor in place and
// to_dlpack hands a view out: nothing is copied.
//   * Tensors are [..., features], features adjacent, of exactly the layer's type; rows may have any stride. All else throws an Error that
//     says what was expected and found. Any address of a float will do; rows that start at multiples of 64 bytes are read fastest.
//   * A view does not keep a tensor alive: call a DLManagedTensor's deleter when its views are done, x's after backward.
//   * to_dlpack(view, owner) keeps the owner until the other side calls the deleter: parameters may outlive their layer.
//   * The layer's loops run on a pool with a thread for each processor, beside the framework's own. Give both their share, the layer by Cpu{n}
//     as its last argument, or run its loops on the framework's threads: Cpu{executor}.
#include <dlpack/dlpack.h>

#include <memory>
#include <vector>

#include <qdylora/core/eigen.hpp>

#include "common/toy_task.hpp"

namespace qd = qdylora;
using Task = qd::examples::ToyTask;
using Layer = qd::DynamicLoRALinear<float>;

// A framework's tensor [sequence, token, feature]: part of its memory, seen by shape and strides.
class Tensor {
 public:
  Tensor(std::int64_t sequences, std::int64_t tokens, std::int64_t features)
      : memory_(new float[static_cast<std::size_t>(sequences * tokens * features)]()),
        shape_{sequences, tokens, features},
        strides_{tokens * features, features, 1} {}
  Tensor features(std::int64_t begin, std::int64_t count) const {  // tensor[:, :, begin : begin + count]
    Tensor part = *this;
    part.offset_ += static_cast<std::uint64_t>(begin) * sizeof(float);
    part.shape_[2] = count;
    return part;
  }
  DLTensor dlpack() { return {memory_.get(), {kDLCPU, 0}, 3, {kDLFloat, 32, 1}, shape_, strides_, offset_}; }

 private:
  std::shared_ptr<float[]> memory_;
  std::int64_t shape_[3], strides_[3];
  std::uint64_t offset_ = 0;
};

int main() {
  Task task;
  Layer up{task.up, {.max_rank = 8, .alpha = 8, .name = "up"}};
  Layer down{task.down, {.max_rank = 8, .alpha = 8, .layer = 1, .name = "down"}};
  Layer::Context saved_up, saved_down;

  const std::int64_t sequences = 4, tokens = Task::tokens / sequences;
  Tensor batch(sequences, tokens, Task::in + Task::out), hidden(sequences, tokens, 4 * Task::hidden), answer(sequences, tokens, 2 * Task::out);
  const auto part = [](const Tensor& tensor, std::int64_t begin, std::int64_t count) {
    return qd::from_dlpack<float>(tensor.features(begin, count).dlpack());  // [tokens of all sequences, count]
  };
  const auto x = part(batch, 0, Task::in), target = part(batch, Task::in, Task::out);
  const auto h = part(hidden, 0, Task::hidden), a = part(hidden, Task::hidden, Task::hidden);
  const auto da = part(hidden, 2 * Task::hidden, Task::hidden), dh = part(hidden, 3 * Task::hidden, Task::hidden);
  const auto y = part(answer, 0, Task::out), dy = part(answer, Task::out, Task::out);

  const qd::Cpu cpu;
  const auto forward = [&] {
    up.forward(x, h, saved_up);
    cpu.gelu(h, a);
    down.forward(a, y, saved_down);
    qd::as_eigen(dy) = (qd::as_eigen(y) - qd::as_eigen(target)) * (2.0f / static_cast<float>(y.size()));
    return (qd::as_eigen(y) - qd::as_eigen(target)).squaredNorm() / static_cast<float>(y.size());
  };
  qd::RankSampler ranks{qd::RankSet{1, 2, 4, 8}, qd::Rng{3}};
  qd::AdamW<float> optimizer{qd::parameters(up, down), {.lr = 1e-2}};
  for (int step = 0; step < 600; ++step) {
    task.next(x, target);
    qd::set_ranks(ranks.next(x.rows), up, down);
    forward();
    optimizer.zero_grad();
    down.backward(dy, da, saved_down);
    cpu.gelu_backward(da, h, dh);
    up.backward(dh, {}, saved_up);
    optimizer.step();
  }

  task.next(x, target);  // a batch that was not trained on
  const int status = Task::verdict(ranks.set(), [&](qd::Index rank) {
    qd::set_ranks(qd::RankPlan::uniform(rank), up, down);
    return forward();
  });

  // A for the framework, which keeps it as long as it likes.
  const auto parameter = up.parameters().front();
  const auto lora_a = qd::to_dlpack<DLManagedTensor>(parameter->value.view(), parameter);
  const bool same = qd::from_dlpack<float>(lora_a->dl_tensor).data == parameter->value.data();

  try {
    DLTensor doubles = batch.dlpack();
    doubles.dtype.bits = 64;
    qd::from_dlpack<float>(doubles, "x");
  } catch (const qd::Error& error) {
    std::printf("refused as it has to be: %s\n", error.what());
    return same ? status : 1;
  }
  return 1;
}
