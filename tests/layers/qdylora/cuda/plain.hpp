// expect: device code stands in cuda/*.cuh alone
#pragma once

#include <cuda_runtime.h>
