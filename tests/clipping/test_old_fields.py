"""Names of 0.1 in clip tables, moving clips and regret: they work until 0.3 with a warning that names the new ones."""

import warnings

import numpy as np
import pytest

from la_aciq.clipping import ClipTable
from la_aciq.clipping.adapt import AdaptationRule, Adapted, rolled_back, start, update
from la_aciq.disparity import DeploymentBounds, RegretTable

CLIPS, FACTORS = {"q": np.full((2, 1), 3.0, np.float32)}, {"q": np.full((2, 1), 1.5, np.float32)}
SHARES = {"q": np.zeros((2, 1), np.float32)}
TABLE = {
    "entries": ("und", "en"),
    "clips": CLIPS,
    "clip_factors": FACTORS,
    "shrinkage": SHARES,
    "bits": 4,
    "codebook": "midrise",
    "objective": "exact",
    "granularity": "group",
    "sharing": "language",
    "language_objective": "mean",
}
ADAPTED = {"clips": np.ones((1, 1)), "calibrated": np.ones((1, 1)), "balance": np.ones((1, 1)), "moved": np.zeros(1)}
REGRET = {"kinds": ("q_proj",), "languages": ("en",), "separate": np.ones((1, 1)), "shared": np.ones((1, 1))}
BOUNDS = {
    "languages": ("en", "sw"),
    "shared": np.array([0.1, 0.3]),
    "separate": np.array([0.1, 0.2]),
    "total_variation": 1.0,
    "cells": 2.0,
    "wasserstein_shared": 3.0,
    "wasserstein_separate": 4.0,
}
FIELDS = [
    (ClipTable, TABLE, "rows", "entries"),
    (ClipTable, TABLE, "alpha", "clips"),
    (ClipTable, TABLE, "shape", "clip_factors"),
    (Adapted, ADAPTED, "alpha", "clips"),
    (RegretTable, REGRET, "own", "separate"),
    (DeploymentBounds, BOUNDS, "own", "separate"),
    (DeploymentBounds, BOUNDS, "wasserstein_own", "wasserstein_separate"),
]
each_field = pytest.mark.parametrize(
    ("cls", "fields", "old", "new"), FIELDS, ids=[f"{cls.__name__}-{old}" for cls, _, old, _ in FIELDS]
)


@each_field
def test_an_old_field_reads_as_the_new_one_with_one_warning(cls, fields, old, new):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        instance = cls(**fields)
        expected = getattr(instance, new)
    with pytest.warns(DeprecationWarning, match=rf"{cls.__name__}\.{old} is now {cls.__name__}\.{new};") as caught:
        assert getattr(instance, old) is expected
    assert [warning.filename for warning in caught] == [__file__]


@each_field
def test_an_old_field_is_taken_as_an_argument_with_one_warning(cls, fields, old, new):
    before = {old if name == new else name: value for name, value in fields.items()}
    with pytest.warns(DeprecationWarning, match=rf"{cls.__name__}\({new}=\.\.\.\)") as caught:
        instance = cls(**before)
    assert [warning.filename for warning in caught] == [__file__]
    assert getattr(instance, new) is fields[new]
    with pytest.raises(TypeError, match=f"{new!r} and its old name {old!r}"):
        cls(**fields, **{old: fields[new]})


def test_the_old_names_of_what_is_not_a_field():
    table, bounds = ClipTable(**TABLE), DeploymentBounds(**BOUNDS)
    with pytest.warns(DeprecationWarning, match=r"ClipTable\.row is now ClipTable\.entry"):
        assert table.row("en-GB") == table.entry("en-GB") == 1
    with pytest.warns(DeprecationWarning, match=r"own_gap is now DeploymentBounds\.separate_gap"):
        assert bounds.own_gap == bounds.separate_gap == pytest.approx(0.1)


def test_the_old_arguments_of_moving_clips():
    sums = [[[1e5, 1e3, 4e3]]] * 2
    with pytest.warns(DeprecationWarning, match=r"start\(clips=\.\.\.\)"):
        now = start(alpha=[[3.0], [3.0]], tail_sums=sums)
    np.testing.assert_array_equal(now.clips, start([[3.0], [3.0]], sums).clips)
    more, rule = [[[1e5, 9e3, 4e4]]] * 2, AdaptationRule(minimum=1)
    with pytest.warns(DeprecationWarning, match=r"update\(entries=\.\.\.\)"):
        moved = update(now, more, rows=[1], rule=rule)
    np.testing.assert_array_equal(moved.clips, update(now, more, [1], rule).clips)
    assert moved.clips[0, 0] == 3.0 < moved.clips[1, 0]
    with pytest.warns(DeprecationWarning, match=r"rolled_back\(entries=\.\.\.\)"):
        assert rolled_back(moved, rows=[1]).clips[1, 0] == 3.0
