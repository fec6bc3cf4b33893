// Quantizing and decoding on the backend: bit for bit what the free functions do, with every instruction set and any number of threads,
// on data made to lie where roundings and comparisons turn.
#include "backend/classes.inc"

namespace quantize_test {

namespace qd = qdylora;
using namespace test;

namespace {

// f(cpu) for every instruction set, on one thread and on three.
template <class F>
void each_isa_on_threads(F f) {
  static const qd::Cpu one(1), three(3);
  for (const Isa isa : all_isas)
    if (qd::supported(isa))
      for (const qd::Cpu& cpu : {one, three}) {
        CAPTURE(qd::name(isa), cpu.threads());
        f(cpu.with_isa(isa));
      }
}

bool same_floats(std::span<const float> a, std::span<const float> b) {
  // A NaN's payload is nobody's business: which of two operands a sum takes it from is up to the compiler.
  return std::equal(a.begin(), a.end(), b.begin(), b.end(), [](float x, float y) {
    return std::bit_cast<std::uint32_t>(x) == std::bit_cast<std::uint32_t>(y) || (std::isnan(x) && std::isnan(y));
  });
}

// The name of the first part that differs.
template <class Tensor>
std::string difference(const Tensor& a, const Tensor& b) {
  if (a.rows() != b.rows() || a.cols() != b.cols() || a.block_size() != b.block_size()) return "shape";
  const auto same_codes = [](auto x, auto y) { return std::equal(x.begin(), x.end(), y.begin(), y.end()); };
  if (!same_codes(a.codes().span(), b.codes().span())) {
    const auto x = a.codes().span(), y = b.codes().span();
    const auto at = std::mismatch(x.begin(), x.begin() + std::min(std::ssize(x), std::ssize(y)), y.begin()).first - x.begin();
    return "code byte " + std::to_string(at);
  }
  if constexpr (Tensor::scales_type::nested) {
    if (!same_codes(a.scales().codes.span(), b.scales().codes.span())) return "scale codes";
    if (!same_floats(a.scales().nested_absmax.span(), b.scales().nested_absmax.span())) return "nested absmax";
    if (!same_floats({&a.scales().offset, 1}, {&b.scales().offset, 1})) return "offset";
  } else if (!same_floats(a.scales().absmax.span(), b.scales().absmax.span())) {
    return "absmax";
  }
  return "";
}

// The first element whose bits differ, any NaN being as good as another.
template <class T>
std::string decoding_difference(MatrixView<const T> a, MatrixView<const T> b) {
  for (Index i = 0; i < a.rows; ++i)
    for (Index j = 0; j < a.cols; ++j) {
      const T x = a(i, j), y = b(i, j);
      if (std::isnan(static_cast<double>(x)) && std::isnan(static_cast<double>(y))) continue;
      if (std::memcmp(&x, &y, sizeof(T)) != 0)
        return std::to_string(i) + ", " + std::to_string(j) + ": " + std::to_string(static_cast<double>(x)) + " and not " +
               std::to_string(static_cast<double>(y));
    }
  return "";
}

// ---- data ----------------------------------------------------------------------------------------------------------------------

enum class Data { normal, midpoints, subnormal, smallest_divisor, zeros, huge, tiny_and_huge, equal, levels };
constexpr Data all_data[] = {Data::normal,        Data::midpoints, Data::subnormal, Data::smallest_divisor, Data::zeros, Data::huge,
                             Data::tiny_and_huge, Data::equal,     Data::levels};

float step_ulps(float x, int ulps) {
  for (; ulps > 0; --ulps) x = std::nextafter(x, INFINITY);
  for (; ulps < 0; ++ulps) x = std::nextafter(x, -INFINITY);
  return x;
}

// Where v turns from one code to the next, in [-1, 1].
template <class Format>
std::vector<float> turning_points() {
  std::vector<float> points;
  if constexpr (requires { Format::largest; }) {
    for (int code = 0; code < Format::Ocp::max_code; ++code) {
      const double low = Format::Ocp::decode(static_cast<std::uint8_t>(code)),
                   high = Format::Ocp::decode(static_cast<std::uint8_t>(code + 1));
      points.push_back(static_cast<float>((low + high) / 2 / static_cast<double>(Format::largest)));
      points.push_back(-points.back());
    }
  } else {
    for (const float threshold : Format::thresholds) points.push_back(threshold), points.push_back(-threshold);
  }
  return points;
}

/// Row-major data whose blocks have what `data` says, whatever their size.
template <class Format>
Matrix<float> special(Index rows, Index cols, Index block_size, Data data, std::uint64_t seed) {
  Matrix<float> x(rows, cols);
  Rng rng(seed, qd::Purpose::data);
  const auto points = turning_points<Format>();
  for (Index i = 0; i < x.size(); ++i) {
    const Index block = i / block_size, within = i % block_size;
    const float n = rng.normal();
    float& v = x.data()[i];
    switch (data) {
      case Data::normal: v = n; break;
      case Data::midpoints: {
        // absmax is a power of two, so v is the midpoint itself, or a neighbour of it. Every third block has an odd absmax.
        const float absmax = block % 3 == 2 ? 1.7f : std::ldexp(1.0f, static_cast<int>(block % 5) - 2);
        const float point = points[static_cast<std::size_t>(rng.below(points.size()))];
        v = within == 0 ? (block % 2 == 0 ? absmax : -absmax) : step_ulps(point, static_cast<int>(rng.below(5)) - 2) * absmax;
        break;
      }
      case Data::subnormal: v = std::ldexp(n, block % 2 == 0 ? -133 : -145); break;
      case Data::smallest_divisor: v = 1e-38f * (block % 3 == 0 ? 0.9f : block % 3 == 1 ? 1.0f : 1.2f) * std::tanh(n); break;
      case Data::zeros: v = block % 4 == 3 ? n : rng.below(2) == 0 ? -0.0f : 0.0f; break;
      case Data::huge:
        v = std::numeric_limits<float>::max() * (within == 1 ? (block % 2 == 0 ? 1.0f : -1.0f) : rng.uniform(-1.0f, 1.0f));
        break;
      case Data::tiny_and_huge: v = std::ldexp(n, static_cast<int>(rng.below(250)) - 126); break;
      case Data::equal: v = block % 3 == 0 ? 0.3f : (rng.below(2) == 0 ? -0.1f : 0.1f); break;
      case Data::levels: v = Format::values[rng.below(static_cast<std::uint64_t>(Format::values.size()))] * 0.37f; break;
    }
    if (!std::isfinite(v)) v = 0.0f;  // NaN among the values of an 8-bit format
  }
  return x;
}

// All that the backend and the free functions do with one matrix, compared.
template <class Format, class Scales, class T>
void check_quantization(MatrixView<const T> x, qd::QuantizeOptions options, bool with_oracle) {
  const auto expected = qd::quantize<Format, Scales>(x, options);
  if (with_oracle) CHECK(difference(expected, reference::quantize<Format, Scales>(x, options.block_size)) == "");
  Matrix<T> values(x.rows, x.cols);
  qd::dequantize(expected.view(), values.view());
  each_isa_on_threads([&](const qd::Cpu& cpu) {
    const auto found = cpu.quantize<Format, Scales>(x, options);
    CHECK(difference(found, expected) == "");
    Placed<T> y(x.rows, x.cols, 5, 2);
    cpu.dequantize(expected.view(), y.view());
    CHECK(decoding_difference<T>(y.in(), values.view()) == "");
    CHECK(y.surroundings_intact());
  });
}

}  // namespace

// ---- quantizing ----------------------------------------------------------------------------------------------------------------

TEMPLATE_TEST_CASE("quantizing on the backend is the free function's to the bit, on data of every kind", "[cpu][quantize]",
                   QDYLORA_TEST_STORAGES) {
  using Format = typename TestType::Format;
  using Scales = typename TestType::Scales;
  for (const Data data : all_data)
    for (const auto& [rows, cols, block_size] :
         {std::tuple<Index, Index, Index>{5, 131, 32}, {9, 64, 64}, {7, 389, 256}, {3, 1501, 4096}}) {
      CAPTURE(static_cast<int>(data), rows, cols, block_size);
      const auto x = special<Format>(rows, cols, block_size, data, 1);
      check_quantization<Format, Scales, float>(std::as_const(x).view(), {.block_size = block_size}, rows * cols < 1000);
    }
}

TEMPLATE_TEST_CASE("quantizing on the backend is the free function's to the bit, on every shape", "[cpu][quantize]",
                   (Storage<qd::NF4, DynamicScales>), (Storage<qd::INT4, PlainScales>), (Storage<qd::FP4, Float8Scales>),
                   (Storage<qd::FP8E4M3, DynamicScales>), (Storage<qd::FP8E5M2, PlainScales>)) {
  using Format = typename TestType::Format;
  using Scales = typename TestType::Scales;
  Rng rng(seed_of<Format, Scales>(), qd::Purpose::data);
  for (const Index rows : {0, 1, 2, 3, 7})
    for (const Index cols : edge_sizes) {
      const Index block_size = drawn_block(rng);
      CAPTURE(rows, cols, block_size);
      const auto x = special<Format>(rows, cols, block_size, Data::normal, rng.next());
      const Placed<float> placed(x.view(), drawn(rng, 17), drawn(rng, 8));
      check_quantization<Format, Scales, float>(placed.in(), {.block_size = block_size}, false);
    }
  for (const Index block_size : block_sizes)
    for (const Index size : {block_size - 1, block_size, block_size + 1, 3 * block_size + 7}) {
      CAPTURE(block_size, size);
      const auto x = special<Format>(1, size, block_size, Data::normal, rng.next());
      check_quantization<Format, Scales, float>(x.view(), {.block_size = block_size}, false);
    }
}

TEMPLATE_TEST_CASE("weights of every type are quantized and decoded as by the free functions", "[cpu][quantize]", double, qd::bfloat16,
                   qd::half) {
  const auto check = [&]<class Format, class Scales>(Format, Scales) {
    for (const Data data : {Data::normal, Data::midpoints, Data::subnormal, Data::zeros, Data::tiny_and_huge}) {
      CAPTURE(Format::name, static_cast<int>(data));
      auto x = special<Format>(11, 141, 64, data, 2);
      if (std::is_same_v<TestType, qd::half>)
        for (float& v : x.span()) v = std::fabs(v) > 60000.0f ? 1.0f : v;  // beyond the range of half
      const auto rounded = converted<TestType>(x.view());
      check_quantization<Format, Scales, TestType>(rounded.view(), {.block_size = 64}, true);
    }
  };
  check(qd::NF4{}, qd::DoubleQuant<>{});
  check(qd::FP4{}, qd::Float32Scales{});
  check(qd::INT4{}, qd::DoubleQuant<qd::FP8E4M3>{});
  check(qd::FP8E4M3{}, qd::Float32Scales{});
  check(qd::FP8E5M2{}, qd::DoubleQuant<>{});
}

TEMPLATE_TEST_CASE("large weights, quantized on many threads, have the free function's bits", "[cpu][quantize]", qd::NF4, qd::FP4, qd::INT4,
                   qd::FP8E4M3, qd::FP8E5M2) {
  const auto x = normal_matrix<float>(257, 1003, 3);
  const auto expected = qd::quantize<TestType, qd::DoubleQuant<>>(x.view(), {.block_size = 64});
  Matrix<float> values(257, 1003);
  qd::dequantize(expected.view(), values.view());
  for (const int threads : {1, 2, 3, 8}) {
    const qd::Cpu pool(threads);
    for (const Isa isa : all_isas)
      if (qd::supported(isa)) {
        CAPTURE(threads, qd::name(isa));
        const qd::Cpu cpu = pool.with_isa(isa);
        CHECK(difference(cpu.quantize<TestType, qd::DoubleQuant<>>(x.view(), {.block_size = 64}), expected) == "");
        Matrix<float> y(257, 1003);
        cpu.dequantize(expected.view(), y.view());
        CHECK(same_bits(y.view(), values.view()));
      }
  }
}

TEMPLATE_TEST_CASE("quantizing does not depend on the class of products", "[cpu][quantize]", qd::NF4, qd::FP8E4M3) {
  const auto x = normal_matrix<float>(33, 130, 4);
  const auto expected = qd::quantize<TestType, qd::DoubleQuant<>>(x.view());
  Matrix<float> values(33, 130);
  qd::dequantize(expected.view(), values.view());
  each_class([&](const qd::Cpu& cpu) {
    CHECK(difference(cpu.quantize<TestType, qd::DoubleQuant<>>(x.view()), expected) == "");
    Matrix<float> y(33, 130);
    cpu.dequantize(expected.view(), y.view());
    CHECK(same_bits(y.view(), values.view()));
  });
}

TEMPLATE_TEST_CASE("NaN and infinity are refused where they stand first, or kept as the free function keeps them", "[cpu][quantize]",
                   (Storage<qd::NF4, PlainScales>), (Storage<qd::FP4, DynamicScales>), (Storage<qd::INT4, PlainScales>),
                   (Storage<qd::FP8E4M3, Float8Scales>), (Storage<qd::FP8E5M2, PlainScales>)) {
  using Format = typename TestType::Format;
  using Scales = typename TestType::Scales;
  constexpr Index rows = 40, cols = 131;
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), INFINITY, -INFINITY})
    for (const auto& [i, j] : {std::pair<Index, Index>{0, 0}, {3, 7}, {17, 130}, {39, 130}}) {
      CAPTURE(bad, i, j);
      auto x = qd::clone(normal_matrix<float>(rows, cols, 5).view());
      x(i, j) = bad;
      x(39, 130) = bad;  // a later one, which is not the one to name
      const MatrixView<const float> view = x.view();
      each_isa_on_threads([&, i = i, j = j](const qd::Cpu& cpu) {
        const auto error = error_of([&] { cpu.quantize<Format, Scales>(view, {.block_size = 64}); });
        REQUIRE(error);
        CHECK(error->code() == Errc::non_finite);
        CHECK(std::string(error->what()).find("[" + std::to_string(i) + ", " + std::to_string(j) + "]") != std::string::npos);
      });
      check_quantization<Format, Scales, float>(view, {.block_size = 64, .non_finite = qd::NonFinite::propagate}, false);
    }
}

TEST_CASE("block sizes that are none are refused with every instruction set", "[cpu][quantize]") {
  const auto x = normal_matrix<float>(4, 33, 6);
  each_isa_on_threads([&](const qd::Cpu& cpu) {
    for (const Index block_size : {0, -64, 16, 48, 63, 65, 8192})
      CHECK(code_of([&] { cpu.quantize<qd::NF4>(x.view(), {.block_size = block_size}); }) == Errc::block_size);
  });
}

TEST_CASE("quantizing reads its weight and not one element beside it", "[cpu][quantize]") {
  for (const auto& [rows, cols] : {std::pair<Index, Index>{1, 1}, {1, 33}, {3, 43}, {7, 64}, {5, 129}})
    for (const PageEdge edge : {PageEdge::start, PageEdge::end})
      for (const Index padding : {0, 3}) {
        CAPTURE(rows, cols, static_cast<int>(edge), padding);
        const auto x = normal_matrix<float>(rows, cols, 7);
        const FencedMatrix<float> fenced(x.view(), padding, edge);
        each_isa_on_threads([&](const qd::Cpu& cpu) {
          CHECK(difference(cpu.quantize<qd::NF4>(fenced.in()), qd::quantize<qd::NF4>(x.view())) == "");
          CHECK(difference(cpu.quantize<qd::FP8E4M3>(fenced.in()), qd::quantize<qd::FP8E4M3>(x.view())) == "");
        });
      }
}

// ---- decoding ------------------------------------------------------------------------------------------------------------------

namespace {

// Codes and scales that quantization does not write: every code, scales of both signs, subnormal, huge, zero and not finite.
template <class Format>
qd::QuantizedTensor<Format, qd::Float32Scales> any_tensor(Index rows, Index cols, Index block_size, Rng& rng) {
  qd::Buffer<std::uint8_t> codes(qd::code_bytes<Format>(rows * cols));
  for (auto& code : codes.span()) code = static_cast<std::uint8_t>(rng.next());
  qd::Float32Scales::Storage<qd::HostMemory> scales{qd::Buffer<float>((rows * cols + block_size - 1) / block_size)};
  for (auto& scale : scales.absmax.span()) {
    const float n = rng.normal();
    switch (rng.below(8)) {
      case 0: scale = 0.0f; break;
      case 1: scale = -0.0f; break;
      case 2: scale = std::ldexp(n, -135); break;
      case 3: scale = std::ldexp(n, 125); break;
      case 4: scale = rng.below(4) == 0 ? INFINITY : n; break;
      case 5: scale = rng.below(4) == 0 ? std::numeric_limits<float>::quiet_NaN() : n; break;
      default: scale = n;
    }
  }
  return {rows, cols, block_size, std::move(codes), std::move(scales)};
}

template <class Format>
qd::QuantizedTensor<Format, qd::DoubleQuant<>> any_nested_tensor(Index rows, Index cols, Rng& rng) {
  qd::Buffer<std::uint8_t> codes(qd::code_bytes<Format>(rows * cols));
  for (auto& code : codes.span()) code = static_cast<std::uint8_t>(rng.next());
  const Index blocks = (rows * cols + 31) / 32;
  qd::DoubleQuant<>::Storage<qd::HostMemory> scales{qd::Buffer<std::uint8_t>(blocks), qd::Buffer<float>((blocks + 255) / 256),
                                                    rng.normal()};
  for (auto& code : scales.codes.span()) code = static_cast<std::uint8_t>(rng.next());
  for (auto& n : scales.nested_absmax.span()) n = rng.normal();
  return {rows, cols, 32, std::move(codes), std::move(scales)};
}

template <class T, class Format, class Scales>
void check_decoding(const qd::QuantizedTensor<Format, Scales>& tensor, Rng& rng) {
  const PlacedWeight<Format, Scales> w(tensor, drawn(rng, 64));
  Matrix<T> expected(tensor.rows(), tensor.cols()), oracle(tensor.rows(), tensor.cols());
  qd::dequantize(tensor.view(), expected.view());
  reference::dequantize(tensor.view(), oracle.view());
  CHECK(decoding_difference<T>(expected.view(), oracle.view()) == "");
  const Index offset = drawn(rng, 17), padding = drawn(rng, 8);
  each_isa_on_threads([&](const qd::Cpu& cpu) {
    Placed<T> y(tensor.rows(), tensor.cols(), offset, padding);
    cpu.dequantize(w.view(), y.view());
    CHECK(decoding_difference<T>(y.in(), std::as_const(expected).view()) == "");
    CHECK(y.surroundings_intact());
  });
}

}  // namespace

TEMPLATE_TEST_CASE("every code and every scale is decoded as by the free function", "[cpu][quantize]", float, double, qd::bfloat16,
                   qd::half) {
  Rng rng(8, qd::Purpose::data);
  const auto check = [&]<class Format>(Format) {
    for (const auto& [rows, cols] :
         {std::pair<Index, Index>{0, 3}, {3, 0}, {1, 1}, {1, 2}, {3, 31}, {7, 33}, {5, 64}, {9, 129}, {60, 257}}) {
      const Index block_size = drawn_block(rng);
      CAPTURE(Format::name, rows, cols, block_size);
      check_decoding<TestType>(any_tensor<Format>(rows, cols, block_size, rng), rng);
      check_decoding<TestType>(any_nested_tensor<Format>(rows, cols, rng), rng);
    }
  };
  check(qd::NF4{});
  check(qd::FP4{});
  check(qd::INT4{});
  check(qd::FP8E4M3{});
  check(qd::FP8E5M2{});
}

TEMPLATE_TEST_CASE("decoding reads and writes its operands and not one element beside them", "[cpu][quantize]", float, qd::bfloat16) {
  const auto check = [&]<class Format, class Scales>(Format, Scales) {
    for (const auto& [rows, cols] : {std::pair<Index, Index>{1, 1}, {1, 33}, {3, 43}, {7, 64}, {5, 129}, {90, 97}})
      for (const PageEdge edge : {PageEdge::start, PageEdge::end}) {
        CAPTURE(Format::name, rows, cols, static_cast<int>(edge));
        const auto x = normal_matrix<float>(rows, cols, 9);
        const auto tensor = qd::quantize<Format, Scales>(x.view(), {.block_size = 32});
        const FencedWeight<Format, Scales> w(tensor, edge);
        Matrix<TestType> expected(rows, cols);
        qd::dequantize(tensor.view(), expected.view());
        each_isa_on_threads([&, rows = rows, cols = cols](const qd::Cpu& cpu) {
          FencedMatrix<TestType> y(rows, cols, 0, edge);
          cpu.dequantize(w.view(), y.view());
          CHECK(same_bits(y.view(), expected.view()));
        });
      }
  };
  check(qd::NF4{}, qd::DoubleQuant<>{});
  check(qd::INT4{}, qd::Float32Scales{});
  check(qd::FP8E4M3{}, qd::DoubleQuant<qd::FP8E4M3>{});
  check(qd::FP8E5M2{}, qd::Float32Scales{});
}

}  // namespace quantize_test
