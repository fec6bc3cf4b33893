# Run after a test program is linked: writes a ctest script with one entry for each of its test cases. Catch2's own
# catch_discover_tests takes a test case whose name holds a semicolon or bracket for another one, or none, and lets it pass.
#   PROGRAM   the test program          ROOM     prefix of the entries
#   OUTPUT    the script to write       MAJOR    Catch2's major version
#   LABEL     of the entries            SKIP     regular expression for the output of one that was skipped
#   SECONDS   that one may take
if(MAJOR EQUAL 2)
  set(list_names --list-test-names-only)
  set(run_options "-w NoTests")  # a name that matches no test case is a failure; version 3 needs no telling
else()
  set(list_names --list-tests --verbosity quiet)
  set(run_options "")
endif()

# Version 2 exits with the number of test cases, so that only a result which is not a number is a crash.
execute_process(COMMAND ${PROGRAM} ${list_names} OUTPUT_VARIABLE names ERROR_VARIABLE errors RESULT_VARIABLE result)
string(STRIP "${names}" names)
if(NOT result MATCHES "^[0-9]+$" OR names STREQUAL "")
  message(FATAL_ERROR "${PROGRAM} could not list its test cases: ${result}\n${names}\n${errors}")
endif()

set(script "")
string(REPLACE "[" "<open>" names "${names}")  # CMake does not split a list inside brackets
string(REPLACE "]" "<close>" names "${names}")
string(REPLACE ";" "<semicolon>" names "${names}")
string(REGEX REPLACE "[\r\n]+" ";" names "${names}")
foreach(name IN LISTS names)
  string(REPLACE "<open>" "[" name "${name}")
  string(REPLACE "<close>" "]" name "${name}")
  string(REPLACE "<semicolon>" ";" name "${name}")
  string(STRIP "${name}" name)
  string(REGEX REPLACE "([][\\,*\"])" "\\\\\\1" pattern "${name}")  # the characters that mean something in a filter
  string(APPEND script "add_test([==[${ROOM}: ${name}]==] [==[${PROGRAM}]==] [==[${pattern}]==] ${run_options})\n"
         "set_tests_properties([==[${ROOM}: ${name}]==] PROPERTIES TIMEOUT ${SECONDS} LABELS ${LABEL} SKIP_REGULAR_EXPRESSION [==[${SKIP}]==])\n")
endforeach()
file(WRITE ${OUTPUT} "${script}")
