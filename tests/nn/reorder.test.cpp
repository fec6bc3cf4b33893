// Re-ordering keeps the product and puts what matters first, by the product's own norm (svd) or by what passes through it (gram).
#include <qdylora/nn/reorder.hpp>

#include <algorithm>
#include <cmath>
#include <limits>
#include <string>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/random_data.hpp"

namespace reorder_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using qd::Reordering;
using Dense = Eigen::MatrixXd;

namespace {

template <class S>
Dense dense(const qd::Matrix<S>& matrix) {
  return qd::as_eigen(matrix.view()).template cast<double>();
}

// B^T A over the first `rank` rows: [out, in].
template <class S>
Dense product(const qd::LoRAAdapter<S>& adapter, Index rank) {
  return dense(adapter.b().value).topRows(rank).transpose() * dense(adapter.a().value).topRows(rank);
}

template <class S>
void fill(qd::LoRAAdapter<S>& adapter, std::uint64_t seed) {
  qd::Rng rng(seed);
  test::fill_normal(adapter.a().value.view(), rng);
  test::fill_normal(adapter.b().value.view(), rng, 0.3);
}

// Moments as the layer would gather them from `tokens` random x and dy with features of very different size.
template <class S>
void gather_moments(qd::LoRAAdapter<S>& adapter, Index tokens, std::uint64_t seed) {
  Dense x = dense(test::normal_matrix<double>(tokens, adapter.in(), seed));
  Dense dy = dense(test::normal_matrix<double>(tokens, adapter.out(), seed + 1));
  for (Index j = 0; j < x.cols(); ++j) x.col(j) *= std::pow(0.8, static_cast<double>(j));
  for (Index j = 0; j < dy.cols(); ++j) dy.col(j) *= std::pow(0.85, static_cast<double>(dy.cols() - j));
  const Dense z = x * dense(adapter.a().value).transpose(), dz = dy * dense(adapter.b().value).transpose();
  adapter.start_collecting();
  qd::as_eigen(adapter.moment_a.view()) = (z.transpose() * z).template cast<S>();
  qd::as_eigen(adapter.moment_b.view()) = (dz.transpose() * dz).template cast<S>();
}

double relative(const Dense& found, const Dense& expected) { return (found - expected).norm() / expected.norm(); }

struct Shape {
  Index in, out, rank;
};

}  // namespace

TEST_CASE("re-ordering leaves the product as it was") {
  const auto [in, out, rank] = GENERATE(Shape{40, 24, 8}, Shape{24, 40, 8}, Shape{5, 40, 8}, Shape{40, 5, 8}, Shape{3, 2, 8},
                                        Shape{8, 8, 8}, Shape{1, 1, 4}, Shape{30, 20, 1}, Shape{96, 64, 64});
  const auto kind = GENERATE(Reordering::svd, Reordering::gram);
  CAPTURE(in, out, rank, kind == Reordering::gram);
  qd::LoRAAdapter<float> adapter(in, out, {.max_rank = rank});
  fill(adapter, 3);
  if (kind == Reordering::gram) gather_moments(adapter, 500, 5);
  const Dense before = product(adapter, rank);
  const auto values = qd::reorder(adapter, kind);
  CHECK(relative(product(adapter, rank), before) < 1e-6);
  CHECK(std::is_sorted(values.rbegin(), values.rend()));

  qd::LoRAAdapter<double> exact(in, out, {.max_rank = rank});
  fill(exact, 3);
  if (kind == Reordering::gram) gather_moments(exact, 500, 5);
  const Dense before_exact = product(exact, rank);
  qd::reorder(exact, kind);
  // gram inverts moments, floored at 1e-9 of their largest eigenvalue
  CHECK(relative(product(exact, rank), before_exact) < (kind == Reordering::svd ? 1e-12 : 1e-7));
}

TEST_CASE("a layer's output at full rank does not change by re-ordering") {
  qd::DynamicLoRALinear<float> layer(test::normal_matrix<float>(64, 96, 1, 0.1), {.max_rank = 16, .alpha = 16.0f});
  fill(layer.adapter(), 2);
  layer.adapter().start_collecting();
  const auto x = test::normal_matrix<float>(50, 96, 3), dy = test::normal_matrix<float>(50, 64, 4);
  const auto before = qd::clone(layer.forward(x));
  layer.backward(dy.view());
  for (const auto kind : {Reordering::gram, Reordering::svd}) {
    qd::reorder(layer.adapter(), kind);
    CHECK(test::normalised_squared_error(layer.forward(x), before.view()) < 1e-12);
  }
}

TEST_CASE("after svd every prefix is the best approximation of its rank") {
  const auto [in, out, rank] = GENERATE(Shape{40, 24, 8}, Shape{5, 40, 8}, Shape{40, 5, 8}, Shape{20, 20, 12});
  CAPTURE(in, out, rank);
  qd::LoRAAdapter<double> adapter(in, out, {.max_rank = rank});
  fill(adapter, 3);
  const Dense full = product(adapter, rank);
  const Eigen::JacobiSVD<Dense> svd(full, Eigen::ComputeThinU | Eigen::ComputeThinV);
  const auto values = qd::reorder(adapter, Reordering::svd);
  const Index numerical = std::min({in, out, rank});
  REQUIRE(static_cast<Index>(values.size()) >= numerical);
  for (Index i = 0; i < numerical; ++i)
    CHECK(values[static_cast<std::size_t>(i)] == Approx(svd.singularValues()[i]).epsilon(1e-10));
  for (Index b = 1; b <= numerical; ++b) {
    const Dense best =
        svd.matrixU().leftCols(b) * svd.singularValues().head(b).asDiagonal() * svd.matrixV().leftCols(b).transpose();
    CHECK((product(adapter, b) - best).norm() < 1e-10 * full.norm());
  }
}

TEST_CASE("rows are balanced: A's and B's carry the same norm") {
  const auto kind = GENERATE(Reordering::svd, Reordering::gram);
  qd::LoRAAdapter<double> adapter(30, 20, {.max_rank = 6});
  fill(adapter, 3);
  gather_moments(adapter, 500, 5);
  qd::reorder(adapter, kind);
  for (Index i = 0; i < 6; ++i)
    CHECK(dense(adapter.a().value).row(i).norm() == Approx(dense(adapter.b().value).row(i).norm()).epsilon(1e-12));
}

TEST_CASE("svd a second time changes nothing but signs") {
  qd::LoRAAdapter<double> adapter(30, 20, {.max_rank = 6});
  fill(adapter, 3);
  const auto first = qd::reorder(adapter);
  const Dense a = dense(adapter.a().value), b = dense(adapter.b().value);
  const auto second = qd::reorder(adapter);
  for (std::size_t i = 0; i < first.size(); ++i) CHECK(second[i] == Approx(first[i]).epsilon(1e-10));
  CHECK((dense(adapter.a().value).cwiseAbs() - a.cwiseAbs()).norm() < 1e-9);
  CHECK((dense(adapter.b().value).cwiseAbs() - b.cwiseAbs()).norm() < 1e-9);
}

TEST_CASE("a product of less than full rank keeps its rank; what is beyond it can learn again") {
  const auto kind = GENERATE(Reordering::svd, Reordering::gram);
  CAPTURE(kind == Reordering::gram);
  constexpr Index rank = 8, true_rank = 3;
  qd::LoRAAdapter<float> adapter(40, 24, {.max_rank = rank});
  fill(adapter, 3);
  for (Index i = true_rank; i < rank; ++i)
    for (Index j = 0; j < 24; ++j) adapter.b().value(i, j) = adapter.b().value(i % true_rank, j);  // B has three different rows
  if (kind == Reordering::gram) gather_moments(adapter, 500, 5);
  const Dense before = product(adapter, rank);
  qd::reorder(adapter, kind);
  CHECK(relative(product(adapter, rank), before) < 1e-5);
  CHECK(relative(product(adapter, true_rank), before) < 1e-4);
  for (Index i = 0; i < rank; ++i) CHECK(dense(adapter.a().value).row(i).norm() > 1e-6);  // no dead row
  CHECK(dense(adapter.a().value).allFinite());
  CHECK(dense(adapter.b().value).allFinite());
}

TEST_CASE("exact zero rows of B and A are no obstacle") {
  for (const auto kind : {Reordering::svd, Reordering::gram}) {
    CAPTURE(kind == Reordering::gram);
    qd::LoRAAdapter<double> adapter(20, 16, {.max_rank = 6});
    fill(adapter, 3);
    for (Index j = 0; j < 16; ++j) adapter.b().value(1, j) = 0.0;
    for (Index j = 0; j < 20; ++j) adapter.a().value(4, j) = 0.0;
    gather_moments(adapter, 300, 5);
    const Dense before = product(adapter, 6);
    qd::reorder(adapter, kind);
    CHECK(relative(product(adapter, 6), before) < 1e-10);
    CHECK(relative(product(adapter, 4), before) < 1e-6);  // four rows carry it all
  }
}

TEST_CASE("moments of fewer tokens than rows keep the product too") {
  qd::LoRAAdapter<double> adapter(30, 20, {.max_rank = 8});
  fill(adapter, 3);
  gather_moments(adapter, 3, 5);
  const Dense before = product(adapter, 8);
  qd::reorder(adapter, Reordering::gram);
  CHECK(relative(product(adapter, 8), before) < 1e-6);
}

TEST_CASE("an adapter that has learned nothing stays as it is") {
  for (const auto kind : {Reordering::svd, Reordering::gram}) {
    qd::LoRAAdapter<float> adapter(20, 16, {.max_rank = 6, .seed = 4}), same(20, 16, {.max_rank = 6, .seed = 4});
    gather_moments(adapter, 300, 5);
    const auto values = qd::reorder(adapter, kind);
    CHECK(std::all_of(values.begin(), values.end(), [](double v) { return std::fabs(v) < 1e-3; }));
    CHECK(test::same_bits(adapter.a().value.view(), same.a().value.view()));
    CHECK(test::same_bits(adapter.b().value.view(), same.b().value.view()));
  }
}

TEST_CASE("after gram both moments are diagonal, and their diagonals multiply to the squared singular values") {
  constexpr Index in = 30, out = 20, rank = 6, tokens = 400;
  qd::LoRAAdapter<double> adapter(in, out, {.max_rank = rank});
  fill(adapter, 3);
  gather_moments(adapter, tokens, 5);
  const Dense a = dense(adapter.a().value), b = dense(adapter.b().value);
  const Dense moment_a = dense(adapter.moment_a), moment_b = dense(adapter.moment_b);
  const auto values = qd::reorder(adapter, Reordering::gram);
  // A' = M_A A and B' = M_B B, so the moments in the new rows are M G M^T.
  const Dense ma = dense(adapter.a().value) * a.completeOrthogonalDecomposition().pseudoInverse();
  const Dense mb = dense(adapter.b().value) * b.completeOrthogonalDecomposition().pseudoInverse();
  const Dense new_a = ma * moment_a * ma.transpose(), new_b = mb * moment_b * mb.transpose();
  const auto off_diagonal = [](const Dense& m) {
    double worst = 0.0;
    for (Index i = 0; i < m.rows(); ++i)
      for (Index j = 0; j < m.cols(); ++j)
        if (i != j) worst = std::max(worst, std::fabs(m(i, j)) / std::sqrt(m(i, i) * m(j, j)));
    return worst;
  };
  CHECK(off_diagonal(new_a) < 1e-9);
  CHECK(off_diagonal(new_b) < 1e-9);
  for (Index i = 0; i < rank; ++i)
    CHECK(std::sqrt(new_a(i, i) * new_b(i, i)) == Approx(values[static_cast<std::size_t>(i)]).epsilon(1e-9));
}

TEST_CASE("gram's prefixes lose less of what passes through the layer than svd's") {
  constexpr Index in = 30, out = 20, rank = 6, tokens = 400;
  const auto weighed_loss = [&](Reordering kind, Index b) {
    qd::LoRAAdapter<double> adapter(in, out, {.max_rank = rank});
    fill(adapter, 3);
    gather_moments(adapter, tokens, 5);
    // G_A and G_B are those of the same x and dy, here as [in, in] and [out, out] covariances
    Dense x = dense(test::normal_matrix<double>(tokens, in, 5)), dy = dense(test::normal_matrix<double>(tokens, out, 6));
    for (Index j = 0; j < in; ++j) x.col(j) *= std::pow(0.8, static_cast<double>(j));
    for (Index j = 0; j < out; ++j) dy.col(j) *= std::pow(0.85, static_cast<double>(out - j));
    const Dense full = product(adapter, rank);
    qd::reorder(adapter, kind);
    return (dy * (full - product(adapter, b)) * x.transpose()).norm();  // what the cut changes, to first order in the loss
  };
  for (Index b = 1; b < rank; ++b) {
    CAPTURE(b);
    CHECK(weighed_loss(Reordering::gram, b) < weighed_loss(Reordering::svd, b));
  }
}

TEST_CASE("the layer gathers the moments of A x and B dy, unscaled, over passes while it is told to") {
  constexpr Index tokens = 30, in = 24, out = 20, rank = 6;
  qd::DynamicLoRALinear<double> layer(test::normal_matrix<double>(out, in, 1, 0.1), {.max_rank = rank, .alpha = 24.0f});
  fill(layer.adapter(), 2);
  const auto x = test::normal_matrix<double>(tokens, in, 3), dy = test::normal_matrix<double>(tokens, out, 4);
  layer.forward(x);
  layer.backward(dy.view());
  CHECK(layer.adapter().moment_a.size() == 0);
  layer.adapter().start_collecting();
  for (int pass = 0; pass < 2; ++pass) {
    layer.forward(x);
    layer.backward(dy.view());
  }
  layer.adapter().collecting = false;
  layer.forward(x);
  layer.backward(dy.view());
  const Dense z = dense(x) * dense(layer.adapter().a().value).transpose();
  const Dense dz = dense(dy) * dense(layer.adapter().b().value).transpose();
  CHECK(relative(dense(layer.adapter().moment_a), 2.0 * z.transpose() * z) < 1e-12);
  CHECK(relative(dense(layer.adapter().moment_b), 2.0 * dz.transpose() * dz) < 1e-12);
  layer.adapter().start_collecting();  // anew
  CHECK(dense(layer.adapter().moment_a).norm() == 0.0);
}

TEST_CASE("gram without moments is refused, by the adapter's name") {
  qd::LoRAAdapter<float> adapter(20, 16, {.max_rank = 6, .name = "layers.3.up"});
  fill(adapter, 3);
  const auto error = test::error_of([&] { qd::reorder(adapter, Reordering::gram); });
  REQUIRE(error);
  CHECK(error->code() == Errc::state_order);
  CHECK(std::string(error->what()).find("layers.3.up") != std::string::npos);
}

TEST_CASE("gates that were trained are refused, fresh ones are not") {
  qd::LoRAAdapter<float> adapter(20, 16, {.max_rank = 6, .name = "layers.3.up", .gated_ranks = {2, 6}});
  fill(adapter, 3);
  CHECK_FALSE(test::code_of([&] { qd::reorder(adapter); }));
  adapter.gates().value(1, 3) = 1.25f;
  const auto before = qd::clone(adapter.a().value.view());
  const auto error = test::error_of([&] { qd::reorder(adapter); });
  REQUIRE(error);
  CHECK(error->code() == Errc::state_order);
  CHECK(std::string(error->what()).find("layers.3.up") != std::string::npos);
  CHECK(test::same_bits(adapter.a().value.view(), before.view()));
}

TEST_CASE("an adapter or moments that are not finite are refused and left alone") {
  const auto kind = GENERATE(Reordering::svd, Reordering::gram);
  const auto where = GENERATE(0, 1, 2);
  CAPTURE(kind == Reordering::gram, where);
  if (kind == Reordering::svd && where == 2) return;  // does not look at moments
  qd::LoRAAdapter<float> adapter(20, 16, {.max_rank = 6, .name = "layers.3.up"});
  fill(adapter, 3);
  gather_moments(adapter, 300, 5);
  auto& spoiled = where == 0 ? adapter.a().value : where == 1 ? adapter.b().value : adapter.moment_a;
  spoiled(2, 1) = std::numeric_limits<float>::quiet_NaN();
  const auto a = qd::clone(adapter.a().value.view()), b = qd::clone(adapter.b().value.view());
  CHECK(test::code_of([&] { qd::reorder(adapter, kind); }) == Errc::non_finite);
  CHECK(test::same_bits(adapter.a().value.view(), a.view()));
  CHECK(test::same_bits(adapter.b().value.view(), b.view()));
}

}  // namespace reorder_test
