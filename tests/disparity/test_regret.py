"""What sharing costs: against the closed case of Gaussian languages, and by hand on histograms."""

import numpy as np
import pytest
from synthetic_profile import normal, student, synthetic_profile

from la_aciq.clipping import Gaussian, Mixture, histogram_mse, mse, optimal, optimal_histogram, shared
from la_aciq.disparity import regret


@pytest.mark.parametrize(("ratio", "loss"), [(1.1, 0.02), (1.2, 0.09), (1.5, 0.55), (2.0, 1.74)])
def test_two_gaussians_under_a_pooled_clip(ratio, loss):
    """What the narrower of two languages loses under the clip of their pooled law: 2 / 9 / 55 / 174 %."""
    pooled = optimal(Mixture([Gaussian(1), Gaussian(ratio)], [0.5, 0.5]), objective="aciq").alpha
    excess = mse(Gaussian(1), pooled, objective="aciq") / optimal(Gaussian(1), objective="aciq").mse - 1
    assert excess == pytest.approx(loss, abs=0.005)
    # Choosing the clip for the normalized errors instead costs it less.
    fair = shared([Gaussian(1), Gaussian(ratio)], objective="aciq")
    assert mse(Gaussian(1), fair.alpha, objective="aciq") < mse(Gaussian(1), pooled, objective="aciq")


def test_regret_is_the_excess_under_the_mean_objective():
    sigma = {"en": 1.0, "sw": 1.5}
    draws = {
        tag: {"a.q_proj": normal(s), "a.down_proj": normal(1), "a.k_proj.output": normal(s)} for tag, s in sigma.items()
    }
    profile = synthetic_profile(draws, normal(9), values=100_000)
    found = regret(profile)
    assert found.kinds == ("q_proj", "down_proj", "key")
    assert found.languages == ("en", "sw")
    clip = shared([Gaussian(1), Gaussian(1.5)], language_objective="mean")
    expected = clip.errors / float(optimal(Gaussian()).normalized_mse) - 1
    np.testing.assert_allclose(found.excess[0], expected, rtol=0.08)
    np.testing.assert_allclose(found.excess[1], 0, atol=1e-3)
    assert np.all(found.excess >= 0)
    assert found.as_dict()["q_proj"]["sw"] == found.excess[0, 1]


def test_groups_are_added_as_normalized_errors():
    draws = {"en": {"a.q_proj": student(5, 1)}, "sw": {"a.q_proj": student(7, 2)}}
    profile = synthetic_profile(draws, normal(9), values=20_000, groups=3)
    found = regret(profile, 4, "midtread")
    histogram = profile.sites["a.q_proj"].moments.histogram[1:3]
    power = np.array([[histogram_mse(h, 0.0) for h in row] for row in histogram])  # a clip of 0 leaves all of x
    own = optimal_histogram(histogram, 4, "midtread")[1] / power
    grid = np.geomspace(0.5, 20, 4000)
    errors = np.stack([[histogram_mse(h, grid, 4, "midtread") for h in row] for row in histogram]) / power[..., None]
    best = errors[..., :].mean(0).argmin(-1)
    common = np.take_along_axis(errors, np.broadcast_to(best, (2, 3))[..., None], axis=-1)[..., 0]
    np.testing.assert_allclose(found.separate[0], own.mean(1), rtol=1e-3)
    np.testing.assert_allclose(found.shared[0], common.mean(1), rtol=1e-3)


def test_objectives_and_bad_input():
    draws = {"en": {"a.q_proj": normal(1)}, "sw": {"a.q_proj": normal(2)}}
    profile = synthetic_profile(draws, normal(9), values=5000)
    mean, worst = regret(profile), regret(profile, language_objective="minimax")
    assert worst.shared.max() < mean.shared.max()
    with pytest.raises(ValueError, match="language_objective: expected one of"):
        regret(profile, language_objective="best")
    with pytest.raises(ValueError, match="bits: expected an integer from 2 to 8, got 12"):
        regret(profile, bits=12)
