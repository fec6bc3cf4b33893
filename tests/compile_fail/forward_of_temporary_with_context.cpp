// expect-gcc: use of deleted function
// expect-clang: call to deleted member function 'forward'
// A layer borrows its input until the backward pass, with a context of the caller's too.
#include <qdylora/qdylora.hpp>

namespace qd = qdylora;

void train(qd::DynamicLoRALinear<float>& layer, qd::DynamicLoRALinear<float>::Context& context, qd::MatrixView<float> y) {
  layer.forward(qd::Matrix<float>(8, 64), y, context);
}
