#include "backend/each_isa.inc"
#include "backend/transformer.inc"

namespace transformer_test {

namespace qd = qdylora;

TEMPLATE_TEST_CASE("RMS norm is the reference's", "[cpu]", float, double, qd::bfloat16, qd::half) {
  each_isa([](const qd::Cpu& cpu) { test::rms_norm<qd::Cpu, TestType>(cpu); });
}

TEMPLATE_TEST_CASE("layer norm is the reference's", "[cpu]", float, double, qd::bfloat16, qd::half) {
  test::layer_norm<qd::Cpu, TestType>(qd::Cpu(2));
}

TEMPLATE_TEST_CASE("rotary embedding is the reference's", "[cpu]", float, double, qd::bfloat16, qd::half) {
  each_isa([](const qd::Cpu& cpu) { test::rope<qd::Cpu, TestType>(cpu); });
}

TEMPLATE_TEST_CASE("attention is the reference's", "[cpu]", float, double, qd::bfloat16, qd::half) {
  each_isa([](const qd::Cpu& cpu) {
    test::attention<qd::Cpu, TestType>(cpu);
    test::attention_of_large_scores<qd::Cpu, TestType>(cpu);
  });
}

TEMPLATE_TEST_CASE("attention refuses shapes that do not fit", "[cpu]", float, qd::bfloat16) {
  test::attention_refuses_other_shapes<qd::Cpu, TestType>(qd::Cpu(2));
}

TEMPLATE_TEST_CASE("attention of one token on a cache is the reference's", "[cpu]", float, double, qd::bfloat16, qd::half) {
  each_isa([](const qd::Cpu& cpu) { test::attention_decode<qd::Cpu, TestType>(cpu); });
}

TEMPLATE_TEST_CASE("rows are copied to where each belongs", "[cpu]", float, double, qd::bfloat16, qd::half) {
  test::copied_rows<qd::Cpu, TestType>(qd::Cpu());
}

TEMPLATE_TEST_CASE("activations are the reference's", "[cpu]", float, double, qd::bfloat16, qd::half) {
  each_isa([](const qd::Cpu& cpu) { test::activations<qd::Cpu, TestType>(cpu); });
}

TEMPLATE_TEST_CASE("embedding copies rows of the table", "[cpu]", float, double, qd::bfloat16, qd::half) {
  each_isa([](const qd::Cpu& cpu) { test::embedding<qd::Cpu, TestType>(cpu); });
}

TEMPLATE_TEST_CASE("the gradient of an embedding is the sum over the tokens of each row", "[cpu]", float, double, qd::bfloat16, qd::half) {
  each_isa([](const qd::Cpu& cpu) { test::embedding_backward<qd::Cpu, TestType>(cpu); });
}

TEMPLATE_TEST_CASE("cross-entropy is the reference's", "[cpu]", float, double) {
  each_isa([](const qd::Cpu& cpu) { test::cross_entropy<qd::Cpu, TestType>(cpu); });
}

}  // namespace transformer_test
