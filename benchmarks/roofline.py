"""The hardware limit, measured in the same rounds as what is held against it.

roofline.cpp has the loops, compiled here for this CPU: reading memory in use (four streams per thread, with software
prefetch), writing and copying past the cache, and multiply-adds in registers. A *fresh* write or copy is one to memory
that the operating system has just handed out, page by page and zeroed, as large new tensors are; that is most of the
time of an operation with a large output, so both are measured.
"""

import ctypes
import functools
import hashlib
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

SOURCE = Path(__file__).with_suffix(".cpp")
STEPS = 20_000  # of multiply-adds in registers: tens of microseconds
FLAGS = ["-std=c++20", "-O3", "-march=native", "-fopenmp", "-shared", "-fPIC", "-Wno-ignored-attributes"]


@functools.cache
def library() -> ctypes.CDLL:
    compiler = shlex.split(os.environ.get("CXX", "c++"))
    folder = SOURCE.parents[1] / "build" / "roofline"
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / f"{hashlib.sha256(SOURCE.read_bytes() + repr(FLAGS).encode()).hexdigest()[:16]}.so"
    if not target.exists():
        subprocess.run([*compiler, *FLAGS, str(SOURCE), "-o", str(target)], check=True)
    loaded = ctypes.CDLL(str(target))
    pointer, size, threads = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
    loaded.roofline_read.argtypes = [pointer, size, threads]
    loaded.roofline_write.argtypes = [pointer, size, threads]
    loaded.roofline_copy.argtypes = [pointer, pointer, size, threads]
    for dtype in ("float32", "bfloat16", "int8"):
        function = getattr(loaded, f"roofline_{dtype}")
        function.argtypes, function.restype = [ctypes.c_int64, threads], ctypes.c_int64
    return loaded


def aligned(nbytes: int) -> Tensor:
    """Memory in use (every byte written once) of whole cache lines, at a multiple of 64 bytes."""
    memory = torch.ones(nbytes + 128, dtype=torch.uint8)
    start = -memory.data_ptr() % 64
    return memory[start : start + (nbytes + 63) // 64 * 64]


def read(memory: Tensor) -> Callable[[], object]:
    """Reads it with all threads of PyTorch; `memory` is from `aligned`, or as large tensors are."""
    function, threads = library().roofline_read, torch.get_num_threads()
    return lambda: function(memory.data_ptr(), memory.nbytes, threads)


def write(memory: Tensor) -> Callable[[], object]:
    function, threads = library().roofline_write, torch.get_num_threads()
    return lambda: function(memory.data_ptr(), memory.nbytes, threads)


def copy(source: Tensor, target: Tensor) -> Callable[[], object]:
    function, threads = library().roofline_copy, torch.get_num_threads()
    return lambda: function(source.data_ptr(), target.data_ptr(), source.nbytes, threads)


def multiply(dtype: str, steps: int = STEPS) -> tuple[Callable[[], object], int] | None:
    """A function and the multiply-adds of a call, all threads together; None where the CPU has no such instruction."""
    threads = torch.get_num_threads()
    function = getattr(library(), f"roofline_{dtype}")
    count = function(1, threads)
    return (functools.partial(function, steps, threads), count * steps * threads) if count else None
