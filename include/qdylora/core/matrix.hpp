// Buffer and Matrix: owning, move-only, in a memory resource.
#pragma once

#include <algorithm>
#include <cstring>
#include <limits>
#include <span>
#include <string>
#include <type_traits>
#include <utility>

#include <qdylora/core/memory.hpp>
#include <qdylora/core/view.hpp>

namespace qdylora {

/// A fixed run of trivially copyable elements, uninitialized when made.
template <class T, MemoryResource Memory = HostMemory>
class Buffer {
  static_assert(std::is_trivially_copyable_v<T>, "Buffer holds plain data that may live on a device");

 public:
  Buffer() = default;
  explicit Buffer(Index size, Memory memory = {}) : memory_(memory) {
    QDYLORA_EXPECTS(size >= 0 && size <= std::numeric_limits<Index>::max() / static_cast<Index>(sizeof(T)), bad_argument,
                    "Buffer: " + std::to_string(size) + " elements is not a size");
    if (size > 0) data_ = static_cast<T*>(memory_.allocate(static_cast<std::size_t>(size) * sizeof(T)));
    size_ = size;
  }
  Buffer(Buffer&& other) noexcept
      : memory_(other.memory_), data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)) {}
  Buffer& operator=(Buffer&& other) noexcept {
    if (this != &other) {
      release();
      memory_ = other.memory_;
      data_ = std::exchange(other.data_, nullptr);
      size_ = std::exchange(other.size_, 0);
    }
    return *this;
  }
  ~Buffer() { release(); }

  T* data() noexcept { return data_; }
  const T* data() const noexcept { return data_; }
  Index size() const noexcept { return size_; }
  std::size_t bytes() const noexcept { return static_cast<std::size_t>(size_) * sizeof(T); }

  std::span<T> span() noexcept requires(Memory::host) { return {data_, static_cast<std::size_t>(size_)}; }
  std::span<const T> span() const noexcept requires(Memory::host) { return {data_, static_cast<std::size_t>(size_)}; }
  T& operator[](Index i) noexcept requires(Memory::host) { return data_[i]; }
  const T& operator[](Index i) const noexcept requires(Memory::host) { return data_[i]; }

 private:
  void release() noexcept {
    if (data_ != nullptr) memory_.deallocate(data_, bytes());
  }

  Memory memory_{};
  T* data_ = nullptr;
  Index size_ = 0;
};

/// An owning row-major matrix [rows, cols], contiguous. Elements start at zero when the memory is the host's.
template <class T, MemoryResource Memory = HostMemory>
class Matrix {
 public:
  using value_type = T;

  Matrix() = default;
  Matrix(Index rows, Index cols, Memory memory = {}) : memory_(memory) {
    resize(rows, cols);
    if constexpr (Memory::host && !requires { Memory::zeroed; })
      if (storage_.size() > 0) std::memset(static_cast<void*>(storage_.data()), 0, storage_.bytes());
  }
  Matrix(Matrix&& other) noexcept
      : memory_(other.memory_),
        storage_(std::move(other.storage_)),
        rows_(std::exchange(other.rows_, 0)),
        cols_(std::exchange(other.cols_, 0)) {}
  Matrix& operator=(Matrix&& other) noexcept {
    memory_ = other.memory_;
    storage_ = std::move(other.storage_);
    const Index rows = std::exchange(other.rows_, 0), cols = std::exchange(other.cols_, 0);
    rows_ = rows;
    cols_ = cols;
    return *this;
  }

  /// Gives the matrix a new shape. Keeps its storage while that is large enough; contents are unspecified afterwards.
  void resize(Index rows, Index cols) {
    QDYLORA_EXPECTS(rows >= 0 && cols >= 0 && (cols == 0 || rows <= std::numeric_limits<Index>::max() / cols), bad_argument,
                    "Matrix: " + detail::shape_text(rows, cols) + " is not a shape");
    if (rows * cols > storage_.size()) {
      rows_ = cols_ = 0;  // what is left if memory runs out
      storage_ = {};      // give the old block back before asking for the new one
      storage_ = Buffer<T, Memory>(rows * cols, memory_);
    }
    rows_ = rows;
    cols_ = cols;
  }

  Index rows() const noexcept { return rows_; }
  Index cols() const noexcept { return cols_; }
  Index size() const noexcept { return rows_ * cols_; }
  T* data() noexcept { return storage_.data(); }
  const T* data() const noexcept { return storage_.data(); }
  /// Bytes held, which after a resize to a smaller shape is more than size() needs.
  std::size_t capacity_bytes() const noexcept { return storage_.bytes(); }

  MatrixView<T> view() noexcept { return {data(), rows_, cols_}; }
  MatrixView<const T> view() const noexcept { return {data(), rows_, cols_}; }
  operator MatrixView<T>() noexcept { return view(); }
  operator MatrixView<const T>() const noexcept { return view(); }
  operator MatrixView<const T>() noexcept { return view(); }

  T& operator()(Index i, Index j) noexcept requires(Memory::host) { return data()[i * cols_ + j]; }
  const T& operator()(Index i, Index j) const noexcept requires(Memory::host) { return data()[i * cols_ + j]; }
  std::span<T> span() noexcept requires(Memory::host) { return {data(), static_cast<std::size_t>(size())}; }
  std::span<const T> span() const noexcept requires(Memory::host) { return {data(), static_cast<std::size_t>(size())}; }

 private:
  Memory memory_{};
  Buffer<T, Memory> storage_;
  Index rows_ = 0;
  Index cols_ = 0;
};

/// Copies `source` into `target`, both on the host, rows of any stride.
template <class T>
void copy(In<T> source, MatrixView<T> target) {
  expect_shape("copy: target", target, source.rows, source.cols);
  for (Index i = 0; i < source.rows; ++i) std::copy_n(source.row(i), source.cols, target.row(i));
}

/// A new host matrix with the elements of `source`.
template <class T>
Matrix<std::remove_const_t<T>> clone(MatrixView<T> source) {
  Matrix<std::remove_const_t<T>> result(source.rows, source.cols);
  copy(MatrixView<const std::remove_const_t<T>>(source), result.view());
  return result;
}

}  // namespace qdylora
