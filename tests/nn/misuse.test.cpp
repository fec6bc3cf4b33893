// What a caller can do wrong with a layer: each a typed error that names the layer, none of them undefined.
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <vector>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/random_data.hpp"

namespace misuse_test {

namespace qd = qdylora;
using qd::Errc;
using qd::Index;
using Float = qd::Matrix<float>;
using Layer = qd::DynamicLoRALinear<float>;

namespace {

constexpr Index in = 24, out = 16, max_rank = 4;
const std::string layer_name = "layers.7.down_proj";

Layer make_layer() { return {test::normal_matrix<float>(out, in, 1), {.max_rank = max_rank, .name = layer_name}}; }

// The call fails with this code, and says which layer it was and these words.
void fails(Errc code, const std::function<void()>& call, const std::vector<std::string>& words = {}) {
  const auto error = test::error_of(call);
  REQUIRE(error);
  const std::string message = error->what();
  CAPTURE(message);
  CHECK(name(error->code()) == name(code));
  CHECK(message.find(layer_name) != std::string::npos);
  for (const auto& word : words) {
    CAPTURE(word);
    CHECK(message.find(word) != std::string::npos);
  }
}

}  // namespace

TEST_CASE("ranks outside 0 ... max_rank are refused by name and number") {
  Layer layer = make_layer();
  fails(Errc::rank_range, [&] { layer.set_rank(5); }, {"5", "4"});
  fails(Errc::rank_range, [&] { layer.set_rank(-1); }, {"-1"});
  fails(Errc::rank_range, [&] { layer.set_rank(std::numeric_limits<Index>::max()); });
  fails(Errc::rank_range, [&] { layer.set_ranks(qd::RankPlan::uniform(6)); }, {"6"});
  fails(Errc::rank_range, [&] { layer.set_ranks(qd::RankPlan::of_runs({{2, 1}, {1, 9}})); }, {"9"});
  fails(Errc::rank_range, [&] { layer.merged_weight(5); }, {"5"});
  fails(Errc::rank_range, [&] { layer.merged_weight(-2); }, {"-2"});
  CHECK(test::code_of([&] { qd::set_ranks(qd::RankPlan::uniform(5), layer); }) == Errc::rank_range);
  // and the layer works as before
  const Float x = test::normal_matrix<float>(3, in, 2);
  CHECK(layer.forward(x).rows == 3);
}

TEST_CASE("matrices of the wrong shape are refused with both shapes") {
  Layer layer = make_layer();
  const Float x(9, in), narrow(9, in - 1), dy(9, out), short_dy(8, out), wide_dy(9, out + 1);
  Float y(9, out), short_y(8, out), wide_y(9, out + 1), dx(9, in), narrow_dx(9, in - 1), long_dx(10, in);
  Layer::Context context;
  fails(Errc::shape_mismatch, [&] { layer.forward(narrow); }, {"x", "[9, 24]", "[9, 23]"});
  fails(Errc::shape_mismatch, [&] { layer.forward(narrow.view(), y.view(), context); }, {"x", "[9, 24]", "[9, 23]"});
  fails(Errc::shape_mismatch, [&] { layer.forward(x.view(), short_y.view(), context); }, {"y", "[9, 16]", "[8, 16]"});
  fails(Errc::shape_mismatch, [&] { layer.forward(x.view(), wide_y.view(), context); }, {"y", "[9, 17]"});
  layer.forward(x.view(), y.view(), context);
  fails(Errc::shape_mismatch, [&] { layer.backward(short_dy.view(), dx.view(), context); }, {"dy", "[9, 16]", "[8, 16]"});
  fails(Errc::shape_mismatch, [&] { layer.backward(wide_dy.view(), dx.view(), context); }, {"dy", "[9, 17]"});
  fails(Errc::shape_mismatch, [&] { layer.backward(dy.view(), narrow_dx.view(), context); }, {"dx", "[9, 24]", "[9, 23]"});
  fails(Errc::shape_mismatch, [&] { layer.backward(dy.view(), long_dx.view(), context); }, {"dx", "[10, 24]"});
  layer.forward(x);
  fails(Errc::shape_mismatch, [&] { layer.backward(short_dy.view()); }, {"dy"});
}

TEST_CASE("a view whose rows overlap is refused") {
  Layer layer = make_layer();
  const Float x(9, in);
  Float y(9, out);
  Layer::Context context;
  fails(Errc::shape_mismatch, [&] { layer.forward({x.data(), 9, in, in - 4}, y.view(), context); }, {"x", "stride 20"});
  fails(Errc::shape_mismatch, [&] { layer.forward(x.view(), {y.data(), 9, out, 3}, context); }, {"y", "stride 3"});
}

TEST_CASE("ranks for another number of rows are refused") {
  Layer layer = make_layer();
  const Float x(9, in);
  layer.set_ranks(qd::RankPlan::of_runs({{4, 1}, {4, 2}}));
  fails(Errc::shape_mismatch, [&] { layer.forward(x); }, {"8", "9"});
  layer.set_ranks(qd::RankPlan::of_runs({{8, 0}}));  // also where no row has the adapter on
  fails(Errc::shape_mismatch, [&] { layer.forward(x); }, {"8", "9"});
}

TEST_CASE("backward before forward is refused") {
  Layer layer = make_layer();
  const Float dy(9, out);
  Float dx(9, in);
  Layer::Context context;
  fails(Errc::state_order, [&] { layer.backward(dy.view()); }, {"backward before forward"});
  fails(Errc::state_order, [&] { layer.backward(dy.view(), dx.view(), context); });
  fails(Errc::state_order, [&] { layer.backward(dy.view(), {}, context, qd::GradientMode::ignore); });
}

TEST_CASE("a forward pass that failed is not a forward pass") {
  Layer layer = make_layer();
  const Float x(9, in), dy(9, out);
  Float y(9, out), dx(9, in);
  Layer::Context context;
  layer.set_ranks(qd::RankPlan::of_runs({{8, 2}}));
  CHECK(test::code_of([&] { layer.forward(x.view(), y.view(), context); }) == Errc::shape_mismatch);
  fails(Errc::state_order, [&] { layer.backward(dy.view(), dx.view(), context); });
}

TEST_CASE("options outside their range are refused when the layer is made") {
  const Float weight = test::normal_matrix<float>(out, in, 1);
  constexpr float nan = std::numeric_limits<float>::quiet_NaN(), infinity = std::numeric_limits<float>::infinity();
  const auto refused = [&](Errc code, qd::LoRAOptions options, const std::vector<std::string>& words = {}) {
    options.name = layer_name;
    fails(code, [&] { Layer(weight, options); }, words);
  };
  refused(Errc::rank_range, {.max_rank = 0}, {"max_rank", "0"});
  refused(Errc::rank_range, {.max_rank = -8}, {"-8"});
  refused(Errc::rank_range, {.max_rank = 65536}, {"65536"});
  refused(Errc::bad_argument, {.alpha = 0.0f}, {"alpha"});
  refused(Errc::bad_argument, {.alpha = -1.0f}, {"alpha"});
  refused(Errc::bad_argument, {.alpha = nan}, {"alpha"});
  refused(Errc::bad_argument, {.alpha = infinity}, {"alpha"});
  refused(Errc::bad_argument, {.dropout = 1.0f}, {"dropout"});
  refused(Errc::bad_argument, {.dropout = -0.1f}, {"dropout"});
  refused(Errc::bad_argument, {.dropout = nan}, {"dropout"});
  refused(Errc::rank_range, {.max_rank = 4, .gated_ranks = {2, 8}}, {"8"});
  refused(Errc::rank_range, {.max_rank = 4, .gated_ranks = {0}});
  refused(Errc::rank_range, {.max_rank = 4, .gated_ranks = {2, 2}});
}

TEST_CASE("a bias must be a row of the outputs") {
  Layer layer = make_layer();
  fails(Errc::shape_mismatch, [&] { layer.set_bias(Float(1, out + 1).view()); }, {"bias", "[1, 16]", "[1, 17]"});
  fails(Errc::shape_mismatch, [&] { layer.set_bias(Float(out, 1).view()); }, {"bias"});
  CHECK(layer.bias().size() == 0);
}

TEST_CASE("a weight that is not finite is refused when it is quantized") {
  Float weight = test::normal_matrix<float>(out, in, 1);
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()}) {
    weight(3, 5) = bad;
    CHECK(test::code_of([&] { Layer(weight, {.max_rank = max_rank, .name = layer_name}); }) == Errc::non_finite);
  }
}

TEST_CASE("empty batches pass through") {
  Layer layer = make_layer();
  const Float x(0, in), dy(0, out);
  for (const Index rank : {Index{0}, max_rank}) {
    layer.set_rank(rank);
    CHECK(layer.forward(x).rows == 0);
    CHECK(layer.backward(dy.view()).rows == 0);
  }
  layer.set_ranks(qd::RankPlan::of_runs({{0, 3}}));
  CHECK(layer.forward(x).rows == 0);
  CHECK(layer.backward(dy.view()).rows == 0);
  for (const auto& p : layer.parameters())
    for (const float g : p->gradient.span()) CHECK(g == 0.0f);
}

TEST_CASE("a base that is no base is refused") {
  fails(Errc::bad_argument, [] { Layer(std::shared_ptr<const Layer::WeightType>(), {.max_rank = max_rank, .name = layer_name}); });
}

}  // namespace misuse_test
