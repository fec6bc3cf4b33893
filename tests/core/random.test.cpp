#include <qdylora/core/random.hpp>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <set>
#include <vector>

#include "support/catch.hpp"
#include "support/files.hpp"

namespace random_test {

namespace qd = qdylora;

// Moments below are compared within 5 standard errors of the sample they come from.

TEST_CASE("philox4x32 gives the published known answers") {
  using Words = std::array<std::uint32_t, 4>;
  CHECK(qd::philox4x32({0, 0, 0, 0}, {0, 0}) == Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8});
  CHECK(qd::philox4x32({0xffffffff, 0xffffffff, 0xffffffff, 0xffffffff}, {0xffffffff, 0xffffffff}) ==
        Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd});
  CHECK(qd::philox4x32({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}) ==
        Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1});
}

TEST_CASE("random_word lays out its counter as element / 4, stream, step, purpose") {
  const std::uint64_t seed = 0x0123456789abcdefull;
  for (const std::uint64_t element : {std::uint64_t{0}, std::uint64_t{3}, std::uint64_t{4}, std::uint64_t{1} << 33}) {
    const auto words = qd::philox4x32({static_cast<std::uint32_t>(element / 4), 11, 22, 2u << 24}, {0x89abcdef, 0x01234567});
    CHECK(qd::random_word(seed, qd::Purpose::dropout, 11, 22, element) == words[element % 4]);
  }
  const std::uint64_t high = (std::uint64_t{5} << 34) + 1;  // beyond the low word: its bits join the purpose
  CHECK(qd::random_word(seed, qd::Purpose::dropout, 11, 22, high) ==
        qd::philox4x32({0, 11, 22, (2u << 24) ^ 5u}, {0x89abcdef, 0x01234567})[1]);
}

TEST_CASE("random_word differs when any part of its identity differs") {
  std::set<std::uint32_t> seen;
  for (std::uint64_t seed : {0ull, 1ull, 1ull << 32})
    for (auto purpose : {qd::Purpose::general, qd::Purpose::init, qd::Purpose::data})
      for (std::uint32_t stream = 0; stream < 3; ++stream)
        for (std::uint32_t step = 0; step < 3; ++step)
          for (std::uint64_t element = 0; element < 5; ++element)
            seen.insert(qd::random_word(seed, purpose, stream, step, element));
  CHECK(seen.size() == 3 * 3 * 3 * 3 * 5);
}

TEST_CASE("uniform_from maps words to [0, 1) in steps of 2^-24") {
  CHECK(qd::uniform_from(0) == 0.0f);
  CHECK(qd::uniform_from(255) == 0.0f);
  CHECK(qd::uniform_from(256) == 0x1p-24f);
  CHECK(qd::uniform_from(0xffffffff) == 1.0f - 0x1p-24f);
}

TEST_CASE("Rng::next walks the random-access sequence") {
  qd::Rng rng(9, qd::Purpose::shuffle, 4, 5);
  for (std::uint64_t i = 0; i < 9; ++i) CHECK(rng.next() == qd::random_word(9, qd::Purpose::shuffle, 4, 5, i));
  CHECK(rng.seed() == 9);
  CHECK(rng.state() == qd::Rng::State{9, 9, 4, 4, 5});
}

TEST_CASE("an Rng made from a state has the same future") {
  qd::Rng rng(123, qd::Purpose::rank, 7, 8);
  for (int i = 0; i < 5; ++i) rng.normal();
  rng.below(10);
  qd::Rng resumed(rng.state());
  CHECK(resumed.state() == rng.state());
  for (int i = 0; i < 20; ++i) CHECK(resumed.normal() == rng.normal());
  for (int i = 0; i < 20; ++i) CHECK(resumed.below(1000) == rng.below(1000));
  CHECK(resumed.state() == rng.state());
}

TEST_CASE("uniform samples have the moments of U(0, 1)") {
  constexpr int n = 1 << 18;
  qd::Rng rng(1);
  double sum = 0, squares = 0;
  for (int i = 0; i < n; ++i) {
    const float u = rng.uniform();
    REQUIRE((u >= 0.0f && u < 1.0f));
    sum += static_cast<double>(u);
    squares += static_cast<double>(u) * static_cast<double>(u);
  }
  CHECK(sum / n == Approx(0.5).margin(5 * std::sqrt(1.0 / 12 / n)));
  CHECK(squares / n == Approx(1.0 / 3).margin(5 * std::sqrt(4.0 / 45 / n)));
}

TEST_CASE("uniform(low, high) stays in its range and is centred") {
  constexpr int n = 1 << 16;
  qd::Rng rng(2);
  double sum = 0;
  for (int i = 0; i < n; ++i) {
    const float u = rng.uniform(-3.0f, 5.0f);
    REQUIRE((u >= -3.0f && u < 5.0f));
    sum += static_cast<double>(u);
  }
  CHECK(sum / n == Approx(1.0).margin(5 * 8 * std::sqrt(1.0 / 12 / n)));
}

TEST_CASE("normal samples have the moments and tails of N(0, 1)") {
  constexpr int n = 1 << 18;
  qd::Rng rng(3);
  double moments[5] = {};
  int beyond_two = 0;
  double previous = 0, product = 0;
  for (int i = 0; i < n; ++i) {
    const double x = static_cast<double>(rng.normal());
    REQUIRE(std::isfinite(x));
    for (int k = 1; k <= 4; ++k) moments[k] += std::pow(x, k) / n;
    beyond_two += std::fabs(x) > 2.0;
    product += x * previous / n;
    previous = x;
  }
  CHECK(moments[1] == Approx(0.0).margin(5 / std::sqrt(n)));
  CHECK(moments[2] == Approx(1.0).margin(5 * std::sqrt(2.0 / n)));
  CHECK(moments[3] == Approx(0.0).margin(5 * std::sqrt(15.0 / n)));
  CHECK(moments[4] == Approx(3.0).margin(5 * std::sqrt(96.0 / n)));
  CHECK(product == Approx(0.0).margin(5 / std::sqrt(n)));
  CHECK(static_cast<double>(beyond_two) / n == Approx(0.0455).margin(5 * std::sqrt(0.0455 * 0.9545 / n)));
}

TEST_CASE("below covers its range evenly, for bounds that do not divide 2^32 too") {
  for (const std::uint64_t bound : {1ull, 2ull, 3ull, 7ull, 64ull, 100ull}) {
    constexpr int n = 60000;
    qd::Rng rng(bound);
    std::vector<int> counts(bound);
    for (int i = 0; i < n; ++i) {
      const std::uint32_t x = rng.below(bound);
      REQUIRE(x < bound);
      ++counts[x];
    }
    const double expected = static_cast<double>(n) / static_cast<double>(bound);
    double chi_squared = 0;
    for (const int count : counts) chi_squared += (count - expected) * (count - expected) / expected;
    const double freedom = static_cast<double>(bound) - 1;
    CHECK(chi_squared <= freedom + 5 * std::sqrt(2 * freedom));
  }
}

TEST_CASE("below has no bias where a modulo or a plain multiply would have the most") {
  // Of the 2^32 words, 3 * 2^30 is a bound for which a plain multiply gives a third of the results twice the weight of the others.
  const std::uint64_t bound = 3ull << 30;
  qd::Rng rng(4);
  int thirds[3] = {};
  int residues[3] = {};
  constexpr int n = 60000;
  for (int i = 0; i < n; ++i) {
    const std::uint32_t x = rng.below(bound);
    REQUIRE(x < bound);
    ++thirds[x >> 30];
    ++residues[x % 3];
  }
  for (int k = 0; k < 3; ++k) {
    CHECK(thirds[k] == Approx(n / 3.0).margin(5 * std::sqrt(n * 2.0 / 9)));
    CHECK(residues[k] == Approx(n / 3.0).margin(5 * std::sqrt(n * 2.0 / 9)));
  }
}

TEST_CASE("below(2^32) passes whole words through and other bounds are errors") {
  qd::Rng rng(5), words(5);
  for (int i = 0; i < 10; ++i) CHECK(rng.below(1ull << 32) == words.next());
  CHECK(test::code_of([&] { rng.below(0); }) == qd::Errc::bad_argument);
  CHECK(test::code_of([&] { rng.below((1ull << 32) + 1); }) == qd::Errc::bad_argument);
}

TEST_CASE("shuffle makes permutations, all of them equally often") {
  std::vector<int> counts(24);
  constexpr int n = 24000;
  qd::Rng rng(6, qd::Purpose::shuffle);
  for (int i = 0; i < n; ++i) {
    std::vector<int> items = {0, 1, 2, 3};
    rng.shuffle(std::span(items));
    int index = 0;  // of the permutation in lexicographic order
    std::vector<int> left = {0, 1, 2, 3};
    for (int k = 0; k < 4; ++k) {
      const auto at = std::find(left.begin(), left.end(), items[static_cast<std::size_t>(k)]);
      REQUIRE(at != left.end());
      index = index * (4 - k) + static_cast<int>(at - left.begin());
      left.erase(at);
    }
    ++counts[static_cast<std::size_t>(index)];
  }
  for (const int count : counts) CHECK(count == Approx(1000).margin(5 * std::sqrt(1000.0)));
}

TEST_CASE("shuffle of nothing and of one item draws no number") {
  qd::Rng rng(7);
  std::vector<int> none, one = {1};
  rng.shuffle(std::span(none));
  rng.shuffle(std::span(one));
  CHECK(one == std::vector<int>{1});
  CHECK(rng.state().position == 0);
}

}  // namespace random_test
