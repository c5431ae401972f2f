"""Optima against published tables and brute force; certificates checked without the solver."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, special, stats
from strategies import laws
from synthetic_profile import log_histogram

from la_aciq import clipping
from la_aciq.clipping import (
    Empirical,
    Gaussian,
    GeneralizedGaussian,
    Laplace,
    Mixture,
    StudentT,
    Uniform,
    minimum_samples,
    octav,
    optimal,
    samples_for_interval,
)
from la_aciq.clipping.published import BANNER_GAUSS, BANNER_LAPLACE, MAX_STEPS, banner_clip, uniform_gaussian_quantizer

CASES = [Gaussian(), Laplace(2), StudentT(3), StudentT(6, mean=0.4), Uniform(), GeneralizedGaussian(0.6)]


# Published values


def test_banner_tables_to_every_printed_digit():
    """Banner et al.'s code, bits 1 to 8, K = 4^B; Laplace in units of b. Their digits are cut off; 1.24 and 5.03
    are rounded.
    """
    gauss = np.array([float(banner_clip(Gaussian(), bits)) for bits in range(1, 9)])
    laplace = np.array([float(banner_clip(Laplace(), bits)) * np.sqrt(2) for bits in range(1, 9)])
    closed_form = special.lambertw(3 * 4.0 ** np.arange(1, 9)).real
    np.testing.assert_allclose(laplace, closed_form, rtol=1e-12)
    cut_off = [np.floor(100 * a).astype(int).tolist() for a in (gauss, laplace)]
    assert gauss[0] == pytest.approx(1.24, abs=5e-4)  # 1.23991 is printed as 1.24
    assert cut_off[0][1:] == [171, 215, 255, 293, 328, 361, 392]
    assert cut_off[1] == [186, 283, 389, 502, 620, 741, 864, 989]
    assert round(laplace[3], 2) == 5.03
    assert list(BANNER_GAUSS) == [1.24, 1.71, 2.15, 2.55, 2.93, 3.28, 3.61, 3.92]
    assert list(BANNER_LAPLACE) == [1.86, 2.83, 3.89, 5.03, 6.20, 7.41, 8.64, 9.89]


def test_max_1960_uniform_quantizer_of_a_gaussian():
    """Steps as printed; at every size from 2 to 256 against direct minimization of the error by normal moments over
    cells.
    """
    for levels, printed in MAX_STEPS.items():
        step, error = uniform_gaussian_quantizer(levels)
        assert round(step, 3 if levels == 2 else 4) == printed
    assert uniform_gaussian_quantizer(16)[1] == pytest.approx(0.01154, abs=5e-6)
    for levels in (2, 4, 8, 16, 32, 64, 128, 256):
        step, error = uniform_gaussian_quantizer(levels)

        def cells(s, levels=levels):
            v = (np.arange(levels) - (levels - 1) / 2) * s
            cuts = np.concatenate([[-np.inf], (v[1:] + v[:-1]) / 2, [np.inf]])
            mass, first = np.diff(stats.norm.cdf(cuts)), -np.diff(stats.norm.pdf(cuts))
            return 1 - 2 * v @ first + v**2 @ mass

        assert cells(step) == pytest.approx(error, rel=1e-9)
        found = optimize.minimize_scalar(cells, bracket=(0.7 * step, step, 1.4 * step), options={"xtol": 1e-10})
        assert found.x == pytest.approx(step, rel=1e-5)


@pytest.mark.parametrize(
    ("law", "alpha"),
    [(Gaussian(), 2.523), (Laplace(), 3.480), (StudentT(10), 2.959), (StudentT(6), 3.397), (StudentT(5), 3.673),
     (GeneralizedGaussian(0.5), 5.242), (GeneralizedGaussian(4), 2.039), (Uniform(), 1.640)],
)  # fmt: skip
def test_convex_optima_at_int4(law, alpha):
    """Values of the project's verified theory page, recomputed here by SciPy's minimizer of an independent formula."""
    assert optimal(law, objective="aciq").alpha == pytest.approx(alpha, abs=6e-4)
    found = optimize.minimize_scalar(
        lambda a: float(law.tail(a, 2)) + a**2 / 675, bounds=(0.5, 12), method="bounded", options={"xatol": 1e-10}
    )
    assert optimal(law, objective="aciq").alpha == pytest.approx(found.x, rel=1e-5)


@pytest.mark.parametrize(
    ("law", "alpha"),
    [(Gaussian(), 2.514), (Laplace(), 3.457), (StudentT(20), 2.706), (StudentT(10), 2.953), (StudentT(8), 3.101),
     (StudentT(6), 3.391), (StudentT(5), 3.668)],
)  # fmt: skip
def test_exact_optima_at_int4(law, alpha):
    assert optimal(law).alpha == pytest.approx(alpha, abs=6e-4)


def test_uniform_law_has_its_textbook_optimum():
    """Levels at the centres of N equal cells: alpha = sqrt(3) (N - 1) / N, error 4^-B."""
    for bits in range(2, 9):
        best = optimal(Uniform(), bits)
        assert best.alpha == pytest.approx(np.sqrt(3) * (1 - 2.0**-bits), rel=1e-6)
        assert best.mse == pytest.approx(4.0**-bits, rel=1e-9)


# Certificates


@pytest.mark.parametrize("law", CASES, ids=repr)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_convex_certificate(law, bits):
    """Sign change of the derivative, recomputed from tail sums; positive curvature; inactive constraint."""
    best = optimal(law, bits, objective="aciq")
    c, k = best.certificate, (2**bits - 1) ** 2

    def derivative(a):
        return -2 * float(law.tail(a, 1)) + 2 * a / (3 * k)

    lo, hi = c.bracket
    assert lo < best.alpha < hi
    assert hi - lo <= 1e-9 * best.alpha
    assert derivative(lo) < 0 < derivative(hi)
    assert c.curvature == pytest.approx(2 * float(law.tail(best.alpha, 0)) + 2 / (3 * k), rel=1e-12)
    assert c.multiplier == 0
    assert derivative(0.0) < 0
    assert c.lower_bound <= best.mse
    assert c.gap < 1e-9


def test_a_certificate_prints_without_its_knots():
    certificate = optimal(Laplace(), 4, objective="exact").certificate
    assert len(certificate.knots[0]) > 20
    assert "gap=" in repr(certificate)
    assert len(repr(certificate)) < 500


def second_moments(law, t):
    """E[X^2 ; |X| > t] and E[(|X| + t)^2 ; |X| > t] from the tails."""
    mass, excess, square = (law.tail(t, k) for k in range(3))
    return square + 2 * t * excess + t**2 * mass, square + 4 * t * excess + 4 * t**2 * mass


def lower_bound_by_hand(law, knots, values, bits, codebook):
    """min over [l, r] of the two bounds of `clipping.scan`: chord - C (a - l)(r - a), with C from |q| <= min(largest,
    |x| / l + 1 / (N - 1)) and, for midtread, q = 0 below half a step; and what zero takes plus what is clipped.
    """
    n = 2**bits
    largest = 1 if codebook == "midrise" else n / (n - 1)
    rms, bound = float(law.rms), np.inf
    for l, r, ml, mr in zip(knots, knots[1:], values, values[1:], strict=False):
        c = min(largest, (rms / l if l > 0 else np.inf) + 1 / (n - 1)) ** 2
        flat = float(law.tail(largest * r, 2))
        if codebook == "midtread" and l > 0:
            beyond, reach = second_moments(law, l / (n - 1))
            c = min(c, largest**2 * float(law.tail(l / (n - 1), 0)), float(reach) / l**2)
            flat += float(law.power - beyond)
        a = np.linspace(l, r, 41)
        lowest = np.min(ml + (mr - ml) * (a - l) / (r - l) - c * (a - l) * (r - a))
        bound = min(bound, max(lowest, min(flat, ml, mr)))
    return bound


@pytest.mark.parametrize("codebook", ["midrise", "midtread"])
@pytest.mark.parametrize("bits", [2, 4, 6])
@pytest.mark.parametrize("law", CASES, ids=repr)
def test_scan_certificate(law, bits, codebook):
    best = optimal(law, bits, codebook)
    c = best.certificate
    assert c.method == "scan"
    assert c.gap <= 1.0001e-8
    (knots,), (values,) = c.knots, c.values
    assert knots[0] == 0
    assert np.all(np.diff(knots) > 0)
    np.testing.assert_allclose(values, clipping.mse(law, knots, bits, codebook), rtol=1e-9, atol=1e-15)
    by_hand = lower_bound_by_hand(law, knots, values, bits, codebook)
    assert best.mse * (1 - 1.1e-8) <= by_hand + 1e-14
    # Beyond the last knot: the two values nearest zero are +-Delta/2 (midrise); zero alone serves |x| < Delta/2, or the
    # tails fall so fast that the error no longer does (midtread).
    end, n = knots[-1], 2**bits
    if codebook == "midrise":
        assert end / (n - 1) - float(law.rms) >= np.sqrt(best.mse) * (1 - 1e-9)
    else:
        t = end / (n - 1) * np.geomspace(1, 1e3, 100)
        falling = all(np.all(np.diff(t**2 * tail) <= 0) for tail in (law.above(t, 0), law.below(-t, 0)))
        assert falling or float(law.power - second_moments(law, t[0])[0]) >= best.mse
        assert values[-1] >= best.mse
    # A fine brute-force scan finds nothing better either.
    grid = np.linspace(0, 12 * float(law.rms), 6001)
    assert clipping.mse(law, grid, bits, codebook).min() >= best.mse * (1 - 1e-9)
    assert c.bracket_slopes[0] < 0 < c.bracket_slopes[1]


@pytest.mark.parametrize("law", CASES, ids=repr)
def test_in_range_certificate(law):
    for bits in (2, 4):
        best = optimal(law, bits, objective="in_range")
        grid = np.linspace(0, 12 * float(law.rms), 6001)
        assert clipping.mse(law, grid, bits, objective="in_range").min() >= best.certificate.lower_bound
        assert best.certificate.gap <= 1.001e-6
        assert best.mse >= best.certificate.lower_bound


@settings(deadline=None, max_examples=40)
@given(
    st.integers(0, 10_000),
    st.sampled_from(["midrise", "midtread"]),
    st.sampled_from(["exact", "in_range"]),
    st.integers(2, 4),
)
def test_scans_are_global_on_small_samples_with_many_local_minima(seed, codebook, objective, bits):
    rng = np.random.default_rng(seed)
    n = int(rng.integers(minimum_samples(bits), 200))
    law = Empirical(rng.standard_t(3, n) * 10.0 ** rng.integers(-3, 3) + rng.integers(0, 2) * rng.normal())
    best = optimal(law, bits, codebook, objective)
    grid = np.geomspace(1e-3, 30, 4000) * float(law.rms)
    assert clipping.mse(law, grid, bits, codebook, objective).min() >= best.mse - 1e-6 * best.mse - 1e-12 * law.power


def test_local_minima_of_a_small_sample():
    """128 Gaussian samples at INT4: several local minima; the certified one is the lowest."""
    law = Empirical(np.random.default_rng(0).standard_normal(128))
    a = np.linspace(0.5, 6, 20_001)
    m = clipping.mse(law, a)
    minima = np.flatnonzero((m[1:-1] < m[:-2]) & (m[1:-1] < m[2:])) + 1
    assert len(minima) >= 3
    assert optimal(law).mse <= m[minima].min() + 1e-12


# Properties


@settings(deadline=None, max_examples=25)
@given(
    laws(),
    st.floats(1e-3, 1e3),
    st.sampled_from(["midrise", "midtread"]),
    st.sampled_from(["aciq", "in_range", "exact"]),
)
def test_scale_equivariance(law, factor, codebook, objective):
    """alpha(c X) = c alpha(X), MSE(c X) = c^2 MSE(X)."""

    def scaled(one):
        if isinstance(one, Mixture):
            return Mixture([scaled(part) for part in one.laws], one.weights)
        parameters = {k: v * (factor if k in ("sigma", "mean") else 1) for k, v in one._parameters.items()}
        return type(one)(**parameters)

    first, second = optimal(law, 4, codebook, objective), optimal(scaled(law), 4, codebook, objective)
    assert second.mse == pytest.approx(factor**2 * first.mse, rel=3e-6)
    if objective == "aciq":
        assert second.alpha == pytest.approx(factor * first.alpha, rel=1e-9)
    else:
        # Two clips of nearly the same error may trade places; each is optimal for the other within the certificate.
        other = clipping.mse(law, second.alpha / factor, 4, codebook, objective)
        assert other == pytest.approx(first.mse, rel=3e-6)


@settings(deadline=None, max_examples=25)
@given(laws(), st.sampled_from(["aciq", "in_range", "exact"]))
def test_more_bits_never_hurt(law, objective):
    errors = [float(optimal(law, bits, "midrise", objective).mse) for bits in range(2, 7)]
    assert all(later < earlier for earlier, later in pairwise(errors))
    if objective == "aciq":
        clips = [float(optimal(law, bits, objective="aciq").alpha) for bits in range(2, 9)]
        assert all(later > earlier for earlier, later in pairwise(clips))


def test_thousands_of_problems_at_once_equal_one_at_a_time():
    nu, sigma = np.linspace(2.2, 30, 60)[:, None], np.geomspace(0.01, 100, 40)
    for objective in ("aciq", "in_range", "exact"):
        many = optimal(StudentT(nu, sigma), objective=objective)
        assert many.alpha.shape == (60, 40)
        assert many.certificate.gap.max() <= 1.001e-6
        for i, j in ((0, 0), (17, 5), (59, 39)):
            one = optimal(StudentT(nu[i, 0], sigma[j]), objective=objective)
            assert many.alpha[i, j] == pytest.approx(one.alpha, rel=1e-9)
            assert many.mse[i, j] == pytest.approx(one.mse, rel=1e-9)


def test_a_histogram_law_gives_what_the_histogram_solver_gives():
    rng = np.random.default_rng(0)
    histogram = np.stack([log_histogram(rng.standard_t(5, 40_000)), log_histogram(rng.normal(0, 0.1, 40_000))])
    for objective in ("aciq", "in_range", "exact"):
        certified = optimal(Empirical.from_histogram(histogram), objective=objective)
        alpha, error = clipping.optimal_histogram(histogram, objective=objective)
        np.testing.assert_allclose(error, certified.mse, rtol=1e-5)
        np.testing.assert_allclose(alpha, certified.alpha, rtol=5e-3)


# OCTAV


@pytest.mark.parametrize("law", [Gaussian(), Laplace(3), StudentT(5), Uniform()], ids=repr)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_octav_is_its_fixed_point(law, bits):
    found = octav(law, bits, tolerance=1e-10)
    a, c = float(found.alpha), 4.0**-bits / 3
    assert found.converged
    above = float(law.tail(a, 1)) + a * float(law.tail(a, 0))
    mass = float(law.tail(a, 0))
    assert a == pytest.approx(above / (c * (1 - mass) + mass), rel=1e-9)
    assert np.all(np.diff(found.trace)[:3] > 0)
    assert octav(law, bits).steps <= 14
    assert found.trace[1] == pytest.approx(float(law.mean_abs))


def test_octav_misses_the_in_range_optimum_by_little_at_four_bits():
    """0.013 % of error for a Gaussian at 4 bits, under OCTAV's own constant; 0.35 % at 2 bits, 1.7 % for a uniform
    law there.
    """
    for law, bits, low, high in (
        (Gaussian(), 4, 1.2e-4, 1.5e-4),
        (Gaussian(), 2, 3e-3, 4e-3),
        (Uniform(), 2, 0.016, 0.018),
    ):
        c = 4.0**-bits / 3

        def error(a, law=law, c=c):
            return float(law.tail(a, 2) + c * a**2 * (1 - law.tail(a, 0)))

        best = optimize.minimize_scalar(error, bounds=(0.5, 6), method="bounded", options={"xatol": 1e-10}).fun
        assert low < error(float(octav(law, bits).alpha)) / best - 1 < high


def test_octav_reports_when_it_stops_early():
    found = octav(Gaussian(), 4, max_steps=3)
    assert not found.converged
    assert found.steps == 3


# Samples


def test_interval_shrinks_with_the_root_of_the_sample_and_scales():
    x = np.random.default_rng(0).standard_normal(512_000)
    width = [np.diff(optimal(Empirical(x[:n]), objective="aciq").interval)[0] for n in (32_000, 128_000, 512_000)]
    assert width[0] > 1.6 * width[1] > 2.5 * width[2]
    one, big = (optimal(Empirical(x[:32_000] * scale), objective="aciq").interval for scale in (1, 2.0**20))
    np.testing.assert_allclose(big, np.array(one) * 2.0**20, rtol=1e-2)


def test_sample_size_advice_is_right_in_simulation():
    n = int(samples_for_interval(Laplace(), 0.05))
    clips = [
        float(optimal(Empirical(np.random.default_rng(seed).laplace(size=n)), objective="aciq").alpha)
        for seed in range(300)
    ]
    half_width = 1.96 * np.std(clips) / np.mean(clips)
    assert half_width == pytest.approx(0.05, rel=0.15)
    assert samples_for_interval(StudentT(2.5), 0.05) > 10 * samples_for_interval(Gaussian(), 0.05)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="samples: expected at least 64 values for 4 bits"):
        optimal(Empirical(np.arange(63.0)))
    assert optimal(Empirical(np.arange(64.0))).alpha > 0
    assert minimum_samples(8) == 1024


@pytest.mark.parametrize(
    ("c", "codebook", "alpha"),
    [(0.3, "midrise", 0.3), (-0.3, "midrise", 0.3), (0.7, "midtread", 0.75), (-0.8, "midtread", 0.75)],
)
def test_a_constant_gets_the_clip_that_reproduces_it(c, codebook, alpha):
    for objective in ("aciq", "in_range", "exact"):
        best = optimal(Empirical(np.full(100, c)), 4, codebook, objective)
        assert best.certificate.method == "constant"
        assert best.alpha == pytest.approx(alpha)
        assert best.mse == 0
        assert clipping.mse(Empirical([c]), best.alpha, 4, codebook) == pytest.approx(0, abs=1e-15)


def test_zeros_are_refused():
    with pytest.raises(ValueError, match="got values that are all zero"):
        optimal(Empirical(np.zeros(100)))


def test_one_sided_data():
    """All positive: the midrise optimum is that of the symmetrized law, and midtread loses its eighth negative
    value.
    """
    x = np.random.default_rng(0).exponential(size=5000)
    one, both = Empirical(x), Empirical(np.concatenate([x, -x]))
    assert optimal(one).alpha == pytest.approx(float(optimal(both).alpha), rel=1e-9)
    tread = optimal(one, 4, "midtread")
    grid = np.linspace(0.5, 15, 3000)
    assert clipping.mse(one, grid, 4, "midtread").min() >= tread.mse * (1 - 1e-8)


def test_law_of_the_wrong_type_is_refused():
    with pytest.raises(TypeError, match=r"law: expected a clipping law such as Gaussian\(\), got ndarray"):
        optimal(np.ones(100))
    with pytest.raises(ValueError, match="relative_half_width: expected a number between 0 and 1, got 0"):
        samples_for_interval(Gaussian(), 0)
    with pytest.raises(ValueError, match="tolerance: expected a positive number, got 0"):
        octav(Gaussian(), tolerance=0)
    with pytest.raises(ValueError, match="max_steps: expected at least 1, got 0"):
        octav(Gaussian(), max_steps=0)
