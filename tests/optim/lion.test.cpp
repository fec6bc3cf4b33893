// Lion against the paper's algorithm written out in double, and what it leaves alone.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <utility>
#include <vector>

#include <qdylora/core/paged_memory.hpp>
#include <qdylora/cpu/cpu.hpp>
#include <qdylora/optim/adamw.hpp>
#include <qdylora/optim/lion.hpp>

#include "backend/each_isa.inc"
#include "support/catch.hpp"
#include "support/counting_backend.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/random_data.hpp"

namespace lion_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using Parameter = qd::Parameter<float>;
using Rows = qd::LionOptions::UntouchedRows;
using test::same_bits;

namespace {

std::shared_ptr<Parameter> parameter(Index rows, Index cols, std::uint64_t seed = 1) {
  auto p = std::make_shared<Parameter>("p", rows, cols);
  qd::copy(test::normal_matrix<float>(rows, cols, seed).view(), p->value.view());
  return p;
}
/// A gradient for rows [0, rows).
void new_gradient(Parameter& p, std::uint64_t seed, Index rows) {
  const auto g = test::normal_matrix<float>(p.value.rows(), p.value.cols(), 100 + seed);
  qd::copy(g.view().top_rows(rows), p.gradient.view().top_rows(rows));
  p.touch(0, rows);
}

/// Algorithm 2 of the paper: c = b1 m + (1 - b1) g; theta -= eta (sign(c) + lambda theta); m = b2 m + (1 - b2) g.
struct Paper {
  std::vector<double> theta, m;
  double nearest = std::numeric_limits<double>::infinity();  // that any c came to 0, relative to its terms

  explicit Paper(const Parameter& p) : theta(p.value.span().begin(), p.value.span().end()), m(theta.size()) {}

  void step(std::size_t i, double g, double eta, const qd::LionOptions& o) {
    const double kept = o.beta1 * m[i], taken = (1.0 - o.beta1) * g, c = kept + taken;
    nearest = std::min(nearest, std::fabs(c) / (std::fabs(kept) + std::fabs(taken)));
    theta[i] -= eta * ((c > 0.0 ? 1.0 : c < 0.0 ? -1.0 : 0.0) + o.weight_decay * theta[i]);
    m[i] = o.beta2 * m[i] + (1.0 - o.beta2) * g;
  }
};

}  // namespace

TEST_CASE("steps of Lion are the paper's, on every instruction set") {
  const qd::LionOptions options{.lr = 1e-2, .beta1 = 0.8, .beta2 = 0.95, .weight_decay = 0.1};
  for (const auto& [rows, cols] : {std::pair<Index, Index>{1, 1}, {3, 5}, {7, 33}, {16, 130}})
    each_isa([&, rows = rows, cols = cols](const qd::Cpu& cpu) {
      CAPTURE(rows, cols);
      const auto p = parameter(rows, cols);
      for (Index i = 0; i < rows; ++i) p->row_lr.push_back(static_cast<float>(i % 3) / 2.0f);
      qd::Lion<float> optimizer{{p}, options, cpu};
      Paper paper(*p);
      for (std::uint64_t step = 0; step < 12; ++step) {
        const Index rank = step % 3 == 0 ? rows : (rows + 1) / 2;  // rows above it take no step at all
        optimizer.zero_grad();
        new_gradient(*p, step, rank);
        CHECK_FALSE(optimizer.step().skipped);
        for (Index i = 0; i < rank; ++i)
          for (Index j = 0; j < cols; ++j)
            paper.step(static_cast<std::size_t>(i * cols + j), static_cast<double>(p->gradient(i, j)),
                       options.lr * static_cast<double>(p->row_lr[static_cast<std::size_t>(i)]), options);
      }
      REQUIRE(paper.nearest > 1e-6);  // else rounding may turn a sign, and this compares nothing
      const qd::MatrixView<const double> theta(paper.theta.data(), rows, cols), m(paper.m.data(), rows, cols);
      CHECK(test::largest_difference(p->value.view(), theta) < 5e-6);
      CHECK(test::largest_difference(optimizer.states()[0].m.view(), m) < 1e-6);
    });
}

TEST_CASE("a step of Lion is lr long whatever the gradient, and none where there is no moment") {
  const auto p = std::make_shared<Parameter>("p", 1, 40);
  for (Index j = 0; j < 40; ++j) p->gradient(0, j) = static_cast<float>(j % 3 - 1) * std::pow(10.0f, static_cast<float>(j - 30));
  p->touch(0, 1);
  qd::Lion<float> optimizer{{p}, {.lr = 0.25}};
  optimizer.step();
  for (Index j = 0; j < 40; ++j) CHECK(p->value(0, j) == -0.25f * static_cast<float>(j % 3 - 1));
}

TEST_CASE("clipping changes what a step weighs in Lion's moment, not its length") {
  const auto p = parameter(4, 8), q = parameter(4, 8);
  qd::Lion<float> clipped{{p}, {.max_gradient_norm = 0.5}}, plain{{q}};
  for (const auto& each : {p, q}) new_gradient(*each, 1, 4);
  const double norm = clipped.step().gradient_norm;
  plain.step();
  CHECK(same_bits(p->value.view(), q->value.view()));
  for (Index i = 0; i < 32; ++i)
    CHECK(clipped.states()[0].m.data()[i] == Approx(plain.states()[0].m.data()[i] * 0.5 / (norm + 1e-6)).epsilon(1e-5));
}

TEST_CASE("Lion leaves rows without gradient byte for byte, unless it is dense") {
  const auto p = parameter(6, 7), q = parameter(6, 7);
  qd::Lion<float> strict{{p}, {.lr = 1e-2, .weight_decay = 0.1}};
  qd::Lion<float> dense{{q}, {.lr = 1e-2, .weight_decay = 0.1, .untouched_rows = Rows::dense}};
  for (auto* optimizer : {&strict, &dense}) {
    const auto& each = optimizer->parameters()[0];
    new_gradient(*each, 1, 6);
    optimizer->step();  // all rows have moments now
    optimizer->zero_grad();
    new_gradient(*each, 2, 2);
    const auto before = qd::clone(each->value.view()), moment = qd::clone(optimizer->states()[0].m.view());
    optimizer->step();
    const auto lower = [](const qd::Matrix<float>& x) { return x.view().middle_rows(2, 4); };
    CHECK(same_bits(lower(before), lower(each->value)) == (optimizer == &strict));
    CHECK(same_bits(lower(moment), lower(optimizer->states()[0].m)) == (optimizer == &strict));
    CHECK_FALSE(same_bits(before.view().top_rows(2), each->value.view().top_rows(2)));
  }
}

TEST_CASE("steps of Lion are the same on one thread, on four, and with the moment in a file") {
  const auto run = [](auto optimizer_of) {
    const qd::Parameters<float> params = {parameter(64, 576, 1), parameter(64, 1536, 2), parameter(1, 5, 3)};
    auto optimizer = optimizer_of(params);
    for (std::uint64_t step = 0; step < 3; ++step) {
      for (std::size_t i = 0; i < params.size(); ++i) new_gradient(*params[i], 10 * step + i, params[i]->value.rows());
      optimizer.step();
    }
    std::vector<qd::Matrix<float>> all;
    for (const auto& p : params) all.push_back(qd::clone(p->value.view()));
    for (const auto& s : optimizer.states()) all.push_back(qd::clone(qd::MatrixView<const float>(s.m.data(), s.m.rows(), s.m.cols())));
    return all;
  };
  const qd::LionOptions options{.lr = 1e-2, .weight_decay = 0.01, .max_gradient_norm = 1.0};
  const test::TemporaryFolder folder;
  using Paged = qd::Lion<float, qd::Cpu, qd::PagedMemory>;
  const auto one = run([&](const auto& params) { return qd::Lion<float>(params, options, qd::Cpu(1)); });
  const auto four = run([&](const auto& params) { return qd::Lion<float>(params, options, qd::Cpu(4)); });
  const auto paged = run([&](const auto& params) { return Paged(params, options, qd::Cpu(2), qd::PagedMemory(folder.path())); });
  REQUIRE(one.size() == 6);
  for (std::size_t i = 0; i < one.size(); ++i) {
    CHECK(same_bits(one[i].view(), four[i].view()));
    CHECK(same_bits(one[i].view(), paged[i].view()));
  }
}

TEST_CASE("Lion's state is half of AdamW's, and can begin anew") {
  const auto p = parameter(8, 100), q = parameter(8, 100);
  qd::Lion<float> used{{p}};
  CHECK(2 * used.bytes() == qd::AdamW<float>({p}).bytes());
  new_gradient(*p, 1, 8);
  used.step();
  used.reset_state();
  qd::copy(std::as_const(p->value).view(), q->value.view());
  qd::Lion<float> fresh{{q}};
  for (const auto& each : {p, q}) new_gradient(*each, 2, 8);
  used.step();
  fresh.step();
  CHECK(same_bits(p->value.view(), q->value.view()));
  CHECK(same_bits(used.states()[0].m.view(), fresh.states()[0].m.view()));
}

TEST_CASE("Lion refuses options outside their range, and skips a gradient that is not finite") {
  const auto p = parameter(2, 2);
  const auto code = [&](qd::LionOptions options) { return test::code_of([&] { qd::Lion<float>{{p}, options}; }); };
  constexpr double nan = std::numeric_limits<double>::quiet_NaN();
  CHECK_FALSE(code({}));
  CHECK(code({.lr = -1e-3}) == Errc::bad_argument);
  CHECK(code({.beta1 = 1.0}) == Errc::bad_argument);
  CHECK(code({.beta2 = nan}) == Errc::bad_argument);
  CHECK(code({.weight_decay = -0.1}) == Errc::bad_argument);
  CHECK(code({.max_gradient_norm = nan}) == Errc::bad_argument);
  qd::Lion<float> optimizer{{p}};
  new_gradient(*p, 1, 2);
  p->gradient(1, 1) = std::numeric_limits<float>::infinity();
  const auto before = qd::clone(p->value.view());
  CHECK(optimizer.step().skipped);
  CHECK(same_bits(before.view(), p->value.view()));
}

// A backend need not have it.
static_assert(qd::HasLion<qd::Cpu, float> && qd::HasLion<qd::Cpu, double> && !qd::HasLion<test::CountingBackend, float>);

}  // namespace lion_test
