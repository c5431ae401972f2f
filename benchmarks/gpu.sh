#!/usr/bin/env bash
# On a machine with a CUDA device: builds with CUDA, runs the tests, the sanitizers and the benchmarks, in that order, and writes
# benchmarks/results/<device>.json. Needs no network: PyTorch built for CUDA, Triton, NumPy, pytest, pytest-benchmark,
# hypothesis, pybind11, setuptools and nvcc are there already. PYTHON chooses the interpreter.
#
#   benchmarks/gpu.sh                     all of it, in under ten minutes
#   benchmarks/gpu.sh build test          parts of it: build, test, sanitize, tune, bench; tune is not in all
#
# tune measures launch parameters of the Triton kernels into kernels/tuned.json; TUNE_SECONDS and BENCH_SECONDS are how long
# the two go on measuring. A part that needs a build makes one where there is none. A step that fails does not stop the later
# ones, so that one run shows all there is to see; the status is 1 if any did. A step's log and status are in $LOGS
# (build/gpu-logs) until it runs again, also for a later bench, which puts them in the result.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
PYTHON=${PYTHON:-python3}
LOGS=${LOGS:-build/gpu-logs}
TUNE_SECONDS=${TUNE_SECONDS:-200}
BENCH_SECONDS=${BENCH_SECONDS:-120}
LIBRARY="$PWD/build/gpu-lib"  # the package as it would be installed, without touching the environment
export PYTHON PYTHONPATH="$LIBRARY${PYTHONPATH:+:$PYTHONPATH}" PATH="$PATH:/usr/local/cuda/bin"
mkdir -p "$LOGS"
failed=()

step() { # step NAME SECONDS COMMAND...: runs it with a time limit, keeps its output and status, shows the end of it
  local name=$1 limit=$2 started=$SECONDS status
  shift 2
  echo "== $name"
  timeout -k 5 "$limit" "$@" >"$LOGS/$name.log" 2>&1
  status=$?
  echo "$status" >"$LOGS/$name.status"
  if ((status == 0)); then
    tail -n 3 "$LOGS/$name.log"
  else
    failed+=("$name")
    tail -n 25 "$LOGS/$name.log"
  fi
  echo "== $name took $((SECONDS - started)) s, status $status"
}

tests() { "$PYTHON" -m pytest "tests/$1" "--confcutdir=tests/$1" -m gpu -q -p no:cacheprovider "${@:2}"; }

sanitizer() { # sanitizer TOOL TESTS
  # Without PyTorch's cache every tensor is an allocation of its own, past whose end memcheck sees.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 "$PYTHON" -m pytest tests/cuda/test_operations.py \
    --confcutdir=tests/cuda -m gpu -q -p no:cacheprovider -k "$2"
}
export -f tests sanitizer

build() {
  rm -rf "$LIBRARY" "$LOGS"/*.status
  step build 150 env LA_ACIQ_BUILD=1 LA_ACIQ_CUDA=1 "$PYTHON" setup.py build --build-lib "$LIBRARY"
  # Without this the tests of a core that does not load would be skipped, and all would look well.
  step load 30 "$PYTHON" -c 'from la_aciq.ops.backends import why_unavailable as why
reasons = [why("cuda"), why("triton")]
print(reasons)
raise SystemExit(reasons != [None, None])'
}

parts=("$@")
((${#parts[@]})) || parts=(build test sanitize bench)
for part in "${parts[@]}"; do
  [[ $part =~ ^(build|test|sanitize|tune|bench)$ ]] || { echo "expected build, test, sanitize, tune or bench, got $part" >&2; exit 2; }
done
[[ ${parts[0]} == build || -d $LIBRARY/la_aciq ]] || build
for part in "${parts[@]}"; do
  case $part in
    build) build ;;
    test)
      step tests-cuda 80 bash -c 'tests cuda'
      step tests-triton 100 bash -c 'tests kernels'
      ;;
    sanitize)
      step memcheck 50 bash -c 'sanitizer memcheck "small_call or any_strides or zero_rows"'
      step racecheck 40 bash -c 'sanitizer racecheck small_call'
      ;;
    tune) step tune $((TUNE_SECONDS + 40)) "$PYTHON" -m benchmarks.tune_triton --seconds "$TUNE_SECONDS" ;;
    bench) step benchmarks $((BENCH_SECONDS + 20)) "$PYTHON" -m benchmarks.bench_gpu --seconds "$BENCH_SECONDS" --logs "$LOGS" ;;
  esac
done

if ((${#failed[@]})); then
  echo "failed: ${failed[*]} (logs in $LOGS)"
  exit 1
fi
