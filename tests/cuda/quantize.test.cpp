// Quantization on the emulated device: every byte of codes and scales is the host's.
#include <qdylora/cuda.hpp>

#include <limits>
#include <vector>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/random_data.hpp"

namespace quantize_test {

namespace qd = qdylora;
using qd::Index;
using test::Matrix;

namespace {

template <class T>
std::vector<T> downloaded(const qd::CudaContext& context, const qd::Buffer<T, qd::DeviceMemory>& buffer) {
  std::vector<T> host(static_cast<std::size_t>(buffer.size()));
  qd::detail::copy_to_host(context, buffer.data(), host.data(), buffer.size());
  return host;
}

template <class T>
bool same(const qd::CudaContext& context, const qd::Buffer<T, qd::DeviceMemory>& device, const qd::Buffer<T>& host) {
  const auto found = downloaded(context, device);
  return found.size() == host.span().size() && (found.empty() || std::memcmp(found.data(), host.data(), host.bytes()) == 0);
}

/// Rows in device memory lie `padding` elements apart.
template <class Format, class Scales, class T>
void check(const Matrix<T>& w, qd::QuantizeOptions options, Index padding) {
  CAPTURE(Format::name, w.rows(), w.cols(), options.block_size, padding);
  const qd::CudaContext context({.workspace_bytes = 1 << 16});
  const qd::Cuda cuda(context);
  Matrix<T, qd::DeviceMemory> storage(w.rows(), w.cols() + padding);
  cuda.upload(w.view(), storage.view().left_cols(w.cols()));
  const auto device = cuda.quantize<Format, Scales>(storage.view().left_cols(w.cols()), options);
  const auto host = qd::quantize<Format, Scales>(w.view(), options);
  CHECK(same(context, device.codes(), host.codes()));
  if constexpr (Scales::nested) {
    CHECK(same(context, device.scales().codes, host.scales().codes));
    CHECK(same(context, device.scales().nested_absmax, host.scales().nested_absmax));
    CHECK(std::bit_cast<std::uint32_t>(device.scales().offset) == std::bit_cast<std::uint32_t>(host.scales().offset));
  } else {
    CHECK(same(context, device.scales().absmax, host.scales().absmax));
  }
}

template <class T>
void check_formats(const Matrix<T>& w, qd::QuantizeOptions options = {}) {
  using namespace qdylora;
  for (const Index padding : {0, 5}) {
    check<NF4, DoubleQuant<>>(w, options, padding);
    check<NF4, DoubleQuant<FP8E4M3>>(w, options, padding);
    check<FP4, Float32Scales>(w, options, padding);
    check<INT4, DoubleQuant<>>(w, options, padding);
    check<INT8, Float32Scales>(w, options, padding);
    check<FP8E4M3, Float32Scales>(w, options, padding);
    check<FP8E5M2, DoubleQuant<>>(w, options, padding);
  }
}

}  // namespace

TEMPLATE_TEST_CASE("weights quantized on the device equal the host's in every byte", "", float, double, qd::bfloat16, qd::half) {
  const std::pair<Index, Index> shapes[] = {{0, 5}, {1, 1}, {3, 43}, {5, 64}, {19, 301}};
  for (const auto& [rows, cols] : shapes)
    for (const Index block : {Index{32}, Index{64}, Index{4096}})
      check_formats(test::normal_matrix<TestType>(rows, cols, 1), {.block_size = block});
}

TEST_CASE("zeros, tiny and large weights, ties and exact thresholds are quantized as on the host") {
  Matrix<float> w(6, 64);
  for (Index j = 0; j < 64; ++j) {
    w(1, j) = j % 2 == 0 ? 1e-39f : -1e-42f;  // subnormal: the divisor is clamped
    w(2, j) = j % 3 == 0 ? 3e38f : -2.9e38f;
    w(3, j) = j < 15 ? qd::NF4::thresholds[static_cast<std::size_t>(j)] : 1.0f;
    w(4, j) = j < 15 ? std::nextafter(qd::FP4::thresholds[static_cast<std::size_t>(j)], 2.0f) : -1.0f;
    w(5, j) = j % 2 == 0 ? -0.0f : 0.0f;
  }
  check_formats(w);
  Matrix<float> middles(1, 256);  // of INT8's levels, beside a 1 that leaves them as they are
  for (int level = -127; level < 127; ++level)
    middles(0, level + 127) = (qd::INT8::values[static_cast<std::uint8_t>(level)] + qd::INT8::values[static_cast<std::uint8_t>(level + 1)]) / 2;
  middles(0, 254) = 1.0f;
  check_formats(middles, {.block_size = 256});
}

TEST_CASE("what is not finite is refused by name, or kept as on the host") {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    auto w = qd::clone(test::normal_matrix<float>(4, 43, 2).view());
    w(2, 7) = bad;
    check_formats(w, {.non_finite = qd::NonFinite::propagate});
    const qd::CudaContext context({.workspace_bytes = 1 << 16});
    const qd::Cuda cuda(context);
    Matrix<float, qd::DeviceMemory> device(4, 43);
    cuda.upload(w.view(), device.view());
    const auto error = test::error_of([&] { cuda.quantize(device.view()); });
    REQUIRE(error);
    CHECK(error->code() == qd::Errc::non_finite);
    CHECK(std::string(error->what()).find("[2, 7]") != std::string::npos);
  }
}

}  // namespace quantize_test
