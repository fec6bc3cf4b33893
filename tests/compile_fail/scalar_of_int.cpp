// expect: constraint
// expect-gcc: satisfaction of 'Scalar<T>' [with T = int]
// expect-clang: because 'int' does not satisfy 'Scalar'
// The constraint is named by its concept, whose definition lists the types there are.
#include <qdylora/core/scalar.hpp>

using Sum = qdylora::Accumulator<int>;
