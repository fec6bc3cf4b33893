// Saving and resuming a fine-tuning run.
#pragma once

#include <cstdint>
#include <filesystem>
#include <limits>
#include <string>
#include <type_traits>
#include <vector>

#include <qdylora/io/collect.hpp>
#include <qdylora/io/json.hpp>
#include <qdylora/model/trainer.hpp>
#include <qdylora/optim/lion.hpp>

namespace qdylora::examples {

/// What a run has done so far, over all its parts; for its report.
struct RunHistory {
  std::vector<double> step_losses;
  Index tokens = 0;
  double seconds = 0.0;

  double tokens_per_second() const noexcept { return seconds > 0.0 ? static_cast<double>(tokens) / seconds : 0.0; }
};

/// What a trainer's optimizer stands under in a state. AdamW and AdamW8bit have sections of different names there.
template <class Optimizer>
inline constexpr const char* optimizer_section = std::is_same_v<typename Optimizer::Options, LionOptions> ? "lion" : "adamw";

/// Saves everything that decides the rest of a run, and its history; `settings` is compared when it is resumed.
template <class T, class Backend, class Optimizer>
void save_run_state(const std::filesystem::path& path, const std::string& settings, const Decoder<T, Backend>& model,
                    Trainer<T, Backend, Optimizer>& trainer, const RunHistory& history) {
  TrainState state;
  state.add_text("settings", settings);
  model.for_each_trained([&](const auto& linear) { collect(state, linear.adapter().options().name, linear.adapter(), model.backend()); });
  model.for_each_alpha([&](const auto& layer) { collect(state, layer.options().name, layer.parameters(), model.backend()); });
  if (model.options().method == AdapterMethod::full) collect(state, "full", model.parameters(), model.backend());
  collect(state, optimizer_section<Optimizer>, trainer.optimizer());
  collect(state, "gates.adamw", trainer.gate_optimizer());
  const auto s = trainer.state();
  state.add_integers("trainer", {s.step, s.nesting, s.reordered_at_end});
  collect(state, "sampler.rng", Rng(s.sampler.rng));
  state.add_numbers("sampler.carry", s.sampler.carry);
  state.add_numbers("nested", {s.nested.share, s.nested.strength});
  state.add_numbers("nested.weights", s.nested.weights);
  if constexpr (std::is_same_v<T, half>) {
    state.add_number("loss_scale", s.loss_scale.value);
    state.add_integer("loss_scale.steps", s.loss_scale.steps);
  }
  state.add_numbers("step_losses", history.step_losses);
  state.add_integer("tokens", history.tokens);
  state.add_number("seconds", history.seconds);
  save_train_state(path, state);
}

/// Throws Errc::state_order if the file holds a run that is not done, so that nobody overwrites it unawares; and the errors of
/// load_train_state for a file that is there and holds none.
inline void expect_no_unfinished_run(const std::filesystem::path& path) {
  if (!std::filesystem::exists(path)) return;
  TrainState state = load_train_state(path);
  const auto step = state.integers("trainer", 3).front();
  const auto steps = get_integer(parse_json(state.text("settings"), {.file = path.string()}), "steps", 0,
                                 std::numeric_limits<std::int64_t>::max(), {.file = path.string()});
  if (step < steps)
    throw Error(Errc::state_order,
                "holds a run that stopped at step " + std::to_string(step) + " of " + std::to_string(steps) +
                    "; --resume goes on with it, another --out leaves it alone",
                {.file = path.string()});
}

/// Errc::bad_config where the run was started with other settings, version for a state without tokens and seconds, and the errors of
/// load_train_state.
template <class T, class Backend, class Optimizer>
void load_run_state(const std::filesystem::path& path, const std::string& settings, Decoder<T, Backend>& model,
                    Trainer<T, Backend, Optimizer>& trainer, RunHistory& history) {
  TrainState state = load_train_state(path);
  if (!state.contains("tokens") || !state.contains("seconds"))
    throw Error(Errc::version, "was saved by an earlier version, which did not count tokens and seconds; remove it, or take another --out",
                {.file = path.string()});
  if (const auto saved = state.text("settings"); saved != settings) {
    Json then = parse_json(saved, {.file = path.string()});
    const Json now = parse_json(settings, {});
    // Settings that earlier versions did not have had these values.
    const Json earlier = {{"dtype", "float32"}, {"device", "cpu"},  {"optimizer", "adamw"},
                          {"dora", false},      {"lora_plus", 1.0}, {"init", "standard"},
                          {"method", "lora"},   {"compute", "automatic"},
                          {"rank_pattern", ""}, {"alpha_pattern", ""}};
    for (const auto& [key, value] : earlier.items())
      if (!then.contains(key)) then[key] = value;
    std::string differences;
    for (const auto& [key, value] : now.items())
      if (!then.contains(key) || then.at(key) != value)
        differences += (differences.empty() ? "" : ", ") + key + " was " + (then.contains(key) ? then.at(key).dump() : "absent") + ", is " +
                       value.dump();
    if (!differences.empty())
      throw Error(Errc::bad_config, "the run to resume had other settings: " + printable(differences, 600), {.file = path.string()});
  }
  model.for_each_trained([&](auto& linear) { restore(state, linear.adapter().options().name, linear.adapter(), model.backend()); });
  model.for_each_alpha([&](auto& layer) { restore(state, layer.options().name, layer.parameters(), model.backend()); });
  if (model.options().method == AdapterMethod::full) restore(state, "full", model.parameters(), model.backend());
  restore(state, optimizer_section<Optimizer>, trainer.optimizer());
  restore(state, "gates.adamw", trainer.gate_optimizer());
  typename Trainer<T, Backend, Optimizer>::State s;
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
  if constexpr (std::is_same_v<T, half>) s.loss_scale = {state.number("loss_scale"), state.integer("loss_scale.steps")};
  trainer.restore(s);
  history.step_losses = state.numbers("step_losses");
  history.tokens = state.integer("tokens");
  history.seconds = state.number("seconds");
  state.expect_all_used();
}

}  // namespace qdylora::examples
