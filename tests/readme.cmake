# The program in README.md, compiled and run as it stands there.
set_property(DIRECTORY ${PROJECT_SOURCE_DIR} APPEND PROPERTY CMAKE_CONFIGURE_DEPENDS ${PROJECT_SOURCE_DIR}/README.md)
file(READ ${PROJECT_SOURCE_DIR}/README.md readme)
string(FIND "${readme}" "```cpp\n" begin)
string(SUBSTRING "${readme}" ${begin} -1 readme)
string(SUBSTRING "${readme}" 7 -1 readme)
string(FIND "${readme}" "```" end)
string(SUBSTRING "${readme}" 0 ${end} program)
file(CONFIGURE OUTPUT readme_program.cpp CONTENT "${program}" @ONLY)
add_executable(readme_program ${CMAKE_CURRENT_BINARY_DIR}/readme_program.cpp)
target_link_libraries(readme_program PRIVATE qdylora::io qdylora_warnings)
add_test(NAME "readme: its program" COMMAND readme_program)
# Rank 16 has learned the task when its loss is below 1; the base alone is above.
set_tests_properties("readme: its program" PROPERTIES PASS_REGULAR_EXPRESSION "rank 16: 0\\.[0-9]+")
