// Products whose operands are not what cuBLASLt multiplies: codes, or elements of another type. A slab of the weight at a time is decoded
// into the workspace, where the L2 cache holds it if it can, and multiplied there, while the next one is decoded on a stream of its own:
//
//   decoding             slab 0   slab 1            slab 2 (into the memory of slab 0, once that is multiplied)
//   the context's        ....... 0 decoded: product 0   1 decoded: product 1   2 decoded: product 2
//
// Right for many tokens; the path of everything that has no other.
#pragma once

#include <qdylora/config.hpp>
#if !defined(QDYLORA_DEVICE_ONLY)

#include <algorithm>
#include <concepts>
#include <type_traits>

#include <qdylora/cuda/binary_codes.cuh>
#include <qdylora/cuda/dequantize.cuh>
#include <qdylora/cuda/gemm.cuh>

namespace qdylora::detail {

template <class W>
struct ElementOf {
  using type = void;  // codes
};
template <class S>
struct ElementOf<MatrixView<S>> {
  using type = std::remove_const_t<S>;
};
/// The element type of a dense weight, void for a quantized one.
template <class W>
using Element = typename ElementOf<W>::type;

template <class T>
concept SixteenBits = std::same_as<T, bfloat16> || std::same_as<T, half>;

/// The type that x and w (S; void for codes) are multiplied in where y is of Y.
///   Any double makes it double; floats stay floats, to the bit of float32.
///   A 16-bit y takes operands of its type: its own rounding is no smaller than theirs. But a half y of a float x is made of floats, since
///   gradients pass below half's range: those of logits, a probability over the tokens that are scored, are less than its least 6e-8.
///   A float y keeps what x and w are, or codes in the type of x. Float adapters beside bfloat16 activations are rounded to bfloat16, as
///   under autocast; half activations become float instead, for the same reason.
template <class X, class S, class Y>
constexpr auto product_type() {
  if constexpr (std::same_as<X, double> || std::same_as<S, double> || std::same_as<Y, double>) return std::type_identity<double>{};
  else if constexpr (std::same_as<X, float> && std::same_as<Y, half>) return std::type_identity<float>{};
  else if constexpr (SixteenBits<Y>) return std::type_identity<Y>{};
  else if constexpr (std::same_as<X, S> || std::is_void_v<S>) return std::type_identity<X>{};
  else if constexpr (std::same_as<X, bfloat16> && std::same_as<S, float>) return std::type_identity<bfloat16>{};
  else return std::type_identity<float>{};
}
template <class X, class S, class Y>
using ProductType = typename decltype(product_type<X, S, Y>())::type;

/// `slab` = the part of w that begins at (first_row, first_col).
template <CodeFormat Format, class Scales, class C>
void decode(cudaStream_t stream, const CudaContext& context, const QuantizedView<Format, Scales>& w, MatrixView<C> slab, Index first_row,
            Index first_col) {
  dequantize_on(stream, context, w, slab, first_row, first_col);
}
template <class S, class C>
void decode(cudaStream_t stream, const CudaContext& context, MatrixView<S> w, MatrixView<C> slab, Index first_row, Index first_col) {
  using X = std::remove_const_t<S>;
  const MatrixView<const X> part = w.middle_rows(first_row, slab.rows).middle_cols(first_col, slab.cols);
  for_each_neighbours_on(stream, context, slab.rows, slab.cols, device::Convert<X, C>{part, slab}, part, slab);
}

/// `extent` cut into pieces of nearly one size, each `most` at most: multiples of 128 where that leaves something, else of 8.
inline Index piece_of(Index extent, Index most) {
  most = std::max<Index>(most >= 128 ? most / 128 * 128 : most >= 8 ? most / 8 * 8 : most, 1);
  if (extent <= most) return std::max<Index>(extent, 1);
  const Index pieces = div_up(extent, most), step = most >= 128 ? 128 : most >= 8 ? 8 : 1;
  return rounded_up(div_up(extent, pieces), step);
}

/// f(begin, count) for the pieces of an extent.
template <class F>
void for_each_piece(Index extent, Index piece, F&& f) {
  for (Index begin = 0; begin < extent; begin += piece) f(begin, std::min(piece, extent - begin));
}

/// Rows of x as C, a piece at a time: where they are, or converted into the workspace, once where one piece is all.
template <class C, class X>
class ConvertedRows {
 public:
  static constexpr bool in_place = std::same_as<C, X>;

  ConvertedRows(Scratch& scratch, MatrixView<const X> x, Index most_bytes) : x_(x), at_once_(std::max<Index>(x.rows, 1)) {
    if constexpr (!in_place) {
      stride_ = (x.cols + 7) / 8 * 8;
      at_once_ = piece_of(x.rows, most_bytes / std::max<Index>(stride_ * static_cast<Index>(sizeof(C)), 1));
      copy_ = scratch.take<C>(at_once_ * stride_);
    }
  }
  Index at_once() const noexcept { return at_once_; }
  /// Valid until the next call.
  MatrixView<const C> take(const CudaContext& context, Index begin, Index count) const {
    if constexpr (in_place) {
      return x_.middle_rows(begin, count);
    } else {
      const MatrixView<C> copy(copy_, count, x_.cols, stride_);
      if (!all_here_) convert(context, x_.middle_rows(begin, count), copy);
      all_here_ = count == x_.rows;
      return copy;
    }
  }

 private:
  MatrixView<const X> x_;
  Index at_once_;
  Index stride_ = 0;
  C* copy_ = nullptr;
  mutable bool all_here_ = false;
};

/// make(stream, memory, first, count) makes the slab of an extent's lines [first, first + count) in `memory`, and use(memory, first, count)
/// multiplies it with so many tokens, for all slabs in order. room(count): elements of C that a slab takes; line_bytes: what one of its lines does.
/// A slab is as large as the cache holds, but no smaller than what gives every processor something to multiply.
template <class C, class Room, class Make, class Use>
void for_each_slab(const CudaContext& context, Scratch& scratch, Index tokens, Index extent, Index line_bytes, Room room, Make make, Use use) {
  const DecodingStream* side = context.decoding_stream();
  const Index memory_bytes = scratch.room() - std::min(gemm_workspace, scratch.room() / 4);
  const auto lines = [&](Index slabs) {
    const Index processors = context.properties().multiProcessorCount, least = context.least_slab_lines();
    if (least == 0) return piece_of(extent, slab_lines(line_bytes, slabs, context.slab_bytes(), 0, memory_bytes));  // the user has said how much
    const Index wanted = std::max(least, filling_lines(tokens, processors));
    return piece_of(extent, lines_of_full_rounds(tokens, processors, slab_lines(line_bytes, slabs, context.slab_bytes(), wanted, memory_bytes)));
  };
  Index at_once = lines(1);
  if (side != nullptr) {
    const Index halves = lines(2);
    const bool fit = 2 * (room(halves) * static_cast<Index>(sizeof(C)) + 256) <= scratch.room();
    if (halves < extent && fit) at_once = halves;
    else side = nullptr;  // one slab is all, or all there is room for
  }
  C* const memory[] = {scratch.take<C>(room(at_once)), side != nullptr ? scratch.take<C>(room(at_once)) : nullptr};
  if (side == nullptr) {
    for_each_piece(extent, at_once, [&](Index first, Index count) {
      make(context.stream(), memory[0], first, count);
      use(memory[0], first, count);
    });
    return;
  }
  order(context.stream(), side->stream.get(), side->begun);  // the workspace is free, the weight is there
  Index number = 0;
  for_each_piece(extent, at_once, [&](Index first, Index count) {
    const auto half = static_cast<std::size_t>(number % 2);
    if (number >= 2) QDYLORA_CUDA_TRY(cudaStreamWaitEvent(side->stream.get(), side->multiplied[half].get(), 0));
    make(side->stream.get(), memory[half], first, count);
    order(side->stream.get(), context.stream(), side->decoded[half]);
    use(memory[half], first, count);
    QDYLORA_CUDA_TRY(cudaEventRecord(side->multiplied[half].get(), context.stream()));
    ++number;
  });
}

/// y (+)= a . b, a piece of its rows at a time where they pass through the workspace as what cuBLASLt makes of a C: there is no half of floats.
template <class C, class Y>
void multiply_rows(const CudaContext& context, Scratch scratch, MatrixView<const C> a, const Factor<C>& b, MatrixView<Y> y, Update update) {
  if constexpr (MultipliedTypes<C, Y>) {
    gemm<C>(context, scratch, {a}, b, y, update);
  } else {
    const Index stride = (y.cols + 7) / 8 * 8, room = scratch.room() / 2 / (stride * static_cast<Index>(sizeof(C)));
    const Index at_once = std::min(y.rows, piece_of(y.rows, room));
    const MatrixView<C> sums(scratch.take<C>(at_once * stride), at_once, y.cols, stride);
    for_each_piece(y.rows, at_once, [&](Index begin, Index count) {
      const MatrixView<C> made = sums.top_rows(count);
      const MatrixView<Y> part = y.middle_rows(begin, count);
      gemm<C>(context, scratch, {a.middle_rows(begin, count)}, b, made, Update::overwrite);
      if (update == Update::overwrite) convert(context, MatrixView<const C>(made), part);
      else for_each_neighbours(context, count, y.cols, device::Add<C, Y>{made, part}, made, part);
    });
  }
}

/// Columns [first, first + slab.cols()) of y (+)= input . slab, a piece of the tokens at a time.
template <class C, class X, class Y>
void multiply_slab(const CudaContext& context, const Scratch& scratch, const ConvertedRows<C, X>& input, const Factor<C>& slab, Index first,
                   MatrixView<Y> y, Update update) {
  for_each_piece(y.rows, input.at_once(), [&](Index begin, Index count) {
    const MatrixView<Y> part = y.middle_rows(begin, count).middle_cols(first, slab.cols());
    multiply_rows<C>(context, scratch, input.take(context, begin, count), slab, part, update);
  });
}

/// y [tokens, out] (+)= x [tokens, in] . w [out, in]^T. A slab is some rows of w, and its product some columns of y.
template <class X, class W, class Y>
void multiply_by_slabs(const CudaContext& context, MatrixView<const X> x, const W& w, MatrixView<Y> y, Update update) {
  using C = ProductType<X, Element<W>, Y>;
  Scratch scratch(context);
  const ConvertedRows<C, X> input(scratch, x, context.converted_bytes());
  const auto multiply = [&](MatrixView<const C> slab, Index first) {
    multiply_slab<C>(context, scratch, input, {slab, true}, first, y, update);
  };
  if constexpr (std::same_as<Element<W>, C>) {
    multiply(w, 0);
  } else {
    const Index stride = (w.cols + 7) / 8 * 8;
    for_each_slab<C>(
        context, scratch, x.rows, w.rows, stride * static_cast<Index>(sizeof(C)), [&](Index rows) { return rows * stride; },
        [&](cudaStream_t stream, C* memory, Index first, Index rows) {
          decode(stream, context, w, MatrixView<C>(memory, rows, w.cols, stride), first, 0);
        },
        [&](C* memory, Index first, Index rows) { multiply(MatrixView<C>(memory, rows, w.cols, stride), first); });
  }
}

/// y [tokens, in] (+)= x [tokens, out] . w [out, in]. A slab is some columns of w, all its rows: sums stay whole, and y is rounded once.
template <class X, class W, class Y>
void multiply_transposed_by_slabs(const CudaContext& context, MatrixView<const X> x, const W& w, MatrixView<Y> y, Update update) {
  using C = ProductType<X, Element<W>, Y>;
  Scratch scratch(context);
  const ConvertedRows<C, X> input(scratch, x, context.converted_bytes());
  const auto multiply = [&](MatrixView<const C> slab, Index first) {
    multiply_slab<C>(context, scratch, input, {slab}, first, y, update);
  };
  if constexpr (std::same_as<Element<W>, C>) {
    multiply(w, 0);
  } else {
    const auto stride = [](Index cols) { return (cols + 7) / 8 * 8; };
    for_each_slab<C>(
        context, scratch, x.rows, w.cols, w.rows * static_cast<Index>(sizeof(C)), [&](Index cols) { return w.rows * stride(cols); },
        [&](cudaStream_t stream, C* memory, Index first, Index cols) {
          decode(stream, context, w, MatrixView<C>(memory, w.rows, cols, stride(cols)), 0, first);
        },
        [&](C* memory, Index first, Index cols) { multiply(MatrixView<C>(memory, w.rows, cols, stride(cols)), first); });
  }
}

/// g [r, features] (+)= u [tokens, r]^T . x [tokens, features], g float or double.
template <class U, class X, class S>
void weight_gradient_by_slabs(const CudaContext& context, MatrixView<const U> u, MatrixView<const X> x, MatrixView<S> g, Update update) {
  using C = ProductType<X, U, S>;
  Scratch scratch(context);
  const ConvertedRows<C, U> left(scratch, u, context.converted_bytes());
  const ConvertedRows<C, X> right(scratch, x, context.converted_bytes());
  if (x.rows == 0) return gemm<C>(context, scratch, {left.take(context, 0, 0), true}, {right.take(context, 0, 0)}, g, update);
  for_each_piece(x.rows, std::min(left.at_once(), right.at_once()), [&](Index begin, Index count) {
    gemm<C>(context, scratch, {left.take(context, begin, count), true}, {right.take(context, begin, count)}, g,
            begin == 0 ? update : Update::accumulate);
  });
}

}  // namespace qdylora::detail
#endif
