// What a training run comes to, in bytes.
#pragma once

#include <string>

#include <qdylora/io/collect.hpp>
#include <qdylora/io/train_state.hpp>

#include "support/files.hpp"

namespace test {

/// The file of a model's trained values and of its trainer's optimizer.
template <class Model, class Trainer>
std::string saved_run(Model& model, Trainer& trainer) {
  const TemporaryFolder folder;
  qdylora::TrainState state;
  collect(state, "values", model.parameters());
  collect(state, "adamw", trainer.optimizer());
  qdylora::save_train_state(folder / "state", state);
  return read_file(folder / "state");
}

}  // namespace test
