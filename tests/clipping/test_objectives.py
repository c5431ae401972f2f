"""The three objectives against brute force: quadrature of the rounding error itself, and simulation with a
quantizer written here.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nearest_value import nearest
from scipy import integrate, stats
from strategies import laws
from synthetic_profile import log_histogram

from la_aciq import clipping
from la_aciq.clipping import Empirical, Gaussian, GeneralizedGaussian, Laplace, Mixture, StudentT
from la_aciq.clipping.objectives import quantize

BITS = (2, 3, 4, 6, 8)


@pytest.mark.parametrize("codebook", ["midrise", "midtread"])
@pytest.mark.parametrize("bits", BITS)
def test_exact_error_is_that_of_rounding_to_the_nearest_value(bits, codebook):
    x = np.random.default_rng(bits).standard_t(4, 3000) + 0.3
    law = Empirical(x)
    for alpha in (0.2, 1.0, 2.7, 11.0):
        direct = np.mean((x - nearest(x, alpha, bits, codebook)) ** 2)
        assert clipping.mse(law, alpha, bits, codebook) == pytest.approx(direct, rel=1e-10)
        np.testing.assert_allclose(quantize(x, alpha, bits, codebook), nearest(x, alpha, bits, codebook), atol=1e-12)


@pytest.mark.parametrize("codebook", ["midrise", "midtread"])
@pytest.mark.parametrize(
    ("law", "scipys"),
    [
        (Gaussian(), stats.norm()),
        (Laplace(1.0, mean=0.4), stats.laplace(0.4, 1 / np.sqrt(2))),
        (StudentT(5), stats.t(5, scale=np.sqrt(3 / 5))),
        (GeneralizedGaussian(4), stats.gennorm(4, scale=1 / stats.gennorm(4).std())),
    ],
)
def test_exact_error_is_the_integral_over_cells(law, scipys, codebook):
    bits, n = 4, 16
    for alpha in (1.3, 2.5, 4.0):
        delta = 2 * alpha / (n - 1)
        values = (np.arange(n) - ((n - 1) / 2 if codebook == "midrise" else n / 2)) * delta
        cuts = [-60.0, *((values[1:] + values[:-1]) / 2), 60.0]
        total = 0.0
        for v, lo, hi in zip(values, cuts, cuts[1:], strict=False):
            for a, b in ((lo, np.clip(0.4, lo, hi)), (np.clip(0.4, lo, hi), hi)):
                total += integrate.quad(lambda x, v=v: (x - v) ** 2 * scipys.pdf(x), a, b, limit=200)[0]
        total += integrate.quad(lambda x, v=values[-1]: (x - v) ** 2 * scipys.pdf(x), 60, np.inf)[0]
        total += integrate.quad(lambda x, v=values[0]: (x - v) ** 2 * scipys.pdf(x), -np.inf, -60)[0]
        assert clipping.mse(law, alpha, bits, codebook) == pytest.approx(total, rel=1e-8)


@pytest.mark.parametrize("bits", BITS)
def test_models_are_their_definitions(bits):
    x = np.random.default_rng(0).laplace(size=2000)
    law, k = Empirical(x), (2**bits - 1) ** 2
    for alpha in (0.5, 2.0, 5.0):
        clipping_error = np.mean(np.maximum(np.abs(x) - alpha, 0) ** 2)
        for codebook in ("midrise", "midtread"):
            assert clipping.mse(law, alpha, bits, codebook, "aciq") == pytest.approx(
                clipping_error + alpha**2 / (3 * k), rel=1e-11
            )
            assert clipping.mse(law, alpha, bits, codebook, "in_range") == pytest.approx(
                clipping_error + alpha**2 / (3 * k) * np.mean(np.abs(x) <= alpha), rel=1e-11
            )


@settings(deadline=None, max_examples=60)
@given(laws(), st.sampled_from(BITS), st.sampled_from(["midrise", "midtread"]), st.floats(0.2, 5))
def test_derivatives(law, bits, codebook, relative):
    """Slopes are differences of errors, curvatures differences of slopes (away from jumps of the density)."""
    alpha = relative * float(law.rms)
    h = 1e-5 * alpha
    for objective in ("aciq", "exact"):
        values = clipping.mse(law, np.array([alpha - h, alpha + h]), bits, codebook, objective)
        slope = clipping.slope(law, np.array([alpha - h, alpha, alpha + h]), bits, codebook, objective)
        mean = (values[1] - values[0]) / (2 * h)
        room = 1e-9 * float(law.power) / h * 1e-2
        assert min(slope) - room <= mean <= max(slope) + room
    bend = clipping.curvature(law, alpha, bits, codebook, "aciq")
    slope = clipping.slope(law, np.array([alpha - h, alpha + h]), bits, codebook, "aciq")
    assert bend > 0
    ends = clipping.curvature(law, np.array([alpha - h, alpha + h]), bits, codebook, "aciq")
    assert min(ends) - 1e-6 <= (slope[1] - slope[0]) / (2 * h) <= max(ends) + 1e-6


@pytest.mark.parametrize("codebook", ["midrise", "midtread"])
def test_exact_curvature_of_a_smooth_law(codebook):
    law, a, h = Mixture([Gaussian(1, mean=0.3), Laplace(2)], [0.6, 0.4]), np.array([1.0, 2.5, 6.0]), 1e-5
    for bits in (2, 4, 8):
        slopes = [clipping.slope(law, a + s, bits, codebook, "exact") for s in (-h, h)]
        np.testing.assert_allclose(
            clipping.curvature(law, a, bits, codebook, "exact"), (slopes[1] - slopes[0]) / (2 * h), rtol=2e-3, atol=1e-7
        )


@settings(deadline=None, max_examples=60)
@given(laws(), st.sampled_from(BITS), st.floats(0.05, 4), st.floats(0.05, 4))
def test_the_convex_model_is_convex_for_every_law(law, bits, first, second):
    a = np.array([first, (first + second) / 2, second]) * float(law.rms)
    left, middle, right = clipping.mse(law, a, bits, objective="aciq")
    assert middle <= (left + right) / 2 * (1 + 1e-12)


def test_where_the_exact_error_is_not_convex():
    """Midtread, for a Gaussian: beyond 3.5 sigma at 2 bits, 17.5 sigma at 4. Midrise is convex there; small samples
    never are.
    """
    a = np.linspace(0.01, 60, 6000)
    for bits, start in ((2, 3.54), (3, 8.16), (4, 17.5)):
        m = clipping.mse(Gaussian(), a, bits, "midtread")
        bend = m[2:] - 2 * m[1:-1] + m[:-2]
        assert a[1:-1][bend < -1e-12].min() == pytest.approx(start, abs=0.02)
        m = clipping.mse(Gaussian(), a, bits, "midrise")
        assert np.all(m[2:] - 2 * m[1:-1] + m[:-2] > 0)
    m = clipping.mse(Empirical(np.random.default_rng(0).standard_normal(128)), a[:600])
    assert np.any(m[2:] - 2 * m[1:-1] + m[:-2] < -1e-6)


def test_histogram_mse_matches_the_samples():
    rng = np.random.default_rng(0)
    x = [rng.normal(0, 0.02, 50_000), rng.laplace(0, 30, 50_000)]
    histogram = np.stack([log_histogram(row) for row in x])
    alpha = np.array([0.05, 100.0])
    for codebook in ("midrise", "midtread"):
        for objective in ("aciq", "in_range", "exact"):
            ours = clipping.histogram_mse(histogram, alpha, 4, codebook, objective)
            # The histogram does not know signs: it stands for x and -x in equal parts.
            both = [Empirical(np.concatenate([row, -row])) for row in x]
            direct = [float(clipping.mse(law, a, 4, codebook, objective)) for law, a in zip(both, alpha, strict=True)]
            np.testing.assert_allclose(ours, direct, rtol=0.01)
    assert clipping.histogram_mse(histogram[:, None], np.array([[0.1, 0.2, 0.3]])).shape == (2, 3)
    assert np.isnan(clipping.histogram_mse(np.zeros((258, 2), int), 1.0))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"bits": 1}, ValueError, "bits: expected an integer from 2 to 8, got 1"),
        ({"bits": 9}, ValueError, "got 9"),
        ({"bits": 4.0}, TypeError, "bits: expected an integer from 2 to 8, got 4.0"),
        ({"bits": True}, TypeError, "got True"),
        ({"codebook": "nf4"}, ValueError, "codebook: expected one of midrise, midtread, got 'nf4'"),
        ({"objective": "kl"}, ValueError, "objective: expected one of exact, in_range, aciq, got 'kl'"),
        ({"alpha": -1.0}, ValueError, "alpha: expected finite clips of at least 0, got -1"),
        ({"alpha": np.nan}, ValueError, "alpha: expected finite clips of at least 0, got nan"),
    ],
)
def test_bad_problems_are_refused(change, error, message):
    arguments = {"law": Gaussian(), "alpha": 1.0, **change}
    for function in (clipping.mse, clipping.slope, clipping.curvature):
        with pytest.raises(error, match=message):
            function(**arguments)


def test_a_zero_clip_gives_zero():
    assert clipping.mse(Gaussian(2), 0.0) == pytest.approx(4)
    assert np.all(quantize([1.0, -3.0], 0.0) == 0)
