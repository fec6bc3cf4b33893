#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>

#include "backend/each_isa.inc"
#include "backend/elementwise.inc"
#include "backend/memory.inc"

namespace operations_test {

namespace qd = qdylora;

TEMPLATE_TEST_CASE("data goes to the backend's memory and back", "[cpu]", float, double, qd::bfloat16, qd::half) {
  test::memory_traffic<qd::Cpu, TestType>(qd::Cpu(2));
}

// Every bfloat16 as a float, and around it what rounds down, up and to even: 393,216 numbers, NaNs and infinities among them, in rows that end
// anywhere in a vector.
TEMPLATE_TEST_CASE("copies between bfloat16 and wider numbers are static_cast's to the bit", "[cpu]", float, double) {
  constexpr std::uint32_t low_halves[] = {0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF};
  qd::Matrix<float> numbers(6, 65536);
  for (qd::Index i = 0; i < 6; ++i)
    for (std::uint32_t high = 0; high < 65536; ++high) numbers(i, high) = std::bit_cast<float>((high << 16) | low_halves[i]);
  each_isa([&](const qd::Cpu& cpu) {
    for (const qd::Index cols : {65536, 65535, 37, 1, 0}) {
      CAPTURE(cols);
      const auto x = numbers.view().left_cols(cols);
      qd::Matrix<TestType> wide(6, cols), widened(6, cols);
      qd::Matrix<qd::bfloat16> narrowed(6, cols);
      for (qd::Index i = 0; i < 6; ++i) std::copy_n(x.row(i), cols, wide.view().row(i));
      cpu.copy(std::as_const(wide).view(), narrowed.view());
      cpu.copy(std::as_const(narrowed).view(), widened.view());
      std::int64_t wrong = 0;
      for (qd::Index i = 0; i < 6; ++i)
        for (qd::Index j = 0; j < cols; ++j) {
          const auto expected = static_cast<qd::bfloat16>(static_cast<float>(wide(i, j)));
          const auto back = static_cast<TestType>(static_cast<float>(expected));
          wrong += narrowed(i, j).bits != expected.bits || std::memcmp(&widened(i, j), &back, sizeof(back)) != 0;
        }
      CHECK(wrong == 0);
    }
  });
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
