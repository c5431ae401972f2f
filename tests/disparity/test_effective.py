"""Effective laws: exact mixture moments, against pooled samples and brute force; updates leave no
rounding behind.
"""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from synthetic_profile import normal, student, synthetic_profile

from la_aciq import disparity
from la_aciq.clipping import Gaussian, Laplace, Mixture
from la_aciq.disparity import EffectiveLaw, effective, source_clip


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 10_000), st.integers(1, 6))
def test_moments_are_those_of_the_pooled_samples(seed, n):
    """Components given as samples of different sizes: the mixture with weights by size is all samples together."""
    rng = np.random.default_rng(seed)
    parts = [rng.gamma(2, size=int(rng.integers(5, 50))) * rng.uniform(0.1, 5) + rng.normal(0, 3) for _ in range(n)]
    moments = [[x.mean(), x.var(), ((x - x.mean()) ** 3).mean(), ((x - x.mean()) ** 4).mean()] for x in parts]
    law, pooled = EffectiveLaw(moments, [len(x) for x in parts]), np.concatenate(parts)
    assert law.mean == pytest.approx(pooled.mean(), rel=1e-10, abs=1e-12)
    assert law.variance == pytest.approx(pooled.var(), rel=1e-10)
    assert law.skewness == pytest.approx(stats.skew(pooled), rel=1e-8, abs=1e-10)
    assert law.kurtosis == pytest.approx(stats.kurtosis(pooled), rel=1e-8, abs=1e-9)


def test_agrees_with_the_mixture_law_and_not_with_weighted_kurtosis():
    parts = [Gaussian(1), Gaussian(3)]
    law = EffectiveLaw.from_laws(parts, [0.9, 0.1])
    assert law.kurtosis == pytest.approx(float(Mixture(parts, [0.9, 0.1]).kurtosis), rel=1e-12)
    assert law.kurtosis == pytest.approx(16 / 3)  # while both components have kurtosis 0


def test_skewness_of_the_parts_enters():
    """(0.7 Exp(1), 0.3 N(-2, 1)): 0.577, and -0.027 if the third moments are left out."""
    exponential, gaussian = [1.0, 1.0, 2.0, 9.0], [-2.0, 1.0, 0.0, 3.0]
    assert EffectiveLaw([exponential, gaussian], [0.7, 0.3]).kurtosis == pytest.approx(0.577, abs=5e-4)
    no_skew = [1.0, 1.0, 0.0, 9.0]
    assert EffectiveLaw([no_skew, gaussian], [0.7, 0.3]).kurtosis == pytest.approx(-0.027, abs=5e-4)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.tuples(st.integers(0, 4), st.floats(0, 10)), min_size=1, max_size=30))
def test_updates_equal_a_fresh_mixture_and_their_order_does_not_matter(changes):
    rng = np.random.default_rng(0)
    moments = np.stack(
        [rng.normal(1e4, 1, 5), rng.uniform(0.1, 4, 5), rng.normal(0, 1, 5), rng.uniform(20, 90, 5)], axis=1
    )
    law, weights = EffectiveLaw(moments, np.ones(5)), np.full(5, 0.2)
    for component, weight in changes:
        changed = weights.copy()
        changed[component] = weight
        if changed.sum() <= 1e-3:
            continue
        weights = changed
        law.update(component, weight)
    fresh = EffectiveLaw(moments, weights)
    np.testing.assert_allclose(law.weights, weights / weights.sum(), atol=1e-12)
    assert law.mean == pytest.approx(fresh.mean, rel=1e-13)
    assert law.variance == pytest.approx(fresh.variance, rel=1e-8)
    assert law.kurtosis == pytest.approx(fresh.kurtosis, rel=1e-6, abs=1e-6)
    last = EffectiveLaw(moments, np.ones(5))
    for component in np.random.default_rng(1).permutation(5):
        last.update(int(component), float(weights[component]) + (1e-9 if weights.sum() == 0 else 0))
    assert last.kurtosis == pytest.approx(fresh.kurtosis, rel=1e-6, abs=1e-6)


def test_of_a_profile():
    """Per language, over layer inputs only; by default by the number of values seen."""
    wide = {"a.q_proj": normal(1), "a.down_proj": student(9, 4), "a.k_proj.output": normal(1000)}
    narrow = {"a.q_proj": normal(2), "a.down_proj": normal(2), "a.k_proj.output": normal(1000)}
    profile = synthetic_profile({"en": wide, "sw": narrow}, normal(50), values=20_000)
    laws = effective(profile)
    assert list(laws) == ["en", "sw"]
    assert laws["sw"].kurtosis == pytest.approx(0, abs=0.05)
    assert laws["sw"].std == pytest.approx(2, rel=0.01)
    state = [profile.sites[name].moments[1].pool(0) for name in ("a.q_proj", "a.down_proj")]
    pooled = state[0] + state[1]
    assert laws["en"].kurtosis == pytest.approx(float(pooled.kurtosis), rel=1e-9)
    only = effective(profile, {"a.q_proj": 1.0})
    assert only["en"].kurtosis == pytest.approx(0, abs=0.1)
    with pytest.raises(ValueError, match=r"weights: expected input sites of the profile, got 'a\.k_proj\.output'"):
        effective(profile, {"a.k_proj.output": 1.0})


@pytest.mark.parametrize(
    ("moments", "weights", "message"),
    [
        ([[0, 1, 0]], [1], r"moments: expected shape \[n, 4\]"),
        ([[0, -1, 0, 3]], [1], "moments: expected variances of at least 0, got -1"),
        ([[0, np.inf, 0, 3]], [1], "moments: expected finite values"),
        ([[0, 1, 0, 3]], [-1], "weights: expected finite weights, none negative"),
        ([[0, 1, 0, 3]], [1, 1], r"weights: expected shape \[1\], got \[2\]"),
    ],
)
def test_bad_input(moments, weights, message):
    with pytest.raises(ValueError, match=message):
        EffectiveLaw(moments, weights)


def test_bad_updates():
    law = EffectiveLaw.from_laws([Gaussian(), Laplace()], [1, 0])
    with pytest.raises(ValueError, match="weight: expected a number of at least 0, got -1"):
        law.update(0, -1.0)
    with pytest.raises(ValueError, match="at least one component of positive weight"):
        law.update(0, 0.0)
    assert disparity.EffectiveLaw is EffectiveLaw


def test_weights_leave_no_rounding_behind():
    """A weight of 1e17 and back, and removing a far component, give what a fresh mixture gives."""
    moments = [[0, 1, 0, 3.0], [0, 1, 0, 3.0], [1e6, 4, 0, 48.0]]
    law = EffectiveLaw(moments, [1, 1, 1])
    law.update(0, 1e17)
    law.update(0, 1.0)
    fresh = EffectiveLaw(moments, law.weights)
    assert law.kurtosis == fresh.kurtosis
    law.update(2, 0.0)
    assert law.kurtosis == pytest.approx(0, abs=1e-14)
    assert law.variance == pytest.approx(1, rel=1e-14)
    law.update(0, 0.0)
    assert law.weights.tolist() == [0, 1, 0]
    assert law.mean == 0
    with pytest.raises(ValueError, match="weight: expected at least one component"):
        law.update(1, 0.0)


def test_the_sources_clip_is_sigma_times_its_rule():
    """sigma_eff (2.5 + 0.3 ln(1 + kappa_eff)) for 0.9 N(0, 1) + 0.1 N(0, 9): variance 1.8, kurtosis 16 / 3."""
    law = EffectiveLaw([[0, 1, 0, 3], [0, 9, 0, 243]], [0.9, 0.1])
    assert source_clip(law) == pytest.approx(np.sqrt(1.8) * (2.5 + 0.3 * np.log(1 + 16 / 3)), rel=1e-12)
    wider = EffectiveLaw([[0, 100, 0, 3e4], [0, 900, 0, 243e4]], [0.9, 0.1])
    assert source_clip(wider) == pytest.approx(10 * source_clip(law), rel=1e-12)
    assert source_clip(law, 8, "spline") > source_clip(law, 2, "spline")
    with pytest.raises(ValueError, match="bits: expected 4 for coefficients='published'"):
        source_clip(law, 8)
    with pytest.raises(ValueError, match="law: expected positive variance"):
        source_clip(EffectiveLaw([[1, 0, 0, 0]], [1]))
