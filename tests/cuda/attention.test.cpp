// Attention on the emulated device: with and without tensor cores, aligned and not, every width of tiles.
#include <qdylora/cuda.hpp>

#include "backend/transformer.inc"

namespace attention_test {

namespace qd = qdylora;
using qd::Cuda;
using qd::HeadShape;
using qd::Index;

namespace {

class Gpu {
 public:
  explicit Gpu(std::size_t workspace_bytes = std::size_t{4} << 20) : context_({.workspace_bytes = workspace_bytes}) {}
  operator Cuda() const { return Cuda(context_); }

 private:
  qd::CudaContext context_;
};

}  // namespace

TEMPLATE_TEST_CASE("attention on the device is the reference's", "[cuda]", float, double, qd::bfloat16, qd::half) {
  const Gpu gpu;
  test::attention<Cuda, TestType>(gpu);
  test::attention_of_large_scores<Cuda, TestType>(gpu);
}

TEMPLATE_TEST_CASE("attention on the device refuses shapes that do not fit", "[cuda]", float, qd::bfloat16) {
  const Gpu gpu;
  test::attention_refuses_other_shapes<Cuda, TestType>(gpu);
  const auto wide = test::normal_matrix<TestType>(1, 258, 1);
  const test::Remote<Cuda, TestType> x(gpu, wide.view());
  test::Remote<Cuda, TestType> y(gpu, wide.view());
  test::Remote<Cuda, float> lse(gpu, wide.view().left_cols(1));
  const std::vector<Index> offsets = {0, 1};
  CHECK(test::code_of([&] { Cuda(gpu).attention(x.in(), x.in(), x.in(), offsets, HeadShape{1, 1, 258}, y.view(), lse.view()); }) ==
        qd::Errc::unsupported);
}

TEMPLATE_TEST_CASE("attention of one token on a cache, on the device, is the reference's", "[cuda]", float, double, qd::bfloat16,
                   qd::half) {
  test::attention_decode<Cuda, TestType>(Gpu());
}

TEMPLATE_TEST_CASE("heads of every width, copied 16 bytes at a time", "[cuda]", qd::bfloat16, qd::half) {
  const Gpu gpu;
  for (const auto& [shape, offsets] : std::vector<test::AttentionCase>{
           {{1, 1, 64}, {0, 130}}, {{2, 1, 128}, {0, 1, 66}}, {{3, 1, 96}, {0, 40}}, {{1, 1, 256}, {0, 70}}, {{2, 2, 160}, {0, 17, 20}}})
    test::attention_case<Cuda, TestType>(gpu, shape, offsets, 8, 8);
}

TEMPLATE_TEST_CASE("gradients of keys that many heads share are made in parts where blocks are few", "[cuda]", float, double, qd::bfloat16) {
  // 7 heads in as many parts; 20 in parts of 3 and one of 2, unless the device is larger; two parts by what there is room for, and one.
  test::attention_case<Cuda, TestType>(Gpu(), {7, 1, 16}, {0, 40}, 3, 1);
  test::attention_case<Cuda, TestType>(Gpu(), {20, 1, 16}, {0, 5}, 8, 8);
  const std::size_t terms = 2 * 7 * 40 * sizeof(qd::Accumulator<TestType>), part = terms / 7 * 16;
  test::attention_case<Cuda, TestType>(Gpu(terms + 2 * part + 4096), {7, 1, 16}, {0, 40}, 3, 1);
  test::attention_case<Cuda, TestType>(Gpu(terms + 4096), {7, 1, 16}, {0, 40}, 3, 1);
#ifdef QDYLORA_CUDA_EMULATOR
  const auto launches = [](std::size_t workspace) {
    const Gpu gpu(workspace);
    const Cuda cuda = gpu;
    const test::Remote<Cuda, TestType> q(cuda, test::normal_matrix<TestType>(40, 112, 1).view());
    const test::Remote<Cuda, TestType> k(cuda, test::normal_matrix<TestType>(40, 16, 2).view());
    const test::Remote<Cuda, qd::Accumulator<TestType>> lse(cuda, test::normal_matrix<qd::Accumulator<TestType>>(40, 7, 3).view());
    test::Remote<Cuda, TestType> dq(cuda, q.host().view()), dk(cuda, k.host().view()), dv(cuda, k.host().view());
    const long before = test::emulator::machine().launches;
    const std::vector<Index> offsets = {0, 40};
    cuda.attention_backward(q.in(), q.in(), k.in(), k.in(), q.in(), lse.in(), offsets, HeadShape{7, 1, 16}, dq.view(), dk.view(), dv.view());
    return test::emulator::machine().launches - before;
  };
  CHECK(launches(std::size_t{4} << 20) == launches(terms + 4096) + 2);  // which add the parts
#endif
}

TEMPLATE_TEST_CASE("wide heads without tensor cores", "[cuda]", float, double) {
  const Gpu gpu;
  for (const auto& [shape, offsets] : std::vector<test::AttentionCase>{{{2, 1, 96}, {0, 19}}, {{1, 1, 256}, {0, 1, 10}}})
    for (const Index padding : {0, 3}) test::attention_case<Cuda, TestType>(gpu, shape, offsets, padding, padding);
}

#ifdef QDYLORA_CUDA_EMULATOR
using test::emulator::Machine, test::emulator::With;

TEMPLATE_TEST_CASE("a device of compute capability 7.5, or code for it, multiplies half on tensor cores and bfloat16 without", "[cuda]",
                   qd::bfloat16, qd::half) {
  for (const auto& [device, compiled] : {std::pair(75, 120), std::pair(90, 75)}) {
    const With with_device(&Machine::compute_capability, device), with_code(&Machine::compiled_capability, compiled);
    const Gpu gpu;
    for (const Index padding : {0, 3}) test::attention_case<Cuda, TestType>(gpu, {2, 1, 72}, {0, 5, 38}, padding, padding);
  }
}

TEST_CASE("where tiles of a wide head do not fit into shared memory, there is attention without tensor cores", "[cuda]") {
  using T = qd::bfloat16;
  constexpr int tiles = qd::device::Attention<qd::device::AttentionTiles<T, 256, 4, 32>>::shared_bytes;
  for (const int available : {tiles, tiles - 1}) {
    const With with_memory(&Machine::shared_bytes, available);
    test::attention_case<Cuda, T>(Gpu(), {1, 1, 256}, {0, 40}, 8, 8);
    int width = -1;
    qd::detail::with_tile_width<T>(qd::CudaContext({.workspace_bytes = 1024}), 256, [](auto) { return tiles; }, [&](auto w) { width = w(); });
    CHECK(width == (available == tiles ? 256 : 0));
  }
}

TEST_CASE("more sequences than a grid is high generate a token each", "[cuda]") {
  const With low(&Machine::most_blocks, 3u);
  test::attention_decode<Cuda, float>(Gpu());
}
#endif

TEMPLATE_TEST_CASE("a long cache is shared among blocks, and so are many heads of one cache", "[cuda]", float, double, qd::bfloat16) {
  using T = TestType;
  const Gpu gpu;
  const HeadShape shape{40, 2, 64};
  const std::vector<Index> lengths = {1100, 30};
  const auto q = test::normal_matrix<T>(2, 40 * 64, 1);
  const test::Remote<Cuda, T> rq(gpu, q.view(), 0);
  std::vector<qd::Matrix<T>> k, v;
  std::vector<test::Remote<Cuda, T>> rk, rv;
  for (const Index length : lengths) {
    k.push_back(qd::clone(test::normal_matrix<T>(length, 128, 2 + k.size()).view()));
    v.push_back(qd::clone(test::normal_matrix<T>(length, 128, 4 + v.size()).view()));
    rk.emplace_back(gpu, k.back().view(), 0);
    rv.emplace_back(gpu, v.back().view(), 8);
  }
  using Views = std::vector<qd::MatrixView<const T>>;
  using Span = std::span<const qd::MatrixView<const T>>;
  const Views hk{k[0], k[1]}, hv{v[0], v[1]}, dk{rk[0].in(), rk[1].in()}, dv{rv[0].in(), rv[1].in()};
  test::Output<Cuda, T> y(gpu, 2, 40 * 64, qd::Update::overwrite, 0);
  Cuda(gpu).attention_decode(rq.in(), Span(dk), Span(dv), shape, y.view());
  qd::reference::attention_decode(q.view(), Span(hk), Span(hv), shape, y.expected());
  y.check(4 * test::bound<T>());
}

}  // namespace attention_test
