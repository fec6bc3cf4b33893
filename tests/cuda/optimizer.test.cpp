// The optimizer with its states on the emulated device, and paged.
#include <qdylora/cuda.hpp>
#include <qdylora/optim/adamw.hpp>
#include <qdylora/optim/lion.hpp>

#include <memory>
#include <span>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/distortion.hpp"
#include "support/files.hpp"
#include "support/random_data.hpp"

namespace optimizer_test {

namespace qd = qdylora;
using qd::Cuda;
using qd::Index;
using Parameter = qd::Parameter<float, qd::DeviceMemory>;

namespace {

/// Some steps, of rows with learning rates of their own; the values at the end.
template <class Optimizer>
qd::Matrix<float> trained(const Cuda& cuda, Index rows, Index cols, typename Optimizer::Options options) {
  const auto p = std::make_shared<Parameter>("p", rows, cols);
  const auto begin = test::normal_matrix<float>(rows, cols, 1);
  cuda.upload(begin.view(), p->value.view());
  for (Index i = 0; i < rows; ++i) p->row_lr.push_back(i % 3 == 0 ? 1.0f : 0.5f);
  Optimizer optimizer({p}, options, cuda);
  for (std::uint64_t step = 0; step < 4; ++step) {
    optimizer.zero_grad();
    cuda.upload(test::normal_matrix<float>(rows, cols, 10 + step).view(), p->gradient.view());
    p->touch(0, step == 2 ? rows / 2 : rows);
    CHECK_FALSE(optimizer.step().skipped);
    if (step == 1) optimizer.reset_state();
  }
  qd::Matrix<float> values(rows, cols);
  cuda.download(std::as_const(p->value).view(), values.view());
  return values;
}

using Full = qd::AdamW<float, Cuda>;
using Paged = qd::AdamW<float, Cuda, qd::PinnedMemory>;
using Managed = qd::AdamW<float, Cuda, qd::ManagedMemory>;
using In8Bits = qd::AdamW8bit<float, Cuda>;
using PagedIn8Bits = qd::AdamW8bit<float, Cuda, qd::PinnedMemory>;
using Lion = qd::Lion<float, Cuda>;
using PagedLion = qd::Lion<float, Cuda, qd::PinnedMemory>;

}  // namespace

TEST_CASE("moments in the host's memory are those on the device, bit for bit", "[cuda]") {
  // A workspace of which a part of the rows fits, so that parts follow each other through it.
  const qd::CudaContext context({.workspace_bytes = 64 << 10});
  const Cuda cuda(context);
  const qd::AdamWOptions options{.lr = 0.01, .weight_decay = 0.1, .untouched_rows = qd::AdamWOptions::UntouchedRows::strict};
  for (const auto& [rows, cols] : {std::pair<Index, Index>{1, 1}, {9, 700}, {40, 300}}) {
    CAPTURE(rows, cols);
    const auto full = trained<Full>(cuda, rows, cols, options);
    CHECK(test::same_bits(trained<Paged>(cuda, rows, cols, options).view(), full.view()));
    CHECK(test::same_bits(trained<Managed>(cuda, rows, cols, options).view(), full.view()));
    const auto in_8_bits = trained<In8Bits>(cuda, rows, cols, options);
    CHECK(test::same_bits(trained<PagedIn8Bits>(cuda, rows, cols, options).view(), in_8_bits.view()));
    CHECK(test::same_bits(in_8_bits.view(), full.view()) == (rows * cols < 4096));
    CHECK(test::normalised_squared_error(in_8_bits.view(), full.view()) < 1e-3);
    const qd::LionOptions of_lion{.lr = 0.01, .weight_decay = 0.1};
    CHECK(test::same_bits(trained<PagedLion>(cuda, rows, cols, of_lion).view(), trained<Lion>(cuda, rows, cols, of_lion).view()));
  }
}

TEST_CASE("a row of moments that the workspace does not hold twice is refused", "[cuda]") {
  const qd::CudaContext context({.workspace_bytes = 16 << 10});
  const Cuda cuda(context);
  qd::Matrix<float, qd::DeviceMemory> p(1, 2000);
  qd::Matrix<float, qd::PinnedMemory> m(1, 2000);
  CHECK(test::code_of([&] { cuda.adamw_paged(p.view(), p.view(), m.view(), m.view(), {}); }) == qd::Errc::memory);
}

TEST_CASE("the squares of many matrices are summed at once", "[cuda]") {
  const qd::CudaContext context({.workspace_bytes = 1 << 20});
  const Cuda cuda(context);
  std::vector<qd::Matrix<float, qd::DeviceMemory>> matrices;
  std::vector<qd::MatrixView<const float>> views;
  double expected = 0.0;
  for (const auto& [rows, cols] : {std::pair<Index, Index>{1, 1}, {0, 7}, {300, 5}, {3, 9000}, {64, 64}}) {
    const auto x = test::normal_matrix<float>(rows, cols, matrices.size());
    for (const float value : x.span()) expected += static_cast<double>(value) * static_cast<double>(value);
    cuda.upload(x.view(), matrices.emplace_back(rows, cols).view());
  }
  for (const auto& x : matrices) views.push_back(x.view());
  using Views = std::span<const qd::MatrixView<const float>>;
  CHECK(cuda.sum_squares(Views(views)) == Approx(expected).epsilon(1e-12));
  CHECK(cuda.sum_squares(Views()) == 0.0);
}

}  // namespace optimizer_test
