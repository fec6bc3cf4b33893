#include "backend/products.inc"
#include "backend/each_isa.inc"

namespace products_test {

namespace qd = qdylora;

TEMPLATE_TEST_CASE("products with quantized weights are the reference's", "[cpu]", float, double, qd::bfloat16, qd::half) {
  each_isa([](const qd::Cpu& cpu) { test::quantized_products<qd::Cpu, TestType>(cpu); });
}

TEMPLATE_TEST_CASE("products of few outputs and long sums are the reference's", "[cpu]", float, qd::bfloat16) {
  each_isa([](const qd::Cpu& cpu) { test::products_of_long_sums<qd::Cpu, TestType>(cpu); });
}

TEMPLATE_TEST_CASE("products with dense weights are the reference's", "[cpu]", float, double, qd::bfloat16, qd::half) {
  each_isa([](const qd::Cpu& cpu) {
    test::dense_products<qd::Cpu, TestType>(cpu);
    test::products_with_the_first_rows_of_an_adapter<qd::Cpu, TestType>(cpu);
  });
}

TEMPLATE_TEST_CASE("dense weights may have any type", "[cpu]", float, double, qd::bfloat16, qd::half) {
  each_isa([](const qd::Cpu& cpu) { test::dense_products_with_weights_of_other_types<qd::Cpu, TestType>(cpu); });
}

TEMPLATE_TEST_CASE("weight gradients are the reference's", "[cpu]", float, double, qd::bfloat16, qd::half) {
  each_isa([](const qd::Cpu& cpu) { test::weight_gradients<qd::Cpu, TestType>(cpu); });
}

TEMPLATE_TEST_CASE("products refuse shapes that do not fit", "[cpu]", float, qd::bfloat16) {
  test::products_refuse_other_shapes<qd::Cpu, TestType>(qd::Cpu(2));
}

}  // namespace products_test
