"""The choice of a backend by device, shape and order, and what a process without Triton or a GPU says of it."""

import json
import os
import subprocess
import sys

import pytest
import torch

import la_aciq
from la_aciq import backends, ops

from .cases import DEVICE, Case, assert_codes, reference


def fake_cuda(*shape: int) -> torch.Tensor:
    """A tensor that says it is on a CUDA device, for the choice alone."""

    class Tensor:
        device = torch.device("cuda", 0)
        is_cpu = False

        def __init__(self) -> None:
            self.shape = torch.Size(shape)

        def numel(self) -> int:
            return self.shape.numel()

        def dim(self) -> int:
            return len(self.shape)

    return Tensor()


@pytest.fixture
def available(monkeypatch):
    """Declares which backends exist, whatever this machine has."""

    def declare(*names: str) -> None:
        monkeypatch.setattr(
            backends, "_WHY_NOT", {name: None if name in names else "absent" for name in backends._WHY_NOT}
        )

    monkeypatch.setattr(backends._choice, "backend", None)
    return declare


def test_every_operation_has_a_preference_for_any_number_of_rows():
    assert set(backends.PREFERENCES) == {*backends.OPERATIONS, "linear, rounded activations"}
    for rules in backends.PREFERENCES.values():
        bounds = [bound for bound, _ in rules]
        assert bounds == sorted(bounds)
        assert bounds[-1] == float("inf")


def test_compiled_kernels_come_first_and_triton_without_them(available):
    available("reference", "cpu", "cuda", "triton")
    assert backends.choose("quantize", fake_cuda(4, 64)) == "cuda"
    assert backends.choose("linear", fake_cuda(16, 64)) == "cuda"
    assert backends.choose("linear", fake_cuda(2, 16, 64)) == "triton"
    assert backends.choose("linear", fake_cuda(1, 64), rounded=True) == "triton"
    available("reference", "cpu", "triton")
    assert backends.choose("quantize", fake_cuda(4, 64)) == "triton"
    available("reference", "cpu", "cuda")
    assert backends.choose("linear", fake_cuda(100, 64)) == "cuda"
    available("reference", "cpu")
    assert backends.choose("moments", fake_cuda(4, 64)) == "reference"


def test_cpu_tensors_use_the_compiled_kernel_even_where_triton_interprets(available):
    available("reference", "cpu", "triton")
    expected = "cpu" if backends.WHY_NO_CORE is None else "reference"
    assert backends.choose("quantize", torch.zeros(2, 4)) == expected


def test_a_backend_that_cannot_run_on_the_tensor_is_refused_with_the_reason(available):
    available("reference", "cpu", "cuda", "triton")
    with la_aciq.use_backend("cuda"), pytest.raises(RuntimeError, match="backend 'cuda' is not available: x is on cpu"):
        la_aciq.quantize(torch.zeros(2, 4), 1.0)
    with la_aciq.use_backend("cpu"), pytest.raises(RuntimeError, match="x is on cuda:0"):
        backends.choose("quantize", fake_cuda(2, 4))


def test_the_wrappers_run_every_operation_on_triton():
    case = Case(lead=(2, 3), k=96, group_size=32, language_shape=(2,), rotated=True)
    x, alpha, language, signs = case.x(), case.table(), case.language(), case.signs()
    with la_aciq.use_backend("triton"):
        codes, tail = la_aciq.quantize(x, alpha, language, group_size=32, signs=signs, tail_sums=True)
        dynamic, scales = la_aciq.quantize_dynamic(x, alpha, language, group_size=32, signs=signs)
        values = la_aciq.dequantize(codes, alpha, language, k=96, group_size=32)
        statistics = la_aciq.moments(x, language=language, languages=3)
        y = la_aciq.rotate(x, signs)
        weight = torch.zeros(5, 48, dtype=torch.uint8, device=DEVICE)
        scale = torch.ones(5, 3, device=DEVICE)
        out = la_aciq.linear(x, weight, scale, group_size=32, activation_bits=8, clip=alpha[:, :1])
    assert_codes(case, codes, reference.clip_per_group(alpha, language, (2, 3)))
    assert_codes(case, dynamic, scales.double())
    assert tail.shape == (3, 3, 4)
    expected = reference.dequantize(codes, alpha, language, k=96, group_size=32)
    torch.testing.assert_close(values, expected, rtol=2e-7, atol=0)
    counts = torch.bincount(language, minlength=3).cpu().numpy() * 3 * 96
    assert statistics.count.tolist() == counts.tolist()
    torch.testing.assert_close(y, reference.rotate(x, signs), rtol=0, atol=2e-5)
    assert out.shape == (2, 3, 5)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a process without a GPU says")
def test_a_process_without_a_gpu_imports_no_triton_and_says_why_it_cannot_run():
    program = (
        "import json, sys, torch, la_aciq\n"
        "from la_aciq import ops\n"
        "la_aciq.quantize(torch.ones(2, 4), 1.0)\n"
        "reasons = [ops.why_unavailable(b) for b in ('triton', 'cuda')]\n"
        "print(json.dumps(['triton' in sys.modules, 'la_aciq.kernels.quantize' in sys.modules, *reasons]))\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    triton_imported, kernels_imported, why_no_triton, why_no_cuda = json.loads(result.stdout)
    assert not triton_imported
    assert not kernels_imported
    assert "no CUDA device" in why_no_triton
    assert why_no_cuda


def test_a_process_without_the_package_triton_says_so():
    program = (
        "import importlib.util as u\n"
        "find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'triton' else find(name, *rest)\n"
        "from la_aciq import ops\n"
        "print(ops.why_unavailable('triton'))\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert result.stdout == "the package triton is not installed (pip install 'la-aciq[triton]')\n"


def test_kernels_that_were_never_verified_on_a_gpu_are_said_to_be(available, monkeypatch):
    available("reference", "cpu", "triton")
    monkeypatch.setattr(backends, "_FROM_ENVIRONMENT", None)
    monkeypatch.setattr(backends, "VERIFIED_ON_GPU", False)
    assert "not yet verified on a GPU: run benchmarks/gpu.sh" in backends._warning_for_cuda(True)
    assert backends._warning_for_cuda(False) is None
    monkeypatch.setattr(backends, "_FROM_ENVIRONMENT", "reference")
    assert backends._warning_for_cuda(True) is None
    monkeypatch.setattr(backends, "_FROM_ENVIRONMENT", None)
    monkeypatch.setattr(backends, "VERIFIED_ON_GPU", True)
    assert backends._warning_for_cuda(True) is None
    available("reference", "cpu")
    assert "slow reference implementation on CUDA tensors: absent; absent" in backends._warning_for_cuda(True)


def test_the_warning_about_cuda_is_given_when_a_process_with_a_gpu_imports_the_operations():
    program = "import torch; torch.cuda.device_count = lambda: 1; from la_aciq import ops"
    environment = {name: value for name, value in os.environ.items() if name != "LA_ACIQ_BACKEND"}
    command = [sys.executable, "-W", "error::RuntimeWarning", "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (result.returncode != 0) == (not backends.VERIFIED_ON_GPU)
    assert ("CUDA tensors" in result.stderr) == (not backends.VERIFIED_ON_GPU)


def test_names_of_backends_are_checked():
    with pytest.raises(ValueError, match="backend: expected one of reference, cpu, cuda, triton, got 'tpu'"):
        ops.why_unavailable("tpu")
