// Quantization and dequantization on the host, to bitsandbytes' CPU arithmetic bit for bit.
//
// Per block: absmax = max |x|;  v = x * (1 / absmax), clamped to [-1, 1], encoded. The divisor is at least 1e-38, so a block of zeros
// has absmax 0 and zero codes. The last block, when it is short, stores its absmax clamped and divides instead of multiplying.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <string>
#include <utility>
#include <vector>

#include <qdylora/quant/quantized_tensor.hpp>

namespace qdylora {

/// NaN or infinity among the weights. reject: Errc::non_finite, naming the first. propagate: NaN poisons its block (every element decodes
/// to NaN); infinity makes its block's absmax infinite, as bitsandbytes on the CPU. Under double quantization, where scales share an offset, either
/// makes all blocks NaN.
enum class NonFinite { reject, propagate };

struct QuantizeOptions {
  Index block_size = 64;
  NonFinite non_finite = NonFinite::reject;
};

/// Runs f(0) ... f(count - 1) in order. The parallel form is a backend's parallel_for.
struct SerialFor {
  template <class F>
  void operator()(Index count, F&& f) const {
    for (Index i = 0; i < count; ++i) f(i);
  }
};

namespace detail {

inline constexpr float smallest_divisor = 1e-38f;

// max |x|, NaN if any element is NaN (std::max would drop it).
inline float absolute_maximum(const float* x, Index count) noexcept {
  std::uint32_t largest = 0;  // as an unsigned integer, |x| orders like a float, and NaN is above infinity
  for (Index i = 0; i < count; ++i) largest = std::max(largest, std::bit_cast<std::uint32_t>(x[i]) & 0x7FFFFFFFu);
  return std::bit_cast<float>(largest);
}

// Encodes one block of `count` elements into `codes`, one code per byte; returns the absmax to store.
template <CodeFormat Format>
float encode_block(const float* x, Index count, bool partial, std::uint8_t* codes) noexcept {
  const float absmax = absolute_maximum(x, count);
  const float divisor = absmax < smallest_divisor ? smallest_divisor : absmax;
  const float reciprocal = 1.0f / divisor;
  for (Index i = 0; i < count; ++i) {
    float v = partial ? x[i] / divisor : x[i] * reciprocal;
    v = v > 1.0f ? 1.0f : v;
    v = v < -1.0f ? -1.0f : v;
    codes[i] = Format::encode(v);
  }
  return partial ? divisor : absmax;
}

[[noreturn]] inline void raise_non_finite(Index row, Index col) {
  raise(Errc::non_finite, "weight " + shape_text(row, col) + " is not finite");
}

// How a Quantizer encodes a block where it is not told better: packed(x, count, partial, out) writes codes as a tensor stores them and
// returns the absmax to store. A backend's kernels do the same.
template <CodeFormat Format>
struct BlockEncoder {
  // Not inline: g++ 12 would warn of writes to a tensor of no elements, which are never made.
  __attribute__((noinline)) float operator()(const float* x, Index count, bool partial, std::uint8_t* out) const noexcept {
    if constexpr (Format::bits == 8) {
      return encode_block<Format>(x, count, partial, out);
    } else {
      std::uint8_t codes[4097];  // the largest block, and one to fill the last byte
      const float absmax = encode_block<Format>(x, count, partial, codes);
      if (count & 1) codes[count] = Format::encode(0.0f);
      for (Index i = 0; i < count; i += 2) out[i / 2] = static_cast<std::uint8_t>((codes[i] << 4) | codes[i + 1]);
      return absmax;
    }
  }
};

}  // namespace detail

/// 8-bit blockwise quantization (bitsandbytes quantize_blockwise, exact nearest): codes[i] for x[i] / absmax of its block of
/// `block_size`, no clamping of the divisor: a block of zeros has absmax 0 and code 0, which decodes to 0.
template <CodeFormat Code, class ParallelFor = SerialFor>
void quantize_blockwise(std::span<const float> x, Index block_size, std::span<std::uint8_t> codes, std::span<float> absmax,
                        ParallelFor&& parallel_for = {}) {
  static_assert(Code::bits == 8);
  const auto count = static_cast<Index>(x.size());
  QDYLORA_EXPECTS(block_size > 0, block_size, "quantize_blockwise: block size must be positive");
  const Index blocks = count / block_size + (count % block_size != 0);
  QDYLORA_EXPECTS(static_cast<Index>(codes.size()) == count && static_cast<Index>(absmax.size()) == blocks, shape_mismatch,
                  "quantize_blockwise: expected " + std::to_string(count) + " codes and " + std::to_string(blocks) + " absmax");
  parallel_for(blocks, [&](Index block) {
    const Index begin = block * block_size;
    const Index end = std::min(count, begin + block_size);
    float largest = 0.0f;
    for (Index i = begin; i < end; ++i) largest = std::fmax(largest, std::fabs(x[static_cast<std::size_t>(i)]));
    absmax[static_cast<std::size_t>(block)] = largest;
    const float reciprocal = 1.0f / largest;
    for (Index i = begin; i < end; ++i) {
      const auto at = static_cast<std::size_t>(i);
      codes[at] = largest == 0.0f ? std::uint8_t{0} : Code::encode(x[at] * reciprocal);
    }
  });
}

/// First-level absmax -> their stored form. The offset is the mean, summed in double.
template <class Scales, MemoryResource Memory = HostMemory, class ParallelFor = SerialFor>
typename Scales::template Storage<Memory> make_scales(std::span<const float> absmax, ParallelFor&& parallel_for = {}) {
  typename Scales::template Storage<Memory> storage;
  const auto blocks = static_cast<Index>(absmax.size());
  if constexpr (Scales::nested) {
    double sum = 0.0;
    for (const float a : absmax) sum += static_cast<double>(a);
    storage.offset = blocks == 0 ? 0.0f : static_cast<float>(sum / static_cast<double>(blocks));
    std::vector<float> centred(absmax.begin(), absmax.end());
    for (float& a : centred) a -= storage.offset;
    constexpr Index nested_block = Scales::nested_block_size;
    storage.codes = Buffer<std::uint8_t, Memory>(blocks);
    storage.nested_absmax = Buffer<float, Memory>(detail::div_up(blocks, nested_block));
    quantize_blockwise<typename Scales::SecondLevel>(centred, nested_block, storage.codes.span(), storage.nested_absmax.span(),
                                                     parallel_for);
  } else {
    storage.absmax = Buffer<float, Memory>(blocks);
    std::copy(absmax.begin(), absmax.end(), storage.absmax.data());
  }
  return storage;
}

/// Quantizes a matrix that arrives in pieces, so that loading a model never holds a weight in full precision: append rows in order, in
/// chunks of any size, then finish(). Memory beyond the result: one float copy of the largest chunk.
template <CodeFormat Format = NF4, class Scales = DoubleQuant<DynamicMap8>>
class Quantizer {
 public:
  Quantizer(Index rows, Index cols, QuantizeOptions options = {}) : rows_(rows), cols_(cols), options_(options) {
    expect_block_size(options.block_size);
    QDYLORA_EXPECTS(rows >= 0 && cols >= 0 && (cols == 0 || rows <= std::numeric_limits<Index>::max() / cols), bad_argument,
                    "Quantizer: " + detail::shape_text(rows, cols) + " is not a shape");
    const Index size = rows * cols;
    codes_ = Buffer<std::uint8_t>(code_bytes<Format>(size));
    absmax_.resize(static_cast<std::size_t>(size / options.block_size + (size % options.block_size != 0)));
  }

  /// The next rows, [any, cols]. Throws Errc::non_finite (policy reject) before anything of the chunk is kept.
  template <Scalar T, class ParallelFor = SerialFor, class Encoder = detail::BlockEncoder<Format>>
  void append(MatrixView<const T> chunk, ParallelFor&& parallel_for = {}, const Encoder& encode = {}) {
    QDYLORA_EXPECTS(chunk.cols == cols_ && chunk.rows <= rows_ - received_ / std::max<Index>(cols_, 1), shape_mismatch,
                    "Quantizer::append: chunk " + shape_text(chunk) + " does not fit the remaining rows of " +
                        detail::shape_text(rows_, cols_));
    const auto carried = static_cast<Index>(carry_.size());
    const float* source = nullptr;
    if constexpr (std::is_same_v<T, float>)
      if (carried == 0 && chunk.contiguous()) source = chunk.data;
    Buffer<float> staged;
    if (source == nullptr) {
      staged = Buffer<float>(carried + chunk.size());
      std::copy(carry_.begin(), carry_.end(), staged.data());
      constexpr Index rows_per_task = 16;
      parallel_for(detail::div_up(chunk.rows, rows_per_task), [&](Index task) {
        for (Index i = task * rows_per_task; i < std::min(chunk.rows, (task + 1) * rows_per_task); ++i)
          for (Index j = 0; j < cols_; ++j) staged[carried + i * cols_ + j] = static_cast<float>(chunk(i, j));
      });
      source = staged.data();
    }

    const Index block = options_.block_size;
    const Index count = carried + chunk.size();
    const bool last = received_ + chunk.size() == rows_ * cols_;
    const Index whole = count / block;
    const Index encoded = last ? count : whole * block;
    constexpr Index blocks_per_task = 256;
    const Index blocks = last ? detail::div_up(count, block) : whole;
    const Index first_block = done_ / block;
    std::atomic<Index> first_bad{count};
    parallel_for(detail::div_up(blocks, blocks_per_task), [&](Index task) {
      for (Index b = task * blocks_per_task; b < std::min(blocks, (task + 1) * blocks_per_task); ++b) {
        const Index size = std::min(block, count - b * block);
        // Blocks start at even elements, so they never share a byte.
        std::uint8_t* out = codes_.data() + (done_ + b * block) * Format::bits / 8;
        const float absmax = encode(source + b * block, size, size < block, out);
        absmax_[static_cast<std::size_t>(first_block + b)] = absmax;
        if (!(absmax <= std::numeric_limits<float>::max())) note_bad(first_bad, source, b * block);
      }
    });
    for (Index i = encoded; i < count; ++i)
      if (!(std::fabs(source[i]) <= std::numeric_limits<float>::max())) note_bad(first_bad, source, i);
    if (const Index bad = first_bad.load(); bad < count && options_.non_finite == NonFinite::reject) {
      const Index element = received_ - carried + bad;
      detail::raise_non_finite(element / cols_, element % cols_);
    }
    received_ += chunk.size();
    done_ += encoded;
    carry_.assign(source + encoded, source + count);
  }

  /// The tensor. Throws Errc::state_order unless every row has arrived.
  template <class ParallelFor = SerialFor>
  QuantizedTensor<Format, Scales> finish(ParallelFor&& parallel_for = {}) && {
    QDYLORA_EXPECTS(done_ == rows_ * cols_, state_order,
                    "Quantizer::finish: " + std::to_string(received_) + " of " + std::to_string(rows_ * cols_) + " elements arrived");
    return {rows_, cols_, options_.block_size, std::move(codes_), make_scales<Scales>(absmax_, parallel_for)};
  }

 private:
  // The first element from `begin` on that is not finite; there is one.
  static void note_bad(std::atomic<Index>& first, const float* source, Index begin) {
    while (std::fabs(source[begin]) <= std::numeric_limits<float>::max()) ++begin;
    Index seen = first.load();
    while (begin < seen && !first.compare_exchange_weak(seen, begin)) {
    }
  }

  Index rows_, cols_;
  QuantizeOptions options_;
  Buffer<std::uint8_t> codes_;
  std::vector<float> absmax_;
  std::vector<float> carry_;  // elements of a block that is not complete yet
  Index received_ = 0;        // elements
  Index done_ = 0;            // elements encoded, a multiple of the block size until the end
};

/// Quantizes a whole matrix.
template <CodeFormat Format = NF4, class Scales = DoubleQuant<DynamicMap8>, class T, class ParallelFor = SerialFor,
          class Encoder = detail::BlockEncoder<Format>>
QuantizedTensor<Format, Scales> quantize(MatrixView<T> weight, QuantizeOptions options = {}, ParallelFor&& parallel_for = {},
                                         const Encoder& encode = {}) {
  Quantizer<Format, Scales> quantizer(weight.rows, weight.cols, options);
  quantizer.append(MatrixView<const std::remove_const_t<T>>(weight), parallel_for, encode);
  return std::move(quantizer).finish(parallel_for);
}

namespace detail {

// Both elements of each byte of a 4-bit format.
template <CodeFormat Format>
inline constexpr auto value_pairs = [] {
  std::array<std::array<float, 2>, 256> pairs{};
  for (std::size_t byte = 0; byte < 256; ++byte) pairs[byte] = {Format::values[byte >> 4], Format::values[byte & 15]};
  return pairs;
}();

}  // namespace detail

/// Decodes elements [begin, begin + count) of the flattened tensor into out.
template <Scalar T, CodeFormat Format, class Scales>
void dequantize_range(const QuantizedView<Format, Scales>& tensor, Index begin, Index count, T* QDYLORA_RESTRICT out) noexcept {
  using Acc = float;  // values and scales are float32 whatever T is
  const Index end = begin + count;
  for (Index i = begin; i < end;) {
    const Index block = i / tensor.block_size;
    const Index stop = std::min(end, (block + 1) * tensor.block_size);
    const Acc scale = tensor.scales[block];
    if constexpr (Format::bits == 4) {
      if (i & 1) {
        *out++ = static_cast<T>(Format::values[tensor.codes[i >> 1] & 15] * scale);
        ++i;
      }
      const std::uint8_t* codes = tensor.codes + (i >> 1);
      const Index bytes = (stop - i) >> 1;
      for (Index j = 0; j < bytes; ++j) {
        const auto& pair = detail::value_pairs<Format>[codes[j]];
        out[2 * j] = static_cast<T>(pair[0] * scale);
        out[2 * j + 1] = static_cast<T>(pair[1] * scale);
      }
      out += 2 * bytes;
      i += 2 * bytes;
      if (i < stop) {
        *out++ = static_cast<T>(Format::values[tensor.codes[i >> 1] >> 4] * scale);
        ++i;
      }
    } else {
      for (; i < stop; ++i) *out++ = static_cast<T>(Format::values[tensor.codes[i]] * scale);
    }
  }
}

/// Decodes rows [first_row, first_row + out.rows), columns [first_col, first_col + out.cols) into out.
template <Scalar T, CodeFormat Format, class Scales>
void dequantize(const QuantizedView<Format, Scales>& tensor, MatrixView<T> out, Index first_row = 0, Index first_col = 0) {
  detail::expect_inside(tensor, out, first_row, first_col);
  for (Index i = 0; i < out.rows; ++i)
    dequantize_range(tensor, (first_row + i) * tensor.cols + first_col, out.cols, out.row(i));
}

}  // namespace qdylora
