# Uses the library as a program elsewhere would, in a folder of its own, and runs that program.
#   WAY      find_package: installed first, found by CMake; add_subdirectory: a folder of the program's project;
#            copied_headers: a copy of include/ and one call of the compiler
cmake_minimum_required(VERSION 3.22)
set(here ${CMAKE_CURRENT_LIST_DIR})
set(work ${BINARY}/tests/consumer/${WAY})
file(REMOVE_RECURSE ${work})
file(MAKE_DIRECTORY ${work})

function(run)
  execute_process(COMMAND ${ARGN} RESULT_VARIABLE result)
  if(NOT result EQUAL 0)
    list(JOIN ARGN " " command)
    message(FATAL_ERROR "${command}: ${result}")
  endif()
endfunction()

if(WAY STREQUAL copied_headers)
  file(COPY ${SOURCE}/include/qdylora DESTINATION ${work}/include)
  run(${COMPILER} -std=c++20 -O1 -I${work}/include ${FLAGS} ${here}/main.cpp -o ${work}/program -pthread)
else()
  set(arguments -D CMAKE_BUILD_TYPE=Release)
  if(WAY STREQUAL find_package)
    run(${CMAKE_COMMAND} --install ${BINARY} --prefix ${work}/installed --config Release)
    list(PREPEND PREFIX_PATH ${work}/installed)
  else()
    list(APPEND arguments -D QDYLORA_SOURCE=${SOURCE})
  endif()
  run(${CMAKE_COMMAND} -S ${here}/${WAY} -B ${work}/build -G ${GENERATOR} -D CMAKE_CXX_COMPILER=${COMPILER}
      -D "CMAKE_PREFIX_PATH=${PREFIX_PATH}" ${arguments})
  run(${CMAKE_COMMAND} --build ${work}/build --config Release)
  file(COPY_FILE ${work}/build/program ${work}/program)
endif()
run(${work}/program)
