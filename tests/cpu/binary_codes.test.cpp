// Planes of signs on the CPU, in every instruction set.
#include "backend/binary_codes.inc"
#include "backend/each_isa.inc"
#include "support/placed.hpp"

namespace binary_codes_test {

namespace qd = qdylora;
using qd::Index;

TEMPLATE_TEST_CASE("products with planes of signs are the reference's", "[cpu]", float, double, qd::bfloat16, qd::half) {
  each_isa([](const qd::Cpu& cpu) { test::binary_coded_products<qd::Cpu, TestType>(cpu); });
}

TEMPLATE_TEST_CASE("sums of signs are the reference's", "[cpu]", float, double) {
  each_isa([](const qd::Cpu& cpu) { test::sums_of_signs<qd::Cpu, TestType>(cpu); });
}

TEST_CASE("products with planes of signs read and write nothing else, and have the same bits on any number of threads", "[cpu]") {
  constexpr Index planes = 3;
  const test::RandomPlanes<float> random(37, 4107, planes, 40, 0);
  const auto w = random.codes.view(planes, qd::MatrixView<const float>());
  for (const test::PageEdge edge : {test::PageEdge::start, test::PageEdge::end})
    for (const Index tokens : {1, 5, 12}) {
      const test::FencedMatrix<float> x(test::normal_matrix<float>(tokens, w.cols, 1).view(), 0, edge);
      const test::FencedMatrix<float> dy(test::normal_matrix<float>(tokens, w.rows, 2).view(), 0, edge);
      const test::FencedMatrix<float> d(test::normal_matrix<float>(w.rows, w.cols, 3).view(), 0, edge);
      const test::Fenced<std::uint8_t> bits(random.codes.bits().data(), random.codes.bits().size(), edge);
      const test::Fenced<float> scales(random.codes.scales().data, random.codes.scales().rows * random.codes.scales().cols, edge);
      auto fenced = w;
      fenced.bits = bits.data();
      fenced.scales = scales.data();
      each_isa([&](const qd::Cpu& set) {
        std::vector<qd::Matrix<float>> first;
        for (const int threads : {1, 2, 3, 8}) {
          const qd::Cpu cpu = qd::Cpu(threads).with_isa(set.isa());
          test::FencedMatrix<float> y(tokens, w.rows, 0, edge), dx(tokens, w.cols, 0, edge), whole(w.rows, w.cols, 0, edge);
          test::FencedMatrix<float> sums(planes * w.rows, w.groups(), 0, edge);
          cpu.fill(sums.view(), 0.0f);
          cpu.matmul(x.in(), fenced, y.view(), qd::Update::overwrite);
          cpu.matmul_transposed(dy.in(), fenced, dx.view(), qd::Update::overwrite);
          cpu.dequantize(fenced, whole.view());
          cpu.add_sums_of_signs(d.in(), fenced, 0, sums.view());
          const test::FencedMatrix<float>* results[] = {&y, &dx, &whole, &sums};
          for (std::size_t i = 0; i < std::size(results); ++i)
            if (threads == 1) first.push_back(qd::clone(results[i]->in()));
            else CHECK(test::same_bits(results[i]->in(), first[i].view()));
          CHECK(test::same_bits(whole.in(), random.decoded.view()));
        }
      });
    }
}

}  // namespace binary_codes_test
