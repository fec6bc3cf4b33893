// Products, layers and ceilings of one GPU, ours beside cuBLAS in bfloat16 and bitsandbytes, a JSON line a cell on stdout.
//
//   gpu_bench [--bitsandbytes LIBRARY] [--quick] [--rounds N]
//
// Weights are random codes with random scales, activations random: constant data runs faster, because it draws less power. Each
// operation cycles through as many weights as exceed the second-level cache several times over.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/cuda.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>

#include "bitsandbytes.hpp"
#include "random.cuh"
#include "timing.hpp"

namespace {

namespace qd = qdylora;
using bench::Competitor;
using qd::bfloat16, qd::Cuda, qd::Index, qd::MatrixView;
template <class T>
using Matrix = qd::Matrix<T, qd::DeviceMemory>;
using Weight = qd::QuantizedTensor<qd::NF4, qd::DoubleQuant<>, qd::DeviceMemory>;
using WeightView = qd::QuantizedView<qd::NF4, qd::DoubleQuant<>>;

// ---- data --------------------------------------------------------------------------------------------------------------------------

__global__ void add_constant(float* x, std::int64_t count, const float* constant) {
  for (std::int64_t i = blockIdx.x * static_cast<std::int64_t>(blockDim.x) + threadIdx.x; i < count; i += gridDim.x * blockDim.x)
    x[i] += *constant;
}
__global__ void add_up(const uint4* x, std::int64_t count, unsigned* sum) {
  unsigned own = 0;
  for (std::int64_t i = blockIdx.x * static_cast<std::int64_t>(blockDim.x) + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    const uint4 v = x[i];
    own ^= v.x ^ v.y ^ v.z ^ v.w;
  }
  if (own == 0x12345678u) atomicAdd(sum, own);  // never mind the value: the loads must happen
}
// exact[t, c] = sum_k x[t, k] w(col(c), k) in double, w(n, k) = w[n * row_step + k * col_step], col(c) = c * spread
__global__ void exact_product(const bfloat16* x, std::int64_t depth, const float* w, std::int64_t row_step, std::int64_t col_step,
                              std::int64_t spread, double* exact) {
  __shared__ double part[256];
  const std::int64_t t = blockIdx.y, n = blockIdx.x * spread;
  double sum = 0.0;
  for (std::int64_t k = threadIdx.x; k < depth; k += blockDim.x)
    sum += static_cast<double>(static_cast<float>(x[t * depth + k])) * static_cast<double>(w[n * row_step + k * col_step]);
  part[threadIdx.x] = sum;
  for (unsigned half = blockDim.x / 2; half > 0; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) part[threadIdx.x] += part[threadIdx.x + half];
  }
  if (threadIdx.x == 0) exact[t * gridDim.x + blockIdx.x] = part[0];
}

using bench::blocks, bench::threads;

// ---- the machine and its output ----------------------------------------------------------------------------------------------------

struct Options {
  std::string bitsandbytes;
  bool quick = false;
  int rounds = 31;
};

class Bench {
 public:
  Bench(const qd::CudaContext& context, const Options& options)
      : context_(context), cuda_(context), watch_(context), options_(options), stream_(context.stream()), map_(1, 256), offset_(1, 1) {
    qd::Matrix<float> map(1, 256), offset(1, 1);
    for (Index i = 0; i < 256; ++i) map(0, i) = qd::DynamicMap8::values[static_cast<std::size_t>(i)];
    offset(0, 0) = scale_offset;
    cuda_.upload(map.view(), map_.view());
    cuda_.upload(offset.view(), offset_.view());
    context.synchronize();
    if (!options.bitsandbytes.empty()) peer_.emplace(options.bitsandbytes);
  }

  void machine() const {
    int driver = 0, runtime = 0, clock = 0, memory_clock = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, context_.device());
    cudaDeviceGetAttribute(&memory_clock, cudaDevAttrMemoryClockRate, context_.device());
    const auto& p = context_.properties();
    std::printf(
        "{\"machine\": {\"gpu\": \"%s\", \"capability\": \"%d.%d\", \"processors\": %d, \"l2_bytes\": %d, \"memory_bytes\": %zu, "
        "\"driver\": %d, \"runtime\": %d, \"clock_khz\": %d, \"memory_clock_khz\": %d, \"cublaslt\": %zu}}\n",
        p.name, p.major, p.minor, p.multiProcessorCount, p.l2CacheSize, p.totalGlobalMem, driver, runtime, clock, memory_clock,
        cublasLtGetVersion());
  }

  /// What memory and tensor cores do at best: copies and reads of 2 GB, a product 8192 x 8192 x 8192.
  void ceilings() const {
    constexpr Index bytes = Index{2} << 30;
    qd::Buffer<std::uint8_t, qd::DeviceMemory> source(bytes, context_.memory()), target(bytes, context_.memory());
    bench::random_bytes<<<blocks, threads, 0, stream_>>>(source.data(), bytes, 1);
    Matrix<unsigned> sum(1, 1);
    const auto times = watch_.compare(
        {{"copy", [&] { QDYLORA_CUDA_TRY(cudaMemcpyAsync(target.data(), source.data(), bytes, cudaMemcpyDeviceToDevice, stream_)); }},
         {"read",
          [&] { add_up<<<8 * blocks, threads, 0, stream_>>>(reinterpret_cast<const uint4*>(source.data()), bytes / 16, sum.data()); }}},
        1, options_.rounds);
    std::printf("{\"ceiling\": \"copy\", \"tb_s\": %.4f}\n", 2e-6 * static_cast<double>(bytes) / times[0].median);
    std::printf("{\"ceiling\": \"read\", \"tb_s\": %.4f}\n", 1e-6 * static_cast<double>(bytes) / times[1].median);
    constexpr Index n = 8192;
    const auto a = activations(n, n, 3), b = activations(n, n, 4);
    Matrix<bfloat16> y(n, n);
    const auto product = watch_.compare({{"cublaslt", [&] { cuda_.matmul(a.view(), b.view(), y.view()); }}}, 1, options_.rounds);
    std::printf("{\"ceiling\": \"bfloat16\", \"tflop_s\": %.1f}\n", 2e-6 * static_cast<double>(n * n * n) / product[0].median);
  }

  /// Forward and backward products of a weight [out, in] with so many tokens.
  void products(Index out, Index in, const std::vector<Index>& tokens_list) const {
    const int copies = copies_of(out, in);
    std::vector<Weight> coded;
    std::vector<Matrix<bfloat16>> dense;
    for (int i = 0; i < copies; ++i) {
      coded.push_back(random_weight(out, in, 100 + static_cast<std::uint64_t>(i)));
      dense.emplace_back(out, in);
      cuda_.dequantize(coded.back().view(), dense.back().view());
    }
    Matrix<float> decoded(out, in);  // of the last weight, whose results stay in y
    cuda_.dequantize(coded.back().view(), decoded.view());
    Matrix<float> scales(1, out * in / 64);
    Matrix<bfloat16> room(out, in);
    for (const Index tokens : tokens_list)
      for (const bool forward : {true, false}) {
        const Index depth = forward ? in : out, width = forward ? out : in;
        const auto x = activations(tokens, depth, 7);
        Matrix<bfloat16> y(tokens, width);
        const auto every = [&](auto&& f) {
          return [&, f] {
            for (int i = 0; i < copies; ++i) f(static_cast<std::size_t>(i));
          };
        };
        const auto dense_product = [&](const Matrix<bfloat16>& w) {
          if (forward) cuda_.matmul(x.view(), w.view(), y.view());
          else cuda_.matmul_transposed(x.view(), w.view(), y.view());
        };
        std::vector<Competitor> competitors{{"ours", every([&](std::size_t i) {
                                               if (forward) cuda_.matmul(x.view(), coded[i].view(), y.view());
                                               else cuda_.matmul_transposed(x.view(), coded[i].view(), y.view());
                                             })},
                                            {"cublas", every([&](std::size_t i) { dense_product(dense[i]); })}};
        if (peer_) {
          competitors.push_back({"bitsandbytes, decoded", every([&](std::size_t i) {
                                   decode_by_peer(coded[i], scales, room);
                                   dense_product(room);
                                 })});
          if (forward && tokens <= 1536)
            competitors.push_back({"bitsandbytes, fused", every([&](std::size_t i) { multiply_by_peer(x, coded[i], y); })});
        }
        const auto times = watch_.compare(competitors, copies, options_.rounds);
        for (std::size_t c = 0; c < competitors.size(); ++c) {
          cuda_.fill(y.view(), bfloat16(std::numeric_limits<float>::quiet_NaN()));
          competitors[c].run();
          const double error = distance(x, decoded, forward, y);
          std::printf(
              "{\"op\": \"%s\", \"out\": %lld, \"in\": %lld, \"tokens\": %lld, \"who\": \"%s\", \"us\": %.3f, \"quartiles\": [%.3f, "
              "%.3f], \"error\": %.4e}\n",
              forward ? "forward" : "backward", static_cast<long long>(out), static_cast<long long>(in), static_cast<long long>(tokens),
              competitors[c].name.c_str(), times[c].median, times[c].least, times[c].most, error);
        }
        std::fflush(stdout);
      }
  }

  /// A layer's forward pass with adapters of some ranks beside the base alone.
  void adapters(Index out, Index in, const std::vector<Index>& tokens_list) const {
    const int copies = copies_of(out, in);
    std::vector<Weight> coded;
    for (int i = 0; i < copies; ++i) coded.push_back(random_weight(out, in, 200 + static_cast<std::uint64_t>(i)));
    const auto a = numbers(64, in, 11, 0.02f), b = numbers(64, out, 12, 0.02f);
    for (const Index tokens : tokens_list) {
      const auto x = activations(tokens, in, 13);
      Matrix<bfloat16> y(tokens, out);
      Matrix<float> u(tokens, 64);
      std::vector<Competitor> competitors;
      for (const Index rank : {0, 8, 64}) {
        competitors.push_back({std::to_string(rank), [&, rank] {
                                 const MatrixView<float> through{u.data(), tokens, rank};
                                 for (int i = 0; i < copies; ++i) {
                                   const auto w = coded[static_cast<std::size_t>(i)].view();
                                   if (rank == 0) {
                                     cuda_.matmul(x.view(), w, y.view());
                                   } else {
                                     cuda_.matmul(x.view(), a.view().top_rows(rank), through);
                                     cuda_.matmul(x.view(), w, y.view(), qd::Update::overwrite, {through, b.view().top_rows(rank)});
                                   }
                                 }
                               }});
      }
      const auto times = watch_.compare(competitors, copies, options_.rounds);
      for (std::size_t c = 0; c < competitors.size(); ++c)
        std::printf("{\"op\": \"adapter\", \"out\": %lld, \"in\": %lld, \"tokens\": %lld, \"rank\": %s, \"us\": %.3f}\n",
                    static_cast<long long>(out), static_cast<long long>(in), static_cast<long long>(tokens), competitors[c].name.c_str(),
                    times[c].median);
      std::fflush(stdout);
    }
  }

  /// What a checkpointed training step does to a layer: forward, forward again, backward, with an adapter of rank 64 whose products are the
  /// same for all; the base is ours, dense, or decoded by bitsandbytes.
  void layers(Index out, Index in, Index tokens) const {
    constexpr Index rank = 64;
    using Layer = qd::DynamicLoRALinear<bfloat16, Cuda>;
    const auto base = std::make_shared<const Layer::WeightType>(random_weight(out, in, 300));
    const auto& coded = base->get<Weight>();
    Layer layer(base, {.max_rank = rank}, cuda_);
    const auto x = activations(tokens, in, 21), dy = activations(tokens, out, 22);
    Matrix<bfloat16> y(tokens, out), dx(tokens, in), dense(out, in), room(out, in);
    cuda_.dequantize(coded.view(), dense.view());
    Matrix<float> scales(1, out * in / 64), u(tokens, rank), t(tokens, rank);
    Layer::Context kept;
    const auto lora = [&](auto&& forward, auto&& backward) {
      const auto& a = layer.adapter().a();
      const auto& b = layer.adapter().b();
      for (int pass = 0; pass < 2; ++pass) {
        forward();
        cuda_.matmul(x.view(), a.value.view(), u.view());
        cuda_.matmul_transposed(std::as_const(u).view(), b.value.view(), y.view(), qd::Update::accumulate);
      }
      backward();
      cuda_.matmul(dy.view(), b.value.view(), t.view());
      cuda_.weight_gradient(std::as_const(u).view(), dy.view(), layer.adapter().b().gradient.view(), qd::Update::accumulate);
      cuda_.weight_gradient(std::as_const(t).view(), x.view(), layer.adapter().a().gradient.view(), qd::Update::accumulate);
      cuda_.matmul_transposed(std::as_const(t).view(), a.value.view(), dx.view(), qd::Update::accumulate);
    };
    std::vector<Competitor> competitors{{"ours",
                                         [&] {
                                           layer.forward(x.view(), y.view(), kept);
                                           layer.forward(x.view(), y.view(), kept);
                                           layer.backward(dy.view(), dx.view(), kept);
                                         }},
                                        {"cublas", [&] {
                                           lora([&] { cuda_.matmul(x.view(), dense.view(), y.view()); },
                                                [&] { cuda_.matmul_transposed(dy.view(), dense.view(), dx.view()); });
                                         }}};
    if (peer_)
      competitors.push_back({"bitsandbytes, decoded", [&] {
                               lora(
                                   [&] {
                                     decode_by_peer(coded, scales, room);
                                     cuda_.matmul(x.view(), room.view(), y.view());
                                   },
                                   [&] {
                                     decode_by_peer(coded, scales, room);
                                     cuda_.matmul_transposed(dy.view(), room.view(), dx.view());
                                   });
                             }});
    const auto times = watch_.compare(competitors, 1, options_.rounds, false);
    for (std::size_t c = 0; c < competitors.size(); ++c)
      std::printf("{\"op\": \"layer\", \"out\": %lld, \"in\": %lld, \"tokens\": %lld, \"who\": \"%s\", \"us\": %.3f}\n",
                  static_cast<long long>(out), static_cast<long long>(in), static_cast<long long>(tokens), competitors[c].name.c_str(),
                  times[c].median);
    std::fflush(stdout);
  }

 private:
  static constexpr float scale_offset = 0.02f;

  /// So many weights that they fill 256 MB, which no cache holds.
  static int copies_of(Index out, Index in) { return static_cast<int>(std::clamp<Index>((Index{256} << 20) / (out * in / 2) + 1, 2, 32)); }

  Weight random_weight(Index out, Index in, std::uint64_t seed) const {
    const Index count = out * in, scales = count / 64, nested = (scales + 255) / 256;
    qd::Buffer<std::uint8_t, qd::DeviceMemory> codes(count / 2, context_.memory()), scale_codes(scales, context_.memory());
    qd::Buffer<float, qd::DeviceMemory> absmax(nested, context_.memory());
    bench::random_bytes<<<blocks, threads, 0, stream_>>>(codes.data(), codes.size(), seed << 40);
    bench::random_bytes<<<blocks, threads, 0, stream_>>>(scale_codes.data(), scale_codes.size(), (seed << 40) + 0x1234567);
    cuda_.fill(MatrixView<float>(absmax.data(), 1, nested), 0.01f);
    return {out, in, 64, std::move(codes), {std::move(scale_codes), std::move(absmax), scale_offset}};
  }
  Matrix<float> numbers(Index rows, Index cols, std::uint64_t seed, float deviation) const {
    Matrix<float> x(rows, cols);
    bench::fill_random(context_, x.view(), seed << 40, deviation);
    return x;
  }
  Matrix<bfloat16> activations(Index rows, Index cols, std::uint64_t seed) const {
    Matrix<bfloat16> x(rows, cols);
    cuda_.copy(numbers(rows, cols, seed, 1.0f).view(), x.view());
    return x;
  }

  void multiply_by_peer(const Matrix<bfloat16>& x, const Weight& w, Matrix<bfloat16>& y) const {
    peer_->gemm(x.data(), w.codes().data(), w.scales().nested_absmax.data(), w.scales().codes.data(), map_.data(), offset_.data(), y.data(),
                static_cast<int>(x.rows()), static_cast<int>(w.rows()), static_cast<int>(w.cols()), stream_);
  }
  void decode_by_peer(const Weight& w, Matrix<float>& scales, Matrix<bfloat16>& out) const {
    const auto count = static_cast<int>(w.blocks());
    peer_->dequantize_scales(map_.data(), w.scales().codes.data(), w.scales().nested_absmax.data(), scales.data(), count, stream_);
    add_constant<<<blocks, threads, 0, stream_>>>(scales.data(), count, offset_.data());
    peer_->dequantize(w.codes().data(), scales.data(), out.data(), static_cast<int>(w.size()), stream_);
  }

  /// ||y - exact|| / ||exact|| over some columns of the first tokens.
  double distance(const Matrix<bfloat16>& x, const Matrix<float>& w, bool forward, const Matrix<bfloat16>& y) const {
    const Index tokens = std::min<Index>(x.rows(), 16), cols = 64, spread = y.cols() / cols;
    Matrix<double> exact(tokens, cols);
    exact_product<<<dim3(static_cast<unsigned>(cols), static_cast<unsigned>(tokens)), threads, 0, stream_>>>(
        x.data(), x.cols(), w.data(), forward ? w.cols() : 1, forward ? 1 : w.cols(), spread, exact.data());
    qd::Matrix<double> expected(tokens, cols);
    qd::Matrix<bfloat16> found(tokens, y.cols());
    cuda_.download(std::as_const(exact).view(), expected.view());
    cuda_.download(y.view().top_rows(tokens), found.view());
    double error = 0.0, size = 0.0;
    for (Index t = 0; t < tokens; ++t)
      for (Index c = 0; c < cols; ++c) {
        const double d = static_cast<double>(static_cast<float>(found(t, c * spread))) - expected(t, c);
        error += d * d;
        size += expected(t, c) * expected(t, c);
      }
    return std::sqrt(error / size);
  }

  const qd::CudaContext& context_;
  Cuda cuda_;
  bench::Stopwatch watch_;
  Options options_;
  cudaStream_t stream_;
  Matrix<float> map_, offset_;
  std::optional<bench::Bitsandbytes> peer_;
};

Options parse(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    const auto value = [&] {
      if (i + 1 >= argc) throw qd::Error(qd::Errc::bad_argument, argument + ": expected a value");
      return std::string(argv[++i]);
    };
    if (argument == "--bitsandbytes") options.bitsandbytes = value();
    else if (argument == "--rounds") options.rounds = std::max(1, std::stoi(value()));
    else if (argument == "--quick") options.quick = true;
    else throw qd::Error(qd::Errc::bad_argument, "unknown option " + argument);
  }
  return options;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const Options options = parse(argc, argv);
    const qd::CudaContext context({.workspace_bytes = std::size_t{128} << 20});
    const Bench bench(context, options);
    bench.machine();
    bench.ceilings();
    // Linear layers of LLaMA 7B, 13B and 65B, alone and fused, and of Falcon-40b.
    std::vector<std::pair<Index, Index>> shapes = {{4096, 4096},  {11008, 4096}, {4096, 11008}, {12288, 4096}, {22016, 4096},
                                                   {5120, 5120},  {13824, 5120}, {5120, 13824}, {8192, 8192},  {22016, 8192},
                                                   {8192, 22016}, {9216, 8192},  {32768, 8192}, {8192, 32768}};
    std::vector<Index> tokens = {1, 4, 16, 32, 64, 128, 256, 512, 1024, 4096};
    if (options.quick) {
      shapes = {{4096, 4096}, {11008, 4096}};
      tokens = {1, 16, 128};
    }
    for (const auto& [out, in] : shapes) bench.products(out, in, tokens);
    for (const auto& [out, in] : shapes) bench.adapters(out, in, {1, 16, 128});
    for (const auto& [out, in] : shapes) bench.layers(out, in, options.quick ? 256 : 2048);
    return 0;
  } catch (const qd::Error& error) {
    std::fprintf(stderr, "gpu_bench: %s\n", error.what());
    return error.code() == qd::Errc::device ? 77 : 2;  // 77: there is no device
  }
}
