// The runtime around the kernels: contexts, memory, traffic, and what is said where a machine lacks something.
#include <qdylora/cuda.hpp>

#include <optional>
#include <utility>
#include <vector>

#include "support/catch.hpp"
#include "support/cuda_emulator/device_array.hpp"
#include "support/files.hpp"
#include "support/random_data.hpp"
#include "support/stream_orders.hpp"

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
    const qd::CudaOptions large{.workspace_bytes = 1 << 20}, small{.workspace_bytes = 1 << 10, .overlap_slabs = false};
    const qd::CudaContext context(large), simple(small);
    CHECK(global_memory().used() == used + large.context_bytes() + small.context_bytes());
    CHECK(machine().streams == 3);
    CHECK(machine().handles == 2);
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
  machine().compute_capability = 90;
  machine().compiled_capability = 0;
  CHECK(says(error_of_context(), Errc::unsupported, "not compiled for emulated, compute capability 9.0"));
  machine().devices = 0;
  CHECK(says(error_of_context(), Errc::device, "no CUDA device"));
  machine().driver = cudaErrorInsufficientDriver;
  machine().devices = 1;
  CHECK(says(error_of_context(), Errc::device, "the driver is older"));
  CHECK(cudaPeekAtLastError() == cudaSuccess);  // what was reported is not reported again
}

TEST_CASE("kernels are chosen by what they were compiled for, where that is less than the device") {
  const RestoredMachine restored;
  const auto kernel = [](int device, int compiled) {
    machine().compute_capability = device;
    machine().compiled_capability = compiled;
    const qd::CudaContext context({.workspace_bytes = 1024});
    CHECK(context.compute_capability() == std::min(device, compiled));
    return context.choose_product({.tokens = 3, .out = 64, .in = 256, .fused_types = true, .whole_chunks = true});
  };
  CHECK(kernel(90, 90) == qd::ProductKernel::small_batch);
  CHECK(kernel(120, 80) == qd::ProductKernel::small_batch);
  CHECK(kernel(75, 90) == qd::ProductKernel::slabs);
  CHECK(kernel(90, 75) == qd::ProductKernel::slabs);  // whose body for sm_80 is empty
  const auto sm90a = [](int device, bool compiled) {
    machine().compute_capability = device;
    machine().compiled_for_sm90a = compiled;
    return qd::CudaContext({.workspace_bytes = 1024}).sm90a();
  };
  CHECK(sm90a(90, true));
  CHECK_FALSE(sm90a(90, false));
  CHECK_FALSE(sm90a(100, true));
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
    CHECK(global_memory().used() == used + 48);  // the device's
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

TEST_CASE("a stream that is put off shows a wait that is missing") {
  const RestoredMachine restored;
  const qd::CudaContext context({.workspace_bytes = 1 << 20});
  const qd::detail::Stream side = qd::detail::make_side_stream();
  const qd::detail::Event event = qd::detail::make_event();
  test::DeviceArray<int> source(1), middle(1), target(1);
  for (const auto late : {test::emulator::Late::none, test::emulator::Late::first, test::emulator::Late::others})
    for (const bool waits : {true, false}) {
      machine().late = late;
      source.set(std::vector{7});
      middle.set(std::vector{0});
      const auto copy = [](test::DeviceArray<int>& from, test::DeviceArray<int>& to, cudaStream_t stream) {
        cudaMemcpyAsync(to.data(), from.data(), sizeof(int), cudaMemcpyDeviceToDevice, stream);
      };
      copy(source, middle, side.get());
      if (waits) qd::detail::order(side.get(), context.stream(), event);
      copy(middle, target, context.stream());
      context.synchronize();
      CHECK(target.host()[0] == (waits || late != test::emulator::Late::others ? 7 : 0));
      cudaStreamSynchronize(side.get());
    }
}

TEST_CASE("a stream that is destroyed leaves what is put off to what waits for it") {
  const RestoredMachine restored;
  const qd::CudaContext context({.workspace_bytes = 1 << 20});
  machine().late = test::emulator::Late::others;
  const auto begin_copy = [](int* from, int* to) {
    cudaStream_t stream;
    cudaStreamCreate(&stream);
    cudaMemcpyAsync(to, from, sizeof(int), cudaMemcpyDeviceToDevice, stream);
    cudaStreamDestroy(stream);
  };
  test::DeviceArray<int> target(1);
  target.set(std::vector{0});
  test::DeviceArray<int> source(1);
  source.set(std::vector{7});
  begin_copy(source.data(), target.data());
  CHECK(target.host()[0] == 0);
  CHECK(machine().streams == 2);
  cudaStreamSynchronize(cudaStreamLegacy);
  CHECK(target.host()[0] == 7);
  {
    test::DeviceArray<int> brief(1);
    begin_copy(brief.data(), target.data());
  }
  CHECK_THROWS_AS(cudaStreamSynchronize(cudaStreamLegacy), test::emulator::Fault);
  CHECK(target.host()[0] == 7);
}

TEST_CASE("a queue of copies goes when they are done") {
  const qd::CudaContext context({.workspace_bytes = 1 << 20});
  const qd::Cuda cuda(context);
  test::in_every_order([&] {
    qd::Matrix<float, qd::DeviceMemory> source(3, 4, context.memory());
    qd::Matrix<float, qd::PinnedMemory> target(3, 4);
    cuda.fill(source.view(), 7.0f);
    qd::CopyQueue(context, 1).to_host(std::as_const(source).view(), target.view(), 0);
    for (const float x : target.span()) CHECK(x == 7.0f);
  });
}

TEST_CASE("memory without a stream of its own waits for all contexts, also where each thread has its own default stream") {
  const RestoredMachine restored;
  const qd::CudaContext context({.workspace_bytes = 1 << 20});
  test::DeviceArray<int> target(1);
  for (const bool per_thread : {false, true}) {
    machine().default_stream_per_thread = per_thread;
    machine().late = test::emulator::Late::first;
    target.set(std::vector{1});
    {
      qd::Matrix<int, qd::DeviceMemory> source(1, 1);
      cudaMemsetAsync(source.data(), 0, sizeof(int), context.stream());
      cudaMemcpyAsync(target.data(), source.data(), sizeof(int), cudaMemcpyDeviceToDevice, context.stream());
      CHECK(target.host()[0] == 1);
    }
    CHECK(target.host()[0] == 0);  // the source was given back once it had been read
  }
}

TEST_CASE("what the runtime refuses to record") {
  const RestoredMachine restored;
  const qd::CudaContext context({.workspace_bytes = 1 << 20});
  const qd::detail::Stream side = qd::detail::make_side_stream();
  const qd::detail::Event event = qd::detail::make_event(), before = qd::detail::make_event();
  test::DeviceArray<int> array(1);
  const auto work = [&](cudaStream_t stream) { return cudaMemsetAsync(array.data(), 1, sizeof(int), stream); };
  cudaEventRecord(before.get(), side.get());
  cudaGraph_t graph = nullptr;
  const auto end = [&] { return cudaStreamEndCapture(context.stream(), &graph); };
  const auto begin = [&] { REQUIRE(cudaStreamBeginCapture(context.stream(), cudaStreamCaptureModeThreadLocal) == cudaSuccess); };

  begin();  // a second stream that nobody waits for
  qd::detail::order(context.stream(), side.get(), event);
  CHECK(work(side.get()) == cudaSuccess);
  CHECK(end() == cudaErrorStreamCaptureUnjoined);
  begin();  // one that is waited for, but goes on
  qd::detail::order(context.stream(), side.get(), event);
  qd::detail::order(side.get(), context.stream(), event);
  CHECK(work(side.get()) == cudaSuccess);
  CHECK(end() == cudaErrorStreamCaptureUnjoined);
  begin();  // an event of before
  CHECK(cudaStreamWaitEvent(context.stream(), before.get(), 0) == cudaErrorStreamCaptureIsolation);
  CHECK(end() == cudaErrorStreamCaptureInvalidated);
  begin();  // the default stream
  CHECK(work(nullptr) == cudaErrorStreamCaptureImplicit);
  CHECK(work(context.stream()) == cudaErrorStreamCaptureInvalidated);
  CHECK(end() == cudaErrorStreamCaptureInvalidated);
  begin();  // memory of before
  void* memory = array.data();
  CHECK(cudaFreeAsync(memory, context.stream()) == cudaErrorInvalidValue);
  CHECK(end() == cudaErrorStreamCaptureInvalidated);
  CHECK(end() == cudaErrorStreamCaptureUnmatched);
  begin();  // memory of the host that may be gone
  int host = 0;
  CHECK(cudaMemcpyAsync(&host, array.data(), sizeof(int), cudaMemcpyDeviceToHost, context.stream()) == cudaErrorStreamCaptureUnsupported);
  CHECK(end() == cudaErrorStreamCaptureInvalidated);

  begin();
  qd::detail::order(context.stream(), side.get(), event);
  CHECK(work(side.get()) == cudaSuccess);
  qd::detail::order(side.get(), context.stream(), event);
  REQUIRE(end() == cudaSuccess);
  CHECK(array.host()[0] != 0x01010101);  // recorded, not done
  cudaGraphExec_t executable = nullptr;
  REQUIRE(cudaGraphInstantiateWithFlags(&executable, graph, cudaGraphInstantiateFlagUseNodePriority) == cudaSuccess);
  CHECK(cudaGraphLaunch(executable, context.stream()) == cudaSuccess);
  context.synchronize();
  CHECK(array.host()[0] == 0x01010101);
  cudaGraphExecDestroy(executable);
  cudaGraphDestroy(graph);
  cudaGetLastError();
}

}  // namespace runtime_test
