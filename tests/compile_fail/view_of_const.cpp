// expect: 'MatrixView<const float>' to 'MatrixView<float>'
// A view of mutable elements becomes one of const elements, never the other way round.
#include <qdylora/core/view.hpp>

void write(qdylora::MatrixView<float> target);

void read(qdylora::MatrixView<const float> source) { write(source); }
