"""The vectorised solver over calibration histograms, against scans of the samples themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic_profile import log_histogram

from la_aciq import clipping
from la_aciq.clipping import Empirical, optimal_histogram

DRAWS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "t3": lambda rng, n: rng.standard_t(3, n),
    "laplace": lambda rng, n: rng.laplace(size=n),
    "uniform": lambda rng, n: rng.uniform(-1, 1, n),
    "outliers": lambda rng, n: np.where(rng.random(n) < 0.002, 60, 1) * rng.standard_normal(n),
    "sparse": lambda rng, n: np.where(rng.random(n) < 0.1, rng.normal(0, 1, n), 0.0),
}


@pytest.mark.parametrize("objective", ["aciq", "in_range", "exact"])
@pytest.mark.parametrize("codebook", ["midrise", "midtread"])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_clips_are_as_good_as_the_best_for_the_samples(bits, codebook, objective):
    """Up to 4 bits it costs the samples at most 0.5 % more error than their own best clip."""
    rng = np.random.default_rng(bits)
    for name, draw in DRAWS.items():
        for scale in (0.02, 1.0, 20.0):
            x = draw(rng, 20_000) * scale
            both = Empirical(np.concatenate([x, -x]))
            alpha, error = optimal_histogram(log_histogram(x), bits, codebook, objective)
            grid = np.geomspace(0.2, 60, 500) * float(both.rms)
            best = clipping.mse(both, grid, bits, codebook, objective).min()
            got = float(clipping.mse(both, alpha, bits, codebook, objective))
            # Bins are 6 to 12 % wide: at 8 bits they blur where the last values lie, most for a law with an edge.
            room = 0.005 if bits < 8 else 0.15 if name == "uniform" else 0.05
            assert got <= best * (1 + room), (name, scale)
            assert error == pytest.approx(got, rel=0.05 if bits < 8 else 0.2), (name, scale)


def test_shapes_scales_and_rows_without_mass():
    rng = np.random.default_rng(0)
    base = log_histogram(rng.standard_normal(5000))
    histogram = np.stack(
        [[log_histogram(rng.standard_normal(5000) * 2.0**k) for k in (-6, 0, 6)], [base, base * 0, base]]
    )
    alpha, error = optimal_histogram(histogram)
    assert alpha.shape == error.shape == (2, 3)
    assert np.isnan(alpha[1, 1])
    assert np.isnan(error[1, 1])
    one = optimal_histogram(base)
    assert alpha[1, 0] == pytest.approx(one[0], rel=1e-12)
    assert alpha[1, 2] == pytest.approx(one[0], rel=1e-12)
    np.testing.assert_array_equal(np.round(np.log2(alpha[0] / alpha[0, 1])), [-6, 0, 6])
    assert optimal_histogram(np.zeros((0, 258, 2), int))[0].shape == (0,)


@settings(deadline=None, max_examples=20)
@given(st.integers(0, 1000), st.integers(-8, 8), st.sampled_from(["aciq", "in_range", "exact"]))
def test_octaves_do_not_matter(seed, octaves, objective):
    """Scaling data by a power of two scales clip and error exactly, as long as all of it stays inside the bins."""
    x = np.random.default_rng(seed).uniform(0.01, 4, 2000)
    first = optimal_histogram(log_histogram(x), objective=objective)
    second = optimal_histogram(log_histogram(x * 2.0**octaves), objective=objective)
    assert second[0] == pytest.approx(first[0] * 2.0**octaves, rel=1e-9)
    assert second[1] == pytest.approx(first[1] * 4.0**octaves, rel=1e-9)


def test_scales_near_the_lowest_bin():
    """Data of scale 2^-13: thresholds fall into the lowest bin, which is spread evenly."""
    x = np.random.default_rng(0).standard_normal(50_000) * 2.0**-13
    both = Empirical(np.concatenate([x, -x]))
    for codebook in ("midrise", "midtread"):
        alpha, _ = optimal_histogram(log_histogram(x), 4, codebook)
        assert clipping.mse(both, alpha, 4, codebook) <= clipping.optimal(both, 4, codebook).mse * 1.005


def test_order_of_merging_does_not_matter():
    rng = np.random.default_rng(0)
    parts = [log_histogram(rng.standard_t(4, n)) for n in (10, 300, 5000, 77)]
    forward, backward = sum(parts), sum(parts[::-1])
    assert optimal_histogram(forward) == optimal_histogram(backward)


def test_all_zero_data_gets_a_tiny_finite_clip():
    """Zeros fill the lowest bin, whose values are spread over [0, 2^-16): a clip that is finite and positive."""
    alpha, error = optimal_histogram(log_histogram(np.zeros(100)))
    assert 0 < alpha < 2.0**-15
    assert 0 < error < 2.0**-32


def test_a_coarse_grid_never_hides_the_optimum():
    """Against the certified scan of the same law, for lumpy histograms with few values."""
    rng = np.random.default_rng(3)
    histogram = np.stack([log_histogram(rng.standard_t(3, 80) * 3) for _ in range(30)])
    for codebook in ("midrise", "midtread"):
        certified = clipping.optimal(Empirical.from_histogram(histogram), 4, codebook)
        _, error = optimal_histogram(histogram, 4, codebook)
        assert np.all(error >= certified.certificate.lower_bound * (1 - 1e-9))
        assert np.quantile(error / certified.mse, 0.9) < 1.002
        assert np.max(error / certified.mse) < 1.02
