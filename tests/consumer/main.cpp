// The program of all three consumers.
#include <cstdio>

#include <qdylora/core/matrix.hpp>
#include <qdylora/version.hpp>

int main() {
  qdylora::Matrix<float> matrix(2, 3);
  matrix(1, 2) = 0.5f;
  const auto copy = qdylora::clone(matrix.view());
  std::printf("qdylora %s\n", QDYLORA_VERSION_STRING);
  return copy(1, 2) == 0.5f ? 0 : 1;
}
