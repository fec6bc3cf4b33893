// AdamW with moments in 8 bits against bitsandbytes' rule, and its rule for small parameters.
#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/optim/adamw.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/golden.hpp"
#include "support/random_data.hpp"

namespace adamw8bit_test {

namespace qd = qdylora;
using qd::Index;
using Parameter = qd::Parameter<float>;

namespace {

/// Elements that differ, and the largest difference among them.
struct Differences {
  int count = 0;
  double most = 0.0;
};
template <class T>
Differences differences(std::span<const T> found, const std::vector<T>& expected) {
  REQUIRE(found.size() == expected.size());
  Differences d;
  for (std::size_t i = 0; i < expected.size(); ++i) {
    const double by = std::fabs(static_cast<double>(found[i]) - static_cast<double>(expected[i]));
    d.count += by > 0.0;
    d.most = std::max(d.most, by);
  }
  return d;
}

template <class Optimizer>
void random_steps(Optimizer& optimizer, Parameter& p, int steps) {
  for (int step = 0; step < steps; ++step) {
    qd::Rng rng(static_cast<std::uint64_t>(step) + 100, qd::Purpose::data);
    test::fill_normal(p.gradient.view(), rng);
    p.touch(0, p.value.rows());
    optimizer.step();
  }
}

}  // namespace

TEST_CASE("moments in 8 bits have the codes of bitsandbytes' CUDA rule") {
  const qd::SafetensorsFile file(test::golden("adamw8bit.safetensors"));
  const auto start = test::load<float>(file, "p0"), gradients = test::load<float>(file, "grads");
  const auto p = std::make_shared<Parameter>("p", 1, 4100);
  std::copy(start.begin(), start.end(), p->value.data());
  qd::AdamW8bit<float> optimizer{{p}, {.lr = 1e-3, .weight_decay = 1e-2}};
  for (std::size_t step = 1; step <= 3; ++step) {
    std::copy_n(gradients.begin() + static_cast<std::ptrdiff_t>(4100 * (step - 1)), 4100, p->gradient.data());
    optimizer.step();
    if (step == 2) continue;  // of which the file has nothing
    CAPTURE(step);
    const std::string at = "ref_cuda/step" + std::to_string(step) + "/";
    const auto& s = optimizer.states()[0];
    // The file's numbers are numpy's: pow in float, and 1 - beta2^t cancels. Where that moves v / absmax over a tie, a code differs by one.
    for (const auto& [found, expected] : {std::pair(s.m.span(), test::load<std::uint8_t>(file, at + "state1")),
                                          std::pair(s.v.span(), test::load<std::uint8_t>(file, at + "state2"))}) {
      const auto d = differences(found, expected);
      CHECK(d.count <= 2);
      CHECK(d.most <= 1.0);
    }
    CHECK(differences(s.m_absmax.span(), test::load<float>(file, at + "absmax1")).most < 1e-8);
    CHECK(differences(s.v_absmax.span(), test::load<float>(file, at + "absmax2")).most < 1e-9);
    CHECK(differences(std::as_const(p->value).span(), test::load<float>(file, at + "p")).most < 5e-7);  // decayed before, there after
  }
}

TEST_CASE("a parameter of less than 4096 elements keeps its moments as floats") {
  const auto small = std::make_shared<Parameter>("small", 5, 819), same = std::make_shared<Parameter>("same", 5, 819);
  qd::AdamW8bit<float> in_bytes{{small}, {.lr = 0.01}};
  qd::AdamW<float> in_floats{{same}, {.lr = 0.01}};
  CHECK(in_bytes.states()[0].in_floats());
  CHECK(in_bytes.bytes() == in_floats.bytes());
  random_steps(in_bytes, *small, 3);
  random_steps(in_floats, *same, 3);
  CHECK(test::same_bits(small->value.view(), same->value.view()));
  CHECK_FALSE(qd::AdamW8bit<float>({std::make_shared<Parameter>("large", 4, 1024)}).states()[0].in_floats());
}

TEST_CASE("moments in 8 bits follow those in floats, in a quarter of their bytes") {
  const auto p = std::make_shared<Parameter>("p", 8, 1024), q = std::make_shared<Parameter>("q", 8, 1024);
  qd::AdamW8bit<float> in_bytes{{p}, {.lr = 0.01}};
  qd::AdamW<float> in_floats{{q}, {.lr = 0.01}};
  CHECK(in_bytes.bytes() == 8 * (2 * 1024 + 2 * 4 * 4));
  CHECK(in_floats.bytes() == 8 * 2 * 4 * 1024);
  random_steps(in_bytes, *p, 10);
  random_steps(in_floats, *q, 10);
  CHECK(test::normalised_squared_error(p->value.view(), q->value.view()) < 1e-3);
  in_bytes.reset_state();
  const auto& s = in_bytes.states()[0];
  CHECK(std::all_of(s.m_absmax.span().begin(), s.m_absmax.span().end(), [](float a) { return a == 0.0f; }));
}

}  // namespace adamw8bit_test
