# Counts the instructions in the main loops of fused_products.cu's kernels, as the GPU executes them: whether a fused product keeps up with
# memory is decided there. Fails above the limits below, or where a loop touches local memory, or a decoded slab is not stored in whole words.
#   NVCC, CUOBJDUMP, SOURCE, OUTPUT, INCLUDE
cmake_minimum_required(VERSION 3.22)
if(NOT EXISTS "${NVCC}" OR NOT EXISTS "${CUOBJDUMP}")
  message("SKIPPED: this needs nvcc and cuobjdump")
  return()
endif()

# Of a kernel: a part of its name, weights that a lane decodes in one round of its loop, most instructions in 1000 weights, most registers.
# Two blocks of 256 threads fit into a processor's registers at 128, one at 255; of 128 threads, three at 168 and two at 255. To keep up
# with 3 TB/s of an H100, a kernel that only decodes may take 5100 instructions; Tiles multiply each weight with 32 or 64 tokens, which keeps
# tensor cores busy for longer, and CodedTiles load scales in every fourth round alone, which is counted as if it were in all. WarpgroupTiles'
# products of 64 (128) tokens take tensor cores 8000 (16000) cycles for 1000 weights of each lane of eight warps, two a scheduler.
set(limits "SmallBatch.*Li1E=128=2600=128" "SmallBatch.*Li2E=128=3000=128" "SmallBatch.*Li4E=128=3700=255"
           "CodedTiles.*Li4E=64=4900=168" "CodedTiles.*Li8E=64=6300=255" "WarpgroupTiles.*Li8E=128=5100=255" "WarpgroupTiles.*Li16E=128=6200=255")

set(architecture 90a)
execute_process(COMMAND ${NVCC} -std=c++20 --expt-relaxed-constexpr -cubin -I${INCLUDE} -o ${OUTPUT} ${SOURCE} -Xptxas -v
                        -gencode arch=compute_${architecture},code=sm_${architecture}
                OUTPUT_VARIABLE report ERROR_VARIABLE report COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${CUOBJDUMP} -sass ${OUTPUT} OUTPUT_VARIABLE sass COMMAND_ERROR_IS_FATAL ANY)
# In a list, brackets and semicolons have a meaning of their own.
string(REGEX REPLACE "[][]" "|" sass "${sass}")
string(REPLACE ";" "" sass "${sass}")
string(REPLACE "Function : " ";" functions "${sass}")
string(REPLACE ";" "" report "${report}")
string(REPLACE "Compiling entry function" ";" compiled "${report}")

set(failures "")
foreach(limit IN LISTS limits)
  string(REPLACE "=" ";" limit "${limit}")
  list(GET limit 0 kernel)
  list(GET limit 1 weights)
  list(GET limit 2 most_instructions)
  list(GET limit 3 most_registers)
  set(loop_size 0)
  foreach(function IN LISTS functions)
    if(NOT function MATCHES "^[^\n]*${kernel}")
      continue()
    endif()
    string(REGEX MATCHALL "/\\*[0-9a-f][0-9a-f][0-9a-f][0-9a-f]+\\*/ +[^\n/]*" instructions "${function}")
    foreach(instruction IN LISTS instructions)  # a jump backwards closes a loop; an instruction takes 16 bytes
      if(NOT instruction MATCHES "^/\\*([0-9a-f]+)\\*/.* BRA[^\n]* 0x([0-9a-f]+)")
        continue()
      endif()
      math(EXPR end "0x${CMAKE_MATCH_1} / 16")
      math(EXPR begin "0x${CMAKE_MATCH_2} / 16")
      math(EXPR size "${end} - ${begin} + 1")
      if(begin GREATER_EQUAL end OR (loop_size GREATER 0 AND size GREATER_EQUAL loop_size))
        continue()
      endif()
      list(SUBLIST instructions ${begin} ${size} body)
      if(body MATCHES " HG?MMA")
        set(loop_size ${size})
        set(loop "${body}")
      endif()
    endforeach()
  endforeach()
  if(loop_size EQUAL 0)
    list(APPEND failures "${kernel}: no loop with tensor cores")
    continue()
  endif()
  math(EXPR rate "1000 * ${loop_size} / ${weights}")
  foreach(entry IN LISTS compiled)
    if(entry MATCHES "${kernel}" AND entry MATCHES "Used ([0-9]+) registers")
      set(registers ${CMAKE_MATCH_1})
    endif()
  endforeach()
  message("${kernel}: ${rate} instructions in 1000 weights, ${most_instructions} at most; ${registers} registers, ${most_registers} at most")
  if(rate GREATER most_instructions OR NOT registers LESS_EQUAL most_registers)
    list(APPEND failures "${kernel}: ${rate} instructions in 1000 weights, ${registers} registers")
  endif()
  if(loop MATCHES " (LDL|STL)")
    list(APPEND failures "${kernel}: its loop touches local memory")
  endif()
endforeach()
foreach(function IN LISTS functions)  # what a lane has decoded leaves it at once
  if(function MATCHES "^[^\n]*DequantizeWords" AND (NOT function MATCHES " STG\\.E\\.128" OR function MATCHES " STG\\.E[^.\n]*desc"))
    list(APPEND failures "DequantizeWords: stores of less than 16 bytes")
  endif()
endforeach()
if(failures)
  message(FATAL_ERROR "${failures}")
endif()
