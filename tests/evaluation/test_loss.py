"""Token losses, segments and the paired bootstrap against loops and SciPy."""

from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
import torch
from tiny_llama import tiny_llama

import la_aciq
from la_aciq.calibration import Window
from la_aciq.errors import LaAciqError
from la_aciq.evaluation.loss import (
    Estimate,
    bootstrap_ratios,
    gap_difference,
    gap_interval,
    segment_sums,
    tail_rate,
    token_losses,
)


def test_token_losses_are_those_of_a_float64_softmax():
    model = tiny_llama()
    ids = np.random.default_rng(0).integers(0, 61, 30)
    (losses,) = token_losses(model, [Window(ids, None)], "en")
    with torch.no_grad():
        logits = model(input_ids=torch.from_numpy(ids)[None]).logits[0].double().numpy()
    expected = [np.log(np.exp(logits[t]).sum()) - logits[t, ids[t + 1]] for t in range(29)]
    assert losses.dtype == np.float32
    np.testing.assert_allclose(losses, expected, rtol=1e-5)


def test_token_losses_run_under_the_language():
    seen = []
    model = tiny_llama()
    state = la_aciq.nn.LanguageState(("und", "sw"))
    state.attach(model)
    model.model.register_forward_pre_hook(lambda *_: seen.append(state.ids_for(torch.zeros(1, 5, 1)).tolist()))
    token_losses(model, [Window(np.arange(5), None)], "sw")
    assert seen == [[[1] * 5]]


def test_a_loss_that_is_not_finite_is_an_error():
    class Broken(torch.nn.Linear):
        def forward(self, input_ids, use_cache):
            return SimpleNamespace(logits=torch.full((1, input_ids.shape[1], 9), float("nan")))

    with pytest.raises(LaAciqError, match="'sw' is not finite"):
        token_losses(Broken(1, 1), [Window(np.arange(5), None)], "sw")


def test_segments_do_not_cross_windows():
    values = [np.ones(300), np.full(127, 2.0), np.full(128, 3.0), np.full(129, 4.0)]
    windows = [Window(np.zeros(len(v) + 1, dtype=np.int64), None) for v in values]
    assert segment_sums(values, windows).tolist() == [128, 128, 44, 254, 384, 512, 4]


def test_a_segment_without_a_byte_joins_its_neighbour():
    counts = [np.ones(300, dtype=np.int64) for _ in range(4)]
    counts[1][:128] = 0
    counts[2][128:256] = 0
    counts[2][256:] = 0
    counts[3][:] = 0
    windows = [Window(np.zeros(301, dtype=np.int64), c) for c in counts]
    assert segment_sums([np.ones(300)] * 4, windows).tolist() == [128, 128, 44, 256, 44, 300]
    assert segment_sums(counts, windows).tolist() == [128, 128, 44, 128, 44, 128]


def pairs(n=40, seed=0):
    random = np.random.default_rng(seed)
    weight = random.integers(50, 600, n).astype(float)
    return weight * (0.1 + 0.2 * random.standard_normal(n)), weight


def test_bootstrap_agrees_with_scipy():
    difference, weight = pairs()
    ours = bootstrap_ratios(difference, weight, resamples=20000)
    theirs = scipy.stats.bootstrap(
        (difference, weight),
        lambda d, w, axis: d.sum(axis) / w.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=20000,
        method="percentile",
        random_state=1,
    )
    assert ours.std(ddof=1) == pytest.approx(theirs.standard_error, rel=0.03)


def test_bootstrap_replicates_are_ratios_of_resampled_sums():
    # Whatever is drawn, a resample of equal ratios has that ratio, and no ratio leaves the range of the segments'.
    weight = pairs()[1]
    np.testing.assert_allclose(bootstrap_ratios(0.25 * weight, weight), 0.25, rtol=1e-12)
    difference, weight = pairs(3)
    ratios = bootstrap_ratios(difference, weight, resamples=500)
    every = {round(float(sum(difference[list(draw)]) / sum(weight[list(draw)])), 9) for draw in np.ndindex(3, 3, 3)}
    assert {round(float(ratio), 9) for ratio in ratios} <= every
    assert len(set(np.round(ratios, 9))) == len(every)  # 500 draws reach all ten


def test_bootstrap_is_seeded_and_paired(monkeypatch):
    difference, weight = pairs()
    first = bootstrap_ratios(difference, weight, seed=[3, 1])
    assert np.array_equal(first, bootstrap_ratios(difference, weight, seed=[3, 1]))
    assert not np.array_equal(first, bootstrap_ratios(difference, weight, seed=[3, 2]))
    # The same seed draws the same segments for another quantity.
    np.testing.assert_allclose(bootstrap_ratios(2 * difference + weight, weight, seed=[3, 1]), 2 * first + 1)
    # In pieces or at once: the number of replicates is the one asked for.
    monkeypatch.setattr("la_aciq.evaluation.loss._RESAMPLES_AT_ONCE", 40 * 7)
    assert len(bootstrap_ratios(difference, weight, resamples=100)) == 100


def test_the_interval_of_a_mean_is_students():
    values = np.random.default_rng(3).standard_normal(8)
    estimate = Estimate.ratio(values, np.ones(8), resamples=100_000)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert estimate.interval() == pytest.approx((expected.low, expected.high), abs=0.01)
    expected = scipy.stats.ttest_1samp(values, 0).confidence_interval(1 - 0.05 / 12)
    assert estimate.interval(12) == pytest.approx((expected.low, expected.high), abs=0.02)
    assert estimate.se == pytest.approx(scipy.stats.sem(values), rel=0.01)


def test_a_mean_of_languages_has_welchs_degrees_of_freedom():
    random = np.random.default_rng(4)
    samples = [random.standard_normal(5), 3 * random.standard_normal(9)]
    a, b = (Estimate.ratio(s, np.ones(len(s)), resamples=100_000, seed=i) for i, s in enumerate(samples))
    # Twice the mean of a and -b is their difference.
    welch = scipy.stats.ttest_ind(samples[0], samples[1], equal_var=False)
    mean = Estimate.mean([a, Estimate(-b.value, -b.replicates, b.freedom)])
    low, high = mean.interval()
    expected = welch.confidence_interval(0.95)
    assert mean.freedom == pytest.approx(welch.df, rel=0.02)
    assert (2 * low, 2 * high) == pytest.approx((expected.low, expected.high), abs=0.05)


def language_estimates(random, kind, n, languages, shift=0.0):
    """Estimates of 0.1 + shift from n segments per language: Gaussian, or Gamma(16), whose skewness is 0.5."""
    size = languages, n
    weight = random.uniform(400, 600, size)
    noise = random.standard_normal(size) if kind == "gaussian" else random.gamma(16, 0.25, size) - 4
    return [
        Estimate.ratio(w * (0.1 + 0.2 * e + s), w, resamples=300, seed=int(random.integers(2**32)))
        for w, e, s in zip(weight, noise, np.broadcast_to(shift, languages), strict=True)
    ]


@pytest.mark.parametrize("kind", ["gaussian", "skewed"])
def test_the_interval_of_eight_segments_covers_the_truth(kind):
    random = np.random.default_rng(0)
    estimates = language_estimates(random, kind, 8, 4000)
    covered = np.mean([low <= 0.1 <= high for low, high in (e.interval() for e in estimates)])
    assert 0.93 <= covered <= 0.97  # the standard error of 4000 runs is 0.0034


@pytest.mark.parametrize("kind", ["gaussian", "skewed"])
def test_twelve_languages_without_a_difference_seldom_show_one(kind):
    random = np.random.default_rng(1)
    wrong = mean_covered = 0
    for _ in range(1500):
        estimates = language_estimates(random, kind, 8, 12)
        wrong += any(not low <= 0.1 <= high for low, high in (e.interval(12) for e in estimates))
        low, high = Estimate.mean(estimates).interval()
        mean_covered += low <= 0.1 <= high
    assert 0.02 <= wrong / 1500 <= 0.08
    assert mean_covered / 1500 >= 0.93


@pytest.mark.parametrize(
    "truth", [np.zeros(12), np.linspace(0, 0.4, 12), np.eye(12)[0] * 0.5], ids=["0", "even", "one"]
)
def test_the_gaps_interval_covers_the_truth_whichever_languages_are_the_extremes(truth):
    random = np.random.default_rng(2)
    covered = 0
    for _ in range(200):
        gap, low, high = gap_interval(language_estimates(random, "gaussian", 8, 12, truth))
        assert low <= gap <= high
        covered += low <= np.ptp(truth) <= high
    assert covered / 200 >= 0.93


def test_a_difference_of_gaps_is_paired():
    random = np.random.default_rng(5)
    first = language_estimates(random, "gaussian", 8, 12, np.linspace(0, 0.4, 12))
    same = gap_difference(first, first)
    assert (same.value, same.se) == (0, 0)
    second = [
        Estimate(e.value + s, e.replicates + s, e.freedom) for e, s in zip(first, [0.0] * 11 + [1.0], strict=True)
    ]
    assert gap_difference(second, first).value == pytest.approx(
        np.ptp([e.value for e in second]) - np.ptp([e.value for e in first])
    )
    low, high = gap_difference(second, first).interval()
    assert 0 < low < high


def test_tail_rate_counts_segments_by_their_loss_per_token():
    tokens = np.array([128.0, 128.0, 127.0, 10.0])
    difference = np.array([63.9, 64.1, -80.0, 6.0])
    assert tail_rate(difference, tokens) == 0.5
    assert tail_rate(difference, tokens, threshold=1.0) == 0
