"""What bounds the gap between languages, and what does not."""

import doctest
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nearest_value import nearest
from scipy import stats
from synthetic_profile import log_histogram, normal, student, synthetic_profile

from la_aciq.clipping import Empirical, Gaussian, GeneralizedGaussian, Laplace, Mixture, StudentT, mse, optimal
from la_aciq.clipping.kurtosis import reference_laws
from la_aciq.disparity import (
    bounds,
    deployment_bounds,
    equal_kurtosis_examples,
    family_bound,
    family_slope,
    kurtosis_bound,
    total_variation_bound,
    two_point_kurtoses,
    wasserstein2,
    wasserstein_bound,
)


def test_counterexamples_run_as_printed():
    assert doctest.testmod(bounds).failed == 0
    assert doctest.testmod(bounds).attempted >= 1


def test_equal_kurtosis_unequal_error():
    """The claim max MSE - min MSE <= C sd(kappa) would make both gaps zero."""
    scale, shape = equal_kurtosis_examples()
    assert scale.mse[1] == pytest.approx(4 * scale.mse[0], rel=1e-9)
    assert scale.normalized_mse[0] == pytest.approx(scale.normalized_mse[1], rel=1e-9)
    x = np.sqrt(6) * np.array([-1, 1] + [0] * 10)
    assert stats.kurtosis(x) == pytest.approx(3)
    assert np.var(x) == pytest.approx(1)
    assert shape.mse[0] == pytest.approx(0, abs=1e-12)
    assert shape.normalized_mse[1] == pytest.approx(0.02526, abs=5e-6)


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(-1.2, 30), min_size=1, max_size=40), st.floats(0, 10))
def test_family_bound_is_never_exceeded(kappas, slope):
    """Any L-Lipschitz function of kappa, here the steepest: range <= L sqrt(2 n) sd."""
    assert slope * np.ptp(kappas) <= family_bound(kappas, slope) * (1 + 1e-9) + 1e-12


def test_family_bound_is_attained_by_two_points():
    for n in (2, 3, 12, 100):
        kappas = two_point_kurtoses(n, 3.0, 1.5)
        assert np.ptp(kappas) == pytest.approx(3.0)
        assert family_bound(kappas, 0.0075) == pytest.approx(0.0075 * 3.0, rel=1e-12)


def test_family_slopes_and_the_bound_on_real_families():
    def t(kappa):
        return StudentT(4 + 6 / kappa) if kappa > 0 else Gaussian()

    grid = np.concatenate([[0.0], np.geomspace(0.01, 22, 20)])
    slope = family_slope(t, grid)
    assert slope == pytest.approx(0.0070, abs=1e-4)
    gg = [family_slope(lambda kappa: reference_laws(kappa)[0], [low, low + 0.2]) for low in (-1.2, 0.0)]
    assert gg[0] > 0.0075  # toward the uniform law
    assert gg[1] == pytest.approx(0.00525, abs=1e-4)
    rng = np.random.default_rng(0)
    kappas = rng.uniform(0, 6, 8)
    errors = [float(optimal(t(k)).normalized_mse) for k in kappas]
    assert np.ptp(errors) <= family_bound(kappas, slope)


@pytest.mark.parametrize("law", [Gaussian(), Laplace(3), StudentT(4.5), GeneralizedGaussian(5), Gaussian(1, mean=2)])
def test_kurtosis_bound_holds_for_the_model(law):
    for bits in (2, 4, 8):
        assert optimal(law, bits, objective="aciq").mse <= kurtosis_bound(law, bits)
    closed = float(law.variance) * np.sqrt((float(law.kurtosis) + 3) / 12) / 15
    if float(law.mean) == 0:
        assert kurtosis_bound(law) == pytest.approx(closed, rel=1e-12)


@settings(deadline=None, max_examples=100)
@given(st.integers(0, 10_000), st.integers(1, 12))
def test_total_variation_bound(seed, n):
    rng = np.random.default_rng(seed)
    p, q, e = rng.dirichlet(np.ones(n)), rng.dirichlet(np.ones(n)), rng.exponential(size=n)
    assert abs(p @ e - q @ e) <= total_variation_bound(p, q, e) + 1e-12
    if n == 2:
        assert abs(p @ e - q @ e) == pytest.approx(total_variation_bound(p, q, e))  # tight for two cells


def test_wasserstein_of_scaled_and_shifted_laws():
    """Scaling by c moves quantiles of |X| from x to c x: W_2 = |c - 1| rms; and against sorted samples."""
    rng = np.random.default_rng(0)
    x = rng.standard_t(6, 200_000)
    y = rng.laplace(size=200_000)
    p, q, r = (Empirical.from_histogram(log_histogram(z)) for z in (x, 2 * x, y))
    assert wasserstein2(p, p) == 0
    assert wasserstein2(p, q) == pytest.approx(float(p.rms), rel=1e-3)
    assert wasserstein2(p, q, scaled=True) == pytest.approx(0, abs=1e-6)
    direct = np.sqrt(np.mean((np.sort(np.abs(x)) - np.sort(np.abs(y))) ** 2))
    assert wasserstein2(p, r) == pytest.approx(direct, rel=0.02)


@pytest.mark.parametrize("codebook", ["midrise", "midtread"])
def test_wasserstein_bound_for_one_clip_and_for_the_best_clips(codebook):
    rng = np.random.default_rng(1)
    x, y = rng.standard_t(5, 5000), 1.2 * rng.laplace(size=5000) + 0.1
    w = np.sqrt(np.mean((np.sort(x) - np.sort(y)) ** 2))
    for clip in (0.5, 2.0, 6.0):
        errors = [np.mean((z - nearest(z, clip, 4, codebook)) ** 2) for z in (x, y)]
        low, high = wasserstein_bound(errors[0], w)
        assert low <= errors[1] <= high
    best = [float(optimal(Empirical(z), 4, codebook).mse) for z in (x, y)]
    assert abs(np.sqrt(best[0]) - np.sqrt(best[1])) <= w


def test_deployment_bounds_hold_and_are_ordered():
    draws = {
        "en": {"a.q_proj": normal(1), "a.down_proj": student(20, 3), "a.k_proj.output": normal(9)},
        "sw": {"a.q_proj": normal(1.1), "a.down_proj": student(8, 3), "a.k_proj.output": normal(9)},
        "th": {"a.q_proj": student(9, 1), "a.down_proj": student(6, 2.5), "a.k_proj.output": normal(9)},
    }
    profile = synthetic_profile(draws, normal(5), values=40_000)
    for codebook in ("midrise", "midtread"):
        found = deployment_bounds(profile, 4, codebook)
        assert found.languages == ("en", "sw", "th")
        assert 0 < found.shared_gap <= min(found.total_variation, found.cells, found.wasserstein_shared)
        assert 0 < found.separate_gap <= found.wasserstein_separate
    # The errors themselves, from the samples' laws.
    own = deployment_bounds(profile).separate
    expected = [(float(optimal(Gaussian()).normalized_mse) + float(optimal(StudentT(20)).normalized_mse)) / 2]
    assert own[0] == pytest.approx(expected[0], rel=0.05)
    same = dict.fromkeys(("en", "sw"), draws["en"])
    close = deployment_bounds(synthetic_profile(same, normal(5), values=40_000))
    assert close.wasserstein_separate < 0.6 * found.wasserstein_separate


@pytest.mark.parametrize("codebook", ["midrise", "midtread"])
def test_error_range_over_bins(codebook):
    """Least and largest squared error in each bin, against a fine grid of values of both signs."""
    edges = np.linspace(0, 4, 33)
    low, high = bounds._error_range(edges, 2.1, 3, codebook)
    for i, (lo, hi) in enumerate(pairwise(edges)):
        x = np.linspace(lo, hi, 2001)
        e = np.concatenate([(z - nearest(z, 2.1, 3, codebook)) ** 2 for z in (x, -x)])
        assert low[i] <= e.min() + 1e-12
        assert high[i] >= e.max() - 1e-12
        assert high[i] <= e.max() + 2e-3
        assert low[i] >= e.min() - 2e-6


def test_shared_clips_can_narrow_the_raw_gap_while_every_language_loses():
    """N(0, 1), N(0, 4): own clips leave a raw gap of 0.035, the wider one's clip for both 0.009, a pooled clip
    0.017.
    """
    laws = [Gaussian(1), Gaussian(2)]
    own = [float(optimal(law).mse) for law in laws]
    pooled = float(optimal(Mixture(laws, [0.5, 0.5])).alpha)
    gaps = [np.ptp([float(mse(law, clip)) for law in laws]) for clip in (float(optimal(laws[1]).alpha), pooled)]
    assert np.ptp(own) == pytest.approx(0.0346, abs=5e-4)
    assert gaps[0] == pytest.approx(0.0087, abs=2e-4)
    assert gaps[1] == pytest.approx(0.0169, abs=2e-4)
    assert all(float(mse(law, pooled)) > best for law, best in zip(laws, own, strict=True))


def test_bad_input():
    profile = synthetic_profile({"en": {"a.q_proj": normal(1)}}, normal(5), values=500)
    with pytest.raises(ValueError, match="profile: expected at least two languages, got 1"):
        deployment_bounds(profile)
    with pytest.raises(ValueError, match="kappas: expected at least one kurtosis"):
        family_bound([], 1.0)
    with pytest.raises(ValueError, match="slope: expected a number of at least 0, got -1"):
        family_bound([1.0], -1.0)
    with pytest.raises(ValueError, match="languages: expected at least 2, got 1"):
        two_point_kurtoses(1, 0, 1)
    with pytest.raises(ValueError, match="kappas: expected at least two ascending numbers"):
        family_slope(lambda k: Gaussian(), [1.0, 1.0])
    with pytest.raises(ValueError, match="p: expected probabilities that sum to one"):
        total_variation_bound([0.5, 0.6], [0.5, 0.5], [0, 1])
    with pytest.raises(ValueError, match="vectors of one length"):
        total_variation_bound([1.0], [0.5, 0.5], [0, 1])
    one = log_histogram(np.ones(9))
    with pytest.raises(ValueError, match="p and q: expected one shape"):
        wasserstein2(Empirical.from_histogram(one), Empirical.from_histogram(np.stack([one, one])))
    with pytest.raises(ValueError, match="distance: expected values of at least 0"):
        wasserstein_bound(1.0, -1.0)
