"""Laws against SciPy's distributions by quadrature, mpmath in the tails, and direct sums for samples."""

from itertools import pairwise

import mpmath
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import integrate, stats
from strategies import laws
from synthetic_profile import log_histogram

from la_aciq import clipping
from la_aciq.clipping import Empirical, Gaussian, GeneralizedGaussian, Laplace, Logistic, Mixture, StudentT, Uniform

S3 = np.sqrt(3)
# Each law beside SciPy's of unit variance, and mpmath's unnormalized density in z with its scale.
LAWS = {
    "gaussian": (Gaussian(), stats.norm()),
    "laplace": (Laplace(), stats.laplace(scale=1 / np.sqrt(2))),
    "logistic": (Logistic(), stats.logistic(scale=S3 / np.pi)),
    "uniform": (Uniform(), stats.uniform(-S3, 2 * S3)),
    "t2.1": (StudentT(2.1), stats.t(2.1, scale=np.sqrt(0.1 / 2.1))),
    "t3": (StudentT(3), stats.t(3, scale=np.sqrt(1 / 3))),
    "t5": (StudentT(5), stats.t(5, scale=np.sqrt(3 / 5))),
    "t30": (StudentT(30), stats.t(30, scale=np.sqrt(28 / 30))),
    "t300": (StudentT(300), stats.t(300, scale=np.sqrt(298 / 300))),
    "gg0.5": (GeneralizedGaussian(0.5), stats.gennorm(0.5, scale=1 / np.sqrt(120))),
    "gg1.5": (GeneralizedGaussian(1.5), stats.gennorm(1.5, scale=1 / stats.gennorm(1.5).std())),
    "gg8": (GeneralizedGaussian(8), stats.gennorm(8, scale=1 / stats.gennorm(8).std())),
}
TAIL_LAWS = [name for name in LAWS if name not in ("uniform", "gg8")]


def partial_moment(law, t, order, upper=np.inf):
    """E[(X - t)^order ; X > t] of a SciPy law by adaptive quadrature, split at the scales of the density."""
    cuts = [t, *[c for c in (0.0, 0.3, 1.0, S3, 3.0, 10.0, 100.0) if c > t and c < upper], upper]
    return sum(
        integrate.quad(lambda x: (x - t) ** order * law.pdf(x), lo, hi, epsabs=0, epsrel=1e-12, limit=400)[0]
        for lo, hi in pairwise(cuts)
    )


@pytest.mark.parametrize("name", LAWS)
@pytest.mark.parametrize("order", [0, 1, 2])
def test_body_agrees_with_quadrature(name, order):
    ours, scipys = LAWS[name]
    upper = S3 if name == "uniform" else np.inf
    for a in (0.0, 0.1, 0.7, 1.5, 2.5):
        if (name == "gg8" and a > 1.5) or a >= upper:
            continue
        if name == "t2.1" and order == 2:
            continue  # quadrature of x^-1.1 on the half line is not accurate; the tail test covers it with mpmath
        expected = 2 * partial_moment(scipys, a, order, upper)
        assert ours.tail(a, order) == pytest.approx(expected, rel=1e-10, abs=1e-300), a


def exact_tail(name, a, order):
    """The same from mpmath's special functions at 60 digits."""
    mp, a = mpmath.mp, mpmath.mpf(float(a))
    with mp.workdps(60):
        if name == "gaussian":
            q, phi = mp.erfc(a / mp.sqrt(2)) / 2, mp.exp(-(a**2) / 2) / mp.sqrt(2 * mp.pi)
            return 2 * (q, phi - a * q, (1 + a**2) * q - a * phi)[order]
        if name == "laplace":
            return mp.exp(-mp.sqrt(2) * a) * (1, 1 / mp.sqrt(2), 1)[order]
        if name == "logistic":
            s = mp.sqrt(3) / mp.pi
            w = mp.exp(-a / s)
            return 2 * (w / (1 + w), s * mp.log(1 + w), -2 * s**2 * mp.polylog(2, -w))[order]
        if name.startswith("t"):
            nu = mpmath.mpf(name[1:])
            s = mp.sqrt((nu - 2) / nu)
            c = mp.gamma((nu + 1) / 2) / (mp.gamma(nu / 2) * mp.sqrt(nu * mp.pi)) / s

            def moment(k):
                # E[X^k ; X > a], by the substitution that turns it into an incomplete beta function
                x = 1 / (1 + (a / s) ** 2 / nu)
                p, q = (nu - k) / 2, mpmath.mpf(k + 1) / 2
                return c * s ** (k + 1) * nu ** (mpmath.mpf(k + 1) / 2) / 2 * mp.betainc(p, q, 0, x)

            m = [moment(k) for k in range(3)]
        else:
            beta = mpmath.mpf(name[2:])
            s = mp.sqrt(mp.gamma(1 / beta) / mp.gamma(3 / beta))
            m = [s**k * mp.gammainc((k + 1) / beta, (a / s) ** beta) / mp.gamma(1 / beta) / 2 for k in range(3)]
        return 2 * (m[0], m[1] - a * m[0], m[2] - 2 * a * m[1] + a**2 * m[0])[order]


@pytest.mark.parametrize("name", TAIL_LAWS)
def test_tails_down_to_1e_12_agree_with_mpmath(name):
    ours, scipys = LAWS[name]
    for mass in (1e-2, 1e-4, 1e-6, 1e-9, 1e-12):
        a = scipys.isf(mass / 2)
        for order in range(3):
            expected = exact_tail(name, a, order)
            relative = float(abs(mpmath.mpf(float(ours.tail(a, order))) / expected - 1))
            assert relative < 1e-6, (mass, order, relative)
            if mass >= 1e-4:
                assert relative < 1e-10, (mass, order, relative)


@pytest.mark.parametrize("name", LAWS)
def test_moments_and_entropy(name):
    ours, scipys = LAWS[name]
    kurtosis = float(scipys.stats("k"))
    assert ours.variance == pytest.approx(1, rel=1e-12)
    assert ours.tail(0.0, 2) == pytest.approx(1, rel=1e-9)
    assert ours.tail(0.0, 0) == pytest.approx(1, rel=1e-12)
    assert ours.skewness == 0
    assert ours.kurtosis == (np.inf if name in ("t2.1", "t3") else pytest.approx(kurtosis, rel=1e-10, abs=1e-12))
    assert ours.entropy() == pytest.approx(float(scipys.entropy()), rel=1e-9)
    x = np.array([-2.0, -0.4, 0.0, 1.1, 1.7])
    np.testing.assert_allclose(ours.density(x), scipys.pdf(x), rtol=1e-11)


def test_large_degrees_of_freedom_approach_the_gaussian():
    a = np.array([0.5, 2.5, 5.0])
    for order in range(3):
        np.testing.assert_allclose(StudentT(1e9).tail(a, order), Gaussian().tail(a, order), rtol=1e-6)


@pytest.mark.parametrize("name", ["gaussian", "laplace", "logistic", "t5", "gg1.5"])
@pytest.mark.parametrize(("mean", "sigma"), [(0.4, 2.0), (-3.0, 0.5)])
def test_shifted_and_scaled_laws_are_one_sided_integrals(name, mean, sigma):
    base, scipys = LAWS[name]
    extra = {key: value for key, value in base._parameters.items() if key not in ("sigma", "mean")}
    law = type(base)(sigma=sigma, mean=mean, **extra)
    for t in (-4.0, -0.3, 0.0, 1.2):
        for order in range(3):
            z = (t - mean) / sigma
            assert law.above(t, order) == pytest.approx(sigma**order * partial_moment(scipys, z, order), rel=1e-9)
            assert law.below(t, order) == pytest.approx(sigma**order * partial_moment(scipys, -z, order), rel=1e-9)
    assert law.power == pytest.approx(mean**2 + sigma**2)


def test_arrays_of_laws_are_each_law():
    nu, sigma = np.array([[3.0], [5.0]]), np.array([0.5, 1.0, 2.0])
    law = StudentT(nu, sigma)
    assert law.shape == (2, 3)
    a = np.linspace(0.1, 3, 6).reshape(2, 3)
    for i, j in np.ndindex(2, 3):
        one = StudentT(nu[i, 0], sigma[j])
        assert law.tail(a, 1)[i, j] == pytest.approx(float(one.tail(a[i, j], 1)), rel=1e-14)
        assert law.take(np.array([3 * i + j])).tail(1.0, 2)[0] == pytest.approx(float(one.tail(1.0, 2)), rel=1e-14)


# Mixtures


def test_mixture_moments_by_quadrature_with_the_skewness_term():
    """0.7 Exp(1) + 0.3 N(-2, 1): 0.577 with the skewness of the first part, -0.027 without it."""
    rng = np.random.default_rng(0)
    exponential = Empirical(stats.expon.ppf((np.arange(200_000) + 0.5) / 200_000))
    mixture = Mixture([exponential, Gaussian(1, mean=-2)], [0.7, 0.3])

    def raw(k):
        return 0.7 * float(stats.expon.moment(k)) + 0.3 * float(stats.norm(-2, 1).moment(k))

    m = raw(1)
    mu2, mu4 = raw(2) - m**2, raw(4) - 4 * m * raw(3) + 6 * m**2 * raw(2) - 3 * m**4
    assert mu4 / mu2**2 - 3 == pytest.approx(0.577, abs=5e-4)
    assert mixture.kurtosis == pytest.approx(mu4 / mu2**2 - 3, abs=2e-3)
    x = np.concatenate([rng.exponential(size=700_000), rng.normal(-2, 1, 300_000)])
    assert mixture.skewness == pytest.approx(stats.skew(x), abs=0.01)


def test_mixture_kurtosis_is_not_the_weighted_mean():
    assert Mixture([Gaussian(1), Gaussian(3)], [0.9, 0.1]).kurtosis == pytest.approx(16 / 3, rel=1e-12)


def test_mixture_tails_are_weighted_sums_and_entropy_is_the_integral():
    parts, weights = [Gaussian(1, mean=0.5), Laplace(2), StudentT(3, 0.5, mean=-1)], [0.2, 0.5, 0.3]
    mixture = Mixture(parts, weights)
    scipys = [stats.norm(0.5, 1), stats.laplace(0, np.sqrt(2)), stats.t(3, -1, 0.5 / S3)]

    def density(x):
        return sum(w * s.pdf(x) for w, s in zip(weights, scipys, strict=True))

    for a in (0.2, 1.0, 4.0):
        for order in range(3):
            expected = sum(w * float(p.tail(a, order)) for w, p in zip(weights, parts, strict=True))
            assert mixture.tail(a, order) == pytest.approx(expected, rel=1e-13)
    entropy = sum(
        integrate.quad(lambda x: -density(x) * np.log(density(x)), lo, hi, limit=400)[0]
        for lo, hi in [(-500, -20), (-20, -1), (-1, 0), (0, 0.5), (0.5, 20), (20, 500)]
    )
    assert mixture.entropy() == pytest.approx(entropy, abs=1e-5)


def test_array_of_mixtures_with_weights_per_mixture():
    weights = np.array([[0.9, 0.1], [0.5, 0.5], [0.0, 1.0]])
    law = Mixture([Gaussian(), StudentT(3, [1.0, 2.0, 3.0])], weights)
    assert law.shape == (3,)
    one = Mixture([Gaussian(), StudentT(3, 2.0)], [0.5, 0.5])
    assert law.tail(1.0, 1)[1] == pytest.approx(float(one.tail(1.0, 1)), rel=1e-14)
    assert law.take(np.array([2, 1])).tail(1.0, 1)[1] == pytest.approx(float(one.tail(1.0, 1)), rel=1e-14)
    # A part of weight zero leaves no trace, although its fourth moment is infinite.
    assert Mixture([Gaussian(), StudentT(3)], [1.0, 0.0]).kurtosis == 0


# Properties: every law, any scale


@settings(deadline=None, max_examples=60)
@given(laws())
def test_tails_are_consistent(law):
    """T1' = -T0 and T2' = -2 T1 (central differences), all decreasing and convex, with the right values at 0."""
    rms = float(law.rms)
    a = np.linspace(0.05, 4, 40) * rms
    h = 1e-4 * rms
    # The density of a uniform or a narrow law may jump inside a difference: one sided bounds hold all the same.
    for order, slope in ((1, lambda x: -law.tail(x, 0)), (2, lambda x: -2 * law.tail(x, 1))):
        difference = (law.tail(a + h, order) - law.tail(a - h, order)) / (2 * h)
        low, high = np.minimum(slope(a - h), slope(a + h)), np.maximum(slope(a - h), slope(a + h))
        room = 1e-8 * rms ** (order - 1)
        assert np.all(difference >= low - room)
        assert np.all(difference <= high + room)
    assert np.all(np.diff(law.tail(a, 1)) <= 1e-12 * rms)
    assert law.tail(0.0, 2) == pytest.approx(float(law.power), rel=1e-8)


@settings(deadline=None, max_examples=30)
@given(laws())
def test_a_mixture_of_one_is_its_part(law):
    mixture = Mixture([law], [1.0])
    for a in (0.0, 0.7, 3.0):
        for order in range(3):
            assert mixture.tail(a * law.rms, order) == law.tail(a * law.rms, order)
    for name in ("mean", "variance", "third_moment", "fourth_moment"):
        assert getattr(mixture, name) == getattr(law, name)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.floats(-1e3, 1e3).map(lambda x: round(x, 12)), min_size=1, max_size=30), st.floats(0, 500))
def test_samples_are_plain_means(values, a):
    x, law = np.asarray(values), Empirical(values)
    scale = np.mean(x**2) + a**2
    for order in range(3):
        assert law.tail(a, order) == pytest.approx(
            np.mean(np.where(np.abs(x) > a, np.maximum(np.abs(x) - a, 0) ** order, 0)), abs=1e-13 * max(scale, 1)
        )
    assert law.mean == pytest.approx(x.mean())
    assert law.variance == pytest.approx(x.var(), abs=1e-9 * max(scale, 1))


def test_sample_moments_survive_a_large_mean():
    x = 1e6 + np.random.default_rng(0).standard_t(6, 5000)
    law = Empirical(x)
    assert law.kurtosis == pytest.approx(stats.kurtosis(x), rel=1e-9)
    assert law.skewness == pytest.approx(stats.skew(x), rel=1e-7)
    assert np.isnan(Empirical(np.full(9, 0.3)).kurtosis)


def test_sample_entropy_is_near_the_law_and_minus_infinite_for_ties():
    x = np.random.default_rng(0).normal(0, 2, 50_000)
    assert Empirical(x).entropy() == pytest.approx(float(stats.norm(0, 2).entropy()), abs=0.02)
    assert Empirical(np.repeat([1.0, 2.0], 50)).entropy() == -np.inf


# The law of a calibration histogram


@pytest.fixture(scope="module")
def sample_and_histogram():
    x = np.random.default_rng(1).standard_t(6, 300_000).astype(np.float32).astype(np.float64)
    return x, log_histogram(x)


def test_histogram_law_is_exact_at_bin_edges(sample_and_histogram):
    x, histogram = sample_and_histogram
    law, magnitude = Empirical.from_histogram(histogram), np.abs(x)
    edges = np.array([0.25, 1.0, 1.125, 2.5, 5.0, 9.0])
    counted = np.array([(magnitude >= e).mean() for e in edges])
    np.testing.assert_allclose(law.tail(edges, 0), counted, rtol=1e-12)
    # Bins that hold one or two values far out have their mean moved into reach of a linear density: 1e-7 here.
    excess = [np.maximum(magnitude - e, 0).mean() for e in edges]
    np.testing.assert_allclose(law.tail(edges, 1), excess, rtol=0, atol=1e-6)
    sparse_free = np.where(np.arange(258) < 1 + 8 * 19, histogram[:, 0], 0)  # values below 8
    cut = Empirical.from_histogram(np.stack([sparse_free, np.where(sparse_free > 0, histogram[:, 1], 0)], axis=-1))
    inside = magnitude[(magnitude < 8) & (magnitude >= 2.0**-16)]
    for e in edges[:4]:
        expected = np.maximum(inside - e, 0).sum() / (magnitude < 8).sum()
        assert cut.tail(e, 1) == pytest.approx(expected, rel=1e-11)
    assert law.mean_abs == pytest.approx(magnitude.mean(), rel=1e-6)  # bin 0 knows no sum


def test_histogram_law_is_close_between_edges(sample_and_histogram):
    x, histogram = sample_and_histogram
    law, magnitude = Empirical.from_histogram(histogram), np.abs(x)
    a = np.linspace(0.11, 4.5, 60)
    for order, tolerance in ((0, 0.004), (1, 0.002), (2, 0.002)):
        direct = np.array([np.where(magnitude > t, (magnitude - t) ** order, 0).mean() for t in a])
        np.testing.assert_allclose(law.tail(a, order), direct, rtol=0.02, atol=tolerance * magnitude.mean())
    assert law.power == pytest.approx(np.mean(x**2), rel=1e-4)
    assert law.kurtosis == pytest.approx(stats.kurtosis(x), rel=0.02)
    assert law.entropy() == pytest.approx(float(stats.t(6).entropy()), abs=0.01)


def test_histogram_law_is_self_consistent(sample_and_histogram):
    law = Empirical.from_histogram(sample_and_histogram[1])
    for a in (0.3, 1.07, 2.9):
        mass = integrate.quad(lambda x: float(law.density(x)), a, 200, limit=2000, points=np.geomspace(a, 200, 30))[0]
        assert law.tail(a, 0) == pytest.approx(2 * mass, rel=1e-4)
    level = np.array([[0.001, 0.2, 0.5, 0.9, 0.9999]])
    np.testing.assert_allclose(1 - law.tail(law.quantiles(level), 0), level, rtol=1e-9, atol=1e-9)


def test_values_outside_the_bins():
    tiny, huge = Empirical.from_histogram(log_histogram(np.zeros(10))), log_histogram(np.full(10, 1e6))
    assert 0 < tiny.rms < 2.0**-16
    law = Empirical.from_histogram(huge)
    assert law.tail(2.0**16, 0) == 0
    assert law.tail(1000.0, 1) == pytest.approx(2.0**16 - 1000)


# Bad input


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Gaussian(-1), "sigma: expected positive values, got -1"),
        (lambda: Gaussian(0), "sigma: expected positive values, got 0"),
        (lambda: Laplace(np.nan), "sigma: expected finite values, got nan"),
        (lambda: Logistic(np.inf), "sigma: expected finite values, got inf"),
        (lambda: Gaussian(1, mean=np.nan), "mean: expected finite values, got nan"),
        (lambda: StudentT(2), "nu: expected values above 2"),
        (lambda: StudentT([5, 1.5]), "got 1.5"),
        (lambda: GeneralizedGaussian(0), "beta: expected positive values, got 0"),
        (lambda: Gaussian([1, 2], mean=[1, 2, 3]), "expected shapes that broadcast together"),
        (lambda: Mixture([], []), "laws: expected at least one law"),
        (lambda: Mixture([Gaussian()], [0.5]), "weights: expected a sum of one, got 0.5"),
        (lambda: Mixture([Gaussian(), Laplace()], [1.5, -0.5]), "weights: expected values of at least 0, got -0.5"),
        (lambda: Mixture([Gaussian(), Laplace()], [1.0]), "expected one weight per law"),
        (lambda: Mixture([Gaussian(), Laplace()], [np.nan, 1]), "weights: expected finite values, got nan"),
        (lambda: Empirical([]), "samples: expected at least one value"),
        (lambda: Empirical([1.0, np.inf]), "samples: expected finite values, got inf"),
        (lambda: Empirical.from_histogram(np.zeros((3, 3), int)), "histogram: expected shape"),
        (lambda: Empirical.from_histogram(np.zeros((258, 2), int)), "histogram: expected mass"),
        (
            lambda: Empirical.from_histogram(np.full((258, 2), -1)),
            "histogram: expected counts and sums of at least 0, got -1",
        ),
    ],
)
def test_bad_laws_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_bad_types_are_refused():
    with pytest.raises(TypeError, match="sigma: expected a number"):
        Gaussian("wide")
    with pytest.raises(TypeError, match="laws: expected clipping laws, got float"):
        Mixture([1.0], [1.0])
    with pytest.raises(TypeError, match="histogram: expected integers"):
        Empirical.from_histogram(np.zeros((258, 2)))
    assert not hasattr(clipping, "torch")
