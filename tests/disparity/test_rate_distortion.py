"""The rate-distortion function against closed forms and bounds that hold for every law."""

import numpy as np
import pytest

from la_aciq.clipping import Empirical, Gaussian, GeneralizedGaussian, Laplace, Mixture, StudentT, Uniform
from la_aciq.disparity import lloyd_max, rate_distortion, shannon_lower_bound


@pytest.mark.parametrize("bits", [2, 3, 5])
@pytest.mark.parametrize("sigma", [0.01, 1.0, 30.0])
def test_gaussian_is_its_closed_form(bits, sigma):
    curve = rate_distortion(Gaussian(sigma), bits)
    assert curve.lower * (1 - 1e-4) <= sigma**2 * 4.0**-bits <= curve.upper * (1 + 1e-4)
    assert curve.upper / curve.lower - 1 <= 2e-3


@pytest.mark.parametrize("law", [Laplace(), Uniform(), GeneralizedGaussian(0.5), StudentT(6, mean=0.5)], ids=repr)
def test_it_lies_between_shannon_and_the_best_scalar_quantizer(law):
    curve = rate_distortion(law, 2)
    assert float(shannon_lower_bound(law, 2)) <= curve.upper * (1 + 1e-4)
    assert curve.upper <= float(law.variance) * 4.0**-2 * (1 + 1e-3)
    assert curve.upper < lloyd_max(law, 2).mse


def test_a_laplace_law_is_near_its_shannon_bound_and_a_uniform_one_is_not():
    """Gray 1973: the bound is not attained where the density has an edge."""
    for law, gap in ((Laplace(), 0.003), (Uniform(), 0.03)):
        curve = rate_distortion(law, 4)
        assert (curve.upper / float(shannon_lower_bound(law, 4)) - 1 > 0.01) == (gap > 0.01)


def test_two_far_modes_cost_one_bit():
    """Values far apart tell their mode by one bit: D(R) of the pair is that of one mode at R - 1 bits."""
    pair = Mixture([Gaussian(1, -100), Gaussian(1, 100)], [0.5, 0.5])
    curve = rate_distortion(pair, 3)
    assert curve.lower * 0.999 <= 4.0**-2 <= curve.upper * 1.001


def test_what_has_no_curve_is_refused():
    with pytest.raises(ValueError, match="law: expected a density"):
        rate_distortion(Empirical(np.repeat([1.0, 2.0], 40)))
    with pytest.raises(ValueError, match="bits: expected at most 6, got 7"):
        rate_distortion(Gaussian(), 7)
    with pytest.raises(ValueError, match="tails that a grid of 131072 points reaches"):
        rate_distortion(StudentT(2.05), 4)
