// How many blocks of fused_products.cu's kernels a processor holds at once, by NVIDIA's own calculation, of the registers that ptxas gave
// them. The kernels are written for as many as the table below has: with fewer, less is hidden behind the waiting for memory. None may keep
// anything on a stack.
//   occupancy ARCHITECTURE (90a) REPORT (what ptxas -v wrote)
#include <cstdio>
#include <cstdlib>
#include <fstream>
#include <iterator>
#include <regex>
#include <string>

#include <cuda_occupancy.h>

#include <qdylora/cuda/tiles.cuh>

namespace qd = qdylora;

template <int token_tiles>
using SmallBatch = qd::device::SmallBatch<qd::NF4, qd::DoubleQuant<>, qd::bfloat16, qd::bfloat16, token_tiles>;
template <int token_tiles>
using CodedTiles = qd::device::CodedTiles<qd::NF4, qd::DoubleQuant<>, qd::bfloat16, qd::bfloat16, token_tiles>;

namespace {

struct Device {
  int architecture, threads, shared_kib, shared_of_block_kib;  // of a processor; the CUDA programming guide's table of technical specifications
};
constexpr Device devices[] = {{80, 2048, 164, 163}, {86, 1536, 100, 99}, {89, 1536, 100, 99},
                              {90, 2048, 228, 227}, {100, 2048, 228, 227}, {120, 1536, 100, 99}};

struct KernelOf {
  const char* name;  // a part of the mangled one, after which token_tiles and E come
  int token_tiles, threads, shared_bytes;
  int blocks_of_100_kib, blocks;  // that are expected of a processor with so much shared memory, and of one with more
};
template <class Kernel>
constexpr KernelOf kernel_of(const char* name, int token_tiles, int blocks_of_100_kib, int blocks) {
  return {name, token_tiles, Kernel::threads, Kernel::shared_bytes, blocks_of_100_kib, blocks};
}
constexpr KernelOf kernels[] = {kernel_of<SmallBatch<1>>("SmallBatch", 1, 2, 2), kernel_of<SmallBatch<2>>("SmallBatch", 2, 2, 2),
                                kernel_of<SmallBatch<4>>("SmallBatch", 4, 1, 1), kernel_of<CodedTiles<4>>("CodedTiles", 4, 2, 3),
                                kernel_of<CodedTiles<8>>("CodedTiles", 8, 1, 2)};

int blocks_of(const Device& device, const KernelOf& kernel, int registers) {
  cudaOccDeviceProp properties;
  properties.computeMajor = device.architecture / 10;
  properties.computeMinor = device.architecture % 10;
  properties.maxThreadsPerBlock = 1024;
  properties.maxThreadsPerMultiprocessor = device.threads;
  properties.regsPerBlock = properties.regsPerMultiprocessor = 64 << 10;
  properties.warpSize = 32;
  properties.sharedMemPerBlock = 48 << 10;
  properties.sharedMemPerMultiprocessor = static_cast<std::size_t>(device.shared_kib) << 10;
  properties.numSms = 100;
  properties.sharedMemPerBlockOptin = static_cast<std::size_t>(device.shared_of_block_kib) << 10;
  properties.reservedSharedMemPerBlock = 1 << 10;
  cudaOccFuncAttributes attributes;
  attributes.maxThreadsPerBlock = kernel.threads;
  attributes.numRegs = registers;
  attributes.sharedSizeBytes = 0;
  attributes.partitionedGCConfig = PARTITIONED_GC_OFF;
  attributes.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
  attributes.maxDynamicSharedSizeBytes = static_cast<std::size_t>(kernel.shared_bytes);
  attributes.numBlockBarriers = 1;
  const cudaOccDeviceState state;
  cudaOccResult result{};
  const auto error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &properties, &attributes, &state, kernel.threads,
                                                             static_cast<std::size_t>(kernel.shared_bytes));
  return error == CUDA_OCC_SUCCESS ? result.activeBlocksPerMultiprocessor : -1;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return std::puts("occupancy ARCHITECTURE REPORT"), 2;
  const int architecture = std::atoi(arguments[1]);
  std::ifstream file(arguments[2]);
  const std::string report{std::istreambuf_iterator<char>(file), {}};
  bool failed = true;  // until there is such a device
  for (const Device& device : devices) {
    if (device.architecture != architecture) continue;
    failed = false;
    for (const KernelOf& kernel : kernels) {
      const std::regex entry("entry function '[^']*" + std::string(kernel.name) + "[^']*Li" + std::to_string(kernel.token_tiles) +
                             "E[^']*'[^\n]*\n[^\n]*\n *(\\d+) bytes stack frame[^\n]*\n[^\n]*Used (\\d+) registers");
      std::smatch found;
      if (!std::regex_search(report, found, entry)) {
        std::printf("%s<%d>: not in the report\n", kernel.name, kernel.token_tiles);
        failed = true;
        continue;
      }
      const int registers = std::stoi(found[2]), blocks = blocks_of(device, kernel, registers);
      const int expected = device.shared_kib > 100 ? kernel.blocks : kernel.blocks_of_100_kib;
      std::printf("sm_%d, %s<%d>: %d registers, %s bytes of stack, %d of shared memory: %d blocks, %d expected\n", architecture, kernel.name,
                  kernel.token_tiles, registers, found[1].str().c_str(), kernel.shared_bytes, blocks, expected);
      if (blocks < expected || found[1] != "0") failed = true;
    }
  }
  return failed ? 1 : 0;
}
