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
from la_aciq.evaluation.loss import bootstrap_ratios, interval, segment_sums, tail_rate, token_losses


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
    windows = [np.ones(300), np.full(127, 2.0), np.full(128, 3.0), np.full(129, 4.0)]
    assert segment_sums(windows).tolist() == [128, 128, 44, 254, 384, 512, 4]


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
    low, high = interval(ours)
    width = theirs.confidence_interval.high - theirs.confidence_interval.low
    assert low == pytest.approx(theirs.confidence_interval.low, abs=0.03 * width)
    assert high == pytest.approx(theirs.confidence_interval.high, abs=0.03 * width)


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


def test_interval_of_known_replicates():
    low, high = interval(np.arange(1001, dtype=float))
    assert (low, high) == pytest.approx((25, 975))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    covered = 0
    for seed in range(300):
        difference, weight = pairs(30, seed)
        low, high = interval(bootstrap_ratios(difference, weight, resamples=400, seed=seed))
        covered += low <= 0.1 <= high
    assert 0.88 <= covered / 300 <= 0.99


def test_tail_rate_counts_segments_by_their_loss_per_token():
    tokens = np.array([128.0, 128.0, 127.0, 10.0])
    difference = np.array([63.9, 64.1, -80.0, 6.0])
    assert tail_rate(difference, tokens) == 0.5
    assert tail_rate(difference, tokens, threshold=1.0) == 0
