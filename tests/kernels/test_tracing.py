"""torch.compile(fullgraph=True) sees each Triton operation as its kernels, with static and with dynamic shapes."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def graphs():
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("trace.py")
    result = subprocess.run([sys.executable, program], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


@pytest.mark.parametrize("shapes", ["static", "dynamic"])
@pytest.mark.parametrize(
    ("operation", "kernels"),
    [
        ("moments", 2),
        ("quantize", 2),
        ("quantize_dynamic", 1),
        ("dequantize", 1),
        ("rotate", 1),
        ("linear", 2),
        ("linear, 16-bit", 1),
    ],
)
def test_the_graph_holds_the_kernels_and_no_opaque_operation(graphs, operation, kernels, shapes):
    nodes = graphs[f"{operation}, {shapes}"]
    assert nodes.count("triton_kernel_wrapper_functional") == kernels
    assert not [node for node in nodes if "la_aciq" in node]
