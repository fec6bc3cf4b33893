// expect-gcc: use of deleted function
// expect-clang: call to deleted member function 'forward'
// A layer borrows its input until the backward pass, so the input cannot be a temporary.
#include <qdylora/qdylora.hpp>

namespace qd = qdylora;

void train(qd::DynamicLoRALinear<float>& layer) { layer.forward(qd::Matrix<float>(8, 64)); }
