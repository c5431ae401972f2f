"""Shared clips: against brute force on a grid, and their proofs against the definitions."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_profile import log_histogram

from la_aciq import clipping
from la_aciq.clipping import Empirical, Gaussian, Laplace, StudentT, Uniform, optimal, pareto, shared
from la_aciq.clipping.histogram import Bins
from la_aciq.clipping.language_objectives import shared_bins

LAWS = [Gaussian(), Gaussian(1.5), Laplace(0.8), StudentT(5, 1.2)]


def objective_by_hand(errors, weights, kind, penalty=1.0):
    if kind == "minimax":
        return errors.max(0)
    mean = np.average(errors, axis=0, weights=weights)
    if kind == "variance":
        mean = mean + penalty * np.average((errors - mean) ** 2, axis=0, weights=weights)
    return mean


@pytest.mark.parametrize("kind", ["mean", "weighted", "minimax", "variance"])
@pytest.mark.parametrize("objective", ["aciq", "in_range", "exact"])
@pytest.mark.parametrize("codebook", ["midrise", "midtread"])
def test_shared_clip_is_the_best_on_a_grid(kind, objective, codebook):
    weights = [1, 2, 3, 4] if kind == "weighted" else None
    found = shared(LAWS, 4, codebook, objective, kind, weights, penalty=20.0)
    grid = np.geomspace(0.3, 40, 4001)
    errors = np.stack([clipping.mse(law, grid, 4, codebook, objective) / law.power for law in LAWS])
    values = objective_by_hand(errors, weights or np.ones(4), kind, 20.0)
    assert found.value <= values.min() * (1 + 1e-9)
    assert found.value == pytest.approx(values.min(), rel=1e-3)
    assert found.lower_bound <= found.value
    assert found.value - found.lower_bound <= 1.01e-6 * found.value
    assert found.alpha == pytest.approx(grid[values.argmin()], rel=5e-3)
    np.testing.assert_allclose(
        found.errors, [clipping.mse(law, found.alpha, 4, codebook, objective) / law.power for law in LAWS], rtol=1e-12
    )


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(0.3, 3), min_size=1, max_size=5), st.integers(2, 8))
def test_minimax_multipliers_prove_optimality(sigmas, bits):
    """mu >= 0, sum 1, weighted derivatives cancel, and mu lies on languages at the maximum (KKT of the epigraph
    form).
    """
    laws = [(Gaussian, Laplace, StudentT)[i % 3](*((5,) if i % 3 == 2 else ()), s) for i, s in enumerate(sigmas)]
    found = shared(laws, bits, "midrise", "aciq", "minimax")
    mu = found.multipliers
    assert np.all(mu >= 0)
    assert mu.sum() == pytest.approx(1)
    slopes = np.array(
        [-2 * float(law.tail(found.alpha, 1)) + 2 * found.alpha / (3 * (2**bits - 1) ** 2) for law in laws]
    ) / np.array([float(law.power) for law in laws])
    assert abs(mu @ slopes) <= 1e-9 * (np.abs(slopes).max() + 1e-3)
    assert np.all(found.errors[mu > 1e-9] >= found.value * (1 - 1e-7))


def test_minimax_meets_where_two_languages_cross():
    """N(0, 1) and N(0, 2^2): their normalized errors are equal at the minimax clip, and neither is at its own
    optimum.
    """
    found = shared([Gaussian(1), Gaussian(2)], objective="aciq", language_objective="minimax")
    assert found.errors[0] == pytest.approx(found.errors[1], rel=1e-9)
    assert 2.53 < found.alpha < 5.0


def test_one_language_shares_with_nobody():
    for kind in ("mean", "minimax", "variance"):
        for objective in ("aciq", "exact"):
            found = shared([Laplace(2)], objective=objective, language_objective=kind)
            assert found.value == pytest.approx(
                float(optimal(Laplace(2), objective=objective).normalized_mse), rel=1e-6
            )


def test_weights_of_zero_leave_a_language_out():
    found = shared([Gaussian(), Uniform(9)], language_objective="weighted", weights=[1, 0], objective="aciq")
    assert found.alpha == pytest.approx(float(optimal(Gaussian(), objective="aciq").alpha), rel=1e-9)
    found = shared([Gaussian(), Uniform(9)], language_objective="minimax", weights=[1, 0], objective="aciq")
    assert found.alpha == pytest.approx(float(optimal(Gaussian(), objective="aciq").alpha), rel=1e-9)


def test_a_large_penalty_buys_equality():
    errors = [
        np.ptp(shared(LAWS, objective="aciq", language_objective="variance", penalty=p).errors)
        for p in (0.0, 10.0, 1000.0)
    ]
    assert errors[0] > errors[1] > errors[2]
    mean = shared(LAWS, objective="aciq", language_objective="mean")
    zero = shared(LAWS, objective="aciq", language_objective="variance", penalty=0.0)
    assert zero.value == pytest.approx(mean.value, rel=1e-6)


@pytest.mark.parametrize("objective", ["aciq", "exact"])
def test_pareto_front(objective):
    front = pareto(LAWS, 4, "midrise", objective)
    assert np.all(np.diff(front.mean) > 0)
    assert np.all(np.diff(front.worst) < 0)
    grid = np.geomspace(0.5, 20, 2001)
    errors = np.stack([clipping.mse(law, grid, 4, "midrise", objective) / law.power for law in LAWS])
    mean, worst = errors.mean(0), errors.max(0)
    # No clip on the grid is better than a point of the front in both.
    for m, w in zip(front.mean, front.worst, strict=True):
        assert not np.any((mean < m * (1 - 1e-9)) & (worst < w * (1 - 1e-9)))
    assert front.mean[0] == pytest.approx(mean.min(), rel=1e-5)
    assert front.worst[-1] == pytest.approx(worst.min(), rel=1e-3)


@pytest.mark.parametrize("kind", ["mean", "minimax", "variance"])
def test_histograms_share_as_laws_do(kind):
    rng = np.random.default_rng(0)
    draws = [rng.normal(0, 1, 30_000), rng.normal(0, 1.8, 30_000), rng.standard_t(4, 30_000)]
    histogram = np.stack([log_histogram(x) for x in draws])
    certified = shared([Empirical.from_histogram(h) for h in histogram], 4, "midrise", "exact", kind)
    bins = Bins.from_histogram(histogram)
    alpha = shared_bins(
        Bins(bins.weight[:, None], bins.offset[:, None]), np.full((3, 1), 1 / 3), 4, "midrise", "exact", kind
    )
    errors = clipping.histogram_mse(histogram, alpha) / np.array(
        [float(Empirical.from_histogram(h).power) for h in histogram]
    )
    assert objective_by_hand(errors, np.ones(3), kind) <= certified.value * (1 + 1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"laws": []}, "laws: expected at least one law"),
        ({"laws": [Gaussian([1, 2])]}, "laws: expected single laws"),
        (
            {"language_objective": "max"},
            "language_objective: expected one of mean, weighted, minimax, variance, got 'max'",
        ),
        ({"language_objective": "weighted"}, "weights: expected weights for"),
        ({"weights": [1, -1]}, "weights: expected finite weights, none negative"),
        ({"weights": [0, 0]}, "not all zero"),
        ({"weights": [1, 1, 1]}, r"weights: expected shape \[2\], got \[3\]"),
        ({"penalty": -1.0}, "penalty: expected a number of at least 0, got -1"),
        ({"objective": "kl"}, "objective: expected one of"),
    ],
)
def test_bad_input(change, message):
    with pytest.raises(ValueError, match=message):
        shared(**{"laws": [Gaussian(), Laplace()], **change})
    with pytest.raises(ValueError, match="points: expected at least 2, got 1"):
        pareto([Gaussian(), Laplace()], points=1)
