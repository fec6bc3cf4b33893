// expect: <qdylora/cuda.hpp> is for the CUDA compiler: include it in a .cu file that nvcc reads, or leave it out to stay on the CPU
#include <qdylora/cuda.hpp>
