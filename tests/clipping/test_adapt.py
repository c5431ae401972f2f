"""Clips that follow what is served, against optima by SciPy and by the laws' closed forms."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import optimize, stats

import la_aciq
from la_aciq import clipping
from la_aciq.clipping.adapt import AdaptationRule, rolled_back, start, update

N = 1 << 16


def sums_of(law, alpha, count=N):
    """Exact tail sums [values, clipped, sum of clipped] of a symmetric SciPy law at a clip."""
    mass = 2 * law.sf(alpha)
    total = 2 * law.expect(lambda x: x, lb=alpha, ub=np.inf) if mass > 0 else 0.0
    return [count, count * mass, count * total]


def balanced_at(law, balance):
    """The root of E(|X| - a)+ = c a, by SciPy."""
    return optimize.brentq(lambda a: sums_of(law, a, 1)[2] - a * sums_of(law, a, 1)[1] - balance * a, 0.1, 60)


def test_nothing_moves_while_the_data_are_those_of_calibration():
    law = stats.norm(scale=2)
    alpha = float(clipping.optimal(clipping.Gaussian(sigma=2), bits=4).alpha)
    sums = [[sums_of(law, alpha)]]
    now = start([[alpha]], sums)
    for _ in range(5):
        now = update(now, sums)
    assert now.clips[0, 0] == pytest.approx(alpha, rel=1e-9)


@pytest.mark.parametrize("scale", [0.4, 0.8, 1.6, 3.0])
def test_a_law_that_is_scaled_takes_its_best_clip_along(scale):
    alpha = float(clipping.optimal(clipping.Laplace(sigma=1.0), bits=4).alpha)
    calibrated = stats.laplace(scale=1 / np.sqrt(2))
    now = start([[alpha]], [[sums_of(calibrated, alpha)]])
    drifted = stats.laplace(scale=scale / np.sqrt(2))
    for _ in range(40):
        now = update(now, [[sums_of(drifted, now.clips[0, 0])]])
    best = float(clipping.optimal(clipping.Laplace(sigma=scale), bits=4).alpha)
    assert now.clips[0, 0] == pytest.approx(best, rel=1e-3)


def test_a_law_of_another_shape_comes_close_to_its_best_clip():
    alpha = float(clipping.optimal(clipping.Gaussian(sigma=1.0), bits=4).alpha)
    now = start([[alpha]], [[sums_of(stats.norm(), alpha)]])
    nu = 5
    drifted = stats.t(nu, scale=np.sqrt((nu - 2) / nu))
    for _ in range(40):
        now = update(now, [[sums_of(drifted, now.clips[0, 0])]])
    assert now.clips[0, 0] == pytest.approx(balanced_at(drifted, now.balance[0, 0]), rel=1e-3)
    law = clipping.StudentT(nu=nu, sigma=1.0)
    best = clipping.optimal(law, bits=4)
    before = float(clipping.mse(law, alpha, bits=4))
    after = float(clipping.mse(law, now.clips[0, 0], bits=4))
    assert after < before
    assert after < 1.05 * float(best.mse)


def test_sums_of_the_kernel_move_the_clips_of_their_language_alone():
    rng = np.random.default_rng(0)
    clips = np.full((3, 2), 2.5)
    x = torch.from_numpy(rng.normal(size=(2048, 16)).astype(np.float32))
    table = torch.from_numpy(clips).float()
    both = torch.cat([x, x, x])
    ids = torch.arange(3, dtype=torch.int32).repeat_interleave(len(x))
    _, sums = la_aciq.quantize(both, table, ids, group_size=8, tail_sums=True)
    now = start(clips, sums.numpy())
    _, served = la_aciq.quantize(2 * x, table, ids[: len(x)] + 1, group_size=8, tail_sums=True)
    after = update(now, served.numpy(), rule=AdaptationRule(minimum=1000))
    np.testing.assert_array_equal(after.clips[[0, 2]], clips[[0, 2]])
    assert np.all(after.clips[1] > 2.5)
    assert after.moved.tolist() == [0, 1, 0]
    assert after.version == 1
    back = rolled_back(after, [1])
    np.testing.assert_array_equal(back.clips, clips)
    assert back.version == 2
    assert back.moved.tolist() == [0, 0, 0]
    # A row that may not move stays, whatever it was served.
    assert update(now, served.numpy(), entries=[0, 2], rule=AdaptationRule(minimum=1000)) is now


def served(adversary):
    """30 updates of a table's clips by what four rows are served, from samples of a Gaussian law as calibrated: it
    drifts, attacks (where `adversary`, else is not served), and stays in rows 1 to 3. Returns the clips after each."""
    best = float(clipping.optimal(clipping.Gaussian(sigma=1.0), bits=4).alpha)
    clips = np.full((4, 2), best)
    sizes = {1: [DRIFT] * 30, 2: [1e-3, 1e4] * 15 if adversary else [], 3: [1.0] * 30}
    draw = {row: np.random.default_rng(row) for row in sizes}
    gauss = torch.from_numpy(np.random.default_rng(9).normal(size=(8192, 16)).astype(np.float32))
    _, sums = la_aciq.quantize(gauss, best, group_size=8, tail_sums=True)
    now = start(clips, sums.numpy().repeat(4, axis=0))
    history = []
    for i in range(30):
        rows = [row for row, steps in sizes.items() if i < len(steps)]
        x = np.concatenate([draw[row].normal(scale=sizes[row][i], size=(4096, 16)) for row in rows])
        ids = torch.tensor(rows, dtype=torch.int32).repeat_interleave(4096)
        table = torch.from_numpy(now.clips).float()
        _, sums = la_aciq.quantize(torch.from_numpy(x).float(), table, ids, group_size=8, tail_sums=True)
        now = update(now, sums.numpy())
        history.append(now.clips)
    return np.array(history)


DRIFT = 1.7


def test_drift_converges_and_an_adversary_moves_its_own_clips_alone():
    quiet, attacked = served(adversary=False), served(adversary=True)
    np.testing.assert_array_equal(attacked[:, [0, 1, 3]], quiet[:, [0, 1, 3]])
    law = clipping.Gaussian(sigma=DRIFT)
    best = clipping.optimal(law, bits=4)
    assert abs(quiet[0, 1, 0] / best.alpha - 1) > 0.2  # it starts elsewhere
    np.testing.assert_allclose(quiet[-10:, 1], float(best.alpha), rtol=0.03)
    for alpha in quiet[-1, 1]:
        assert float(clipping.mse(law, alpha, bits=4)) < 1.01 * float(best.mse)
    steady = float(clipping.optimal(clipping.Gaussian(sigma=1.0), bits=4).alpha)
    np.testing.assert_allclose(quiet[:, 3], steady, rtol=0.03)
    np.testing.assert_array_equal(quiet[:, [0, 2]], np.full((30, 2, 2), steady))
    own = attacked[:, 2] / steady
    assert not np.array_equal(attacked[:, 2], quiet[:, 2])
    assert ((own >= 1 / AdaptationRule().span - 1e-9) & (own <= AdaptationRule().span + 1e-9)).all()


def test_too_few_values_move_nothing():
    now = start([[2.5]], [[sums_of(stats.norm(), 2.5)]])
    few = [[[100, 50, 500.0]]]
    assert update(now, few) is now
    assert update(now, few, rule=AdaptationRule(minimum=100)).clips[0, 0] > 2.5


@settings(deadline=None, max_examples=60, derandomize=True)
@given(sums=st.lists(st.tuples(st.integers(0, 1 << 40), st.floats(0, 1), st.floats(1, 1e12)), min_size=1, max_size=60))
def test_no_sequence_of_sums_gets_a_clip_out_of_bounds(sums):
    rule = AdaptationRule(minimum=1)
    now = start(
        [[2.5]],
        [[sums_of(stats.norm(), 2.5)]],
    )
    for count, share, size in sums:
        before, clipped = now, float(int(count * share))
        now = update(now, [[[count, clipped, clipped * now.clips[0, 0] * size]]], rule=rule)
        ratio = now.clips[0, 0] / before.clips[0, 0]
        assert 1 / rule.step - 1e-12 <= ratio <= rule.step + 1e-12
        assert 2.5 / rule.span <= now.clips[0, 0] <= 2.5 * rule.span


@pytest.mark.parametrize(
    "bad",
    [
        [10, 11, 100.0],
        [10, -1, 0.0],
        [10, 5, 1.0],
        [10, 5, np.inf],
        [np.nan, 5, 100.0],
        [10, 0, 3.0],
    ],
)
def test_sums_that_cannot_be_are_refused(bad):
    now = start([[2.5]], [[sums_of(stats.norm(), 2.5)]])
    with pytest.raises(ValueError, match="tail_sums: expected those"):
        update(now, [[bad]])


def test_an_entry_without_calibration_data_never_moves():
    now = start([[2.5, 2.5]], [[[0, 0, 0.0], sums_of(stats.norm(), 2.5)]])
    wide = sums_of(stats.norm(scale=3), 2.5)
    after = update(now, [[wide, wide]])
    assert after.clips[0, 0] == 2.5
    assert after.clips[0, 1] > 2.5


@pytest.mark.parametrize(
    ("settings_", "name"),
    [({"minimum": 0}, "minimum"), ({"damping": 0.0}, "damping"), ({"step": 1.0}, "step"), ({"span": np.inf}, "span")],
)
def test_rules_that_have_no_meaning(settings_, name):
    with pytest.raises(ValueError, match=name):
        AdaptationRule(**settings_)


def test_clips_and_sums_must_fit():
    for alpha in ([2.5], [[0.0]], [[np.nan]]):
        with pytest.raises(ValueError, match="clips: expected finite and positive"):
            start(alpha, [[[1, 0, 0.0]]])
    with pytest.raises(ValueError, match="shape"):
        start([[2.5]], [[1, 0, 0.0]])
