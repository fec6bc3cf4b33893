// The runtime around the kernels: contexts, memory, traffic, and what is said where a machine lacks something.
#include <qdylora/cuda/context.cuh>

#include <optional>

#include "support/catch.hpp"
#include "support/files.hpp"
#include "support/random_data.hpp"

namespace runtime_test {

namespace qd = qdylora;
using qd::Errc;
using test::emulator::global_memory;
using test::emulator::machine;

namespace {

/// The emulated machine as it was, once a test is over.
struct RestoredMachine {
  test::emulator::Machine before = machine();
  std::size_t total = global_memory().total();
  ~RestoredMachine() {
    machine() = before;
    global_memory().set_total(total);
  }
};

bool says(const std::optional<qd::Error>& error, Errc code, const std::string& words) {
  return error && error->code() == code && std::string(error->what()).find(words) != std::string::npos;
}

std::optional<qd::Error> error_of_context(qd::CudaOptions options = {}) {
  return test::error_of([&] { qd::CudaContext context(options); });
}

}  // namespace

TEST_CASE("a context gives back all it took") {
  const std::size_t used = global_memory().used();
  {
    qd::CudaContext context({.workspace_bytes = 1 << 20});
    CHECK(global_memory().used() == used + (1 << 20));
    CHECK(machine().streams == 1);
    CHECK(machine().handles == 1);
  }
  CHECK(global_memory().used() == used);
  CHECK(machine().streams == 0);
  CHECK(machine().handles == 0);
}

TEST_CASE("a machine that lacks something is told what") {
  const RestoredMachine restored;
  CHECK(says(error_of_context({.device = 3}), Errc::device, "CUDA device 3 was asked for; this machine has 1"));
  CHECK(says(error_of_context({.workspace_bytes = std::size_t{5} << 30}), Errc::memory,
             "5120 MiB asked for, 4096 MiB of the device's 4096 MiB are free"));
  CHECK(machine().streams == 0);
  CHECK(machine().handles == 0);
  machine().compute_capability = 70;
  CHECK(says(error_of_context(), Errc::unsupported, "7.5 is the least"));
  machine().devices = 0;
  CHECK(says(error_of_context(), Errc::device, "no CUDA device"));
  machine().driver = cudaErrorInsufficientDriver;
  machine().devices = 1;
  CHECK(says(error_of_context(), Errc::device, "the driver is older"));
  CHECK(cudaPeekAtLastError() == cudaSuccess);  // what was reported is not reported again
}

TEST_CASE("QDYLORA_CUDA_TRY names the call and the line, and clears the error") {
  const auto error = test::error_of([] { QDYLORA_CUDA_TRY(cudaSetDevice(99)); });
  CHECK(says(error, Errc::device, "cudaSetDevice(99): "));
  CHECK(says(error, Errc::device, "cudaErrorInvalidDevice"));
  CHECK(says(error, Errc::device, "runtime.test.cpp:"));
  CHECK(cudaGetLastError() == cudaSuccess);
}

TEST_CASE("matrices live in every kind of memory") {
  const std::size_t used = global_memory().used();
  {
    qd::Matrix<float, qd::PinnedMemory> pinned(3, 4);
    qd::Matrix<float, qd::ManagedMemory> managed(3, 4);
    qd::Matrix<float, qd::DeviceMemory> device(3, 4);
    CHECK(pinned(2, 3) == 0.0f);
    CHECK(managed(2, 3) == 0.0f);
    CHECK(global_memory().used() == used + 3 * 48);
  }
  CHECK(global_memory().used() == used);
  const RestoredMachine restored;
  global_memory().set_total(used + (1 << 20));
  CHECK(says(test::error_of([] { qd::Matrix<float, qd::DeviceMemory>(1 << 10, 1 << 10); }), Errc::memory, "4 MiB asked for, 1 MiB"));
}

TEST_CASE("scratch memory starts over with each operation and has an end") {
  const qd::CudaContext context({.workspace_bytes = 1024});
  qd::Scratch first(context), second(context);
  const auto* a = first.take<double>(3);
  const auto* b = first.take<float>(1);
  CHECK(reinterpret_cast<std::uintptr_t>(b) - reinterpret_cast<std::uintptr_t>(a) == 256);
  CHECK(second.take<double>(128) == a);
  CHECK(says(test::error_of([&] { first.take<float>(200); }), Errc::memory, "workspace of 1536 bytes"));
}

}  // namespace runtime_test
