# Compiles SOURCE with nvcc for one architecture. Fails on a warning, and where a kernel spills registers to memory or has products of
# warpgroups wait for each other.
#   NVCC, SOURCE, OUTPUT, ARCHITECTURE (90a), INCLUDE
if(NOT EXISTS "${NVCC}")
  message("SKIPPED: there is no nvcc here")
  return()
endif()
execute_process(COMMAND ${NVCC} -std=c++20 --expt-relaxed-constexpr -Werror all-warnings -Xptxas -v -cubin -I${INCLUDE}
                        -gencode arch=compute_${ARCHITECTURE},code=sm_${ARCHITECTURE} -o ${OUTPUT} ${SOURCE}
                OUTPUT_VARIABLE report ERROR_VARIABLE report RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "${report}")
endif()
string(REGEX MATCHALL "Compiling entry function" kernels "${report}")
string(REGEX MATCHALL "Compiling entry function '[^']*'[^\n]*\n[^\n]*\n[^\n]*[1-9][0-9]* bytes spill stores" spills "${report}")
list(LENGTH kernels count)
if(count EQUAL 0 OR spills)
  message(FATAL_ERROR "${count} kernels; registers are spilled in:\n${spills}")
endif()
if(report MATCHES "(\\(C75[^\n]*)")
  message(FATAL_ERROR "${CMAKE_MATCH_1}")
endif()
string(REGEX MATCHALL "Used [0-9]+ registers" used "${report}")
list(SORT used COMPARE NATURAL ORDER DESCENDING)
list(GET used 0 most)
message("sm_${ARCHITECTURE}: ${count} kernels without a spill; the largest: ${most}")
