# Thread sanitizer: cmake -S . -B build-tsan -C cmake/tsan.cmake
# By clang, whose runtime knows the atomic operations that gcc 12's takes for races.
include(${CMAKE_CURRENT_LIST_DIR}/dev.cmake)
set(CMAKE_CXX_COMPILER clang++ CACHE STRING "")
set(CMAKE_BUILD_TYPE Debug CACHE STRING "" FORCE)
set(CMAKE_CXX_FLAGS_DEBUG "-O1 -g -fno-omit-frame-pointer -fsanitize=thread" CACHE STRING "")
set(QDYLORA_WERROR OFF CACHE BOOL "")  # instrumented code draws warnings of its own
set(QDYLORA_BUILD_BENCHMARKS OFF CACHE BOOL "")
