#pragma once

#include <cuda_runtime.h>

#include <qdylora/quant/good.hpp>

__global__ void kernel();
inline void launch() { kernel<<<1, 1>>>(); }
