// expect: a view does not keep a temporary matrix alive: name it first
// An Eigen matrix that is gone at the end of the line has no view.
#include <qdylora/core/eigen.hpp>

auto view() { return qdylora::as_view(qdylora::EigenMatrix<float>(2, 2)); }
