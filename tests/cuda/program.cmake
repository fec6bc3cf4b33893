# Whether nvcc takes SOURCE, of a program or a test for a device: its front end is another than the CPU's compilers have. Host code is not
# compiled further, device code no further than to PTX.
#   NVCC, SOURCE, OUTPUT, FLAGS
if(NOT EXISTS "${NVCC}")
  message("SKIPPED: there is no nvcc here")
  return()
endif()
list(REMOVE_ITEM FLAGS -isystem)  # of no folder
list(TRANSFORM FLAGS REPLACE "^-isystem" "-isystem=")
execute_process(COMMAND ${NVCC} -std=c++20 --expt-relaxed-constexpr -Werror all-warnings -diag-suppress=1675,3189 -ptx -arch=sm_90a ${FLAGS}
                        -DEIGEN_NO_CUDA -o ${OUTPUT} ${SOURCE}
                OUTPUT_VARIABLE report ERROR_VARIABLE report RESULT_VARIABLE result)
file(REMOVE ${OUTPUT})
if(NOT result EQUAL 0)
  message(FATAL_ERROR "${report}")
endif()
