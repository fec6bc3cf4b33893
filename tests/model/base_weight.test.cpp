// The frozen weights of a model, made of rows as a file hands them out.
#include <limits>
#include <string>
#include <variant>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/model/base_weight.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/random_data.hpp"

namespace base_weight_test {

namespace qd = qdylora;
using qd::BaseFormat;
using qd::Errc;
using qd::Index;
using test::code_of;
using test::error_of;
using Any = qd::WeightFor<qd::AnyFormat>;

namespace {

struct Call {
  Index first, rows;
};

std::shared_ptr<const Any> store(const qd::Matrix<float>& dense, qd::BaseOptions options, std::vector<Call>* calls = nullptr) {
  const qd::Cpu cpu(2);
  return qd::make_base_weight(
      dense.rows(), dense.cols(), options,
      [&](Index first, qd::MatrixView<float> out) {
        if (calls != nullptr) calls->push_back({first, out.rows});
        qd::copy(dense.view().middle_rows(first, out.rows), out);
      },
      cpu);
}

template <class Tensor>
void check_equal(const Any& weight, const Tensor& expected) {
  REQUIRE(std::holds_alternative<Tensor>(weight.storage()));
  const auto& found = std::get<Tensor>(weight.storage());
  CHECK(found.rows() == expected.rows());
  CHECK(found.cols() == expected.cols());
  CHECK(found.block_size() == expected.block_size());
  CHECK(std::ranges::equal(found.codes().span(), expected.codes().span()));
  bool same_scales = true;
  for (Index b = 0; b < found.blocks(); ++b) same_scales = same_scales && found.view().scales[b] == expected.view().scales[b];
  CHECK(same_scales);
}

}  // namespace

TEST_CASE("a base weight read in pieces is the weight quantized as a whole, in every format") {
  // 25 rows and a bit of a million elements each make two pieces that cut a block.
  const auto dense = test::normal_matrix<float>(27, 40003, 1, 0.02);
  const auto view = dense.view();
  check_equal(*store(dense, {}), qd::quantize<qd::NF4, qd::DoubleQuant<>>(view));
  check_equal(*store(dense, {.format = BaseFormat::nf4, .double_quant = false, .block_size = 64}),
              qd::quantize<qd::NF4, qd::Float32Scales>(view));
  check_equal(*store(dense, {.format = BaseFormat::fp4, .double_quant = true, .block_size = 128}),
              qd::quantize<qd::FP4, qd::DoubleQuant<>>(view, {.block_size = 128}));
  check_equal(*store(dense, {.format = BaseFormat::fp4, .double_quant = false, .block_size = 32}),
              qd::quantize<qd::FP4, qd::Float32Scales>(view, {.block_size = 32}));
  check_equal(*store(dense, {.format = BaseFormat::int4, .double_quant = true, .block_size = 64}),
              qd::quantize<qd::INT4, qd::DoubleQuant<>>(view));
  check_equal(*store(dense, {.format = BaseFormat::fp8, .double_quant = true, .block_size = 256}),
              qd::quantize<qd::FP8E4M3, qd::DoubleQuant<>>(view, {.block_size = 256}));
}

TEST_CASE("a base weight of float32 is the very matrix") {
  const auto dense = test::normal_matrix<float>(27, 40003, 1);
  const auto weight = store(dense, {.format = BaseFormat::float32, .double_quant = true, .block_size = 64});
  REQUIRE(std::holds_alternative<qd::Matrix<float>>(weight->storage()));
  CHECK(test::same_bits(std::get<qd::Matrix<float>>(weight->storage()).view(), dense.view()));
  CHECK(weight->bytes() == 27u * 40003u * 4u);
}

TEST_CASE("a base weight of bfloat16 has the very numbers of a matrix in bfloat16, others to the nearest even, in two bytes each") {
  const auto exact = test::normal_matrix<qd::bfloat16>(27, 40003, 1);
  const auto stored = [](const qd::Matrix<float>& dense) {
    const auto weight = store(dense, {.format = BaseFormat::bfloat16});
    CHECK(weight->bytes() == static_cast<std::size_t>(dense.size()) * 2u);
    return weight;
  };
  const auto same = stored(test::converted<float>(exact.view()));
  REQUIRE(std::holds_alternative<qd::Matrix<qd::bfloat16>>(same->storage()));
  CHECK(test::same_bits(std::get<qd::Matrix<qd::bfloat16>>(same->storage()).view(), exact.view()));
  const auto fine = test::normal_matrix<float>(27, 40003, 1);
  qd::Matrix<float> found(27, 40003);
  qd::decode(*stored(fine), found.view(), qd::Cpu{});
  Index rounded = 0, wrong = 0;
  for (Index i = 0; i < fine.size(); ++i) {
    rounded += found.data()[i] != fine.data()[i];
    wrong += found.data()[i] != static_cast<float>(qd::bfloat16(fine.data()[i]));
  }
  CHECK(rounded > fine.size() / 2);
  CHECK(wrong == 0);
  // Finite in float32, and beyond bfloat16.
  auto large = qd::clone(test::normal_matrix<float>(4, 64, 1).view());
  large(3, 7) = std::numeric_limits<float>::max();
  const auto error = error_of([&] { store(large, {.format = BaseFormat::bfloat16}); });
  REQUIRE(error);
  CHECK(error->code() == Errc::non_finite);
  CHECK(std::string(error->what()).find("[3, 7]") != std::string::npos);
}

TEST_CASE("rows are asked for once each, in order, and at most 4 MiB at a time") {
  const auto dense = test::normal_matrix<float>(70, 40003, 1);
  for (const auto format : {BaseFormat::nf4, BaseFormat::bfloat16, BaseFormat::float32}) {
    std::vector<Call> calls;
    store(dense, {.format = format, .double_quant = true, .block_size = 64}, &calls);
    CHECK(calls.size() > 1);
    Index next = 0;
    for (const Call& call : calls) {
      CHECK(call.first == next);
      CHECK(call.rows * 40003 * 4 <= Index{4} << 20);
      next += call.rows;
    }
    CHECK(next == 70);
  }
  // A row of more than that is still one piece.
  std::vector<Call> calls;
  store(test::normal_matrix<float>(3, (1 << 20) + 5, 1), {}, &calls);
  CHECK(calls.size() == 3);
}

TEST_CASE("base formats have names") {
  CHECK(qd::name(BaseFormat::nf4) == "nf4");
  CHECK(qd::name(BaseFormat::fp4) == "fp4");
  CHECK(qd::name(BaseFormat::int4) == "int4");
  CHECK(qd::name(BaseFormat::fp8) == "fp8");
  CHECK(qd::name(BaseFormat::bfloat16) == "bfloat16");
  CHECK(qd::name(BaseFormat::float32) == "float32");
  CHECK(qd::base_format("bfloat16") == BaseFormat::bfloat16);
}

TEST_CASE("what a base weight cannot be made of is refused") {
  const auto good = test::normal_matrix<float>(4, 64, 1);
  for (const Index size : {0, 16, 48, 8192}) {
    CAPTURE(size);
    CHECK(code_of([&] { store(good, {.format = BaseFormat::nf4, .double_quant = true, .block_size = size}); }) == Errc::block_size);
  }
  // The reader's errors pass.
  CHECK(code_of([&] {
          qd::make_base_weight(
              4, 64, {}, [](Index, qd::MatrixView<float>) { throw qd::Error(Errc::read, "no"); }, qd::Cpu{});
        }) == Errc::read);
}

TEST_CASE("a base weight that is not finite is refused in every format") {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()})
    for (const auto format :
         {BaseFormat::nf4, BaseFormat::fp4, BaseFormat::int4, BaseFormat::fp8, BaseFormat::bfloat16, BaseFormat::float32}) {
      CAPTURE(bad, std::string(qd::name(format)));
      auto dense = qd::clone(test::normal_matrix<float>(4, 64, 1).view());
      dense(2, 5) = bad;
      const auto error = error_of([&] { store(dense, {.format = format, .double_quant = true, .block_size = 64}); });
      REQUIRE(error);
      CHECK(error->code() == Errc::non_finite);
      CHECK(std::string(error->what()).find("[2, 5]") != std::string::npos);
    }
}

}  // namespace base_weight_test
