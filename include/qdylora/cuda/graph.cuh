// Work of a context's stream as a CUDA graph: recorded once, started by one call ever after. What launching dozens of small kernels takes
// the host is then paid once.
#pragma once

#include <cstddef>
#include <utility>
#include <vector>

#include <qdylora/cuda/context.cuh>

namespace qdylora {

/// auto x = ..., dy = ...;                       // in memory that stays
/// layer.forward(x, y, context); ...             // once as it is: what layers keep between passes is made then
/// CudaGraph pass(cuda.context(), [&] { layer.forward(x, y, context); layer.backward(dy, dx, context); });
/// for (...) { cuda.upload(next, x); pass.launch(); optimizer.step(); }
///
/// A graph repeats what it was recorded with: addresses, shapes, ranks (a graph for each plan), lists of the host (token ids, targets), a
/// learning rate, what a layer keeps of A and B while it does not train (a step is recorded after set_training(true)). What operations note
/// on the host, such as Parameter::touched, they note while recording, not when it is launched. Nothing within may wait (download,
/// sum_squares, quantize, synchronize: Errc::device), take memory that outlives it (Errc::state_order), or draw masks of dropout
/// (Errc::unsupported). All else of Cuda's may be recorded. The context outlives its graphs.
class CudaGraph {
 public:
  /// Takes down what f() queues on the context's stream; none of it is done. Throws what f throws, after which the stream is as before.
  template <class F>
  CudaGraph(const CudaContext& context, F&& f) : context_(&context) {
    // Calls of this host thread alone are judged. Others may use the device meanwhile, but not its legacy stream, which waits for this one: no
    // Matrix in DeviceMemory{} may be made or freed there.
    QDYLORA_CUDA_TRY(cudaStreamBeginCapture(context.stream(), cudaStreamCaptureModeThreadLocal));
    try {
      std::forward<F>(f)();
    } catch (...) {
      abandon();
      throw;
    }
    cudaGraph_t recorded = nullptr;
    QDYLORA_CUDA_TRY(cudaStreamEndCapture(context.stream(), &recorded));
    const detail::Owned<cudaGraph_t> graph(recorded);
    expect_memory_returned(recorded);
    cudaGraphExec_t executable = nullptr;
    // Slabs are decoded ahead of products by their stream's priority, which a graph's nodes have only where it is asked for.
    QDYLORA_CUDA_TRY(cudaGraphInstantiateWithFlags(&executable, recorded, cudaGraphInstantiateFlagUseNodePriority));
    executable_.reset(executable);
  }

  /// Queues it all on the context's stream.
  void launch() const { QDYLORA_CUDA_TRY(cudaGraphLaunch(executable_.get(), context_->stream())); }

 private:
  void abandon() const noexcept {
    cudaGraph_t recorded = nullptr;
    if (cudaStreamEndCapture(context_->stream(), &recorded) == cudaSuccess) cudaGraphDestroy(recorded);
    cudaGetLastError();
  }

  // A second launch of a graph that takes memory and keeps it would fail.
  static void expect_memory_returned(cudaGraph_t graph) {
    std::size_t count = 0;
    QDYLORA_CUDA_TRY(cudaGraphGetNodes(graph, nullptr, &count));
    std::vector<cudaGraphNode_t> nodes(count);
    if (count > 0) QDYLORA_CUDA_TRY(cudaGraphGetNodes(graph, nodes.data(), &count));
    std::ptrdiff_t kept = 0;
    for (const auto node : nodes) {
      cudaGraphNodeType type{};
      QDYLORA_CUDA_TRY(cudaGraphNodeGetType(node, &type));
      kept += type == cudaGraphNodeTypeMemAlloc ? 1 : type == cudaGraphNodeTypeMemFree ? -1 : 0;
    }
    QDYLORA_EXPECTS(kept == 0, state_order,
                    "CudaGraph: the recorded work takes memory and keeps it; do the work once before, so that what it keeps exists");
  }

  const CudaContext* context_;
  detail::Owned<cudaGraphExec_t> executable_;
};

}  // namespace qdylora
