"""Weights rounded with error feedback on the CPU: `python -m benchmarks.bench_rounding` writes
results/rounding-<device>.json. Run it on a machine that does nothing else.

1. `round_weights` and the factor of its second moments, by shape, beside multiply-adds in registers in the same rounds.
   The share of the limit counts 3 N K^2 multiplications, which is what the definition in PyTorch takes for long rows.
   The PyTorch form in float32 (what runs on CUDA tensors) is timed where it takes less than seconds.
2. What the shapes of Llama 3.1 8B take in all, from the same rates.
3. The embedded model, quantized from its profile.
4. Both beside a process that keeps one core busy.

--quick: the small shapes, without the embedded model, and nothing is written.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import torch
from torch import Tensor

import la_aciq
from benchmarks import roofline
from benchmarks.results import FOLDER
from la_aciq import embedded, ops
from la_aciq.bench import cpu_name, in_file_names, versions
from la_aciq.nn import QuantConfig, quantize_model
from la_aciq.nn.weights import Rounding
from la_aciq.ops import fakes

GROUP = 64
ROUNDS = 5
LIMIT_STEPS = 1000 * roofline.STEPS  # of multiply-adds in registers: as long as a small matrix takes
CPU = torch.device("cpu")
# Outputs and inputs of layers: of the embedded model, and of models of 8 billion weights.
SMALL = ((576, 576), (1536, 576), (576, 1536))
LARGE = ((4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336))
PYTORCH_UP_TO = 1536 * 576  # weights that the PyTorch form is timed with
# Llama 3.1 8B by layer: (outputs, inputs) and how many, and the different inputs of those lengths.
LAYERS_8B = 32
MATRICES_8B = {(4096, 4096): 2, (1024, 4096): 2, (14336, 4096): 2, (4096, 14336): 1}
INPUTS_8B = {4096: 3, 14336: 1}
LANGUAGES = ("en", "sw", "th")
TARGET_S, TARGET_SHARE, TARGET_BUSY = 15.0, 0.4, 2.5


def seconds_of(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def problem(n: int, k: int) -> tuple[Tensor, Rounding]:
    """A weight, and second moments of correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    rank = max(k // 8, 1)
    x = torch.randn(4 * rank, rank, generator=generator) @ torch.randn(rank, k, generator=generator)
    second_moments = x.T @ x
    second_moments.diagonal().add_(0.1 * second_moments.diagonal().mean())
    return torch.randn(n, k, generator=generator), Rounding(second_moments)


def measure_shape(n: int, k: int, rounds: int) -> dict[str, Any]:
    """Seconds of every round of the operation, the limit, the factor and the PyTorch form."""
    weight, rounding = problem(n, k)
    limit = roofline.multiply("float32", LIMIT_STEPS)
    if limit is None:
        raise SystemExit("the hardware limit needs a compiler and a CPU with vectors of float32")
    multiply, count = limit
    factor_s = seconds_of(lambda: rounding.factors(CPU))
    factors = rounding.factors(CPU)

    def rounded() -> object:
        return ops.round_weights(weight, *factors, group_size=GROUP)

    def in_pytorch() -> object:
        return fakes._round_weights_on_cuda(weight, *factors, GROUP)

    rounded()
    multiply()
    times: dict[str, list[float]] = {"la_aciq": [], "limit: float32": []}
    for _ in range(rounds):
        times["la_aciq"].append(seconds_of(rounded))
        times["limit: float32"].append(seconds_of(multiply))
    if n * k <= PYTORCH_UP_TO:
        times["PyTorch"] = [seconds_of(in_pytorch) for _ in range(min(rounds, 2))]
    limit_s = [second * 3 * n * k * k / count for second in times["limit: float32"]]
    share = statistics.median(a / b for a, b in zip(limit_s, times["la_aciq"], strict=True))
    row = {"n": n, "k": k, "group_size": GROUP, "times_s": times, "factor_s": factor_s, "share_of_limit": share}
    print(
        f"{n} x {k}: {statistics.median(times['la_aciq']):.3f} s, factor {factor_s:.3f} s, {share:.2f} of the limit",
        flush=True,
    )
    return row


def total_8b(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Seconds of all layers of an 8-billion-parameter model, from the medians of its shapes."""
    by_shape = {(row["n"], row["k"]): row for row in rows}
    rounding = sum(
        count * statistics.median(by_shape[shape]["times_s"]["la_aciq"]) for shape, count in MATRICES_8B.items()
    )
    factors = sum(count * min(row["factor_s"] for row in rows if row["k"] == k) for k, count in INPUTS_8B.items())
    return {"rounding_s": LAYERS_8B * rounding, "factors_s": LAYERS_8B * factors}


def keep_busy(ready: Any) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    ready.set()
    while True:
        pass


@contextmanager
def busy_neighbor() -> Iterator[None]:
    """Another process computes on one core."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    process = context.Process(target=keep_busy, args=(ready,), daemon=True)
    process.start()
    try:
        ready.wait()
        yield
    finally:
        process.kill()
        process.join()


def beside_a_busy_process(name: str, function: Callable[[], object], rounds: int) -> dict[str, Any]:
    """Seconds alone and beside a busy process, in turns."""
    function()
    alone, beside = [], []
    for _ in range(rounds):
        alone.append(seconds_of(function))
        with busy_neighbor():
            beside.append(seconds_of(function))
    factor = statistics.median(beside) / statistics.median(alone)
    print(f"{name}: {factor:.2f} times as long beside a busy process", flush=True)
    return {"name": name, "alone_s": alone, "beside_s": beside, "factor": factor}


def quantize_embedded() -> Callable[[], object]:
    """Quantizes the embedded model from a profile that is made here."""
    model, tokenizer = embedded.load_model()
    texts = embedded.load_texts(LANGUAGES)
    profile = la_aciq.calibrate(model, texts, tokenizer, seqlen=256, tokens=1024, group_size=GROUP)
    config = QuantConfig(activations=16, group_size=GROUP)
    return lambda: quantize_model(model, profile, config, progress=False)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small shapes, no file")
    quick = parser.parse_args(arguments).quick
    rounds = 2 if quick else ROUNDS
    rows = [measure_shape(n, k, rounds) for n, k in SMALL]
    weight, rounding = problem(576, 576)

    def both() -> object:
        return ops.round_weights(weight, *Rounding(rounding._second_moments).factors(CPU), group_size=GROUP)

    busy = [beside_a_busy_process("576 x 576, with its factor", both, rounds)]
    if quick:
        return 0
    rows += [measure_shape(n, k, 2) for n, k in LARGE]
    quantize = quantize_embedded()
    embedded_s = [seconds_of(quantize) for _ in range(3)]
    print(f"embedded model: {statistics.median(embedded_s):.1f} s", flush=True)
    busy.append(beside_a_busy_process("embedded model", quantize, 3))
    device = cpu_name()
    content = {
        "schema": 1,
        "device": device,
        "threads": torch.get_num_threads(),
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"la_aciq": la_aciq.__version__} | versions(("torch", "numpy")),
        "targets": {"embedded_s": TARGET_S, "share_of_limit": TARGET_SHARE, "busy_factor": TARGET_BUSY},
        "rows": rows,
        "llama_8b": total_8b(rows),
        "embedded_s": embedded_s,
        "busy": busy,
    }
    target = FOLDER / f"rounding-{in_file_names(device)}.json"
    target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{target.name}: written")
    missed = statistics.median(embedded_s) > TARGET_S or any(row["factor"] > TARGET_BUSY for row in busy)
    return 1 if missed or any(row["share_of_limit"] < TARGET_SHARE for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
