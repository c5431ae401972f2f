"""The 95 % interval of `optimal` on samples: its coverage by a seeded simulation, and where there is none."""

import json
from pathlib import Path

import numpy as np
import pytest

from la_aciq.clipping import Empirical, Gaussian, Laplace, Law, StudentT, Uniform, optimal

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results" / "clip-intervals.json"
ROOT3 = np.sqrt(3)
DRAWS: dict[str, tuple[Law, object]] = {
    "gaussian": (Gaussian(), lambda rng, n: rng.standard_normal(n)),
    "laplace": (Laplace(), lambda rng, n: rng.laplace(size=n) / np.sqrt(2)),
    "t5": (StudentT(5), lambda rng, n: rng.standard_t(5, n) * np.sqrt(3 / 5)),
    "uniform": (Uniform(), lambda rng, n: rng.uniform(-ROOT3, ROOT3, n)),
}


def intervals_of(name, bits, n, repeats):
    law, draw = DRAWS[name]
    truth = float(optimal(law, bits, objective="aciq").alpha)
    each = [
        optimal(Empirical(draw(np.random.default_rng([7, i]), n)), bits, objective="aciq").interval
        for i in range(repeats)
    ]
    return truth, [interval for interval in each if interval is not None]


@pytest.mark.parametrize(
    ("name", "bits", "n"), [("gaussian", 2, 2048), ("laplace", 2, 4096), ("t5", 4, 32768), ("uniform", 4, 4096)]
)
def test_coverage(name, bits, n):
    """95 % of 300 intervals hold the law's clip, within three standard deviations (1.26 % each)."""
    truth, intervals = intervals_of(name, bits, n, 300)
    assert len(intervals) > 200
    coverage = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.91 <= coverage <= 0.99


@pytest.mark.parametrize(
    ("name", "bits", "n"), [("gaussian", 4, 64), ("laplace", 4, 2048), ("t5", 4, 2048), ("gaussian", 8, 2048)]
)
def test_no_interval_where_few_samples_lie_beyond_the_clip(name, bits, n):
    """Fewer than 30 values beyond the clip, where bootstrap intervals covered 20 to 90 %."""
    truth, intervals = intervals_of(name, bits, n, 60) if n >= 4 << bits else (0.0, [])
    assert len(intervals) <= 6
    assert truth >= 0


def test_other_objectives_and_laws_have_none():
    x = np.random.default_rng(0).standard_normal(100_000)
    for objective in ("exact", "in_range"):
        assert optimal(Empirical(x), objective=objective).interval is None
    assert optimal(Gaussian(), objective="aciq").interval is None
    assert optimal(Empirical(x), objective="aciq").interval is not None


def test_the_committed_simulation_holds_what_the_page_says():
    """92 to 97 % wherever more than half of the samples had an interval, over laws, bits and sizes; 3 standard
    deviations of the simulation are granted (300 samples: 3.8 %).
    """
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    assert {row["bits"] for row in rows} >= {2, 4}
    assert len({row["law"] for row in rows}) >= 6
    held = [row for row in rows if row["intervals"] > row["samples"] / 2]
    assert len(held) >= 12
    for row in held:
        room = 3 * np.sqrt(0.05 * 0.95 / row["intervals"])
        assert 0.95 - 0.02 - room <= row["coverage"] <= 0.95 + 0.02 + room, row
    mean = np.average([row["coverage"] for row in held], weights=[row["intervals"] for row in held])
    assert 0.93 <= mean <= 0.965
    assert not any(row["intervals"] > row["samples"] / 20 for row in rows if row["n"] <= 64)
