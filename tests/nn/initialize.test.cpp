// Adapters that begin with singular triplets: against the plain decomposition of Eigen in double, and what their prefixes are worth.
#include <qdylora/nn/initialize.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/io/safetensors.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"
#include "support/random_data.hpp"

namespace initialize_test {

namespace qd = qdylora;
using qd::AdapterInit;
using qd::Errc;
using qd::Index;
using test::code_of;
using Dense = Eigen::MatrixXd;
using Base = qd::WeightFor<qd::NF4>;

namespace {

Dense dense(qd::MatrixView<const float> view) { return qd::as_eigen(view).cast<double>(); }

// sum_{i < b} B_i^T A_i
Dense product(const qd::LowRank<float>& adapter, Index b) {
  return dense(adapter.b.view()).topRows(b).transpose() * dense(adapter.a.view()).topRows(b);
}

Dense decoded(const Base& base) {
  qd::Matrix<float> matrix(base.rows(), base.cols());
  base.visit([&](const auto& view) { qd::dequantize(view, matrix.view()); });
  return dense(matrix.view());
}

std::shared_ptr<const Base> quantize(qd::MatrixView<const float> w) {
  return std::make_shared<const Base>(qd::quantize<qd::NF4, qd::DoubleQuant<>>(w));
}
std::shared_ptr<const Base> quantize(const Dense& w) {
  const qd::EigenMatrix<float> rounded = w.cast<float>();
  return quantize(qd::as_view(rounded));
}

// A weight as trained ones are: a spectrum that falls like a power on top of noise.
const qd::Matrix<float> trained_like(Index out, Index in, std::uint64_t seed) {
  const auto left = test::normal_matrix<float>(40, out, seed, 0.1), right = test::normal_matrix<float>(40, in, seed + 1, 0.1);
  auto w = qd::clone(test::normal_matrix<float>(out, in, seed + 2, 0.02).view());
  for (Index i = 0; i < 40; ++i)
    for (Index o = 0; o < out; ++o)
      for (Index k = 0; k < in; ++k) w(o, k) += left(i, o) * right(i, k) / std::sqrt(static_cast<float>(i + 1));
  return w;
}

// |w - base - prefix| at ranks 0 ... r.
std::vector<double> errors(const qd::Matrix<float>& w, const Dense& base, const qd::LowRank<float>& adapter) {
  std::vector<double> all;
  for (Index b = 0; b <= adapter.rank(); ++b) all.push_back((dense(w.view()) - base - product(adapter, b)).norm());
  return all;
}

// The leading triplets by the plain decomposition.
qd::LowRank<float> plain_triplets(const Dense& w, Index rank) {
  const Eigen::BDCSVD<Dense> svd(w, Eigen::ComputeThinU | Eigen::ComputeThinV);
  qd::LowRank<float> result{qd::Matrix<float>(rank, w.cols()), qd::Matrix<float>(rank, w.rows())};
  const Eigen::VectorXd roots = svd.singularValues().head(rank).cwiseSqrt();
  qd::as_eigen(result.a.view()) = (roots.asDiagonal() * svd.matrixV().leftCols(rank).transpose()).cast<float>();
  qd::as_eigen(result.b.view()) = (roots.asDiagonal() * svd.matrixU().leftCols(rank).transpose()).cast<float>();
  return result;
}

void check_falls(const std::vector<double>& error) {
  for (std::size_t b = 1; b < error.size(); ++b) {
    CAPTURE(b);
    CHECK(error[b] < error[b - 1]);
  }
}

void check_as_good(const std::vector<double>& found, const std::vector<double>& reference, double tolerance) {
  REQUIRE(found.size() == reference.size());
  for (std::size_t b = 0; b < found.size(); ++b) {
    CAPTURE(b, found[b], reference[b]);
    CHECK(found[b] <= (1.0 + tolerance) * reference[b]);
  }
}

}  // namespace

TEST_CASE("the leading triplets of a weight are those of the whole decomposition") {
  const qd::Cpu cpu(2);
  for (const auto& [out, in] : {std::pair<Index, Index>{96, 160}, {160, 96}, {64, 64}}) {
    CAPTURE(out, in);
    const auto w = trained_like(out, in, 3);
    const auto found = qd::leading_triplets(w.view(), 32, cpu);
    const auto expected = plain_triplets(dense(w.view()), 32);
    REQUIRE(found.rank() == 32);
    for (const Index i : {0, 1, 4}) {
      // Rows are unique but for their sign where the values are apart.
      const Dense mine = dense(found.b.view()).row(i).transpose() * dense(found.a.view()).row(i);
      const Dense theirs = dense(expected.b.view()).row(i).transpose() * dense(expected.a.view()).row(i);
      CAPTURE(i);
      CHECK((mine - theirs).norm() <= 2e-3 * theirs.norm());
      CHECK(dense(found.a.view()).row(i).norm() == Approx(dense(found.b.view()).row(i).norm()).epsilon(1e-5));
    }
    check_as_good(errors(w, Dense::Zero(out, in), found), errors(w, Dense::Zero(out, in), expected), 5e-4);
  }
}

TEST_CASE("a spectrum without a fall, as that of noise, costs the leading triplets half a percent of the error at most") {
  const qd::Cpu cpu(2);
  const auto noise = test::normal_matrix<float>(200, 300, 5);
  const auto none = Dense::Zero(200, 300);
  check_as_good(errors(noise, none, qd::leading_triplets(noise.view(), 32, cpu)),
                errors(noise, none, plain_triplets(dense(noise.view()), 32)), 5e-3);
}

TEST_CASE("leading triplets stop where a weight has no more, and do not depend on threads") {
  const qd::Cpu cpu(2);
  const auto a = test::normal_matrix<float>(5, 48, 1), b = test::normal_matrix<float>(5, 80, 2);
  qd::Matrix<float> low(80, 48);
  cpu.weight_gradient(b.view(), a.view(), low.view());
  const auto found = qd::leading_triplets(std::as_const(low).view(), 16, cpu);
  CHECK(found.rank() == 5);
  CHECK(errors(low, Dense::Zero(80, 48), found).back() <= 1e-5 * dense(low.view()).norm());
  CHECK(qd::leading_triplets(qd::Matrix<float>(8, 9).view(), 4, cpu).rank() == 0);
  CHECK(qd::leading_triplets(a.view(), 64, cpu).rank() == 5);  // no more than the smaller side

  const auto w = trained_like(130, 200, 4);
  const auto one = qd::leading_triplets(w.view(), 24, qd::Cpu(1)), three = qd::leading_triplets(w.view(), 24, qd::Cpu(3));
  CHECK(test::same_bits(one.a.view(), three.a.view()));
  CHECK(test::same_bits(one.b.view(), three.b.view()));
  CHECK(code_of([&] { qd::leading_triplets(w.view(), 0, cpu); }) == Errc::rank_range);
}

TEST_CASE("PiSSA: the base is the quantized rest, and the error falls with every rank as by the plain decomposition") {
  const qd::Cpu cpu(2);
  const auto w = trained_like(96, 160, 7);
  const auto made = qd::pissa(w.view(), 32, [](auto view) { return quantize(view); }, cpu);
  REQUIRE(made.adapter.rank() == 32);
  const Dense base = decoded(*made.base);
  CHECK((base - decoded(*quantize(dense(w.view()) - product(made.adapter, 32)))).norm() <= 1e-3 * base.norm());
  const auto found = errors(w, base, made.adapter);
  check_falls(found);

  const auto plain = plain_triplets(dense(w.view()), 32);
  check_as_good(found, errors(w, decoded(*quantize(dense(w.view()) - product(plain, 32))), plain), 2e-3);
  // What is quantized is smaller than W: so is its error.
  CHECK(found.back() < (dense(w.view()) - decoded(*quantize(w.view()))).norm());
}

TEST_CASE("LoftQ: with one iteration the base is the plain one, and every rank is nearer to the weight") {
  const qd::Cpu cpu(2);
  const auto w = trained_like(96, 160, 8);
  const auto made = qd::loftq(w.view(), 32, 1, [](auto view) { return quantize(view); }, cpu);
  REQUIRE(made.adapter.rank() == 32);
  const auto plain = quantize(w.view());
  CHECK(std::ranges::equal(std::get<0>(made.base->storage()).codes().span(), std::get<0>(plain->storage()).codes().span()));
  const auto found = errors(w, decoded(*made.base), made.adapter);
  check_falls(found);
  check_as_good(found, errors(w, decoded(*plain), plain_triplets(dense(w.view()) - decoded(*plain), 32)), 1e-3);
}

TEST_CASE("LoftQ: iterations never end with a larger error, and are those of the paper by the plain decomposition") {
  const qd::Cpu cpu(2);
  const auto w = trained_like(96, 160, 9);
  const Dense whole = dense(w.view());
  qd::LowRank<float> reference{qd::Matrix<float>(24, 160), qd::Matrix<float>(24, 96)};
  double least = 1e300, last = 1e300;
  for (Index iterations = 1; iterations <= 5; ++iterations) {
    CAPTURE(iterations);
    const Dense base = decoded(*quantize(whole - product(reference, 24)));
    reference = plain_triplets(whole - base, 24);
    least = std::min(least, errors(w, base, reference).back());
    const auto made = qd::loftq(w.view(), 24, iterations, [](auto view) { return quantize(view); }, cpu);
    const auto found = errors(w, decoded(*made.base), made.adapter);
    check_falls(found);
    CHECK(found.back() <= last);
    CHECK(found.back() == Approx(least).epsilon(5e-3));  // a code that falls the other way changes what follows
    last = found.back();
  }
  const auto first = qd::loftq(w.view(), 24, 1, [](auto view) { return quantize(view); }, cpu);
  CHECK(last < 0.99 * errors(w, decoded(*first.base), first.adapter).back());
  CHECK(code_of([&] { qd::loftq(w.view(), 24, 0, [](auto view) { return quantize(view); }, cpu); }) == Errc::bad_argument);
}

// |(w - base - prefix) D| at ranks 0 ... r.
std::vector<double> weighted_errors(const qd::Matrix<float>& w, const Dense& base, const qd::LowRank<float>& adapter,
                                    const Eigen::VectorXd& d) {
  std::vector<double> all;
  for (Index b = 0; b <= adapter.rank(); ++b) all.push_back(((dense(w.view()) - base - product(adapter, b)) * d.asDiagonal()).norm());
  return all;
}

TEST_CASE("QERA: on the plain base, every prefix is the best of its rank where inputs are weighed by their size") {
  const qd::Cpu cpu(2);
  for (const auto& [out, in] : {std::pair<Index, Index>{96, 160}, {160, 96}}) {
    CAPTURE(out, in);
    const auto w = trained_like(out, in, 11);
    // Some inputs are a hundred times as large as others, as a transformer's are, and some always zero.
    std::vector<float> rms;
    Eigen::VectorXd d(in);
    qd::Rng rng(5);
    for (Index k = 0; k < in; ++k) {
      rms.push_back(k % 17 == 3 ? 0.0f : std::exp(1.2f * rng.normal()));
      d[k] = static_cast<double>(rms.back());
    }
    const auto quantize_plainly = [](auto view) { return quantize(view); };
    const auto made = qd::qera(w.view(), 32, rms, quantize_plainly, cpu);
    REQUIRE(made.adapter.rank() == 32);
    const auto plain = quantize(w.view());
    CHECK(std::ranges::equal(std::get<0>(made.base->storage()).codes().span(), std::get<0>(plain->storage()).codes().span()));
    const Dense base = decoded(*plain);

    const Eigen::BDCSVD<Dense> svd((dense(w.view()) - base) * d.asDiagonal(), Eigen::ComputeThinU | Eigen::ComputeThinV);
    std::vector<double> least;
    for (Index b = 0; b <= 32; ++b) least.push_back(svd.singularValues().tail(svd.singularValues().size() - b).norm());
    const auto found = weighted_errors(w, base, made.adapter, d);
    check_falls(found);
    check_as_good(found, least, 1e-3);
    for (std::size_t b = 0; b < found.size(); ++b) CHECK(found[b] >= (1.0 - 1e-6) * least[b]);
    // LoftQ knows nothing of the inputs.
    const auto loftq = weighted_errors(w, base, qd::loftq(w.view(), 32, 1, quantize_plainly, cpu).adapter, d);
    for (std::size_t b = 1; b < found.size(); ++b) CHECK(found[b] < 0.99 * loftq[b]);

    for (const Index i : {0, 1, 31})
      CHECK(dense(made.adapter.a.view()).row(i).norm() == Approx(dense(made.adapter.b.view()).row(i).norm()).epsilon(1e-5));
    const auto other = qd::qera(w.view(), 32, rms, quantize_plainly, qd::Cpu(3));
    CHECK(test::same_bits(made.adapter.a.view(), other.adapter.a.view()));
    CHECK(test::same_bits(made.adapter.b.view(), other.adapter.b.view()));
  }
}

TEST_CASE("QERA: where all inputs are equally large it is LoftQ's first iteration, whatever their size") {
  const qd::Cpu cpu(2);
  const auto w = trained_like(96, 160, 12);
  const auto quantize_plainly = [](auto view) { return quantize(view); };
  const auto loftq = qd::loftq(w.view(), 24, 1, quantize_plainly, cpu);
  for (const float size : {1.0f, 0.03125f, 1024.0f}) {  // powers of two, so that nothing is rounded
    CAPTURE(size);
    const auto made = qd::qera(w.view(), 24, std::vector<float>(160, size), quantize_plainly, cpu);
    REQUIRE(made.adapter.rank() == 24);
    for (Index b = 1; b <= 24; ++b)
      CHECK((product(made.adapter, b) - product(loftq.adapter, b)).norm() <= 1e-5 * product(loftq.adapter, b).norm());
    CHECK((dense(made.adapter.a.view()) - dense(loftq.adapter.a.view())).norm() <= 1e-5 * dense(loftq.adapter.a.view()).norm());
    CHECK((dense(made.adapter.b.view()) - dense(loftq.adapter.b.view())).norm() <= 1e-5 * dense(loftq.adapter.b.view()).norm());
  }
}

TEST_CASE("QERA: inputs that never come, and what is no root mean square") {
  const qd::Cpu cpu(1);
  const auto w = trained_like(48, 64, 13);
  const auto made = [&](const std::vector<float>& rms, Index rank = 8) {
    return qd::qera(w.view(), rank, rms, [](auto view) { return quantize(view); }, cpu);
  };
  CHECK(made(std::vector<float>(64)).adapter.rank() == 0);
  std::vector<float> few(64);
  few[3] = few[40] = 2.0f;
  const auto two = made(few);
  CHECK(two.adapter.rank() == 2);  // as many as there are inputs
  CHECK(dense(two.adapter.a.view()).allFinite());
  CHECK(code_of([&] { made(std::vector<float>(63, 1.0f)); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { made({}); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { made(std::vector<float>(64, 1.0f), 0); }) == Errc::rank_range);
  for (const float x : {-1.0f, std::nanf(""), std::numeric_limits<float>::infinity()}) {
    std::vector<float> rms(64, 1.0f);
    rms[9] = x;
    CHECK(code_of([&] { made(rms); }) == Errc::bad_argument);
  }
}

TEST_CASE("initial values are PEFT's") {
  const qd::Cpu cpu(2);
  const qd::SafetensorsFile golden(test::golden("initial.safetensors"));
  const auto w = golden.matrix("w");
  const auto relative = [](const Dense& found, const Dense& expected) { return (found - expected).norm() / expected.norm(); };
  const auto theirs = [&](const std::string& tensor) { return dense(golden.matrix(tensor).view()); };

  const auto pissa = qd::pissa(
      std::as_const(w).view(), 6,
      [](qd::MatrixView<const float> rest) {
        return std::make_shared<const qd::WeightFor<qd::Dense<float>>>(qd::clone(rest));  // PEFT does not quantize it
      },
      cpu);
  CHECK(relative(product(pissa.adapter, 6), theirs("pissa.product")) < 1e-3);
  CHECK(relative(dense(pissa.base->get<qd::Matrix<float>>().view()), theirs("pissa.base")) < 1e-3);

  using Float32 = qd::Weight<qd::QuantizedTensor<qd::NF4, qd::Float32Scales>>;
  const auto quantize_plainly = [](qd::MatrixView<const float> rest) {
    return std::make_shared<const Float32>(qd::quantize<qd::NF4, qd::Float32Scales>(rest));
  };
  for (const Index iterations : {1, 5}) {
    CAPTURE(iterations);
    const auto loftq = qd::loftq(std::as_const(w).view(), 6, iterations, quantize_plainly, cpu);
    qd::Matrix<float> base(w.rows(), w.cols());
    loftq.base->visit([&](const auto& view) { qd::dequantize(view, base.view()); });
    const std::string name = "loftq" + std::to_string(iterations);
    const Dense base_of_theirs = theirs(name + ".base"), product_of_theirs = theirs(name + ".product");
    if (iterations == 1) {
      CHECK((dense(base.view()) - base_of_theirs).norm() == 0.0);
      CHECK(relative(product(loftq.adapter, 6), product_of_theirs) < 0.02);
    }
    // Later iterations go other ways once a code falls the other way; what they end with is no worse.
    const Dense whole = dense(w.view());
    CHECK((whole - dense(base.view()) - product(loftq.adapter, 6)).norm() <= 1.01 * (whole - base_of_theirs - product_of_theirs).norm());
  }
}

TEST_CASE("a layer that begins with a product has it at every rank, whatever its alpha") {
  const qd::Cpu cpu(2);
  const auto w = trained_like(96, 160, 10);
  const auto made = qd::loftq(w.view(), 12, 1, [](auto view) { return quantize(view); }, cpu);
  const Dense base = decoded(*made.base);
  for (const auto& [max_rank, alpha] : {std::pair<Index, float>{12, 16.0f}, {16, 3.0f}, {8, 16.0f}}) {
    qd::DynamicLoRALinear<float> layer(made.base, {.max_rank = max_rank, .alpha = alpha}, cpu);
    qd::begin_with(layer.adapter(), made.adapter, cpu);
    for (const Index rank : {Index{0}, Index{1}, Index{5}, max_rank}) {
      CAPTURE(max_rank, rank);
      const Dense expected = base + product(made.adapter, std::min<Index>(rank, 12));
      CHECK((dense(layer.merged_weight(rank).view()) - expected).norm() <= 1e-6 * expected.norm());
    }
  }
  // A is random beyond, so that those rows can learn.
  qd::DynamicLoRALinear<float> layer(made.base, {.max_rank = 16}, cpu);
  qd::begin_with(layer.adapter(), made.adapter, cpu);
  CHECK(dense(layer.adapter().a().value.view()).bottomRows(4).norm() > 0.1);
  CHECK(dense(layer.adapter().b().value.view()).bottomRows(4).norm() == 0.0);

  qd::DynamicLoRALinear<float> other(made.base, {.max_rank = 16, .scale = qd::ScalePolicy::over_rank}, cpu);
  CHECK(code_of([&] { qd::begin_with(other.adapter(), made.adapter, cpu); }) == Errc::unsupported);
  qd::LoRAAdapter<float> narrow(159, 96, {.max_rank = 16});
  CHECK(code_of([&] { qd::begin_with(narrow, made.adapter, cpu); }) == Errc::shape_mismatch);
}

TEST_CASE("initial values have names") {
  for (const std::string text : {"standard", "pissa", "loftq", "loftq:5", "qera"}) CHECK(qd::name(qd::adapter_init(text, 8)) == text);
  CHECK(qd::adapter_init("pissa", 8) == AdapterInit{AdapterInit::Kind::pissa, 8, 1});
  CHECK(qd::adapter_init("loftq:1", 8) == qd::adapter_init("loftq", 8));
  CHECK_FALSE(qd::adapter_init("standard", 8).changes_base());
  CHECK_FALSE(qd::adapter_init("loftq", 8).changes_base());
  CHECK(qd::adapter_init("loftq:2", 8).changes_base());
  CHECK(qd::adapter_init("pissa", 8).changes_base());
  CHECK_FALSE(qd::adapter_init("qera", 8).changes_base());
  CHECK(qd::adapter_init("qera", 8).calibrated());
  CHECK_FALSE(qd::adapter_init("loftq", 8).calibrated());
  for (const std::string text : {"", "loftq:", "loftq:0", "loftq:101", "loftq:2x", "pissa:2", "qera:2", "eva"}) {
    CAPTURE(text);
    CHECK(code_of([&] { qd::adapter_init(text, 8); }) == Errc::bad_argument);
  }
}

TEST_CASE("an adapter that began with a weight's own product becomes an update of the weight itself, at every rank and with gates") {
  using Layer = qd::DynamicLoRALinear<float, qd::Cpu, qd::Dense<float>>;
  using Whole = qd::WeightFor<qd::Dense<float>>;
  const qd::Cpu cpu(1);
  const auto as_base = [](qd::MatrixView<const float> w) { return std::make_shared<const Whole>(qd::Matrix<float>(qd::clone(w))); };
  const auto w = trained_like(48, 40, 3);
  const auto made = qd::pissa(w.view(), 4, as_base, cpu);
  REQUIRE(made.adapter.rank() == 4);
  Layer run(made.base, {.max_rank = 6, .alpha = 3, .name = "up", .gated_ranks = {2, 6}}, cpu);
  qd::begin_with(run.adapter(), made.adapter, cpu);
  for (const auto& p : {run.parameters()[0], run.parameters()[1], run.adapter().gate_parameters()[0]})  // trains
    cpu.add(test::normal_matrix<float>(p->value.rows(), p->value.cols(), 9, 0.3).view(), p->value.view());
  run.set_training(false);
  for (const Index rank : {0, 1, 2, 5, 6}) {
    CAPTURE(rank);
    const auto update = qd::update_of_weight(std::as_const(run).adapter(), rank, made.adapter);
    REQUIRE(update.max_rank() == rank + 4);
    CHECK(update.scale(rank + 4) == 1.0f);
    Layer plain(as_base(w.view()), update.options(), cpu);
    qd::assign(plain.adapter(), update, cpu);
    CHECK(test::largest_difference(plain.merged_weight(rank + 4).view(), run.merged_weight(rank).view()) < 2e-6);
    CHECK(test::largest_difference(w.view(), run.merged_weight(rank).view()) > 0.05);
  }
  const auto& adapter = std::as_const(run).adapter();
  CHECK(qd::update_of_weight(adapter, 3, {}).max_rank() == 3);
  CHECK(code_of([&] { qd::update_of_weight(adapter, 7, made.adapter); }) == Errc::rank_range);
  CHECK(code_of([&] { qd::update_of_weight(adapter, 0, {}); }) == Errc::bad_argument);
  const qd::LowRank<float> turned{qd::clone(made.adapter.b.view()), qd::clone(made.adapter.a.view())};
  CHECK(code_of([&] { qd::update_of_weight(adapter, 2, turned); }) == Errc::shape_mismatch);
  CHECK(code_of([&] { qd::update_of_weight(qd::LoRAAdapter<float>(40, 48, {.dora = true}), 2, made.adapter); }) == Errc::unsupported);
}

}  // namespace initialize_test
