// Making binary codes of weights: greedy (Guo et al. 2017), then alternating (Xu et al. 2018), each group on its own, in double.
//
//   greedy       r = w;  for k = 1 ... planes:  b_k = sign(r),  alpha_k = mean |r|,  r -= alpha_k b_k       (sign(0) = +1)
//   alternating  codes: for each weight the nearest of the 2^planes levels that the scales make;  scales: least squares given the codes
//
// An iteration is kept only if the squared error of what would be stored, scales rounded to float32, falls; the first that is not ends a
// group. So the error never rises. An iteration leaves scales that are optimal for their codes, none negative, and the largest first, so
// that dropping planes from the end drops the least. With one plane the greedy code is optimal, and with no iteration the first q planes
// are exactly what q planes would have been.
//
// Relative errors of normal weights, root mean square, with a scale for each row of 4096:
//   planes                              1       2       3       4       (NF4, double-quantized, 4.13 bits: 0.092)
//   bits per weight                     1.01    2.02    3.02    4.03
//   alternating                         0.602   0.343   0.193   0.108
//   greedy                              0.602   0.361   0.242   0.182
//   the first planes of an alternating
//   code of four                        0.752   0.407   0.223   0.108
#pragma once

#include <algorithm>
#include <array>
#include <cmath>
#include <numeric>
#include <utility>
#include <vector>

#include <qdylora/quant/binary_code.hpp>
#include <qdylora/quant/quantize.hpp>

namespace qdylora {

struct BinaryCodeOptions {
  Index planes = 3;
  Index group_size = 0;   // see BinaryCodeShape
  Index iterations = 20;  // of the alternating method, at most
};

namespace detail {

/// The code of one group: bit k of codes[j] says that b_{k+1}[j] = +1.
struct GroupCode {
  std::array<float, 8> scales{};
  std::vector<std::uint8_t> codes;
  double error = 0.0;  // squared
};

/// Codes groups of weights one after another, in memory that it keeps.
class GroupCoder {
 public:
  explicit GroupCoder(Index planes)
      : planes_(static_cast<std::size_t>(planes)), levels_(std::size_t{1} << planes_), order_(levels_.size()) {}

  const GroupCode& encode(std::span<const float> w, Index iterations) {
    greedy(w);
    if (planes_ == 1) return best_;  // optimal
    for (Index i = 0; i < iterations && best_.error > 0.0; ++i) {
      alternate(w);
      if (!(next_.error < best_.error)) break;
      std::swap(best_, next_);
    }
    return best_;
  }

 private:
  void greedy(std::span<const float> w) {
    best_.codes.assign(w.size(), 0);
    rest_.assign(w.begin(), w.end());
    for (std::size_t k = 0; k < planes_; ++k) {
      double sum = 0.0;
      for (const double r : rest_) sum += std::fabs(r);
      const double scale = sum / static_cast<double>(w.size());
      best_.scales[k] = static_cast<float>(scale);
      for (std::size_t j = 0; j < w.size(); ++j) {
        const bool positive = !(rest_[j] < 0.0);
        if (positive) best_.codes[j] = static_cast<std::uint8_t>(best_.codes[j] | 1u << k);
        rest_[j] -= positive ? scale : -scale;
      }
    }
    measure(best_, w);
  }

  // next_ = one iteration from best_
  void alternate(std::span<const float> w) {
    make_levels(best_);
    std::iota(order_.begin(), order_.end(), std::uint8_t{0});
    std::sort(order_.begin(), order_.end(),
              [this](std::uint8_t a, std::uint8_t b) { return std::pair(levels_[a], a) < std::pair(levels_[b], b); });
    next_.codes.resize(w.size());
    for (std::size_t j = 0; j < w.size(); ++j) {
      const auto value = static_cast<double>(w[j]);
      const auto above = std::lower_bound(order_.begin(), order_.end(), value, [this](std::uint8_t c, double v) { return levels_[c] < v; });
      const bool lower = above == order_.end() || (above != order_.begin() && value - levels_[above[-1]] <= levels_[*above] - value);
      next_.codes[j] = lower ? above[-1] : *above;
    }
    fit(next_, w);
    measure(next_, w);
  }

  // Scales by least squares given the codes: the normal equations (B B^T) alpha = B w of whole numbers, from what weights of each code sum
  // to. A plane that depends on those before it gets 0, which is one of the solutions.
  void fit(GroupCode& code, std::span<const float> w) {
    counts_.assign(levels_.size(), 0.0);
    sums_.assign(levels_.size(), 0.0);
    for (std::size_t j = 0; j < w.size(); ++j) {
      counts_[code.codes[j]] += 1.0;
      sums_[code.codes[j]] += static_cast<double>(w[j]);
    }
    std::array<std::array<double, 8>, 8> gram{};
    std::array<double, 8> right{}, alpha{};
    for (std::size_t c = 0; c < levels_.size(); ++c)
      for (std::size_t k = 0; k < planes_; ++k) {
        const double sign = (c >> k & 1u) != 0 ? 1.0 : -1.0;
        right[k] += sign * sums_[c];
        for (std::size_t l = 0; l < planes_; ++l) gram[k][l] += (c >> l & 1u) != 0 ? sign * counts_[c] : -sign * counts_[c];
      }
    std::array<bool, 8> free{};
    for (std::size_t k = 0; k < planes_; ++k) {
      free[k] = gram[k][k] > 1e-9 * static_cast<double>(w.size());
      for (std::size_t i = k + 1; free[k] && i < planes_; ++i) {
        const double factor = gram[i][k] / gram[k][k];
        for (std::size_t l = k; l < planes_; ++l) gram[i][l] -= factor * gram[k][l];
        right[i] -= factor * right[k];
      }
    }
    for (std::size_t k = planes_; k-- > 0;) {
      if (!free[k]) continue;
      alpha[k] = right[k];
      for (std::size_t l = k + 1; l < planes_; ++l) alpha[k] -= gram[k][l] * alpha[l];
      alpha[k] /= gram[k][k];
    }
    order_planes(code, alpha);
  }

  // Stores alpha, the largest first; a plane of negative scale is turned over.
  void order_planes(GroupCode& code, const std::array<double, 8>& alpha) {
    std::array<std::size_t, 8> from{};
    std::iota(from.begin(), from.end(), std::size_t{0});
    std::stable_sort(from.begin(), from.begin() + static_cast<std::ptrdiff_t>(planes_),
                     [&](std::size_t a, std::size_t b) { return std::fabs(alpha[a]) > std::fabs(alpha[b]); });
    std::array<std::uint8_t, 256> renamed{};
    for (std::size_t k = 0; k < planes_; ++k) {
      const double scale = alpha[from[k]];
      code.scales[k] = static_cast<float>(std::fabs(scale));
      for (std::size_t c = 0; c < levels_.size(); ++c)
        if (((c >> from[k] & 1u) != 0) == (scale >= 0.0)) renamed[c] = static_cast<std::uint8_t>(renamed[c] | 1u << k);
    }
    for (std::uint8_t& c : code.codes) c = renamed[c];
  }

  void make_levels(const GroupCode& code) {
    levels_[0] = 0.0;
    for (std::size_t k = 0; k < planes_; ++k) levels_[0] -= static_cast<double>(code.scales[k]);
    for (std::size_t k = 0; k < planes_; ++k)
      for (std::size_t c = 0; c < std::size_t{1} << k; ++c)
        levels_[c | std::size_t{1} << k] = levels_[c] + 2.0 * static_cast<double>(code.scales[k]);
  }
  void measure(GroupCode& code, std::span<const float> w) {
    make_levels(code);
    code.error = 0.0;
    for (std::size_t j = 0; j < w.size(); ++j) {
      const double error = static_cast<double>(w[j]) - levels_[code.codes[j]];
      code.error += error * error;
    }
  }

  std::size_t planes_;
  GroupCode best_, next_;
  std::vector<double> rest_, levels_, counts_, sums_;  // levels_: of each code
  std::vector<std::uint8_t> order_;                    // codes by level
};

}  // namespace detail

/// Codes a weight [rows, cols] whose rows come a few at a time, so that it need not exist in full precision.
class BinaryQuantizer {
 public:
  /// Errors: those of expect_valid; bad_argument for negative iterations.
  BinaryQuantizer(Index rows, Index cols, BinaryCodeOptions options) : shape_{rows, cols, options.planes, options.group_size} {
    expect_valid(shape_);
    QDYLORA_EXPECTS(options.iterations >= 0, bad_argument, "binary_quantize: " + std::to_string(options.iterations) + " iterations");
    iterations_ = options.iterations;
    bits_ = Buffer<std::uint8_t>(shape_.planes * rows * shape_.row_bytes());
    std::fill_n(bits_.data(), bits_.size(), std::uint8_t{0});
    scales_ = Matrix<float>(shape_.planes * rows, shape_.groups());
  }

  /// The next rows, any Scalar, rounded to float32 first. Errors: shape_mismatch (other columns, or more rows than were said); non_finite,
  /// naming the first weight that is NaN or infinite in float32.
  template <class T, class ParallelFor = SerialFor>
  void append(MatrixView<T> weight, ParallelFor&& parallel_for = {}) {
    QDYLORA_EXPECTS(weight.cols == shape_.cols && weight.rows <= shape_.rows - done_, shape_mismatch,
                    "binary_quantize: expected at most " + detail::shape_text(shape_.rows - done_, shape_.cols) + ", found " +
                        detail::shape_text(weight.rows, weight.cols));
    for (Index i = 0; i < weight.rows; ++i)
      for (Index j = 0; j < weight.cols; ++j)
        if (!std::isfinite(static_cast<float>(weight(i, j)))) detail::raise_non_finite(done_ + i, j);
    parallel_for(weight.rows, [&](Index i) {
      std::vector<float> row(static_cast<std::size_t>(shape_.cols));
      std::transform(weight.row(i), weight.row(i) + weight.cols, row.begin(), [](const auto& w) { return static_cast<float>(w); });
      encode_row(done_ + i, row);
    });
    done_ += weight.rows;
  }

  /// Errc::state_order before all rows have come.
  BinaryCodedTensor<> finish() && {
    QDYLORA_EXPECTS(done_ == shape_.rows, state_order,
                    "binary_quantize: " + std::to_string(done_) + " of " + std::to_string(shape_.rows) + " rows have come");
    return {shape_, std::move(bits_), std::move(scales_)};
  }

 private:
  void encode_row(Index i, const std::vector<float>& row) {
    detail::GroupCoder coder(shape_.planes);
    for (Index g = 0; g < shape_.groups(); ++g) {
      const Index first = g * shape_.columns_of_group(), count = std::min(shape_.columns_of_group(), shape_.cols - first);
      const detail::GroupCode& code = coder.encode({row.data() + first, static_cast<std::size_t>(count)}, iterations_);
      for (Index k = 0; k < shape_.planes; ++k) {
        scales_(k * shape_.rows + i, g) = code.scales[static_cast<std::size_t>(k)];
        std::uint8_t* out = bits_.data() + (k * shape_.rows + i) * shape_.row_bytes() + first / 8;
        for (Index j = 0; j < count; ++j)
          out[j / 8] = static_cast<std::uint8_t>(out[j / 8] | (code.codes[static_cast<std::size_t>(j)] >> k & 1) << (j % 8));
      }
    }
  }

  BinaryCodeShape shape_;
  Index iterations_ = 0, done_ = 0;
  Buffer<std::uint8_t> bits_;
  Matrix<float> scales_;
};

/// Codes `weight` [out, in]. Errors: those of BinaryQuantizer.
template <class T, class ParallelFor = SerialFor>
BinaryCodedTensor<> binary_quantize(MatrixView<T> weight, BinaryCodeOptions options = {}, ParallelFor&& parallel_for = {}) {
  BinaryQuantizer quantizer(weight.rows, weight.cols, options);
  quantizer.append(weight, parallel_for);
  return std::move(quantizer).finish();
}

}  // namespace qdylora
