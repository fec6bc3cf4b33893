// Dense float32 products: OpenBLAS, or with -D USE_MKL Intel's MKL, or with -D USE_EIGEN Eigen.
#include "cells.hpp"

#ifdef USE_EIGEN
#include <Eigen/Dense>
#elif defined(USE_MKL)
#include <mkl.h>
#else
#include <cblas.h>
#endif

namespace {

using cells::Index;
using cells::size;

#ifdef USE_EIGEN
constexpr const char* kernel_name = "Eigen float32";
using RowMajor = Eigen::Matrix<float, Eigen::Dynamic, Eigen::Dynamic, Eigen::RowMajor>;

void start(int threads) {
  Eigen::setNbThreads(threads);
  cells::print_version("Eigen", std::to_string(EIGEN_WORLD_VERSION) + "." + std::to_string(EIGEN_MAJOR_VERSION) + "." +
                                    std::to_string(EIGEN_MINOR_VERSION) + ", compiled with -O3 -march=native, g++ " __VERSION__);
}
void forward(const cells::Task& task, Index tokens, const float* x, const float* w, float* y) {
  const Eigen::Map<const RowMajor> weight(w, task.out, task.in);
  if (tokens == 1)  // Eigen's matrix-vector product is faster than its matrix product with one row
    Eigen::Map<Eigen::VectorXf>(y, task.out).noalias() = weight * Eigen::Map<const Eigen::VectorXf>(x, task.in);
  else Eigen::Map<RowMajor>(y, tokens, task.out).noalias() = Eigen::Map<const RowMajor>(x, tokens, task.in) * weight.transpose();
}
void backward(const cells::Task& task, Index tokens, const float* dy, const float* w, float* dx) {
  const Eigen::Map<const RowMajor> weight(w, task.out, task.in);
  if (tokens == 1) Eigen::Map<Eigen::RowVectorXf>(dx, task.in).noalias() = Eigen::Map<const Eigen::RowVectorXf>(dy, task.out) * weight;
  else Eigen::Map<RowMajor>(dx, tokens, task.in).noalias() = Eigen::Map<const RowMajor>(dy, tokens, task.out) * weight;
}
#else
int blas(Index n) { return static_cast<int>(n); }

#ifdef USE_MKL
constexpr const char* kernel_name = "MKL float32";

void start(int threads) {
  mkl_set_num_threads(threads);
  MKLVersion version;
  mkl_get_version(&version);
  cells::print_version("MKL", std::to_string(version.MajorVersion) + "." + std::to_string(version.MinorVersion) + "." +
                                  std::to_string(version.UpdateVersion));
}
#else
constexpr const char* kernel_name = "OpenBLAS float32";

void start(int threads) {
  openblas_set_num_threads(threads);
  cells::print_version("OpenBLAS", std::string(openblas_get_config()) + ", its kernels for " + openblas_get_corename());
}
#endif

void forward(const cells::Task& task, Index tokens, const float* x, const float* w, float* y) {
  const int out = blas(task.out), in = blas(task.in);
  if (tokens == 1) cblas_sgemv(CblasRowMajor, CblasNoTrans, out, in, 1.0f, w, in, x, 1, 0.0f, y, 1);
  else cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasTrans, blas(tokens), out, in, 1.0f, x, in, w, in, 0.0f, y, out);
}
void backward(const cells::Task& task, Index tokens, const float* dy, const float* w, float* dx) {
  const int out = blas(task.out), in = blas(task.in);
  if (tokens == 1) cblas_sgemv(CblasRowMajor, CblasTrans, out, in, 1.0f, w, in, dy, 1, 0.0f, dx, 1);
  else cblas_sgemm(CblasRowMajor, CblasNoTrans, CblasNoTrans, blas(tokens), in, out, 1.0f, dy, out, w, in, 0.0f, dx, in);
}
#endif

}  // namespace

int main(int argc, char** argv) {
  const cells::Task task(argc, argv);
  const cells::Others others;
  start(task.threads);
  const auto w = cells::random_matrix(task.out, task.in, 0.02f, 1);
  const std::vector<std::vector<float>> copies(size(task.copies(4.0 * static_cast<double>(w.size()))), w);
  for (const bool is_backward : {false, true}) {
    const Index depth = is_backward ? task.out : task.in, cols = is_backward ? task.in : task.out;
    const auto x = cells::random_matrix(task.most_tokens(), depth, 1.0f, 2);
    const cells::Reference reference(task, is_backward, x, w);
    std::vector<float> y(size(task.most_tokens() * cols));
    for (const Index tokens : task.tokens) {
      const Index group = task.group(tokens);
      const auto time = cells::measure(task.seconds, group, [&](Index sample) {
        for (Index i = sample * group; i < (sample + 1) * group; ++i)
          (is_backward ? backward : forward)(task, tokens, x.data(), copies[size(i) % copies.size()].data(), y.data());
      });
      cells::print_cell(task, kernel_name, "dense-float32", is_backward ? "backward" : "forward", tokens, time,
                        reference.error(y.data(), tokens));
    }
  }
  cells::print_others(others);
}
