"""Certificates at extreme laws, scales and bits: right, or refused; and the size of the scans."""

import time

import mpmath
import numpy as np
import pytest
from scipy import optimize
from synthetic_profile import log_histogram

from la_aciq import clipping, disparity
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
from la_aciq.clipping.objectives import quantize
from la_aciq.errors import LaAciqError

SIGMAS = np.geomspace(0.01, 100, 50)
EXTREME = {
    "gaussian": Gaussian(),
    "shifted gaussian": Gaussian(1, 0.7),
    "laplace": Laplace(),
    "logistic": Logistic(),
    "uniform": Uniform(),
    "far uniform": Uniform(1, 5.0),
    "t2.001": StudentT(2.001),
    "t2.01": StudentT(2.01),
    "t2.1": StudentT(2.1),
    "t1e12": StudentT(1e12),
    "gg0.05": GeneralizedGaussian(0.05),
    "gg0.1": GeneralizedGaussian(0.1),
    "gg1000": GeneralizedGaussian(1000),
    "far rare part": Mixture([Gaussian(1), Gaussian(1e6)], [1 - 1e-6, 1e-6]),
    "far rare mode": Mixture([Gaussian(1), Gaussian(1, mean=1e5)], [1 - 1e-4, 1e-4]),
    "heavy and narrow": Mixture([StudentT(2.05), Gaussian(0.01)], [0.5, 0.5]),
    "fifty gaussians": Mixture([Gaussian(s) for s in SIGMAS], np.full(50, 0.02)),
    "fifty shifted": Mixture(
        [Gaussian(s, m) for s, m in zip(SIGMAS, np.linspace(-3, 3, 50), strict=True)], [0.02] * 50
    ),
}
HEAVY = ["t2.001", "t2.01", "t2.1", "gg0.1", "far rare part", "heavy and narrow"]


@pytest.mark.parametrize("name", EXTREME)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_every_law_is_solved_in_bounded_time_and_clips(name, bits):
    """At most 4,000 clips (38 million before intervals were halved in log alpha), and seconds even on a busy machine
    (benchmarks/bench_clip_optimizer.py has the times on an idle one: under a second).
    """
    law = EXTREME[name]
    for codebook in ("midrise", "midtread"):
        for objective in ("exact", "in_range", "aciq"):
            start = time.process_time()
            best = optimal(law, bits, codebook, objective)
            assert time.process_time() - start < 4
            assert sum(map(len, best.certificate.knots)) < 4000
            grid = np.geomspace(1e-3, 1e3, 400) * float(best.alpha)
            errors = clipping.mse(law, grid, bits, codebook, objective)
            assert errors.min() >= best.mse * (1 - 2e-8 if objective == "exact" else 1 - 2e-6) - 1e-12 * law.power
            assert best.certificate.lower_bound <= best.mse
            assert 0 <= best.certificate.gap <= 1.01e-6
            assert best.certificate.bracket_slopes[0] < 0 < best.certificate.bracket_slopes[1]


@pytest.mark.parametrize("kind", ["mean", "minimax", "variance"])
@pytest.mark.parametrize("codebook", ["midrise", "midtread"])
@pytest.mark.parametrize("bits", [2, 8])
def test_heavy_laws_share_a_clip_in_bounded_time(kind, codebook, bits):
    laws = [StudentT(2.01), Gaussian(), EXTREME["far rare part"]]
    start = time.process_time()
    best = shared(laws, bits, codebook, "exact", kind)
    assert time.process_time() - start < 10
    grid = np.geomspace(1e-3, 1e9, 1500)
    errors = np.stack([clipping.mse(law, grid, bits, codebook) / law.power for law in laws])
    value = {"mean": errors.mean(0), "minimax": errors.max(0), "variance": errors.mean(0) + errors.var(0)}[kind]
    assert value.min() >= best.lower_bound
    assert best.value - best.lower_bound <= 1.02e-6 * best.value + 1e-12


@pytest.mark.parametrize("name", [*HEAVY, "gaussian", "shifted gaussian", "far rare mode", "gg1000", "fifty shifted"])
def test_beyond_the_decay_start_no_clip_with_a_zero_improves(name):
    """The proof's premise (t^2 P falls on each side) and its conclusion (the midtread error does not fall)."""
    law = EXTREME[name]
    start = float(law.decay_start())
    t = start * np.geomspace(1, 1e4, 200)
    for tail in (law.above(t, 0), law.below(-t, 0)):
        weighted = t**2 * tail
        assert np.all(np.diff(weighted) <= 1e-9 * weighted[:-1] + 1e-300)
    for bits in (2, 5):
        clips = (2**bits - 1) * t
        errors = clipping.mse(law, clips, bits, "midtread")
        assert np.all(np.diff(errors) >= -1e-12 * float(law.power))


def test_uniform_is_the_limit_of_generalized_gaussians():
    """The uniform law's textbook optimum, sqrt(3) (N - 1) / N with the error 4^-bits, within 1e-2 / beta."""
    for beta in (30, 300, 1e3, 1e5, 1e9, 1e30, 1e300):
        for bits in (2, 4, 8):
            best = optimal(GeneralizedGaussian(beta), bits)
            assert best.alpha == pytest.approx(np.sqrt(3) * (1 - 2.0**-bits), rel=1e-6 + 2 / beta)
            assert best.mse == pytest.approx(4.0**-bits, rel=1e-6 + 40 / beta)


@pytest.mark.parametrize("beta", [0.05, 0.3, 7.0, 60.0, 1000.0])
def test_generalized_gaussian_tails_agree_with_mpmath(beta):
    law = GeneralizedGaussian(beta)
    with mpmath.mp.workdps(50):
        b = mpmath.mpf(beta)
        scale = mpmath.sqrt(mpmath.gamma(1 / b) / mpmath.gamma(3 / b))
        for a in (0.0, 1e-4, 0.3, 0.5, 1.0, 1.6, 1.7):
            y = (mpmath.mpf(a) / scale) ** b
            m = [scale**k * mpmath.gammainc((k + 1) / b, y) / mpmath.gamma(1 / b) for k in range(3)]
            for order, expected in enumerate((m[0], m[1] - a * m[0], m[2] - 2 * a * m[1] + mpmath.mpf(a) ** 2 * m[0])):
                assert float(law.tail(a, order)) == pytest.approx(float(expected), rel=1e-9, abs=1e-13)


@pytest.mark.parametrize("nu", [2.0001, 2.5, 1e4, 1e6, 1e9])
def test_student_tails_agree_with_mpmath(nu):
    law = StudentT(nu)
    with mpmath.mp.workdps(60):
        n = mpmath.mpf(nu)
        scale = mpmath.sqrt((n - 2) / n)
        constant = mpmath.gamma((n + 1) / 2) / mpmath.gamma(n / 2) / mpmath.sqrt(n * mpmath.pi)
        for a in (0.5, 1.5, 3.0):
            z = mpmath.mpf(a) / scale
            mass = mpmath.betainc(n / 2, mpmath.mpf(1) / 2, 0, n / (n + z**2), regularized=True)
            density = constant * (1 + z**2 / n) ** (-(n + 1) / 2)
            excess = scale * (2 * (n + z**2) * density / (n - 1) - z * mass)
            assert float(law.tail(a, 0)) == pytest.approx(float(mass), rel=1e-8)
            assert float(law.tail(a, 1)) == pytest.approx(float(excess), rel=1e-7)


@pytest.mark.parametrize("scale", [1e-150, 1e-100, 1e-30, 1.0, 1e30, 1e100, 1e149])
def test_scales_that_float64_holds_are_solved(scale):
    x = np.random.default_rng(0).standard_t(5, 300)
    for codebook, objective in (
        ("midrise", "exact"),
        ("midtread", "exact"),
        ("midrise", "in_range"),
        ("midrise", "aciq"),
    ):
        for unit, scaled in (
            (Laplace(), Laplace(scale)),
            (StudentT(3, 1, 0.3), StudentT(3, scale, 0.3 * scale)),
            (Empirical(x), Empirical(x * scale)),
            (Mixture([Gaussian(), Laplace(3)], [0.5, 0.5]), Mixture([Gaussian(scale), Laplace(3 * scale)], [0.5, 0.5])),
        ):
            best, one = optimal(scaled, 4, codebook, objective), optimal(unit, 4, codebook, objective)
            assert best.alpha / scale == pytest.approx(float(one.alpha), rel=2e-6)
            assert best.normalized_mse == pytest.approx(float(one.normalized_mse), rel=2e-6)
            assert best.certificate.gap == pytest.approx(one.certificate.gap, abs=1e-6)
            assert scaled.kurtosis == pytest.approx(float(unit.kurtosis), rel=1e-9)
            assert scaled.skewness == pytest.approx(float(unit.skewness), rel=1e-9, abs=1e-12)


POWERS = [2.0**-990, 2.0**-700, 2.0**-501, 2.0**501, 2.0**700, 2.0**990]


def laws_of_scale(scale):
    x = np.random.default_rng(0).standard_t(5, 300)
    return (
        Gaussian(scale),
        StudentT(3, scale, 0.3 * scale),
        GeneralizedGaussian(0.6, scale),
        Empirical(x * scale),
        Empirical(np.full(100, -3 * scale)),
        Mixture([Gaussian(scale), Laplace(3 * scale)], [0.5, 0.5]),
    )


@pytest.mark.parametrize("scale", POWERS)
def test_scales_whose_squares_float64_does_not_hold_give_the_unit_law_s_optimum(scale):
    """Clips, slopes and errors are the unit law's times the scale or its square, where float64 has such a number."""
    for unit, scaled in zip(laws_of_scale(1.0), laws_of_scale(scale), strict=True):
        for codebook, objective in (
            ("midrise", "exact"),
            ("midtread", "exact"),
            ("midrise", "in_range"),
            ("midrise", "aciq"),
        ):
            best, one = optimal(scaled, 4, codebook, objective), optimal(unit, 4, codebook, objective)
            assert best.alpha / scale == pytest.approx(float(one.alpha), rel=1e-7)
            assert best.normalized_mse == pytest.approx(float(one.normalized_mse), rel=1e-9, abs=1e-25)
            with np.errstate(over="ignore"):
                assert best.mse == pytest.approx(float(one.mse * scale * scale), rel=1e-9, abs=0)
            ours, theirs = best.certificate, one.certificate
            assert (ours.method, ours.multiplier) == (theirs.method, theirs.multiplier)
            assert 0 <= ours.gap == pytest.approx(float(theirs.gap), abs=1e-6)
            assert ours.bracket[0] <= best.alpha <= ours.bracket[1]
            assert 0 <= ours.lower_bound <= best.mse
            assert np.isfinite(ours.lower_bound)
            if one.mse > 1e-13 * unit.power:
                assert ours.bracket_slopes[0] < 0 < ours.bracket_slopes[1]
            if one.mse > 1e-13 * unit.power:
                error = float(clipping.mse(scaled, best.alpha, 4, codebook, objective))
                assert error == pytest.approx(float(best.mse), rel=1e-9, abs=0)
            if one.mse:
                ours, theirs = (
                    clipping.slope(law, 2 * scale_of_law, 4, codebook, objective) / scale_of_law
                    for law, scale_of_law in ((scaled, scale), (unit, 1.0))
                )
                assert ours == pytest.approx(float(theirs), rel=1e-9, abs=1e-12)
        assert float(scaled.kurtosis) == pytest.approx(float(unit.kurtosis), rel=1e-9, nan_ok=True)
        assert float(scaled.skewness) == pytest.approx(float(unit.skewness), rel=1e-9, abs=1e-12, nan_ok=True)


@pytest.mark.parametrize("scale", [1e-300, 1e-200, 3e-151, 4e150, 1e200, 1e300])
def test_any_scale_is_solved(scale):
    for unit, scaled in zip(laws_of_scale(1.0), laws_of_scale(scale), strict=True):
        best, one = optimal(scaled), optimal(unit)
        assert best.alpha / scale == pytest.approx(float(one.alpha), rel=2e-6)
        assert best.normalized_mse == pytest.approx(float(one.normalized_mse), rel=2e-6, abs=1e-20)
    many = optimal(Gaussian([scale, 1.0, 3 * scale]), objective="aciq")
    np.testing.assert_allclose(many.alpha / [scale, 1.0, 3 * scale], float(optimal(Gaussian(), objective="aciq").alpha))
    assert len(many.certificate.lower_bound) == 3
    steps = clipping.octav(Laplace(scale), 4)
    assert steps.alpha / scale == pytest.approx(float(clipping.octav(Laplace(), 4).alpha), rel=1e-9)
    assert clipping.samples_for_interval(Laplace(scale), 0.1) == clipping.samples_for_interval(Laplace(), 0.1)
    assert clipping.curvature(Laplace(scale), 2 * scale) == pytest.approx(float(clipping.curvature(Laplace(), 2.0)))
    for objective in ("exact", "aciq"):
        pair, units = [Gaussian(scale), Laplace(2 * scale)], [Gaussian(), Laplace(2)]
        ours, theirs = (
            clipping.shared(laws, objective=objective, language_objective="minimax") for laws in (pair, units)
        )
        assert ours.alpha / scale == pytest.approx(theirs.alpha, rel=1e-6)
        assert ours.value == pytest.approx(theirs.value, rel=1e-6)
        assert ours.lower_bound <= ours.value
    front = clipping.pareto(pair, objective="aciq")
    np.testing.assert_allclose(front.alpha / scale, clipping.pareto(units, objective="aciq").alpha, rtol=1e-6)
    x = np.random.default_rng(0).standard_normal(50_000)
    low, high = optimal(Empirical(x * scale), objective="aciq").interval
    expected = optimal(Empirical(x), objective="aciq").interval
    assert (low / scale, high / scale) == pytest.approx(expected, rel=0.02)


@pytest.mark.parametrize("scale", [1e308, 1e302, 1e-302, 5e-324])
def test_scales_whose_clips_float64_does_not_hold_are_refused(scale):
    x = np.random.default_rng(0).standard_normal(100)
    for make in (lambda: Gaussian(scale), lambda: StudentT(3, scale), lambda: Empirical(x * min(scale, 1e306))):
        with pytest.raises(ValueError, match=r"(sigma|samples): expected .*: rescale the values"):
            make()
    with pytest.raises(ValueError, match="mean: expected a magnitude of at most"):
        Gaussian(1.0, mean=1e302)
    with pytest.raises(ValueError, match=r"beta: expected values of at least 0\.05, got 0\.01"):
        GeneralizedGaussian(0.01)


def test_scales_that_do_not_go_together_are_refused():
    """A law that is nothing beside its mean or another law; and functions that need squares of an extreme law."""
    for law in (
        Gaussian(1.0, mean=1e200),
        Gaussian(1e-200, mean=1.0),
        Mixture([Gaussian(1e-200), Gaussian()], [0.5, 0.5]),
    ):
        with pytest.raises(LaAciqError, match="law: expected a standard deviation of at least"):
            optimal(law)
    with pytest.raises(LaAciqError, match="law: expected a standard deviation of at least"):
        clipping.shared([Gaussian(1e-200), Gaussian(1e200)])
    with pytest.raises(LaAciqError, match="law: expected a law that can be rescaled, got HistogramLaw"):
        clipping.shared([Gaussian(1e200), Empirical.from_histogram(log_histogram(np.ones(9)))])
    with pytest.raises(ValueError, match="alpha: expected clips of at most"):
        clipping.mse(Gaussian(1e-200), 1.0)
    for function in (disparity.lloyd_max, disparity.gaussian_distortion, disparity.shannon_lower_bound):
        with pytest.raises(ValueError, match="law: expected a scale from"):
            function(Gaussian(1e200), 4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("codebook", ["midrise", "midtread"])
def test_brackets_of_samples_have_slopes_of_opposite_sign(seed, codebook):
    """Also where the in-range error of samples jumps, which a derivative of its smooth parts does not see."""
    rng = np.random.default_rng(seed)
    for x in (
        rng.standard_normal(200),
        rng.standard_t(2.2, 300),
        np.round(rng.standard_normal(400), 1),
        rng.integers(-7, 8, 200),
    ):
        law = Empirical(x)
        for bits in (2, 3, 4):
            for objective in ("exact", "in_range", "aciq"):
                best = optimal(law, bits, codebook, objective)
                certificate = best.certificate
                grid = np.geomspace(0.01, 20, 3000) * float(law.rms)
                errors = clipping.mse(law, grid, bits, codebook, objective)
                assert errors.min() >= certificate.lower_bound - 1e-13 * law.power
                assert best.mse - certificate.lower_bound <= 1.01e-6 * best.mse + 1e-12 * law.power
                if best.mse > 1e-13 * law.power:
                    assert certificate.bracket_slopes[0] < 0 < certificate.bracket_slopes[1]
                    assert 0 <= certificate.gap < 1e-5


@pytest.mark.parametrize("seed", range(10))
def test_data_on_a_grid_get_a_clip_that_reproduces_them(seed):
    rng = np.random.default_rng(seed)
    for bits in (2, 4, 8):
        for codebook in ("midrise", "midtread"):
            n = 2**bits
            codes = rng.integers(0, n, 6 * n)
            codes[:2] = 0, n - 1
            step = 10.0 ** rng.uniform(-3, 3)
            x = (codes - ((n - 1) / 2 if codebook == "midrise" else n / 2)) * step
            best = optimal(Empirical(x), bits, codebook)
            assert best.mse <= 1e-28 * np.mean(x**2)
            assert best.certificate.gap <= 1
            np.testing.assert_allclose(quantize(x, best.alpha, bits, codebook), x, rtol=1e-12, atol=1e-12 * step)


def test_a_law_whose_tails_are_wrong_is_refused():
    """A law that misstates its tail mass, as generalized Gaussians of large exponents once did, proves nothing."""

    class Wrong(type(Gaussian())):
        def _partial(self, z, order):
            return super()._partial(z, order) * (0.9 if order == 0 else 1.0)

    for objective in ("exact", "in_range", "aciq"):
        with pytest.raises(ValueError, match="law: expected consistent tails"):
            optimal(Wrong(), objective=objective)


def test_the_minimum_does_not_depend_on_the_scan(monkeypatch):
    """The exact optimum of a smooth law by SciPy from 30 starts."""
    for law in (StudentT(2.5), Mixture([Gaussian(0.1), Laplace(2, 1)], [0.8, 0.2])):
        for codebook in ("midrise", "midtread"):
            best = optimal(law, 3, codebook)
            starts = np.geomspace(0.05, 20, 30)
            fits = [
                optimize.minimize_scalar(
                    lambda a, law=law, codebook=codebook: float(clipping.mse(law, abs(a), 3, codebook)),
                    bracket=(s, 1.1 * s),
                ).fun
                for s in starts
            ]
            assert best.mse == pytest.approx(min(fits), rel=1e-8)


def test_laws_of_other_makers_are_solved_without_a_decay_start():
    class Box(Law):
        """Uniform on +-1, with nothing but what a law must have."""

        shape = ()

        def above(self, t, order):
            t = np.asarray(t, dtype=float)
            inside = np.clip(1 - np.maximum(t, -1), 0, None)
            near = np.where(t < -1, -1 - t, 0.0)
            return (inside + near) ** (order + 1) / (order + 1) / 2 - near ** (order + 1) / (order + 1) / 2

        def below(self, t, order):
            return self.above(-np.asarray(t, dtype=float), order)

        def density(self, x):
            return np.where(np.abs(x) <= 1, 0.5, 0.0)

        def take(self, index):
            return self

        def entropy(self):
            return np.log(2.0)

        mean, variance, third_moment, fourth_moment = np.float64(0), np.float64(1 / 3), np.float64(0), np.float64(0.2)

    for codebook in ("midrise", "midtread"):
        reference = optimal(Uniform(1 / np.sqrt(3)), 4, codebook)
        assert optimal(Box(), 4, codebook).mse == pytest.approx(float(reference.mse), rel=1e-7)
