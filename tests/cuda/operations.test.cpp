// The backend tests that the CPU passes, on the emulated device.
#include <qdylora/cuda.hpp>

#include <algorithm>
#include <atomic>
#include <exception>

#include "backend/elementwise.inc"
#include "backend/memory.inc"
#include "backend/transformer.inc"
#include "support/device_memory_used.hpp"

namespace operations_test {

namespace qd = qdylora;
using qd::Cuda;

namespace {

/// A context, and at the end no block of memory that an operation has kept.
class Gpu {
 public:
  Gpu() : context_({.workspace_bytes = std::size_t{1} << 20}), before_(test::device_memory_used()) {}
  ~Gpu() noexcept(false) {  // a device that has failed says so once more
    if (std::uncaught_exceptions() == 0) CHECK(test::device_memory_used() == before_);
  }
  operator Cuda() const { return Cuda(context_); }

 private:
  qd::CudaContext context_;
  std::size_t before_;
};

}  // namespace

/// f() with rows that several elements may be read of at once, and with others.
template <class F>
void with_rows_of_both_kinds(const F& f) {
  struct Restored {
    ~Restored() { test::rows_are_aligned = false; }
  } restored;
  for (const bool aligned : {false, true}) {
    test::rows_are_aligned = aligned;
    CAPTURE(aligned);
    f();
  }
}

#define ON_ROWS_OF_BOTH_KINDS(name, body)                                     \
  TEMPLATE_TEST_CASE(name, "[cuda]", float, double, qd::bfloat16, qd::half) { \
    const Gpu gpu;                                                            \
    with_rows_of_both_kinds([&] { body<Cuda, TestType>(gpu); });              \
  }

ON_ROWS_OF_BOTH_KINDS("data goes to the device and back", test::memory_traffic)
ON_ROWS_OF_BOTH_KINDS("the device's quantization is the reference's to the bit", test::quantization)
ON_ROWS_OF_BOTH_KINDS("elementwise operations on the device are the reference's", test::elementwise)
ON_ROWS_OF_BOTH_KINDS("what magnitudes take of the device is the reference's", test::magnitudes)
ON_ROWS_OF_BOTH_KINDS("dropout on the device is the reference's and its mask exact", test::dropout)
ON_ROWS_OF_BOTH_KINDS("AdamW on the device is the reference's", test::adamw)
ON_ROWS_OF_BOTH_KINDS("Lion on the device is the reference's", test::lion)
ON_ROWS_OF_BOTH_KINDS("the sum of squares on the device is taken in double", test::sum_squares)
ON_ROWS_OF_BOTH_KINDS("RMS norm on the device is the reference's", test::rms_norm)
ON_ROWS_OF_BOTH_KINDS("layer norm on the device is the reference's", test::layer_norm)
ON_ROWS_OF_BOTH_KINDS("rotary embedding on the device is the reference's", test::rope)
ON_ROWS_OF_BOTH_KINDS("activations on the device are the reference's", test::activations)
ON_ROWS_OF_BOTH_KINDS("the gradient of an embedding on the device is the reference's to the bit", test::embedding_backward)
ON_ROWS_OF_BOTH_KINDS("rows of the device are copied to where each belongs", test::copied_rows)
ON_ROWS_OF_BOTH_KINDS("embedding on the device is the reference's", test::embedding)

TEMPLATE_TEST_CASE("cross-entropy on the device is the reference's", "[cuda]", float, double) {
  const Gpu gpu;
  test::cross_entropy<Cuda, TestType>(gpu);
}

TEST_CASE("AdamW with moments in 8 bits on the device has the reference's codes", "[cuda]") {
  const Gpu gpu;
  test::adamw8<Cuda>(gpu);
}

TEMPLATE_TEST_CASE("rows are gathered and scattered on the device", "[cuda]", float, qd::bfloat16) {
  using T = TestType;
  const Gpu gpu;
  const Cuda cuda = gpu;
  with_rows_of_both_kinds([&] {
    for (const qd::Index cols : {37, 40}) {
      const auto x = test::normal_matrix<T>(7, cols, 1);
      const test::Remote<Cuda, T> remote(cuda, x.view());
      const std::vector<qd::Index> rows = {6, 0, 3};
      test::Output<Cuda, T> gathered(cuda, 3, cols, qd::Update::overwrite), scattered(cuda, 7, cols, qd::Update::overwrite);
      cuda.gather_rows(remote.in(), rows, gathered.view());
      cuda.scatter_rows(gathered.remote().in(), rows, scattered.view());
      for (qd::Index i = 0; i < 7; ++i)
        for (qd::Index j = 0; j < cols; ++j) scattered.expected()(i, j) = 0.0;
      for (qd::Index i = 0; i < 3; ++i)
        for (qd::Index j = 0; j < cols; ++j) {
          const auto value = static_cast<double>(x(rows[static_cast<std::size_t>(i)], j));
          gathered.expected()(i, j) = value;
          scattered.expected()(rows[static_cast<std::size_t>(i)], j) = value;
        }
      gathered.check(0.0);
      scattered.check(0.0);
      CHECK(test::code_of([&] { cuda.gather_rows(remote.in(), std::vector<qd::Index>{7, 0, 0}, gathered.view()); }) ==
            qd::Errc::bad_argument);
      CHECK(test::code_of([&] { cuda.scatter_rows(gathered.remote().in(), std::vector<qd::Index>{-1, 0, 0}, scattered.view()); }) ==
            qd::Errc::bad_argument);
    }
  });
}

TEST_CASE("a short list comes with a kernel's arguments, a longer one in parts", "[cuda]") {
  const Gpu gpu;
  const Cuda cuda = gpu;
  const auto x = test::normal_matrix<float>(5, 2, 3);
  const test::Remote<Cuda, float> remote(cuda, x.view());
  constexpr qd::Index short_one = qd::device::List<qd::Index>::most;
  for (const qd::Index count : {qd::Index{1}, short_one, short_one + 1, qd::Index{1000}}) {
    CAPTURE(count);
    std::vector<qd::Index> rows;
    for (qd::Index i = 0; i < count; ++i) rows.push_back((i * i + 3) % 5);
    test::Output<Cuda, float> y(cuda, count, 2, qd::Update::overwrite);
    cuda.gather_rows(remote.in(), rows, y.view());
    for (qd::Index i = 0; i < count; ++i)
      for (qd::Index j = 0; j < 2; ++j) y.expected()(i, j) = static_cast<double>(x(rows[static_cast<std::size_t>(i)], j));
    y.check(0.0);
  }
}

TEST_CASE("the host's loop takes each index once and hands on what is thrown", "[cuda]") {
  const Gpu gpu;
  const Cuda cuda = gpu;
  std::vector<std::atomic<int>> taken(1000);
  cuda.parallel_for(1000, [&](qd::Index i) { ++taken[static_cast<std::size_t>(i)]; });
  CHECK(std::all_of(taken.begin(), taken.end(), [](const auto& count) { return count == 1; }));
  cuda.parallel_for(0, [](qd::Index) { throw std::runtime_error("never called"); });
  const auto refuse = [](qd::Index i) {
    if (i == 7) qd::detail::raise(qd::Errc::bad_argument, "seven");
  };
  CHECK(test::code_of([&] { cuda.parallel_for(50, refuse); }) == qd::Errc::bad_argument);
}

TEST_CASE("an error that another call of the program left behind is not a kernel's", "[cuda]") {
  const Gpu gpu;
  qd::Matrix<float, qd::DeviceMemory> x(3, 5);
  CHECK(cudaSetDevice(1 << 20) == cudaErrorInvalidDevice);
  CHECK_NOTHROW(Cuda(gpu).fill(x.view(), 1.0f));
  CHECK(cudaGetLastError() == cudaErrorInvalidDevice);
}

}  // namespace operations_test
