// Layers and optimizers on the emulated device, beside the same on the CPU.
#include <memory>

#include <qdylora/cpu/cpu.hpp>
#include <qdylora/cuda.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>
#include <qdylora/nn/multi_lora_linear.hpp>
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

  Trained(const Backend& backend, qd::LoRAOptions options, Index outputs = out, Index inputs = in)
      : backend_(backend),
        in_(inputs),
        out_(outputs),
        weight_(upload(qd::clone(test::normal_matrix<Acc>(outputs, inputs, 1, 0.3).view()))),
        layer_(biased(weight_.view(), std::move(options))),
        optimizer_(layer_.parameters(), {.lr = 1e-2, .weight_decay = 0.1, .max_gradient_norm = 1.0}, backend) {}

  /// Forward, backward and an update; y and dx.
  std::pair<Matrix<T>, Matrix<T>> step(const qd::RankPlan& plan, std::uint32_t number) {
    auto host_x = test::normal_matrix<T>(tokens, in_, 10 + number), host_dy = test::normal_matrix<T>(tokens, out_, 20 + number);
    if (auto* const spoiled = std::exchange(spoil_x_, false) ? &host_x : std::exchange(spoil_dy_, false) ? &host_dy : nullptr)
      (*spoiled)(7, 3) = test::not_a_number<T>();
    const auto x = upload(host_x), dy = upload(host_dy);
    layer_.set_ranks(plan);
    layer_.set_training(true, number);
    optimizer_.zero_grad();
    auto y = on_host<T>(backend_, layer_.forward(x));
    auto dx = on_host<T>(backend_, layer_.backward(dy.view()));
    norm_ = optimizer_.step().gradient_norm;
    return {std::move(y), std::move(dx)};
  }

  /// A number of the next step's x, or dy, is none.
  void spoil(bool in_x) { (in_x ? spoil_x_ : spoil_dy_) = true; }
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
  qd::DynamicLoRALinear<T, Backend> biased(qd::MatrixView<const Acc> weight, qd::LoRAOptions options) {
    qd::DynamicLoRALinear<T, Backend> layer(weight, std::move(options), {}, backend_);
    layer.set_bias(upload(qd::clone(test::normal_matrix<Acc>(1, out_, 2).view())).view());
    return layer;
  }
  template <class S>
  qd::Matrix<S, Memory> upload(const Matrix<S>& x) {
    qd::Matrix<S, Memory> there(x.rows(), x.cols());
    backend_.upload(x.view(), there.view());
    backend_.synchronize();
    return there;
  }

  Backend backend_;
  Index in_, out_;
  qd::Matrix<Acc, Memory> weight_;
  qd::DynamicLoRALinear<T, Backend> layer_;
  qd::AdamW<T, Backend> optimizer_;
  double norm_ = 0.0;
  bool spoil_x_ = false, spoil_dy_ = false;
};

/// Kernels that were launched, ever; -1 where nobody counts.
long launches() {
#ifdef QDYLORA_CUDA_EMULATOR
  return test::emulator::machine().launches;
#else
  return -1;
#endif
}

/// The same of cuBLASLt's products.
long products() {
#ifdef QDYLORA_CUDA_EMULATOR
  return test::emulator::machine().products;
#else
  return -1;
#endif
}

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
  struct Case {
    float dropout;
    qd::GradientRows policy;
    bool dora, bias;
  };
  constexpr auto prefix = qd::GradientRows::prefix, last_row = qd::GradientRows::last_row;
  for (const auto& [dropout, policy, dora, bias] : {Case{0.0f, prefix, false, false}, Case{0.25f, prefix, false, true},
                                                    Case{0.0f, last_row, false, false}, Case{0.25f, last_row, false, false},
                                                    Case{0.0f, prefix, true, false}, Case{0.25f, prefix, true, true}}) {
    const qd::LoRAOptions options{.max_rank = 16,
                                  .alpha = 8,
                                  .gradient_rows = policy,
                                  .dropout = dropout,
                                  .seed = 3,
                                  .layer = 1,
                                  .dora = dora,
                                  .train_bias = bias};
    Trained<T, Cpu> expected(Cpu(1), options);
    Trained<T, Cuda> found(Cuda(context), options);
    CHECK(test::same_bits(found.numbers()[0].view(), expected.numbers()[0].view()));
    std::uint32_t number = 0;
    for (const auto& plan : {qd::RankPlan::uniform(16), qd::RankPlan::uniform(5), qd::RankPlan::uniform(0),
                             qd::RankPlan::of_runs({{20, 16}, {20, 3}}), qd::RankPlan::of_runs({{7, 2}, {3, 0}, {30, 16}})}) {
      CAPTURE(dropout, dora, bias, number);
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

TEMPLATE_TEST_CASE("a layer of many tokens is one product with its adapter where what it makes is wider", "[cuda]", qd::bfloat16, qd::half) {
  using T = TestType;
  constexpr bool in_bfloat16 = std::is_same_v<T, qd::bfloat16>;
  const double limit = in_bfloat16 ? 3e-2 : 4e-3;
  const auto context_of = [](Index ratio) {
    return std::make_unique<qd::CudaContext>(
        qd::CudaOptions{.workspace_bytes = std::size_t{4} << 20, .product_limits = {.small_batch = 0, .tiles = 0, .augmented = ratio}});
  };
  const auto augmenting = context_of(-1), apart = context_of(0);
  struct Case {
    Index out, in;
    float dropout;
    bool dora;
  };
  for (const auto& [out, in, dropout, dora] : {Case{200, 64, 0.0f, false}, Case{64, 200, 0.0f, false}, Case{200, 64, 0.25f, false},
                                               Case{64, 200, 0.25f, false}, Case{64, 200, 0.0f, true}}) {
    const qd::LoRAOptions options{.max_rank = 16, .alpha = 8, .dropout = dropout, .seed = 3, .layer = 1, .dora = dora};
    Trained<T, Cpu> expected(Cpu(1), options, out, in);
    Trained<T, Cuda> found(Cuda(*augmenting), options, out, in), separate(Cuda(*apart), options, out, in);
    std::uint32_t number = 0;
    for (const auto& plan : {qd::RankPlan::uniform(16), qd::RankPlan::uniform(5), qd::RankPlan::uniform(0),
                             qd::RankPlan::of_runs({{20, 16}, {20, 3}}), qd::RankPlan::of_runs({{7, 2}, {3, 0}, {30, 16}})}) {
      CAPTURE(out, in, dropout, dora, number);
      const auto [y, dx] = expected.step(plan, number);
      const auto count = [&](Trained<T, Cuda>& layer) {
        const long before = products();
        const auto [device_y, device_dx] = layer.step(plan, number);
        const long made = products() - before;
        CHECK(distance(device_y, y) <= limit);
        CHECK(distance(device_dx, dx) <= limit);
        return made;
      };
      const long together = count(found), one_by_one = count(separate);
      const bool forward = out > in && !dora, backward = in > out && in_bfloat16 && dropout == 0.0f;
      if (products() >= 0 && plan.max_rank() > 0 && plan.is_uniform()) CHECK(one_by_one - together == (forward || backward ? 1 : 0));
      ++number;
    }
    const auto a = found.numbers(), b = expected.numbers();
    for (std::size_t i = 0; i < a.size(); ++i) {
      CAPTURE(i);
      CHECK(distance(a[i], b[i]) <= 5 * limit);
    }
  }
}

TEMPLATE_TEST_CASE("moments on the device are the CPU's, and do not keep what is not finite", "[cuda]", float, double, qd::bfloat16) {
  using T = TestType;
  using Acc = qd::Accumulator<T>;
  const qd::CudaContext context({.workspace_bytes = std::size_t{4} << 20});
  const auto moments_of = [](const auto& backend) {
    Trained<T, std::remove_cvref_t<decltype(backend)>> trained(backend, {.max_rank = 16, .alpha = 8, .seed = 3});
    trained.step(qd::RankPlan::uniform(16), 0);  // B is zero until then
    auto& adapter = trained.layer().adapter();
    adapter.start_collecting(backend);
    const auto both = [&] {
      return std::pair(on_host<Acc>(backend, std::as_const(adapter.moment_a).view()),
                       on_host<Acc>(backend, std::as_const(adapter.moment_b).view()));
    };
    trained.step(qd::RankPlan::uniform(5), 1);
    const auto kept = both();
    for (const bool in_x : {true, false}) {
      trained.spoil(in_x);
      trained.step(qd::RankPlan::uniform(16), 2);
      const auto after = both();
      CHECK(test::same_bits(after.first.view(), kept.first.view()));
      CHECK(test::same_bits(after.second.view(), kept.second.view()));
    }
    trained.step(qd::RankPlan::uniform(16), 3);
    return both();
  };
  const auto expected = moments_of(Cpu(1)), found = moments_of(Cuda(context));
  const double limit = std::is_same_v<T, double> ? 1e-12 : std::is_same_v<T, float> ? 2e-5 : 3e-2;
  CHECK(distance(found.first, expected.first) <= limit);
  CHECK(distance(found.second, expected.second) <= limit);
}

TEMPLATE_TEST_CASE("a layer's few tokens have their adapter's term in the same launch", "[cuda]", qd::bfloat16, qd::half) {
  using T = TestType;
  // Rows of whole chunks go to the fused kernel; where that is switched off, through slabs.
  const qd::CudaContext fusing({.workspace_bytes = std::size_t{4} << 20});
  const qd::CudaContext apart({.workspace_bytes = std::size_t{4} << 20, .product_limits = {.small_batch = 0, .tiles = 0}});
  const auto weight = test::normal_matrix<float>(out, in, 1, 0.3), b = test::normal_matrix<float>(16, out, 2, 0.1);
  const auto bias = test::normal_matrix<float>(1, out, 3);
  for (const Index count : {1, 6, 20}) {
    const auto x = test::normal_matrix<T>(count, in, 4);
    std::vector<qd::RankPlan> plans{qd::RankPlan::uniform(0), qd::RankPlan::uniform(16), qd::RankPlan::uniform(5)};
    if (count > 2) plans.push_back(qd::RankPlan::of_runs({{1, 3}, {count - 3, 0}, {2, 16}}));
    if (count > 16) plans.push_back(qd::RankPlan::of_runs({{16, 2}, {count - 16, 0}}));  // long enough for products of its own
    Matrix<T> base;
    for (const auto& plan : plans) {
      CAPTURE(count, plan.max_rank(), plan.is_uniform());
      const auto forward = [&](const Cuda& cuda, Matrix<double>& expected, Matrix<float>& z) {
        const auto upload = [&](const auto& host) {
          qd::Matrix<typename std::remove_cvref_t<decltype(host)>::value_type, qd::DeviceMemory> there(host.rows(), host.cols());
          cuda.upload(host.view(), there.view());
          cuda.synchronize();
          return there;
        };
        qd::DynamicLoRALinear<T, Cuda> layer(upload(weight).view(), {.max_rank = 16, .alpha = 24, .seed = 5}, {}, cuda);
        layer.set_bias(upload(bias).view());
        cuda.upload(b.view(), layer.adapter().b().value.view());
        layer.set_ranks(plan);
        layer.set_training(false);
        typename qd::DynamicLoRALinear<T, Cuda>::Context context;
        const auto device_x = upload(x);
        qd::Matrix<T, qd::DeviceMemory> y(count, out);
        layer.forward(device_x.view(), y.view(), context);  // which keeps A and B rounded
        const long before = launches();
        layer.forward(device_x.view(), y.view(), context);
        if (&cuda.context() == &fusing && plan.is_uniform() && count <= 8 && before >= 0)
          CHECK(launches() - before == 2);  // the layer's product with its adapter's, the bias
        z = on_host<float>(cuda, std::as_const(context.z).view());
        const auto a = on_host<float>(cuda, std::as_const(layer.adapter().a().value).view());
        expected = Matrix<double>(count, out);
        const auto host_weight = qd::quantize(weight.view());
        qd::reference::matmul(x.view(), host_weight.view(), expected.view(), qd::Update::overwrite);
        plan.for_each_run(count, [&](Index first, Index rows, Index rank) {
          for (Index i = first; i < first + rows; ++i)
            for (Index j = 0; j < out; ++j) {
              expected(i, j) += static_cast<double>(bias(0, j));
              for (Index r = 0; r < rank; ++r) {
                double h = 0.0;
                for (Index k = 0; k < in; ++k) h += static_cast<double>(x(i, k)) * static_cast<double>(a(r, k));
                expected(i, j) += 1.5 * h * static_cast<double>(b(r, j));
              }
            }
        });
        return on_host<T>(cuda, std::as_const(y).view());
      };
      Matrix<double> expected, same;
      Matrix<float> z, other_z;
      const auto together = forward(Cuda(fusing), expected, z), separate = forward(Cuda(apart), same, other_z);
      CHECK(test::normalised_squared_error(together.view(), expected.view()) <= test::bound<T>());
      CHECK(test::normalised_squared_error(separate.view(), expected.view()) <= 2 * test::bound<T>());  // y is rounded once more
      // What backward needs. Of one rank it is made in the launch; in the other's products of more than 8 tokens, A is rounded to 16 bits.
      if (plan.max_rank() > 0 && plan.is_uniform())
        CHECK(test::normalised_squared_error(z.view(), test::in_double(other_z.view()).view()) <= test::bound<T>());
      else
        CHECK(test::same_bits(z.view(), other_z.view()));
      // A row of rank 0 is the base's, to the bit.
      if (plan.max_rank() == 0) base = qd::clone(together.view());
      else
        plan.for_each_run(count, [&](Index first, Index rows, Index rank) {
          if (rank == 0) CHECK(test::same_bits(together.view().middle_rows(first, rows), base.view().middle_rows(first, rows)));
        });
    }
  }
}

TEMPLATE_TEST_CASE("adapters mixed in a batch on the device have the bits of separate passes", "[cuda]", float, qd::bfloat16) {
  using T = TestType;
  constexpr Index width = 128;  // rows of which are whole multiples of 256 bytes
  const qd::CudaContext context({.workspace_bytes = std::size_t{4} << 20});
  const Cuda cuda(context);
  const auto upload = [&](const auto& host) {
    qd::Matrix<typename std::remove_cvref_t<decltype(host)>::value_type, qd::DeviceMemory> there(host.rows(), host.cols());
    cuda.upload(host.view(), there.view());
    cuda.synchronize();
    return there;
  };
  const auto weight = upload(test::normal_matrix<float>(width, width, 1, 0.3));
  const auto layers = [&] {
    std::vector<qd::DynamicLoRALinear<T, Cuda>> all;
    all.emplace_back(weight.view(), qd::LoRAOptions{.max_rank = 16, .alpha = 8, .dropout = 0.2f, .seed = 5}, qd::QuantizeOptions{}, cuda);
    all.emplace_back(all.front().base(), qd::LoRAOptions{.max_rank = 4, .seed = 6}, cuda);
    all.emplace_back(all.front().base(), qd::LoRAOptions{.max_rank = 8, .seed = 7, .dora = true}, cuda);
    for (auto& layer : all) {
      cuda.upload(test::normal_matrix<float>(layer.adapter().max_rank(), width, layer.adapter().options().seed, 0.1).view(),
                  layer.adapter().b().value.view());
      layer.set_training(true, 2);
    }
    cuda.synchronize();
    return all;
  };
  qd::MultiLoRALinear<T, Cuda> mixed(layers());
  auto alone = layers();
  const auto plan = qd::AdapterPlan::of_runs({{3, 2, 8}, {20, 0, 16}, {1, 1, 4}, {10, 0, 3}, {2, 2, 5}, {4, 1, 0}});
  const auto x = test::normal_matrix<T>(tokens, width, 8), dy = test::normal_matrix<T>(tokens, width, 9);
  const auto device_x = upload(x), device_dy = upload(dy);
  mixed.set_plan(plan);
  const auto y = on_host<T>(cuda, mixed.forward(device_x)), dx = on_host<T>(cuda, mixed.backward(device_dy.view()));
  for (const auto& share : plan.shares(tokens)) {
    CAPTURE(share.adapter);
    auto& layer = alone[static_cast<std::size_t>(share.adapter)];
    const auto rows_of = [&](const Matrix<T>& from) {
      Matrix<T> some(static_cast<Index>(share.rows.size()), width);
      Cpu(1).gather_rows(from.view(), std::span<const Index>(share.rows), some.view());
      return some;
    };
    layer.set_ranks(share.ranks);
    const auto own_x = upload(rows_of(x)), own_dy = upload(rows_of(dy));
    CHECK(test::same_bits(on_host<T>(cuda, layer.forward(own_x)).view(), rows_of(y).view()));
    CHECK(test::same_bits(on_host<T>(cuda, layer.backward(own_dy.view())).view(), rows_of(dx).view()));
    const auto found = mixed.at(share.adapter).parameters(), expected = layer.parameters();
    for (std::size_t i = 0; i < expected.size(); ++i)
      CHECK(test::same_bits(on_host<float>(cuda, std::as_const(found[i]->gradient).view()).view(),
                            on_host<float>(cuda, std::as_const(expected[i]->gradient).view()).view()));
  }
}

TEST_CASE("magnitudes on the device begin as the norms of the base's rows, of codes and of dense weights", "[cuda]") {
  const qd::CudaContext context({.workspace_bytes = std::size_t{4} << 20});
  const Cuda cuda(context);
  const auto weight = test::normal_matrix<float>(out, in, 1, 0.3);
  qd::Matrix<float, qd::DeviceMemory> there(out, in);
  cuda.upload(weight.view(), there.view());
  const auto check = [&](auto format) {
    using Format = decltype(format);
    const qd::LoRAOptions options{.max_rank = 4, .dora = true};
    const qd::DynamicLoRALinear<float, Cuda, Format> found(there.view(), options, {}, cuda);
    const qd::DynamicLoRALinear<float, Cpu, Format> expected(weight, options, {}, Cpu(1));
    const auto m = on_host<float>(cuda, found.adapter().magnitude().value.view());
    CHECK(distance(m, qd::clone(expected.adapter().magnitude().value.view())) <= 1e-7);
  };
  check(qd::NF4{});
  check(qd::FP8E4M3{});
  check(qd::INT4{});
  check(qd::Dense<float>{});
}

TEST_CASE("an adapter with gates is refused on the device", "[cuda]") {
  const qd::CudaContext context({.workspace_bytes = std::size_t{4} << 20});
  qd::LoRAOptions options{.max_rank = 4, .name = "up", .gated_ranks = {1, 4}};
  CHECK(test::code_of([&] { qd::LoRAAdapter<float, qd::DeviceMemory>(8, 8, options); }) == qd::Errc::unsupported);
}

// What a product of few tokens reads of A and B is rounded, and kept while a layer does not train.
TEMPLATE_TEST_CASE("factors that a layer keeps are those of its adapter", "[cuda]", qd::bfloat16, qd::half) {
  using T = TestType;
  const qd::CudaContext context({.workspace_bytes = std::size_t{4} << 20});
  if (context.compute_capability() < 80) SKIP("products with adapters need a device of compute capability 8.0, and code for one");
  const Cuda cuda(context);
  constexpr Index few = 3, max_rank = 8;
  const auto weight = qd::quantize(test::normal_matrix<float>(out, in, 1, 0.3).view());
  const auto base = std::make_shared<const qd::WeightFor<qd::NF4, Cuda::Memory>>(cuda.upload(weight));
  qd::DynamicLoRALinear<T, Cuda> layer(base, {.max_rank = max_rank, .alpha = 4, .seed = 3}, cuda);
  const auto host_x = test::normal_matrix<T>(few, in, 2), host_dy = test::normal_matrix<T>(few, out, 4);
  const test::Remote<Cuda, T> x(cuda, host_x.view(), 0), dy(cuda, host_dy.view(), 0);
  qd::Matrix<T, Cuda::Memory> y(few, out), dx(few, in);
  typename qd::DynamicLoRALinear<T, Cuda>::Context pass;
  Matrix<float> a(max_rank, in), b(max_rank, out);
  std::uint64_t seed = 10;
  const auto change = [&](auto& adapter) {
    a = qd::clone(test::normal_matrix<float>(max_rank, in, ++seed, 0.2).view());
    b = qd::clone(test::normal_matrix<float>(max_rank, out, ++seed, 0.2).view());
    cuda.upload(a.view(), adapter.a().value.view());
    cuda.upload(b.view(), adapter.b().value.view());
    cuda.synchronize();
  };
  const auto rounded = [](const Matrix<float>& factor, Index rows) {
    Matrix<T> result(rows, factor.cols());
    for (Index i = 0; i < result.size(); ++i) result.data()[i] = static_cast<T>(factor.data()[i]);
    return result;
  };
  // Whether y is what the adapter makes of x at a rank; the emulator sees a read of memory that was given back.
  const auto is_right = [&](Index rank) {
    const auto ra = rounded(a, rank), rb = rounded(b, rank);
    Matrix<double> u(few, rank), expected(few, out);
    test::reference::matmul(host_x.view(), weight.view(), expected.view(), qd::Update::overwrite);
    test::reference::matmul(host_x.view(), ra.view(), u.view(), qd::Update::overwrite);
    for (double& value : u.span()) value *= 0.5;
    test::reference::matmul_transposed(std::as_const(u).view(), rb.view(), expected.view(), qd::Update::accumulate);
    const auto found = on_host<T>(cuda, std::as_const(y).view());
    return std::sqrt(test::normalised_squared_error(found.view(), std::as_const(expected).view())) < (std::is_same_v<T, qd::half> ? 1e-3 : 8e-3);
  };
  const auto forward = [&](Index rank) {
    layer.set_rank(rank);
    layer.forward(x.in(), y.view(), pass);
    return is_right(rank);
  };
  auto& behind = std::as_const(layer).adapter();
  auto& parameters = const_cast<std::remove_cvref_t<decltype(behind)>&>(behind);

  for (const bool training : {true, false}) {
    CAPTURE(training);
    layer.set_training(training);
    change(layer.adapter());
    CHECK(forward(max_rank));
    CHECK(forward(3));
    change(layer.adapter());  // which says so
    CHECK(forward(5));
    change(parameters);
    CHECK(forward(5) == training);  // kept, by one who was not told
    layer.set_training(training);
    CHECK(forward(5));
    layer.backward(dy.in(), dx.view(), pass);
    change(parameters);  // what an optimizer does after it
    CHECK(forward(5));
    layer.backward(dy.in(), dx.view(), pass, qd::GradientMode::ignore);
    change(parameters);
    CHECK(forward(2) == training);
    layer.adapter();
    CHECK(forward(2));
#ifdef QDYLORA_CUDA_EMULATOR
    // One launch a pass where factors are kept; two more round them in training.
    const long before = launches();
    CHECK(forward(2));
    CHECK(launches() - before == (training ? 3 : 1));
#endif
    // A recorded training step rounds them each time; a recorded forward pass reads those that are kept.
    const auto step = [&] {
      layer.forward(x.in(), y.view(), pass);
      layer.backward(dy.in(), dx.view(), pass);
    };
    step();
    const qd::CudaGraph recorded_step(context, step);
    change(parameters);
    recorded_step.launch();
    CHECK(is_right(2));
    layer.forward(x.in(), y.view(), pass);
    const qd::CudaGraph recorded(context, [&] { layer.forward(x.in(), y.view(), pass); });
    cuda.fill(y.view(), T{});
    recorded.launch();
    CHECK(is_right(2));
    // The memory of those that are kept is the layer's, whatever it does since.
    layer.set_training(true);
    layer.forward(x.in(), y.view(), pass);
    layer.set_training(false);
    layer.forward(x.in(), y.view(), pass);
    cuda.fill(y.view(), T{});
    recorded.launch();
    CHECK(is_right(2));
    // What is recorded is not done: a pass that is taken down after a change rounds by itself, and others do not take it for done.
    layer.set_training(training);
    layer.forward(x.in(), y.view(), pass);
    change(layer.adapter());
    const qd::CudaGraph later(context, [&] { layer.forward(x.in(), y.view(), pass); });
    layer.forward(x.in(), y.view(), pass);
    CHECK(is_right(2));
    layer.set_training(false);
    qd::DynamicLoRALinear<T, Cuda> fresh(base, {.max_rank = max_rank, .alpha = 4, .seed = 3}, cuda);
    fresh.set_training(false);
    fresh.set_rank(2);
    typename qd::DynamicLoRALinear<T, Cuda>::Context first;
    CHECK(test::code_of([&] { qd::CudaGraph(context, [&] { fresh.forward(x.in(), y.view(), first); }); }) == qd::Errc::state_order);
    cuda.upload(a.view(), fresh.adapter().a().value.view());
    cuda.upload(b.view(), fresh.adapter().b().value.view());
    cuda.synchronize();
    fresh.forward(x.in(), y.view(), first);
    CHECK(is_right(2));
  }
}

}  // namespace layers_test
