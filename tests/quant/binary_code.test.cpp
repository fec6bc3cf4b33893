// Binary codes: decoding against the definition, what they cost, and how good the quantizer's are.
#include <algorithm>
#include <array>
#include <cmath>
#include <limits>
#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/quant/binary_quantize.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/random_data.hpp"

namespace binary_code_test {

namespace qd = qdylora;
using BinaryCodedTensor = qd::BinaryCodedTensor<>;
using qd::BinaryCodeOptions;
using qd::BinaryCodeShape;
using qd::Errc;
using qd::Index;

namespace {

// b_{k+1}[i, j], by the words of the header.
double sign(const BinaryCodedTensor& t, Index k, Index i, Index j) {
  const Index row_bytes = (t.cols() + 7) / 8;
  return (t.bits().data()[(k * t.rows() + i) * row_bytes + j / 8] >> (j % 8) & 1) != 0 ? 1.0 : -1.0;
}
double scale(const BinaryCodedTensor& t, Index k, Index i, Index j) {
  const Index size = t.shape().group_size == 0 ? t.cols() : t.shape().group_size;
  return static_cast<double>(t.scales()(k * t.rows() + i, j / size));
}
double value(const BinaryCodedTensor& t, Index i, Index j, Index planes) {
  double sum = 0.0;
  for (Index k = 0; k < planes; ++k) sum += scale(t, k, i, j) * sign(t, k, i, j);
  return sum;
}
// sum of squares over columns [begin, end) of row i, of the weight less its code whose scales are `scales` there
template <class Scales>
double error(const BinaryCodedTensor& t, qd::MatrixView<const float> w, Index i, Index begin, Index end, Scales&& scales) {
  double sum = 0.0;
  for (Index j = begin; j < end; ++j) {
    double rest = static_cast<double>(w(i, j));
    for (Index k = 0; k < t.planes(); ++k) rest -= scales(k) * sign(t, k, i, j);
    sum += rest * rest;
  }
  return sum;
}
// of each group
std::vector<double> errors(const BinaryCodedTensor& t, qd::MatrixView<const float> w) {
  std::vector<double> result;
  for (Index i = 0; i < t.rows(); ++i)
    t.shape().for_each_group(0, t.cols(), [&](Index, Index first, Index count) {
      result.push_back(error(t, w, i, first, first + count, [&](Index k) { return scale(t, k, i, first); }));
    });
  return result;
}
double total(const std::vector<double>& values) {
  double sum = 0.0;
  for (const double v : values) sum += v;
  return sum;
}

// Weights of different kinds, one a row: normal, heavy-tailed, of few values, with zeros.
const qd::Matrix<float> mixed_weight(Index rows, Index cols) {
  qd::Matrix<float> w(rows, cols);
  qd::Rng rng(5);
  for (Index i = 0; i < rows; ++i)
    for (Index j = 0; j < cols; ++j) {
      const float n = rng.normal();
      w(i, j) = i % 4 == 0 ? n : i % 4 == 1 ? n * n * n : i % 4 == 2 ? std::round(n) : (j % 3 == 0 ? n : 0.0f);
    }
  return w;
}

}  // namespace

TEST_CASE("binary codes decode to the sum of their planes, for any shape and number of planes") {
  const Index cols = GENERATE(1, 7, 8, 64, 101);
  const Index group_size = GENERATE(0, 8, 24, 128);
  for (Index planes = 1; planes <= 8; ++planes) {
    CAPTURE(cols, group_size, planes);
    const auto w = test::normal_matrix<float>(5, cols, 3);
    const auto t = qd::binary_quantize(w.view(), {.planes = planes, .group_size = group_size, .iterations = 2});
    for (Index first = 1; first <= planes; ++first) {
      qd::Matrix<double> wide(5, cols);
      qd::Matrix<float> narrow(5, cols);
      decode(t, wide.view(), first);
      decode(t, narrow.view(), first);
      bool good = true;
      for (Index i = 0; i < 5; ++i)
        for (Index j = 0; j < cols; ++j) {
          const double expected = value(t, i, j, first);
          good = good && wide(i, j) == expected && std::fabs(static_cast<double>(narrow(i, j)) - expected) < 1e-5;
        }
      CHECK(good);
    }
  }
}

TEST_CASE("a binary code costs the bits that its shape says, exactly") {
  const auto bits = [](Index rows, Index cols, Index planes, Index group_size) {
    const auto t = qd::binary_quantize(test::normal_matrix<float>(rows, cols, 1).view(),
                                       {.planes = planes, .group_size = group_size, .iterations = 0});
    CHECK(t.bits_per_weight() == 8.0 * static_cast<double>(t.bits().bytes() + static_cast<std::size_t>(t.scales().size()) * 4) /
                                     static_cast<double>(rows * cols));
    return t.bits_per_weight();
  };
  CHECK(bits(4, 128, 3, 64) == 3 * (1 + 32.0 / 64));
  CHECK(bits(4, 128, 4, 0) == 4 * (1 + 32.0 / 128));
  CHECK(bits(2, 128, 1, 8) == 1 + 32.0 / 8);
  CHECK(bits(3, 10, 2, 8) == 2 * (16 + 2 * 32) / 10.0);  // two bytes and two groups a row
  CHECK(BinaryCodedTensor().bits_per_weight() == 0.0);
}

TEST_CASE("one plane is the sign and the mean magnitude, whatever the iterations") {
  const Index iterations = GENERATE(0, 1, 20);
  const auto w = mixed_weight(8, 40);
  const auto t = qd::binary_quantize(w.view(), {.planes = 1, .group_size = 16, .iterations = iterations});
  for (Index i = 0; i < 8; ++i)
    for (Index j = 0; j < 40; ++j) {
      const Index first = j / 16 * 16, last = std::min<Index>(40, first + 16);
      double sum = 0.0;
      for (Index l = first; l < last; ++l) sum += std::fabs(static_cast<double>(w(i, l)));
      REQUIRE(t.scales()(i, j / 16) == static_cast<float>(sum / static_cast<double>(last - first)));
      REQUIRE(sign(t, 0, i, j) == (w(i, j) < 0.0f ? -1.0 : 1.0));
    }
}

TEST_CASE("the error of every group falls or stays with each iteration, from the greedy code's on") {
  const Index planes = GENERATE(1, 2, 3, 4, 8);
  const Index group_size = GENERATE(0, 16);
  const auto w = mixed_weight(12, 72);
  std::vector<double> last;
  for (const Index iterations : {0, 1, 2, 3, 5, 8, 40}) {
    CAPTURE(planes, group_size, iterations);
    const auto now = errors(qd::binary_quantize(w.view(), {.planes = planes, .group_size = group_size, .iterations = iterations}), w);
    if (!last.empty()) {
      bool falls = true;
      for (std::size_t g = 0; g < now.size(); ++g) falls = falls && now[g] <= last[g] * (1 + 1e-12);  // two ways to add up
      CHECK(falls);
      if (iterations == 1 && planes > 1) CHECK(total(now) < 0.95 * total(last));
    }
    last = now;
  }
}

TEST_CASE("an iteration takes the nearest codes and then leaves what no scales can fit") {
  // Few weights with many planes: some planes depend on others, some scales come out negative.
  const Index planes = GENERATE(2, 3, 5);
  constexpr Index size = 8;
  const auto w = mixed_weight(40, 64);
  const BinaryCodeOptions greedy{.planes = planes, .group_size = size, .iterations = 0};
  const auto before = qd::binary_quantize(w.view(), greedy);
  const auto after = qd::binary_quantize(w.view(), {.planes = planes, .group_size = size, .iterations = 1});
  const auto errors_before = errors(before, w), errors_after = errors(after, w);
  std::size_t group = 0, better = 0;
  for (Index i = 0; i < 40; ++i)
    for (Index first = 0; first < 64; first += size, ++group) {
      std::array<std::array<double, size>, 5> basis{};  // the planes, then orthogonal
      std::array<double, size> rest{};
      for (Index j = 0; j < size; ++j) {
        const auto at = static_cast<std::size_t>(j);
        rest[at] = static_cast<double>(w(i, first + j));
        double nearest = std::numeric_limits<double>::infinity();
        for (unsigned code = 0; code < 1u << planes; ++code) {
          double level = 0.0;
          for (Index k = 0; k < planes; ++k) level += (code >> k & 1u) != 0 ? scale(before, k, i, first) : -scale(before, k, i, first);
          if (const double distance = std::fabs(rest[at] - level); distance < nearest - 1e-12) {
            nearest = distance;
            for (Index k = 0; k < planes; ++k) basis[static_cast<std::size_t>(k)][at] = (code >> k & 1u) != 0 ? 1.0 : -1.0;
          }
        }
      }
      const auto dot = [](const auto& a, const auto& b) { return std::inner_product(a.begin(), a.end(), b.begin(), 0.0); };
      const auto remove = [&](auto& from, const auto& b) {
        const double share = dot(from, b) / dot(b, b);
        for (std::size_t j = 0; j < size; ++j) from[j] -= share * b[j];
      };
      for (std::size_t k = 0; k < static_cast<std::size_t>(planes); ++k) {
        for (std::size_t l = 0; l < k; ++l)
          if (dot(basis[l], basis[l]) > 1e-9) remove(basis[k], basis[l]);
        if (dot(basis[k], basis[k]) > 1e-9) remove(rest, basis[k]);
      }
      const double expected = std::min(dot(rest, rest), errors_before[group]);
      better += expected < 0.99 * errors_before[group];
      CAPTURE(planes, i, first, errors_before[group], errors_after[group], expected);
      CHECK(std::fabs(errors_after[group] - expected) < 1e-6 * (1e-3 + expected));
    }
  CHECK(better > group / 2);
}

TEST_CASE("the scales are the best for their codes, and the codes the nearest for their scales") {
  const Index planes = GENERATE(2, 3, 4);
  const auto w = test::normal_matrix<float>(6, 96, 2);
  const auto t = qd::binary_quantize(w.view(), {.planes = planes, .group_size = 32, .iterations = 200});
  for (Index i = 0; i < 6; ++i)
    t.shape().for_each_group(0, 96, [&](Index, Index first, Index count) {
      const Index end = first + count;
      const double best = error(t, w, i, first, end, [&](Index k) { return scale(t, k, i, first); });
      for (Index moved = 0; moved < planes; ++moved)
        for (const double step : {-1e-3, 1e-3}) {
          const auto perturbed = [&](Index k) { return scale(t, k, i, first) + (k == moved ? step : 0.0); };
          // exactly count * step^2 more where the derivative is zero
          CHECK(std::fabs(error(t, w, i, first, end, perturbed) - best - static_cast<double>(count) * step * step) < 1e-7);
        }
      for (Index j = first; j < end; ++j) {
        const double weight = static_cast<double>(w(i, j)), found = std::fabs(weight - value(t, i, j, planes));
        for (unsigned code = 0; code < 1u << planes; ++code) {
          double level = 0.0;
          for (Index k = 0; k < planes; ++k) level += (code >> k & 1u) != 0 ? scale(t, k, i, j) : -scale(t, k, i, j);
          CHECK(found <= std::fabs(weight - level) + 1e-12);
        }
      }
    });
}

TEST_CASE("codes of normal weights come near the best that so many levels can do") {
  // Mean squared errors of the best 2, 4, 8 and 16 levels for N(0, 1) (Max 1960). Signs with scales make any 2 or 4 symmetric levels, but
  // not any 8 or 16.
  const double best[] = {0.3634, 0.1175, 0.03454, 0.009497}, worst_excess[] = {1.03, 1.03, 1.12, 1.3};
  const auto w = test::normal_matrix<float>(16, 4096, 6);
  for (Index planes = 1; planes <= 4; ++planes) {
    qd::Matrix<float> decoded(16, 4096);
    decode(qd::binary_quantize(w.view(), {.planes = planes}), decoded.view());
    const double excess = test::normalised_squared_error(decoded.view(), w.view()) / best[planes - 1];
    CAPTURE(planes, excess);
    CHECK(excess > 0.97);
    CHECK(excess < worst_excess[planes - 1]);
  }
}

TEST_CASE("weights that are levels of a code are coded without error") {
  qd::Matrix<float> w(3, 64);
  qd::Rng rng(1);
  for (float& x : w.span()) x = 0.5f * (rng.below(2) != 0 ? 1.0f : -1.0f) + 0.125f * (rng.below(2) != 0 ? 1.0f : -1.0f);
  for (const Index planes : {2, 3, 8}) {
    qd::Matrix<double> decoded(3, 64);
    decode(qd::binary_quantize(w.view(), {.planes = planes}), decoded.view());
    for (Index i = 0; i < w.size(); ++i) REQUIRE(std::fabs(decoded.data()[i] - static_cast<double>(w.data()[i])) < 1e-7);
  }
  const qd::Matrix<float> zeros(2, 20);
  const auto t = qd::binary_quantize(zeros.view(), {.planes = 3});
  CHECK(test::same_bits(t.scales(), qd::Matrix<float>(6, 1).view()));
}

TEST_CASE("the first planes of a greedy code are the code of so many planes, bit for bit") {
  const auto w = mixed_weight(8, 56);
  const auto all = qd::binary_quantize(w.view(), {.planes = 6, .group_size = 24, .iterations = 0});
  for (Index planes = 1; planes < 6; ++planes) {
    const auto some = qd::binary_quantize(w.view(), {.planes = planes, .group_size = 24, .iterations = 0});
    CHECK(std::equal(some.bits().span().begin(), some.bits().span().end(), all.bits().data()));
    CHECK(test::same_bits(some.scales(), all.scales().top_rows(planes * 8)));
  }
}

TEST_CASE("planes of a refined code are ordered by scale, and each one more makes the weight better") {
  const auto w = test::normal_matrix<float>(16, 128, 9);
  const auto t = qd::binary_quantize(w.view(), {.planes = 5, .group_size = 64});
  for (Index k = 0; k < 5; ++k)
    for (Index i = 0; i < 16; ++i)
      for (Index g = 0; g < 2; ++g) {
        REQUIRE(t.scales()(k * 16 + i, g) >= 0.0f);
        if (k > 0) REQUIRE(t.scales()(k * 16 + i, g) <= t.scales()((k - 1) * 16 + i, g));
      }
  double last = std::numeric_limits<double>::infinity();
  for (Index planes = 1; planes <= 5; ++planes) {
    qd::Matrix<float> decoded(16, 128);
    decode(t, decoded.view(), planes);
    const double now = test::normalised_squared_error(decoded.view(), w.view());
    CAPTURE(planes, now, last);
    CHECK(now < 0.6 * last);
    last = now;
  }
}

TEST_CASE("codes are the same for any number of threads and any type that holds the weights") {
  const auto w = test::normal_matrix<qd::bfloat16>(37, 50, 4);
  const BinaryCodeOptions options{.planes = 3, .group_size = 16};
  const auto one = qd::binary_quantize(w.view(), options);
  const auto same = [&](const BinaryCodedTensor& other) {
    return std::equal(one.bits().span().begin(), one.bits().span().end(), other.bits().data()) &&
           test::same_bits(one.scales(), other.scales());
  };
  for (const int threads : {2, 5}) {
    const qd::Cpu cpu(threads);
    CHECK(same(qd::binary_quantize(w.view(), options, [&](Index count, auto&& f) { cpu.parallel_for(count, f); })));
  }
  CHECK(same(qd::binary_quantize(test::converted<double>(w.view()).view(), options)));
  qd::Matrix<float> strided(37, 60);
  qd::copy<float>(test::converted<float>(w.view()), strided.view().left_cols(50));
  CHECK(same(qd::binary_quantize(strided.view().left_cols(50), options)));
}

TEST_CASE("what binary codes cannot be made of is refused by name") {
  const auto w = test::normal_matrix<float>(3, 16, 1);
  const auto code = [&](BinaryCodeOptions options) { return test::code_of([&] { qd::binary_quantize(w.view(), options); }); };
  CHECK(code({.planes = 0}) == Errc::bad_argument);
  CHECK(code({.planes = 9}) == Errc::bad_argument);
  CHECK(code({.group_size = 12}) == Errc::block_size);
  CHECK(code({.group_size = -8}) == Errc::block_size);
  CHECK(code({.iterations = -1}) == Errc::bad_argument);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), -std::numeric_limits<float>::infinity()}) {
    auto broken = qd::clone(w.view());
    broken(2, 5) = bad;
    const auto error = test::error_of([&] { qd::binary_quantize(broken.view()); });
    REQUIRE(error);
    CHECK(error->code() == Errc::non_finite);
    CHECK(std::string(error->what()).find("[2, 5]") != std::string::npos);
  }

  const BinaryCodeShape shape{3, 16, 2, 8};
  const auto make = [&](Index bytes, Index rows, Index groups) {
    return test::code_of([&] { BinaryCodedTensor(shape, qd::Buffer<std::uint8_t>(bytes), qd::Matrix<float>(rows, groups)); });
  };
  CHECK_FALSE(make(12, 6, 2));
  CHECK(make(11, 6, 2) == Errc::shape_mismatch);
  CHECK(make(12, 3, 2) == Errc::shape_mismatch);
  CHECK(make(12, 6, 1) == Errc::shape_mismatch);
  CHECK(test::code_of([] { expect_valid(BinaryCodeShape{Index{1} << 40, Index{1} << 40, 1, 0}); }) == Errc::bad_argument);
  CHECK(test::code_of([] { expect_valid(BinaryCodeShape{-1, 4, 1, 0}); }) == Errc::bad_argument);

  const auto t = qd::binary_quantize(w.view(), {.planes = 2});
  qd::Matrix<float> out(3, 16), small(3, 15);
  CHECK(test::code_of([&] { decode(t, out.view(), 3); }) == Errc::bad_argument);
  CHECK(test::code_of([&] { decode(t, out.view(), 0); }) == Errc::bad_argument);
  CHECK(test::code_of([&] { decode(t, small.view()); }) == Errc::shape_mismatch);
}

TEST_CASE("a weight that comes a few rows at a time has the code of the whole") {
  const auto w = test::normal_matrix<float>(11, 21, 5, 0.3);
  const qd::BinaryCodeOptions options{.planes = 3, .group_size = 8};
  const auto whole = qd::binary_quantize(w.view(), options);
  qd::BinaryQuantizer quantizer(11, 21, options);
  Index first = 0;
  for (const Index rows : {Index{4}, Index{0}, Index{1}, Index{6}}) {
    quantizer.append(w.view().middle_rows(first, rows));
    first += rows;
  }
  CHECK(test::code_of([&] { quantizer.append(w.view().top_rows(1)); }) == Errc::shape_mismatch);
  const auto parts = std::move(quantizer).finish();
  CHECK(parts.shape() == whole.shape());
  CHECK(std::equal(parts.bits().span().begin(), parts.bits().span().end(), whole.bits().span().begin(), whole.bits().span().end()));
  CHECK(test::same_bits(parts.scales(), whole.scales()));

  qd::BinaryQuantizer unfinished(11, 21, options);
  CHECK(test::code_of([&] { unfinished.append(test::normal_matrix<float>(2, 20, 1).view()); }) == Errc::shape_mismatch);
  unfinished.append(w.view().top_rows(10));
  qd::Matrix<float> bad(1, 21);
  bad(0, 3) = std::numeric_limits<float>::quiet_NaN();
  const auto error = test::error_of([&] { unfinished.append(bad.view()); });
  REQUIRE(error);
  CHECK(std::string(error->what()).find("[10, 3]") != std::string::npos);
  CHECK(test::code_of([&] { std::move(unfinished).finish(); }) == Errc::state_order);
}

TEST_CASE("empty weights have empty codes") {
  for (const auto& [rows, cols] : {std::pair<Index, Index>{0, 5}, {5, 0}, {0, 0}}) {
    const qd::Matrix<float> w(rows, cols);
    const auto t = qd::binary_quantize(w.view(), {.planes = 2});
    CHECK(t.bytes() == 0);
    qd::Matrix<float> out(rows, cols);
    decode(t, out.view());
  }
}

}  // namespace binary_code_test
