"""What a compiler says of the CUDA sources, where there is one; no device needed."""

import json
import shutil
import subprocess
import sysconfig
from pathlib import Path

import emulated
import pytest
from torch.utils import cpp_extension

from benchmarks import cuda_compile

NVCC = shutil.which("nvcc")
RECORD = json.loads(cuda_compile.RESULTS.read_text())


def test_the_record_has_no_spills():
    assert {kernel["target"] for kernel in RECORD["kernels"]} == {80, 90, 100}
    assert not [kernel for kernel in RECORD["kernels"] if kernel["spill_bytes"] or kernel["stack_bytes"]]


def test_the_record_is_checked():
    spilling = {"nvcc": "0", "kernels": [{"kernel": "k", "target": 80, "spill_bytes": 4, "stack_bytes": 8}]}
    assert len(cuda_compile.problems(spilling, spilling)) == 1
    assert cuda_compile.problems(RECORD, RECORD) == []
    assert len(cuda_compile.problems(RECORD, {**RECORD, "kernels": RECORD["kernels"][1:]})) == 1


@pytest.mark.skipif(NVCC is None, reason="no nvcc")
def test_kernels_compile_for_every_target_without_spills():
    assert cuda_compile.problems(cuda_compile.measure(), RECORD) == []


@pytest.mark.skipif(NVCC is None, reason="no nvcc, and so no CUDA headers")
def test_operations_compile_against_the_headers_of_pytorch_and_cuda(tmp_path):
    """A PyTorch without CUDA has all headers but one, which says how its CUDA library was built."""
    (tmp_path / "c10" / "cuda" / "impl").mkdir(parents=True)
    (tmp_path / "c10" / "cuda" / "impl" / "cuda_cmake_macros.h").write_text("#define C10_CUDA_BUILD_SHARED_LIBS\n")
    probe = tmp_path / "probe.cu"
    probe.write_text("#include <cuda_runtime_api.h>\n")
    listing = subprocess.run([NVCC, "-M", str(probe)], capture_output=True, text=True, check=True).stdout
    headers = next(word for word in listing.split() if word.endswith("/cuda_runtime_api.h"))
    command = [emulated.compiler(), "-std=c++20", "-fsyntax-only", "-Wall", "-Werror", "-Wno-unknown-pragmas"]
    command += [f"-I{emulated.CSRC}", f"-isystem{Path(headers).parent}", f"-isystem{sysconfig.get_path('include')}"]
    command += [f"-isystem{path}" for path in cpp_extension.include_paths()]
    emulated.run([*command, "-idirafter", str(tmp_path), str(emulated.CSRC / "cuda" / "ops.cpp")])
