"""The 95 % interval of `optimal` on samples: its coverage by a seeded simulation, and where there is none.

tests/research/test_clip_intervals.py has the committed simulation.
"""

import numpy as np
import pytest

from la_aciq.clipping import Empirical, Gaussian, Laplace, Law, StudentT, Uniform, optimal
from la_aciq.clipping.interval import tail_interval

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
    ("name", "bits", "n"), [("gaussian", 2, 4096), ("laplace", 2, 8192), ("laplace", 3, 16384), ("uniform", 4, 8192)]
)
def test_coverage(name, bits, n):
    """95 % of 300 intervals hold the law's clip, within three standard deviations (1.26 % each)."""
    truth, intervals = intervals_of(name, bits, n, 300)
    assert len(intervals) > 200
    coverage = np.mean([low <= truth <= high for low, high in intervals])
    assert 0.91 <= coverage <= 0.99


@pytest.mark.parametrize(
    ("name", "bits", "n"),
    [("gaussian", 4, 64), ("laplace", 4, 2048), ("t5", 4, 2048), ("gaussian", 8, 2048), ("laplace", 4, 16384)],
)
def test_no_interval_where_few_samples_lie_beyond_the_clip(name, bits, n):
    """Up to a hundred values beyond the clip, where intervals covered 20 to 93 %."""
    _, intervals = intervals_of(name, bits, n, 60)
    assert len(intervals) <= 3


def test_a_few_values_just_above_the_clip_do_not_pass_for_many():
    """One or two values that exceed the clip by little, from which the hypothesis alone would expect a crowd."""
    alpha, n = 10.0, 30_000
    tail = np.append(np.full(40, 8.5), [10.0 + 1e-4] * 3)
    assert tail_interval(tail, n, alpha, 6) is None


def test_an_interval_scales_with_the_values_and_shrinks_with_their_number():
    x = np.random.default_rng(1).standard_normal(400_000)
    low, high = optimal(Empirical(x), objective="aciq").interval
    # The third of the samples that decides is another one, but the width is that of the same data.
    scaled = optimal(Empirical(8 * x), objective="aciq").interval
    assert (scaled[1] - scaled[0]) / (high - low) == pytest.approx(8, rel=0.05)
    assert scaled == pytest.approx((8 * low, 8 * high), rel=0.01)
    fewer = optimal(Empirical(x[:100_000]), objective="aciq").interval
    assert (fewer[1] - fewer[0]) / (high - low) == pytest.approx(2, rel=0.15)


def test_other_objectives_and_laws_have_none():
    x = np.random.default_rng(0).standard_normal(100_000)
    for objective in ("exact", "in_range"):
        assert optimal(Empirical(x), objective=objective).interval is None
    assert optimal(Gaussian(), objective="aciq").interval is None
    assert optimal(Empirical(x), objective="aciq").interval is not None
