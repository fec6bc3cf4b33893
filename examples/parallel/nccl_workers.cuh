// Workers that are the GPUs of an NCCL communicator, one process or thread each. Compiled, not run.
#pragma once

#include <nccl.h>

#include <chrono>
#include <memory>
#include <string>

#include <qdylora/cuda.hpp>
#include <qdylora/optim/workers.hpp>

namespace qdylora::examples {

inline void check_nccl(ncclResult_t result, const char* call) {
  if (result != ncclSuccess && result != ncclInProgress) throw Error(Errc::peer, std::string(call) + ": " + ncclGetErrorString(result));
}

/// `id` is ncclGetUniqueId's of one worker, which has sent it to the others. Throws Errc::peer where NCCL fails, here or on another worker,
/// and where the others have not answered within `patience`: one is gone or hangs. Nothing blocks meanwhile; what is under way is aborted.
inline Workers<float, DeviceMemory> nccl_workers(ncclUniqueId id, int index, int count, const CudaContext& context,
                                                 std::chrono::milliseconds patience = std::chrono::minutes(10)) {
  using Clock = std::chrono::steady_clock;
  ncclConfig_t config = NCCL_CONFIG_INITIALIZER;
  config.blocking = 0;
  ncclComm_t made = nullptr;
  check_nccl(ncclCommInitRankConfig(&made, count, id, index, &config), "ncclCommInitRankConfig");
  // The last copy of the workers destroys it; abort, unlike destroy, waits for nobody.
  const std::shared_ptr<ncclComm> comm(made, [](ncclComm_t c) { ncclCommAbort(c); });
  const auto wait = [comm, patience](const char* call, auto&& finished) {
    for (const auto deadline = Clock::now() + patience;;) {
      ncclResult_t state = ncclSuccess;
      check_nccl(ncclCommGetAsyncError(comm.get(), &state), "ncclCommGetAsyncError");
      check_nccl(state, call);
      if (state == ncclSuccess && finished()) return;
      if (Clock::now() > deadline)
        throw Error(Errc::peer, std::string(call) + ": not done within " + std::to_string(patience.count()) +
                                    " ms; another worker is gone, or hangs");
    }
  };
  wait("ncclCommInitRankConfig", [] { return true; });
  return {index, count, [comm, wait, stream = context.stream()](std::span<float> numbers) {
            float* const data = numbers.data();
            check_nccl(ncclAllReduce(data, data, numbers.size(), ncclFloat, ncclSum, comm.get(), stream), "ncclAllReduce");
            wait("ncclAllReduce", [stream] {
              const cudaError_t state = cudaStreamQuery(stream);
              if (state != cudaErrorNotReady) QDYLORA_CUDA_TRY(state);
              return state == cudaSuccess;
            });
          }};
}

}  // namespace qdylora::examples
