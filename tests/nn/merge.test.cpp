// A layer merged for inference and unmerged: not a bit of it has changed.
#include <cstddef>
#include <string>
#include <variant>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/random_data.hpp"

namespace merge_test {

namespace qd = qdylora;
using qd::Index;
using Float = qd::Matrix<float>;

namespace {

constexpr Index in = 96, out = 72;

template <class Format, class T = float>
qd::DynamicLoRALinear<T, qd::Cpu, Format> trained_layer(qd::LoRAOptions options) {
  options.max_rank = 8;
  qd::DynamicLoRALinear<T, qd::Cpu, Format> layer(test::normal_matrix<float>(out, in, 1, 0.1), options);
  qd::Rng rng(5);
  layer.set_bias(test::normal_matrix<float>(1, out, 2).view());
  test::fill_normal(layer.adapter().b().value.view(), rng, 0.1);
  if (options.train_bias) test::fill_normal(layer.adapter().bias().value.view(), rng, 1.0);
  return layer;
}

bool same(const Float& a, const Float& b) { return test::same_bits(a.view(), b.view()); }

/// A weight as its storage has it, dense or in codes.
template <class T>
std::vector<std::byte> bytes_of(const qd::Matrix<T>& w) {
  const auto bytes = std::as_bytes(w.span());
  return {bytes.begin(), bytes.end()};
}
std::vector<std::byte> bytes_of(const qd::NF4Tensor& w) {
  std::vector<std::byte> all;
  const auto append = [&](const auto& part) {
    const auto bytes = std::as_bytes(part.span());
    all.insert(all.end(), bytes.begin(), bytes.end());
  };
  append(w.codes());
  append(w.scales().codes);
  append(w.scales().nested_absmax);
  return all;
}
template <class Layer>
std::vector<std::byte> base_bytes(const Layer& layer) {
  return std::visit([](const auto& w) { return bytes_of(w); }, layer.base()->storage());
}

/// What a step of training leaves: the output, the gradients, and the output after them.
template <class Layer>
std::vector<Float> step(Layer& layer, const Float& x, const Float& dy) {
  std::vector<Float> all;
  layer.set_ranks(qd::RankPlan::uniform(5));
  all.push_back(qd::clone(layer.forward(x)));
  all.push_back(qd::clone(layer.backward(dy.view())));
  for (const auto& p : layer.parameters()) {
    all.push_back(qd::clone(p->gradient.view()));
    for (std::size_t i = 0; i < p->value.span().size(); ++i) p->value.span()[i] -= 0.01f * p->gradient.span()[i];
  }
  all.push_back(qd::clone(layer.forward(x)));
  return all;
}

}  // namespace

TEMPLATE_TEST_CASE("merge and unmerge leave a layer's bits, and training goes on as without them", "", qd::NF4, qd::Dense<qd::bfloat16>,
                   qd::Dense<float>) {
  const Float x = test::normal_matrix<float>(20, in, 7), dy = test::normal_matrix<float>(20, out, 9);
  for (const auto& options : {qd::LoRAOptions{.alpha = 6.0f}, qd::LoRAOptions{.dora = true}, qd::LoRAOptions{.train_bias = true}}) {
    CAPTURE(options.dora, options.train_bias);
    auto layer = trained_layer<TestType>(options), alone = trained_layer<TestType>(options);
    const auto* const base = layer.base().get();
    const auto bytes = base_bytes(layer);
    for (const Index rank : {8, 3, 0}) {
      layer.set_ranks(qd::RankPlan::uniform(rank));
      const auto before = qd::clone(layer.forward(x));
      const auto sum = layer.merged_weight(rank);
      layer.merge(rank);
      CHECK(layer.merged());
      layer.set_ranks(qd::RankPlan::uniform(1));  // is of no consequence
      const auto merged = qd::clone(layer.forward(x));
      CHECK(test::normalised_squared_error(merged.view(), before.view()) < 1e-11);
      if (rank > 0) CHECK_FALSE(same(merged, before));  // it was another product
      CHECK(same(layer.merged_weight(rank), sum));
      layer.unmerge();
      CHECK_FALSE(layer.merged());
      layer.set_ranks(qd::RankPlan::uniform(rank));
      CHECK(same(qd::clone(layer.forward(x)), before));
    }
    CHECK(layer.base().get() == base);
    CHECK(base_bytes(layer) == bytes);
    const auto with = step(layer, x, dy), without = step(alone, x, dy);
    REQUIRE(with.size() == without.size());
    for (std::size_t i = 0; i < with.size(); ++i) CHECK(same(with[i], without[i]));
  }
}

TEST_CASE("what a merged layer cannot do is said") {
  auto layer = trained_layer<qd::NF4>({.name = "up"});
  const Float x = test::normal_matrix<float>(4, in, 7), dy = test::normal_matrix<float>(4, out, 9);
  Float y(4, out);
  layer.forward(x);
  layer.merge(4);
  const auto fails = [](qd::Errc code, auto call, const std::string& word) {
    const auto error = test::error_of(call);
    REQUIRE(error);
    CAPTURE(std::string(error->what()));
    CHECK(error->code() == code);
    CHECK(std::string(error->what()).find(word) != std::string::npos);
  };
  const auto refused = [&](auto call) { fails(qd::Errc::state_order, call, "up: merged at rank 4; unmerge() comes first"); };
  refused([&] { layer.backward(dy.view()); });
  refused([&] { layer.set_base(layer.base()); });
  typename decltype(layer)::Context context;
  refused([&] { layer.forward_adapter(x.view(), y.view(), context); });
  // Nor is there a backward pass of what was forward while it was merged.
  layer.forward(x);
  layer.unmerge();
  fails(qd::Errc::state_order, [&] { layer.backward(dy.view()); }, "backward before forward");
  fails(qd::Errc::rank_range, [&] { layer.merge(9); }, "9");
  CHECK_FALSE(layer.merged());
  layer.forward(x);
  layer.backward(dy.view());
}

}  // namespace merge_test
