// expect: must not include <qdylora/cuda/good.cuh>
#pragma once

#include <qdylora/cuda/good.cuh>
