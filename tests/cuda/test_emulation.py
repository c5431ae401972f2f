"""The emulation: what it must find, the same results in any order of threads, and no access outside of memory."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import emulated
import pytest
import torch
from small_calls import small_calls

from la_aciq.ops import reference

pytestmark = pytest.mark.skipif(emulated.compiler() is None, reason="no C++ compiler")


def run_faulty(kernel: str, order: int = 0, values=range(64)) -> tuple[str, list[float]]:
    """The message and the data after one of the kernels of emulation/faulty.cpp."""
    function = emulated.load().la_aciq_emulation_fault
    function.restype = ctypes.c_char_p
    data = (ctypes.c_float * 64)(*values)
    emulated.set_order(order)
    try:
        message = function(kernel.encode(), data).decode()
    finally:
        emulated.set_order(0)
    return message, list(data)


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_barriers_work(order):
    assert run_faulty("reverse", order) == ("", [63.0 - i for i in range(64)])


def test_a_missing_barrier_gives_other_results_in_other_orders():
    assert len({str(run_faulty("reverse without barrier", order)) for order in range(4)}) > 1


def test_a_sum_in_order_of_arrival_gives_other_results_in_other_orders():
    results = {run_faulty("add in order of arrival", order, [0.0] * 64)[1][0] for order in range(4)}
    assert len(results) > 1


@pytest.mark.parametrize(
    ("kernel", "message"),
    [
        ("barrier in a branch", "in a warp operation that others never reach"),
        ("write beyond shared memory", "wrote beyond its shared memory"),
        ("partial mask", "all 32 lanes"),
        ("too much shared memory", "error 9"),
        ("no such kernel", "error 1"),
    ],
)
def test_faults_are_found(kernel, message):
    assert message in run_faulty(kernel)[0]


def test_half_conversions():
    """The 16-bit floats of the emulation are those of PyTorch: every one of them, and ties and ends in between."""
    emulated.load()
    ops = torch.ops.la_aciq_emulated
    for dtype in (torch.float16, torch.bfloat16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        finite = every[every.isfinite()].unsqueeze(0)
        assert torch.equal(ops.rotate(finite, torch.ones(finite.shape[1]), 1), finite)
        exact = finite.double().sort().values
        between = ((exact[:, 1:] + exact[:, :-1]) / 2).float()
        weight = torch.full((1, 1), 0xFF, dtype=torch.uint8)  # level 1: dequantize returns the clip, rounded
        for values in (
            between,
            between.nextafter(torch.tensor(torch.inf)),
            between.nextafter(torch.tensor(-torch.inf)),
        ):
            positive = values[values > 0].unsqueeze(1)
            codes = weight.expand(positive.shape[0], 1).contiguous()
            got = ops.dequantize(codes, positive, None, k=2, per_row=True, dtype=dtype)[:, 0]
            assert torch.equal(got, positive[:, 0].to(dtype))


@pytest.mark.parametrize("name", small_calls())
def test_the_same_bits_in_any_order(name):
    emulated.load()
    emulated.set_order(0)
    call = small_calls()[name]
    expected = call(torch.ops.la_aciq_emulated)
    try:
        for order in (1, 2, 3):
            emulated.set_order(order)
            for got, wanted in zip(call(torch.ops.la_aciq_emulated), expected, strict=True):
                assert torch.equal(got, wanted)
    finally:
        emulated.set_order(0)


def test_opcheck():
    """Schemas, strides of outputs, no aliasing: as PyTorch checks them."""
    emulated.load()
    ops = torch.ops.la_aciq_emulated
    x, table, ids = torch.randn(4, 64), torch.full((2, 1), 2.5), torch.tensor([0, 1, 1, 0], dtype=torch.int32)
    codes = reference.quantize(x, table, ids)[0]
    for op, args, kwargs in [
        (ops.moments, (x, ids, 2, True), {}),
        (ops.quantize, (x, table, ids), {"tail_sums": True}),
        (ops.quantize_dynamic, (x, table, ids), {}),
        (ops.dequantize, (codes, table, ids), {"k": 64, "dtype": torch.bfloat16}),
        (ops.rotate, (x, torch.ones(64)), {}),
        (ops.linear, (x.bfloat16(), codes, table[:1].expand(4, 1).contiguous()), {}),
    ]:
        torch.library.opcheck(op.default, args, kwargs, test_utils=("test_schema",))


def test_addresses():
    """A selection of the tests of the operations, with AddressSanitizer watching the kernels and the tensors."""
    cxx = emulated.compiler()
    runtime = subprocess.run([cxx, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    if not Path(runtime.stdout.strip()).is_absolute():
        pytest.skip("no AddressSanitizer runtime")
    environment = os.environ | {
        "LD_PRELOAD": str(Path(runtime.stdout.strip()).resolve()),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "LA_ACIQ_EMULATION_ASAN": "1",
    }
    names = ["test_language_shapes", "test_tail_sums", "test_quantize_many_rows", "test_any_strides", "test_zero_rows"]
    names += ["test_nonfinite", "test_linear_composed", "test_moments_of", "(test_linear and midrise)"]
    selection = f"emulated and ({' or '.join(names)})"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection]
    command += [str(Path(__file__).with_name("test_operations.py"))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert " passed" in result.stdout


def test_the_sanitizer_notices_an_overread():
    source = "int main(int n, char**) { float* p = new float[4](); return p[3 + n] != p[0]; }"
    program = emulated.ROOT / "build" / "cuda-emulation" / "overread"
    program.parent.mkdir(parents=True, exist_ok=True)
    command = [emulated.compiler(), "-x", "c++", "-fsanitize=address", "-O0", "-", "-o", program]
    subprocess.run(command, input=source, text=True, check=True)
    result = subprocess.run([program], capture_output=True, text=True, check=False)
    assert "heap-buffer-overflow" in result.stderr
