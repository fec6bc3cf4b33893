// Saving and resuming a fine-tuning run.
#pragma once

#include <filesystem>
#include <string>
#include <vector>

#include <qdylora/io/json.hpp>
#include <qdylora/io/train_state.hpp>
#include <qdylora/model/trainer.hpp>

namespace qdylora::examples {

/// Saves everything that decides the rest of a run; `settings` is compared when it is resumed.
inline void save_run_state(const std::filesystem::path& path, const std::string& settings, const Decoder<float>& model,
                           Trainer<float>& trainer, const std::vector<double>& step_losses) {
  TrainState state;
  state.add_text("settings", settings);
  model.for_each_linear([&](const auto& linear) { collect(state, linear.adapter().options().name, linear.adapter()); });
  collect(state, "adamw", trainer.optimizer());
  collect(state, "gates.adamw", trainer.gate_optimizer());
  const auto s = trainer.state();
  state.add_integers("trainer", {s.step, s.nesting, s.reordered_at_end});
  collect(state, "sampler.rng", Rng(s.sampler.rng));
  state.add_numbers("sampler.carry", s.sampler.carry);
  state.add_numbers("nested", {s.nested.share, s.nested.strength});
  state.add_numbers("nested.weights", s.nested.weights);
  state.add_numbers("step_losses", step_losses);
  save_train_state(path, state);
}

/// Errc::bad_config where the run was started with other settings, and the errors of load_train_state.
inline void load_run_state(const std::filesystem::path& path, const std::string& settings, Decoder<float>& model, Trainer<float>& trainer,
                           std::vector<double>& step_losses) {
  TrainState state = load_train_state(path);
  if (const auto& saved = state.text("settings"); saved != settings) {
    const Json then = parse_json(saved, {.file = path.string()}), now = parse_json(settings, {});
    std::string differences;
    for (const auto& [key, value] : now.items())
      if (!then.contains(key) || then.at(key) != value)
        differences += (differences.empty() ? "" : ", ") + key + " was " + (then.contains(key) ? then.at(key).dump() : "absent") + ", is " +
                       value.dump();
    throw Error(Errc::bad_config, "the run to resume had other settings: " + printable(differences, 600), {.file = path.string()});
  }
  model.for_each_linear([&](auto& linear) { restore(state, linear.adapter().options().name, linear.adapter()); });
  restore(state, "adamw", trainer.optimizer());
  restore(state, "gates.adamw", trainer.gate_optimizer());
  Trainer<float>::State s;
  const auto& counts = state.integers("trainer", 3);
  s.step = counts[0];
  s.nesting = counts[1] != 0;
  s.reordered_at_end = counts[2] != 0;
  Rng rng;
  restore(state, "sampler.rng", rng);
  s.sampler.rng = rng.state();
  s.sampler.carry = state.numbers("sampler.carry");
  const auto& nested = state.numbers("nested", 2);
  s.nested.share = nested[0];
  s.nested.strength = nested[1];
  s.nested.weights = state.numbers("nested.weights");
  trainer.restore(s);
  step_losses = state.numbers("step_losses");
  state.expect_all_used();
}

}  // namespace qdylora::examples
