// Bit equality with bitsandbytes 0.50.2: 4-bit blocks, 8-bit blocks, double quantization, stored linear layers.
#include <qdylora/quant/quantize.hpp>

#include <cmath>
#include <cstdlib>
#include <string>
#include <vector>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/golden.hpp"

namespace golden_test {

namespace qd = qdylora;
using qd::DType;
using qd::Index;

namespace {

// NaN equals NaN, everything else must agree in every bit.
bool same(float a, float b) {
  return std::isnan(a) ? std::isnan(b) : std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b);
}

template <class A, class B>
int differences(const A& found, const B& expected) {
  if (static_cast<std::size_t>(std::size(found)) != static_cast<std::size_t>(std::size(expected))) return -1;
  int count = 0;
  for (std::size_t i = 0; i < std::size(expected); ++i) {
    if constexpr (requires { found[i].bits; }) count += !same(found[i], expected[i]);
    else if constexpr (std::is_same_v<std::remove_cvref_t<decltype(expected[i])>, float>) count += !same(found[i], expected[i]);
    else count += found[i] != expected[i];
  }
  return count;
}

template <class T, class Tensor>
std::vector<T> decoded(const Tensor& tensor) {
  std::vector<T> out(static_cast<std::size_t>(tensor.size()));
  qd::dequantize(tensor.view(), qd::MatrixView(out.data(), tensor.rows(), tensor.cols()));
  return out;
}

template <class T>
qd::Buffer<T> buffer(const std::vector<T>& values) {
  qd::Buffer<T> result(static_cast<Index>(values.size()));
  std::copy(values.begin(), values.end(), result.data());
  return result;
}

template <class Format, class T>
void check_case(const qd::SafetensorsFile& file, const std::string& name, Index block_size) {
  auto x = test::load<T>(file, name + "/x");
  const auto& shape = file.info(name + "/x").shape;
  const Index cols = shape.back(), rows = shape.size() == 2 ? shape[0] : 1;
  const auto tensor = qd::quantize<Format, qd::Float32Scales>(qd::MatrixView<const T>(x.data(), rows, cols),
                                                              {.block_size = block_size, .non_finite = qd::NonFinite::propagate});
  CHECK(differences(tensor.codes().span(), test::load<std::uint8_t>(file, name + "/packed")) == 0);
  CHECK(differences(tensor.scales().absmax.span(), test::load<float>(file, name + "/absmax")) == 0);
  CHECK(differences(decoded<float>(tensor), test::load<float>(file, name + "/dequant_f32")) == 0);
  if (file.contains(name + "/dequant_bf16"))
    CHECK(differences(decoded<qd::bfloat16>(tensor), test::load<qd::bfloat16>(file, name + "/dequant_bf16")) == 0);
  if (file.contains(name + "/dequant_fp16"))
    CHECK(differences(decoded<qd::half>(tensor), test::load<qd::half>(file, name + "/dequant_fp16")) == 0);
}

template <class Format>
void check_case(const qd::SafetensorsFile& file, const std::string& name, Index block_size) {
  switch (file.info(name + "/x").dtype) {
    case DType::BF16: return check_case<Format, qd::bfloat16>(file, name, block_size);
    case DType::F16: return check_case<Format, qd::half>(file, name, block_size);
    default: return check_case<Format, float>(file, name, block_size);
  }
}

// The names of the cases: what stands before "/x".
std::vector<std::string> cases(const qd::SafetensorsFile& file, const std::string& suffix) {
  std::vector<std::string> names;
  for (const auto& tensor : file.tensors())
    if (tensor.name.ends_with(suffix)) names.push_back(tensor.name.substr(0, tensor.name.size() - suffix.size()));
  return names;
}

Index block_size_of(const std::string& name) { return std::atoll(name.c_str() + name.rfind("_b") + 2); }

}  // namespace

TEST_CASE("4-bit codes, absmax and decoded values are bitsandbytes' on the CPU, in all golden cases") {
  const qd::SafetensorsFile file(test::golden("quant4.safetensors"));
  const auto names = cases(file, "/x");
  CHECK(names.size() == 67);
  for (const auto& name : names) {
    CAPTURE(name);
    if (name.find("_nf4") != std::string::npos) check_case<qd::NF4>(file, name, block_size_of(name));
    else check_case<qd::FP4>(file, name, block_size_of(name));
  }
}

TEST_CASE("8-bit codes are the nearest, as bitsandbytes' on CUDA, in all golden cases") {
  const qd::SafetensorsFile file(test::golden("quant8.safetensors"));
  const auto names = cases(file, "/x");
  CHECK(names.size() == 8);
  for (const auto& name : names) {
    CAPTURE(name);
    const auto x = test::load<float>(file, name + "/x");
    const auto expected = test::load<std::uint8_t>(file, name + "/q");
    const auto expected_absmax = test::load<float>(file, name + "/absmax");
    std::vector<std::uint8_t> codes(x.size());
    std::vector<float> absmax(expected_absmax.size());
    const bool is_unsigned = name.find("unsigned") != std::string::npos;
    if (is_unsigned) qd::quantize_blockwise<qd::DynamicMapU8>(x, block_size_of(name), codes, absmax);
    else qd::quantize_blockwise<qd::DynamicMap8>(x, block_size_of(name), codes, absmax);
    CHECK(differences(codes, expected) == 0);
    CHECK(differences(absmax, expected_absmax) == 0);
    std::vector<float> values(x.size());
    for (std::size_t i = 0; i < x.size(); ++i)
      values[i] = (is_unsigned ? qd::DynamicMapU8::values : qd::DynamicMap8::values)[codes[i]] *
                  absmax[i / static_cast<std::size_t>(block_size_of(name))];
    CHECK(differences(values, test::load<float>(file, name + "/dequant_f32")) == 0);
  }
}

TEST_CASE("quantize_blockwise checks its arguments") {
  std::vector<float> x(10), absmax(2);
  std::vector<std::uint8_t> codes(10);
  const auto code = [&](Index block, std::size_t n_codes, std::size_t n_absmax) {
    try {
      qd::quantize_blockwise<qd::DynamicMap8>(x, block, std::span(codes).first(n_codes), std::span(absmax).first(n_absmax));
    } catch (const qd::Error& error) {
      return error.code();
    }
    return qd::Errc::open;  // stands for "no error"
  };
  CHECK(code(5, 10, 2) == qd::Errc::open);
  CHECK(code(0, 10, 2) == qd::Errc::block_size);
  CHECK(code(-1, 10, 2) == qd::Errc::block_size);
  CHECK(code(5, 9, 2) == qd::Errc::shape_mismatch);
  CHECK(code(5, 10, 1) == qd::Errc::shape_mismatch);
}

TEST_CASE("double quantization gives bitsandbytes' second level, exactly where the offset is the same") {
  const qd::SafetensorsFile file(test::golden("nested.safetensors"));
  const auto names = cases(file, "/offset");
  CHECK(names.size() == 6);
  for (const auto& name : names) {
    CAPTURE(name);
    const auto absmax = test::load<float>(file, name + "/absmax_f32");
    const auto codes = test::load<std::uint8_t>(file, name + "/qabsmax_ref_cuda");
    const auto nested_absmax = test::load<float>(file, name + "/nested_absmax");
    const float offset = test::load<float>(file, name + "/offset").at(0);

    // The offset is a mean that bitsandbytes sums in float32 and this library in double.
    const auto scales = qd::make_scales<qd::DoubleQuant<>>(absmax);
    CHECK(test::ulps_between(scales.offset, offset) <= 2);
    if (scales.offset == offset) {
      CHECK(differences(scales.codes.span(), codes) == 0);
      CHECK(differences(scales.nested_absmax.span(), nested_absmax) == 0);
    }

    // Given its offset, all is exact.
    std::vector<float> centred = absmax;
    for (float& a : centred) a -= offset;
    std::vector<std::uint8_t> found_codes(codes.size());
    std::vector<float> found_absmax(nested_absmax.size());
    qd::quantize_blockwise<qd::DynamicMap8>(centred, 256, found_codes, found_absmax);
    CHECK(differences(found_codes, codes) == 0);
    CHECK(differences(found_absmax, nested_absmax) == 0);

    const qd::DoubleQuant<>::View view{codes.data(), nested_absmax.data(), offset};
    std::vector<float> restored;
    for (std::size_t b = 0; b < codes.size(); ++b) restored.push_back(view[static_cast<Index>(b)]);
    CHECK(differences(restored, test::load<float>(file, name + "/absmax_dequant_ref_cuda")) == 0);
  }
}

TEST_CASE("double-quantized weights pack and decode as bitsandbytes'") {
  const qd::SafetensorsFile file(test::golden("nested.safetensors"));
  const auto check = [&]<class Format>(const std::string& name, Format) {
    CAPTURE(name);
    const auto x = test::load<float>(file, name + "/x");
    const auto n = static_cast<Index>(x.size());
    const auto tensor = qd::quantize<Format>(qd::MatrixView(x.data(), 1, n));
    CHECK(differences(tensor.codes().span(), test::load<std::uint8_t>(file, name + "/packed")) == 0);
    CHECK(tensor.bits_per_weight() ==
          Approx(4.0 + 8.0 / 64 + 32.0 * (static_cast<double>((n / 64 + 255) / 256) + 1) / static_cast<double>(n)));
    typename qd::DoubleQuant<>::Storage<qd::HostMemory> scales{buffer(test::load<std::uint8_t>(file, name + "/qabsmax_bnb_cpu")),
                                                               buffer(test::load<float>(file, name + "/nested_absmax")),
                                                               test::load<float>(file, name + "/offset").at(0)};
    const qd::QuantizedTensor<Format> stored(1, n, 64, buffer(test::load<std::uint8_t>(file, name + "/packed")), std::move(scales));
    CHECK(differences(decoded<float>(stored), test::load<float>(file, name + "/dequant_f32_bnb_cpu")) == 0);
  };
  check("n64", qd::NF4{});
  check("n4096", qd::NF4{});
  check("n8192_fp4", qd::FP4{});
}

TEST_CASE("stored linear layers decode to bitsandbytes' weights") {
  const qd::SafetensorsFile io(test::golden("linear4bit_io.safetensors"));
  const auto check = [&]<class Format, class T>(const std::string& variant, const std::string& tensor, Format, T) {
    CAPTURE(variant);
    const qd::SafetensorsFile file(test::golden("linear4bit_" + variant + ".safetensors"));
    auto codes = buffer(test::load<std::uint8_t>(file, "weight"));
    const auto expected = test::load<T>(io, tensor);
    if (file.contains("weight.nested_absmax")) {
      const auto state = test::load<std::uint8_t>(file, "weight.quant_state.bitsandbytes__" + std::string(Format::name));
      const std::string text(state.begin(), state.end());
      const std::string key = "\"nested_offset\": ";
      REQUIRE(text.find(key) != std::string::npos);
      const auto offset = static_cast<float>(std::strtod(text.c_str() + text.find(key) + key.size(), nullptr));
      qd::DoubleQuant<>::Storage<qd::HostMemory> scales{buffer(test::load<std::uint8_t>(file, "weight.absmax")),
                                                        buffer(test::load<float>(file, "weight.nested_absmax")), offset};
      const qd::QuantizedTensor<Format> w(96, 128, 64, std::move(codes), std::move(scales));
      CHECK(differences(decoded<T>(w), expected) == 0);
    } else {
      const qd::QuantizedTensor<Format, qd::Float32Scales> w(96, 128, 64, std::move(codes),
                                                             {buffer(test::load<float>(file, "weight.absmax"))});
      CHECK(differences(decoded<T>(w), expected) == 0);
    }
  };
  check("nf4_dq", "nf4_dq/W_dequant", qd::NF4{}, float{});
  check("nf4_nodq", "nf4_nodq/W_dequant", qd::NF4{}, float{});
  check("fp4_dq", "fp4_dq/W_dequant", qd::FP4{}, float{});
  check("fp4_nodq", "fp4_nodq/W_dequant", qd::FP4{}, float{});
  check("nf4_dq_bf16", "bf16/W_dequant", qd::NF4{}, qd::bfloat16{});
}

}  // namespace golden_test
