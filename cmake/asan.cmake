# Address and undefined-behaviour sanitizers: cmake -S . -B build-asan -C cmake/asan.cmake
include(${CMAKE_CURRENT_LIST_DIR}/dev.cmake)
set(CMAKE_BUILD_TYPE Debug CACHE STRING "" FORCE)
set(CMAKE_CXX_FLAGS_DEBUG "-O1 -g -fno-omit-frame-pointer -fsanitize=address,undefined -fno-sanitize-recover=all" CACHE STRING "")
set(QDYLORA_WERROR OFF CACHE BOOL "")  # instrumented code draws warnings of its own
set(QDYLORA_BUILD_BENCHMARKS OFF CACHE BOOL "")
