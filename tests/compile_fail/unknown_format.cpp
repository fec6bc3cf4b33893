// expect: the format of a layer is a code format (NF4, FP4, INT4, FP8E4M3, FP8E5M2), Dense<S> or AnyFormat
#include <qdylora/qdylora.hpp>

namespace qd = qdylora;

void use(qd::DynamicLoRALinear<float, qd::Cpu, float>& layer) { layer.set_rank(1); }
