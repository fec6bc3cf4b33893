// State that lives in the host's memory and passes through the device's while it is used.
#pragma once

#include <algorithm>
#include <array>
#include <memory>

#include <qdylora/cuda/context.cuh>

namespace qdylora {
namespace detail {

/// Rows of equal size, one after another.
struct PagedRows {
  void* data;
  Index row_bytes;
};

}  // namespace detail

/// Copies to the device and back, on a stream each, beside the work of a context's stream.
class Pager {
 public:
  explicit Pager(const CudaContext& context) : context_(&context), in_(detail::make_side_stream()), out_(detail::make_side_stream()) {
    for (Slot& slot : slots_) slot = {detail::make_event(), detail::make_event(), detail::make_event()};
  }

  /// f(begin, count, staged) queues work on rows [begin, begin + count) of all arrays, which are then at staged[0], staged[1] ... in the
  /// workspace, and which go back to where they came from. While one part is worked on, the next one comes and the last one leaves:
  ///
  ///   in     part 0   part 1   part 2 (into the memory of part 0, once that has left)
  ///   work            part 0   part 1
  ///   out                      part 0
  ///
  /// What follows on the context's stream waits until all have left. The arrays are in pinned memory (in any other the host waits).
  template <std::size_t N, class F>
  void pass(const std::array<detail::PagedRows, N>& arrays, Index rows, const F& f) const {
    if (rows == 0) return;
    Index row_bytes = 0;
    for (const auto& array : arrays) row_bytes += array.row_bytes;
    const Index room = Scratch(*context_).room() / slot_count - static_cast<Index>(N) * 256;
    const Index parts = std::clamp<Index>(rows * row_bytes / least_bytes, 1, most_parts);
    const Index at_once = std::clamp<Index>(std::min(detail::div_up(rows, parts), room / std::max<Index>(row_bytes, 1)), 1, rows);
    Scratch scratch(*context_);
    std::array<std::array<void*, N>, slot_count> staged;
    for (auto& slot : staged)
      for (std::size_t a = 0; a < N; ++a) slot[a] = scratch.take<std::byte>(at_once * arrays[a].row_bytes);

    const cudaStream_t work = context_->stream();
    detail::order(work, in_.get(), slots_[0].arrived);  // the workspace is free
    for (Index begin = 0, part = 0; begin < rows; begin += at_once, ++part) {
      const Index count = std::min(at_once, rows - begin);
      const auto at = static_cast<std::size_t>(part % slot_count);
      const Slot& slot = slots_[at];
      if (part >= slot_count) QDYLORA_CUDA_TRY(cudaStreamWaitEvent(in_.get(), slot.left.get(), 0));
      const auto copy = [&](cudaMemcpyKind kind, cudaStream_t stream) {
        for (std::size_t a = 0; a < N; ++a) {
          const auto bytes = static_cast<std::size_t>(count * arrays[a].row_bytes);
          void* const host = static_cast<std::byte*>(arrays[a].data) + begin * arrays[a].row_bytes;
          const bool to_device = kind == cudaMemcpyHostToDevice;
          if (bytes > 0)
            QDYLORA_CUDA_TRY(cudaMemcpyAsync(to_device ? staged[at][a] : host, to_device ? host : staged[at][a], bytes, kind, stream));
        }
      };
      copy(cudaMemcpyHostToDevice, in_.get());
      detail::order(in_.get(), work, slot.arrived);
      f(begin, count, staged[at]);
      detail::order(work, out_.get(), slot.worked);
      copy(cudaMemcpyDeviceToHost, out_.get());
      QDYLORA_CUDA_TRY(cudaEventRecord(slot.left.get(), out_.get()));
    }
    detail::order(out_.get(), work, slots_[0].worked);
  }

 private:
  static constexpr Index slot_count = 2;
  static constexpr Index least_bytes = Index{1} << 20, most_parts = 8;  // less is not worth a copy of its own

  struct Slot {
    detail::Event arrived, worked, left;
  };

  const CudaContext* context_;
  detail::Stream in_, out_;
  std::array<Slot, slot_count> slots_;
};

inline const Pager& CudaContext::pager() const {
  if (pager_ == nullptr) pager_ = std::make_shared<const Pager>(*this);
  return *pager_;
}

}  // namespace qdylora
