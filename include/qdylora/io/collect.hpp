// What a training state holds of adapters, optimizers, rank samplers and generators: collect() adds one under a prefix, restore() puts it
// back; see <qdylora/io/train_state.hpp>.
#pragma once

#include <algorithm>
#include <bit>
#include <concepts>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/core/random.hpp>
#include <qdylora/io/train_state.hpp>
#include <qdylora/nn/lora_adapter.hpp>
#include <qdylora/nn/parameter.hpp>
#include <qdylora/nn/ranks.hpp>
#include <qdylora/optim/row_optimizer.hpp>

namespace qdylora {

// collect(state, prefix, x) adds x; restore(state, prefix, x) puts it back into an x made the same way. restore() changes nothing
// of x before all of it is known to fit. Errc::missing_tensor, dtype, shape_mismatch, bad_config.

inline void collect(TrainState& state, const std::string& prefix, const Rng& rng) {
  const Rng::State& s = rng.state();
  state.add_integers(prefix, {std::bit_cast<std::int64_t>(s.seed), std::bit_cast<std::int64_t>(s.position), s.purpose, s.stream, s.step});
}
inline void restore(TrainState& state, const std::string& prefix, Rng& rng) {
  const auto& s = state.integers(prefix, 5);
  const auto word = [&](std::size_t i) { return checked_narrow<std::uint32_t>(s[i], {.tensor = prefix}); };
  rng = Rng(Rng::State{std::bit_cast<std::uint64_t>(s[0]), std::bit_cast<std::uint64_t>(s[1]), word(2), word(3), word(4)});
}

inline void collect(TrainState& state, const std::string& prefix, const RankSampler& sampler) {
  const auto s = sampler.state();
  collect(state, prefix + ".rng", Rng(s.rng));
  state.add_numbers(prefix + ".carry", s.carry);
  state.add_integers(prefix + ".ranks", {sampler.set().begin(), sampler.set().end()});
}
inline void restore(TrainState& state, const std::string& prefix, RankSampler& sampler) {
  const auto& ranks = state.integers(prefix + ".ranks");
  if (!std::ranges::equal(ranks, sampler.set().span())) {
    throw Error(Errc::bad_config, "the state is of a run with another rank set", {.tensor = prefix + ".ranks"});
  }
  Rng rng;
  restore(state, prefix + ".rng", rng);
  sampler.restore({rng.state(), state.numbers(prefix + ".carry", ranks.size())});
}

struct OnHost {};  // stands for the backend of matrices in host memory

namespace detail {

template <MemoryResource Memory>
std::string section_of(const std::string& prefix, std::size_t i, const Parameter<float, Memory>& parameter) {
  return prefix + "." + std::to_string(i) + "." + parameter.name;  // the number tells layers of one name apart
}

// Paged moments may still be on their way between the host and a device.
template <class Memory, class Backend>
void settle(const Backend& backend) {
  if constexpr (requires { typename Backend::Memory; })
    if constexpr (paged<Memory, Backend>) backend.synchronize();
}

// A matrix in host memory is borrowed; of one in a device's there is a copy, which waits.
template <MemoryResource Memory, class Backend>
void add(TrainState& state, std::string name, const Matrix<float, Memory>& matrix, const Backend& backend, TrainState::Read read = {}) {
  settle<Memory>(backend);
  if constexpr (Memory::host) {
    state.add_matrix(std::move(name), matrix.view(), std::move(read));
  } else {
    Matrix<float> copy(matrix.rows(), matrix.cols());
    backend.download(matrix.view(), copy.view());
    state.add_matrix(std::move(name), std::move(copy));
  }
}
// Bytes are a text, in the matrix's order.
template <MemoryResource Memory, class Backend>
void add(TrainState& state, std::string name, const Matrix<std::uint8_t, Memory>& matrix, const Backend& backend,
         TrainState::Read read = {}) {
  settle<Memory>(backend);
  const auto size = static_cast<std::size_t>(matrix.size());
  if constexpr (Memory::host) {
    state.add_text_view(std::move(name), {reinterpret_cast<const char*>(matrix.data()), size}, std::move(read));
  } else {
    std::string text(size, '\0');
    backend.download(matrix.view(), MatrixView<std::uint8_t>(reinterpret_cast<std::uint8_t*>(text.data()), matrix.rows(), matrix.cols()));
    state.add_text(std::move(name), std::move(text));
  }
}
// A section that fits a matrix; its errors are the state's.
template <MemoryResource Memory>
MatrixView<const float> section_for(TrainState& state, const std::string& name, const Matrix<float, Memory>& matrix) {
  return state.matrix(name, matrix.rows(), matrix.cols());
}
template <MemoryResource Memory>
MatrixView<const std::uint8_t> section_for(TrainState& state, const std::string& name, const Matrix<std::uint8_t, Memory>& matrix) {
  const std::string_view text = state.text(name, static_cast<std::size_t>(matrix.size()));
  return {reinterpret_cast<const std::uint8_t*>(text.data()), matrix.rows(), matrix.cols()};
}
// What a state holds, which outlives the copy, into a matrix of its shape.
template <class S, MemoryResource Memory, class Backend>
void put(MatrixView<const S> stored, Matrix<S, Memory>& matrix, const Backend& backend) {
  settle<Memory>(backend);
  if constexpr (Memory::host) {
    copy(stored, matrix.view());
  } else {
    backend.upload(stored, matrix.view());
    backend.synchronize();
  }
}

}  // namespace detail

/// Values and learning-rate multipliers; gradients live only within a step.
template <MemoryResource Memory, class Backend = OnHost>
void collect(TrainState& state, const std::string& prefix, const Parameters<float, Memory>& parameters, const Backend& backend = {}) {
  for (std::size_t i = 0; i < parameters.size(); ++i) {
    const auto& p = *parameters[i];
    const std::string name = detail::section_of(prefix, i, p);
    detail::add(state, name, p.value, backend);
    if (!p.row_lr.empty()) state.add_matrix(name + ".row_lr", {p.row_lr.data(), 1, static_cast<Index>(p.row_lr.size())});
  }
}
template <MemoryResource Memory, class Backend = OnHost>
void restore(TrainState& state, const std::string& prefix, const Parameters<float, Memory>& parameters, const Backend& backend = {}) {
  for (const bool copying : {false, true}) {
    for (std::size_t i = 0; i < parameters.size(); ++i) {
      auto& p = *parameters[i];
      const std::string name = detail::section_of(prefix, i, p);
      const auto value = state.matrix(name, p.value.rows(), p.value.cols());
      std::vector<float> row_lr;
      if (state.contains(name + ".row_lr")) {
        const auto stored = state.matrix(name + ".row_lr", 1, p.value.rows());
        row_lr.assign(stored.data, stored.data + stored.cols);
      }
      if (!copying) continue;
      detail::put(value, p.value, backend);
      p.row_lr = std::move(row_lr);
    }
  }
}

namespace detail {

template <MemoryResource Memory>
Parameters<float, Memory> all_parameters(const LoRAAdapter<float, Memory>& adapter) {
  auto all = adapter.parameters();
  const auto gates = adapter.gate_parameters();
  all.insert(all.end(), gates.begin(), gates.end());
  return all;
}

}  // namespace detail

/// A, B, magnitude, gates, and the moments that re-ordering by Reordering::gram gathers.
template <MemoryResource Memory, class Backend = OnHost>
void collect(TrainState& state, const std::string& prefix, const LoRAAdapter<float, Memory>& adapter, const Backend& backend = {}) {
  collect(state, prefix, detail::all_parameters(adapter), backend);
  state.add_integer(prefix + ".collecting", adapter.collecting);
  if (adapter.moment_a.size() == 0) return;
  detail::add(state, prefix + ".moment_a", adapter.moment_a, backend);
  detail::add(state, prefix + ".moment_b", adapter.moment_b, backend);
}
template <MemoryResource Memory, class Backend = OnHost>
void restore(TrainState& state, const std::string& prefix, LoRAAdapter<float, Memory>& adapter, const Backend& backend = {}) {
  const bool collecting = state.integer(prefix + ".collecting") != 0;
  Matrix<float, Memory> moment_a, moment_b;
  if (state.contains(prefix + ".moment_a")) {
    const Index r = adapter.max_rank();
    moment_a.resize(r, r);
    moment_b.resize(r, r);
    detail::put(state.matrix(prefix + ".moment_a", r, r), moment_a, backend);
    detail::put(state.matrix(prefix + ".moment_b", r, r), moment_b, backend);
  }
  restore(state, prefix, detail::all_parameters(adapter), backend);
  adapter.collecting = collecting;
  adapter.moment_a = std::move(moment_a);
  adapter.moment_b = std::move(moment_b);
}

/// Moments of whatever kind, step counts of rows, counters, learning rate. Not the parameters' values: they are collected where they belong.
template <class Options, Scalar T, class Backend, MemoryResource StateMemory, class Moments>
requires(std::same_as<Accumulator<T>, float>) void collect(TrainState& state, const std::string& prefix,
                                                      const RowOptimizer<Options, T, Backend, StateMemory, Moments>& optimizer) {
  for (std::size_t i = 0; i < optimizer.states().size(); ++i) {
    const auto& s = optimizer.states()[i];
    const std::string name = detail::section_of(prefix, i, *optimizer.parameters()[i]);
    Moments::for_each_part(s, [&](const char* part, const auto& matrix) {
      detail::add(state, name + "." + part, matrix, optimizer.backend(), optimizer.paging_out(matrix));
    });
    state.add_integers(name + ".steps", s.steps);
  }
  state.add_integers(prefix + ".counts", {optimizer.step_count(), optimizer.skipped_steps()});
  state.add_number(prefix + ".lr", optimizer.options().lr);
}
template <class Options, Scalar T, class Backend, MemoryResource StateMemory, class Moments>
requires(std::same_as<Accumulator<T>, float>) void restore(TrainState& state, const std::string& prefix,
                                                           RowOptimizer<Options, T, Backend, StateMemory, Moments>& optimizer) {
  const auto& counts = state.integers(prefix + ".counts", 2);
  const double lr = state.number(prefix + ".lr");
  for (const bool copying : {false, true}) {
    for (std::size_t i = 0; i < optimizer.states().size(); ++i) {
      auto& s = optimizer.states()[i];
      const std::string name = detail::section_of(prefix, i, *optimizer.parameters()[i]);
      Moments::for_each_part(s, [&](const char* part, auto& matrix) {
        const auto section = detail::section_for(state, name + "." + part, matrix);
        if (!copying) return;
        detail::put(section, matrix, optimizer.backend());
        if (const auto out = optimizer.paging_out(matrix)) out();
      });
      const auto& steps = state.integers(name + ".steps", s.steps.size());
      if (copying) s.steps = steps;
    }
  }
  optimizer.restore_counts(counts[0], counts[1]);
  optimizer.set_lr(lr);
}

}  // namespace qdylora
