// The cells of a benchmark, each a line of JSON: products, layers and ceilings of one device, ours beside cuBLAS in bfloat16 and bitsandbytes.
//
// Weights are random codes with random scales, activations random: constant data runs faster, because it draws less power. Each
// operation cycles through as many weights as exceed the second-level cache several times over.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/cuda.hpp>
#include <qdylora/nn/dynamic_lora_linear.hpp>

#include "bitsandbytes.hpp"
#include "kernels.cuh"
#include "random.cuh"
#include "timing.hpp"

namespace bench {

namespace qd = qdylora;
using qd::bfloat16, qd::Cuda, qd::Index, qd::MatrixView;

struct Options {
  std::string bitsandbytes = {};
  bool quick = false;
  int rounds = 31;
  Index weight_bytes = Index{256} << 20;  // that an operation cycles through, more than any cache holds
};

class Cells {
  template <class T>
  using Matrix = qd::Matrix<T, qd::DeviceMemory>;
  using Layer = qd::DynamicLoRALinear<bfloat16, Cuda>;
  using Weight = qd::QuantizedTensor<qd::NF4, qd::DoubleQuant<>, qd::DeviceMemory>;

 public:
  Cells(const qd::CudaContext& context, const Options& options, std::FILE* lines = stdout)
      : context_(context),
        cuda_(context),
        watch_(context),
        options_(options),
        lines_(lines),
        stream_(context.stream()),
        map_(1, 256),
        offset_(1, 1) {
    qd::Matrix<float> map(1, 256), offset(1, 1);
    for (Index i = 0; i < 256; ++i) map(0, i) = qd::DynamicMap8::values[static_cast<std::size_t>(i)];
    offset(0, 0) = scale_offset;
    cuda_.upload(map.view(), map_.view());
    cuda_.upload(offset.view(), offset_.view());
    context.synchronize();
    if (options.bitsandbytes.empty()) return;
    try {
      peer_.emplace(options.bitsandbytes);
    } catch (const qd::Error& error) {
      std::fprintf(stderr, "ours is beside cuBLAS alone: %s\n", error.what());
    }
  }

  /// Whether bitsandbytes' library was there, and loaded.
  bool has_peer() const noexcept { return peer_.has_value(); }

  void machine() const {
    int driver = 0, runtime = 0, clock = 0, memory_clock = 0;
    cudaDriverGetVersion(&driver);
    cudaRuntimeGetVersion(&runtime);
    cudaDeviceGetAttribute(&clock, cudaDevAttrClockRate, context_.device());
    cudaDeviceGetAttribute(&memory_clock, cudaDevAttrMemoryClockRate, context_.device());
    const auto& p = context_.properties();
    std::fprintf(lines_,
                 "{\"machine\": {\"gpu\": \"%s\", \"capability\": \"%d.%d\", \"processors\": %d, \"l2_bytes\": %d, \"memory_bytes\": %zu, "
                 "\"driver\": %d, \"runtime\": %d, \"clock_khz\": %d, \"memory_clock_khz\": %d, \"cublaslt\": %zu}}\n",
                 p.name, p.major, p.minor, p.multiProcessorCount, p.l2CacheSize, p.totalGlobalMem, driver, runtime, clock, memory_clock,
                 cublasLtGetVersion());
  }

  /// What memory and tensor cores do at best: copies and reads of so many bytes, a product n x n x n.
  void ceilings(Index bytes = Index{2} << 30, Index n = 8192) const {
    qd::Buffer<std::uint8_t, qd::DeviceMemory> source(bytes, context_.memory()), target(bytes, context_.memory());
    fill_random(context_, source, 1);
    Matrix<std::uint32_t> sum(1, 1);
    const ReadWords read{reinterpret_cast<const qd::device::Words<4>*>(source.data()), bytes / 16, sum.data()};
    const auto blocks = static_cast<unsigned>(64 * context_.properties().multiProcessorCount);
    const auto copy = [&] {
      QDYLORA_CUDA_TRY(cudaMemcpyAsync(target.data(), source.data(), source.bytes(), cudaMemcpyDeviceToDevice, stream_));
    };
    const auto times =
        watch_.compare({{"copy", copy}, {"read", [&] { qd::device::launch({stream_, blocks}, read); }}}, 1, options_.rounds);
    std::fprintf(lines_, "{\"ceiling\": \"copy\", \"tb_s\": %.4f}\n", 2e-6 * static_cast<double>(bytes) / times[0].median);
    std::fprintf(lines_, "{\"ceiling\": \"read\", \"tb_s\": %.4f}\n", 1e-6 * static_cast<double>(bytes) / times[1].median);
    const auto a = activations(n, n, 3), b = activations(n, n, 4);
    Matrix<bfloat16> y(n, n);
    const auto product = watch_.compare({{"cublaslt", [&] { cuda_.matmul(a.view(), b.view(), y.view()); }}}, 1, options_.rounds);
    std::fprintf(lines_, "{\"ceiling\": \"bfloat16\", \"tflop_s\": %.1f}\n", 2e-6 * static_cast<double>(n * n * n) / product[0].median);
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
        compare_products(forward ? "forward" : "backward", competitors, copies, x, decoded, forward, y);
      }
  }

  /// The kernels that can make a forward product, each by itself: what the limits of product_plan.hpp should be. Slabs alone where the
  /// context decodes and multiplies them in turns, instead of side by side.
  void kernels(Index out, Index in, const std::vector<Index>& tokens_list) const {
    const int copies = copies_of(out, in);
    std::vector<Weight> coded;
    for (int i = 0; i < copies; ++i) coded.push_back(random_weight(out, in, 100 + static_cast<std::uint64_t>(i)));
    Matrix<float> decoded(out, in);
    cuda_.dequantize(coded.back().view(), decoded.view());
    for (const Index tokens : tokens_list) {
      const auto x = activations(tokens, in, 7);
      Matrix<bfloat16> y(tokens, out);
      std::vector<Competitor> competitors;
      const auto add = [&](const char* name, auto multiply) {
        competitors.push_back({name, [&, multiply] {
                                 const MatrixView<const bfloat16> tokens_view = x.view();
                                 for (const Weight& w : coded) multiply(context_, tokens_view, w.view(), y.view(), qd::Update::overwrite);
                               }});
      };
      const bool side_by_side = context_.decoding_stream() != nullptr;
      if (side_by_side && context_.compute_capability() >= 80 && in % 64 == 0) {
        if (tokens <= 32) add("small_batch", [](auto&&... operands) { qd::detail::multiply_small_batch(operands...); });
        add("tiles", [](auto&&... operands) { qd::detail::multiply_tiles(operands...); });
      }
      if (side_by_side && context_.sm90a() && in % 256 == 0)
        add("warpgroup_tiles", [](auto&&... operands) { qd::detail::multiply_warpgroup_tiles(operands...); });
      add(side_by_side ? "slabs" : "slabs in turns", [](auto&&... operands) { qd::detail::multiply_by_slabs(operands...); });
      compare_products("kernel", competitors, copies, x, decoded, true, y);
    }
  }

  /// Products by slabs with an adapter's term of rank 64, appended to their operands or added to y afterwards: what
  /// ProductLimits::augmented should be.
  void terms(Index out, Index in, const std::vector<Index>& tokens_list) const {
    const int copies = copies_of(out, in);
    constexpr Index rank = 64;
    std::vector<Weight> coded;
    for (int i = 0; i < copies; ++i) coded.push_back(random_weight(out, in, 100 + static_cast<std::uint64_t>(i)));
    for (const Index tokens : tokens_list)
      for (const bool forward : {true, false}) {
        const Index depth = forward ? in : out, width = forward ? out : in;
        const auto x = activations(tokens, depth, 7);
        const auto b = numbers(rank, width, 8, 0.02f);
        auto u = numbers(tokens, rank, 9, 1.0f);
        Matrix<bfloat16> y(tokens, width), rounded(rank, width);
        const auto every = [&](auto&& f) {
          return [&, f] {
            for (const Weight& w : coded) f(w.view());
          };
        };
        const auto times = watch_.compare(
            {{"appended", every([&](const auto& w) {
                cuda_.copy(b.view(), rounded.view());
                const qd::AdapterTerm<bfloat16> term{.u = u.view(), .b = std::as_const(rounded).view()};
                if (forward) qd::detail::multiply_by_augmented_slabs(context_, x.view(), w, y.view(), qd::Update::overwrite, term);
                else qd::detail::multiply_transposed_by_augmented_slabs(context_, x.view(), w, y.view(), qd::Update::overwrite, term);
              })},
             {"added", every([&](const auto& w) {
                if (forward) qd::detail::multiply_by_slabs(context_, x.view(), w, y.view(), qd::Update::overwrite);
                else qd::detail::multiply_transposed_by_slabs(context_, x.view(), w, y.view(), qd::Update::overwrite);
                cuda_.matmul_transposed(u.view(), b.view(), y.view(), qd::Update::accumulate);
              })}},
            copies, options_.rounds);
        std::fprintf(lines_,
                     "{\"op\": \"term\", \"out\": %lld, \"in\": %lld, \"tokens\": %lld, \"forward\": %s, \"appended_us\": %.3f, "
                     "\"added_us\": %.3f}\n",
                     static_cast<long long>(out), static_cast<long long>(in), static_cast<long long>(tokens), forward ? "true" : "false",
                     times[0].median, times[1].median);
        std::fflush(lines_);
      }
  }

  /// A layer's forward pass with its adapter at some ranks; rank 0 is the base alone.
  void adapters(Index out, Index in, const std::vector<Index>& tokens_list) const {
    const int copies = copies_of(out, in);
    std::vector<Layer> layers;
    for (int i = 0; i < copies; ++i) layers.push_back(random_layer(out, in, 200 + 2 * static_cast<std::uint64_t>(i)));
    for (Layer& layer : layers) layer.set_training(false);  // as where a text is generated
    for (const Index tokens : tokens_list) {
      const auto x = activations(tokens, in, 13);
      Matrix<bfloat16> y(tokens, out);
      constexpr Index ranks[] = {0, 8, 64};
      Layer::Context kept[std::size(ranks)];
      std::vector<Competitor> competitors;
      for (std::size_t r = 0; r < std::size(ranks); ++r)
        competitors.push_back({std::to_string(ranks[r]), [&, r] {
                                 for (Layer& layer : layers) {
                                   layer.set_ranks(qd::RankPlan::uniform(ranks[r]));
                                   layer.forward(x.view(), y.view(), kept[r]);
                                 }
                               }});
      const auto times = watch_.compare(competitors, copies, options_.rounds);
      for (std::size_t c = 0; c < competitors.size(); ++c)
        std::fprintf(lines_, "{\"op\": \"adapter\", \"out\": %lld, \"in\": %lld, \"tokens\": %lld, \"rank\": %s, \"us\": %.3f}\n",
                     static_cast<long long>(out), static_cast<long long>(in), static_cast<long long>(tokens), competitors[c].name.c_str(),
                     times[c].median);
      std::fflush(lines_);
    }
  }

  /// What a checkpointed training step does to a layer: forward, forward again, backward, with an adapter of rank 64 whose products are the
  /// same for all; the base is ours, dense, or decoded by bitsandbytes.
  void layers(Index out, Index in, Index tokens) const {
    Layer layer = random_layer(out, in, 300);
    const Index rank = layer.adapter().max_rank();
    const auto& coded = layer.base()->get<Weight>();
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
    const auto times = watch_.compare(competitors, 1, options_.rounds);
    for (std::size_t c = 0; c < competitors.size(); ++c)
      std::fprintf(lines_, "{\"op\": \"layer\", \"out\": %lld, \"in\": %lld, \"tokens\": %lld, \"who\": \"%s\", \"us\": %.3f}\n",
                  static_cast<long long>(out), static_cast<long long>(in), static_cast<long long>(tokens), competitors[c].name.c_str(),
                  times[c].median);
    std::fflush(lines_);
  }

 private:
  static constexpr float scale_offset = 0.02f;

  /// Times competitors, each of which makes y of x and `copies` weights; `decoded` is the last one.
  void compare_products(const char* op, const std::vector<Competitor>& competitors, int copies, const Matrix<bfloat16>& x,
                        const Matrix<float>& decoded, bool forward, Matrix<bfloat16>& y) const {
    const auto times = watch_.compare(competitors, copies, options_.rounds);
    for (std::size_t c = 0; c < competitors.size(); ++c) {
      cuda_.fill(y.view(), bfloat16(std::numeric_limits<float>::quiet_NaN()));
      competitors[c].run();
      const double error = distance(x, decoded, forward, y);
      std::fprintf(lines_,
                   "{\"op\": \"%s\", \"out\": %lld, \"in\": %lld, \"tokens\": %lld, \"who\": \"%s\", \"us\": %.3f, "
                   "\"quartiles\": [%.3f, %.3f], \"error\": %.4e}\n",
                   op, static_cast<long long>(decoded.rows()), static_cast<long long>(decoded.cols()), static_cast<long long>(x.rows()),
                   competitors[c].name.c_str(), times[c].median, times[c].least, times[c].most,
                   std::isfinite(error) ? error : 1e30);  // JSON has no NaN
    }
    std::fflush(lines_);
  }

  /// So many weights that they fill options_.weight_bytes.
  int copies_of(Index out, Index in) const {
    return static_cast<int>(std::clamp<Index>(options_.weight_bytes / (out * in / 2) + 1, 2, 32));
  }

  Weight random_weight(Index out, Index in, std::uint64_t seed) const {
    const Index count = out * in, scales = count / 64, nested = (scales + 255) / 256;
    qd::Buffer<std::uint8_t, qd::DeviceMemory> codes(count / 2, context_.memory()), scale_codes(scales, context_.memory());
    qd::Buffer<float, qd::DeviceMemory> absmax(nested, context_.memory());
    fill_random(context_, codes, seed << 40);
    fill_random(context_, scale_codes, (seed << 40) + 0x1234567);
    cuda_.fill(MatrixView<float>(absmax.data(), 1, nested), 0.01f);
    return {out, in, 64, std::move(codes), {std::move(scale_codes), std::move(absmax), scale_offset}};
  }
  /// With an adapter of rank 64, of random A and B.
  Layer random_layer(Index out, Index in, std::uint64_t seed) const {
    Layer layer(std::make_shared<const Layer::WeightType>(random_weight(out, in, seed)), {.max_rank = 64}, cuda_);
    fill_random(context_, layer.adapter().b().value.view(), (seed + 1) << 40, 0.02f);
    return layer;
  }
  Matrix<float> numbers(Index rows, Index cols, std::uint64_t seed, float deviation) const {
    Matrix<float> x(rows, cols);
    fill_random(context_, x.view(), seed << 40, deviation);
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
    qd::detail::for_each(context_, 1, count, AddConstant{scales.view(), offset_.data()});
    peer_->dequantize(w.codes().data(), scales.data(), out.data(), static_cast<int>(w.size()), stream_);
  }

  /// ||y - exact|| / ||exact|| over some columns of the first tokens.
  double distance(const Matrix<bfloat16>& x, const Matrix<float>& w, bool forward, const Matrix<bfloat16>& y) const {
    const Index tokens = std::min<Index>(x.rows(), 16), cols = 64, spread = y.cols() / cols;
    Matrix<double> exact(tokens, cols);
    qd::device::launch({stream_, dim3(static_cast<unsigned>(cols), static_cast<unsigned>(tokens)), ExactProduct::shared_bytes},
                       ExactProduct{x.view(), w.data(), forward ? w.cols() : 1, forward ? 1 : w.cols(), spread, exact.view()});
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
  Stopwatch watch_;
  Options options_;
  std::FILE* lines_;
  cudaStream_t stream_;
  Matrix<float> map_, offset_;
  std::optional<Bitsandbytes> peer_;
};

}  // namespace bench
