"""The speed of the operations on this machine, beside PyTorch's fastest read of the same memory; half a minute.

The repository's benchmarks/ measure the same operations with more repetitions and beside other libraries.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .. import ops

_GROUP = 64
_LANGUAGES = 12
_K = 4096
# Room for the input in memory, past any last-level cache. The reference works in float64 copies, many times slower.
_BYTES = 256 << 20
_REFERENCE_BYTES = 4 << 20


@dataclass(frozen=True)
class Timing:
    """Median seconds of an operation, and the bytes that a perfect implementation moves."""

    operation: str
    seconds: float
    nbytes: int


def measure(nbytes: int | None = None, rounds: int = 7, step: Callable[[], object] | None = None) -> list[Timing]:
    """Time every operation on a float32 input.

    Args:
        nbytes: approximate bytes of the input; None for 256 MiB with the compiled core, 4 MiB with the reference.
        rounds: how often each operation is timed.
        step: called after each operation, for progress.

    Returns:
        Timings; the first one is the read.
    """
    if nbytes is None:
        nbytes = _REFERENCE_BYTES if ops.why_unavailable("cpu") else _BYTES
    rows = max(nbytes // (4 * _K), 1)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, _K, generator=generator)
    language_ids = (torch.arange(rows) % _LANGUAGES).to(torch.int32)
    clips = torch.linspace(2.0, 3.0, _LANGUAGES * _K // _GROUP).reshape(_LANGUAGES, -1)
    signs = torch.where(torch.rand(_K, generator=generator) < 0.5, -1.0, 1.0)
    codes = ops.quantize(x, clips, language_ids, group_size=_GROUP)
    # As many rows of packed weights as take half the input's bytes, with the clips of their groups.
    weight = torch.randint(0, 256, (4 * rows, _K // 2), dtype=torch.uint8, generator=generator)
    weight_clip = torch.rand(4 * rows, _K // _GROUP, generator=generator) + 0.5

    operations: dict[str, tuple[Callable[[], object], int]] = {
        "moments": (lambda: ops.moments(x, language_ids, _LANGUAGES), x.nbytes),
        "quantize": (lambda: ops.quantize(x, clips, language_ids, group_size=_GROUP), x.nbytes + codes.nbytes),
        "quantize_dynamic": (
            lambda: ops.quantize_dynamic(x, clips, language_ids, group_size=_GROUP),
            x.nbytes + codes.nbytes + 4 * rows * _K // _GROUP,
        ),
        "dequantize": (
            lambda: ops.dequantize(codes, clips, language_ids, k=_K, group_size=_GROUP),
            x.nbytes + codes.nbytes,
        ),
        "rotate": (lambda: ops.rotate(x, signs), 2 * x.nbytes),
        "linear, 1 row": (
            lambda: ops.linear(x[:1], weight, weight_clip, group_size=_GROUP),
            weight.nbytes + weight_clip.nbytes,
        ),
    }
    reads = [Timing(f"read ({name})", _median_seconds(function, rounds), x.nbytes) for name, function in _reads(x)]
    timings = [min(reads, key=lambda timing: timing.seconds)]
    if step is not None:
        step()
    for name, (function, moved) in operations.items():
        timings.append(Timing(name, _median_seconds(function, rounds), moved))
        if step is not None:
            step()
    return timings


def table(timings: list[Timing]) -> str:
    """The timings as text: milliseconds, bandwidth, and bandwidth as a share of the read's."""
    read = timings[0].nbytes / timings[0].seconds
    lines = [f"{'operation':<18}  {'time':>9}  {'bandwidth':>10}  {'of a read':>9}"]
    for timing in timings:
        bandwidth = timing.nbytes / timing.seconds
        milliseconds, gigabytes = timing.seconds * 1e3, bandwidth / 1e9
        lines.append(
            f"{timing.operation:<18}  {milliseconds:>6.1f} ms  {gigabytes:>5.1f} GB/s  {bandwidth / read:>9.0%}"
        )
    return "\n".join(lines)


def _reads(x: torch.Tensor) -> list[tuple[str, Callable[[], object]]]:
    """PyTorch's operations that read all of x, write nothing, and hardly wait for arithmetic.

    Each of them is the fastest at times, by the number of threads and what else the machine does: `max` as integers,
    without care for NaN; `dot` reads two streams. The fastest of them is close to the read in benchmarks/roofline.cpp,
    which is compiled for the machine and prefetches. Minima and norms are no faster, `any` and int32 sums far slower.
    """
    halves = x.view(torch.float64).view(2, -1)
    return [
        ("torch.sum", x.sum),
        ("torch.max", x.view(torch.int64).max),
        ("torch.dot", lambda: torch.dot(halves[0], halves[1])),
    ]


def _median_seconds(function: Callable[[], object], rounds: int) -> float:
    function()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)
