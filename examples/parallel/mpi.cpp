// Data parallelism over MPI:  mpirun -n 2 mpi
// Every process trains on its part of each batch. At the end all must have the same parameters, bit for bit, and process 0, which trains a
// second time alone on the whole batches, the same losses and parameters but for the rounding of sums: within 1e-6, in double. In float,
// which is tried next, the losses too; parameters within 1e-4, since Adam makes whole steps of what rounding leaves of a gradient of zero.
//   mpi killed      the last process is killed at mid-run: mpirun ends the others; told not to (Open MPI: --enable-recovery), their own
//                   error ends them
//   mpi stopped     the last process hangs at mid-run: the others' error ends the run
//   mpi refused     MPI refuses a communicator: the error is typed
#include <signal.h>

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <qdylora/model.hpp>

#include "../common/model.hpp"
#include "mpi_workers.hpp"

namespace qd = qdylora;
using qd::Index;

namespace {

constexpr std::int64_t steps = 20;

/// A part of a step's batch: texts of several lengths that count on from where they start.
qd::Batch part_of(std::int64_t step, Index worker) {
  qd::Batch batch;
  qd::Rng rng(static_cast<std::uint64_t>(step), qd::Purpose::data, static_cast<std::uint32_t>(worker));
  for (Index s = 0; s < 3 + worker % 2; ++s) {
    std::vector<std::int32_t> text(static_cast<std::size_t>(6 + rng.below(6)), static_cast<std::int32_t>(rng.below(200)));
    for (std::size_t i = 1; i < text.size(); ++i) text[i] = text[i - 1] + 1;
    batch.add(text);
  }
  return batch;
}

/// The toy's weights, its embedding and norms as S.
template <class S>
std::shared_ptr<const qd::DecoderWeights<S>> toy_weights() {
  const auto toy = qd::examples::toy_model({}, qd::Cpu(1)).read({});
  const auto as = [](const qd::Matrix<float>& from) {
    qd::Matrix<S> to(from.rows(), from.cols());
    std::ranges::copy(from.span(), to.span().begin());
    return to;
  };
  auto weights = std::make_shared<qd::DecoderWeights<S>>();
  weights->config = toy->config;
  weights->embedding = as(toy->embedding.template get<qd::Matrix<float>>());
  weights->final_norm = as(toy->final_norm.weight);
  for (const auto& from : toy->blocks) {
    auto block = std::make_shared<qd::BlockWeights<S>>(toy->config);
    block->linear = from->linear;
    block->attention_norm = as(from->attention_norm.weight);
    block->mlp_norm = as(from->mlp_norm.weight);
    weights->blocks.push_back(std::move(block));
  }
  return weights;
}

template <class S>
struct Run {
  qd::Decoder<S> model;
  qd::Trainer<S> trainer;
  std::vector<double> losses;

  Run() : Run(qd::recipe("order-then-nest"), {1, 4, 16}) {}
  Run(const qd::Recipe& recipe, const qd::RankSet& ranks)
      : model(toy_weights<S>(), {.lora = qd::adapter_options(recipe, ranks, 16.0f, 1)}, qd::Cpu(1)),
        trainer(model, {.recipe = recipe, .ranks = ranks, .steps = steps, .lr = 1e-3, .warmup_steps = 2}) {}

  std::vector<S> values() const {
    std::vector<S> all;
    for (const auto& p : model.parameters()) all.insert(all.end(), p->value.span().begin(), p->value.span().end());
    return all;
  }
};

/// Whether the processes train as one. Parameters are `close` to those of one process where the difference of all of them, as one vector, is
/// shorter than that share of it.
template <class S>
bool train(const std::string& accident, const char* scalar, double close) {
  auto workers = qd::examples::mpi_workers<S>(MPI_COMM_WORLD, accident.empty() ? std::chrono::minutes(2) : std::chrono::seconds(3));
  const Index index = workers.index(), count = workers.count();
  Run<S> run;
  run.trainer.join(std::move(workers));
  while (!run.trainer.done()) {
    const auto step = run.trainer.step_count();
    if (!accident.empty() && step == steps / 2 && index == count - 1) ::raise(accident == "killed" ? SIGKILL : SIGSTOP);
    run.losses.push_back(run.trainer.step(part_of(step, index)).loss);
  }

  const auto mine = run.values();
  auto first = mine;
  const auto size = mine.size() * sizeof(S);
  qd::examples::check_mpi(MPI_Bcast(first.data(), static_cast<int>(size), MPI_BYTE, 0, MPI_COMM_WORLD), "MPI_Bcast");
  int same = std::memcmp(first.data(), mine.data(), size) == 0, all_same = 0;
  qd::examples::check_mpi(MPI_Allreduce(&same, &all_same, 1, MPI_INT, MPI_LAND, MPI_COMM_WORLD), "MPI_Allreduce");
  if (index != 0) return all_same != 0;

  Run<S> alone;
  double loss_error = 0.0, difference = 0.0, length = 0.0;
  while (!alone.trainer.done()) {
    const auto step = static_cast<std::size_t>(alone.trainer.step_count());
    std::vector<qd::Batch> parts;
    for (Index worker = 0; worker < count; ++worker) parts.push_back(part_of(alone.trainer.step_count(), worker));
    loss_error = std::max(loss_error, std::fabs(alone.trainer.step(parts).loss / run.losses[step] - 1.0));
  }
  const auto expected = alone.values();
  for (std::size_t i = 0; i < mine.size(); ++i) {
    difference += std::pow(static_cast<double>(mine[i] - expected[i]), 2.0);
    length += std::pow(static_cast<double>(expected[i]), 2.0);
  }
  const double error = std::sqrt(difference / length);
  std::printf("%d processes, %d steps in %s: loss %.3f to %.3f\n", static_cast<int>(count), static_cast<int>(steps), scalar,
              run.losses.front(), run.losses.back());
  std::printf("parameters of all processes: %s\n", all_same != 0 ? "the same bits" : "DIFFERENT BITS");
  std::printf("beside one process with the whole batches: losses within %.1e of themselves, parameters within %.1e\n", loss_error, error);
  return all_same != 0 && loss_error < 1e-6 && error < close;
}

int train(const std::string& accident) {
  MPI_Comm_set_errhandler(MPI_COMM_WORLD, MPI_ERRORS_RETURN);
  if (accident == "refused") qd::examples::mpi_workers(MPI_COMM_NULL);
  const bool in_double = train<double>(accident, "double", 1e-6), in_float = train<float>(accident, "float", 1e-4);
  const bool good = in_double && in_float;
  int index = 0;
  qd::examples::check_mpi(MPI_Comm_rank(MPI_COMM_WORLD, &index), "MPI_Comm_rank");
  if (index == 0) std::printf("%s\n", good ? "Many processes, one run." : "NOT THE SAME RUN");
  return good ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  MPI_Init(&argc, &argv);
  int result = 1;
  try {
    result = train(argc > 1 ? argv[1] : "");
  } catch (const qd::Error& error) {
    std::fprintf(stderr, "mpi: %s: %s\n", std::string(qd::name(error.code())).c_str(), error.what());
    MPI_Abort(MPI_COMM_WORLD, 1);  // the others may wait for this one
  }
  MPI_Finalize();
  return result;
}
