"""Launch parameters: a heuristic's, or what a measurement found faster on this kind of device.

tuned.json beside this file holds, by the name of a device, the parameters that differ from the heuristic's, by kernel
and bucket of shapes. `python -m benchmarks.tune_triton` measures and writes it. A launch only looks an entry up: no
call is ever timed: a first call can be captured in a CUDA graph, and device, shape and file settle the order of sums.

Parameters of kernels that go by pieces (common.cut): `tile`, the elements a program holds, and `per_thread`, those a
thread holds. Of the product in `linear`: `block_m`, `block_n`, `warps` and `stages`, and `programs`, how many programs
per multiprocessor splitting K aims at.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

Entries = dict[str, dict[str, int]]

FILE = Path(__file__).with_name("tuned.json")
TILE = 4096  # 32 elements for each thread of 4 warps: several 16-byte loads of 16-bit data on their way per thread
PER_THREAD = {
    "moments": 32,
    "quantize": 32,
    "quantize rotated": 16,
    "quantize_dynamic": 32,
    "quantize_dynamic rotated": 16,
    "dequantize": 32,
    "rotate": 16,
    "activations": 32,
    "activations rotated": 16,
}
SMALL = 1 << 20  # elements; with fewer, programs of a whole tile leave multiprocessors idle
ROWS = (1, 16, 32, 128)  # the largest of each bucket of `linear`; one more bucket holds the rest

_trial: Entries | None = None


@cache
def _measured() -> dict[str, Entries]:
    devices: dict[str, Entries] = json.loads(FILE.read_text("utf-8"))["devices"]
    return devices


@cache
def _device_name(index: int | None) -> str:
    return torch.cuda.get_device_name(index)


def entries(device: torch.device) -> Entries:
    """What differs from the heuristics on this device, by key."""
    if _trial is not None:
        return _trial
    measured = _measured()
    return measured.get(_device_name(device.index), {}) if measured and device.type == "cuda" else {}


@contextmanager
def use(trial: Entries) -> Iterator[None]:
    """Launches with these entries in place of the table's: for measuring candidates, and for tests."""
    global _trial
    before, _trial = _trial, trial
    try:
        yield
    finally:
        _trial = before


def streaming_key(kernel: str, x: Tensor) -> str:
    return f"{kernel}, {x.element_size()} bytes, {'small' if x.numel() < SMALL else 'large'}"


def streaming(kernel: str, x: Tensor) -> dict[str, int]:
    """`tile` and `per_thread` of one of PER_THREAD for x [rows, K]."""
    heuristic = {"tile": TILE, "per_thread": PER_THREAD[kernel]}
    table = entries(x.device)
    if not table:  # so that a shape is only looked at, and guarded on by torch.compile, where something depends on it
        return heuristic
    return heuristic | table.get(streaming_key(kernel, x), {})


def linear_key(rows: int, dtype: torch.dtype, bits: int) -> str:
    kind = "integers" if bits < 16 else str(dtype).removeprefix("torch.")
    bucket = next((f"up to {most} rows" for most in ROWS if rows <= most), f"over {ROWS[-1]} rows")
    return f"linear {kind}, {bucket}"


def linear(rows: int, dtype: torch.dtype, bits: int, device: torch.device) -> dict[str, int]:
    """`block_m`, `block_n`, `warps`, `stages` and `programs`.

    The heuristic: the batch padded to the tensor cores' least, and few columns for few rows, since there the weights'
    bytes count and more programs keep more of them in flight. Integers need a second accumulator, which must fit in
    registers too.
    """
    if dtype == torch.float32 and bits == 16:
        block_m, block_n, warps = (16 if rows <= 16 else 32), 32, 4
    elif rows <= 128:
        block_m, block_n, warps = (16 if rows <= 16 else 32 if rows <= 32 else 64), 64, 4
    else:
        block_m, block_n, warps = (128 if bits == 16 else 64), 128, 8
    heuristic = {"block_m": block_m, "block_n": block_n, "warps": warps, "stages": 3, "programs": 4}
    table = entries(device)
    return heuristic | table.get(linear_key(rows, dtype, bits), {}) if table else heuristic
