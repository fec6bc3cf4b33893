// What the examples for other trainers learn: to answer as a two-layer net does whose weights are a low-rank change away from the frozen
// ones.
#pragma once

#include <cstdio>

#include <qdylora/qdylora.hpp>

namespace qdylora::examples {

class ToyTask {
  Rng rng_{7};

 public:
  static constexpr Index tokens = 64, in = 32, hidden = 64, out = 16;

  Matrix<float> up = random(hidden, in, 0.2f), down = random(out, hidden, 0.1f);  // "pretrained": y = down gelu(up x)

  /// The next batch: x [tokens, in] and what to answer, [tokens, out].
  void next(MatrixView<float> x, MatrixView<float> target) {
    for (Index i = 0; i < x.rows; ++i)
      for (Index j = 0; j < x.cols; ++j) x(i, j) = rng_.normal();
    Matrix<float> h(x.rows, hidden);
    const Cpu cpu{1};
    cpu.matmul(x, up_.view(), h.view());
    cpu.matmul(gelu(h.view(), cpu).view(), down_.view(), target);
  }

  /// Shows the loss of each rank beside rank 0's, which is that of the frozen net. The exit status of a program: 0 if every rank took off
  /// a tenth of it at least, and the last rank three quarters.
  template <class Loss>
  static int verdict(const RankSet& ranks, Loss&& loss_at) {
    const double frozen = loss_at(Index{0});
    std::printf("loss of the frozen net %.4f", frozen);
    double loss = frozen;
    bool good = true;
    for (const Index rank : ranks) {
      loss = loss_at(rank);
      good = good && loss < 0.9 * frozen;
      std::printf(", at rank %d %.4f", static_cast<int>(rank), loss);
    }
    good = good && loss < 0.25 * frozen;
    std::printf("\n%s\n", good ? "Every rank has learned." : "NOT LEARNED");
    return good ? 0 : 1;
  }

 private:
  Matrix<float> random(Index rows, Index cols, float deviation) {
    Matrix<float> m(rows, cols);
    for (float& x : m.span()) x = deviation * rng_.normal();
    return m;
  }
  // weight + a change of rank 4, each of its directions half as strong as the one before
  Matrix<float> changed(const Matrix<float>& weight) {
    auto sum = clone(weight.view());
    const auto u = random(4, weight.rows(), 0.3f), v = random(4, weight.cols(), 0.3f);
    for (Index r = 0; r < 4; ++r)
      for (Index i = 0; i < sum.rows(); ++i)
        for (Index j = 0; j < sum.cols(); ++j) sum(i, j) += u(r, i) * v(r, j) / static_cast<float>(Index{1} << r);
    return sum;
  }

  Matrix<float> up_ = changed(up), down_ = changed(down);
};

}  // namespace qdylora::examples
