// finetune on a GPU.
#include "../common/program.hpp"
#include "cuda_device.cuh"
#include "programs.hpp"

namespace qdylora::examples {

int finetune_on_cuda(const FinetuneOptions& options, OpenModel& model, const FinetuneData& data) {
  const CudaDevice device;
  return with_dtype(options.dtype, [&]<class T>(std::type_identity<T>) { return finetune<T>(options, model, data, device); });
}

}  // namespace qdylora::examples
