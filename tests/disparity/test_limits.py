"""Rate-distortion limits and the best scalar quantizer, against published values and independent iterations."""

import numpy as np
import pytest
from scipy import stats
from synthetic_profile import log_histogram, normal, student, synthetic_profile

from la_aciq.clipping import (
    Empirical,
    Gaussian,
    GeneralizedGaussian,
    Laplace,
    Logistic,
    Mixture,
    StudentT,
    Uniform,
    optimal,
)
from la_aciq.disparity import (
    entropy_power,
    gaussian_distortion,
    language_limits,
    limits,
    lloyd_max,
    panter_dite,
    panter_dite_constant,
    shannon_lower_bound,
)


def test_each_bit_quarters_the_gaussian_distortion():
    assert gaussian_distortion(Gaussian(3), 4) == pytest.approx(9 / 256)
    assert gaussian_distortion(Gaussian(), 3) / gaussian_distortion(Gaussian(), 4) == pytest.approx(4)


@pytest.mark.parametrize(
    ("law", "power"), [(Gaussian(), 1), (Laplace(), 0.865), (StudentT(5), 0.911), (GeneralizedGaussian(0.5), 0.426)]
)
def test_entropy_powers(law, power):
    """Values of the verified theory page; for Laplace e / pi in closed form."""
    assert entropy_power(law) == pytest.approx(power, abs=5e-4)
    assert entropy_power(Laplace(2)) == pytest.approx(4 * np.e / np.pi)
    assert shannon_lower_bound(law, 4) <= gaussian_distortion(law, 4) * (1 + 1e-12)


@pytest.mark.parametrize(
    ("law", "constant"),
    [(Gaussian(), np.sqrt(3) * np.pi / 2), (Laplace(), 4.5), (Uniform(), 1.0), (StudentT(5), 6.58)],
)
def test_panter_dite_constants(law, constant):
    assert panter_dite_constant(law) == pytest.approx(constant, abs=5e-3 if constant == 6.58 else 1e-8)


def lloyd_by_hand(scipys, levels, rounds=4000):
    """Lloyd's iteration on a fine grid of quantiles: no derivative, no partial moments."""
    x = scipys.ppf((np.arange(400_000) + 0.5) / 400_000)
    y = np.quantile(x, (np.arange(levels) + 0.5) / levels)
    total, square = np.concatenate([[0], np.cumsum(x)]), np.mean(x**2)
    for _ in range(rounds):
        i = np.concatenate([[0], np.searchsorted(x, (y[1:] + y[:-1]) / 2), [len(x)]])
        y = np.diff(total[i]) / np.diff(i)
    return y, square - np.sum(np.diff(i) * y**2) / len(x)


@pytest.mark.parametrize(
    ("law", "scipys"),
    [(Gaussian(), stats.norm()), (Laplace(), stats.laplace(scale=np.sqrt(0.5))), (Logistic(1), None)],
)
def test_lloyd_max_against_lloyds_iteration(law, scipys):
    scipys = scipys or stats.logistic(scale=np.sqrt(3) / np.pi)
    for bits in (2, 3, 4):
        ours = lloyd_max(law, bits)
        values, error = lloyd_by_hand(scipys, 2**bits)
        assert ours.residual < 1e-9
        assert ours.mse == pytest.approx(error, rel=2e-3)
        np.testing.assert_allclose(ours.values, values, rtol=0.01, atol=1e-3)


def test_max_1960_nonuniform_quantizer():
    """Gaussian, 4 bits: 0.009497 in Max's table, 0.009501 computed here and by Lloyd's iteration."""
    assert lloyd_max(Gaussian(), 4).mse == pytest.approx(0.009501, abs=5e-7)
    assert lloyd_max(Gaussian(), 2).mse == pytest.approx(0.1175, abs=5e-5)
    assert lloyd_max(Uniform(), 4).mse == pytest.approx(4.0**-4, rel=1e-9)


def test_order_of_the_limits():
    """Shannon <= Gaussian D(R); Shannon <= Lloyd-Max <= clipped uniform; Panter-Dite is reached for many levels."""
    for law in (
        Gaussian(2),
        Laplace(),
        StudentT(5),
        GeneralizedGaussian(0.7),
        Mixture([Gaussian(), Gaussian(3)], [0.8, 0.2]),
    ):
        for bits in (2, 4):
            found = limits(law, bits)
            assert found.shannon <= found.gaussian * (1 + 1e-9)
            assert found.shannon < found.lloyd_max < found.quantizer
        assert lloyd_max(law, 8).mse == pytest.approx(panter_dite(law, 8), rel=0.03)
        assert all(value > 0 for value in limits(law).decibels().values())


def test_gaussian_int4_numbers():
    found = limits(Gaussian())
    assert (round(found.gaussian, 5), round(found.lloyd_max, 5), round(found.quantizer, 5)) == (
        0.00391,
        0.0095,
        0.01154,
    )


def test_histograms_have_the_limits_of_their_law():
    x = np.random.default_rng(0).laplace(scale=3, size=400_000)
    ours, law = limits(Empirical.from_histogram(log_histogram(x))), limits(Laplace(3 * np.sqrt(2)))
    for name in ("shannon", "gaussian", "lloyd_max", "panter_dite", "quantizer"):
        assert getattr(ours, name) == pytest.approx(getattr(law, name), rel=0.03)


def test_language_limits_average_the_layers():
    first = {"a.q_proj": normal(1), "a.down_proj": student(6, 9), "a.k_proj.output": normal(3)}
    second = {name: normal(1) for name in first}
    profile = synthetic_profile({"en": first, "sw": second}, normal(5), values=30_000)
    found = language_limits(profile)
    gauss, heavy = optimal(Gaussian()).normalized_mse, optimal(StudentT(6)).normalized_mse
    assert found["sw"].quantizer == pytest.approx(float(gauss), rel=0.03)
    assert found["en"].quantizer == pytest.approx(float(gauss + heavy) / 2, rel=0.06)
    assert found["en"].shannon < found["en"].lloyd_max < found["en"].quantizer


def test_bad_input():
    with pytest.raises(ValueError, match="law: expected a single law, got 2 of them"):
        lloyd_max(Gaussian([1, 2]))
    with pytest.raises(ValueError, match="bits: expected an integer from 2 to 8, got 0"):
        gaussian_distortion(Gaussian(), 0)
    assert shannon_lower_bound(Empirical(np.repeat([0.0, 1.0], 50)), 4) == 0


def test_lloyd_max_is_the_best_of_many_local_optima():
    """Against Lloyd's iteration on quantiles of the law from 40 random starts: heavy tails and mixtures have many."""
    rng = np.random.default_rng(0)
    for law, bits in (
        (GeneralizedGaussian(0.5), 3),
        (Mixture([Gaussian(1), Gaussian(12)], [0.95, 0.05]), 2),
        (Mixture([Gaussian(0.1, -5), Gaussian(1), Gaussian(0.1, 9)], [0.2, 0.6, 0.2]), 2),
    ):
        ours = lloyd_max(law, bits)
        assert ours.residual <= 1e-6
        best = np.inf
        for _ in range(40):
            values = np.sort(rng.standard_t(2, 2**bits) * float(law.std))
            for _ in range(300):
                cuts = (values[1:] + values[:-1]) / 2
                above = np.concatenate([[1.0], law.above(cuts, 0), [0.0]])
                first = np.concatenate([[float(law.mean)], law.above(cuts, 1) + cuts * above[1:-1], [0.0]])
                mass, sums = -np.diff(above), -np.diff(first)
                values = np.where(mass > 1e-12, sums / np.maximum(mass, 1e-12), values)
            best = min(best, float(law.power - (sums**2 / np.maximum(mass, 1e-12)).sum()))
        assert ours.mse <= best * (1 + 1e-9)


def test_a_quantizer_that_is_not_stationary_is_refused():
    with pytest.raises(ValueError, match="law: expected values that are centroids"):
        lloyd_max(StudentT(2.01), 8)
    assert lloyd_max(GeneralizedGaussian(0.5), 4).mse == pytest.approx(0.02663, abs=5e-6)
