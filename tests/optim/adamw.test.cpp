// AdamW against torch.optim.AdamW, its clipping, and what it leaves alone.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/optim/adamw.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/golden.hpp"
#include "support/random_data.hpp"

namespace adamw_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using Parameter = qd::Parameter<float>;
using Shared = std::shared_ptr<Parameter>;
using Rows = qd::AdamWOptions::UntouchedRows;
using test::same_bits;

namespace {

Shared parameter(Index rows, Index cols, std::uint64_t seed = 1) {
  auto p = std::make_shared<Parameter>("p" + std::to_string(seed), rows, cols);
  qd::Rng rng(seed);
  test::fill_normal(p->value.view(), rng);
  return p;
}

void new_gradient(Parameter& p, std::uint64_t seed, double deviation = 1.0) {
  qd::Rng rng(seed, qd::Purpose::data);
  test::fill_normal(p.gradient.view(), rng, deviation);
  p.touch(0, p.value.rows());
}

// max |found - expected|, infinite where one of them is not a number.
double distance(std::span<const float> found, std::span<const float> expected) {
  if (found.size() != expected.size()) return std::numeric_limits<double>::infinity();
  double worst = 0.0;
  for (std::size_t i = 0; i < found.size(); ++i) {
    const double d = std::fabs(static_cast<double>(found[i]) - static_cast<double>(expected[i]));
    worst = d <= worst ? worst : std::isnan(d) ? std::numeric_limits<double>::infinity() : d;
  }
  return worst;
}

// All that a step may change.
struct Snapshot {
  std::vector<qd::Matrix<float>> values, m, v;
  std::vector<std::vector<std::int64_t>> steps;

  explicit Snapshot(const qd::AdamW<float>& optimizer) {
    for (const auto& p : optimizer.parameters()) values.push_back(qd::clone(p->value.view()));
    for (const auto& s : optimizer.states()) {
      m.push_back(qd::clone(s.m.view()));
      v.push_back(qd::clone(s.v.view()));
      steps.push_back(s.steps);
    }
  }
  bool operator==(const Snapshot& other) const {
    const auto equal = [](const auto& a, const auto& b) {
      return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                        [](const auto& x, const auto& y) { return same_bits(x.view(), y.view()); });
    };
    return equal(values, other.values) && equal(m, other.m) && equal(v, other.v) && steps == other.steps;
  }
};

}  // namespace

TEST_CASE("ten steps of AdamW are torch's") {
  struct Case {
    std::string name;
    qd::AdamWOptions options;
  };
  const auto [name, options] = GENERATE(
      Case{"torch_default", {.lr = 1e-3, .weight_decay = 1e-2}}, Case{"torch_qlora", {.lr = 2e-4}},
      Case{"torch_wd0.1", {.lr = 1e-2, .beta1 = 0.9, .beta2 = 0.95, .epsilon = 1e-6, .weight_decay = 0.1}});
  // One row or many: rows have their own step counts but the same arithmetic.
  const Index rows = GENERATE(Index{1}, Index{10}, Index{300});
  CAPTURE(name, rows);
  const qd::SafetensorsFile file(test::golden("adamw.safetensors"));
  const auto start = test::load<float>(file, "p0"), gradients = test::load<float>(file, "grads");
  const auto expected = test::load<float>(file, name + "/p");  // after steps 1, 2 and 10
  const auto p = std::make_shared<Parameter>("p", rows, 300 / rows);
  std::copy(start.begin(), start.end(), p->value.data());
  qd::AdamW<float> optimizer{{p}, options};
  for (std::size_t step = 0; step < 10; ++step) {
    std::copy_n(gradients.begin() + static_cast<std::ptrdiff_t>(300 * step), 300, p->gradient.data());
    CHECK_FALSE(optimizer.step().skipped);
    if (step < 2 || step == 9) {
      CAPTURE(step);
      CHECK(distance(p->value.span(), std::span(expected).subspan(300 * std::min<std::size_t>(step, 2), 300)) < 1e-6);
    }
  }
  CHECK(distance(optimizer.states()[0].m.span(), test::load<float>(file, name + "/exp_avg")) < 1e-6);
  CHECK(distance(optimizer.states()[0].v.span(), test::load<float>(file, name + "/exp_avg_sq")) < 1e-6);
  CHECK(optimizer.step_count() == 10);
  CHECK(optimizer.skipped_steps() == 0);
}

TEST_CASE("gradients are clipped to a norm of all parameters together, as torch does") {
  const qd::SafetensorsFile file(test::golden("adamw.safetensors"));
  const auto p0 = parameter(1, 50, 1), p1 = parameter(1, 7, 2);
  const auto g0 = test::load<float>(file, "clip/g0"), g1 = test::load<float>(file, "clip/g1");
  std::copy(g0.begin(), g0.end(), p0->gradient.data());
  std::copy(g1.begin(), g1.end(), p1->gradient.data());
  // With beta1 = 0 the first moment is the clipped gradient.
  qd::AdamW<float> optimizer{{p0, p1}, {.beta1 = 0.0, .max_gradient_norm = 0.3}};
  const auto report = optimizer.step();
  CHECK(report.gradient_norm == Approx(test::load<float>(file, "clip/total_norm")[0]).epsilon(1e-6));
  CHECK(distance(optimizer.states()[0].m.span(), test::load<float>(file, "clip/g0_clipped")) < 1e-6);
  CHECK(distance(optimizer.states()[1].m.span(), test::load<float>(file, "clip/g1_clipped")) < 1e-6);
  CHECK(distance(p0->gradient.span(), g0) == 0.0);  // the gradient itself stays
}

TEST_CASE("the norm that gradients are clipped to has torch's 1e-6 below it") {
  const auto p = parameter(1, 1);
  p->gradient(0, 0) = 1e-6f;
  qd::AdamW<float> optimizer{{p}, {.beta1 = 0.0, .max_gradient_norm = 1e-6}};
  optimizer.step();
  CHECK(optimizer.states()[0].m(0, 0) == Approx(0.5e-6));  // 1e-6 / (1e-6 + 1e-6)
}

TEST_CASE("a gradient below the norm is not scaled") {
  const auto p = parameter(4, 8);
  new_gradient(*p, 5, 1e-3);
  qd::AdamW<float> optimizer{{p}, {.beta1 = 0.0, .max_gradient_norm = 1.0}};
  CHECK(optimizer.step().gradient_norm < 1.0);
  CHECK(same_bits(optimizer.states()[0].m.view(), p->gradient.view()));
}

TEST_CASE("a gradient that is not finite changes nothing, is reported and counted") {
  const float bad = GENERATE(std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity(),
                             -std::numeric_limits<float>::infinity());
  const auto clip = GENERATE(0.0, 1.0);
  const auto p0 = parameter(6, 10, 1), p1 = parameter(3, 5, 2);
  qd::AdamW<float> optimizer{{p0, p1}, {.lr = 1e-2, .weight_decay = 0.1, .max_gradient_norm = clip}};
  for (std::uint64_t step = 0; step < 2; ++step) {
    new_gradient(*p0, 10 + step);
    new_gradient(*p1, 20 + step);
    optimizer.step();
  }
  const Snapshot before(optimizer);
  p1->gradient(2, 4) = bad;  // the last element of the last parameter
  const auto report = optimizer.step();
  CHECK(report.skipped);
  CHECK_FALSE(std::isfinite(report.gradient_norm));
  CHECK(Snapshot(optimizer) == before);
  CHECK(optimizer.step_count() == 2);
  CHECK(optimizer.skipped_steps() == 1);
  // The next step is as if the bad one had not been.
  new_gradient(*p1, 30);
  CHECK_FALSE(optimizer.step().skipped);
  CHECK(optimizer.step_count() == 3);
  CHECK(optimizer.states()[0].steps[0] == 3);
  CHECK_FALSE(Snapshot(optimizer) == before);
}

TEST_CASE("a gradient whose square is not finite in float changes nothing, unless it is clipped") {
  const auto clip = GENERATE(0.0, 1.0);
  const auto p = parameter(2, 5, 1);
  qd::AdamW<float> optimizer{{p}, {.lr = 1e-2, .max_gradient_norm = clip}};
  new_gradient(*p, 10);
  optimizer.step();
  const Snapshot before(optimizer);
  p->gradient(1, 2) = 1e21f;
  const auto report = optimizer.step();
  CHECK(report.gradient_norm == Approx(1e21));
  CHECK(report.skipped == (clip == 0.0));
  CHECK((Snapshot(optimizer) == before) == (clip == 0.0));
  new_gradient(*p, 11);
  CHECK_FALSE(optimizer.step().skipped);
  for (const float value : p->value.span()) CHECK(std::isfinite(value));
}

TEST_CASE("every row may have a learning rate of its own") {
  const auto p = parameter(3, 9), reference = parameter(3, 9);
  p->row_lr = {0.0f, 1.0f, 2.5f};
  qd::AdamW<float> optimizer{{p}, {.lr = 1e-2, .weight_decay = 0.1}};
  std::vector<std::unique_ptr<qd::AdamW<float>>> alone;
  std::vector<Shared> copies;
  for (const double factor : {0.0, 1.0, 2.5}) {
    copies.push_back(parameter(3, 9));
    alone.push_back(std::make_unique<qd::AdamW<float>>(qd::AdamW<float>::Params{copies.back()},
                                                       qd::AdamWOptions{.lr = 1e-2 * factor, .weight_decay = 0.1}));
  }
  for (std::uint64_t step = 0; step < 3; ++step) {
    new_gradient(*p, step);
    optimizer.step();
    for (std::size_t i = 0; i < 3; ++i) {
      new_gradient(*copies[i], step);
      alone[i]->step();
    }
  }
  for (Index row = 0; row < 3; ++row)
    CHECK(same_bits(p->value.view().middle_rows(row, 1), copies[static_cast<std::size_t>(row)]->value.view().middle_rows(row, 1)));
  CHECK(same_bits(p->value.view().top_rows(1), reference->value.view().top_rows(1)));  // rate 0: no decay either
  CHECK(optimizer.states()[0].m(0, 0) != 0.0f);                                         // but its moments go on
}

TEST_CASE("row rates of one parameter are of no concern to the next") {
  const auto frozen = parameter(2, 4, 1), free = parameter(2, 4, 2), same = parameter(2, 4, 2);
  frozen->row_lr = {0.0f, 0.0f};
  qd::AdamW<float> both{{frozen, free}, {.lr = 1e-2}}, alone{{same}, {.lr = 1e-2}};
  for (const auto& p : {frozen, free, same}) new_gradient(*p, 3);
  both.step();
  alone.step();
  CHECK(same_bits(free->value.view(), same->value.view()));
}

TEST_CASE("a strict optimizer passes row rates to the rows they belong to") {
  const auto p = parameter(5, 4), q = parameter(5, 4);
  p->row_lr = {1.0f, 2.0f, 3.0f, 4.0f, 5.0f};
  qd::AdamW<float> strict{{p}, {.lr = 1e-2, .untouched_rows = Rows::strict}};
  qd::AdamW<float> plain{{q}, {.lr = 4e-2}};
  new_gradient(*p, 3);
  new_gradient(*q, 3);
  p->touched = {false, false, false, true, false};
  strict.step();
  plain.step();
  CHECK(same_bits(p->value.view().middle_rows(3, 1), q->value.view().middle_rows(3, 1)));
}

TEST_CASE("reset_state makes the next step that of a new optimizer") {
  const auto p = parameter(4, 6), q = parameter(4, 6);
  const qd::AdamWOptions options{.lr = 1e-2, .weight_decay = 0.1};
  qd::AdamW<float> used{{p}, options};
  for (std::uint64_t step = 0; step < 5; ++step) {
    new_gradient(*p, step);
    used.step();
  }
  const auto before = qd::clone(p->value.view());
  used.reset_state();
  CHECK(same_bits(p->value.view(), before.view()));  // values stay
  qd::copy<float>(p->value, q->value.view());
  qd::AdamW<float> fresh{{q}, options};
  new_gradient(*p, 9);
  new_gradient(*q, 9);
  used.step();
  fresh.step();
  CHECK(Snapshot(used) == Snapshot(fresh));
}

TEST_CASE("a strict optimizer leaves untouched rows byte for byte, and counts steps by row") {
  const auto p = parameter(6, 7);
  qd::AdamW<float> optimizer{{p}, {.lr = 1e-2, .weight_decay = 0.1, .untouched_rows = Rows::strict}};
  optimizer.zero_grad();
  new_gradient(*p, 1);
  optimizer.step();  // all rows have moments now
  optimizer.zero_grad();
  CHECK(std::none_of(p->touched.begin(), p->touched.end(), [](bool t) { return t; }));
  const Snapshot before(optimizer);
  for (const Index row : {1, 2, 4}) {
    std::fill_n(p->gradient.view().row(row), 7, 0.5f);
    p->touch(row, row + 1);
  }
  optimizer.step();
  const Snapshot after(optimizer);
  for (Index row = 0; row < 6; ++row) {
    CAPTURE(row);
    const bool trained = row == 1 || row == 2 || row == 4;
    const auto same = [&](const qd::Matrix<float>& a, const qd::Matrix<float>& b) {
      return same_bits(a.view().middle_rows(row, 1), b.view().middle_rows(row, 1));
    };
    CHECK(same(before.values[0], after.values[0]) == !trained);
    CHECK(same(before.m[0], after.m[0]) == !trained);
    CHECK(same(before.v[0], after.v[0]) == !trained);
    CHECK(after.steps[0][static_cast<std::size_t>(row)] == (trained ? 2 : 1));
  }
}

TEST_CASE("a dense optimizer moves and decays rows that got no gradient") {
  const auto p = parameter(2, 5);
  qd::AdamW<float> optimizer{{p}, {.lr = 1e-2, .weight_decay = 0.1}};
  new_gradient(*p, 1);
  optimizer.step();
  optimizer.zero_grad();
  const Snapshot before(optimizer);
  optimizer.step();
  const Snapshot after(optimizer);
  CHECK_FALSE(same_bits(before.values[0].view(), after.values[0].view()));
  CHECK(after.steps[0] == std::vector<std::int64_t>{2, 2});
}

TEST_CASE("zero_grad clears gradients and what was touched") {
  const auto p = parameter(3, 4);
  new_gradient(*p, 1);
  qd::AdamW<float> optimizer{{p}};
  optimizer.zero_grad();
  CHECK(std::all_of(p->gradient.span().begin(), p->gradient.span().end(), [](float g) { return g == 0.0f; }));
  CHECK(p->touched == std::vector<bool>(3, false));
}

TEST_CASE("the learning rate can follow a schedule") {
  const auto p = parameter(2, 3), q = parameter(2, 3);
  qd::AdamW<float> scheduled{{p}, {.lr = 1.0}}, fixed{{q}, {.lr = 1e-3}};
  new_gradient(*p, 1);
  new_gradient(*q, 1);
  scheduled.set_lr(1e-3);
  scheduled.step();
  fixed.step();
  CHECK(same_bits(p->value.view(), q->value.view()));
  CHECK(scheduled.options().lr == 1e-3);
}

TEST_CASE("steps are the same on one thread and on four") {
  const auto run = [](int threads) {
    std::vector<Shared> params = {parameter(64, 576, 1), parameter(64, 1536, 2), parameter(1, 5, 3)};
    qd::AdamW<float> optimizer{params, {.lr = 1e-2, .weight_decay = 0.01, .max_gradient_norm = 1.0}, qd::Cpu(threads)};
    double norm = 0.0;
    for (std::uint64_t step = 0; step < 3; ++step) {
      for (std::size_t i = 0; i < params.size(); ++i) new_gradient(*params[i], 10 * step + i);
      norm = optimizer.step().gradient_norm;
    }
    return std::pair(Snapshot(optimizer), norm);
  };
  const auto one = run(1), four = run(4);
  CHECK(one.first == four.first);
  CHECK(one.second == four.second);
}

TEST_CASE("double parameters keep moments in double") {
  const auto p = std::make_shared<qd::Parameter<double>>("p", 1, 1);
  p->value(0, 0) = 1.0;
  p->gradient(0, 0) = 0.3;
  qd::AdamW<double> optimizer{{p}, {.lr = 0.1}};
  optimizer.step();
  // m / c1 = g, sqrt(v) / sqrt(c2) = |g|: the first step is lr * g / (|g| + epsilon)
  CHECK(std::fabs(p->value(0, 0) - (1.0 - 0.1 * 0.3 / (0.3 + 1e-8))) < 1e-14);
}

TEST_CASE("AdamW refuses options outside their range") {
  const auto p = parameter(2, 2);
  const auto code = [&](qd::AdamWOptions options) { return test::code_of([&] { qd::AdamW<float>{{p}, options}; }); };
  constexpr double nan = std::numeric_limits<double>::quiet_NaN(), infinity = std::numeric_limits<double>::infinity();
  CHECK_FALSE(code({}));
  CHECK(code({.lr = -1e-3}) == Errc::bad_argument);
  CHECK(code({.lr = nan}) == Errc::bad_argument);
  CHECK(code({.lr = infinity}) == Errc::bad_argument);
  CHECK(code({.beta1 = 1.0}) == Errc::bad_argument);
  CHECK(code({.beta1 = -0.1}) == Errc::bad_argument);
  CHECK(code({.beta2 = 1.0}) == Errc::bad_argument);
  CHECK(code({.beta2 = nan}) == Errc::bad_argument);
  CHECK(code({.epsilon = nan}) == Errc::bad_argument);
  CHECK(code({.epsilon = -1.0}) == Errc::bad_argument);
  CHECK(code({.epsilon = 0.0}) == Errc::bad_argument);
  CHECK(code({.epsilon = 1e-60}) == Errc::bad_argument);  // 0 in float
  CHECK(code({.weight_decay = nan}) == Errc::bad_argument);
  CHECK(code({.weight_decay = infinity}) == Errc::bad_argument);
  CHECK(code({.max_gradient_norm = nan}) == Errc::bad_argument);
  CHECK(code({.max_gradient_norm = -1.0}) == Errc::bad_argument);
}

TEST_CASE("row rates that do not fit their parameter are refused before anything changes") {
  const auto p = parameter(8, 3);
  const auto rows = GENERATE(Rows::dense, Rows::strict);
  qd::AdamW<float> optimizer{{p}, {.lr = 1e-2, .untouched_rows = rows}};
  new_gradient(*p, 1);
  p->row_lr.assign(16, 1.0f);
  const Snapshot before(optimizer);
  const auto error = test::error_of([&] { optimizer.step(); });
  REQUIRE(error);
  CHECK(error->code() == Errc::shape_mismatch);
  CHECK(std::string(error->what()).find(p->name) != std::string::npos);
  CHECK(Snapshot(optimizer) == before);
}

}  // namespace adamw_test
