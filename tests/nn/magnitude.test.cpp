// DoRA: outputs and merged weights against the formula in plain loops, gradients against central differences with the norms held, and what
// magnitudes leave alone: rank 0, an untrained adapter, re-ordering, rows of other ranks.
#include <algorithm>
#include <cmath>
#include <memory>
#include <string>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>
#include <qdylora/nn/reorder.hpp>
#include <qdylora/optim/adamw.hpp>

#include "support/catch.hpp"
#include "support/counted_memory.hpp"
#include "support/counting_backend.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/gradcheck.hpp"
#include "support/random_data.hpp"

namespace magnitude_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using qd::ScalePolicy;
using Double = qd::Matrix<double>;
using Float = qd::Matrix<float>;
using test::same_bits;

static_assert(qd::HasMagnitude<qd::Cpu, float> && qd::HasMagnitude<qd::Cpu, double> && qd::HasMagnitude<qd::Cpu, qd::bfloat16> &&
              qd::HasMagnitude<qd::Cpu, qd::half> && qd::HasMagnitude<test::CountingBackend, qd::bfloat16>);
static_assert(!qd::HasMagnitude<test::CountedDevice, float>);

namespace {

constexpr Index in = 7, out = 6, max_rank = 5;

template <class Layer>
void fill(Layer& layer, double deviation = 0.5) {
  qd::Rng rng(11);
  auto& adapter = layer.adapter();
  test::fill_normal(adapter.b().value.view(), rng, deviation);
  if (adapter.gated()) test::fill_normal(adapter.gates().value.view(), rng);
  if (adapter.dora())
    for (auto& m : adapter.magnitude().value.span()) m *= static_cast<std::remove_reference_t<decltype(m)>>(rng.uniform(0.5f, 1.5f));
}

// W + delta W_b in plain loops, and its rows made as long as m.
template <class Layer>
Double dora_weight(const Layer& layer, Index rank) {
  const auto& adapter = layer.adapter();
  Double w = qd::clone(test::converted<double>(layer.merged_weight(0).view()).view());
  if (rank == 0) return w;
  const auto c = adapter.coefficients(rank, rank);
  for (Index o = 0; o < w.rows(); ++o) {
    double squares = 0.0;
    for (Index k = 0; k < w.cols(); ++k) {
      for (Index i = 0; i < rank; ++i)
        w(o, k) += static_cast<double>(c[static_cast<std::size_t>(i)]) * static_cast<double>(adapter.b().value(i, o)) *
                   static_cast<double>(adapter.a().value(i, k));
      squares += w(o, k) * w(o, k);
    }
    for (Index k = 0; k < w.cols(); ++k) w(o, k) *= static_cast<double>(adapter.magnitude().value(0, o)) / std::sqrt(squares);
  }
  return w;
}

// dropout(x) of a layer's adapter in a pass of training, by the definition of the mask; x itself without dropout.
template <class Layer>
Double dropped(const Layer& layer, const Double& x, bool training, std::uint32_t step) {
  Double result = qd::clone(x.view());
  const auto& o = layer.adapter().options();
  if (!training || o.dropout == 0.0f) return result;
  for (Index i = 0; i < x.size(); ++i) {
    const auto word = qd::random_word(o.seed, qd::Purpose::dropout, o.layer, step, static_cast<std::uint64_t>(i));
    const bool keep = static_cast<double>(word) >= static_cast<double>(o.dropout) * 0x1p32;
    result.data()[i] = keep ? x.data()[i] / (1.0 - static_cast<double>(o.dropout)) : 0.0;
  }
  return result;
}

// What PEFT's DoraLinearLayer.forward adds to the base's output, in plain loops: with f = m / |W + D|,
//   y = x W^T + bias + (f - 1) * x' W^T + f * x' D^T,  x' = dropout(x)
template <class Layer>
Double peft_output(const Layer& layer, const Double& x, const Double& masked, const qd::RankPlan& plan) {
  const auto& adapter = layer.adapter();
  const Double w = qd::clone(test::converted<double>(layer.merged_weight(0).view()).view());
  Double y(x.rows(), w.rows());
  plan.for_each_run(x.rows(), [&](Index first, Index count, Index rank) {
    const auto c = adapter.coefficients(rank, rank);
    for (Index o = 0; o < w.rows(); ++o) {
      std::vector<double> d(static_cast<std::size_t>(w.cols()));
      double squares = 0.0;
      for (Index k = 0; k < w.cols(); ++k) {
        for (Index i = 0; i < rank; ++i)
          d[static_cast<std::size_t>(k)] += c[static_cast<std::size_t>(i)] * adapter.b().value(i, o) * adapter.a().value(i, k);
        squares += std::pow(w(o, k) + d[static_cast<std::size_t>(k)], 2);
      }
      const double f = rank == 0 ? 1.0 : adapter.magnitude().value(0, o) / std::sqrt(squares);
      for (Index t = first; t < first + count; ++t) {
        double sum = layer.bias()(0, o);
        for (Index k = 0; k < w.cols(); ++k)
          sum += x(t, k) * w(o, k) + masked(t, k) * ((f - 1.0) * w(o, k) + f * d[static_cast<std::size_t>(k)]);
        y(t, o) = sum;
      }
    }
  });
  return y;
}

// The largest difference between y and x W_b^T + bias of each row's rank b.
template <class T, class Layer>
double worst(qd::MatrixView<T> y, const Layer& layer, const qd::Matrix<std::remove_const_t<T>>& x, const qd::RankPlan& plan) {
  double result = 0.0;
  plan.for_each_run(y.rows, [&](Index first, Index count, Index rank) {
    const Double w = dora_weight(layer, rank);
    for (Index t = first; t < first + count; ++t)
      for (Index o = 0; o < w.rows(); ++o) {
        double expected = layer.bias().cols > 0 ? static_cast<double>(layer.bias()(0, o)) : 0.0;
        for (Index k = 0; k < w.cols(); ++k) expected += static_cast<double>(x(t, k)) * w(o, k);
        const double difference = std::fabs(static_cast<double>(y(t, o)) - expected);
        result = difference <= result ? result : difference;  // NaN passes
      }
  });
  return result;
}

std::vector<qd::RankPlan> plans(Index tokens) {
  std::vector<qd::RankPlan> result;
  for (Index rank = 0; rank <= max_rank; ++rank) result.push_back(qd::RankPlan::uniform(rank));
  std::vector<Index> ranks;
  for (Index i = 0; i < tokens; ++i) ranks.push_back((3 * i + 2) % (max_rank + 1));
  result.push_back(qd::RankPlan::per_row(ranks));
  std::vector<qd::RankPlan::Run> runs;  // long enough for products of their own
  for (Index left = tokens, rank = max_rank; left > 0; left -= 16, --rank) runs.push_back({std::min<Index>(left, 16), rank});
  result.push_back(qd::RankPlan::of_runs(runs));
  return result;
}

template <class Format, class T = double>
qd::DynamicLoRALinear<T, qd::Cpu, Format> make_layer(qd::LoRAOptions options, Index rows = out, Index cols = in) {
  options.dora = true;
  qd::DynamicLoRALinear<T, qd::Cpu, Format> layer(test::normal_matrix<double>(rows, cols, 10, 0.4), options, {}, qd::Cpu(1));
  layer.set_bias(test::normal_matrix<qd::Accumulator<T>>(1, rows, 12).view());
  fill(layer);
  return layer;
}

std::vector<qd::LoRAOptions> all_options() {
  std::vector<qd::LoRAOptions> all;
  for (const auto scale : {ScalePolicy::constant, ScalePolicy::over_rank, ScalePolicy::over_sqrt_rank})
    for (const auto& gates : {std::vector<Index>{}, std::vector<Index>{2, 4, 5}})
      all.push_back({.max_rank = max_rank, .alpha = 3.0f, .scale = scale, .seed = 5, .gated_ranks = gates});
  return all;
}

/// The gradients of x and of all parameters against central differences.
template <class Loss, class Parameters>
void check_all(const Loss& loss, Double& x, const Double& dx, const Parameters& parameters) {
  const auto check = [&](const std::string& name, std::span<double> values, std::span<const double> gradient) {
    const auto report = test::check_gradient(loss, values, gradient, {.absolute = 1e-7, .relative = 1e-6});
    CAPTURE(name, report.element, report.analytic, report.numeric);
    CHECK(report.ok());
  };
  check("x", x.span(), dx.span());
  for (const auto& p : parameters) check(p->name, p->value.span(), p->gradient.span());
}

template <class Format>
void check_gradients(const qd::LoRAOptions& options, Index tokens) {
  auto layer = make_layer<Format>(options);
  layer.set_training(false);  // from here on the norms of a pass are those of the first one: the function whose gradient is taken
  auto& adapter = layer.adapter();
  auto parameters = layer.parameters();
  for (const auto& p : adapter.gate_parameters()) parameters.push_back(p);
  Double x = test::normal_matrix<double>(tokens, in, 13);
  const Double c = test::normal_matrix<double>(tokens, out, 14);
  Double y(tokens, out), dx(tokens, in);
  for (const auto& plan : plans(tokens)) {
    CAPTURE(plan.is_uniform(), plan.max_rank(), tokens, name(options.scale), options.gated_ranks.size());
    layer.set_ranks(plan);
    for (const auto& p : parameters) std::fill_n(p->gradient.data(), p->gradient.size(), 0.0);
    typename decltype(layer)::Context context;
    layer.forward(x.view(), y.view(), context);
    CHECK(worst(y.view(), layer, x, plan) < 1e-12);
    layer.backward(c.view(), dx.view(), context);
    const auto loss = [&] {
      layer.forward(x.view(), y.view(), context);
      double sum = 0.0;
      for (Index i = 0; i < y.size(); ++i) sum += c.data()[i] * y.data()[i];
      return sum;
    };
    loss();
    check_all(loss, x, dx, parameters);
    const auto& m = adapter.magnitude().gradient.span();
    CHECK(std::any_of(m.begin(), m.end(), [](double g) { return g != 0.0; }) == (plan.max_rank() > 0));
  }
}

}  // namespace

TEST_CASE("DoRA's gradients agree with central differences at every rank, and its outputs with plain loops") {
  for (const auto& options : all_options())
    for (const Index tokens : {3, 40}) {
      check_gradients<qd::Dense<double>>(options, tokens);
      check_gradients<qd::NF4>(options, tokens);
    }
}

// The masks and the norms of a pass are held: with both, the loss is a function that central differences know, here in plain loops.
TEST_CASE("DoRA with dropout: outputs are PEFT's formula in plain loops, gradients central differences with the norms and masks held") {
  for (const auto& gates : {std::vector<Index>{}, std::vector<Index>{2, 5}})
    for (const Index tokens : {3, 40}) {
      auto layer = make_layer<qd::NF4>({.max_rank = max_rank, .alpha = 3.0f, .dropout = 0.3f, .seed = 5, .layer = 2, .gated_ranks = gates});
      constexpr std::uint32_t step = 7;
      auto& adapter = layer.adapter();
      Double x = test::normal_matrix<double>(tokens, in, 13);
      const Double c = test::normal_matrix<double>(tokens, out, 14);
      Double y(tokens, out), dx(tokens, in);
      auto parameters = layer.parameters();
      for (const auto& p : adapter.gate_parameters()) parameters.push_back(p);
      for (const auto& plan : plans(tokens)) {
        CAPTURE(plan.is_uniform(), plan.max_rank(), tokens, gates.size());
        layer.set_ranks(plan);
        layer.set_training(true, step);
        for (const auto& p : parameters) std::fill_n(p->gradient.data(), p->gradient.size(), 0.0);
        typename decltype(layer)::Context context;
        layer.forward(x.view(), y.view(), context);
        CHECK(test::normalised_squared_error(y.view(), peft_output(layer, x, dropped(layer, x, true, step), plan).view()) < 1e-24);
        layer.backward(c.view(), dx.view(), context);
        CHECK((context.dropped.size() > 0) == (plan.max_rank() > 0));

        // The loss with the norms as they are now.
        const Double base = qd::clone(layer.merged_weight(0).view());
        std::vector<std::vector<double>> norms(static_cast<std::size_t>(max_rank) + 1, std::vector<double>(static_cast<std::size_t>(out)));
        for (Index rank = 1; rank <= max_rank; ++rank) {
          const auto coefficients = adapter.coefficients(rank, rank);
          for (Index o = 0; o < out; ++o) {
            double squares = 0.0;
            for (Index k = 0; k < in; ++k) {
              double sum = base(o, k);
              for (Index i = 0; i < rank; ++i)
                sum += coefficients[static_cast<std::size_t>(i)] * adapter.b().value(i, o) * adapter.a().value(i, k);
              squares += sum * sum;
            }
            norms[static_cast<std::size_t>(rank)][static_cast<std::size_t>(o)] = std::sqrt(squares);
          }
        }
        const auto loss = [&] {
          const Double masked = dropped(layer, x, true, step);
          double total = 0.0;
          plan.for_each_run(tokens, [&](Index first, Index count, Index rank) {
            const auto coefficients = adapter.coefficients(rank, rank);
            for (Index t = first; t < first + count; ++t) {
              std::vector<double> z(static_cast<std::size_t>(rank));
              for (Index i = 0; i < rank; ++i) {
                for (Index k = 0; k < in; ++k) z[static_cast<std::size_t>(i)] += masked(t, k) * adapter.a().value(i, k);
                z[static_cast<std::size_t>(i)] *= coefficients[static_cast<std::size_t>(i)];
              }
              for (Index o = 0; o < out; ++o) {
                double plain = layer.bias()(0, o), v = 0.0, d = 0.0;
                for (Index k = 0; k < in; ++k) {
                  plain += x(t, k) * base(o, k);
                  v += masked(t, k) * base(o, k);
                }
                for (Index i = 0; i < rank; ++i) d += z[static_cast<std::size_t>(i)] * adapter.b().value(i, o);
                const double f =
                    rank == 0 ? 1.0 : adapter.magnitude().value(0, o) / norms[static_cast<std::size_t>(rank)][static_cast<std::size_t>(o)];
                total += c(t, o) * (plain + (f - 1.0) * v + f * d);
              }
            }
          });
          return total;
        };
        check_all(loss, x, dx, parameters);
        // Evaluation has no masks: PEFT's formula of x itself, which is m / |W + D| times the product.
        layer.set_training(false);
        layer.forward(x.view(), y.view(), context);
        CHECK(worst(y.view(), layer, x, plan) < 1e-12);
      }
    }
}

TEST_CASE("an adapter that has learned nothing leaves the base as it is, bit for bit") {
  for (const Index tokens : {1, 5, 40}) {
    qd::DynamicLoRALinear<float> plain(test::normal_matrix<float>(100, 96, 1, 0.1), {.max_rank = 8});
    const float dropout = GENERATE(0.0f, 0.5f);
    qd::DynamicLoRALinear<float> dora(plain.base(), {.max_rank = 8, .dropout = dropout, .dora = true});
    for (auto* layer : {&plain, &dora}) layer->set_bias(test::normal_matrix<float>(1, 100, 3).view());
    const Float x = test::normal_matrix<float>(tokens, 96, 5);
    for (const Index rank : {0, 1, 8}) {
      plain.set_rank(0);
      dora.set_rank(rank);
      CHECK(same_bits(dora.forward(x), plain.forward(x)));
    }
    // and so do trained ones at rank 0
    fill(dora);
    auto ranks = std::vector<Index>(static_cast<std::size_t>(tokens), 0);
    if (tokens > 1) ranks.back() = 8;
    dora.set_ranks(qd::RankPlan::per_row(ranks));
    const auto y = qd::clone(dora.forward(x));
    const Index off = tokens > 1 ? tokens - 1 : 1;
    CHECK(same_bits(y.view().top_rows(off), plain.forward(x).top_rows(off)));
    if (tokens > 1) CHECK_FALSE(same_bits(y.view().middle_rows(off, 1), plain.forward(x).middle_rows(off, 1)));
  }
}

TEST_CASE("a batch of mixed ranks has each rank's norms: row by row the bits of single-rank batches") {
  auto layer = make_layer<qd::NF4, float>({.max_rank = 20, .alpha = 8.0f, .scale = ScalePolicy::over_rank}, 100, 96);
  for (const Index tokens : {5, 33, 100}) {
    const Float x = test::normal_matrix<float>(tokens, 96, 5), dy = test::normal_matrix<float>(tokens, 100, 6);
    std::vector<Index> ranks;
    for (Index i = 0; i < tokens; ++i) ranks.push_back(std::vector<Index>{0, 1, 4, 20}[static_cast<std::size_t>(i * i % 4)]);
    layer.set_ranks(qd::RankPlan::per_row(ranks));
    const auto y = qd::clone(layer.forward(x));
    const auto dx = qd::clone(layer.backward(dy.view()));
    for (const Index rank : {0, 1, 4, 20}) {
      layer.set_rank(rank);
      const auto single_y = qd::clone(layer.forward(x));
      const auto single_dx = qd::clone(layer.backward(dy.view()));
      for (Index i = 0; i < tokens; ++i)
        if (ranks[static_cast<std::size_t>(i)] == rank) {
          CHECK(same_bits(y.view().middle_rows(i, 1), single_y.view().middle_rows(i, 1)));
          CHECK(same_bits(dx.view().middle_rows(i, 1), single_dx.view().middle_rows(i, 1)));
        }
    }
  }
}

TEST_CASE("activations of 16 bits have factors of 32") {
  const auto check = [](auto type, double tolerance) {
    using T = decltype(type);
    auto layer = make_layer<qd::NF4, T>({.max_rank = 8, .alpha = 8.0f}, 40, 96);
    const auto x = test::normal_matrix<T>(20, 96, 5), dy = test::normal_matrix<T>(20, 40, 6);
    auto exact = make_layer<qd::NF4, double>({.max_rank = 8, .alpha = 8.0f}, 40, 96);
    for (std::size_t i = 0; i < 3; ++i)
      qd::copy<double>(test::converted<double>(std::as_const(layer.parameters()[i]->value).view()), exact.parameters()[i]->value.view());
    layer.set_rank(5);
    exact.set_rank(5);
    const auto wide_x = test::converted<double>(x.view()), wide_dy = test::converted<double>(dy.view());
    CHECK(test::normalised_squared_error(layer.forward(x), exact.forward(wide_x)) < tolerance);
    CHECK(test::normalised_squared_error(layer.backward(dy.view()), exact.backward(wide_dy.view())) < tolerance);
    for (std::size_t i = 0; i < 3; ++i)
      CHECK(test::normalised_squared_error(layer.parameters()[i]->gradient.view(), exact.parameters()[i]->gradient.view()) < tolerance);
  };
  check(float{}, 1e-12);
  check(qd::bfloat16{}, 1e-4);
  check(qd::half{}, 1e-5);
}

TEST_CASE("a merged weight's rows have the length of their magnitude, and compute what the layer does") {
  const auto layer = make_layer<qd::NF4, double>({.max_rank = 6, .alpha = 6.0f, .gated_ranks = {3}}, 40, 30);
  for (const Index rank : {0, 1, 3, 6}) {
    const auto merged = layer.merged_weight(rank);
    const auto expected = dora_weight(layer, rank);
    CHECK(test::normalised_squared_error(merged.view(), expected.view()) < 1e-24);
    for (Index o = 0; rank > 0 && o < 40; ++o)
      CHECK(qd::as_eigen(merged.view()).row(o).norm() == Approx(std::fabs(layer.adapter().magnitude().value(0, o))));
  }
}

TEST_CASE("re-ordering keeps magnitudes, and at full rank norms and outputs") {
  auto layer = make_layer<qd::NF4, float>({.max_rank = 16, .alpha = 16.0f}, 64, 96);
  layer.adapter().start_collecting();
  const auto x = test::normal_matrix<float>(50, 96, 3), dy = test::normal_matrix<float>(50, 64, 4);
  layer.set_rank(16);
  const auto before = qd::clone(layer.forward(x)), merged = layer.merged_weight(16);
  layer.backward(dy.view());
  const auto magnitude = qd::clone(layer.adapter().magnitude().value.view());
  for (const auto kind : {qd::Reordering::gram, qd::Reordering::svd}) {
    const auto a = qd::clone(layer.adapter().a().value.view());
    qd::reorder(layer.adapter(), kind);
    CHECK_FALSE(same_bits(layer.adapter().a().value.view(), a.view()));
    CHECK(same_bits(layer.adapter().magnitude().value.view(), magnitude.view()));
    CHECK(test::normalised_squared_error(layer.forward(x), before.view()) < 1e-11);
    CHECK(test::normalised_squared_error(layer.merged_weight(16).view(), merged.view()) < 1e-11);
  }
}

TEST_CASE("norms kept while evaluating are those of the adapter as it is, however it was changed") {
  const auto fresh_output = [](const auto& layer, const Float& x) {  // of another layer of the same values
    qd::DynamicLoRALinear<float> other(layer.base(), layer.adapter().options());
    for (std::size_t i = 0; i < 3; ++i)
      qd::copy<float>(std::as_const(layer.parameters()[i]->value).view(), other.parameters()[i]->value.view());
    other.set_bias(layer.bias());
    return qd::clone(other.forward(x));
  };
  auto layer = make_layer<qd::NF4, float>({.max_rank = 8, .alpha = 8.0f}, 64, 96);
  layer.set_training(false);
  qd::AdamW<float> optimizer(layer.parameters(), {.lr = 0.05});
  const auto x = test::normal_matrix<float>(20, 96, 3), dy = test::normal_matrix<float>(20, 64, 4);
  for (int step = 0; step < 3; ++step) {
    CHECK(same_bits(layer.forward(x), fresh_output(layer, x).view()));
    optimizer.zero_grad();
    layer.backward(dy.view());
    optimizer.step();
  }
  CHECK(same_bits(layer.forward(x), fresh_output(layer, x).view()));
  qd::reorder(layer.adapter());
  CHECK(same_bits(layer.forward(x), fresh_output(layer, x).view()));
  for (float& b : layer.parameters()[1]->value.span()) b *= -2.0f;
  layer.set_training(false);
  CHECK(same_bits(layer.forward(x), fresh_output(layer, x).view()));
}

TEST_CASE("W is multiplied once more while training, and in evaluation once for each rank; plain LoRA pays nothing") {
  using Layer = qd::DynamicLoRALinear<float, test::CountingBackend>;
  const test::CountingBackend backend;
  const Layer base(test::normal_matrix<float>(24, 32, 1), {}, {}, backend);
  const auto x = test::normal_matrix<float>(9, 32, 2);
  const auto products = [&](auto& layer, Index rank) {
    layer.set_rank(rank);
    backend.forget();
    layer.forward(x);
    CHECK(backend.counts().dequantize == 0);
    return backend.counts().matmul_quantized;
  };
  Layer plain(base.base(), {.max_rank = 4}, backend), dora(base.base(), {.max_rank = 4, .dora = true}, backend);
  CHECK(products(plain, 4) == 1);
  CHECK(plain.parameters().size() == 2);
  CHECK(products(dora, 4) == 2);
  CHECK(products(dora, 4) == 2);
  CHECK(products(dora, 0) == 1);
  Layer masked(base.base(), {.max_rank = 4, .dropout = 0.1f, .dora = true}, backend);
  CHECK(products(masked, 4) == 3);  // of the dropped input too
  CHECK(products(masked, 0) == 1);
  dora.set_training(false);
  masked.set_training(false);
  CHECK(products(masked, 4) == 2);
  CHECK(products(masked, 4) == 1);
  CHECK(products(dora, 4) == 2);
  CHECK(products(dora, 4) == 1);
  CHECK(products(dora, 2) == 2);
  CHECK(products(dora, 4) == 1);
}

TEST_CASE("a weight's row of zeros has no direction, and its outputs and gradients stay finite") {
  Float w = test::normal_matrix<float>(4, 8, 1);
  std::fill_n(w.view().row(2), 8, 0.0f);
  qd::DynamicLoRALinear<float, qd::Cpu, qd::Dense<float>> layer(w, {.max_rank = 2, .dora = true});
  const auto x = test::normal_matrix<float>(3, 8, 2), dy = test::normal_matrix<float>(3, 4, 3);
  CHECK(layer.adapter().magnitude().value(0, 2) == 0.0f);
  const auto y = layer.forward(x);
  for (Index t = 0; t < 3; ++t) CHECK(y(t, 2) == 0.0f);
  layer.backward(dy.view());
  for (const auto& p : layer.parameters())
    for (const float g : p->gradient.span()) CHECK(std::isfinite(g));
  CHECK(layer.adapter().b().gradient(0, 2) != 0.0f);
}

TEST_CASE("what magnitudes do not go with is refused by name") {
  const auto refused = [](auto&& make) {
    const auto error = test::error_of(make);
    REQUIRE(error);
    CHECK(error->code() == Errc::unsupported);
    CHECK(std::string(error->what()).find("layers.7.up") != std::string::npos);
  };
  const test::CountedDevice device;
  refused([&] {
    qd::DynamicLoRALinear<float, test::CountedDevice, qd::Dense<float>>(
        std::make_shared<qd::WeightFor<qd::Dense<float>, test::CountedMemory>>(qd::Matrix<float, test::CountedMemory>(8, 8)),
        {.name = "layers.7.up", .dora = true}, device);
  });
}

}  // namespace magnitude_test
