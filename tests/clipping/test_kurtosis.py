"""The rules from the kurtosis: against optima, and the stored coefficients against a fresh fit."""

import numpy as np
import pytest

from la_aciq.clipping import (
    Gaussian,
    GeneralizedGaussian,
    Laplace,
    Mixture,
    StudentT,
    Uniform,
    fit_kurtosis_rule,
    kurtosis_rule,
    mse,
    optimal,
)
from la_aciq.clipping.kurtosis import KAPPA_MAX, reference_laws
from la_aciq.clipping.kurtosis_coefficients import LINEAR, SPLINE, SPLINE_EXCESS


def excess(law, alpha, *problem):
    best = optimal(law, *problem)
    return float(mse(law, alpha * float(law.std), *problem) / best.mse - 1)


@pytest.mark.parametrize(
    ("law", "kappa", "rule", "cost"),
    [
        (Gaussian(), 0, 2.50, 0.001),
        (StudentT(10), 1, 2.71, 0.038),
        (StudentT(6), 3, 2.92, 0.076),
        (Laplace(), 3, 2.92, 0.14),
        (StudentT(5), 6, 3.08, 0.080),
        (GeneralizedGaussian(0.5), 22.2, 3.44, 0.38),
        (GeneralizedGaussian(4), -0.81, 2.5, 0.32),
        (Uniform(), -1.2, 2.5, 1.24),
    ],
)
def test_published_rule_costs_what_the_theory_page_says(law, kappa, rule, cost):
    assert law.kurtosis == pytest.approx(kappa, abs=0.012)
    alpha = kurtosis_rule(float(law.kurtosis), coefficients="published")
    assert alpha == pytest.approx(rule, abs=0.006)
    assert excess(law, alpha, 4, "midrise", "aciq") == pytest.approx(cost, rel=0.05, abs=6e-4)


@pytest.mark.parametrize("codebook", ["midrise", "midtread", "aciq"])
@pytest.mark.parametrize("bits", [2, 4])
def test_stated_worst_cases_hold_between_the_fitted_points(bits, codebook):
    problem = (bits, "midrise", "aciq") if codebook == "aciq" else (bits, codebook, "exact")
    rule = {"bits": bits, "codebook": problem[1], "objective": problem[2]}
    kappas = [-1.15, -0.75, -0.1, 0.05, 0.8, 2.4, 5.0, 10.5, 19.0, KAPPA_MAX]
    worst = {"fitted": 0.0, "spline": 0.0}
    for kappa in kappas:
        for law in reference_laws(kappa):
            assert law.kurtosis == pytest.approx(kappa, abs=1e-6)
            for name in worst:
                if name == "spline" or kappa >= 0:
                    worst[name] = max(
                        worst[name], excess(law, kurtosis_rule(kappa, coefficients=name, **rule), *problem)
                    )
    assert worst["fitted"] <= LINEAR[codebook, bits][2] * 1.03 + 2e-4
    assert worst["spline"] <= SPLINE_EXCESS[codebook, bits][0] * 1.03 + 2e-4
    # The statement is not slack: the largest kurtosis is where both rules are near their worst.
    assert worst["spline"] >= 0.5 * SPLINE_EXCESS[codebook, bits][0]


def test_stored_coefficients_are_what_a_fresh_fit_gives():
    fit = fit_kurtosis_rule(4, "midrise", "aciq")
    c, d, worst = LINEAR["aciq", 4]
    assert fit.linear_excess == pytest.approx(worst, rel=2e-3)
    logs = np.log1p(np.linspace(0, KAPPA_MAX, 20))
    # The minimax line is not unique where its worst case is one point; both lines must do as well.
    np.testing.assert_allclose(fit.linear[0] + fit.linear[1] * logs, c + d * logs, rtol=0.02)
    np.testing.assert_allclose(fit.spline, SPLINE["aciq", 4], rtol=1e-3)
    assert fit.floor == pytest.approx(SPLINE_EXCESS["aciq", 4][1], rel=5e-3)
    assert fit.floor <= fit.spline_excess + 1e-9


def test_spline_beats_the_logarithm_where_the_claim_is_made():
    """At 6 to 8 bits on its whole domain, and for light tails at any bits."""
    for bits in (6, 7, 8):
        for kind in ("midrise", "midtread"):
            assert SPLINE_EXCESS[kind, bits][0] < LINEAR[kind, bits][2]
    light = Uniform()
    assert excess(light, kurtosis_rule(-1.2, coefficients="spline"), 4) < 1e-3
    assert excess(light, kurtosis_rule(-1.2, coefficients="fitted"), 4) > 1


def test_kurtosis_does_not_determine_the_clip():
    """Scale mixtures of variance 1 and kurtosis 3: p of them at the large variance; clips from 2.55 to 3.69 sigma."""

    def mixture(p):
        small, large = 1 - np.sqrt(p / (1 - p)), 1 + np.sqrt((1 - p) / p)
        return Mixture([Gaussian(np.sqrt(small)), Gaussian(np.sqrt(large))], [1 - p, p])

    clips = []
    for p in np.geomspace(1e-4, 0.499, 60):
        law = mixture(p)
        assert law.variance == pytest.approx(1, rel=1e-9)
        assert law.kurtosis == pytest.approx(3, rel=1e-9)
        clips.append(float(optimal(law, objective="aciq").alpha))
    assert min(clips) == pytest.approx(2.556, abs=0.002)  # p = 1e-4; the Gaussian's 2.523 in the limit
    assert max(clips) == pytest.approx(3.69, abs=0.01)


def test_shapes_and_limits():
    assert isinstance(kurtosis_rule(3.0), float)
    assert kurtosis_rule(np.zeros((2, 3))).shape == (2, 3)
    assert kurtosis_rule(-1.9) == kurtosis_rule(0.0)
    assert kurtosis_rule(np.inf, coefficients="spline") == kurtosis_rule(KAPPA_MAX, coefficients="spline")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kappa": np.nan}, "kappa: expected an excess kurtosis of at least -2, got nan"),
        ({"kappa": -2.1}, "got -2.1"),
        ({"kappa": np.inf}, "kappa: expected finite values for coefficients='fitted'"),
        ({"kappa": 1, "bits": 5, "coefficients": "published"}, "bits: expected 4 for coefficients='published', got 5"),
        (
            {"kappa": 1, "coefficients": "guessed"},
            "coefficients: expected one of fitted, published, spline, got 'guessed'",
        ),
        ({"kappa": 1, "objective": "in_range"}, "objective: expected one of exact, aciq, got 'in_range'"),
        ({"kappa": 1, "bits": 1}, "bits: expected an integer from 2 to 8, got 1"),
        ({"kappa": 1, "codebook": "x"}, "codebook: expected one of"),
    ],
)
def test_bad_input(arguments, message):
    with pytest.raises(ValueError, match=message):
        kurtosis_rule(**arguments)
    with pytest.raises(ValueError, match=r"kappa: expected a number from -1.2 to 22.2, got 30"):
        reference_laws(30)
