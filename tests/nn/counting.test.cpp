// What the layer asks of its backend, counted by a backend that is not the CPU's own class.
#include <qdylora/nn/dynamic_lora_linear.hpp>
#include <qdylora/optim/adamw.hpp>

#include "support/catch.hpp"
#include "support/counting_backend.hpp"
#include "support/distortion.hpp"
#include "support/random_data.hpp"

namespace counting_test {

namespace qd = qdylora;
using qd::Index;
using Counting = test::CountingBackend;
using Touched = Counting::Touched;

namespace {

constexpr Index tokens = 12, in = 96, out = 64, max_rank = 16;

template <class Format = qd::NF4>
using Layer = qd::DynamicLoRALinear<float, Counting, Format>;

template <class Format = qd::NF4>
Layer<Format> make_layer(const Counting& backend, qd::LoRAOptions options = {.max_rank = max_rank}) {
  Layer<Format> layer(test::normal_matrix<float>(out, in, 1, 0.1), std::move(options), {}, backend);
  qd::Rng rng(2);
  test::fill_normal(layer.adapter().b().value.view(), rng, 0.1);
  return layer;
}

}  // namespace

TEST_CASE("a weight is quantized once, when its layer is made, and never decoded in full") {
  const Counting backend;
  auto layer = make_layer(backend);
  CHECK(backend.counts().quantize == 1);
  const auto x = test::normal_matrix<float>(tokens, in, 3), dy = test::normal_matrix<float>(tokens, out, 4);
  for (int pass = 1; pass <= 3; ++pass) {
    layer.forward(x);
    CHECK(backend.counts().matmul_quantized == pass);
    layer.backward(dy.view());
    CHECK(backend.counts().matmul_transposed_quantized == pass);
  }
  CHECK(backend.counts().quantize == 1);
  CHECK(backend.counts().dequantize == 0);
  layer.merged_weight(4);
  CHECK(backend.counts().quantize == 1);
  CHECK(backend.counts().dequantize == 1);
}

TEST_CASE("a pass at rank b reads b rows of A and of B and adds to b rows of their gradients") {
  const Counting backend;
  auto layer = make_layer(backend);
  const auto x = test::normal_matrix<float>(tokens, in, 3), dy = test::normal_matrix<float>(tokens, out, 4);
  auto &a = layer.adapter().a(), &b = layer.adapter().b();
  for (const Index rank : {Index{1}, Index{4}, max_rank}) {
    CAPTURE(rank);
    layer.set_rank(rank);
    backend.forget();
    layer.forward(x);
    const std::vector<Touched> forward_reads = {{a.value.data(), rank, in}, {b.value.data(), rank, out}};
    CHECK(backend.counts().dense_reads == forward_reads);
    CHECK(backend.counts().dense_elements() == rank * (in + out));
    CHECK(backend.counts().gradients.empty());
    backend.forget();
    layer.backward(dy.view());
    const std::vector<Touched> backward_reads = {{b.value.data(), rank, out}, {a.value.data(), rank, in}};
    const std::vector<Touched> gradients = {{b.gradient.data(), rank, out}, {a.gradient.data(), rank, in}};
    CHECK(backend.counts().dense_reads == backward_reads);
    CHECK(backend.counts().gradients == gradients);
  }
}

TEST_CASE("ranks per row read as many rows as the largest of them has") {
  const Counting backend;
  auto layer = make_layer(backend);
  layer.set_ranks(qd::RankPlan::of_runs({{4, 1}, {5, 6}, {3, 2}}));
  backend.forget();
  const auto x = test::normal_matrix<float>(tokens, in, 3);
  layer.forward(x);
  CHECK(backend.counts().dense_elements() == 6 * (in + out));
}

TEST_CASE("at rank 0 the adapter is not read at all") {
  const Counting backend;
  auto layer = make_layer(backend);
  layer.set_rank(0);
  const auto x = test::normal_matrix<float>(tokens, in, 3), dy = test::normal_matrix<float>(tokens, out, 4);
  layer.forward(x);
  layer.backward(dy.view());
  CHECK(backend.counts().dense_reads.empty());
  CHECK(backend.counts().gradients.empty());
  CHECK(backend.counts().matmul_quantized == 1);
  CHECK(backend.counts().matmul_transposed_quantized == 1);
}

TEST_CASE("what backward is not asked for is not computed") {
  const Counting backend;
  auto layer = make_layer(backend);
  const auto x = test::normal_matrix<float>(tokens, in, 3), dy = test::normal_matrix<float>(tokens, out, 4);
  qd::Matrix<float> y(tokens, out), dx(tokens, in);
  Layer<>::Context context;
  layer.forward(x.view(), y.view(), context);
  SECTION("no dx: the base weight is not touched") {
    backend.forget();
    layer.backward(dy.view(), {}, context);
    CHECK(backend.counts().matmul_transposed_quantized == 0);
    CHECK(backend.counts().gradients.size() == 2);
  }
  SECTION("no gradients: only dx") {
    backend.forget();
    layer.backward(dy.view(), dx.view(), context, qd::GradientMode::ignore);
    CHECK(backend.counts().matmul_transposed_quantized == 1);
    CHECK(backend.counts().gradients.empty());
  }
  SECTION("neither: nothing") {
    backend.forget();
    layer.backward(dy.view(), {}, context, qd::GradientMode::ignore);
    CHECK(backend.counts().matmul_transposed_quantized == 0);
    CHECK(backend.counts().dense_reads.empty());
    CHECK(backend.counts().gradients.empty());
  }
}

TEST_CASE("a strict optimizer updates the rows that were trained and no others") {
  const Counting backend;
  using Rows = qd::AdamWOptions::UntouchedRows;
  auto layer = make_layer(backend);
  qd::AdamW<float, Counting> strict{layer.parameters(), {.untouched_rows = Rows::strict}, backend};
  qd::AdamW<float, Counting> dense{layer.parameters(), {.untouched_rows = Rows::dense}, backend};
  const auto x = test::normal_matrix<float>(tokens, in, 3), dy = test::normal_matrix<float>(tokens, out, 4);
  strict.zero_grad();
  layer.set_rank(3);
  layer.forward(x);
  layer.backward(dy.view());
  backend.forget();
  const double norm = strict.step().gradient_norm;
  CHECK(backend.counts().adamw_elements == 3 * (in + out));
  CHECK(backend.counts().squared_elements == 3 * (in + out));
  backend.forget();
  CHECK(dense.step().gradient_norm == Approx(norm).epsilon(1e-12));  // the other rows' gradients are zero
  CHECK(backend.counts().adamw_elements == max_rank * (in + out));
  CHECK(backend.counts().squared_elements == max_rank * (in + out));
  backend.forget();
  strict.zero_grad();
  CHECK(backend.counts().filled_elements == 3 * (in + out));
  for (const auto& p : layer.parameters())
    CHECK(std::all_of(p->gradient.span().begin(), p->gradient.span().end(), [](float g) { return g == 0.0f; }));
  backend.forget();
  strict.zero_grad();
  CHECK(backend.counts().filled_elements == 0);
  dense.zero_grad();
  CHECK(backend.counts().filled_elements == max_rank * (in + out));
}

TEST_CASE("a layer computes the same on the counting backend and on the CPU") {
  const Counting backend;
  auto counted = make_layer(backend);
  qd::DynamicLoRALinear<float> plain(test::normal_matrix<float>(out, in, 1, 0.1), {.max_rank = max_rank});
  qd::Rng rng(2);
  test::fill_normal(plain.adapter().b().value.view(), rng, 0.1);
  const auto x = test::normal_matrix<float>(tokens, in, 3), dy = test::normal_matrix<float>(tokens, out, 4);
  CHECK(test::same_bits(counted.forward(x), plain.forward(x)));
  CHECK(test::same_bits(counted.backward(dy.view()), plain.backward(dy.view())));
  CHECK(test::same_bits(counted.adapter().a().gradient.view(), plain.adapter().a().gradient.view()));
  CHECK(test::same_bits(counted.adapter().b().gradient.view(), plain.adapter().b().gradient.view()));
}

}  // namespace counting_test
