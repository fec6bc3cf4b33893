# Fails if a plain C++ compiler, reading SOURCE, opens any file with "cuda" in its path (the path of the project itself aside).
execute_process(COMMAND ${COMPILER} -std=c++20 ${FLAGS} -M ${SOURCE}
                OUTPUT_VARIABLE rule ERROR_VARIABLE errors RESULT_VARIABLE result)
if(NOT result EQUAL 0)
  message(FATAL_ERROR "${COMPILER} -M ${SOURCE}: ${result}\n${errors}")
endif()
string(REPLACE "${ROOT}/" "" rule "${rule}")
string(TOLOWER "${rule}" rule)
string(REGEX REPLACE "^[^:]*:" "" rule "${rule}")
string(REGEX MATCHALL "[^ \r\n]*cuda[^ \r\n]*" found "${rule}")
if(found)
  list(JOIN found "\n  " found)
  message(FATAL_ERROR "a plain C++ build reads:\n  ${found}")
endif()
