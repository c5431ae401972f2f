"""The clip table of 200 layers x 100 languages on one core: the target is under one second.

    python -m benchmarks.bench_clip_table      measures on one core and writes results/clip-table-<device>.json

Profiles are synthetic, with histograms of 4,096 values of Student t laws of random scale: the time does not depend on
what they hold.
"""

import os
import sys

if __name__ == "__main__":
    # Before NumPy loads its BLAS: one thread, on one core.
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})

import argparse
import statistics
import time
from types import SimpleNamespace

import numpy as np
import pytest

from benchmarks.results import write_single_core
from la_aciq import Moments, clipping

LAYERS, LANGUAGES = 200, 100
CASES = {
    "exact, midrise": {"objective": "exact"},
    "exact, midtread": {"objective": "exact", "codebook": "midtread"},
    "in_range": {"objective": "in_range"},
    "aciq": {"objective": "aciq"},
    "exact, minimax for und": {"objective": "exact", "language_objective": "minimax"},
    "exact, 8 bits": {"objective": "exact", "bits": 8},
}
TARGET_S = 1.0


def synthetic_profile(layers: int = LAYERS, languages: int = LANGUAGES) -> SimpleNamespace:
    """What `clipping.table` reads of a profile: entries, languages, sites with one group each, and layers."""
    rng = np.random.default_rng(0)
    entries = ("und", *(f"l{i}" for i in range(languages)), "sink")
    edges = np.concatenate([[0.0], *[2.0**e * (1 + np.arange(8) / 8) for e in range(-16, 16)], [2.0**16]])
    sites = {}
    for i in range(layers):
        x = np.abs(rng.standard_t(rng.uniform(4, 20), (languages + 1, 4096))).astype(np.float32)
        x *= rng.uniform(0.2, 5, (languages + 1, 1)).astype(np.float32)
        histogram = np.zeros((len(entries), 1, 258, 2), np.int64)
        bins = np.searchsorted(edges, x, side="right") - 1
        for row, (b, values) in enumerate(zip(bins, x, strict=True), start=1):
            np.add.at(histogram[row, 0, :, 0], b, 1)
            np.add.at(histogram[row, 0, :, 1], b, values.view(np.int32) & ((1 << 20) - 1))
        histogram[0] = histogram[1:-1].sum(0)
        moments = Moments.from_state(np.zeros((len(entries), 1, 8)), histogram)
        sites[f"layer{i}"] = SimpleNamespace(moments=moments, kind="input", layer_kind="q_proj")
    return SimpleNamespace(entries=entries, languages=entries[1:-1], sites=sites, layers={name: name for name in sites})


@pytest.fixture(scope="module")
def profile() -> SimpleNamespace:
    return synthetic_profile()


@pytest.mark.parametrize("case", CASES)
def bench_clip_table(benchmark, profile, case):
    benchmark.group = f"clip table, {LAYERS} layers x {LANGUAGES} languages"
    benchmark.pedantic(lambda: clipping.table(profile, granularity="layer", **CASES[case]), rounds=5, warmup_rounds=1)


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m benchmarks.bench_clip_table",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    profile = synthetic_profile()
    rows = []
    for case, arguments in CASES.items():
        elapsed_seconds, cpu_seconds = [], []
        for _ in range(8):
            start, cpu = time.perf_counter(), time.process_time()
            clipping.table(profile, granularity="layer", **arguments)
            elapsed_seconds.append(time.perf_counter() - start)
            cpu_seconds.append(time.process_time() - cpu)
        low, median, high = statistics.quantiles(cpu_seconds[1:], n=4)
        # The process has one core and one thread: its processor time is what the core spends, also when others share
        # it.
        row = {"case": case, "cpu_median_s": median, "cpu_quartiles_s": [low, high], "rounds": len(cpu_seconds) - 1}
        rows.append(row | {"elapsed_median_s": statistics.median(elapsed_seconds[1:])})
        print(f"{case}: {median:.3f} s of processor time, {rows[-1]['elapsed_median_s']:.3f} s elapsed")
    target = write_single_core("clip-table", rows, layers=LAYERS, languages=LANGUAGES, target_s=TARGET_S)
    print(f"{target.name}: written")
    return 0 if rows[0]["cpu_median_s"] < TARGET_S else 1


if __name__ == "__main__":
    sys.exit(main())
