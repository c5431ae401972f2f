"""Every Triton kernel compiles ahead of time for sm_80, sm_90 and sm_100 without spilling registers, as recorded."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pairwise import ALL_CASES
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import JITFunction

from benchmarks import triton_compile

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks" / "results" / "triton-compile.json"
OPERATIONS = ("moments", "quantize", "quantize_dynamic", "dequantize", "rotate", "linear")


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text())


def test_every_kernel_is_in_the_record_for_every_target(record):
    kernels = {
        name
        for operation in OPERATIONS
        for name, value in vars(importlib.import_module(f"la_aciq.kernels.{operation}")).items()
        if isinstance(value, JITFunction | InterpretedFunction) and name.endswith("_kernel")
    }
    assert len(kernels) >= 10
    for target in ("sm_80", "sm_90", "sm_100"):
        assert {row["kernel"] for row in record["kernels"] if row["target"] == target} == kernels


def test_no_kernel_in_the_record_spills_and_streams_load_16_bytes(record):
    for row in record["kernels"]:
        assert row["spills"] == 0, row
        if "groups of 64" in row["case"] and not row["case"].startswith("dequantize"):
            assert row["load_bytes"] == 16, row


def test_linear_runs_on_tensor_cores(record):
    for row in record["kernels"]:
        if row["kernel"] == "linear_kernel" and "float32" not in row["case"]:
            integers = "INT" in row["case"]
            assert row["tensor_core"], row
            assert ("s32.s8" in row["tensor_core"]) == integers, row


@pytest.mark.parametrize("target", (80, 90, 100) if ALL_CASES else (90,))
def test_the_kernels_compile_to_what_is_recorded(tmp_path, target):
    """In a process of its own: this one may interpret kernels instead."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "benchmarks.triton_compile", "--check", "--target", str(target), "--jobs", "2"]
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_changes_and_spills_are_noticed(record):
    rows = [row for row in record["kernels"] if row["target"] == "sm_90"]
    assert triton_compile.complaints(record | {"kernels": rows}, record, [90]) == []
    changed = [{**rows[0], "registers": 1}, *rows[1:]]
    (message,) = triton_compile.complaints(record | {"kernels": changed}, record, [90])
    assert "1 rows changed" in message
    spilling = [{**rows[0], "spills": 3}, *rows[1:]]
    assert "3 spill instructions" in triton_compile.complaints(record | {"kernels": spilling}, record, [90])[0]
