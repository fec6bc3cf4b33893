#include "backend/each_isa.inc"
#include "backend/elementwise.inc"
#include "backend/memory.inc"

namespace operations_test {

namespace qd = qdylora;

TEMPLATE_TEST_CASE("data goes to the backend's memory and back", "[cpu]", float, double, qd::bfloat16, qd::half) {
  test::memory_traffic<qd::Cpu, TestType>(qd::Cpu(2));
}

TEMPLATE_TEST_CASE("quantization is the reference's to the bit", "[cpu]", float, double, qd::bfloat16, qd::half) {
  test::quantization<qd::Cpu, TestType>(qd::Cpu(2));
}

TEMPLATE_TEST_CASE("elementwise operations are the reference's", "[cpu]", float, double, qd::bfloat16, qd::half) {
  each_isa([](const qd::Cpu& cpu) { test::elementwise<qd::Cpu, TestType>(cpu); });
}

TEMPLATE_TEST_CASE("dropout is the reference's and its mask exact", "[cpu]", float, double, qd::bfloat16, qd::half) {
  each_isa([](const qd::Cpu& cpu) { test::dropout<qd::Cpu, TestType>(cpu); });
}

TEMPLATE_TEST_CASE("AdamW is the reference's", "[cpu]", float, double) {
  each_isa([](const qd::Cpu& cpu) { test::adamw<qd::Cpu, TestType>(cpu); });
}

TEMPLATE_TEST_CASE("Lion is the reference's", "[cpu]", float, double) {
  each_isa([](const qd::Cpu& cpu) { test::lion<qd::Cpu, TestType>(cpu); });
}

TEST_CASE("AdamW with moments in 8 bits has the reference's codes", "[cpu]") { test::adamw8<qd::Cpu>(qd::Cpu(2)); }

TEMPLATE_TEST_CASE("the sum of squares is taken in double", "[cpu]", float, double) {
  each_isa([](const qd::Cpu& cpu) { test::sum_squares<qd::Cpu, TestType>(cpu); });
}

}  // namespace operations_test
