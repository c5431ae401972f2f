"""Measures launch parameters of the Triton kernels on a CUDA device, into kernels/tuned.json.

    python -m benchmarks.tune_triton [--seconds 240]

Per kernel and bucket of shapes (la_aciq.kernels.tuning) the heuristic's parameters and a few around them are timed as
bench_gpu times, and results must agree with the heuristic's. What is at least 3 % faster is written under the name of
the device; other devices' entries stay. When time is up, the remaining buckets keep the heuristic and are counted in
the file. Every candidate compiles without spills, which `python -m benchmarks.triton_compile --candidates` records.
"""

import argparse
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from la_aciq.bench import versions
from la_aciq.kernels import tuning

TABLE = Path(__file__).parents[1] / "kernels" / "tuned.json"
GAIN = 1.03
GROUP, LANGUAGES, K = 64, 12, 4096


@dataclass(frozen=True)
class Problem:
    """A bucket of shapes: a call that launches its kernel, and what to try there."""

    key: str
    run: Callable[[], Any]
    candidates: list[dict[str, int]]


def operation(name: str) -> Callable[..., Any]:
    function: Callable[..., Any] = getattr(importlib.import_module(f"la_aciq.kernels.{name}"), name)
    return function


def streaming_candidates(kernel: str) -> list[dict[str, int]]:
    usual = tuning.PER_THREAD[kernel]
    candidates = [{"tile": 2048}, {"tile": 8192}, {"tile": 8192, "per_thread": 2 * usual}]
    return [*candidates, {"per_thread": usual // 2}, {"per_thread": 2 * usual}]


def linear_candidates(rows: int, bits: int) -> list[dict[str, int]]:
    heuristic = tuning.linear(rows, torch.bfloat16, bits, torch.device("cpu"))
    columns, warps = heuristic["block_n"], heuristic["warps"]
    candidates = [{"block_n": columns // 2}, {"stages": 2}, {"stages": 4}]
    # The others spill.
    if rows <= 128:
        candidates += [{"block_n": 2 * columns}, {"warps": 2 * warps}]
    if bits < 16:
        candidates += [{"warps": warps // 2}]
    if rows <= 64:  # where K may be split
        candidates += [{"programs": 2}, {"programs": 8}]
    return candidates


def problems(device: str) -> Iterator[Callable[[], Problem]]:
    """Every bucket, the most wanted first, made when asked for."""
    for rows in (1, 16, 32, 128, 4096):
        for bits in (16, 4):
            yield partial(linear_problem, rows, bits, device)
    for rows in (32768, 8):
        for kernel in tuning.PER_THREAD:
            yield partial(streaming_problem, kernel, rows, torch.bfloat16, device)
    for kernel in ("quantize", "quantize_dynamic", "moments"):
        yield partial(streaming_problem, kernel, 32768, torch.float32, device)


def streaming_problem(kernel: str, rows: int, dtype: torch.dtype, device: str) -> Problem:
    x = torch.randn(rows, K, device=device, dtype=dtype)
    signs = torch.ones(K, dtype=torch.int8, device=device)
    clips = torch.full((LANGUAGES, K // GROUP), 2.5, device=device)
    language_ids = (torch.arange(rows, device=device) % LANGUAGES).to(torch.int32)
    codes = torch.randint(0, 256, (rows, K // 2), dtype=torch.uint8, device=device)
    options = {"clips": clips, "language_ids": language_ids, "activation_group_size": GROUP, "group_size": GROUP}
    name = kernel.removesuffix(" rotated")
    op = operation("linear" if name == "activations" else name)
    runs: dict[str, Callable[[], Any]] = {
        "moments": lambda: op(x, language_ids, LANGUAGES),
        "quantize": lambda: op(x, clips, language_ids, GROUP),
        "quantize rotated": lambda: op(x, clips, language_ids, GROUP, "midrise", signs),
        "quantize_dynamic": lambda: op(x, clips, language_ids, GROUP),
        "quantize_dynamic rotated": lambda: op(x, clips, language_ids, GROUP, "rms", "midrise", signs),
        "dequantize": lambda: op(codes, clips, language_ids, k=K, group_size=GROUP, dtype=dtype),
        "rotate": lambda: op(x, signs),
        # A product with one column: what takes time is rounding the activations.
        "activations": lambda: op(x, codes[:1], clips[:1], activation_bits=4, **options),
        "activations rotated": lambda: op(x, codes[:1], clips[:1], signs=signs, activation_bits=4, **options),
    }
    return Problem(tuning.streaming_key(kernel, x), runs[kernel], streaming_candidates(kernel))


def linear_problem(rows: int, bits: int, device: str) -> Problem:
    x = torch.randn(rows, K, device=device, dtype=torch.bfloat16)
    weight = torch.randint(0, 256, (K, K // 2), dtype=torch.uint8, device=device)
    weight_clip = torch.rand(K, K // GROUP, device=device) + 0.5
    options: dict[str, Any] = {"group_size": GROUP}
    if bits < 16:
        clips = torch.full((1, K // GROUP), 2.5, device=device)
        options |= {"activation_bits": bits, "clips": clips, "activation_group_size": GROUP}
    run = partial(operation("linear"), x, weight, weight_clip, **options)
    return Problem(tuning.linear_key(rows, x.dtype, bits), run, linear_candidates(rows, bits))


def agree(got: Any, wanted: Any) -> bool:
    """Codes but for decisions at boundaries, sums but for their order."""
    pairs = zip(got, wanted, strict=True) if isinstance(wanted, tuple) else [(got, wanted)]
    return all(agree_in_one(a, b) for a, b in pairs)


def agree_in_one(a: Tensor, b: Tensor) -> bool:
    if not b.is_floating_point():
        return b.numel() == 0 or (a != b).double().mean().item() < 1e-3
    finite = b.isfinite()
    if not torch.equal(finite, a.isfinite()):
        return False
    error, size = (a - b)[finite].double().norm().item(), b[finite].double().norm().item()
    return error <= 2e-3 * size


def best_entry(problem: Problem, median: Callable[[Callable[[], Any]], float]) -> tuple[dict[str, int], float]:
    """What is to be written for a bucket, {} for the heuristic, and how many times faster than the heuristic it is."""
    with tuning.use({}):
        expected = problem.run()
        before = median(problem.run)
    best, gain = {}, 1.0
    for candidate in problem.candidates:
        with tuning.use({problem.key: candidate}):
            try:
                fits = agree(problem.run(), expected)
                ratio = before / median(problem.run) if fits else 0.0
            except Exception as error:  # out of registers or shared memory on this device
                print(f"{problem.key}: {candidate}: {type(error).__name__}")
                continue
        if ratio > max(gain, GAIN):
            best, gain = candidate, ratio
    return best, gain


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=240, help="when to stop starting buckets")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("tune_triton: PyTorch finds no CUDA device", file=sys.stderr)
        return 1
    from .bench_gpu import Timer

    started = time.monotonic()
    torch.manual_seed(0)
    timer = Timer()
    entries: dict[str, dict[str, int]] = {}
    gains: dict[str, float] = {}
    left_out = 0
    for make in problems("cuda"):
        if time.monotonic() - started > arguments.seconds:
            left_out += 1
            continue
        problem = make()
        entry, gain = best_entry(problem, lambda run: statistics.median(timer.times(run)[0]))
        print(f"{problem.key:40} {gain:.2f} {entry}", flush=True)
        if entry:
            entries[problem.key], gains[problem.key] = entry, round(gain, 3)
    table = json.loads(TABLE.read_text("utf-8"))
    table.pop("note", None)
    device = torch.cuda.get_device_name(0)
    table["devices"][device] = entries
    table.setdefault("measured", {})[device] = {
        "versions": {"torch": torch.__version__, **versions(("triton",))},
        "times_as_fast": gains,
        "buckets_left_out": left_out,
    }
    for target in {TABLE, tuning.FILE}:  # in the checkout, and in the package that runs where that is another
        target.write_text(json.dumps(table, indent=1) + "\n", "utf-8")
    print(f"{len(entries)} entries for {device}: {TABLE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
