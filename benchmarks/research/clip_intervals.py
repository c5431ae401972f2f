"""Coverage of the 95 % interval that `clipping.optimal` gives with samples, by simulation.

    python -m benchmarks.research.clip_intervals       writes benchmarks/results/clip-intervals.json (minutes)

For every law, number of bits and of samples: how many samples were given an interval, and how many of those
intervals hold the law's own best clip. `high` and `low` are the shares of intervals that lie below and above it.
"""

import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import special

from la_aciq import __version__
from la_aciq.clipping import (
    Gaussian,
    GeneralizedGaussian,
    Laplace,
    Law,
    Logistic,
    Mixture,
    StudentT,
    Uniform,
    optimal,
)
from la_aciq.clipping.interval import clip_interval
from la_aciq.clipping.optimal import convex_root
from la_aciq.clipping.samples import Empirical

TARGET = Path(__file__).parents[1] / "results" / "clip-intervals.json"
ROOT3 = float(np.sqrt(3))
LAWS: dict[str, tuple[Law, Any]] = {
    "Gaussian": (Gaussian(), lambda rng, n: rng.standard_normal(n)),
    "Laplace": (Laplace(), lambda rng, n: rng.laplace(size=n) / np.sqrt(2)),
    "t, nu = 5": (StudentT(5), lambda rng, n: rng.standard_t(5, n) * np.sqrt(3 / 5)),
    "t, nu = 3": (StudentT(3), lambda rng, n: rng.standard_t(3, n) / ROOT3),
    "uniform": (Uniform(), lambda rng, n: rng.uniform(-ROOT3, ROOT3, n)),
    "logistic": (Logistic(), lambda rng, n: rng.logistic(size=n) * ROOT3 / np.pi),
    "generalized Gaussian, beta = 0.7": (GeneralizedGaussian(0.7), lambda rng, n: _generalized(rng, n, 0.7)),
    "shifted mixture": (
        Mixture([Gaussian(1), Gaussian(3, mean=1)], [0.9, 0.1]),
        lambda rng, n: np.where(rng.random(n) < 0.9, rng.standard_normal(n), rng.normal(1, 3, n)),
    ),
}
SIZES = {2: (64, 512, 1024, 4096), 4: (64, 2048, 8192, 16384)}


def _generalized(rng: np.random.Generator, n: int, beta: float) -> NDArray[np.float64]:
    x = rng.gamma(1 / beta, size=n) ** (1 / beta) * rng.choice([-1.0, 1.0], n)
    return x / float(np.sqrt(_second_moment(beta)))


def _second_moment(beta: float) -> float:
    return float(np.exp(special.gammaln(3 / beta) - special.gammaln(1 / beta)))


def coverage(name: str, bits: int, n: int, repeats: int, seed: int = 0) -> dict[str, Any]:
    """Intervals of `repeats` samples of `n` values: how many there are, and how many hold the law's best clip."""
    law, draw = LAWS[name]
    truth = float(optimal(law, bits, objective="aciq").alpha)
    results = []
    for i in range(repeats):
        sample = Empirical(draw(np.random.default_rng([seed, i]), n))
        results.append(clip_interval(sample.samples, float(convex_root(sample, 1, bits)[0]), bits))
    low, high = np.array([interval for interval in results if interval is not None] or np.empty((0, 2))).T
    share: dict[str, float | None] = dict.fromkeys(("coverage", "low", "high", "half_width"))
    if len(low):
        share = {
            "coverage": float(np.mean((low <= truth) & (truth <= high))),
            "low": float(np.mean(high < truth)),
            "high": float(np.mean(low > truth)),
            "half_width": float(np.median(high - low) / 2 / truth),
        }
    return {"law": name, "bits": bits, "n": n, "samples": repeats, "intervals": len(low), **share}


def main() -> int:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 300
    rows = []
    for bits, sizes in SIZES.items():
        for n in sizes:
            for name in LAWS:
                rows.append(coverage(name, bits, n, max(repeats // 4, 50) if n > 100_000 else repeats))
                print(rows[-1], flush=True)
    result = {
        "schema": 1,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {"la_aciq": __version__, "python": platform.python_version(), "numpy": np.__version__},
        "rows": rows,
    }
    TARGET.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"{TARGET.name}: written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
