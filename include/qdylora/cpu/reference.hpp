// The reference: every operation of the Backend concept as plain loops that accumulate in double, and quantization written a second
// time. It is the specification in code, the oracle of the tests; nothing calls it at run time and nothing here is optimized. Every
// operation stands in this one file so that it reads beside backend.hpp. (Long because of that.)
//
// Each argument has its own scalar type, so that one oracle serves every compute type: outputs in double are not rounded at all.
// Where the concept passes a saved value (the scores' log-sum-exp) that the formula can do without, it is computed anew.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>
#include <numbers>
#include <numeric>
#include <span>
#include <string>
#include <type_traits>
#include <vector>

#include <qdylora/backend.hpp>

namespace qdylora::reference {

/// A sum in double, rounded to the element type of an output (through float for the 16-bit types).
template <Scalar T>
T to(double value) noexcept {
  if constexpr (std::same_as<T, double>) return value;
  else return static_cast<T>(static_cast<float>(value));
}

/// y = value, or y += value.
template <Scalar T>
void put(T& y, double value, Update update = Update::overwrite) noexcept {
  y = to<T>(update == Update::accumulate ? static_cast<double>(y) + value : value);
}

// ---- quantization --------------------------------------------------------------------------------------------------------------

/// The code nearest to v, found by walking over the midpoints of neighbouring values.
///   4 bits: v passes a midpoint (rounded to float32) when it lies above it; NaN passes all. Of FP4's zeros, code 0 is the lower.
///   Dynamic maps: a tie goes to the even code; NaN is code 0.
///   OCP floats: v * largest is rounded as a magnitude, a tie to the even code, beyond the largest to the largest; NaN is 0x7F.
template <CodeFormat Format>
std::uint8_t nearest_code(float v) {
  constexpr bool ocp = requires { Format::largest; };
  const auto sign = static_cast<std::uint8_t>(ocp && std::signbit(v) ? 0x80 : 0);
  if (Format::bits == 8 && std::isnan(v)) return static_cast<std::uint8_t>(sign | (ocp ? 0x7F : 0));

  std::vector<std::uint8_t> ascending;
  for (std::size_t code = std::same_as<Format, INT4> ? 1 : 0; code < Format::values.size(); ++code)
    if (!ocp || (code < 0x80 && std::isfinite(Format::values[code]))) ascending.push_back(static_cast<std::uint8_t>(code));
  std::stable_sort(ascending.begin(), ascending.end(), [](auto a, auto b) { return Format::values[a] < Format::values[b]; });

  std::uint8_t nearest = ascending.front();
  for (std::size_t i = 1; i < ascending.size(); ++i) {
    const float low = Format::values[ascending[i - 1]];
    const float high = Format::values[ascending[i]];
    bool passes = false;
    if constexpr (ocp) {
      const double magnitude = std::fabs(v * Format::largest);
      const double middle = (static_cast<double>(Format::Ocp::decode(ascending[i - 1])) + Format::Ocp::decode(ascending[i])) / 2;
      passes = magnitude > middle || (magnitude == middle && ascending[i] % 2 == 0);
    } else {
      const float middle = (low + high) / 2.0f;
      passes = !(v <= middle) || (Format::bits == 8 && v == middle && ascending[i] % 2 == 0);
    }
    if (passes) nearest = ascending[i];
  }
  return static_cast<std::uint8_t>(sign | nearest);
}

/// The scales as stored. With double quantization: offset = mean(absmax); in blocks of 256, d = absmax - offset, n = max |d|, and
/// the codes of d * (1 / n); a block of zeros has n = 0 and code 0.
template <class Scales>
typename Scales::template Storage<HostMemory> make_scales(const std::vector<float>& absmax) {
  typename Scales::template Storage<HostMemory> storage;
  const auto blocks = static_cast<Index>(absmax.size());
  if constexpr (!Scales::nested) {
    storage.absmax = Buffer<float>(blocks);
    for (Index b = 0; b < blocks; ++b) storage.absmax[b] = absmax[static_cast<std::size_t>(b)];
  } else {
    const double mean = std::accumulate(absmax.begin(), absmax.end(), 0.0) / static_cast<double>(blocks);
    storage.offset = blocks == 0 ? 0.0f : static_cast<float>(mean);
    storage.codes = Buffer<std::uint8_t>(blocks);
    storage.nested_absmax = Buffer<float>((blocks + 255) / 256);
    for (Index n = 0; n < storage.nested_absmax.size(); ++n) {
      float largest = 0.0f;
      for (Index b = 256 * n; b < std::min(blocks, 256 * n + 256); ++b)
        largest = std::max(largest, std::fabs(absmax[static_cast<std::size_t>(b)] - storage.offset));
      storage.nested_absmax[n] = largest;
      for (Index b = 256 * n; b < std::min(blocks, 256 * n + 256); ++b) {
        const float d = absmax[static_cast<std::size_t>(b)] - storage.offset;
        storage.codes[b] = largest == 0.0f ? std::uint8_t{0} : nearest_code<typename Scales::SecondLevel>(d * (1.0f / largest));
      }
    }
  }
  return storage;
}

/// Blocks of the flattened matrix: absmax = max |x| (NaN if one is), divisor = max(absmax, 1e-38), v = x * (1 / divisor) clamped to
/// [-1, 1]. A last block that is short has v = x / divisor and stores the divisor. 4 bits: element 2i is the high half of byte i,
/// the code of 0 fills up an odd count.
template <CodeFormat Format, class Scales, Scalar T>
QuantizedTensor<Format, Scales> quantize(MatrixView<const T> w, Index block_size = 64) {
  const Index size = w.size();
  std::vector<float> absmax;
  std::vector<std::uint8_t> codes;
  for (Index begin = 0; begin < size; begin += block_size) {
    const Index end = std::min(size, begin + block_size);
    const bool partial = end - begin < block_size;
    const auto x = [&](Index flat) { return static_cast<float>(w(flat / w.cols, flat % w.cols)); };
    float largest = 0.0f;
    for (Index i = begin; i < end; ++i)
      if (!(std::fabs(x(i)) <= largest)) largest = std::isnan(largest) ? largest : std::fabs(x(i));
    const float divisor = largest < 1e-38f ? 1e-38f : largest;
    for (Index i = begin; i < end; ++i) {
      const float v = partial ? x(i) / divisor : x(i) * (1.0f / divisor);
      codes.push_back(nearest_code<Format>(v > 1.0f ? 1.0f : v < -1.0f ? -1.0f : v));
    }
    absmax.push_back(partial ? divisor : largest);
  }
  Buffer<std::uint8_t> stored(code_bytes<Format>(size));
  if constexpr (Format::bits == 8) {
    std::copy(codes.begin(), codes.end(), stored.data());
  } else {
    if (codes.size() % 2 != 0) codes.push_back(nearest_code<Format>(0.0f));
    for (std::size_t i = 0; i < codes.size(); i += 2)
      stored[static_cast<Index>(i / 2)] = static_cast<std::uint8_t>(16 * codes[i] + codes[i + 1]);
  }
  return {w.rows, w.cols, block_size, std::move(stored), make_scales<Scales>(absmax)};
}

/// absmax of a block. The product is exact in double, so it and the sum are one float32 rounding each, whatever a compiler fuses.
template <class Scales>
float absmax(const typename Scales::View& scales, Index block) noexcept {
  if constexpr (Scales::nested) {
    const double product =
        static_cast<double>(Scales::SecondLevel::values[scales.codes[block]]) * scales.nested_absmax[block / 256];
    return static_cast<float>(product) + scales.offset;
  } else {
    return scales.absmax[block];
  }
}

/// w[i, j] = value of its code * absmax of its block, rounded to float32.
template <CodeFormat Format, class Scales>
float element(const QuantizedView<Format, Scales>& w, Index i, Index j) noexcept {
  const Index flat = i * w.cols + j;
  std::uint8_t code = w.codes[Format::bits == 8 ? flat : flat / 2];
  if (Format::bits == 4) code = static_cast<std::uint8_t>(flat % 2 == 0 ? code / 16 : code % 16);
  return Format::values[code] * absmax<Scales>(w.scales, flat / w.block_size);
}

template <class S>
double element(const MatrixView<S>& w, Index i, Index j) noexcept {
  return static_cast<double>(w(i, j));
}

/// y [out, in] = decoded w
template <CodeFormat Format, class Scales, Scalar T>
void dequantize(const QuantizedView<Format, Scales>& w, MatrixView<T> y) {
  expect_shape("y", y, w.rows, w.cols);
  for (Index i = 0; i < w.rows; ++i)
    for (Index j = 0; j < w.cols; ++j) y(i, j) = to<T>(element(w, i, j));
}

// ---- products ------------------------------------------------------------------------------------------------------------------

/// y [tokens, out] (+)= x [tokens, in] . w[out, in]^T, w quantized or dense
template <class X, class W, class Y>
void matmul(MatrixView<X> x, const W& w, MatrixView<Y> y, Update update) {
  expect_shape("x", x, y.rows, w.cols);
  expect_shape("y", y, x.rows, w.rows);
  for (Index i = 0; i < y.rows; ++i)
    for (Index j = 0; j < y.cols; ++j) {
      double sum = 0.0;
      for (Index k = 0; k < x.cols; ++k) sum += static_cast<double>(x(i, k)) * element(w, j, k);
      put(y(i, j), sum, update);
    }
}

/// y [tokens, in] (+)= x [tokens, out] . w[out, in], w quantized or dense
template <class X, class W, class Y>
void matmul_transposed(MatrixView<X> x, const W& w, MatrixView<Y> y, Update update) {
  expect_shape("x", x, y.rows, w.rows);
  expect_shape("y", y, x.rows, w.cols);
  for (Index i = 0; i < y.rows; ++i)
    for (Index j = 0; j < y.cols; ++j) {
      double sum = 0.0;
      for (Index k = 0; k < x.cols; ++k) sum += static_cast<double>(x(i, k)) * element(w, k, j);
      put(y(i, j), sum, update);
    }
}

/// g [r, features] (+)= h [tokens, r]^T . x [tokens, features]
template <class H, class X, class G>
void weight_gradient(MatrixView<H> h, MatrixView<X> x, MatrixView<G> g, Update update) {
  expect_shape("x", x, h.rows, g.cols);
  expect_shape("g", g, h.cols, x.cols);
  for (Index i = 0; i < g.rows; ++i)
    for (Index j = 0; j < g.cols; ++j) {
      double sum = 0.0;
      for (Index t = 0; t < h.rows; ++t) sum += static_cast<double>(h(t, i)) * static_cast<double>(x(t, j));
      put(g(i, j), sum, update);
    }
}

// ---- elementwise ---------------------------------------------------------------------------------------------------------------

/// y += x
template <class X, class Y>
void add(MatrixView<X> x, MatrixView<Y> y) {
  expect_shape("x", x, y.rows, y.cols);
  for (Index i = 0; i < y.rows; ++i)
    for (Index j = 0; j < y.cols; ++j) put(y(i, j), static_cast<double>(x(i, j)), Update::accumulate);
}

/// y[i, j] += w[0, j]
template <class W, class Y>
void add_row(MatrixView<W> w, MatrixView<Y> y) {
  expect_shape("w", w, 1, y.cols);
  for (Index i = 0; i < y.rows; ++i)
    for (Index j = 0; j < y.cols; ++j) put(y(i, j), static_cast<double>(w(0, j)), Update::accumulate);
}

/// y[i, j] = x[i, j] * w[0, j]
template <class X, class W, class Y>
void scale_columns(MatrixView<X> x, MatrixView<W> w, MatrixView<Y> y) {
  expect_shape("x", x, y.rows, y.cols);
  expect_shape("w", w, 1, y.cols);
  for (Index i = 0; i < y.rows; ++i)
    for (Index j = 0; j < y.cols; ++j) put(y(i, j), static_cast<double>(x(i, j)) * static_cast<double>(w(0, j)));
}

/// y[0, j] += sum_i a[i, j] * b[i, j]
template <class A, class B, class Y>
void column_products(MatrixView<A> a, MatrixView<B> b, MatrixView<Y> y) {
  expect_shape("b", b, a.rows, a.cols);
  expect_shape("y", y, 1, a.cols);
  for (Index j = 0; j < a.cols; ++j) {
    double sum = 0.0;
    for (Index i = 0; i < a.rows; ++i) sum += static_cast<double>(a(i, j)) * static_cast<double>(b(i, j));
    put(y(0, j), sum, Update::accumulate);
  }
}

/// y[i, j] (+)= kept ? x[i, j] / (1 - p) : 0,   kept = random_word(seed, dropout, layer, step, (first_row + i) * features + j) >= p * 2^32
template <class X, class Y>
void dropout(MatrixView<X> x, float probability, DropoutKey key, MatrixView<Y> y, Update update) {
  expect_shape("x", x, y.rows, y.cols);
  const double p = static_cast<double>(probability);
  for (Index i = 0; i < y.rows; ++i)
    for (Index j = 0; j < y.cols; ++j) {
      const auto at = static_cast<std::uint64_t>((key.first_row + i) * y.cols + j);
      const bool kept = static_cast<double>(random_word(key.seed, Purpose::dropout, key.layer, key.step, at)) >= p * 0x1p32;
      put(y(i, j), kept ? static_cast<double>(x(i, j)) / (1.0 - p) : 0.0, update);
    }
}

// ---- the optimizer -------------------------------------------------------------------------------------------------------------

/// With lr_i = lr * row_lr[i], t = row_steps[i] or step, g = gradient * gradient_scale:
///   p *= 1 - lr_i * weight_decay;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
///   p -= lr_i / (1 - b1^t) * m / (sqrt(v) / sqrt(1 - b2^t) + epsilon)
template <class P, class G, class M, class V>
void adamw(MatrixView<P> p, MatrixView<G> gradient, MatrixView<M> m, MatrixView<V> v, const AdamWUpdate& u) {
  expect_shape("gradient", gradient, p.rows, p.cols);
  expect_shape("m", m, p.rows, p.cols);
  expect_shape("v", v, p.rows, p.cols);
  for (Index i = 0; i < p.rows; ++i) {
    const auto row = static_cast<std::size_t>(i);
    const double lr = u.row_lr.empty() ? u.lr : u.lr * static_cast<double>(u.row_lr[row]);
    const auto t = static_cast<double>(u.row_steps.empty() ? u.step : u.row_steps[row]);
    for (Index j = 0; j < p.cols; ++j) {
      const double g = static_cast<double>(gradient(i, j)) * u.gradient_scale;
      const double first = u.beta1 * static_cast<double>(m(i, j)) + (1.0 - u.beta1) * g;
      const double second = u.beta2 * static_cast<double>(v(i, j)) + (1.0 - u.beta2) * g * g;
      const double denominator = std::sqrt(second) / std::sqrt(1.0 - std::pow(u.beta2, t)) + u.epsilon;
      const double decayed = static_cast<double>(p(i, j)) * (1.0 - lr * u.weight_decay);
      put(m(i, j), first);
      put(v(i, j), second);
      put(p(i, j), decayed - lr / (1.0 - std::pow(u.beta1, t)) * first / denominator);
    }
  }
}

/// The same with moments in 8 bits, bitsandbytes' rule: m = b1 m + (1 - b1) g and v likewise are rounded to float as written, each product
/// and each sum, and so is 1 - b; p is updated by them, and their codes are made last.
inline void adamw(MatrixView<float> p, MatrixView<const float> gradient, const Moments8View& s, const AdamWUpdate& u) {
  const auto beta1 = static_cast<float>(u.beta1), beta2 = static_cast<float>(u.beta2);
  for (Index i = 0; i < p.rows; ++i) {
    const auto row = static_cast<std::size_t>(i);
    const double lr = u.row_lr.empty() ? u.lr : u.lr * static_cast<double>(u.row_lr[row]);
    const auto t = static_cast<double>(u.row_steps.empty() ? u.step : u.row_steps[row]);
    for (Index b = 0; b < s.m_absmax.cols; ++b) {
      const Index begin = b * Moments8View::block_size, end = std::min(begin + Moments8View::block_size, p.cols);
      std::vector<float> first, second;
      float first_max = 0.0f, second_max = 0.0f;
      for (Index j = begin; j < end; ++j) {
        const float g = gradient(i, j) * static_cast<float>(u.gradient_scale);
        first.push_back(detail::rounded(beta1 * detail::rounded(DynamicMap8::values[s.m(i, j)] * s.m_absmax(i, b))) +
                        detail::rounded((1.0f - beta1) * g));
        second.push_back(detail::rounded(beta2 * detail::rounded(DynamicMapU8::values[s.v(i, j)] * s.v_absmax(i, b))) +
                         detail::rounded(detail::rounded((1.0f - beta2) * g) * g));
        first_max = std::max(first_max, std::fabs(first.back()));
        second_max = std::max(second_max, second.back());
        const double denominator = std::sqrt(static_cast<double>(second.back())) / std::sqrt(1.0 - std::pow(u.beta2, t)) + u.epsilon;
        const double decayed = static_cast<double>(p(i, j)) * (1.0 - lr * u.weight_decay);
        put(p(i, j), decayed - lr / (1.0 - std::pow(u.beta1, t)) * static_cast<double>(first.back()) / denominator);
      }
      s.m_absmax(i, b) = first_max;
      s.v_absmax(i, b) = second_max;
      for (Index j = begin; j < end; ++j) {
        const auto at = static_cast<std::size_t>(j - begin);
        s.m(i, j) = detail::first_moment_code(first[at], first_max, DynamicMap8::values.data());
        s.v(i, j) = detail::second_moment_code(second[at], second_max, DynamicMapU8::values.data());
      }
    }
  }
}

/// Chen et al. 2023, algorithm 2, with gradient g = gradient * gradient_scale and row i's lr_i = lr * row_lr[i]:
///   p = p (1 - lr_i * weight_decay) - lr_i sign(b1 m + (1 - b1) g);  m = b2 m + (1 - b2) g
template <class P, class G, class M>
void lion(MatrixView<P> p, MatrixView<G> gradient, MatrixView<M> m, const LionUpdate& u) {
  expect_shape("gradient", gradient, p.rows, p.cols);
  expect_shape("m", m, p.rows, p.cols);
  for (Index i = 0; i < p.rows; ++i) {
    const double lr = u.row_lr.empty() ? u.lr : u.lr * static_cast<double>(u.row_lr[static_cast<std::size_t>(i)]);
    for (Index j = 0; j < p.cols; ++j) {
      const double g = static_cast<double>(gradient(i, j)) * u.gradient_scale, moment = static_cast<double>(m(i, j));
      const double c = u.beta1 * moment + (1.0 - u.beta1) * g;
      put(p(i, j), static_cast<double>(p(i, j)) * (1.0 - lr * u.weight_decay) - lr * ((c > 0.0) - (c < 0.0)));
      put(m(i, j), u.beta2 * moment + (1.0 - u.beta2) * g);
    }
  }
}

/// sum over all elements of x^2
template <class X>
double sum_squares(MatrixView<X> x) {
  double sum = 0.0;
  for (Index i = 0; i < x.rows; ++i)
    for (Index j = 0; j < x.cols; ++j) sum += static_cast<double>(x(i, j)) * static_cast<double>(x(i, j));
  return sum;
}

// ---- the transformer -----------------------------------------------------------------------------------------------------------

/// y[i, j] = x[i, j] * r_i * w[0, j],   r_i = 1 / sqrt(mean_j x[i, j]^2 + epsilon)
template <class X, class W, class Y, class R>
void rms_norm(MatrixView<X> x, MatrixView<W> w, float epsilon, MatrixView<Y> y, MatrixView<R> r) {
  expect_shape("w", w, 1, x.cols);
  expect_shape("y", y, x.rows, x.cols);
  expect_shape("r", r, x.rows, 1);
  for (Index i = 0; i < x.rows; ++i) {
    const double mean = sum_squares(x.middle_rows(i, 1)) / static_cast<double>(x.cols);
    const double r_i = 1.0 / std::sqrt(mean + static_cast<double>(epsilon));
    put(r(i, 0), r_i);
    for (Index j = 0; j < x.cols; ++j) put(y(i, j), static_cast<double>(x(i, j)) * r_i * static_cast<double>(w(0, j)));
  }
}

/// dx[i, j] (+)= r_i * (dy[i, j] * w[j] - x[i, j] * r_i^2 * mean_k(dy[i, k] * w[k] * x[i, k]))
template <class D, class X, class W, class R, class G>
void rms_norm_backward(MatrixView<D> dy, MatrixView<X> x, MatrixView<W> w, MatrixView<R> r, MatrixView<G> dx, Update update) {
  expect_shape("dy", dy, dx.rows, dx.cols);
  expect_shape("x", x, dx.rows, dx.cols);
  expect_shape("w", w, 1, dx.cols);
  expect_shape("r", r, dx.rows, 1);
  for (Index i = 0; i < dx.rows; ++i) {
    const auto dyw = [&](Index j) { return static_cast<double>(dy(i, j)) * static_cast<double>(w(0, j)); };
    const double r_i = static_cast<double>(r(i, 0));
    double mean = 0.0;
    for (Index j = 0; j < dx.cols; ++j) mean += dyw(j) * static_cast<double>(x(i, j)) / static_cast<double>(dx.cols);
    for (Index j = 0; j < dx.cols; ++j)
      put(dx(i, j), r_i * (dyw(j) - static_cast<double>(x(i, j)) * r_i * r_i * mean), update);
  }
}

/// y[i, j] = (x[i, j] - m_i) * r_i * w[0, j] + c[0, j],   m_i = mean_j x[i, j],   r_i = 1 / sqrt(mean_j (x[i, j] - m_i)^2 + epsilon)
template <class X, class W, class Y, class M>
void layer_norm(MatrixView<X> x, MatrixView<W> w, MatrixView<W> c, float epsilon, MatrixView<Y> y, MatrixView<M> moments) {
  const auto count = static_cast<double>(x.cols);
  for (Index i = 0; i < x.rows; ++i) {
    double mean = 0.0, variance = 0.0;
    for (Index j = 0; j < x.cols; ++j) mean += static_cast<double>(x(i, j)) / count;
    for (Index j = 0; j < x.cols; ++j) variance += std::pow(static_cast<double>(x(i, j)) - mean, 2) / count;
    const double r = 1.0 / std::sqrt(variance + static_cast<double>(epsilon));
    put(moments(i, 0), mean);
    put(moments(i, 1), r);
    for (Index j = 0; j < x.cols; ++j)
      put(y(i, j), (static_cast<double>(x(i, j)) - mean) * r * static_cast<double>(w(0, j)) + static_cast<double>(c(0, j)));
  }
}

/// With d = dy w and n = (x - m) r:   dx (+)= r (d - mean_j(d) - n mean_j(d n))
template <class D, class X, class W, class M, class G>
void layer_norm_backward(MatrixView<D> dy, MatrixView<X> x, MatrixView<W> w, MatrixView<M> moments, MatrixView<G> dx, Update update) {
  const auto count = static_cast<double>(x.cols);
  for (Index i = 0; i < x.rows; ++i) {
    const double m = static_cast<double>(moments(i, 0)), r = static_cast<double>(moments(i, 1));
    const auto d = [&](Index j) { return static_cast<double>(dy(i, j)) * static_cast<double>(w(0, j)); };
    const auto n = [&](Index j) { return (static_cast<double>(x(i, j)) - m) * r; };
    double mean_d = 0.0, mean_dn = 0.0;
    for (Index j = 0; j < x.cols; ++j) {
      mean_d += d(j) / count;
      mean_dn += d(j) * n(j) / count;
    }
    for (Index j = 0; j < x.cols; ++j) put(dx(i, j), r * (d(j) - mean_d - n(j) * mean_dn), update);
  }
}

/// Pair i of every head of token t, (a, b), turns by the angle whose cosine and sine are c = table[positions[t], 2i] and
/// s = table[positions[t], 2i + 1]:   a' = a c - d b s,   b' = d a s + b c,   d = direction
template <class X, class W>
void rope(MatrixView<X> x, std::span<const std::int32_t> positions, MatrixView<W> table, RopeLayout layout, int direction) {
  const bool interleaved = layout == RopeLayout::interleaved;
  const Index head_dim = table.cols;
  for (Index t = 0; t < x.rows; ++t)
    for (Index head = 0; head < x.cols; head += head_dim)
      for (Index i = 0; i < head_dim / 2; ++i) {
        const Index position = positions[static_cast<std::size_t>(t)];
        const double c = static_cast<double>(table(position, 2 * i));
        const double s = static_cast<double>(table(position, 2 * i + 1)) * direction;
        X& first = x(t, head + (interleaved ? 2 * i : i));
        X& second = x(t, head + (interleaved ? 2 * i + 1 : i + head_dim / 2));
        const double a = static_cast<double>(first);
        const double b = static_cast<double>(second);
        put(first, a * c - b * s);
        put(second, a * s + b * c);
      }
}

/// The causal score matrix of one head of one sequence, and its softmax. q, k [n, head_dim]:
///   s[i, j] = q_i . k_j / sqrt(head_dim) for j <= i, else absent;  lse[i] = log sum_j e^s[i, j];  p[i, j] = e^(s[i, j] - lse[i])
struct CausalSoftmax {
  Matrix<double> p;
  std::vector<double> lse;

  template <class Q, class K>
  CausalSoftmax(MatrixView<Q> q, MatrixView<K> k) : p(q.rows, q.rows), lse(static_cast<std::size_t>(q.rows)) {
    matmul(q, k, p.view(), Update::overwrite);
    for (Index i = 0; i < q.rows; ++i) {
      double largest = -std::numeric_limits<double>::infinity();
      for (Index j = 0; j <= i; ++j) {
        p(i, j) /= std::sqrt(static_cast<double>(q.cols));
        largest = std::max(largest, p(i, j));
      }
      double sum = 0.0;
      for (Index j = 0; j <= i; ++j) sum += std::exp(p(i, j) - largest);
      const double lse_i = lse[static_cast<std::size_t>(i)] = largest + std::log(sum);
      for (Index j = 0; j < q.rows; ++j) p(i, j) = j <= i ? std::exp(p(i, j) - lse_i) : 0.0;
    }
  }
};

/// The [rows, head_dim] part of a [tokens, heads * head_dim] matrix that belongs to one head of one sequence.
template <class X>
MatrixView<X> head_of(MatrixView<X> x, Index begin, Index end, Index head, Index head_dim) {
  return x.middle_rows(begin, end - begin).middle_cols(head * head_dim, head_dim);
}

/// y = softmax(q k^T / sqrt(head_dim)) v for each sequence and head, lse [tokens, heads]; see CausalSoftmax.
template <class Q, class K, class V, class Y, class L>
void attention(MatrixView<Q> q, MatrixView<K> k, MatrixView<V> v, std::span<const Index> offsets, HeadShape shape, MatrixView<Y> y,
               MatrixView<L> lse) {
  const Index d = shape.head_dim;
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s)
    for (Index h = 0; h < shape.heads; ++h) {
      const Index begin = offsets[s], end = offsets[s + 1], kv = h / (shape.heads / shape.kv_heads);
      const CausalSoftmax softmax(head_of(q, begin, end, h, d), head_of(k, begin, end, kv, d));
      matmul_transposed(softmax.p.view(), head_of(v, begin, end, kv, d), head_of(y, begin, end, h, d), Update::overwrite);
      for (Index i = begin; i < end; ++i) put(lse(i, h), softmax.lse[static_cast<std::size_t>(i - begin)]);
    }
}

/// For each head, with p of the forward pass and dp = dy v^T:  ds[i, j] = p[i, j] * (dp[i, j] - sum_k p[i, k] dp[i, k]),
///   dv += p^T dy,   dq = ds k / sqrt(head_dim),   dk += ds^T q / sqrt(head_dim)   over the query heads of a key-value head
template <class D, class Q, class K, class V, class GQ, class GK, class GV>
void attention_backward(MatrixView<D> dy, MatrixView<Q> q, MatrixView<K> k, MatrixView<V> v, std::span<const Index> offsets,
                        HeadShape shape, MatrixView<GQ> dq, MatrixView<GK> dk, MatrixView<GV> dv) {
  const Index d = shape.head_dim;
  Matrix<double> dk_sum(dk.rows, dk.cols), dv_sum(dv.rows, dv.cols);
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s)
    for (Index h = 0; h < shape.heads; ++h) {
      const Index begin = offsets[s], end = offsets[s + 1], kv = h / (shape.heads / shape.kv_heads);
      const auto qh = head_of(q, begin, end, h, d);
      const auto kh = head_of(k, begin, end, kv, d);
      const auto dyh = head_of(dy, begin, end, h, d);
      const CausalSoftmax softmax(qh, kh);
      Matrix<double> ds(end - begin, end - begin);
      matmul(dyh, head_of(v, begin, end, kv, d), ds.view(), Update::overwrite);
      for (Index i = 0; i < ds.rows(); ++i) {
        double mean = 0.0;
        for (Index j = 0; j < ds.cols(); ++j) mean += softmax.p(i, j) * ds(i, j);
        for (Index j = 0; j < ds.cols(); ++j) ds(i, j) = softmax.p(i, j) * (ds(i, j) - mean) / std::sqrt(static_cast<double>(d));
      }
      matmul_transposed(ds.view(), kh, head_of(dq, begin, end, h, d), Update::overwrite);
      weight_gradient(ds.view(), qh, head_of(dk_sum.view(), begin, end, kv, d), Update::accumulate);
      weight_gradient(softmax.p.view(), dyh, head_of(dv_sum.view(), begin, end, kv, d), Update::accumulate);
    }
  for (Index i = 0; i < dk.rows; ++i)
    for (Index j = 0; j < dk.cols; ++j) {
      put(dk(i, j), dk_sum(i, j));
      put(dv(i, j), dv_sum(i, j));
    }
}

/// y[s] = softmax(q[s] k^T / sqrt(head_dim)) v over all rows of k = k_caches[s], v = v_caches[s]
template <class Q, class C, class Y>
void attention_decode(MatrixView<Q> q, std::span<const MatrixView<C>> k_caches, std::span<const MatrixView<C>> v_caches,
                      HeadShape shape, MatrixView<Y> y) {
  const Index d = shape.head_dim;
  for (Index s = 0; s < q.rows; ++s)
    for (Index h = 0; h < shape.heads; ++h) {
      const MatrixView<C> k = k_caches[static_cast<std::size_t>(s)].middle_cols(h / (shape.heads / shape.kv_heads) * d, d);
      const MatrixView<C> v = v_caches[static_cast<std::size_t>(s)].middle_cols(h / (shape.heads / shape.kv_heads) * d, d);
      Matrix<double> p(1, k.rows);
      matmul(head_of(q, s, s + 1, h, d), k, p.view(), Update::overwrite);
      double largest = -std::numeric_limits<double>::infinity(), sum = 0.0;
      for (double& score : p.span()) largest = std::max(largest, score /= std::sqrt(static_cast<double>(d)));
      for (double& score : p.span()) sum += score = std::exp(score - largest);
      for (double& score : p.span()) score /= sum;
      matmul_transposed(p.view(), v, head_of(y, s, s + 1, h, d), Update::overwrite);
    }
}

/// y = silu(gate) * up,   silu(a) = a / (1 + e^-a)
template <class G, class U, class Y>
void swiglu(MatrixView<G> gate, MatrixView<U> up, MatrixView<Y> y) {
  expect_shape("gate", gate, y.rows, y.cols);
  expect_shape("up", up, y.rows, y.cols);
  for (Index i = 0; i < y.rows; ++i)
    for (Index j = 0; j < y.cols; ++j) {
      const double a = static_cast<double>(gate(i, j));
      put(y(i, j), a / (1.0 + std::exp(-a)) * static_cast<double>(up(i, j)));
    }
}

/// With s = 1 / (1 + e^-gate):   dgate = dy * up * s * (1 + gate * (1 - s)),   dup = dy * gate * s
template <class D, class G, class U, class DG, class DU>
void swiglu_backward(MatrixView<D> dy, MatrixView<G> gate, MatrixView<U> up, MatrixView<DG> dgate, MatrixView<DU> dup) {
  expect_shape("gate", gate, dy.rows, dy.cols);
  expect_shape("up", up, dy.rows, dy.cols);
  expect_shape("dgate", dgate, dy.rows, dy.cols);
  expect_shape("dup", dup, dy.rows, dy.cols);
  for (Index i = 0; i < dy.rows; ++i)
    for (Index j = 0; j < dy.cols; ++j) {
      const double d = static_cast<double>(dy(i, j)), a = static_cast<double>(gate(i, j)), u = static_cast<double>(up(i, j));
      const double s = 1.0 / (1.0 + std::exp(-a));
      put(dgate(i, j), d * u * s * (1.0 + a * (1.0 - s)));
      put(dup(i, j), d * a * s);
    }
}

/// y = x * Phi(x),   Phi(x) = erfc(-x / sqrt 2) / 2
template <class X, class Y>
void gelu(MatrixView<X> x, MatrixView<Y> y) {
  expect_shape("x", x, y.rows, y.cols);
  for (Index i = 0; i < y.rows; ++i)
    for (Index j = 0; j < y.cols; ++j) {
      const double a = static_cast<double>(x(i, j));
      put(y(i, j), a * 0.5 * std::erfc(-a / std::numbers::sqrt2));
    }
}

/// dx = dy * (Phi(x) + x * e^(-x^2 / 2) / sqrt(2 pi))
template <class D, class X, class G>
void gelu_backward(MatrixView<D> dy, MatrixView<X> x, MatrixView<G> dx) {
  expect_shape("dy", dy, dx.rows, dx.cols);
  expect_shape("x", x, dx.rows, dx.cols);
  for (Index i = 0; i < dx.rows; ++i)
    for (Index j = 0; j < dx.cols; ++j) {
      const double a = static_cast<double>(x(i, j));
      const double density = std::exp(-0.5 * a * a) / std::sqrt(2.0 * std::numbers::pi);
      put(dx(i, j), static_cast<double>(dy(i, j)) * (0.5 * std::erfc(-a / std::numbers::sqrt2) + a * density));
    }
}

/// y[i] = table[ids[i]]
template <class W, class Y>
void embed(std::span<const std::int32_t> ids, MatrixView<W> table, MatrixView<Y> y) {
  expect_shape("y", y, static_cast<Index>(ids.size()), table.cols);
  for (Index i = 0; i < y.rows; ++i) {
    const Index id = ids[static_cast<std::size_t>(i)];
    QDYLORA_EXPECTS(id >= 0 && id < table.rows, bad_argument, "embed: id " + std::to_string(id) + " is outside the table");
    for (Index j = 0; j < y.cols; ++j) put(y(i, j), static_cast<double>(table(id, j)));
  }
}

/// losses[i] = log sum_j e^z[i, j] - z[i, target_i];  z[i, j] becomes scale * (e^z[i, j] / sum_k e^z[i, k] - [j == target_i]).
/// A row with target -1 has loss 0 and gradient 0.
template <class Z, class L>
void cross_entropy(MatrixView<Z> z, std::span<const std::int32_t> targets, double scale, MatrixView<L> losses) {
  expect_shape("losses", losses, z.rows, 1);
  for (Index i = 0; i < z.rows; ++i) {
    const Index target = targets[static_cast<std::size_t>(i)];
    QDYLORA_EXPECTS(target >= -1 && target < z.cols, bad_argument, "cross_entropy: target " + std::to_string(target));
    double largest = -std::numeric_limits<double>::infinity(), sum = 0.0;
    for (Index j = 0; j < z.cols; ++j) largest = std::max(largest, static_cast<double>(z(i, j)));
    for (Index j = 0; j < z.cols; ++j) sum += std::exp(static_cast<double>(z(i, j)) - largest);
    put(losses(i, 0), target < 0 ? 0.0 : largest + std::log(sum) - static_cast<double>(z(i, target)));
    for (Index j = 0; j < z.cols; ++j) {
      const double probability = std::exp(static_cast<double>(z(i, j)) - largest) / sum;
      put(z(i, j), target < 0 ? 0.0 : scale * (probability - (j == target ? 1.0 : 0.0)));
    }
  }
}

}  // namespace qdylora::reference
