// Random numbers: Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011), counter-based. A number is a
// pure function of (seed, purpose, stream, step, element), the same on host and device, so masks are recomputed instead of stored and
// resuming needs no state but (seed, step). The distributions are our own: <random>'s differ between standard libraries.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <span>
#include <utility>

#include <qdylora/core/error.hpp>
#include <qdylora/core/scalar.hpp>

namespace qdylora {

/// Ten rounds of Philox4x32: 4 random words from a 128-bit counter and a 64-bit key.
QDYLORA_HD constexpr std::array<std::uint32_t, 4> philox4x32(std::array<std::uint32_t, 4> counter,
                                                             std::array<std::uint32_t, 2> key) noexcept {
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t product0 = 0xD2511F53ull * counter[0];
    const std::uint64_t product1 = 0xCD9E8D57ull * counter[2];
    counter = {static_cast<std::uint32_t>(product1 >> 32) ^ counter[1] ^ key[0], static_cast<std::uint32_t>(product1),
               static_cast<std::uint32_t>(product0 >> 32) ^ counter[3] ^ key[1], static_cast<std::uint32_t>(product0)};
    key = {key[0] + 0x9E3779B9u, key[1] + 0xBB67AE85u};
  }
  return counter;
}

/// What a stream of random numbers is used for: different purposes never share numbers.
enum class Purpose : std::uint32_t { general = 0, init = 1, dropout = 2, rank = 3, shuffle = 4, sample = 5, data = 6, base = 7 };

/// Uniform in [0, 1), 24 bits, from one random word.
QDYLORA_HD constexpr float uniform_from(std::uint32_t word) noexcept { return static_cast<float>(word >> 8) * 0x1p-24f; }

/// Random access: words 4 * block ... 4 * block + 3 of the sequence (seed, purpose, stream, step). For dropout, stream = the layer and
/// step = the optimizer step, so every mask of a run is reproducible from two integers.
QDYLORA_HD constexpr std::array<std::uint32_t, 4> random_words(std::uint64_t seed, Purpose purpose, std::uint32_t stream,
                                                               std::uint32_t step, std::uint64_t block) noexcept {
  // counter = (block, low word; stream; step; purpose and the block's high bits)
  return philox4x32({static_cast<std::uint32_t>(block), stream, step,
                     (static_cast<std::uint32_t>(purpose) << 24) ^ static_cast<std::uint32_t>(block >> 32)},
                    {static_cast<std::uint32_t>(seed), static_cast<std::uint32_t>(seed >> 32)});
}
/// One of them.
QDYLORA_HD constexpr std::uint32_t random_word(std::uint64_t seed, Purpose purpose, std::uint32_t stream, std::uint32_t step,
                                               std::uint64_t element) noexcept {
  return random_words(seed, purpose, stream, step, element >> 2)[element & 3];
}

/// A sequential generator over one such sequence. Its whole state is five integers; equal states give equal futures.
class Rng {
 public:
  struct State {
    std::uint64_t seed = 0;
    std::uint64_t position = 0;
    std::uint32_t purpose = 0;
    std::uint32_t stream = 0;
    std::uint32_t step = 0;
    bool operator==(const State&) const = default;
  };

  explicit Rng(std::uint64_t seed = 0, Purpose purpose = Purpose::general, std::uint32_t stream = 0, std::uint32_t step = 0) noexcept
      : state_{seed, 0, static_cast<std::uint32_t>(purpose), stream, step} {}
  explicit Rng(const State& state) noexcept : state_(state) {}

  const State& state() const noexcept { return state_; }
  std::uint64_t seed() const noexcept { return state_.seed; }

  std::uint32_t next() noexcept {
    return random_word(state_.seed, static_cast<Purpose>(state_.purpose), state_.stream, state_.step, state_.position++);
  }
  /// Uniform in [0, 1).
  float uniform() noexcept { return uniform_from(next()); }
  /// Uniform in [low, high).
  float uniform(float low, float high) noexcept {
    const float value = low + (high - low) * uniform();
    return value < high || !(low < high) ? value : std::nextafter(high, low);  // the sum may have been rounded up
  }
  /// Standard normal, by Box-Muller in double.
  float normal() noexcept {
    const double u = (static_cast<double>(next()) + 1.0) * 0x1p-32;  // (0, 1]
    const double v = static_cast<double>(next()) * 0x1p-32;
    return static_cast<float>(std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586 * v));
  }
  /// Uniform integer in [0, bound), without bias (Lemire 2019). bound in [1, 2^32].
  std::uint32_t below(std::uint64_t bound) {
    QDYLORA_EXPECTS(bound >= 1 && bound <= (std::uint64_t{1} << 32), bad_argument, "Rng::below: bound must be in [1, 2^32]");
    std::uint64_t product = next() * bound;
    const std::uint64_t threshold = ((std::uint64_t{1} << 32) - bound) % bound;
    while (static_cast<std::uint32_t>(product) < threshold) product = next() * bound;
    return static_cast<std::uint32_t>(product >> 32);
  }
  /// Fisher-Yates.
  template <class T>
  void shuffle(std::span<T> items) {
    for (std::size_t i = items.size(); i > 1; --i) std::swap(items[i - 1], items[below(i)]);
  }

 private:
  State state_;
};

}  // namespace qdylora
