# What the library needs: installed packages first, downloads only when asked for with QDYLORA_FETCH_DEPENDENCIES.
# Every dependency is headers alone and becomes an imported target, so that compilers treat it as a system header.

# qdylora_dependency(PACKAGE TARGET REPOSITORY TAG INCLUDE_FOLDER): finds PACKAGE, or fetches it, to provide TARGET. A target that
# the including project has made already is taken as it is. Leaves TARGET undefined where the package is not to be had.
function(qdylora_dependency package target repository tag include_folder)
  if(NOT TARGET ${target})
    find_package(${package} QUIET)
  endif()
  if(NOT TARGET ${target} AND QDYLORA_FETCH_DEPENDENCIES)
    include(FetchContent)
    string(TOLOWER qdylora_${package} name)
    # A SOURCE_SUBDIR without CMakeLists.txt: the files are fetched, the package's own project is not configured.
    FetchContent_Declare(${name} GIT_REPOSITORY ${repository} GIT_TAG ${tag} GIT_SHALLOW ON SOURCE_SUBDIR none)
    FetchContent_MakeAvailable(${name})
    add_library(${target} INTERFACE IMPORTED GLOBAL)
    target_include_directories(${target} INTERFACE ${${name}_SOURCE_DIR}/${include_folder})
  endif()
  # The version file of a package sets these in this scope; callers look at them.
  set(${package}_VERSION "${${package}_VERSION}" PARENT_SCOPE)
  set(${package}_DIR "${${package}_DIR}" PARENT_SCOPE)
endfunction()

find_package(Threads REQUIRED)

# Asked for without a version: Eigen 5 declares itself incompatible with every request for 3.x, and serves as well.
qdylora_dependency(Eigen3 Eigen3::Eigen https://gitlab.com/libeigen/eigen.git 3.4.0 .)
if(NOT TARGET Eigen3::Eigen)
  message(FATAL_ERROR "qdylora needs Eigen 3.4 or later. Install it (Debian, Ubuntu: libeigen3-dev), name its folder in "
                      "CMAKE_PREFIX_PATH, or pass -D QDYLORA_FETCH_DEPENDENCIES=ON")
elseif(Eigen3_VERSION AND Eigen3_VERSION VERSION_LESS 3.4)
  message(FATAL_ERROR "qdylora needs Eigen 3.4 or later, found ${Eigen3_VERSION} in ${Eigen3_DIR}")
endif()

qdylora_dependency(nlohmann_json nlohmann_json::nlohmann_json https://github.com/nlohmann/json.git v3.11.2 include)
