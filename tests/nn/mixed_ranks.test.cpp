// A batch whose rows have different ranks is, row by row and bit for bit, what single-rank batches are.
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/random_data.hpp"

namespace mixed_ranks_test {

namespace qd = qdylora;
using qd::Index;
using Float = qd::Matrix<float>;
using Layer = qd::DynamicLoRALinear<float>;
using test::same_bits;

namespace {

constexpr Index max_rank = 20;

Layer make_layer(Index out, Index in, bool gates, const qd::Cpu& cpu, float dropout = 0.0f) {
  qd::LoRAOptions options{.max_rank = max_rank, .alpha = 8.0f, .scale = qd::ScalePolicy::over_rank, .dropout = dropout};
  if (gates) options.gated_ranks = {1, 4, 7, 20};
  Layer layer(test::normal_matrix<float>(out, in, 1, 0.1), options, {}, cpu);
  qd::Rng rng(2);
  test::fill_normal(layer.adapter().b().value.view(), rng, 0.1);
  if (gates) test::fill_normal(layer.adapter().gates().value.view(), rng);
  layer.set_bias(test::normal_matrix<float>(1, out, 3).view());
  return layer;
}

std::vector<Index> some_ranks(Index tokens) {
  constexpr Index choice[] = {0, 1, 2, 4, 7, 13, 20};
  qd::Rng rng(4);
  std::vector<Index> ranks;
  for (Index i = 0; i < tokens; ++i) ranks.push_back(choice[rng.below(7)]);
  return ranks;
}

bool same_row(const Float& a, const Float& b, Index row) {
  return same_bits(a.view().middle_rows(row, 1), b.view().middle_rows(row, 1));
}

struct Passed {
  Float y, dx;
};

Passed pass(Layer& layer, const Float& x, const Float& dy, const qd::RankPlan& plan) {
  layer.set_ranks(plan);
  Passed result{qd::clone(layer.forward(x)), {}};
  result.dx = qd::clone(layer.backward(dy.view()));
  return result;
}

void check(Index tokens, Index out, Index in, bool gates, const qd::Cpu& cpu, float dropout = 0.0f) {
  CAPTURE(tokens, out, in, gates, dropout, name(cpu.isa()));
  Layer layer = make_layer(out, in, gates, cpu, dropout);
  const Float x = test::normal_matrix<float>(tokens, in, 5), dy = test::normal_matrix<float>(tokens, out, 6);
  const auto ranks = some_ranks(tokens);
  const Passed mixed = pass(layer, x, dy, qd::RankPlan::per_row(ranks));
  bool same_y = true, same_dx = true;
  for (const Index rank : {0, 1, 2, 4, 7, 13, 20}) {
    const Passed single = pass(layer, x, dy, qd::RankPlan::uniform(rank));
    for (Index row = 0; row < tokens; ++row)
      if (ranks[static_cast<std::size_t>(row)] == rank) {
        same_y = same_y && same_row(mixed.y, single.y, row);
        same_dx = same_dx && same_row(mixed.dx, single.dx, row);
      }
  }
  CHECK(same_y);
  CHECK(same_dx);
}

std::vector<qd::Cpu> every_isa() {
  std::vector<qd::Cpu> result;
  for (const auto isa : {qd::Isa::generic, qd::Isa::avx2, qd::Isa::avx512})
    if (qd::supported(isa)) result.push_back(qd::Cpu().with_isa(isa));
  return result;
}

}  // namespace

TEST_CASE("a batch of mixed ranks equals single-rank batches row by row, bit for bit") {
  for (const auto& cpu : every_isa())
    for (const Index tokens : {5, 8, 33, 64, 100})
      for (const Index width : {24, 96, 100, 576}) {
        check(tokens, width, width, false, cpu);
        check(tokens, 100, width, true, cpu);
      }
}

TEST_CASE("so does a batch with dropout, whose masks do not depend on ranks") {
  for (const Index tokens : {5, 33}) check(tokens, 96, 100, true, qd::Cpu(), 0.2f);
}

TEST_CASE("rows of a batch equal the same rows in a smaller batch, bit for bit") {
  for (const auto& cpu : every_isa()) {
    Layer layer = make_layer(100, 96, true, cpu);
    const Float x = test::normal_matrix<float>(100, 96, 5), dy = test::normal_matrix<float>(100, 100, 6);
    const Passed whole = pass(layer, x, dy, qd::RankPlan::uniform(7));
    for (const Index first : {0, 17, 60}) {
      const Float part_x = qd::clone(x.view().middle_rows(first, 33)), part_dy = qd::clone(dy.view().middle_rows(first, 33));
      const Passed part = pass(layer, part_x, part_dy, qd::RankPlan::uniform(7));
      CHECK(same_bits(part.y.view(), whole.y.view().middle_rows(first, 33)));
      CHECK(same_bits(part.dx.view(), whole.dx.view().middle_rows(first, 33)));
    }
    const Float one_x = qd::clone(x.view().top_rows(1)), one_dy = qd::clone(dy.view().top_rows(1));
    const Passed one = pass(layer, one_x, one_dy, qd::RankPlan::uniform(7));  // few tokens are summed in another order
    CHECK(test::normalised_squared_error(one.y.view(), whole.y.view().top_rows(1)) < 1e-12);
    CHECK(test::normalised_squared_error(one.dx.view(), whole.dx.view().top_rows(1)) < 1e-12);
  }
}

TEST_CASE("with the adapter off the output is the base's, bit for bit") {
  const qd::Cpu cpu;
  for (const Index tokens : {1, 5, 40}) {
    Layer layer = make_layer(100, 96, false, cpu);
    const Float x = test::normal_matrix<float>(tokens, 96, 5), dy = test::normal_matrix<float>(tokens, 100, 6);
    Float base(tokens, 100), base_dx(tokens, 96);
    layer.base()->visit([&](const auto& w) {
      cpu.matmul(x.view(), w, base.view());
      cpu.matmul_transposed(dy.view(), w, base_dx.view());
    });
    cpu.add_row(layer.bias(), base.view());
    const Passed off = pass(layer, x, dy, qd::RankPlan{});
    CHECK(same_bits(off.y.view(), base.view()));
    CHECK(same_bits(off.dx.view(), base_dx.view()));
    for (const auto& p : layer.parameters())
      for (const float g : p->gradient.span()) CHECK(g == 0.0f);
    // and so are rows of rank 0 among others
    auto ranks = std::vector<Index>(static_cast<std::size_t>(tokens), 0);
    ranks.back() = max_rank;
    const Passed mixed = pass(layer, x, dy, qd::RankPlan::per_row(ranks));
    CHECK(same_bits(mixed.y.view().top_rows(tokens - 1), base.view().top_rows(tokens - 1)));
    CHECK(same_bits(mixed.dx.view().top_rows(tokens - 1), base_dx.view().top_rows(tokens - 1)));
    CHECK_FALSE(same_row(mixed.y, base, tokens - 1));
  }
}

TEST_CASE("rows of rank 0 keep a base output of minus zero") {
  // Outputs too small for half round to -0; adding the adapter's zero to one would make it +0.
  qd::DynamicLoRALinear<qd::half, qd::Cpu, qd::Dense<float>> layer(test::normal_matrix<float>(16, 24, 1, 1e-6), {.max_rank = 4});
  qd::Rng rng(2);
  test::fill_normal(layer.adapter().b().value.view(), rng);
  const auto x = test::normal_matrix<qd::half>(12, 24, 3, 1e-3);
  layer.set_rank(0);
  const auto base = qd::clone(layer.forward(x));
  layer.set_ranks(qd::RankPlan::of_runs({{11, 0}, {1, 4}}));
  const auto mixed = qd::clone(layer.forward(x));
  CHECK(same_bits(mixed.view().top_rows(11), base.view().top_rows(11)));
}

TEST_CASE("of a run without rows no rank is trained") {
  Layer layer = make_layer(60, 50, false, qd::Cpu());
  for (auto* p : {&layer.adapter().a(), &layer.adapter().b()}) p->touched.assign(p->touched.size(), false);
  pass(layer, test::normal_matrix<float>(2, 50, 5), test::normal_matrix<float>(2, 60, 6), qd::RankPlan::of_runs({{0, 8}, {2, 3}, {0, 20}}));
  for (Index row = 0; row < max_rank; ++row) {
    CAPTURE(row);
    CHECK(layer.adapter().a().touched[static_cast<std::size_t>(row)] == (row < 3));
    CHECK(layer.adapter().b().touched[static_cast<std::size_t>(row)] == (row < 3));
  }
}

TEST_CASE("a mixed batch accumulates the gradients of its parts") {
  Layer mixed = make_layer(60, 50, true, qd::Cpu()), parts = make_layer(60, 50, true, qd::Cpu());
  const Float x = test::normal_matrix<float>(30, 50, 5), dy = test::normal_matrix<float>(30, 60, 6);
  pass(mixed, x, dy, qd::RankPlan::of_runs({{10, 4}, {5, 0}, {15, 13}}));
  pass(parts, qd::clone(x.view().top_rows(10)), qd::clone(dy.view().top_rows(10)), qd::RankPlan::uniform(4));
  pass(parts, qd::clone(x.view().middle_rows(15, 15)), qd::clone(dy.view().middle_rows(15, 15)), qd::RankPlan::uniform(13));
  const auto error = [&](auto& a, auto& b) { return test::normalised_squared_error(a.gradient.view(), b.gradient.view()); };
  CHECK(error(mixed.adapter().a(), parts.adapter().a()) < 1e-12);
  CHECK(error(mixed.adapter().b(), parts.adapter().b()) < 1e-12);
  CHECK(error(mixed.adapter().gates(), parts.adapter().gates()) < 1e-12);
}

}  // namespace mixed_ranks_test
