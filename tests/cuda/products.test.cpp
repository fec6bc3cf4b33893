// Products on the emulated device: the bodies that the CPU passes, and what is the device's own.
#include <qdylora/cuda.hpp>

#include "backend/products.inc"
#include "support/stream_orders.hpp"

namespace products_test {

namespace qd = qdylora;
using qd::Cuda;
using qd::Index;
using test::Matrix, test::MatrixView;

namespace {

class Gpu {
 public:
  explicit Gpu(qd::CudaOptions options = {.workspace_bytes = std::size_t{4} << 20}) : context_(options) {}
  operator Cuda() const { return Cuda(context_); }

 private:
  qd::CudaContext context_;
};

}  // namespace

#define ON_THE_DEVICE(name, body)                                             \
  TEMPLATE_TEST_CASE(name, "[cuda]", float, double, qd::bfloat16, qd::half) { \
    const Gpu gpu;                                                            \
    body<Cuda, TestType>(gpu);                                                \
  }

TEMPLATE_TEST_CASE("quantized products on the device are the reference's", "[cuda]", float, qd::bfloat16, qd::half) {  // double: below
  const Gpu gpu;
  test::quantized_products<Cuda, TestType>(gpu);
}
ON_THE_DEVICE("dense products on the device are the reference's", test::dense_products)
ON_THE_DEVICE("dense products with other types on the device", test::dense_products_with_weights_of_other_types)
ON_THE_DEVICE("weight gradients on the device are the reference's", test::weight_gradients)
ON_THE_DEVICE("truncated adapters on the device", test::products_with_the_first_rows_of_an_adapter)
ON_THE_DEVICE("products on the device refuse other shapes", test::products_refuse_other_shapes)

TEMPLATE_TEST_CASE("few tokens with long rows of another type", "[cuda]", float, double, qd::bfloat16, qd::half) {
  using T = TestType;
  const Gpu gpu;
  const test::ProductShape shapes[] = {{1, 1, 2048}, {3, 5, 2050}, {8, 2, 5000}};
  test::dense_products_of<Cuda, T, qd::half, T, T>(gpu, shapes);
  test::dense_products_of<Cuda, T, float, T, T>(gpu, shapes);
}

TEMPLATE_TEST_CASE("products go slab by slab through little memory", "[cuda]", float, double, qd::bfloat16, qd::half) {
  using T = TestType;
  const test::ProductShape shapes[] = {{33, 49, 65}, {20, 130, 259}, {40, 31, 640}};
  const auto products = [&](const Gpu& gpu) {
    test::quantized_products_of<qd::NF4, qd::DoubleQuant<>, Cuda, T>(gpu, shapes, 64);
    test::quantized_products_of<qd::FP8E4M3, qd::Float32Scales, Cuda, T>(gpu, shapes, 32);
    test::dense_products_of<Cuda, T, qd::half, T, T>(gpu, shapes);
    test::dense_products_of<Cuda, T, float, T, T>(gpu, shapes);
  };
  test::in_every_order([&] { products(Gpu({.workspace_bytes = 60000, .slab_bytes = 20000})); });
  products(Gpu({.workspace_bytes = 60000, .slab_bytes = 20000, .overlap_slabs = false}));
}

TEST_CASE("gradients in float that half could not hold make half results", "[cuda]") {
  const auto check = [](const Gpu& gpu, Index tokens, const auto& host, const auto& there) {
    const Cuda cuda = gpu;
    const auto x = test::normal_matrix<float>(tokens, host.rows, 1, 2e-9), same_x = test::normal_matrix<float>(tokens, host.cols, 2, 2e-9);
    const test::Remote<Cuda, float> remote_x(cuda, x.view()), remote_same(cuda, same_x.view());
    for (const auto update : test::both_updates) {
      test::Output<Cuda, qd::half> back(cuda, tokens, host.cols, update), forth(cuda, tokens, host.rows, update);
      cuda.matmul_transposed(remote_x.in(), there, back.view(), update);
      test::reference::matmul_transposed(x.view(), host, back.expected(), update);
      back.check(test::bound<qd::half>());
      cuda.matmul(remote_same.in(), there, forth.view(), update);
      test::reference::matmul(same_x.view(), host, forth.expected(), update);
      forth.check(test::bound<qd::half>());
    }
  };
  for (const std::size_t workspace : {std::size_t{60000}, std::size_t{1} << 20}) {
    const Gpu gpu({.workspace_bytes = workspace, .slab_bytes = 20000});
    const Cuda cuda = gpu;
    for (const Index tokens : {3, 40}) {
      const auto w = test::normal_matrix<float>(130, 259, 4, 1e5);
      const test::Remote<Cuda, float> remote(cuda, w.view());
      check(gpu, tokens, MatrixView<const float>(w.view()), remote.in());
      const auto rounded = test::normal_matrix<qd::bfloat16>(130, 259, 4, 1e5);
      const test::Remote<Cuda, qd::bfloat16> remote_rounded(cuda, rounded.view());
      check(gpu, tokens, MatrixView<const qd::bfloat16>(rounded.view()), remote_rounded.in());
      const auto codes = qd::quantize(w.view());
      const auto remote_codes = cuda.upload(codes);
      check(gpu, tokens, codes.view(), remote_codes.view());
    }
  }
}

TEST_CASE("sums over many tokens have all their terms", "[cuda]") {
  // Where a library splits a sum among blocks, a remainder is what it could leave out.
#if defined(QDYLORA_CUDA_EMULATOR)
  constexpr Index in = 32;
#else
  constexpr Index in = 4096;
#endif
  const qd::CudaContext context({.workspace_bytes = std::size_t{256} << 20});
  const Cuda cuda(context);
  const auto ones = [&](Index rows, Index cols) {
    qd::Matrix<qd::bfloat16, qd::DeviceMemory> x(rows, cols);
    cuda.fill(x.view(), qd::bfloat16(1.0f));
    return x;
  };
  for (const Index tokens : {4096, 4097, 4099, 4103, 8193, 8199})
    for (const Index rank : {8, 64}) {
      CAPTURE(tokens, rank);
      const auto u = ones(tokens, rank), x = ones(tokens, in);
      qd::Matrix<float, qd::DeviceMemory> gradient(rank, in);
      cuda.weight_gradient(u.view(), x.view(), gradient.view());
      Matrix<float> found(rank, in);
      cuda.download(std::as_const(gradient).view(), found.view());
      for (const float sum : found.span()) REQUIRE(sum == static_cast<float>(tokens));
    }
}

TEMPLATE_TEST_CASE("an adapter rides on the product of its layer", "[cuda]", qd::bfloat16, qd::half) {
  using T = TestType;
  const Gpu gpu;
  const Cuda cuda = gpu;
  if (cuda.context().compute_capability() < 80) SKIP("products with adapters need a device of compute capability 8.0, and code for one");
  constexpr Index in = 576;  // beyond what a projection's warps read at once
  const auto host = qd::quantize(test::normal_matrix<float>(50, in, 4, 0.2).view());
  const auto w = cuda.upload(host);
  for (const Index tokens : {1, 3, 11, 20})
    for (const Index rank : {1, 13, 70}) {
      const auto x = test::normal_matrix<T>(tokens, in, 1);
      const auto u = test::normal_matrix<float>(tokens, rank, 2);
      const auto b = test::normal_matrix<T>(rank + 3, 50, 3), a = test::normal_matrix<T>(rank, in, 5, 0.2);
      const test::Remote<Cuda, T> remote_x(cuda, x.view(), 0);
      test::Remote<Cuda, float> remote_u(cuda, u.view());
      const test::Remote<Cuda, T> remote_b(cuda, b.view()), aligned_a(cuda, a.view(), 8), remote_a(cuda, a.view(), 3);
      REQUIRE(cuda.takes_adapter(remote_x.in(), w.view(), rank));
      const auto check = [&](MatrixView<const T> from, const Matrix<float>& expected_u, qd::Update update) {
        test::Output<Cuda, T> y(cuda, tokens, 50, update);
        const qd::AdapterTerm<T> adapter{remote_u.view(), remote_b.in().top_rows(rank), -0.5f, from};
        cuda.matmul(remote_x.in(), w.view(), y.view(), update, adapter);
        test::reference::matmul(x.view(), host.view(), y.expected(), update);
        Matrix<float> scaled(tokens, rank);
        for (Index i = 0; i < scaled.size(); ++i) scaled.data()[i] = -0.5f * expected_u.data()[i];
        test::reference::matmul_transposed(MatrixView<const float>(scaled.view()), b.view().top_rows(rank), y.expected(),
                                           qd::Update::accumulate);
        y.check(test::bound<T>());
      };
      for (const auto update : test::both_updates) check({}, u, update);  // of a u that is there
      Matrix<double> made(tokens, rank);
      test::reference::matmul(x.view(), a.view(), made.view(), qd::Update::overwrite);
      Matrix<float> made_u(tokens, rank);
      for (Index i = 0; i < made.size(); ++i) made_u.data()[i] = static_cast<float>(made.data()[i]);
      for (const auto* from : {&aligned_a, &remote_a})  // of one that is made: on the way, or before where rows of a are not aligned
        for (const auto update : test::both_updates) {
          cuda.fill(remote_u.view(), std::numeric_limits<float>::quiet_NaN());
          check(from->in(), made_u, update);
          test::check_result(remote_u, std::as_const(made).view(), test::bound<float>());
        }
      test::Output<Cuda, T> alone(cuda, tokens, 50, qd::Update::overwrite);
      cuda.matmul(remote_x.in(), w.view(), alone.view(), qd::Update::overwrite, qd::AdapterTerm<T>{});  // empty: nothing
      test::reference::matmul(x.view(), host.view(), alone.expected(), qd::Update::overwrite);
      alone.check(test::bound<T>());
      const auto code_of = [&](const qd::AdapterTerm<T>& adapter) {
        return test::code_of([&] { cuda.matmul(remote_x.in(), w.view(), alone.view(), qd::Update::overwrite, adapter); });
      };
      CHECK(code_of({remote_u.view(), remote_b.in().left_cols(49).top_rows(rank)}) == qd::Errc::shape_mismatch);
      CHECK(code_of({remote_u.view(), remote_b.in().top_rows(rank), 1.0f, remote_a.in().left_cols(in - 1)}) == qd::Errc::shape_mismatch);
      CHECK(code_of({.b = remote_b.in().top_rows(rank), .a = remote_a.in()}) == qd::Errc::shape_mismatch);  // no u
    }
  // Tokens that another kernel multiplies take none along, and say so.
  const test::Remote<Cuda, T> x(cuda, test::normal_matrix<T>(40, in, 1).view());
  test::Output<Cuda, T> y(cuda, 40, 50, qd::Update::overwrite);
  CHECK_FALSE(cuda.takes_adapter(x.in(), w.view(), 2));
  test::Remote<Cuda, float> u(cuda, test::normal_matrix<float>(40, 2, 2).view());
  const test::Remote<Cuda, T> b(cuda, test::normal_matrix<T>(2, 50, 3).view());
  CHECK(test::code_of([&] { cuda.matmul(x.in(), w.view(), y.view(), qd::Update::overwrite, {u.view(), b.in()}); }) == qd::Errc::unsupported);
}

namespace {

/// y (+)= x . w^T + scale * u . b, or of w itself, beside the reference's, of a u that is there and of one that is made of an a. x, b and a
/// begin where 16 bytes do, or do not.
template <class T, class Host, class There>
void products_with_a_term(const Cuda& cuda, const Host& host, const There& there, Index tokens, Index rank, bool transposed) {
  constexpr float scale = -0.5f;
  const Index depth = transposed ? host.rows : host.cols, width = transposed ? host.cols : host.rows;
  CAPTURE(tokens, rank, depth, width, transposed);
  const auto x = test::normal_matrix<T>(tokens, depth, 1), b = test::normal_matrix<T>(rank, width, 3);
  const auto a = test::normal_matrix<T>(rank, depth, 5, 0.2);
  const auto u = test::normal_matrix<float>(tokens, rank, 2);
  for (const Index padding : {0, 3}) {
    const test::Remote<Cuda, T> remote_x(cuda, x.view(), padding), remote_b(cuda, b.view(), padding), remote_a(cuda, a.view(), padding);
    test::Remote<Cuda, float> remote_u(cuda, u.view(), padding);
    const auto multiply = [&](MatrixView<T> y, qd::Update update, const qd::AdapterTerm<T>& adapter) {
      if (transposed) cuda.matmul_transposed(remote_x.in(), there, y, update, adapter);
      else cuda.matmul(remote_x.in(), there, y, update, adapter);
    };
    const auto check = [&](qd::Update update, MatrixView<const T> from, const Matrix<double>& expected_u) {
      test::Output<Cuda, T> y(cuda, tokens, width, update);
      multiply(y.view(), update, {remote_u.view(), remote_b.in(), scale, from});
      if (transposed) test::reference::matmul_transposed(x.view(), host, y.expected(), update);
      else test::reference::matmul(x.view(), host, y.expected(), update);
      Matrix<double> scaled(tokens, rank);
      for (Index i = 0; i < scaled.size(); ++i) scaled.data()[i] = static_cast<double>(scale) * expected_u.data()[i];
      test::reference::matmul_transposed(MatrixView<const double>(scaled.view()), b.view(), y.expected(), qd::Update::accumulate);
      y.check(test::bound<T>());
    };
    for (const auto update : test::both_updates) check(update, {}, test::in_double(u.view()));
    Matrix<double> made(tokens, rank);
    test::reference::matmul(x.view(), a.view(), made.view(), qd::Update::overwrite);
    for (const auto update : test::both_updates) {
      cuda.fill(remote_u.view(), std::numeric_limits<float>::quiet_NaN());
      check(update, remote_a.in(), made);
      test::check_result(remote_u, std::as_const(made).view(), test::bound<float>());
    }
    // Nothing, and what does not fit.
    test::Output<Cuda, T> y(cuda, tokens, width, qd::Update::overwrite);
    multiply(y.view(), qd::Update::overwrite, {});
    if (transposed) test::reference::matmul_transposed(x.view(), host, y.expected(), qd::Update::overwrite);
    else test::reference::matmul(x.view(), host, y.expected(), qd::Update::overwrite);
    y.check(test::bound<T>());
    const auto code_of = [&](const qd::AdapterTerm<T>& adapter) {
      return test::code_of([&] { multiply(y.view(), qd::Update::overwrite, adapter); });
    };
    CHECK(code_of({remote_u.view(), remote_b.in().left_cols(width - 1)}) == qd::Errc::shape_mismatch);
    CHECK(code_of({remote_u.view(), remote_b.in(), 1.0f, remote_a.in().left_cols(depth - 1)}) == qd::Errc::shape_mismatch);
    CHECK(code_of({.b = remote_b.in()}) == qd::Errc::shape_mismatch);  // no u
  }
}

}  // namespace

TEMPLATE_TEST_CASE("products by slabs have an adapter's term appended where y is wider than x", "[cuda]", qd::bfloat16, qd::half) {
  using T = TestType;
  constexpr bool backward = std::is_same_v<T, qd::bfloat16>;
  const qd::ProductLimits by_slabs{.small_batch = 0, .tiles = 0};
  const auto products = [&](const Cuda& cuda) {
    for (const auto& [narrow, wide] : {std::pair<Index, Index>{64, 128}, {65, 137}, {24, 203}})
      for (const Index tokens : {1, 33})
        for (const Index rank : {1, 8, 13}) {
          const auto host = qd::quantize(test::normal_matrix<float>(wide, narrow, 4, 0.2).view());
          const auto w = cuda.upload(host);
          REQUIRE(cuda.takes_adapter(MatrixView<const T>(nullptr, tokens, narrow), w.view(), rank));
          CHECK_FALSE(cuda.takes_adapter_transposed(MatrixView<const T>(nullptr, tokens, wide), w.view(), rank));
          products_with_a_term<T>(cuda, host.view(), w.view(), tokens, rank, false);
          const auto turned = qd::quantize<qd::FP4>(test::normal_matrix<float>(narrow, wide, 4, 0.2).view());
          const auto v = cuda.upload(turned);
          CHECK_FALSE(cuda.takes_adapter(MatrixView<const T>(nullptr, tokens, wide), v.view(), rank));
          REQUIRE(cuda.takes_adapter_transposed(MatrixView<const T>(nullptr, tokens, narrow), v.view(), rank) == backward);
          if constexpr (backward) products_with_a_term<T>(cuda, turned.view(), v.view(), tokens, rank, true);
        }
  };
  test::in_every_order([&] { products(Gpu({.workspace_bytes = 60000, .slab_bytes = 6000, .product_limits = by_slabs})); });
  products(Gpu({.workspace_bytes = 60000, .slab_bytes = 6000, .overlap_slabs = false, .product_limits = by_slabs}));
  products(Gpu({.workspace_bytes = std::size_t{1} << 20, .product_limits = by_slabs}));

  // Where x and the term do not fit beside two slabs, none is taken, and a product says so.
  const Gpu small({.workspace_bytes = 60000, .slab_bytes = 40000, .product_limits = by_slabs});
  const Cuda cuda = small;
  const auto w = cuda.upload(qd::quantize(test::normal_matrix<float>(128, 64, 4, 0.2).view()));
  const auto takes = [&](Index tokens, Index rank) {
    return cuda.takes_adapter(MatrixView<const T>(nullptr, tokens, 64), w.view(), rank);
  };
  CHECK(takes(33, 8));         // 33 rows of 72 numbers, and one of a slab, are 4896 bytes, of 5000
  CHECK_FALSE(takes(33, 9));   // of 80
  CHECK_FALSE(takes(34, 8));
  const test::Remote<Cuda, T> x(cuda, test::normal_matrix<T>(35, 64, 1).view()), b(cuda, test::normal_matrix<T>(8, 128, 2).view());
  const test::Remote<Cuda, T> y(cuda, test::normal_matrix<T>(35, 128, 2).view());
  test::Remote<Cuda, float> u(cuda, test::normal_matrix<float>(35, 8, 2).view());
  test::Output<Cuda, T> forth(cuda, 35, 128, qd::Update::overwrite), back(cuda, 35, 64, qd::Update::overwrite);
  CHECK(test::code_of([&] { cuda.matmul(x.in(), w.view(), forth.view(), qd::Update::overwrite, {u.view(), b.in()}); }) == qd::Errc::unsupported);
  CHECK(test::code_of([&] { cuda.matmul_transposed(y.in(), w.view(), back.view(), qd::Update::overwrite, {u.view(), b.in().left_cols(64)}); }) ==
        qd::Errc::unsupported);
}

TEST_CASE("a product by slabs takes an adapter along by how wide it is, and as the user says") {
  CHECK(qd::augments(4096, 8192));
  CHECK_FALSE(qd::augments(4096, 8191));
  CHECK_FALSE(qd::augments(4096, 4096));
  CHECK(qd::augments(4096, 4096, {.augmented = 1}));
  CHECK_FALSE(qd::augments(4096, 32768, {.augmented = 0}));
  CHECK_FALSE(qd::augments(4096, 8192, {.augmented = 3}));
  const qd::CudaContext context({.workspace_bytes = 60000, .slab_bytes = 20000, .product_limits = {.augmented = 3}});
  CHECK(context.augments(10, 30, 25000));
  CHECK_FALSE(context.augments(10, 30, 25001));
  CHECK_FALSE(context.augments(10, 29, 1));
}

TEST_CASE("a product's kernel is chosen by its shape, the device and the user") {
  using enum qd::ProductKernel;
  const auto kernel = [](Index tokens, int compute_capability, qd::ProductLimits limits = {}) {
    return qd::choose_product({tokens, 4096, 4096, true, true}, {compute_capability, 132}, limits);
  };
  CHECK(kernel(1, 90) == small_batch);
  CHECK(kernel(32, 80) == small_batch);
  CHECK(kernel(33, 80) == tiles);
  CHECK(kernel(256, 90) == tiles);
  CHECK(kernel(257, 90) == slabs);
  CHECK(kernel(512, 89) == tiles);
  CHECK(kernel(65, 100) == slabs);
  CHECK(kernel(64, 103) == tiles);
  CHECK(kernel(1, 75) == slabs);
  CHECK(kernel(4096, 90) == slabs);
  CHECK(kernel(9, 90, {.small_batch = 8}) == tiles);
  CHECK(kernel(16, 90, {.small_batch = 8, .tiles = 0}) == slabs);
  CHECK(kernel(33, 90, {.small_batch = 100, .tiles = 0}) == slabs);  // more than it can take
  CHECK(kernel(1, 75, {.small_batch = 8}) == slabs);
  CHECK(qd::choose_product({16, 22016, 4096, true, true}, {}) == small_batch);
  CHECK(qd::choose_product({17, 22016, 4096, true, true}, {}) == tiles);   // many rows: x is read for 128 of them at once
  CHECK(qd::choose_product({17, 4096, 4096, true, true}, {}) == small_batch);
  CHECK(qd::choose_product({40, 4096, 4160, true, true}, {}) == tiles);  // any whole chunks
  CHECK(qd::choose_product({20, 22016, 4160, true, true}, {}) == tiles);
  CHECK(qd::choose_product({40, 128 * 65535, 64, true, true}, {}) == tiles);
  CHECK(qd::choose_product({40, 128 * 65535 + 1, 64, true, true}, {}) == slabs);  // more blocks than a grid has along y
  CHECK(qd::choose_product({1, 4096, 4096, false, true}, {}) == slabs);
  const auto by_warpgroups = [](Index tokens, Index in, bool sm90a) {
    return qd::choose_product({tokens, 4096, in, true, true}, {90, 132, sm90a}, {.warpgroup_tiles = 512});
  };
  CHECK(by_warpgroups(33, 4096, true) == warpgroup_tiles);
  CHECK(by_warpgroups(512, 4096, true) == warpgroup_tiles);
  CHECK(by_warpgroups(513, 4096, true) == slabs);
  CHECK(by_warpgroups(32, 4096, true) == small_batch);
  CHECK(by_warpgroups(33, 4096 + 128, true) == tiles);  // no whole rounds
  CHECK(by_warpgroups(33, 4096, false) == tiles);
  CHECK(qd::choose_product({33, 4096, 4096, true, true}, {90, 132, true}) == tiles);  // unasked, not before it has been run on a device
  CHECK(qd::choose_product({1, 4096, 4096, true, false}, {}) == slabs);
  const qd::CudaContext context({.workspace_bytes = 1024, .product_limits = {.small_batch = 4}});
  CHECK(context.choose_product({4, 64, 64, true, true}) == small_batch);
  CHECK(context.choose_product({5, 64, 64, true, true}) != small_batch);
}

TEST_CASE("tiles are made in as many parts as fill the device and no more than pay") {
  const auto parts = [](Index out, Index tokens, Index in, Index most = 8) {
    return qd::parts_of_tiles((out + 127) / 128 * ((tokens + 127) / 128), 132, in, most);
  };
  CHECK(parts(4096, 128, 4096, 4) == 4);   // 32 tiles, 128 blocks
  CHECK(parts(4096, 256, 4096, 4) == 2);
  CHECK(parts(4096, 512, 4096, 4) == 1);
  CHECK(parts(8192, 128, 32768) == 2);
  CHECK(parts(11008, 128, 4096, 4) == 1);  // in 3 parts there would be two full rounds, but what that gains goes into memory
  CHECK(parts(11008, 128, 16384) == 3);
  CHECK(parts(22016, 128, 8192) == 2);     // 172 tiles leave the second round two thirds empty, 344 half of the third
  CHECK(parts(64, 8, 65536) == 8);
  CHECK(parts(64, 8, 65536, 0) == 1);
}

TEST_CASE("slabs have lines enough to hide what is read again for each, and memory for two") {
  // An H100: half of an L2 cache of 50 MB, and what the default workspace leaves beside cuBLASLt's.
  const auto lines = [](Index length, Index tokens_converted = 0, Index slabs = 2) {
    const auto memory = static_cast<Index>(qd::CudaOptions{}.workspace_bytes) - qd::detail::gemm_workspace - tokens_converted;
    return qd::detail::piece_of(1 << 20, qd::slab_lines(2 * length, slabs, 25'000'000, qd::least_slab_lines, memory));
  };
  CHECK(lines(4096) == 1408);  // what the cache holds
  CHECK(lines(8192) == 1024);
  CHECK(lines(32768) == 1024);                          // out of the cache
  CHECK(lines(65024, 2 * 512 * 65024) >= 512);          // the head's, backward, beside a chunk of logits
  CHECK(qd::slab_lines(2 * 32768, 2, 25'000'000, 0, 1 << 30) == 190);  // slab_bytes by the user
  CHECK(qd::slab_lines(2 * 32768, 2, 0, qd::least_slab_lines, 1 << 20) == 8);
  // An H200's 132 processors: tiles of 128 tokens by 256 lines, one for each, in rounds that leave few without.
  CHECK(qd::filling_lines(512, 132) == 33 * 256);
  CHECK(qd::filling_lines(4096, 132) == 4 * 256);
  CHECK(qd::filling_lines(100000, 132) == 256);
  CHECK(qd::lines_of_full_rounds(4096, 132, 1408) == 1024);  // 128 of 132, where 1280 lines make 160 of 264
  CHECK(qd::lines_of_full_rounds(4096, 132, 2048) == 2048);
  CHECK(qd::lines_of_full_rounds(512, 132, 4096) == 4096);  // not one round
  CHECK(qd::lines_of_full_rounds(100000, 132, 1024) == 1024);
  CHECK(qd::lines_of_full_rounds(4096, 132, 100) == 100);
  const qd::CudaContext by_itself({.workspace_bytes = 1 << 20}), told({.workspace_bytes = 1 << 20, .slab_bytes = 4096});
  CHECK(by_itself.least_slab_lines() == qd::least_slab_lines);
  CHECK(told.least_slab_lines() == 0);
}

#ifdef QDYLORA_CUDA_EMULATOR
TEST_CASE("activations that fit are converted once for all slabs") {
  const qd::CudaContext context({.workspace_bytes = 60000, .slab_bytes = 20000});
  const Cuda cuda(context);
  const auto w = cuda.upload(qd::quantize(test::normal_matrix<float>(130, 259, 1).view()));
  const auto launches_of = [&]<class X>(X) {
    const test::Remote<Cuda, X> x(cuda, test::normal_matrix<X>(8, 259, 2).view());
    test::Output<Cuda, qd::bfloat16> y(cuda, 8, 130, qd::Update::overwrite);
    const long before = test::emulator::machine().launches;
    cuda.matmul(x.in(), w.view(), y.view());
    return test::emulator::machine().launches - before;
  };
  const long slabs = launches_of(qd::bfloat16{});  // a launch decodes each
  CHECK(slabs == 9);
  CHECK(launches_of(float{}) == slabs + 1);
}
#endif

TEST_CASE("a workspace too small for one row of a slab is an error") {
  const qd::CudaContext context({.workspace_bytes = 1024});
  const Cuda cuda(context);
  const auto w = cuda.upload(qd::quantize(test::normal_matrix<float>(5, 640, 1).view()));
  Matrix<float, qd::DeviceMemory> x(3, 640), y(3, 5);
  CHECK(test::code_of([&] { cuda.matmul(x.view(), w.view(), y.view()); }) == qd::Errc::memory);
}

}  // namespace products_test
