// Copies between the device's memory and the host's that run beside a context's other work.
#pragma once

#include <cstddef>
#include <vector>

#include <qdylora/core/view.hpp>
#include <qdylora/cuda/context.cuh>

namespace qdylora {

/// Copies, done in order on a stream of their own. Each has a ticket, 0 ... tickets - 1, by which it is waited for. The context outlives it.
class CopyQueue {
 public:
  using Memory = PinnedMemory;  // of the host's side; with any other the host would wait for the copies

  CopyQueue(const CudaContext& context, std::size_t tickets) : context_(&context), copies_(detail::make_side_stream()), tickets_(tickets) {}
  CopyQueue(CopyQueue&&) noexcept = default;
  /// The host waits: what copies read and write may be given back then.
  ~CopyQueue() {
    if (copies_) static_cast<void>(cudaStreamSynchronize(copies_.get()));
  }

  /// target = source, behind what the context's stream has been given so far. Both are contiguous, and stay as they are until waited for.
  template <class T>
  void to_host(In<T> source, MatrixView<T> target, std::size_t ticket) {
    copy(source, target, cudaMemcpyDeviceToHost, ticket);
  }
  template <class T>
  void to_device(In<T> source, MatrixView<T> target, std::size_t ticket) {
    copy(source, target, cudaMemcpyHostToDevice, ticket);
  }

  /// What the context's stream is given from now on comes behind the last copy of that ticket.
  void wait(std::size_t ticket) {
    Ticket& t = tickets_.at(ticket);
    if (t.pending) QDYLORA_CUDA_TRY(cudaStreamWaitEvent(context_->stream(), t.done.get(), 0));
    t.pending = false;
  }
  /// The same for all copies, also where those that were to wait for some have been given up.
  void wait_for_all() {
    bool pending = false;
    for (Ticket& t : tickets_) {
      pending = pending || t.pending;
      t.pending = false;
    }
    if (pending) detail::order(copies_.get(), context_->stream(), tickets_.front().done);
  }

 private:
  struct Ticket {
    detail::Event begun = detail::make_event(), done = detail::make_event();
    bool pending = false;
  };

  template <class T>
  void copy(MatrixView<const T> source, MatrixView<T> target, cudaMemcpyKind kind, std::size_t ticket) {
    expect_shape("CopyQueue: target", target, source.rows, source.cols);
    QDYLORA_EXPECTS(source.contiguous() && target.contiguous(), unsupported, "CopyQueue: rows must follow each other");
    if (source.empty()) return;
    Ticket& t = tickets_.at(ticket);
    detail::order(context_->stream(), copies_.get(), t.begun);
    QDYLORA_CUDA_TRY(cudaMemcpyAsync(target.data, source.data, static_cast<std::size_t>(source.size()) * sizeof(T), kind, copies_.get()));
    QDYLORA_CUDA_TRY(cudaEventRecord(t.done.get(), copies_.get()));
    t.pending = true;
  }

  const CudaContext* context_;
  detail::Stream copies_;
  std::vector<Ticket> tickets_;
};

}  // namespace qdylora
