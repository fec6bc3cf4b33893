// Products that decode on the way into the tensor cores, on the emulated device. Rows are long enough for the loops that load ahead, and
// for sums in several parts.
#include <qdylora/cuda.hpp>

#include <qdylora/cpu/reference.hpp>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/random_data.hpp"

namespace fused_products_test {

namespace qd = qdylora;
using qd::Index, qd::Update;
using test::Matrix, test::MatrixView;

namespace {

/// A matrix in the device's memory that begins `offset` elements into an allocation and whose rows are `padding` apart. What is between is
/// NaN, and stays so.
template <class T>
class OnDevice {
 public:
  OnDevice(const qd::CudaContext& context, MatrixView<const T> host, Index offset = 0, Index padding = 0)
      : cuda_(context),
        offset_(offset),
        mirror_(1, offset + host.rows * (host.cols + padding)),
        memory_(1, mirror_.size()),
        view_(memory_.data() + offset, host.rows, host.cols, host.cols + padding) {
    for (T& x : mirror_.span()) x = test::scalar<T>(std::numeric_limits<double>::quiet_NaN());
    for (Index i = 0; i < host.rows; ++i) std::copy_n(host.row(i), host.cols, mirror_.data() + offset + i * view_.stride);
    cuda_.upload(std::as_const(mirror_).view(), memory_.view());
    cuda_.synchronize();
  }
  MatrixView<T> view() const { return view_; }
  /// As it is now; valid until the next call.
  MatrixView<const T> host() {
    cuda_.download(std::as_const(memory_).view(), mirror_.view());
    return {mirror_.data() + offset_, view_.rows, view_.cols, view_.stride};
  }
  bool padding_intact() {
    host();
    const auto numbers = std::count_if(mirror_.span().begin(), mirror_.span().end(),
                                       [](T x) { return static_cast<double>(x) == static_cast<double>(x); });
    return numbers == view_.size();
  }

 private:
  qd::Cuda cuda_;
  Index offset_;
  Matrix<T> mirror_;
  Matrix<T, qd::DeviceMemory> memory_;
  MatrixView<T> view_;
};

struct Case {
  Index tokens, out, in, block = 64, rank = 0;
};

enum class Kernel { small_batch, tiles, warpgroup_tiles };

/// d [64, n] = a [64, 64] . x [n, 64]^T by one warpgroup, all that the hardware is asked for by itself.
template <class T, int sums>
struct WarpgroupProduct {
  static constexpr bool needs_sm90a = true;
  static constexpr int threads = 128, tokens = 2 * sums;
  static constexpr int shared_bytes = tokens * 128;

  MatrixView<const T> a, x;
  MatrixView<float> d;

  __device__ void operator()(qd::device::SharedMemory memory) const {
    using namespace qd::device;
    if constexpr (is_sm90a) {
      const auto tile = memory.take<SwizzledRows>(tokens / 8);
      const auto pieces = tile.template from<Words<4>>(0);
      const ProductRows rows(tile);
      for (int i = thread(); i < tokens * 8; i += threads)
        pieces.store(swizzled_piece(i / 8, i % 8), load(reinterpret_cast<const Words<4>*>(x.row(i / 8)) + i % 8));
      publish_to_products();
      sync_block();
      const int row = warp() * 16 + lane() / 4, col = lane() % 4 * 2;
      Words<4> left[4];
      for (int step = 0; step < 4; ++step)
        for (int w = 0; w < 4; ++w)
          left[step].word[w] = load(reinterpret_cast<const std::uint32_t*>(a.row(row + 8 * (w % 2)) + 16 * step + col + 8 * (w / 2)));
      float sum[sums] = {};
      begin_products(left);
      multiply_async<T, false>(sum, left[0], rows, 0);
      for (int step = 1; step < 4; ++step) multiply_async<T, true>(sum, left[step], rows, step);
      commit_products();
      wait_products<0>(sum);
      for (int i = 0; i < sums; ++i) store(d.row(row + i % 4 / 2 * 8) + 8 * (i / 4) + col + i % 2, sum[i]);
    }
  }
};

/// The fused kernels have no bodies for less.
bool has_fused(const qd::CudaContext& context) { return context.compute_capability() >= 80; }
constexpr const char* no_warpgroups = "products of warpgroups need a device of compute capability 9.0, and code for sm_90a";
constexpr const char* no_fused = "fused products need a device of compute capability 8.0, and code for one";

template <class Format, class Scales, class T, class Y, Kernel kernel = Kernel::small_batch>
void check(const qd::CudaContext& context, const Case& c, Index offset = 0, Index padding = 0) {
  CAPTURE(Format::name, c.tokens, c.out, c.in, c.block, c.rank, offset, padding);
  const auto host = qd::reference::quantize<Format, Scales>(test::normal_matrix<float>(c.out, c.in, 1, 0.2).view(), c.block);
  const qd::QuantizedTensor<Format, Scales, qd::DeviceMemory> w(c.out, c.in, c.block, qd::detail::on_device(context, host.codes()),
                                                                qd::detail::on_device<Scales>(context, host.scales()));
  const auto x = test::normal_matrix<T>(c.tokens, c.in, 2);
  const auto u = test::normal_matrix<float>(c.tokens, c.rank, 3, 0.5);
  const auto b = test::normal_matrix<T>(c.rank, c.out, 4);
  const OnDevice<T> device_x(context, x.view(), offset, padding);
  const OnDevice<float> device_u(context, u.view(), 0, 1);
  const OnDevice<T> device_b(context, b.view(), 0, 3);
  for (const Update update : {Update::overwrite, Update::accumulate}) {
    Matrix<T> initial = test::normal_matrix<T>(c.tokens, c.out, 5);
    Matrix<Y> start(c.tokens, c.out);
    Matrix<double> expected(c.tokens, c.out);
    for (Index i = 0; i < start.size(); ++i) {
      start.data()[i] = test::scalar<Y>(static_cast<double>(initial.data()[i]));
      expected.data()[i] = static_cast<double>(start.data()[i]);
    }
    qd::reference::matmul(x.view(), host.view(), expected.view(), update);
    for (Index i = 0; i < c.tokens; ++i)
      for (Index j = 0; j < c.out; ++j)
        for (Index r = 0; r < c.rank; ++r) expected(i, j) += static_cast<double>(u(i, r)) * static_cast<double>(b(r, j));
    OnDevice<Y> y(context, start.view(), 0, 3);
    const MatrixView<const T> in = device_x.view();
    if constexpr (kernel == Kernel::tiles) qd::detail::multiply_tiles(context, in, w.view(), y.view(), update);
    else if constexpr (kernel == Kernel::warpgroup_tiles) qd::detail::multiply_warpgroup_tiles(context, in, w.view(), y.view(), update);
    else qd::detail::multiply_small_batch(context, in, w.view(), y.view(), update, {device_u.view(), device_b.view()});
    CHECK(test::normalised_squared_error(y.host(), expected.view()) <= (std::is_same_v<T, qd::half> ? 5e-7 : 2e-5));
    CHECK(y.padding_intact());
  }
}

}  // namespace

TEMPLATE_TEST_CASE("few tokens with 4-bit weights on the device are the reference's", "[cuda]", qd::bfloat16, qd::half) {
  using namespace qdylora;
  using T = TestType;
  const CudaContext context({.workspace_bytes = std::size_t{1} << 20});
  if (!has_fused(context)) SKIP(no_fused);
  // One row and chunk; rows and tokens beside the tiles; chunks beside a group of 4 and a round of 8 warps; many second-level blocks.
  const Case cases[] = {{1, 1, 64},    {1, 16, 256},        {2, 17, 320},       {8, 33, 448},     {9, 15, 2048},      {16, 31, 2112},
                        {17, 47, 192}, {31, 5, 4352, 64, 3}, {32, 49, 128, 128}, {5, 130, 640, 64, 64}, {1, 16, 2304, 64, 8}};
  for (const Case& c : cases) check<NF4, DoubleQuant<>, T, T>(context, c);
  for (const Index block : {128, 512, 4096}) check<NF4, DoubleQuant<>, T, T>(context, {3, 37, 8256, block, 9});
  check<NF4, DoubleQuant<>, T, float>(context, {7, 29, 320, 64, 5});
  check<NF4, Float32Scales, T, T>(context, {20, 40, 704, 64, 7});
  check<FP4, DoubleQuant<>, T, T>(context, {4, 40, 384, 64, 0});
  check<NF4, DoubleQuant<FP8E4M3>, T, T>(context, {4, 40, 384, 256, 0});
  check<NF4, DoubleQuant<>, T, T>(context, {6, 20, 320}, 1, 0);  // x that is aligned to its elements alone
  check<NF4, DoubleQuant<>, T, T>(context, {6, 20, 320}, 8, 3);
  check<NF4, DoubleQuant<>, T, T>(context, {6, 20, 320}, 8, 8);
}

TEMPLATE_TEST_CASE("tiles of tokens with 4-bit weights on the device are the reference's", "[cuda]", qd::bfloat16, qd::half) {
  using namespace qdylora;
  using T = TestType;
  constexpr auto tiles = Kernel::tiles;
  const CudaContext context({.workspace_bytes = std::size_t{1} << 20});
  if (!has_fused(context)) SKIP(no_fused);
  // One row and chunk; rows beside a lane's 4, a warp's 32 and a block's 128; tokens beside a tile; fewer chunks than the ring has and
  // others than it has in whole rounds; sums in one part and in several, of different lengths.
  const Case cases[] = {{1, 1, 64},     {33, 128, 256},  {32, 129, 512},  {65, 15, 1280},       {30, 17, 2304},
                        {65, 15, 2304}, {2, 34, 128},    {40, 63, 192},   {70, 100, 512, 128},  {64, 30, 3136}, {17, 290, 320}};
  for (const Case& c : cases) check<NF4, DoubleQuant<>, T, T, tiles>(context, c);
  check<NF4, DoubleQuant<>, T, float, tiles>(context, {33, 29, 1280});
  check<FP4, Float32Scales, T, T, tiles>(context, {20, 40, 256, 256});
  check<NF4, DoubleQuant<>, T, T, tiles>(context, {9, 20, 256}, 1, 0);
  check<NF4, DoubleQuant<>, T, T, tiles>(context, {9, 20, 512}, 8, 8);
}

TEMPLATE_TEST_CASE("a product of a warpgroup is the product of its operands", "[cuda]", qd::bfloat16, qd::half) {
  using T = TestType;
  const qd::CudaContext context({.workspace_bytes = std::size_t{1} << 20});
  if (!context.sm90a()) SKIP(no_warpgroups);
  const auto check = [&]<int sums>(std::integral_constant<int, sums>) {
    using Kernel = WarpgroupProduct<T, sums>;
    const auto a = test::normal_matrix<T>(64, 64, 1), x = test::normal_matrix<T>(Kernel::tokens, 64, 2);
    const OnDevice<T> device_a(context, a.view()), device_x(context, x.view());
    OnDevice<float> d(context, Matrix<float>(64, Kernel::tokens).view());
    const MatrixView<const T> left = device_a.view(), right = device_x.view();
    qd::device::launch({context.stream(), 1, Kernel::shared_bytes}, Kernel{left, right, d.view()});
    Matrix<double> expected(64, Kernel::tokens);
    qd::reference::matmul(a.view(), x.view(), expected.view(), Update::overwrite);
    CHECK(test::normalised_squared_error(d.host(), expected.view()) <= 1e-12);
  };
  check(std::integral_constant<int, 16>{});
  check(std::integral_constant<int, 32>{});
}

TEMPLATE_TEST_CASE("tiles of warpgroups with 4-bit weights on the device are the reference's", "[cuda]", qd::bfloat16, qd::half) {
  using namespace qdylora;
  using T = TestType;
  constexpr auto tiles = Kernel::warpgroup_tiles;
  const CudaContext context({.workspace_bytes = std::size_t{1} << 20});
  if (!context.sm90a()) SKIP(no_warpgroups);
  // One row and round; rows beside a lane's 2, a warp's 16, a warpgroup's 64 and a block's 128; tokens beside half a tile and both tiles;
  // fewer pairs of chunks than the ring has and more; sums in one part and in several, of different lengths.
  const Case cases[] = {{1, 1, 256},    {33, 128, 256},      {64, 129, 512},      {65, 15, 1280},     {97, 66, 768},
                        {128, 17, 512}, {129, 35, 2304},     {40, 63, 2560, 128}, {7, 20, 3072, 512}, {65, 80, 256}};
  for (const Case& c : cases) check<NF4, DoubleQuant<>, T, T, tiles>(context, c);
  check<NF4, DoubleQuant<>, T, float, tiles>(context, {33, 29, 1280});
  check<FP4, Float32Scales, T, T, tiles>(context, {70, 40, 256, 256});
  check<NF4, DoubleQuant<>, T, T, tiles>(context, {9, 20, 256}, 1, 0);
  check<NF4, DoubleQuant<>, T, T, tiles>(context, {9, 20, 512}, 8, 8);
}

TEST_CASE("a weight that is not a number spoils its own outputs, and no others") {
  using T = qd::bfloat16;
  const qd::CudaContext context({.workspace_bytes = std::size_t{1} << 20});
  if (!has_fused(context)) SKIP(no_fused);
  auto weight = test::normal_matrix<float>(40, 256, 1);
  weight(17, 70) = std::numeric_limits<float>::infinity();
  const auto host = qd::reference::quantize<qd::NF4, qd::Float32Scales>(MatrixView<const float>(weight.view()), 64);
  const qd::QuantizedTensor<qd::NF4, qd::Float32Scales, qd::DeviceMemory> w(
      40, 256, 64, qd::detail::on_device(context, host.codes()), qd::detail::on_device<qd::Float32Scales>(context, host.scales()));
  const OnDevice<T> x(context, test::normal_matrix<T>(3, 256, 2).view());
  OnDevice<T> y(context, test::normal_matrix<T>(3, 40, 2).view());
  qd::detail::multiply_small_batch(context, MatrixView<const T>(x.view()), w.view(), y.view(), Update::overwrite);
  const auto found = y.host();
  for (Index i = 0; i < 3; ++i)
    for (Index j = 0; j < 40; ++j) CHECK(std::isfinite(static_cast<float>(found(i, j))) == (j != 17));
}

}  // namespace fused_products_test
