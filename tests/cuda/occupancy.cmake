# Compiles SOURCE for one architecture and has OCCUPANCY (occupancy.cpp) look at what its kernels take.
#   NVCC, OCCUPANCY, SOURCE, OUTPUT, ARCHITECTURE (90a), INCLUDE
if(NOT EXISTS "${NVCC}")
  message("SKIPPED: there is no nvcc here")
  return()
endif()
execute_process(COMMAND ${NVCC} -std=c++20 --expt-relaxed-constexpr -Xptxas -v -cubin -I${INCLUDE}
                        -gencode arch=compute_${ARCHITECTURE},code=sm_${ARCHITECTURE} -o ${OUTPUT} ${SOURCE}
                OUTPUT_FILE ${OUTPUT}.txt ERROR_FILE ${OUTPUT}.txt COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${OCCUPANCY} ${ARCHITECTURE} ${OUTPUT}.txt COMMAND_ERROR_IS_FATAL ANY)
