// Layers on every kind of frozen weight, and in every compute type.
#include <memory>
#include <type_traits>
#include <utility>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/random_data.hpp"

namespace weight_test {

namespace qd = qdylora;
using qd::Index;
using Float = qd::Matrix<float>;
using test::same_bits;

namespace {

constexpr Index in = 100, out = 72, tokens = 20;

const qd::LoRAOptions options{.max_rank = 8, .alpha = 8.0f};

template <class Layer>
void fill_b(Layer& layer) {
  const Float b = test::normal_matrix<float>(8, out, 9, 0.1);
  for (Index i = 0; i < b.size(); ++i) layer.adapter().b().value.data()[i] = b.data()[i];
}

struct Passed {
  Float y, dx, da, db;
};

template <class T, class Format>
Passed pass(qd::DynamicLoRALinear<T, qd::Cpu, Format>& layer) {
  fill_b(layer);
  // x and dy are numbers that bfloat16 and half have too
  const auto x = test::converted<T>(test::normal_matrix<qd::bfloat16>(tokens, in, 2).view());
  const auto dy = test::converted<T>(test::normal_matrix<qd::bfloat16>(tokens, out, 3).view());
  // in this order: forward, backward, then what it added up
  return {test::converted<float>(layer.forward(x)), test::converted<float>(layer.backward(dy.view())),
          test::converted<float>(layer.adapter().a().gradient.view()), test::converted<float>(layer.adapter().b().gradient.view())};
}

double error(const Float& a, const Float& b) { return test::normalised_squared_error(a.view(), b.view()); }

// A layer on what `storage` decodes to.
template <class Storage>
Passed reference(const Storage& storage) {
  Float decoded(out, in);
  if constexpr (requires { storage.codes(); }) qd::Cpu().dequantize(storage.view(), decoded.view());
  else qd::Cpu().copy(storage.view(), decoded.view());
  qd::DynamicLoRALinear<float, qd::Cpu, qd::Dense<float>> layer(decoded, options);
  return pass(layer);
}

template <class Storage>
void check_any(Storage storage) {
  const Passed expected = reference(storage);
  const auto base = std::make_shared<const qd::WeightFor<qd::AnyFormat>>(std::move(storage));
  CHECK(base->rows() == out);
  CHECK(base->cols() == in);
  const auto& stored = std::get<Storage>(base->storage());
  if constexpr (requires { stored.bytes(); }) CHECK(base->bytes() == stored.bytes());
  else CHECK(base->bytes() == out * in * sizeof(stored(0, 0)));
  qd::DynamicLoRALinear<float, qd::Cpu, qd::AnyFormat> layer(base, options);
  const Passed found = pass(layer);
  CHECK(error(found.y, expected.y) < 1e-12);
  CHECK(error(found.dx, expected.dx) < 1e-12);
  CHECK(error(found.da, expected.da) < 1e-12);
  CHECK(error(found.db, expected.db) < 1e-12);
}

template <class Format, class Scales>
qd::QuantizedTensor<Format, Scales> quantized() {
  const Float weight = test::normal_matrix<float>(out, in, 1, 0.1);
  return qd::quantize<Format, Scales>(weight.view());
}

// A layer that quantizes by itself is a layer on the quantized tensor.
template <class Format>
void check_format(double distortion) {
  const Float weight = test::normal_matrix<float>(out, in, 1, 0.1);
  qd::DynamicLoRALinear<float, qd::Cpu, Format> layer(weight, options);
  const auto tensor = qd::quantize<Format, qd::DoubleQuant<>>(weight.view());
  Float decoded(out, in);
  qd::dequantize(tensor.view(), decoded.view());
  CHECK(same_bits(layer.merged_weight(0).view(), decoded.view()));
  CHECK(error(decoded, weight) < distortion);
  const Passed found = pass(layer), expected = reference(tensor);
  CHECK(error(found.y, expected.y) < 1e-12);
  CHECK(error(found.dx, expected.dx) < 1e-12);
}

// The layer in T against the one in float: outputs are rounded to T a few times, gradients are sums in float, of factors that are rounded
// where the class of arithmetic rounds them.
template <class T>
void check_type(qd::Compute compute, double rounding, double gradient_error) {
  const Float weight = test::normal_matrix<float>(out, in, 1, 0.1);
  qd::DynamicLoRALinear<float> wide(weight, options);
  qd::DynamicLoRALinear<T> narrow(weight, options, {}, qd::Cpu{}.with_compute(compute));
  const Passed expected = pass(wide), found = pass(narrow);
  CHECK(error(found.y, expected.y) < 4.0 * rounding * rounding);
  CHECK(error(found.y, expected.y) > 0.01 * rounding * rounding);  // it does round
  CHECK(error(found.dx, expected.dx) < 4.0 * rounding * rounding);
  CHECK(error(found.da, expected.da) < gradient_error);
  CHECK(error(found.db, expected.db) < gradient_error);
  // master weights stay float
  static_assert(std::is_same_v<std::remove_cvref_t<decltype(narrow.adapter().a().value(0, 0))>, float>);
}

}  // namespace

TEST_CASE("a weight of any format gives the layer of what it decodes to") {
  check_any(quantized<qd::NF4, qd::DoubleQuant<>>());
  check_any(quantized<qd::NF4, qd::Float32Scales>());
  check_any(quantized<qd::FP4, qd::DoubleQuant<>>());
  check_any(quantized<qd::FP4, qd::Float32Scales>());
  check_any(quantized<qd::INT4, qd::DoubleQuant<>>());
  check_any(quantized<qd::FP8E4M3, qd::DoubleQuant<>>());
  check_any(test::normal_matrix<float>(out, in, 1, 0.1));
  check_any(test::normal_matrix<qd::bfloat16>(out, in, 1, 0.1));
}

TEST_CASE("a format known when compiling and one known when running give the same bits") {
  auto tensor = quantized<qd::NF4, qd::DoubleQuant<>>();
  qd::DynamicLoRALinear<float> fixed(test::normal_matrix<float>(out, in, 1, 0.1), options);
  const auto base = std::make_shared<const qd::WeightFor<qd::AnyFormat>>(std::move(tensor));
  qd::DynamicLoRALinear<float, qd::Cpu, qd::AnyFormat> any(base, options);
  const Passed a = pass(fixed), b = pass(any);
  CHECK(same_bits(a.y.view(), b.y.view()));
  CHECK(same_bits(a.dx.view(), b.dx.view()));
  CHECK(same_bits(a.da.view(), b.da.view()));
  CHECK(same_bits(a.db.view(), b.db.view()));
}

TEST_CASE("a layer quantizes its weight to any code format") {
  check_format<qd::NF4>(0.011);
  check_format<qd::FP4>(0.018);
  check_format<qd::INT4>(0.014);
  check_format<qd::FP8E4M3>(0.002);
  check_format<qd::FP8E5M2>(0.006);
}

TEST_CASE("the block size is the caller's") {
  const Float weight = test::normal_matrix<float>(out, in, 1, 0.1);
  const qd::DynamicLoRALinear<float> layer(weight, options, {.block_size = 32});
  CHECK(std::get<0>(layer.base()->storage()).block_size() == 32);
  CHECK(test::code_of([&] { qd::DynamicLoRALinear<float>(weight, options, {.block_size = 48}); }) == qd::Errc::block_size);
}

TEST_CASE("dense weights are kept in their own type, whatever the layer computes in") {
  // exact in all types but half
  const Float weight = test::converted<float>(test::normal_matrix<qd::bfloat16>(out, in, 1, 0.1).view());
  qd::DynamicLoRALinear<float, qd::Cpu, qd::Dense<float>> plain(weight, options);
  qd::DynamicLoRALinear<float, qd::Cpu, qd::Dense<qd::bfloat16>> stored(weight, options);
  qd::DynamicLoRALinear<float, qd::Cpu, qd::Dense<double>> wide(weight, options);
  CHECK(stored.base()->bytes() == out * in * 2);
  CHECK(wide.base()->bytes() == out * in * 8);
  const Passed expected = pass(plain), a = pass(stored), b = pass(wide);
  CHECK(same_bits(a.y.view(), expected.y.view()));
  CHECK(same_bits(a.dx.view(), expected.dx.view()));
  CHECK(same_bits(b.y.view(), expected.y.view()));
  CHECK(same_bits(b.dx.view(), expected.dx.view()));
}

TEST_CASE("weights are made from matrices and views of any type") {
  const auto narrow = test::normal_matrix<qd::bfloat16>(out, in, 1, 0.1);
  const Float wide = test::converted<float>(narrow.view());
  const qd::DynamicLoRALinear<float> a(narrow, options), b(narrow.view(), options), c(wide, options);
  CHECK(same_bits(a.merged_weight(0).view(), c.merged_weight(0).view()));
  CHECK(same_bits(b.merged_weight(0).view(), c.merged_weight(0).view()));
}

TEST_CASE("a layer in bfloat16 or half differs from the float one by the rounding of its outputs") {
  check_type<qd::bfloat16>(qd::Compute::exact, 0x1p-9, 1e-12);
  check_type<qd::bfloat16>(qd::Compute::automatic, 0x1p-9, 0x1p-18);
  check_type<qd::half>(qd::Compute::automatic, 0x1p-12, 1e-12);
}

TEST_CASE("a layer in double differs from the float one by float rounding") {
  const Float weight = test::normal_matrix<float>(out, in, 1, 0.1);
  qd::DynamicLoRALinear<float> single(weight, options);
  qd::DynamicLoRALinear<double> twice(weight, options);
  for (Index i = 0; i < twice.adapter().a().value.size(); ++i)  // double draws its A with more bits
    twice.adapter().a().value.data()[i] = static_cast<double>(single.adapter().a().value.data()[i]);
  const Passed a = pass(single), b = pass(twice);
  CHECK(error(a.y, b.y) < 1e-12);
  CHECK(error(a.dx, b.dx) < 1e-12);
  CHECK(error(a.da, b.da) < 1e-12);
  CHECK(error(a.db, b.db) < 1e-12);
}

}  // namespace weight_test
