// expect: a layer of AnyFormat is made from a weight that exists
// Which format a matrix should be quantized to is not known: the caller names one, or brings a weight.
#include <qdylora/qdylora.hpp>

namespace qd = qdylora;

auto make(const qd::Matrix<float>& weight) { return qd::DynamicLoRALinear<float, qd::Cpu, qd::AnyFormat>(weight, {}); }
