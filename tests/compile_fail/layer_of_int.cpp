// expect: constraint
// expect: Scalar
// Activations are float, double, bfloat16 or half.
#include <qdylora/qdylora.hpp>

namespace qd = qdylora;

void use(qd::DynamicLoRALinear<int>& layer);
