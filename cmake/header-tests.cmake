# Tests of the headers as files: each one compiles by itself, all front doors live together in two translation units of one program,
# none of them leads a plain C++ compiler to CUDA, and the includes keep to the layers.
file(GLOB_RECURSE headers CONFIGURE_DEPENDS RELATIVE ${PROJECT_SOURCE_DIR}/include ${PROJECT_SOURCE_DIR}/include/qdylora/*.hpp)
list(REMOVE_ITEM headers qdylora/cuda.hpp)
set(generated ${CMAKE_CURRENT_BINARY_DIR}/headers)

# Twice, so that a missing include guard shows as well.
set(sources "")
foreach(header IN LISTS headers)
  string(MAKE_C_IDENTIFIER ${header} name)
  file(CONFIGURE OUTPUT ${generated}/${name}.cpp CONTENT "#include <${header}>\n#include <${header}>\n" @ONLY)
  list(APPEND sources ${generated}/${name}.cpp)
endforeach()
add_library(test_headers OBJECT ${sources})
target_link_libraries(test_headers PRIVATE qdylora::io qdylora_warnings)
target_compile_options(test_headers PRIVATE -O0)  # nothing of it runs
set_target_properties(test_headers PROPERTIES UNITY_BUILD OFF)

set(doors "")
foreach(door IN ITEMS qdylora/qdylora.hpp qdylora/io.hpp qdylora/model.hpp)
  if(door IN_LIST headers)
    string(APPEND doors "#include <${door}>\n")
  endif()
endforeach()
file(CONFIGURE OUTPUT ${generated}/doors_first.cpp CONTENT "${doors}int second();\nint main() { return second(); }\n" @ONLY)
file(CONFIGURE OUTPUT ${generated}/doors_second.cpp CONTENT "${doors}int second();\nint second() { return 0; }\n" @ONLY)
add_executable(test_doors ${generated}/doors_first.cpp ${generated}/doors_second.cpp)
target_link_libraries(test_doors PRIVATE qdylora::io qdylora_warnings)
target_compile_options(test_doors PRIVATE -O0)
set_target_properties(test_doors PROPERTIES UNITY_BUILD OFF)
add_test(NAME "headers: two translation units link" COMMAND test_doors)

add_test(NAME "headers: the front doors lead to no CUDA file"
         COMMAND ${CMAKE_COMMAND} -D COMPILER=${CMAKE_CXX_COMPILER} -D "FLAGS=${plain_flags}" -D ROOT=${PROJECT_SOURCE_DIR}
                 -D SOURCE=${generated}/doors_first.cpp -P ${PROJECT_SOURCE_DIR}/cmake/check-no-cuda.cmake)
# Programs that include the library are compiled by both families of compilers, whichever one builds these tests.
set(every_header "")
foreach(header IN LISTS headers)
  string(APPEND every_header "#include <${header}>\n")
endforeach()
file(CONFIGURE OUTPUT ${generated}/every_header.cpp CONTENT "${every_header}" @ONLY)
if(CMAKE_CXX_COMPILER_ID STREQUAL GNU)
  find_program(QDYLORA_OTHER_COMPILER NAMES clang++ clang++-14 DOC "A compiler that the headers are checked with as well")
else()
  find_program(QDYLORA_OTHER_COMPILER NAMES g++ DOC "A compiler that the headers are checked with as well")
endif()
if(QDYLORA_OTHER_COMPILER)
  add_test(NAME "headers: the other compiler takes them"
           COMMAND ${QDYLORA_OTHER_COMPILER} -std=c++20 "${plain_flags}" -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Werror
                   -fsyntax-only ${generated}/every_header.cpp
           COMMAND_EXPAND_LISTS)
else()
  message(STATUS "qdylora: there is no second compiler here, so the headers are checked with one")
endif()

add_test(NAME "headers: includes keep to the layers"
         COMMAND ${CMAKE_COMMAND} -D ROOT=${PROJECT_SOURCE_DIR}/include/qdylora -P ${PROJECT_SOURCE_DIR}/cmake/check-layers.cmake)
add_test(NAME "headers: the layer check finds every kind of violation"
         COMMAND ${CMAKE_COMMAND} -P ${CMAKE_CURRENT_SOURCE_DIR}/layers/self-test.cmake)
