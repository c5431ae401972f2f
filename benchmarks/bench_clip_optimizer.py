"""Seconds that `clipping.optimal` and `clipping.shared` take for every law of the package, at any bits.

    python -m benchmarks.bench_clip_optimizer          writes benchmarks/results/clip-optimizer-<device>.json

Laws are the families at ordinary and at extreme parameters, mixtures with a far, rare component and with 50 components,
a histogram and samples. A row is the slowest of all bits, codebooks and objectives of one law: processor seconds of one
call (the smaller of two, one thread), the most clips examined, and the peak memory of the slowest call.
"""

import os
import sys

if __name__ == "__main__":
    # Before NumPy loads its BLAS: one thread.
    os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}

import argparse
import time
import tracemalloc
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np

from benchmarks.results import write_single_core
from la_aciq.choices import CODEBOOKS, LANGUAGE_OBJECTIVES, OBJECTIVES, TABLE_BITS
from la_aciq.clipping import (
    Empirical,
    Gaussian,
    GeneralizedGaussian,
    Laplace,
    Law,
    Logistic,
    Mixture,
    StudentT,
    Uniform,
    optimal,
    shared,
)
from la_aciq.clipping.histogram import Bins, HistogramLaw

TARGET_S = 1.0
SIGMAS = np.geomspace(0.01, 100, 50)


def laws() -> dict[str, Law]:
    """Every kind of law, at ordinary and at extreme parameters."""
    sample = np.random.default_rng(0).standard_t(2.1, 100_000)
    half = [1 - 1e-6, 1e-6]
    return {
        "Gaussian": Gaussian(),
        "Gaussian, mean 0.7": Gaussian(1, 0.7),
        "Laplace": Laplace(),
        "logistic": Logistic(),
        "uniform": Uniform(),
        "t, nu = 2.001": StudentT(2.001),
        "t, nu = 2.01": StudentT(2.01),
        "t, nu = 2.1": StudentT(2.1),
        "t, nu = 5": StudentT(5),
        "generalized Gaussian, beta = 0.05": GeneralizedGaussian(0.05),
        "generalized Gaussian, beta = 0.5": GeneralizedGaussian(0.5),
        "generalized Gaussian, beta = 1000": GeneralizedGaussian(1000),
        "mixture, a millionth at 10^6 sigma": Mixture([Gaussian(1), Gaussian(1e6)], half),
        "mixture of t and a narrow Gaussian": Mixture([StudentT(2.05), Gaussian(0.01)], [0.5, 0.5]),
        "mixture of 50 Gaussians": Mixture([Gaussian(s) for s in SIGMAS], [0.02] * 50),
        "mixture of 50 shifted Gaussians": Mixture([Gaussian(s, s / 3) for s in SIGMAS], [0.02] * 50),
        "mixture of 50 t": Mixture([StudentT(nu) for nu in np.linspace(2.05, 30, 50)], [0.02] * 50),
        "histogram of 100,000 samples": HistogramLaw.from_bins(Bins.from_samples(sample)).take(np.zeros((), np.intp)),
        "100,000 samples": Empirical(sample),
    }


def slowest(calls: dict[str, Callable[[], Any]], clips: Callable[[Any], int]) -> dict[str, Any]:
    """The slowest call, its seconds, and the most clips and bytes of any."""
    seconds, examined = {}, 0
    for name, call in calls.items():
        times = []
        for _ in range(2):
            start = time.process_time()
            result = call()
            times.append(time.process_time() - start)
        seconds[name] = min(times)
        examined = max(examined, clips(result))
    name = max(seconds, key=seconds.__getitem__)
    tracemalloc.start()
    calls[name]()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return {"slowest": name, "seconds": seconds[name], "clips": examined, "peak_mib": peak / 2**20}


def main() -> int:
    argparse.ArgumentParser(
        prog="python -m benchmarks.bench_clip_optimizer",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    rows = []
    for name, law in laws().items():
        calls = {
            f"{bits} bits, {codebook}, {objective}": (
                lambda law=law, bits=bits, codebook=codebook, objective=objective: optimal(
                    law, bits, codebook, objective
                )
            )
            for bits, codebook, objective in product(TABLE_BITS, CODEBOOKS, OBJECTIVES)
        }
        rows.append({"case": name, **slowest(calls, lambda best: sum(map(len, best.certificate.knots)))})
        print(rows[-1], flush=True)
    heavy = [StudentT(2.01), Gaussian(), laws()["mixture, a millionth at 10^6 sigma"]]
    for kind in LANGUAGE_OBJECTIVES:
        calls = {
            f"{bits} bits, {codebook}, {objective}": (
                lambda bits=bits, codebook=codebook, objective=objective, kind=kind: shared(
                    heavy, bits, codebook, objective, kind, [1, 2, 3]
                )
            )
            for bits, codebook, objective in product((2, 4, 8), CODEBOOKS, OBJECTIVES)
        }
        rows.append({"case": f"shared by three laws, {kind}", **slowest(calls, lambda _: 0)})
        print(rows[-1], flush=True)
    target = write_single_core("clip-optimizer", rows, target_s=TARGET_S)
    print(f"{target.name}: written")
    return 0 if max(row["seconds"] for row in rows) < TARGET_S else 1


if __name__ == "__main__":
    sys.exit(main())
