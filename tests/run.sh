#!/usr/bin/env bash
# Installs what is missing, builds the tests and examples, and passes all tests:  bash tests/run.sh [--peers] [ctest's options]
#   --peers     installs what some tests compare with, 7 GB (PyTorch, transformers, PEFT, bitsandbytes, llama.cpp, MPI), some of it built from
#               source; a test that is then skipped for want of it fails the run
#   BUILD_DIR   where to build (build)        JOBS   how many things at once (one for each processor)
# It writes into the build folder alone.
set -euo pipefail
[[ -z ${BUILD_DIR:-} ]] || BUILD_DIR=$(realpath -m "$BUILD_DIR")
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source cmake/packages.sh

build=${BUILD_DIR:-build}
jobs=${JOBS:-$(nproc)}
peers=no
if [[ ${1-} == --peers ]]; then
  peers=yes
  shift
fi
export PYTHONDONTWRITEBYTECODE=1

install_missing g++:g++ cmake:cmake ninja:ninja-build python3:python3 \
  libeigen3-dev nlohmann-json3-dev libcli11-dev libdlpack-dev catch2 libbenchmark-dev

say "Configuring in $build"
options=(-C cmake/dev.cmake)
if [[ $peers == yes ]]; then
  install_missing libopenmpi-dev openmpi-bin
  BUILD_DIR=$build/peers bash bench/peers/run.sh --setup --only torch
  QDYLORA_PYTHON=$(realpath -s "$build/peers/venv/bin/python")
  export QDYLORA_PYTHON
  "$QDYLORA_PYTHON" -m pip install --quiet accelerate llama-cpp-python==0.3.36
  options+=(-D "QDYLORA_TORCH=$("$QDYLORA_PYTHON" -c 'import torch; print(torch.__path__[0])')")
fi
if [[ ! -f $build/CMakeCache.txt ]] && command -v ninja >/dev/null; then options+=(-G Ninja); fi
cmake -S . -B "$build" "${options[@]}" -D CMAKE_UNITY_BUILD=ON -D QDYLORA_BUILD_TESTS=ON -D QDYLORA_BUILD_EXAMPLES=ON -D QDYLORA_BUILD_BENCHMARKS=ON

say "Building with $jobs jobs"
cmake --build "$build" --parallel "$jobs"

say "Testing"
log=$build/ctest.log
result=0
ctest --test-dir "$build" --parallel "$jobs" --output-on-failure --no-tests=error "$@" 2>&1 | tee "$log" || result=$?

say "Summary"
skipped=$(grep -c '\*\*\*Skipped' "$log" || true)
echo "$skipped skipped: what they miss is in $build/Testing/Temporary/LastTest.log under SKIPPED"
if [[ $peers == yes ]] && grep -E 'SKIPPED.*no (Python with|MPI)' "$build/Testing/Temporary/LastTest.log"; then
  echo "--peers was given, and yet tests were skipped for want of one" >&2
  result=1
fi
grep -E 'tests passed, [0-9]+ tests failed' "$log" | tail -n 1 || echo "no tests ran"
exit "$result"
