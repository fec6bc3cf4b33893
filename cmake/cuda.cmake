# With the Cuda backend: cmake -S . -B build-cuda -C cmake/cuda.cmake
include(${CMAKE_CURRENT_LIST_DIR}/dev.cmake)
set(QDYLORA_CUDA ON CACHE BOOL "")
