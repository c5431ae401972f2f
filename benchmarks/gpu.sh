#!/usr/bin/env bash
# On a machine with a CUDA device: builds with CUDA, runs the tests, the sanitizers and the benchmarks, in that order, and writes
# benchmarks/results/<device>.json. Needs no network: PyTorch built for CUDA, Triton, NumPy, SciPy, pytest, pytest-benchmark,
# pybind11, setuptools and nvcc are there already. PYTHON chooses the interpreter.
#
# A step that fails does not stop the later ones, so that one run shows all there is to see; the status is 1 if any did.
set -uo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
LOGS=${LOGS:-build/gpu-logs}
mkdir -p "$LOGS"
LIBRARY="$PWD/build/gpu-lib"  # the package as it would be installed, without touching the environment
export PYTHONPATH="$LIBRARY${PYTHONPATH:+:$PYTHONPATH}"
failed=()

step() { # step NAME SECONDS COMMAND...: runs it with a time limit, keeps its output, shows the end of it
  local name=$1 limit=$2 started=$SECONDS
  shift 2
  echo "== $name"
  if timeout -k 5 "$limit" "$@" >"$LOGS/$name.log" 2>&1; then
    tail -n 3 "$LOGS/$name.log"
  else
    failed+=("$name")
    tail -n 25 "$LOGS/$name.log"
  fi
  echo "== $name took $((SECONDS - started)) s"
}

tests() { "$PYTHON" -m pytest "tests/$1" "--confcutdir=tests/$1" -m gpu -q -p no:cacheprovider "${@:2}"; }

sanitizer() { # sanitizer TOOL TESTS
  # Without PyTorch's cache every tensor is an allocation of its own, past whose end memcheck sees.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$1" --error-exitcode 1 "$PYTHON" -m pytest tests/cuda/test_operations.py \
    --confcutdir=tests/cuda -m gpu -q -p no:cacheprovider -k "$2"
}
export -f tests sanitizer
export PYTHON

step build 150 env LA_ACIQ_BUILD=1 LA_ACIQ_CUDA=1 "$PYTHON" setup.py build --build-lib "$LIBRARY"
# Without this the tests of a core that does not load would be skipped, and all would look well.
step load 30 "$PYTHON" -c 'from la_aciq.backends import why_unavailable as why
reasons = [why("cuda"), why("triton")]
print(reasons)
raise SystemExit(reasons != [None, None])'
step tests-cuda 80 bash -c 'tests cuda'
step tests-triton 100 bash -c 'tests kernels'
step memcheck 50 bash -c 'sanitizer memcheck "not 28672 and not any_shape"'
step racecheck 40 bash -c 'sanitizer racecheck "tail_sums or rotate or quantize_dynamic or moments_by_language or linear"'
step benchmarks 140 "$PYTHON" -m benchmarks.bench_gpu --logs "$LOGS"

if ((${#failed[@]})); then
  echo "failed: ${failed[*]} (logs in $LOGS)"
  exit 1
fi
