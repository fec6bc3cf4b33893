// The emulated machine: what it has, and what a test makes it lack. First the runtime's names that this takes.
#pragma once

#include <type_traits>
#include <utility>

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInsufficientDriver = 35,
  cudaErrorInvalidDeviceFunction = 98,
  cudaErrorNoDevice = 100,
  cudaErrorInvalidDevice = 101,
  cudaErrorNoKernelImageForDevice = 209,
  cudaErrorStreamCaptureUnsupported = 900,
  cudaErrorStreamCaptureInvalidated = 901,
  cudaErrorStreamCaptureMerge = 902,
  cudaErrorStreamCaptureUnmatched = 903,
  cudaErrorStreamCaptureUnjoined = 904,
  cudaErrorStreamCaptureIsolation = 905,
  cudaErrorStreamCaptureImplicit = 906,
};

struct CUstream_st;

namespace test::emulator {

/// Whose work is put off until something waits for it: that of the oldest stream, a context's, or that of all others.
enum class Late { none, first, others };

struct Machine {
  int devices = 1;
  int compute_capability = 90;
  int compiled_capability = 120;  // what kernels were compiled for; 0: for other devices alone
  bool compiled_for_sm90a = true;  // kernels of a 9.0 alone have bodies
  int shared_bytes = 227 << 10;    // that a block may ask for
  unsigned most_blocks = 65535;    // in a grid along y and z; a GPU takes 2^31 - 1 along x
  cudaError_t driver = cudaSuccess;  // what every call finds
  cudaError_t last_error = cudaSuccess;
  Late late = Late::none;
  bool default_stream_per_thread = false;  // nvcc --default-stream per-thread
  int streams = 0;  // that live
  int unawaited_copies = 0;  // from pageable memory, which nothing has waited for since: a GPU may still read it
  int handles = 0;  // of cuBLASLt
  long launches = 0;  // of kernels, ever
  long products = 0;  // of cuBLASLt, ever
};
inline Machine& machine() {
  static Machine machine;
  return machine;
}
inline cudaError_t result(cudaError_t error) {
  if (error == cudaSuccess) error = machine().driver;
  if (error != cudaSuccess) machine().last_error = error;
  return error;
}
inline bool is_late(bool first) { return machine().late == (first ? Late::first : Late::others); }

/// Another number of the machine's, or one of its other things, until the end of a scope.
template <class T>
class With {
 public:
  With(T Machine::*what, std::type_identity_t<T> value) : what_(what), before_(std::exchange(machine().*what, value)) {}
  With(const With&) = delete;
  With& operator=(const With&) = delete;
  ~With() { machine().*what_ = before_; }

 private:
  T Machine::*what_;
  T before_;
};

}  // namespace test::emulator
