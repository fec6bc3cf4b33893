#include "backend/each_isa.inc"
#include "backend/gradients.inc"

namespace gradients_test {

namespace qd = qdylora;

TEST_CASE("the reference's gradients are the central differences of its forward passes", "[cpu]") {
  test::gradients(test::ReferenceBackend{});
}

TEST_CASE("the CPU's gradients are the central differences of its forward passes", "[cpu]") {
  each_isa([](const qd::Cpu& cpu) { test::gradients(cpu); });
}

TEST_CASE("the gradient check notices a wrong, a missing and a NaN gradient", "[support]") {
  std::vector<double> x = {0.5, -2.0, 3.0};
  const auto loss = [&] { return x[0] * x[0] + 3 * x[1] + x[2] * x[2] * x[2]; };
  const std::vector<double> right = {1.0, 3.0, 27.0};
  const auto excess = [&](std::vector<double> gradient) { return test::check_gradient(loss, std::span(x), gradient).excess; };
  CHECK(excess(right) <= 1.0);
  CHECK(x == std::vector<double>{0.5, -2.0, 3.0});
  CHECK(excess({1.0, 3.0, 27.1}) > 1.0);
  CHECK(excess({1.0, 0.0, 27.0}) > 1.0);
  CHECK(excess({1.0, NAN, 27.0}) > 1.0);
  CHECK(excess({1.0, 3.0}) > 1.0);
}

}  // namespace gradients_test
