// DLPack: tensors of other libraries as views, and views as their tensors; nothing is copied. dlpack.h is not included here: these are
// templates over its structs (DLTensor, DLManagedTensor, DLManagedTensorVersioned), which come from the library at hand (PyTorch's
// <ATen/dlpack.h>, Debian's libdlpack-dev). Numbers are those of DLPack's binary interface (https://dmlc.github.io/dlpack, 0.5 to 1.3).
#pragma once

#include <concepts>
#include <cstdint>
#include <memory>
#include <string>
#include <type_traits>
#include <utility>

#include <qdylora/core/memory.hpp>
#include <qdylora/core/view.hpp>

namespace qdylora {

/// DLTensor of dlpack.h.
template <class Tensor>
concept DLPackTensor = requires(const Tensor& t) {
  { t.data } -> std::convertible_to<void*>;
  { t.byte_offset } -> std::convertible_to<std::uint64_t>;
  { t.ndim } -> std::convertible_to<std::int32_t>;
  { t.shape } -> std::convertible_to<const std::int64_t*>;
  { t.strides } -> std::convertible_to<const std::int64_t*>;
  t.device.device_type;
  t.device.device_id;
  t.dtype.code;
  t.dtype.bits;
  t.dtype.lanes;
};

/// DLManagedTensor or DLManagedTensorVersioned of dlpack.h.
template <class Managed>
concept DLPackManaged = requires(Managed& m, void (*deleter)(Managed*)) {
  requires DLPackTensor<std::remove_cvref_t<decltype(m.dl_tensor)>>;
  m.manager_ctx = nullptr;
  m.deleter = deleter;
};

struct DLPackDeleter {
  template <DLPackManaged Managed>
  void operator()(Managed* tensor) const {
    if (tensor->deleter != nullptr) tensor->deleter(tensor);
  }
};
/// A tensor that another library gave or will take: it is its holder who calls the deleter.
template <DLPackManaged Managed>
using DLPackPointer = std::unique_ptr<Managed, DLPackDeleter>;

namespace detail {

template <Scalar T>
inline constexpr int dlpack_code = std::is_same_v<T, bfloat16> ? 4 : 2;
template <Scalar T>
inline constexpr int dlpack_bits = 8 * sizeof(T);

inline std::string dlpack_dtype_text(int code, int bits, int lanes) {
  constexpr const char* names[] = {"int", "uint", "float", "opaque", "bfloat", "complex", "bool"};
  std::string text = code >= 0 && code < 7 ? names[code] : "type " + std::to_string(code) + " of bits ";
  text += std::to_string(bits);
  return lanes == 1 ? text : text + "x" + std::to_string(lanes);
}

// CPU, and memory of CUDA and ROCm that the host may touch; CUDA's own, and what it shares with the host.
template <MemoryResource Memory>
constexpr bool dlpack_reaches(int device_type) {
  return Memory::host ? device_type == 1 || device_type == 3 || device_type == 11 || device_type == 13
                      : device_type == 2 || device_type == 13;
}

}  // namespace detail

/// The elements of a tensor [..., features] as [tokens, features], rows of any stride; [features] is one row. T may be const. `Memory` says
/// where they have to be: the host's, or with a device's resource a CUDA device's (which of them is for the caller to look at).
/// The view lives as long as the tensor's memory. A read-only flag stands in DLManagedTensorVersioned, not here: respect it by a const T.
/// Throws, naming the tensor: Errc::dtype; Errc::device; Errc::shape for no dimensions; Errc::alignment; Errc::bad_argument for no memory;
/// Errc::unsupported for features that are not adjacent, rows that overlap (an expanded tensor), rows not at one distance.
template <class T, MemoryResource Memory = HostMemory, DLPackTensor Tensor>
  requires Scalar<std::remove_const_t<T>>
MatrixView<T> from_dlpack(const Tensor& tensor, const char* name = "tensor") {
  using S = std::remove_const_t<T>;
  const std::string what = std::string(name) + ": ";
  const int code = tensor.dtype.code, bits = tensor.dtype.bits, lanes = tensor.dtype.lanes;
  QDYLORA_EXPECTS(code == detail::dlpack_code<S> && bits == detail::dlpack_bits<S> && lanes == 1, dtype,
                  what + "expected " + std::string(dtype_name<S>()) + ", found " + detail::dlpack_dtype_text(code, bits, lanes));
  const int device = static_cast<int>(tensor.device.device_type);
  QDYLORA_EXPECTS(detail::dlpack_reaches<Memory>(device), device,
                  what + "expected memory of the " + (Memory::host ? "host" : "CUDA device") + ", found DLPack's device type " +
                      std::to_string(device));
  const int last = static_cast<int>(tensor.ndim) - 1;
  QDYLORA_EXPECTS(last >= 0, shape, what + "expected a dimension of features, found a tensor of no dimensions");
  Index rows = 1;
  for (int i = 0; i < last; ++i) rows *= tensor.shape[i];
  MatrixView<T> view(nullptr, rows, tensor.shape[last]);
  if (view.empty()) return view;
  QDYLORA_EXPECTS(tensor.data != nullptr, bad_argument, what + "no memory for " + shape_text(view));
  const auto address = reinterpret_cast<std::uintptr_t>(tensor.data) + static_cast<std::uintptr_t>(tensor.byte_offset);
  QDYLORA_EXPECTS(address % alignof(S) == 0, alignment,
                  what + "expected an address that is a multiple of " + std::to_string(alignof(S)) + " bytes, found " +
                      std::to_string(address % alignof(S)) + " more");
  view.data = reinterpret_cast<T*>(address);
  if (tensor.strides == nullptr) return view;  // compact, before DLPack 1.2
  QDYLORA_EXPECTS(view.cols == 1 || tensor.strides[last] == 1, unsupported,
                  what + "expected adjacent features, found them " + std::to_string(tensor.strides[last]) + " elements apart");
  Index inner = 1;  // rows in the dimensions seen; a dimension of one index has no stride
  for (int i = last - 1; i >= 0; --i) {
    if (tensor.shape[i] == 1) continue;
    if (inner == 1) view.stride = tensor.strides[i];
    QDYLORA_EXPECTS(tensor.strides[i] == inner * view.stride, unsupported,
                    what + "expected rows at one distance, so stride " + std::to_string(inner * view.stride) + " in dimension " +
                        std::to_string(i) + ", found " + std::to_string(tensor.strides[i]));
    inner *= tensor.shape[i];
  }
  QDYLORA_EXPECTS(view.rows == 1 || view.stride >= view.cols, unsupported,
                  what + "expected rows that do not overlap, found " + std::to_string(view.cols) + " elements in each, " +
                      std::to_string(view.stride) + " apart");
  return view;
}

/// The elements of a view as a tensor [rows, cols] for another library, which frees it: pass on release(). `owner` is what holds the memory
/// (a shared Parameter), kept until then; without one, the caller keeps it. In an unversioned tensor elements cannot be const.
template <DLPackManaged Managed, MemoryResource Memory = HostMemory, class T>
  requires Scalar<std::remove_const_t<T>>
DLPackPointer<Managed> to_dlpack(MatrixView<T> view, std::shared_ptr<const void> owner = nullptr, int device_id = 0) {
  constexpr bool versioned = requires(Managed m) { m.version.major = m.flags = 0; };
  static_assert(versioned || !std::is_const_v<T>, "DLManagedTensor cannot say that its elements are const: DLManagedTensorVersioned can");
  using S = std::remove_const_t<T>;
  struct Block {
    Managed managed{};
    std::int64_t shape[2], strides[2];
    std::shared_ptr<const void> owner;
  };
  auto block = std::make_unique<Block>();
  block->owner = std::move(owner);
  block->shape[0] = view.rows, block->shape[1] = view.cols;
  block->strides[0] = view.stride, block->strides[1] = 1;
  auto& tensor = block->managed.dl_tensor;
  tensor.data = const_cast<S*>(view.data);
  tensor.device.device_type = static_cast<decltype(tensor.device.device_type)>(Memory::host ? 1 : 2);
  tensor.device.device_id = device_id;
  tensor.ndim = 2;
  tensor.dtype.code = detail::dlpack_code<S>;
  tensor.dtype.bits = detail::dlpack_bits<S>;
  tensor.dtype.lanes = 1;
  tensor.shape = block->shape;
  tensor.strides = block->strides;
  block->managed.manager_ctx = block.get();
  block->managed.deleter = [](Managed* self) { delete static_cast<Block*>(self->manager_ctx); };
  if constexpr (versioned) {
    block->managed.version.major = 1;
    block->managed.flags = std::is_const_v<T> ? 1 : 0;  // read-only
  }
  return DLPackPointer<Managed>(&block.release()->managed);
}

}  // namespace qdylora
