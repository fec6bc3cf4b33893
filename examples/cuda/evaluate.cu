// evaluate on a GPU.
#include "../common/program.hpp"
#include "cuda_device.cuh"
#include "programs.hpp"

namespace qdylora::examples {

int evaluate_on_cuda(const EvaluateOptions& options, const OpenAdapter& adapter, OpenModel& model) {
  const CudaDevice device;
  return with_dtype(options.dtype, [&]<class T>(std::type_identity<T>) { return evaluate<T>(options, adapter, model, device); });
}

}  // namespace qdylora::examples
