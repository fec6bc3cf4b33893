// Operands in awkward places: at any element of an allocation, with any stride, and right before or behind a page that may not be
// touched. Kernels that load whole vectors must mind where their operands end.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstring>
#include <memory>
#include <new>
#include <stdexcept>
#include <type_traits>
#include <vector>

#include <qdylora/quant/quantized_tensor.hpp>

#include "support/random_data.hpp"

namespace test {

/// A matrix that starts `offset` elements into an allocation, its rows `padding` elements apart. All around it is NaN: an operation
/// that reads there spoils its result, and one that writes there is noticed.
template <Scalar T>
class Placed {
 public:
  Placed(Index rows, Index cols, Index offset, Index padding)
      : storage_(static_cast<std::size_t>(offset + rows * (cols + padding) + behind), canary()),
        offset_(offset),
        view_(storage_.data() + offset, rows, cols, cols + padding) {}
  template <class U>
  Placed(MatrixView<U> source, Index offset, Index padding) : Placed(source.rows, source.cols, offset, padding) {
    qdylora::copy(MatrixView<const T>(source), view_);
  }
  Placed(const Placed&) = delete;
  Placed& operator=(const Placed&) = delete;

  MatrixView<T> view() noexcept { return view_; }
  MatrixView<const T> in() const noexcept { return view_; }

  bool surroundings_intact() const {
    const T expected = canary();
    const auto size = static_cast<Index>(storage_.size());
    for (Index i = 0; i < size; ++i) {
      const Index at = i - offset_;
      const bool inside = at >= 0 && at < view_.rows * view_.stride && at % view_.stride < view_.cols;
      if (!inside && std::memcmp(&storage_[static_cast<std::size_t>(i)], &expected, sizeof(T)) != 0) return false;
    }
    return true;
  }

 private:
  static constexpr Index behind = 16;
  static T canary() { return scalar<T>(std::numeric_limits<double>::quiet_NaN()); }

  std::vector<T> storage_;
  Index offset_;
  MatrixView<T> view_;
};

/// Where elements lie in their pages: the first one behind, or the last one before, a page that may not be touched.
enum class PageEdge { start, end };

/// `count` elements at the edge of a page. A read or write of one element too many ends the program.
template <class T>
class Fenced {
  static_assert(std::is_trivially_copyable_v<T>);

 public:
  Fenced(Index count, PageEdge edge) {
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    const std::size_t bytes = static_cast<std::size_t>(count) * sizeof(T);
    const std::size_t inner = (bytes + page - 1) / page * page;
    length_ = inner + 2 * page;
    void* all = ::mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (all == MAP_FAILED) throw std::bad_alloc();
    begin_ = static_cast<std::byte*>(all);
    if (inner > 0 && ::mprotect(begin_ + page, inner, PROT_READ | PROT_WRITE) != 0) throw std::runtime_error("mprotect");
    data_ = reinterpret_cast<T*>(begin_ + page + (edge == PageEdge::end ? inner - bytes : 0));
  }
  Fenced(const T* source, Index count, PageEdge edge) : Fenced(count, edge) {
    if (count > 0) std::memcpy(static_cast<void*>(data_), source, static_cast<std::size_t>(count) * sizeof(T));
  }
  Fenced(const Fenced&) = delete;
  Fenced& operator=(const Fenced&) = delete;
  ~Fenced() {
    if (begin_ != nullptr) ::munmap(begin_, length_);
  }

  T* data() noexcept { return data_; }
  const T* data() const noexcept { return data_; }

 private:
  std::byte* begin_ = nullptr;
  std::size_t length_ = 0;
  T* data_ = nullptr;
};

/// Codes and scales of a tensor, copied to addresses that are `offset` elements off those of an allocation.
template <class Format, class Scales>
class PlacedWeight {
 public:
  template <class Tensor>
  PlacedWeight(const Tensor& tensor, Index offset) : view_(tensor.view()) {
    view_.codes = moved(codes_, tensor.codes().span(), offset);
    if constexpr (Scales::nested) {
      view_.scales.codes = moved(scale_codes_, tensor.scales().codes.span(), offset + 1);
      view_.scales.nested_absmax = moved(scales_, tensor.scales().nested_absmax.span(), offset);
    } else {
      view_.scales.absmax = moved(scales_, tensor.scales().absmax.span(), offset);
    }
  }
  PlacedWeight(const PlacedWeight&) = delete;
  PlacedWeight& operator=(const PlacedWeight&) = delete;

  const qdylora::QuantizedView<Format, Scales>& view() const noexcept { return view_; }
  /// The floats among the scales: absmax of the blocks, or of the blocks of scales.
  std::span<float> scales() noexcept { return std::span(scales_).last(scale_count_); }

 private:
  template <class T>
  const T* moved(std::vector<T>& storage, std::span<const T> source, Index offset) {
    storage.resize(static_cast<std::size_t>(offset));
    storage.insert(storage.end(), source.begin(), source.end());
    if constexpr (std::is_same_v<T, float>) scale_count_ = source.size();
    return storage.data() + offset;
  }

  std::vector<std::uint8_t> codes_, scale_codes_;
  std::vector<float> scales_;
  std::size_t scale_count_ = 0;
  qdylora::QuantizedView<Format, Scales> view_;
};

/// The same at the edges of pages.
template <class Format, class Scales>
class FencedWeight {
 public:
  template <class Tensor>
  FencedWeight(const Tensor& tensor, PageEdge edge) : codes_(tensor.codes().data(), tensor.codes().size(), edge), view_(tensor.view()) {
    view_.codes = codes_.data();
    if constexpr (Scales::nested) {
      scale_codes_ = std::make_unique<Fenced<std::uint8_t>>(tensor.scales().codes.data(), tensor.scales().codes.size(), edge);
      scales_ = std::make_unique<Fenced<float>>(tensor.scales().nested_absmax.data(), tensor.scales().nested_absmax.size(), edge);
      view_.scales.codes = scale_codes_->data();
      view_.scales.nested_absmax = scales_->data();
    } else {
      scales_ = std::make_unique<Fenced<float>>(tensor.scales().absmax.data(), tensor.scales().absmax.size(), edge);
      view_.scales.absmax = scales_->data();
    }
  }

  const qdylora::QuantizedView<Format, Scales>& view() const noexcept { return view_; }

 private:
  Fenced<std::uint8_t> codes_;
  std::unique_ptr<Fenced<std::uint8_t>> scale_codes_;
  std::unique_ptr<Fenced<float>> scales_;
  qdylora::QuantizedView<Format, Scales> view_;
};

/// A matrix at the edge of a page, its rows `padding` elements apart. What lies between two rows is NaN; nothing lies behind the last.
template <Scalar T>
class FencedMatrix {
 public:
  FencedMatrix(Index rows, Index cols, Index padding, PageEdge edge)
      : memory_(rows == 0 ? 0 : rows * (cols + padding) - padding, edge), view_(memory_.data(), rows, cols, cols + padding) {
    for (Index i = 0; i < rows * view_.stride - (rows == 0 ? 0 : padding); ++i)
      memory_.data()[i] = scalar<T>(std::numeric_limits<double>::quiet_NaN());
  }
  template <class U>
  FencedMatrix(MatrixView<U> source, Index padding, PageEdge edge) : FencedMatrix(source.rows, source.cols, padding, edge) {
    qdylora::copy(MatrixView<const T>(source), view_);
  }

  MatrixView<T> view() noexcept { return view_; }
  MatrixView<const T> in() const noexcept { return view_; }

 private:
  Fenced<T> memory_;
  MatrixView<T> view_;
};

}  // namespace test
