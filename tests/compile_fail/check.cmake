# Passes if COMPILER refuses SOURCE and its message has every phrase that SOURCE expects: lines "// expect: phrase", or for one
# compiler alone "// expect-gcc: phrase" and "// expect-clang: phrase". The phrases are what a user reads, so a change
# of them is a change of the interface.
cmake_minimum_required(VERSION 3.22)
file(READ ${SOURCE} text)
string(TOLOWER "${COMPILER_ID}" compiler)
string(REPLACE "gnu" "gcc" compiler "${compiler}")
string(REGEX REPLACE "^.*clang$" "clang" compiler "${compiler}")
string(REPLACE ";" "<semicolon>" text "${text}")
string(REGEX MATCHALL "// expect(-${compiler})?: [^\n]*" phrases "${text}")
if(NOT phrases)
  message(FATAL_ERROR "${SOURCE} has no '// expect: phrase'")
endif()

set(ENV{LC_ALL} C)  # the compiler's own words, plain quotes
execute_process(COMMAND ${COMPILER} -std=c++20 ${FLAGS} -fsyntax-only ${SOURCE}
                OUTPUT_VARIABLE output ERROR_VARIABLE output RESULT_VARIABLE result)
if(result EQUAL 0)
  message(FATAL_ERROR "${SOURCE} compiles, and must not")
endif()
foreach(phrase IN LISTS phrases)
  string(REGEX REPLACE "^// expect[^:]*: " "" phrase "${phrase}")
  string(REPLACE "<semicolon>" ";" phrase "${phrase}")
  string(FIND "${output}" "${phrase}" place)
  if(place EQUAL -1)
    message(FATAL_ERROR "the compiler does not say '${phrase}', but:\n${output}")
  endif()
endforeach()
