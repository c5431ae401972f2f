"""Coverage of the 95 % interval that `clipping.optimal` gives with samples, by simulation.

For every law, number of bits and of samples: how many of REPEATS samples were given an interval, and how many of those
intervals hold the law's own best clip. `low` and `high` are the shares of intervals that lie below and above it. 2000
repeats take about twenty minutes of one processor. The file is written after every cell, and a run with the same
settings goes on where the last one stopped; delete the file to start again.

The interval depends on a sample through its size and the values beyond a threshold below the clip. So only those are
drawn: their number from a binomial law, their values from the law's tail by SciPy.
"""

import argparse
import json
import os
import platform
import sys
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import scipy
from numpy.typing import NDArray
from scipy import optimize, stats

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
from la_aciq.clipping.interval import LEAST_SAMPLES, MOST_SKEWNESS, REACH, tail_interval
from la_aciq.clipping.objectives import noise_factor

Array = NDArray[np.float64]

TARGET = Path(__file__).parents[1] / "results" / "clip-intervals.json"
ROOT3 = float(np.sqrt(3))
BETA = 0.7
# By name: the law, and SciPy's distributions that it is a mixture of, with their weights.
LAWS: dict[str, tuple[Law, list[tuple[float, Any]]]] = {
    "Gaussian": (Gaussian(), [(1.0, stats.norm())]),
    "Laplace": (Laplace(), [(1.0, stats.laplace(scale=np.sqrt(0.5)))]),
    "t, nu = 5": (StudentT(5), [(1.0, stats.t(5, scale=np.sqrt(3 / 5)))]),
    "t, nu = 3": (StudentT(3), [(1.0, stats.t(3, scale=1 / ROOT3))]),
    "uniform": (Uniform(), [(1.0, stats.uniform(-ROOT3, 2 * ROOT3))]),
    "logistic": (Logistic(), [(1.0, stats.logistic(scale=ROOT3 / np.pi))]),
    "generalized Gaussian, beta = 0.7": (
        GeneralizedGaussian(BETA),
        [(1.0, stats.gennorm(BETA, scale=1 / stats.gennorm.std(BETA)))],
    ),
    "shifted mixture": (
        Mixture([Gaussian(1), Gaussian(3, mean=1)], [0.9, 0.1]),
        [(0.9, stats.norm()), (0.1, stats.norm(1, 3))],
    ),
}
# By bits: from a size at which few samples have an interval to one at which all but those of the heaviest tails do.
SIZES = {
    bits: tuple(first << 2 * i for i in range(4))
    for bits, first in {2: 512, 3: 2048, 4: 4096, 6: 1 << 15, 8: 1 << 19}.items()
}
# Values drawn per sample. Cells that need more have an interval for every sample, and at the next smaller size too.
MOST_DRAWN = 200_000
LEAST_DRAWN = 2000


class Tails:
    """Magnitudes beyond a threshold of samples of a law."""

    def __init__(self, parts: list[tuple[float, Any]], threshold: float) -> None:
        self.sides = []
        for weight, distribution in parts:
            above, below = float(distribution.sf(threshold)), float(distribution.cdf(-threshold))
            self.sides.append((weight * above, above, distribution.isf))
            self.sides.append((weight * below, below, lambda p, inverse=distribution.ppf: -inverse(p)))

    def draw(self, rng: np.random.Generator, n: int) -> Array:
        """The magnitudes beyond the threshold of a sample of n values, ascending."""
        masses = np.array([mass for mass, _, _ in self.sides])
        counts = rng.multinomial(n, [*masses, 1 - masses.sum()])
        drawn = [
            inverse(share * (1 - rng.random(count)))
            for count, (_, share, inverse) in zip(counts, self.sides, strict=False)
        ]
        return np.sort(np.concatenate(drawn))


def threshold_of(law: Law, bits: int, n: int) -> float:
    """Where the tails that are drawn begin: below what the interval of a sample needs.

    The clips of samples that are too small for an interval vary more: of those at least `LEAST_DRAWN` values are drawn.
    """
    clip = float(optimal(law, bits, objective="aciq").alpha) / REACH**2
    share = LEAST_DRAWN / n
    if share >= 1:
        return 0.0
    if float(law.tail(clip, 0)) >= share:
        return clip
    return float(optimize.brentq(lambda a: float(law.tail(a, 0)) - share, 0, clip))


def best_clip(tail: Array, n: int, bits: int, start: float) -> float:
    """The root of E(|X| - a)+ = c a of a sample, by Newton's method from a clip below it, which stays below."""
    c, above = noise_factor(bits), np.append(np.cumsum(tail[::-1])[::-1], 0.0)
    clip = start
    for _ in range(200):
        beyond = int(np.searchsorted(tail, clip, side="right"))
        step = above[beyond] / (len(tail) - beyond + n * c)
        if step <= clip * (1 + 1e-15):
            break
        clip = float(step)
    return clip


def coverage(name: str, bits: int, n: int, repeats: int, seed: int = 0) -> dict[str, Any]:
    """Intervals of `repeats` samples of `n` values: how many there are, and how many hold the law's best clip."""
    law, parts = LAWS[name]
    truth = float(optimal(law, bits, objective="aciq").alpha)
    threshold = threshold_of(law, bits, n)
    tails = Tails(parts, threshold)
    # Each cell has draws of its own: what one cell shows is not what the next one shows again.
    rng = np.random.default_rng([seed, list(LAWS).index(name), bits, n])
    results = []
    for _ in range(repeats):
        tail = tails.draw(rng, n)
        clip = best_clip(tail, n, bits, threshold)
        # A sample whose clip is so far off that its interval would need values that were not drawn counts as a miss.
        drawn = clip >= threshold * REACH
        results.append(tail_interval(tail[tail > clip / REACH], n, clip, bits) if drawn else (clip, clip))
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


def cells() -> Iterator[tuple[str, int, int]]:
    """Law, bits and number of samples of every cell."""
    for bits, sizes in SIZES.items():
        for n in sizes:
            for name, (law, _) in LAWS.items():
                if n * float(law.tail(threshold_of(law, bits, n), 0)) <= MOST_DRAWN:
                    yield name, bits, n


def settings(repeats: int) -> dict[str, Any]:
    """What the numbers depend on; a file of other settings is not continued."""
    return {
        "repeats": repeats,
        "most_skewness": MOST_SKEWNESS,
        "least_samples": LEAST_SAMPLES,
        "reach": REACH,
    }


def earlier_rows(repeats: int, target: Path) -> dict[tuple[str, int, int], dict[str, Any]]:
    """The rows of a run with these settings that did not end, or ended, by cell."""
    if not target.exists():
        return {}
    result = json.loads(target.read_text(encoding="utf-8"))
    if result.get("settings") != settings(repeats):
        return {}
    return {(row["law"], row["bits"], row["n"]): row for row in result["rows"]}


def write(rows: list[dict[str, Any]], repeats: int, target: Path) -> None:
    """Replace the file by these rows at once."""
    result = {
        "schema": 2,
        "measured": datetime.now(UTC).isoformat(timespec="seconds"),
        "versions": {
            "la_aciq": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "scipy": scipy.__version__,
        },
        "settings": settings(repeats),
        "rows": rows,
    }
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, target)


def main(arguments: list[str] | None = None, target: Path = TARGET) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.research.clip_intervals",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "repeats",
        nargs="?",
        type=int,
        default=2000,
        metavar="REPEATS",
        help="samples of every law, number of bits and of values (default: %(default)s)",
    )
    repeats = parser.parse_args(arguments).repeats
    rows_of = earlier_rows(repeats, target)
    order = list(cells())
    for cell in order:
        if cell not in rows_of:
            rows_of[cell] = coverage(*cell, repeats)
            print(rows_of[cell], flush=True)
            write([rows_of[each] for each in order if each in rows_of], repeats, target)
    print(f"{target.name}: {len(rows_of)} cells of {repeats} samples")
    return 0


if __name__ == "__main__":
    sys.exit(main())
