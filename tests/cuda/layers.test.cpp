// Layers and optimizers on the emulated device, beside the same on the CPU.
#include <qdylora/cpu/cpu.hpp>
#include <qdylora/cuda.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>
#include <qdylora/optim/adamw.hpp>

#include "backend/harness.inc"
#include "support/catch.hpp"

namespace layers_test {

namespace qd = qdylora;
using qd::Cpu, qd::Cuda, qd::Index;
using test::Matrix, test::MatrixView;

namespace {

constexpr Index in = 128, out = 72, tokens = 40;

template <class S, class Backend>
Matrix<S> on_host(const Backend& backend, MatrixView<const S> x) {
  Matrix<S> host(x.rows, x.cols);
  backend.download(x, host.view());
  return host;
}

/// A layer and its optimizer; all of it in the backend's memory but what is asked for.
template <class T, class Backend>
class Trained {
 public:
  using Acc = qd::Accumulator<T>;
  using Memory = typename Backend::Memory;

  Trained(const Backend& backend, qd::LoRAOptions options)
      : backend_(backend),
        weight_(upload(qd::clone(test::normal_matrix<Acc>(out, in, 1, 0.3).view()))),
        layer_(weight_.view(), std::move(options), {}, backend),
        optimizer_(layer_.parameters(), {.lr = 1e-2, .weight_decay = 0.1, .max_gradient_norm = 1.0}, backend) {
    layer_.set_bias(upload(qd::clone(test::normal_matrix<Acc>(1, out, 2).view())).view());
  }

  /// Forward, backward and an update; y and dx.
  std::pair<Matrix<T>, Matrix<T>> step(const qd::RankPlan& plan, std::uint32_t number) {
    const auto x = upload(test::normal_matrix<T>(tokens, in, 10 + number)), dy = upload(test::normal_matrix<T>(tokens, out, 20 + number));
    layer_.set_ranks(plan);
    layer_.set_training(true, number);
    optimizer_.zero_grad();
    auto y = on_host<T>(backend_, layer_.forward(x));
    auto dx = on_host<T>(backend_, layer_.backward(dy.view()));
    norm_ = optimizer_.step().gradient_norm;
    return {std::move(y), std::move(dx)};
  }

  double gradient_norm() const { return norm_; }
  auto& layer() { return layer_; }
  std::vector<Matrix<Acc>> numbers() {
    std::vector<Matrix<Acc>> all;
    for (const auto& p : layer_.parameters())
      for (const auto& m : {&p->value, &p->gradient}) all.push_back(on_host<Acc>(backend_, std::as_const(*m).view()));
    for (const auto& s : optimizer_.states())
      for (const auto& m : {&s.m, &s.v}) all.push_back(on_host<Acc>(backend_, m->view()));
    return all;
  }
  Matrix<Acc> merged(Index rank) { return on_host<Acc>(backend_, std::as_const(layer_).merged_weight(rank).view()); }

 private:
  template <class S>
  qd::Matrix<S, Memory> upload(const Matrix<S>& x) {
    qd::Matrix<S, Memory> there(x.rows(), x.cols());
    backend_.upload(x.view(), there.view());
    backend_.synchronize();
    return there;
  }

  Backend backend_;
  qd::Matrix<Acc, Memory> weight_;
  qd::DynamicLoRALinear<T, Backend> layer_;
  qd::AdamW<T, Backend> optimizer_;
  double norm_ = 0.0;
};

/// Root mean square of the difference, relative to that of `expected`.
template <class S>
double distance(const Matrix<S>& found, const Matrix<S>& expected) {
  return std::sqrt(test::normalised_squared_error(found.view(), test::in_double(expected.view()).view()));
}

}  // namespace

TEMPLATE_TEST_CASE("a layer trained on the device is the one that the CPU trains", "[cuda]", float, double, qd::bfloat16, qd::half) {
  using T = TestType;
  const double limit = std::is_same_v<T, double> ? 1e-12 : std::is_same_v<T, float> ? 2e-5 : std::is_same_v<T, qd::half> ? 4e-3 : 3e-2;
  const qd::CudaContext context({.workspace_bytes = std::size_t{4} << 20});
  for (const float dropout : {0.0f, 0.25f})
    for (const auto policy : {qd::GradientRows::prefix, qd::GradientRows::last_row}) {
      const qd::LoRAOptions options{.max_rank = 16, .alpha = 8, .gradient_rows = policy, .dropout = dropout, .seed = 3, .layer = 1};
      Trained<T, Cpu> expected(Cpu(1), options);
      Trained<T, Cuda> found(Cuda(context), options);
      CHECK(test::same_bits(found.numbers()[0].view(), expected.numbers()[0].view()));
      std::uint32_t number = 0;
      for (const auto& plan : {qd::RankPlan::uniform(16), qd::RankPlan::uniform(5), qd::RankPlan::uniform(0),
                               qd::RankPlan::of_runs({{20, 16}, {20, 3}}), qd::RankPlan::of_runs({{7, 2}, {3, 0}, {30, 16}})}) {
        CAPTURE(dropout, number);
        const auto [y, dx] = expected.step(plan, number);
        const auto [device_y, device_dx] = found.step(plan, number);
        CHECK(distance(device_y, y) <= limit);
        CHECK(distance(device_dx, dx) <= limit);
        CHECK(std::fabs(found.gradient_norm() - expected.gradient_norm()) <= limit * (1e-6 + expected.gradient_norm()));
        ++number;
      }
      const auto a = found.numbers(), b = expected.numbers();
      REQUIRE(a.size() == b.size());
      for (std::size_t i = 0; i < a.size(); ++i) {
        CAPTURE(i);
        CHECK(distance(a[i], b[i]) <= 5 * limit);
      }
      CHECK(distance(found.merged(5), expected.merged(5)) <= limit);
    }
}

TEST_CASE("an adapter with gates is refused on the device", "[cuda]") {
  const qd::CudaContext context({.workspace_bytes = std::size_t{4} << 20});
  qd::LoRAOptions options{.max_rank = 4, .name = "up", .gated_ranks = {1, 4}};
  CHECK(test::code_of([&] { qd::LoRAAdapter<float, qd::DeviceMemory>(8, 8, options); }) == qd::Errc::unsupported);
}

}  // namespace layers_test
