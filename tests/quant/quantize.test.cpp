// The quantizer: against the oracle on odd shapes, in pieces, on threads, with bad input; and what it costs in accuracy and bits.
#include <qdylora/quant/quantize.hpp>

#include <algorithm>
#include <cmath>
#include <fstream>
#include <numeric>
#include <thread>
#include <vector>

#include <qdylora/cpu/reference.hpp>
#include <qdylora/io/json.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"
#include "support/random_data.hpp"

namespace quantize_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;

namespace {

constexpr float nan_value = std::numeric_limits<float>::quiet_NaN();
constexpr float infinity = std::numeric_limits<float>::infinity();

template <class Tensor>
bool same_tensor(const Tensor& a, const Tensor& b) {
  const auto equal = [](auto x, auto y) {
    return x.size_bytes() == y.size_bytes() && (x.empty() || std::memcmp(x.data(), y.data(), x.size_bytes()) == 0);
  };
  bool same =
      a.rows() == b.rows() && a.cols() == b.cols() && a.block_size() == b.block_size() && equal(a.codes().span(), b.codes().span());
  if constexpr (Tensor::scales_type::nested)
    same = same && equal(a.scales().codes.span(), b.scales().codes.span()) &&
           equal(a.scales().nested_absmax.span(), b.scales().nested_absmax.span()) &&
           std::bit_cast<std::uint32_t>(a.scales().offset) == std::bit_cast<std::uint32_t>(b.scales().offset);
  else
    same = same && equal(a.scales().absmax.span(), b.scales().absmax.span());
  return same;
}

template <class Tensor>
const qd::Matrix<float> decoded(const Tensor& tensor) {
  qd::Matrix<float> out(tensor.rows(), tensor.cols());
  qd::dequantize(tensor.view(), out.view());
  return out;
}

// Every weight format with every form of scales.
template <class F, class S>
struct Pair {
  using Format = F;
  using Scales = S;
};
using PlainScales = qd::Float32Scales;
using Dynamic = qd::DoubleQuant<qd::DynamicMap8>;
using Float8 = qd::DoubleQuant<qd::FP8E4M3>;
#define QDYLORA_TEST_ALL_STORAGES                                                                                            \
  (Pair<qd::NF4, PlainScales>), (Pair<qd::NF4, Dynamic>), (Pair<qd::NF4, Float8>), (Pair<qd::FP4, PlainScales>),             \
      (Pair<qd::FP4, Dynamic>), (Pair<qd::FP4, Float8>), (Pair<qd::INT4, PlainScales>), (Pair<qd::INT4, Dynamic>),           \
      (Pair<qd::INT4, Float8>), (Pair<qd::FP8E4M3, PlainScales>), (Pair<qd::FP8E4M3, Dynamic>), (Pair<qd::FP8E4M3, Float8>), \
      (Pair<qd::FP8E5M2, PlainScales>), (Pair<qd::FP8E5M2, Dynamic>), (Pair<qd::FP8E5M2, Float8>)

// The tasks of a loop, last first: order must not matter.
struct ReverseFor {
  template <class F>
  void operator()(Index count, F&& f) const {
    for (Index i = count; i > 0; --i) f(i - 1);
  }
};

struct ThreadFor {
  template <class F>
  void operator()(Index count, F&& f) const {
    std::vector<std::thread> threads;
    for (Index t = 0; t < 4; ++t)
      threads.emplace_back([&, t] {
        for (Index i = t; i < count; i += 4) f(i);
      });
    for (auto& thread : threads) thread.join();
  }
};

}  // namespace

TEMPLATE_TEST_CASE("quantize and dequantize agree with the oracle bit for bit, on shapes whose blocks cross rows", "",
                   QDYLORA_TEST_ALL_STORAGES) {
  using Format = typename TestType::Format;
  using Scales = typename TestType::Scales;
  for (const auto& [rows, cols] : {std::pair<Index, Index>{0, 0},
                                   {0, 5},
                                   {5, 0},
                                   {1, 1},
                                   {1, 64},
                                   {3, 7},
                                   {5, 31},
                                   {7, 64},
                                   {9, 65},
                                   {4, 80},
                                   {33, 97},
                                   {130, 129}})
    for (const Index block : {Index{32}, Index{64}, Index{256}}) {
      CAPTURE(rows, cols, block);
      const auto x = test::normal_matrix<float>(rows, cols, static_cast<std::uint64_t>(rows * 1000 + cols));
      const auto found = qd::quantize<Format, Scales>(x.view(), {.block_size = block});
      const auto expected = qd::reference::quantize<Format, Scales>(x.view(), block);
      CHECK(same_tensor(found, expected));
      qd::Matrix<float> values(rows, cols);
      qd::reference::dequantize(expected.view(), values.view());
      CHECK(test::same_bits(decoded(found).view(), values.view()));
      for (Index i = 0; i < rows; ++i) CHECK((cols == 0 || found.view()(i, cols - 1) == values(i, cols - 1)));
    }
}

TEMPLATE_TEST_CASE("weights of every scalar type are quantized as their float values", "", double, qd::bfloat16, qd::half) {
  const auto x = test::normal_matrix<TestType>(17, 51, 3);
  const auto as_float = test::converted<float>(x.view());
  CHECK(same_tensor(qd::quantize(x.view()), qd::quantize(std::as_const(as_float).view())));
  CHECK(same_tensor(qd::quantize(x.view()), qd::reference::quantize<qd::NF4, Dynamic>(x.view())));
}

TEMPLATE_TEST_CASE("decoding to another type rounds the float value once", "", double, qd::bfloat16, qd::half) {
  const auto x = test::normal_matrix<float>(17, 51, 4);
  const auto tensor = qd::quantize(x.view());
  qd::Matrix<TestType> found(17, 51);
  qd::dequantize(tensor.view(), found.view());
  CHECK(test::same_bits(found.view(), test::converted<TestType>(decoded(tensor).view()).view()));
}

TEST_CASE("a weight may have any stride") {
  auto wide = test::normal_matrix<float>(11, 50, 5);
  const auto part = wide.view().middle_cols(3, 37);
  const auto gathered = qd::clone(part);
  CHECK(same_tensor(qd::quantize(qd::MatrixView<const float>(part)), qd::quantize(gathered.view())));
}

TEMPLATE_TEST_CASE("the quantizer gives the same tensor whatever the chunks and whatever the order of tasks", "",
                   (Pair<qd::NF4, Dynamic>), (Pair<qd::FP4, PlainScales>), (Pair<qd::FP8E4M3, PlainScales>)) {
  using Format = typename TestType::Format;
  using Scales = typename TestType::Scales;
  for (const auto& [rows, cols] : {std::pair<Index, Index>{40, 37}, {100, 1}, {13, 64}, {70, 301}}) {
    const auto x = test::normal_matrix<float>(rows, cols, 6);
    const auto whole = qd::quantize<Format, Scales>(x.view(), {.block_size = 32});
    CHECK(same_tensor(whole, qd::quantize<Format, Scales>(x.view(), {.block_size = 32}, ReverseFor{})));
    CHECK(same_tensor(whole, qd::quantize<Format, Scales>(x.view(), {.block_size = 32}, ThreadFor{})));
    for (const std::vector<Index>& sizes : {std::vector<Index>{1}, {2}, {7}, {0, 3, 0, 1}, {39, 1}}) {
      CAPTURE(rows, cols, sizes);
      qd::Quantizer<Format, Scales> quantizer(rows, cols, {.block_size = 32});
      Index row = 0;
      for (std::size_t i = 0; row < rows; ++i) {
        const Index count = std::min(sizes[i % sizes.size()], rows - row);
        quantizer.append(x.view().middle_rows(row, count));
        row += count;
      }
      CHECK(same_tensor(whole, std::move(quantizer).finish()));
    }
  }
}

TEST_CASE("chunks of different types make one tensor") {
  const auto x = test::converted<float>(test::normal_matrix<qd::bfloat16>(6, 33, 7).view());
  const auto low = test::converted<qd::bfloat16>(x.view());
  qd::Quantizer<> quantizer(6, 33);
  quantizer.append(x.view().top_rows(2));
  quantizer.append(low.view().middle_rows(2, 4));
  CHECK(same_tensor(qd::quantize(x.view()), std::move(quantizer).finish()));
}

TEST_CASE("the quantizer accepts exactly the rows it was made for") {
  const auto x = test::normal_matrix<float>(5, 8, 8);
  qd::Quantizer<> quantizer(4, 8);
  CHECK(test::code_of([&] { quantizer.append(x.view()); }) == Errc::shape_mismatch);
  CHECK(test::code_of([&] { quantizer.append(x.view().left_cols(7)); }) == Errc::shape_mismatch);
  quantizer.append(x.view().top_rows(3));
  CHECK(test::code_of([&] { quantizer.append(x.view().top_rows(2)); }) == Errc::shape_mismatch);
  auto copy = std::move(quantizer);
  CHECK(test::code_of([&] { static_cast<void>(std::move(copy).finish()); }) == Errc::state_order);
}

TEST_CASE("a quantizer that refused to finish early can be finished later") {
  const auto x = test::normal_matrix<float>(4, 8, 8);
  qd::Quantizer<> quantizer(4, 8);
  quantizer.append(x.view().top_rows(3));
  CHECK(test::code_of([&] { static_cast<void>(std::move(quantizer).finish()); }) == Errc::state_order);
  quantizer.append(x.view().middle_rows(3, 1));
  CHECK(same_tensor(std::move(quantizer).finish(), qd::quantize(x.view())));
}

TEST_CASE("block sizes are powers of two from 32 to 4096, shapes are shapes") {
  for (const Index block : {-64, 0, 1, 16, 48, 100, 8192}) {
    CAPTURE(block);
    CHECK(test::code_of([&] { qd::Quantizer<>(4, 8, {.block_size = block}); }) == Errc::block_size);
    CHECK_FALSE(qd::is_block_size(block));
  }
  for (Index block = 32; block <= 4096; block *= 2) CHECK(qd::is_block_size(block));
  CHECK(test::code_of([] { qd::Quantizer<>(-1, 8); }) == Errc::bad_argument);
  CHECK(test::code_of([] { qd::Quantizer<>(1, -8); }) == Errc::bad_argument);
  CHECK(test::code_of([] { qd::Quantizer<>(Index{1} << 40, Index{1} << 40); }) == Errc::bad_argument);
}

TEST_CASE("a tensor takes codes and scales only of the sizes its shape asks for") {
  using Plain = qd::QuantizedTensor<qd::NF4, PlainScales>;
  const auto make = [](Index rows, Index cols, Index block, Index codes, Index absmax) {
    return test::code_of([&] { Plain(rows, cols, block, qd::Buffer<std::uint8_t>(codes), {qd::Buffer<float>(absmax)}); });
  };
  CHECK_FALSE(make(3, 43, 64, 65, 3));
  CHECK(make(3, 43, 64, 64, 3) == Errc::shape_mismatch);
  CHECK(make(3, 43, 64, 65, 2) == Errc::shape_mismatch);
  CHECK(make(3, 43, 65, 65, 3) == Errc::block_size);
  CHECK(make(-3, 43, 64, 65, 3) == Errc::bad_argument);
  const auto nested = [](Index codes, Index absmax) {
    return test::code_of([&] {
      qd::NF4Tensor(257, 64, 64, qd::Buffer<std::uint8_t>(257 * 32),
                    {qd::Buffer<std::uint8_t>(codes), qd::Buffer<float>(absmax), 0.0f});
    });
  };
  CHECK_FALSE(nested(257, 2));
  CHECK(nested(256, 2) == Errc::shape_mismatch);
  CHECK(nested(257, 1) == Errc::shape_mismatch);
}

TEST_CASE("element 2i is the high half of a byte, and an odd count ends with the code of zero") {
  const float x[3] = {1.0f, -1.0f, 1.0f};
  const auto nf4 = qd::quantize<qd::NF4, PlainScales>(qd::MatrixView(x, 1, 3));
  CHECK(nf4.codes()[0] == 0xF0);
  CHECK(nf4.codes()[1] == 0xF7);
  CHECK(nf4.view().code(0) == 15);
  CHECK(nf4.view().code(1) == 0);
  const auto fp4 = qd::quantize<qd::FP4, PlainScales>(qd::MatrixView(x, 1, 3));
  CHECK(fp4.codes()[0] == 0x3B);
  CHECK(fp4.codes()[1] == 0x30);
  const auto int4 = qd::quantize<qd::INT4, PlainScales>(qd::MatrixView(x, 1, 3));
  CHECK(int4.codes()[1] == 0xF8);
}

TEST_CASE("any rectangle of a tensor decodes to that part of the whole") {
  const auto check = [](auto format, Index cols) {
    using Format = decltype(format);
    const auto tensor = qd::quantize<Format, Dynamic>(test::normal_matrix<float>(9, cols, 9).view(), {.block_size = 32});
    const auto whole = decoded(tensor);
    for (Index row = 0; row < 9; row += 2)
      for (Index col = 0; col < cols; col += 5)
        for (const Index width : {Index{0}, Index{1}, Index{2}, Index{33}, cols - col}) {
          if (col + width > cols) continue;
          CAPTURE(row, col, width);
          qd::Matrix<float> part(9 - row, width + 3);
          for (float& x : part.span()) x = -77.0f;
          qd::dequantize(tensor.view(), part.view().left_cols(width), row, col);
          CHECK(test::same_bits(part.view().left_cols(width), whole.view().middle_rows(row, 9 - row).middle_cols(col, width)));
          for (Index i = 0; i < part.rows(); ++i) CHECK(part(i, width) == -77.0f);
        }
  };
  check(qd::NF4{}, 37);
  check(qd::NF4{}, 64);
  check(qd::FP8E4M3{}, 37);
}

TEST_CASE("a rectangle outside the tensor is an error") {
  const auto tensor = qd::quantize(test::normal_matrix<float>(4, 6, 10).view());
  qd::Matrix<float> out(2, 3);
  const auto code = [&](Index row, Index col) {
    return test::code_of([&] { qd::dequantize(tensor.view(), out.view(), row, col); });
  };
  CHECK_FALSE(code(2, 3));
  CHECK(code(3, 3) == Errc::shape_mismatch);
  CHECK(code(2, 4) == Errc::shape_mismatch);
  CHECK(code(-1, 0) == Errc::shape_mismatch);
  CHECK(code(0, -1) == Errc::shape_mismatch);
  CHECK(code(std::numeric_limits<Index>::max(), 0) == Errc::shape_mismatch);
}

TEMPLATE_TEST_CASE("quantizing decoded weights again changes nothing", "", qd::NF4, qd::FP4, qd::INT4, qd::INT8, qd::FP8E4M3,
                   qd::FP8E5M2) {
  const auto once = qd::quantize<TestType, PlainScales>(test::normal_matrix<float>(64, 65, 11).view());
  const auto values = decoded(once);
  const auto twice = qd::quantize<TestType, PlainScales>(values.view());
  CHECK(test::same_bits(decoded(twice).view(), values.view()));
  // FP4's code 8 decodes to +0, which is code 0; every other code comes back.
  if (!std::is_same_v<TestType, qd::FP4>) CHECK(same_tensor(once, twice));
}

TEMPLATE_TEST_CASE("a block of zeros, of equal or of tiny weights decodes to finite values, in every form of scales", "",
                   QDYLORA_TEST_ALL_STORAGES) {
  for (const float value : {0.0f, -0.0f, 1.0f, -3.0f, 1e-38f, 1e-42f, 3e38f})
    for (const Index count : {Index{1}, Index{64}, Index{70}, Index{640}}) {
      CAPTURE(value, count);
      qd::Matrix<float> x(1, count);
      for (float& w : x.span()) w = value;
      const auto values = decoded(qd::quantize<typename TestType::Format, typename TestType::Scales>(std::as_const(x).view()));
      for (const float w : values.span()) {
        REQUIRE(std::isfinite(w));
        REQUIRE(std::fabs(w - value) <= 1e-5f * std::fabs(value) + 2e-38f);
      }
    }
}

TEMPLATE_TEST_CASE("tensors with one block of zeros among others, and tensors of tiny blocks, decode to finite values", "",
                   QDYLORA_TEST_ALL_STORAGES) {
  for (const double scale : {1.0, 1e-30, 1e-38, 1e-41}) {
    CAPTURE(scale);
    auto x = test::normal_matrix<float>(5, 64, 12, scale);
    for (Index j = 0; j < 64; ++j) x(2, j) = 0.0f;
    const auto values = decoded(qd::quantize<typename TestType::Format, typename TestType::Scales>(std::as_const(x).view()));
    for (const float w : values.span()) REQUIRE(std::isfinite(w));
  }
}

TEST_CASE("a weight that is not finite is refused by default, and the error names the first") {
  for (const float bad : {nan_value, infinity, -infinity}) {
    auto x = test::normal_matrix<float>(50, 33, 13);
    x(41, 2) = bad;
    x(40, 32) = bad;
    x(40, 31) = bad;
    for (int form = 0; form < 3; ++form) {
      const auto error = test::error_of([&] {
        const auto view = std::as_const(x).view();
        if (form == 0) qd::quantize(view);
        else if (form == 1) qd::quantize(view, {}, ReverseFor{});
        else qd::quantize(view, {}, ThreadFor{});
      });
      REQUIRE(error);
      CHECK(error->code() == Errc::non_finite);
      CHECK(std::string(error->what()).find("[40, 31]") != std::string::npos);
    }
  }
  qd::Matrix<double> beyond(1, 2);
  beyond(0, 1) = 1e300;  // finite, but not as a float
  CHECK(test::code_of([&] { qd::quantize(std::as_const(beyond).view()); }) == Errc::non_finite);
}

TEST_CASE("a refused chunk leaves nothing behind") {
  const auto x = test::normal_matrix<float>(20, 13, 14);
  auto bad = qd::clone(x.view().middle_rows(7, 13));
  bad(5, 5) = nan_value;
  qd::Quantizer<> quantizer(20, 13);
  quantizer.append(x.view().top_rows(7));
  for (int i = 0; i < 2; ++i) {
    const auto error = test::error_of([&] { quantizer.append(std::as_const(bad).view()); });
    REQUIRE(error);
    CHECK(error->code() == Errc::non_finite);
    CHECK(std::string(error->what()).find("[12, 5]") != std::string::npos);  // counted from the tensor's first row
  }
  quantizer.append(x.view().middle_rows(7, 13));
  CHECK(same_tensor(std::move(quantizer).finish(), qd::quantize(x.view())));
}

TEMPLATE_TEST_CASE("under propagate a NaN makes its block NaN and no other", "", qd::NF4, qd::FP4, qd::INT4, qd::INT8, qd::FP8E4M3,
                   qd::FP8E5M2) {
  for (const Index count : {Index{256}, Index{230}}) {
    auto x = test::normal_matrix<float>(1, count, 15);
    const auto clean = decoded(qd::quantize<TestType, PlainScales>(std::as_const(x).view()));
    for (const Index at : {Index{64}, Index{127}, count - 1}) {
      const float finite = std::exchange(x(0, at), nan_value);
      const auto values =
          decoded(qd::quantize<TestType, PlainScales>(std::as_const(x).view(), {.non_finite = qd::NonFinite::propagate}));
      for (Index i = 0; i < count; ++i) {
        if (i / 64 == at / 64) REQUIRE(std::isnan(values(0, i)));
        else REQUIRE(values(0, i) == clean(0, i));
      }
      x(0, at) = finite;
    }
  }
}

TEST_CASE("under propagate an infinity makes its block's absmax infinite and leaves the others") {
  auto x = test::normal_matrix<float>(1, 192, 16);
  x(0, 70) = -infinity;
  const auto tensor = qd::quantize<qd::NF4, PlainScales>(std::as_const(x).view(), {.non_finite = qd::NonFinite::propagate});
  CHECK(tensor.scales().absmax[1] == infinity);
  const auto values = decoded(tensor);
  for (Index i = 0; i < 192; ++i) CHECK(std::isfinite(values(0, i)) == (i / 64 != 1));
}

TEST_CASE("under propagate a NaN is never lost to double quantization") {
  auto x = test::normal_matrix<float>(4, 64, 17);
  x(1, 3) = nan_value;
  const auto values = decoded(qd::quantize(std::as_const(x).view(), {.non_finite = qd::NonFinite::propagate}));
  for (Index j = 0; j < 64; ++j) CHECK(std::isnan(values(1, j)));
}

TEST_CASE("NF4's mean absolute error on N(0, 1) is the published one for each block size") {
  const auto x = test::normal_matrix<float>(1024, 1024, 18);
  const auto error = [&](Index block) {
    return test::distortion(x.view(), decoded(qd::quantize<qd::NF4, PlainScales>(x.view(), {.block_size = block})).view())
        .mean_absolute_error;
  };
  CHECK(error(64) == Approx(0.072798).margin(7 * 0.000074));
  CHECK(error(128) == Approx(0.076831).epsilon(0.008));
  CHECK(error(256) == Approx(0.080337).epsilon(0.01));
  CHECK(error(4096) == Approx(0.092547).epsilon(0.02));
}

TEST_CASE("the error of each format on N(0, 1) is that of the golden table") {
  std::ifstream stream(test::golden("quant_error_normal.json"));
  const qd::Json golden = qd::Json::parse(stream).at("results");
  const auto x = test::normal_matrix<float>(1024, 1024, 19);
  const auto check = [&]<class Format, class Scales>(const char* name, Format, Scales) {
    CAPTURE(name);
    const auto found = test::distortion(x.view(), decoded(qd::quantize<Format, Scales>(x.view())).view());
    CHECK(found.mean_squared_error == Approx(golden.at(name).at("mse").template get<double>()).epsilon(0.015));
    CHECK(found.mean_absolute_error == Approx(golden.at(name).at("mae").template get<double>()).epsilon(0.01));
    CHECK(found.signal_to_noise_db == Approx(golden.at(name).at("sqnr_db").template get<double>()).margin(0.06));
    return found.mean_squared_error;
  };
  const double nf4 = check("NF4", qd::NF4{}, PlainScales{});
  const double nf4_double = check("NF4 + DQ", qd::NF4{}, Dynamic{});
  const double int4 = check("INT4 sym -7..7", qd::INT4{}, PlainScales{});
  const double fp4 = check("FP4 bnb (0,.0625,2,3,4,6,8,12)/12", qd::FP4{}, PlainScales{});
  CHECK(nf4 < nf4_double);
  CHECK(nf4_double < 1.002 * nf4);
  CHECK(nf4_double < int4);
  CHECK(int4 < fp4);
}

TEST_CASE("8-bit weights and 8-bit scales lose what their mantissas are short of") {
  const auto x = test::normal_matrix<float>(512, 512, 20);
  const auto relative = [&]<class Format, class Scales>(Format, Scales) {
    return test::normalised_squared_error(decoded(qd::quantize<Format, Scales>(x.view())).view(), x.view());
  };
  // Rounding to m mantissa bits: a uniform error of half a unit, mean square 2^-2m / 48 of the value's power of two squared, or so.
  CHECK(relative(qd::FP8E4M3{}, PlainScales{}) == Approx(0.0007).epsilon(0.3));
  CHECK(relative(qd::FP8E5M2{}, PlainScales{}) == Approx(0.0028).epsilon(0.3));
  CHECK(relative(qd::NF4{}, Float8{}) == Approx(relative(qd::NF4{}, PlainScales{})).epsilon(0.01));
}

TEST_CASE("bits per weight are those of the formats' arithmetic") {
  const auto bits = [](auto scales, Index block) {
    // 2048 * 2048 weights fill whole blocks and whole second-level blocks, for every block size up to 4096.
    using Scales = decltype(scales);
    const Index size = Index{1} << 22, blocks = size / block;
    typename Scales::template Storage<qd::HostMemory> storage;
    if constexpr (Scales::nested) {
      storage.codes = qd::Buffer<std::uint8_t>(blocks);
      storage.nested_absmax = qd::Buffer<float>(blocks / 256);
    } else {
      storage.absmax = qd::Buffer<float>(blocks);
    }
    return qd::QuantizedTensor<qd::NF4, Scales>(2048, 2048, block, qd::Buffer<std::uint8_t>(size / 2), std::move(storage))
        .bits_per_weight();
  };
  const double offset = 32.0 / (1 << 22);  // one float a tensor
  const double plain[] = {5.0, 4.5, 4.25, 4.125, 4.0625, 4.03125, 4.015625, 4.0078125};
  const double nested[] = {4.25390625,     4.126953125,     4.0634765625,     4.03173828125,
                           4.015869140625, 4.0079345703125, 4.00396728515625, 4.001983642578125};
  for (int i = 0; i < 8; ++i) {
    CHECK(bits(PlainScales{}, Index{32} << i) == plain[i]);
    CHECK(bits(Dynamic{}, Index{32} << i) == Approx(nested[i] + offset).epsilon(1e-12));
  }
  CHECK(qd::quantize(test::normal_matrix<float>(1, 64, 1).view()).bits_per_weight() == 5.125);
  CHECK(qd::quantize(test::normal_matrix<float>(1, 4096, 1).view()).bits_per_weight() == 4.140625);
  CHECK(qd::quantize<qd::FP8E4M3, PlainScales>(test::normal_matrix<float>(1, 4096, 1).view()).bits_per_weight() == 8.5);
  CHECK(qd::NF4Tensor().bits_per_weight() == 0.0);
}

}  // namespace quantize_test
