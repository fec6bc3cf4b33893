# Installs the headers and the package files that make find_package(qdylora) work. Each component has an export of its own, so that
# a program that needs no JSON can use the library on a machine that has none.
include(CMakePackageConfigHelpers)
set(package_folder ${CMAKE_INSTALL_LIBDIR}/cmake/qdylora)

install(DIRECTORY include/qdylora DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
        FILES_MATCHING PATTERN "*.hpp" PATTERN "*.cuh" PATTERN "*.inc")
install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR})

foreach(component IN LISTS qdylora_components)
  set(target qdylora_${component})
  if(component STREQUAL qdylora)
    set(target qdylora)
  endif()
  install(TARGETS ${target} EXPORT qdylora-${component})
  install(EXPORT qdylora-${component} NAMESPACE qdylora:: DESTINATION ${package_folder})
endforeach()

configure_package_config_file(cmake/qdylora-config.cmake.in ${PROJECT_BINARY_DIR}/qdylora-config.cmake
                              INSTALL_DESTINATION ${package_folder} NO_SET_AND_CHECK_MACRO)
# Before 1.0, a minor version may change the interface.
write_basic_package_version_file(${PROJECT_BINARY_DIR}/qdylora-config-version.cmake COMPATIBILITY SameMinorVersion ARCH_INDEPENDENT)
install(FILES ${PROJECT_BINARY_DIR}/qdylora-config.cmake ${PROJECT_BINARY_DIR}/qdylora-config-version.cmake
        DESTINATION ${package_folder})
