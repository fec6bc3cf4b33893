#!/usr/bin/env bash
# Everything that needs a GPU, in one go:  bash bench/gpu/run.sh [options]
#   builds the device's tests and the benchmark for this GPU alone, runs the tests (ctest -R '^device: '), times ceilings, products and layers beside
#   cuBLAS and bitsandbytes, writes bench/results/gpu-<name>.json and .md, and looks at small shapes with compute-sanitizer where it is installed.
#   Meant to take 8 minutes on an H100 with 16 processors. A step that fails is named in the end and in the exit status; the others go on.
#   --quick       two shapes, few tokens
#   --name NAME   of the results; else made of the GPU's name
#   --out FOLDER  where they go, measurements as they are made and logs too (bench/results; those into BUILD_DIR)
#   --seconds N   for everything: what is left of them is a step's limit
#   --fetch       only gather, in build/gpu-peers, what a machine with nvcc and CMake but without a network lacks: bitsandbytes' library, from
#                 PyPI, with its Python package, and the headers of Eigen, nlohmann/json and Catch2 from their Debian packages here
#   --no-build, --no-tests, --no-sanitizer, --no-bench, --no-report   leave that step out
# Environment: BUILD_DIR (build/gpu), JOBS, ARCHITECTURES (of the GPU at hand, else 90a), BITSANDBYTES, a libbitsandbytes_cuda*.so (else one
#   in build/gpu-peers; without any, ours is beside cuBLAS alone), PEER_PYTHON, an interpreter with torch, bitsandbytes, peft and transformers
#   (else python3: where it lacks them, PEFT + bitsandbytes are left out).
# Then a training step of Falcon-40b's shape under a cap of 32 GiB: batch 4, and batch 8 with moments in 8 bits; and of 4 of its blocks
# beside PEFT + bitsandbytes.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
peers=$root/build/gpu-peers
build=$(realpath -m "${BUILD_DIR:-$root/build/gpu}")
jobs=${JOBS:-$(nproc)}
out='' name='' quick='' seconds=86400
build_it=yes tests=yes sanitizer=yes bench=yes report=yes
wheel=bitsandbytes==0.50.2
peer_python=${PEER_PYTHON:-python3}

while (($# > 0)); do
  case $1 in
    --quick) quick=--quick ;;
    --name) name=$2; shift ;;
    --out) out=$(realpath -m "$2"); shift ;;
    --seconds) seconds=$2; shift ;;
    --fetch)
      mkdir -p "$peers"
      python3 -m pip download -q --no-deps --only-binary :all: -d "$peers" "$wheel"
      python3 - "$peers" <<'PYTHON'
import pathlib, sys, zipfile
folder = pathlib.Path(sys.argv[1])
for wheel in folder.glob("bitsandbytes-*.whl"):
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            if not name.endswith(".so") or "libbitsandbytes_cuda130" in name:
                files.extract(name, folder / "python")
    wheel.unlink()
PYTHON
      for package in libeigen3-dev nlohmann-json3-dev catch2; do
        { dpkg -L "$package" 2>/dev/null || true; } | { grep -E '^/usr/(include|(share|lib)/.*cmake)/|[.]a$' || true; } | while read -r file; do
          [[ -f $file ]] && install -D -m 644 "$file" "$peers$file"
        done
      done
      du -sh "$peers"
      exit 0 ;;
    --no-build) build_it=no ;;
    --no-tests) tests=no ;;
    --no-sanitizer) sanitizer=no ;;
    --no-bench) bench=no ;;
    --no-report) report=no ;;
    --help | -h) sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}"; exit 0 ;;
    *) echo "unknown option $1; --help lists them" >&2; exit 2 ;;
  esac
  shift
done

logs=${out:-$build}
cells=$logs/cells.jsonl
out=${out:-$root/bench/results}

# What compute-sanitizer looks at: a case or two of every family of kernels, of those that leave cuBLASLt's alone, of which it would look at all.
small_shapes='an adapter rides*,few tokens with 4-bit*,tiles of tokens*,attention on*,attention of one*,heads of every*,zeros*,codes at an odd*'
small_shapes+=',a product of a warpgroup*,tiles of warpgroups*,moments in the host*,the squares of*'

say() { printf '\n== %s  (%d s)\n' "$*" "$SECONDS"; }
PATH=$PATH:/usr/local/cuda/bin
mkdir -p "$logs"
# What the benchmark and bitsandbytes' library load: the toolkit's, else those that came with torch. PyTorch itself finds its own.
libraries=/usr/local/cuda/lib64
for folder in $("$peer_python" -c 'import glob, sysconfig; print(*glob.glob(sysconfig.get_paths()["purelib"] + "/nvidia/*/lib"))' || true); do
  libraries+=:$folder
done
with_libraries=(env LD_LIBRARY_PATH="$libraries${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}")
[[ ! -d $peers/python ]] || export PYTHONPATH=$peers/python${PYTHONPATH:+:$PYTHONPATH}
library=${BITSANDBYTES:-}
if [[ -z $library ]]; then  # the newest that the toolkit's runtime can load
  library=$(find "$peers" -name 'libbitsandbytes_cuda13*.so' 2>/dev/null | sort | head -n 1 || true)
fi
[[ -n $library ]] || echo "no bitsandbytes here (bash bench/gpu/run.sh --fetch, or BITSANDBYTES): ours is beside cuBLAS alone"

failed=()
# try MOST_SECONDS NAME COMMAND...   a step that may fail, and may hang
try() {
  local most=$1 name=$2 status=0 left=$((seconds - SECONDS))
  shift 2
  if ((left < 10)); then
    failed+=("$name (no time is left)")
    return 124
  fi
  ((most < left)) || most=$((left - 5))
  timeout --kill-after=5 "$most" "$@" || status=$?
  ((status == 0)) || failed+=("$name (exit $status)")
  return "$status"
}

if [[ $build_it == yes ]]; then
  say "building in $build"
  generator=()
  command -v ninja >/dev/null && generator=(-G Ninja)
  architecture=${ARCHITECTURES:-}
  if [[ -z $architecture ]]; then
    architecture=$({ nvidia-smi --query-gpu=compute_cap --format=csv,noheader || true; } 2>/dev/null | head -n 1 | tr -d .)
    [[ ${architecture:-90} == 90 ]] && architecture=90a  # also where nothing is found: compiled, to be run elsewhere
  fi
  cmake -S "$root" -B "$build" "${generator[@]}" -D CMAKE_BUILD_TYPE=Release -D QDYLORA_CUDA=ON -D QDYLORA_BUILD_EXAMPLES=OFF \
    -D CMAKE_CUDA_COMPILER="$(command -v nvcc)" -D CMAKE_CUDA_ARCHITECTURES="$architecture-real" -D CMAKE_PREFIX_PATH="$peers/usr"
  cmake --build "$build" --parallel "$jobs" --target gpu_bench falcon_step
  # The tests take as long again; where they do not compile there are still measurements.
  [[ $tests$sanitizer == nono ]] || try 1800 "building the tests" cmake --build "$build" --parallel "$jobs" --target test_device ||
    tests=no sanitizer=no
fi

if [[ $tests == yes ]]; then
  say "tests on the device"
  try 240 tests "${with_libraries[@]}" ctest --test-dir "$build" -R '^device: ' --parallel 6 --output-on-failure || true
fi

if [[ $bench == yes ]]; then
  say "ceilings, products, layers"
  # A process each: what brings the device down takes no other cells along.
  : >"$cells"
  declare -A seconds_of=([ceilings]=30 [products]=240 [adapters]=60 [layers]=60 [kernels]=60)
  for part in ceilings products adapters layers kernels; do
    status=0
    one=("${with_libraries[@]}" "$build/bench/gpu_bench" $quick --only "$part")
    try "${seconds_of[$part]}" "gpu_bench, $part" "${one[@]}" ${library:+--bitsandbytes "$library"} >"$cells.part" || status=$?
    if ((status == 77)); then
      rm "$cells.part"
      echo "there is no GPU here: nothing was timed"
      exit 0
    fi
    # Where the peer brings it down, ours beside cuBLAS alone; not where it ran out of time.
    if ((status != 0 && status != 3 && status != 124 && status != 137)) && [[ $part == products && -n $library ]]; then
      try 120 "gpu_bench, products beside cuBLAS alone" "${one[@]}" >"$cells.part" || true
    fi
    cat "$cells.part" >>"$cells"
    rm "$cells.part"
  done
  say "a step of Falcon-40b's shape"
  for case in "--batch 4 --moments 32" "--batch 8 --moments 8" "--batch 16 --moments 8 --offload 1"; do
    try 120 "falcon_step $case" "${with_libraries[@]}" "$build/bench/falcon_step" ${quick:+--layers 2} $case >>"$cells" ||
      echo "{\"falcon_step_failed\": \"$case\"}" | tee -a "$cells"
  done
  if "$peer_python" -c 'import torch, bitsandbytes, peft, transformers
assert torch.cuda.is_available()
assert bitsandbytes.cextension.lib.compiled_with_cuda' 2>"$logs/peers.log"; then
    say "PEFT + bitsandbytes"
    try 120 "PEFT's layers" "$peer_python" "$here/peers.py" layers ${quick:+--shapes 4096x4096,11008x4096 --tokens 256} >>"$cells" || true
    try 60 "four blocks" "${with_libraries[@]}" "$build/bench/falcon_step" --layers 4 --moments 8 --rank 64 >>"$cells" || true
    try 120 "PEFT's step" "$peer_python" "$here/peers.py" step >>"$cells" || true
  else
    tail -n 1 "$logs/peers.log"
    echo "$peer_python has no torch for this GPU, bitsandbytes, peft and transformers: PEFT + bitsandbytes are left out"
  fi
fi

if [[ $report == yes ]]; then
  say "report"
  try 60 report python3 "$here/report.py" "$cells" --out "$out" ${name:+--name "$name"} ${library:+--bitsandbytes "$(basename "$library")"} || true
fi

if [[ $sanitizer == yes ]]; then
  if command -v compute-sanitizer >/dev/null; then
    for tool in memcheck racecheck; do
      say "compute-sanitizer, $tool"
      try 180 "$tool" "${with_libraries[@]}" compute-sanitizer --tool "$tool" --error-exitcode 1 "$build/tests/test_device" \
        "$small_shapes" >"$logs/$tool.log" || true
      tail -n 5 "$logs/$tool.log"
    done
  else
    echo "compute-sanitizer is not installed: its step is left out"
  fi
fi
say "done"
for step in "${failed[@]}"; do echo "failed: $step"; done
((${#failed[@]} == 0))
