# qdylora_warnings: what this project's own tests, examples and benchmarks are compiled with. Users of the library never see it.
add_library(qdylora_warnings INTERFACE)
target_compile_options(qdylora_warnings INTERFACE -Wall -Wextra -Wpedantic -Wconversion -Wshadow
                                                  $<$<BOOL:${QDYLORA_WERROR}>:-Werror>)
# gcc 12 takes any "literal" + std::string for overlapping memory (its bug 105651, mended in 13).
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU AND CMAKE_CXX_COMPILER_VERSION VERSION_LESS 13)
  target_compile_options(qdylora_warnings INTERFACE -Wno-restrict)
endif()
