#include <qdylora/optim/schedule.hpp>

#include <cmath>

#include "support/catch.hpp"

namespace schedule_test {

namespace qd = qdylora;
using Shape = qd::Schedule::Shape;

TEST_CASE("a constant schedule is 1 after its warm-up") {
  const qd::Schedule constant{.shape = Shape::constant, .steps = 10};
  for (const int t : {0, 5, 9, 10, 1000}) CHECK(constant(t) == 1.0);
  const qd::Schedule warm{.shape = Shape::constant, .steps = 10, .warmup_steps = 4};
  CHECK(warm(0) == 0.25);
  CHECK(warm(1) == 0.5);
  CHECK(warm(2) == 0.75);
  for (const int t : {3, 4, 9, 50}) CHECK(warm(t) == 1.0);
}

TEST_CASE("a linear schedule falls to its floor and stays there") {
  const qd::Schedule linear{.shape = Shape::linear, .steps = 8};
  for (int t = 0; t <= 8; ++t) CHECK(linear(t) == Approx(1.0 - t / 8.0));
  CHECK(linear(9) == 0.0);
  const qd::Schedule floored{.shape = Shape::linear, .steps = 8, .floor = 0.2};
  CHECK(floored(0) == 1.0);
  CHECK(floored(4) == Approx(0.6));
  CHECK(floored(8) == Approx(0.2));
  CHECK(floored(80) == Approx(0.2));
}

TEST_CASE("a cosine schedule with warm-up is the product of both") {
  constexpr double pi = 3.141592653589793;
  const qd::Schedule cosine{.shape = Shape::cosine, .steps = 300, .warmup_steps = 20, .floor = 0.1};
  for (int t = 0; t < 300; ++t) {
    const double warm = t < 20 ? (t + 1) / 20.0 : 1.0;
    CHECK(cosine(t) == Approx(warm * (0.1 + 0.9 * 0.5 * (1.0 + std::cos(pi * t / 300.0)))));
  }
  CHECK(cosine(150) == Approx(0.55));
  CHECK(cosine(300) == Approx(0.1));
  CHECK(cosine(100000) == Approx(0.1));
}

TEST_CASE("schedules never rise after their warm-up and never fall during it, when constant") {
  for (const auto shape : {Shape::linear, Shape::cosine}) {
    const qd::Schedule schedule{.shape = shape, .steps = 50, .warmup_steps = 5, .floor = 0.05};
    for (int t = 5; t < 60; ++t) CHECK(schedule(t) <= schedule(t - 1));
  }
}

TEST_CASE("a run of no steps has a schedule too") {
  for (const auto shape : {Shape::constant, Shape::linear, Shape::cosine}) {
    const qd::Schedule schedule{.shape = shape, .steps = 0};
    CHECK(schedule(0) == 1.0);
    CHECK(std::isfinite(schedule(1)));
  }
}

}  // namespace schedule_test
