// MatrixView: the type every operation takes. A pointer with a shape; it owns nothing.
#pragma once

#include <string>
#include <type_traits>

#include <qdylora/core/error.hpp>
#include <qdylora/core/scalar.hpp>

namespace qdylora {

/// Row-major matrix [rows, cols]; row i starts at data + i * stride, stride >= cols elements. Higher-rank tensors are flattened:
/// activations are [tokens, features]. Trivially copyable, host and device.
template <class T>
struct MatrixView {
  T* data = nullptr;
  Index rows = 0;
  Index cols = 0;
  Index stride = 0;

  MatrixView() = default;
  QDYLORA_HD constexpr MatrixView(T* data_, Index rows_, Index cols_) noexcept
      : data(data_), rows(rows_), cols(cols_), stride(cols_) {}
  QDYLORA_HD constexpr MatrixView(T* data_, Index rows_, Index cols_, Index stride_) noexcept
      : data(data_), rows(rows_), cols(cols_), stride(stride_) {}
  /// View of mutable elements to view of const ones.
  template <class U>
    requires std::is_same_v<const U, T>
  QDYLORA_HD constexpr MatrixView(const MatrixView<U>& other) noexcept
      : data(other.data), rows(other.rows), cols(other.cols), stride(other.stride) {}

  QDYLORA_HD constexpr T& operator()(Index i, Index j) const noexcept { return data[i * stride + j]; }
  QDYLORA_HD constexpr T* row(Index i) const noexcept { return data + i * stride; }
  QDYLORA_HD constexpr Index size() const noexcept { return rows * cols; }
  QDYLORA_HD constexpr bool empty() const noexcept { return rows == 0 || cols == 0; }
  QDYLORA_HD constexpr bool contiguous() const noexcept { return stride == cols || rows <= 1; }

  /// Rows [begin, begin + count).
  QDYLORA_HD constexpr MatrixView middle_rows(Index begin, Index count) const noexcept {
    return {data + begin * stride, count, cols, stride};
  }
  QDYLORA_HD constexpr MatrixView top_rows(Index count) const noexcept { return middle_rows(0, count); }
  /// Columns [begin, begin + count).
  QDYLORA_HD constexpr MatrixView middle_cols(Index begin, Index count) const noexcept {
    return {data + begin, rows, count, stride};
  }
  QDYLORA_HD constexpr MatrixView left_cols(Index count) const noexcept { return middle_cols(0, count); }
};

template <class T>
MatrixView(T*, Index, Index) -> MatrixView<T>;
template <class T>
MatrixView(T*, Index, Index, Index) -> MatrixView<T>;

/// An input argument: T is deduced from the outputs of a call, so a view of mutable elements converts.
template <class T>
using In = std::type_identity_t<MatrixView<const T>>;

template <class T>
std::string shape_text(const MatrixView<T>& view) {
  return detail::shape_text(view.rows, view.cols);
}

/// Throws Errc::shape_mismatch, naming the tensor and both shapes, unless `view` is [rows, cols].
template <class T>
void expect_shape(const char* what, const MatrixView<T>& view, Index rows, Index cols) {
  QDYLORA_EXPECTS(view.rows == rows && view.cols == cols, shape_mismatch,
                  std::string(what) + ": expected " + detail::shape_text(rows, cols) + ", found " + shape_text(view));
  QDYLORA_EXPECTS(view.stride >= view.cols || view.rows <= 1, shape_mismatch,
                  std::string(what) + ": stride " + std::to_string(view.stride) + " is smaller than its " +
                      std::to_string(view.cols) + " columns");
}

}  // namespace qdylora
